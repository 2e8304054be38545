"""moeware: ONNX mixture-of-experts transformers on FPGAs, exact to the last bit.

    program = moeware.compile("model.onnx", "ulx3s-85f", "calibration.npz")
    session = moeware.Session(program)
    logits, = session.run(None, {"image": images})
"""

from moeware.runtime.device import Device, register

__all__ = ["Config", "Program", "Session", "__version__", "compare", "compile", "estimate",
           "export", "find_board", "find_config", "profile"]


def _open_golden(config, **options) -> Device:
    from moeware.sim.golden import GoldenDevice
    return GoldenDevice(**options)


def _open_rtl(config, **options) -> Device:
    from moeware.sim.rtl import RtlDevice
    return RtlDevice(config, **options)


register("golden", _open_golden)
register("rtl", _open_rtl)


def __getattr__(name: str):
    # Importing a room must not load another one: what the API needs is loaded when it is used.
    if name == "__version__":
        import importlib.metadata
        return importlib.metadata.version("moeware")
    if name in __all__:
        from moeware import api
        return getattr(api, name)
    raise AttributeError(f"module 'moeware' has no attribute {name!r}")
