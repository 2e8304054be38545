"""The parts of a model that the host runs, in ONNX Runtime."""

import weakref

import numpy as np

from moeware.hw.arch.program import HostStep

__all__ = ["run_host_step"]

_sessions: dict[int, tuple[weakref.ref, object]] = {}


def run_host_step(step: HostStep, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of `step` by name, each [frames, ...].

    values : at least `step.inputs`, each [frames, ...]. A step whose model is fixed to a batch of
    one runs once for each frame.
    """
    session = _session(step)
    feeds = {name: values[name] for name in step.inputs}
    frames = len(next(iter(feeds.values()), [None]))
    fixed = any(argument.shape[:1] == [1] for argument in session.get_inputs())
    if not fixed or frames == 1:
        return dict(zip(step.outputs, session.run(step.outputs, feeds)))
    results = [session.run(step.outputs, {name: value[frame:frame + 1]
                                          for name, value in feeds.items()})
               for frame in range(frames)]
    return {name: np.concatenate(parts) for name, parts in zip(step.outputs, zip(*results))}


def _session(step: HostStep):
    key = id(step)
    if key not in _sessions:
        import onnxruntime  # programs without host steps run without it
        # Beyond the basic level, operators are fused whatever their axis: Add and
        # LayerNormalization become a normalisation over the last one.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        session = onnxruntime.InferenceSession(step.model, options,
                                               providers=["CPUExecutionProvider"])
        _sessions[key] = weakref.ref(step, lambda _: _sessions.pop(key, None)), session
    return _sessions[key][1]
