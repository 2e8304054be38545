"""The Python interface above all rooms: export, compile and compare models, open sessions."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moeware.accuracy import compare
from moeware.hw.arch.config import Config, ConfigError
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.timeline import Timeline
from moeware.runtime import session

__all__ = ["Config", "Program", "Session", "compare", "compile", "estimate", "export",
           "find_board", "find_config", "profile"]

MODEL_SUFFIXES = (".onnx", ".onnxtxt")

Calibration = Mapping[str, np.ndarray] | str | os.PathLike


def find_config(config: Config | str | os.PathLike) -> Config:
    """The configuration of a board by its name, that of a JSON file, or `config` itself.

    Raises
    ------
    ConfigError
        Neither a board nor a file, or not a configuration.
    """
    if isinstance(config, Config):
        return config
    path = Path(config)
    if path.suffix == ".json":
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"Configuration {path} must be a readable JSON file: "
                              f"{error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"Configuration {path} must be a JSON object, not "
                              f"{type(fields).__name__}")
        return Config.from_dict(fields)
    return find_board(str(config)).config


def find_board(name: str):
    """The `moeware.boards.board.Board` called `name`.

    Raises
    ------
    ConfigError
        There is none.
    """
    from moeware.boards import BOARDS
    if name not in BOARDS:
        raise ConfigError(f"Board must be one of {', '.join(sorted(BOARDS))}, not {name!r} (a "
                          "configuration can also be the name of a .json file)")
    return BOARDS[name]


def compile(model: str | os.PathLike, config: Config | str | os.PathLike,
            calibration: Calibration | None = None, *, axes: Mapping[str, int] | None = None,
            fixed: Mapping[str, float | str] | None = None, outputs: Sequence[str] = (),
            **options) -> Program | None:
    """Compile an ONNX file.

    Parameters
    ----------
    model : path of the ONNX file.
    config : as `find_config` takes it.
    calibration : real inputs, float32 [frames, ...] by input name, or a file or folder of them.
    axes, fixed, outputs : what the file leaves open, as `moeware.compiler.interface.Interface` takes
        them: ``axes={"sequence": 128}``, ``fixed={"attention_mask": 1}``, ``outputs=["logits"]``.
    options : as `moeware.compiler.pipeline.compile_model` takes them, for example
        ``choices={"task": [0, 1]}``, ``expert_bits=3.0`` or ``nested=True``; None is returned where they
        stop before the last stage.

    Raises
    ------
    CompileError, ConfigError
    """
    from moeware.compiler.calibrate import load_samples
    from moeware.compiler.choices import check_choices, combinations
    from moeware.compiler.fuse import fuse
    from moeware.compiler.interface import Interface
    from moeware.compiler.load import load
    from moeware.compiler.pipeline import compile_model, model_ports
    interface = Interface(axes or {}, fixed or {}, outputs)
    if isinstance(calibration, (str, os.PathLike)):
        choices = check_choices(options.get("choices") or {})
        first = fuse(load(Path(model), combinations(choices)[0], interface))
        calibration = load_samples(calibration, model_ports(first)[0], choices)
    return compile_model(model, find_config(config), dict(calibration or {}), interface=interface,
                         **options)


def estimate(program: Program | str | os.PathLike, *, clock_hz: float = 100e6, dram=None,
             feeds: Mapping[str, np.ndarray | int] | None = None) -> list[Timeline]:
    """Cycles of a program, estimated without its gateware.

    Parameters
    ----------
    program : a program, or a program's file.
    clock_hz, dram : clock of the accelerator, and its memory, a `moeware.sim.dram.DramTiming`
        (default: `SDRAM_16BIT`).
    feeds : inputs [frames, ...] by name, whose tokens choose the experts; without them every expert
        gets the same share, and the program runs with the first value of each of its choices.

    Returns
    -------
    A `moeware.hw.arch.timeline.Timeline` for each device step, and within it for each run, of as many
    frames as the program has in flight.
    """
    from moeware.compiler.estimate import DramCycles
    from moeware.compiler.estimate import estimate as of_step
    from moeware.sim.dram import SDRAM_16BIT
    if not isinstance(program, Program):
        program = Program.load(program)
    cycles = (dram or SDRAM_16BIT).cycles(program.config.bus_bytes, clock_hz)
    memory = DramCycles(**{name: getattr(cycles, name) for name, _ in cycles._fields_})
    if feeds is None:
        steps = [step for step in program.steps_of() if isinstance(step, DeviceStep)]
        return [of_step(program, step, memory) for step in steps]
    from moeware.runtime.chosen import Chooser
    chooser = Chooser()
    session.Session(program, chooser).run(None, feeds)
    return [of_step(program, step, memory, choices) for step, choices in chooser.choices]


def export(model, example_inputs, path: str | os.PathLike, **options):
    """Write a PyTorch module as an ONNX file that compiles, proved against the module.

    Parameters, result and errors as of `moeware.exporting.export`, which needs no transformers.
    """
    from moeware.exporting import export as write
    return write(model, example_inputs, path, **options)


def profile(program: Program | str | os.PathLike, feeds: Mapping[str, np.ndarray | int],
            **options):
    """Run a program on simulated gateware and see where the cycles go.

    Parameters
    ----------
    program : a program, or a program's file.
    feeds : inputs [frames, ...] by name.
    options : as `moeware.sim.rtl.RtlDevice` takes them: `dram`, `clock_hz`.

    Returns
    -------
    `moeware.sim.profile.Profile` of each device step, and within it of each frame.
    """
    from moeware.sim.profile import ProfilingDevice
    if not isinstance(program, Program):
        program = Program.load(program)
    device = ProfilingDevice(program.config, **options)
    session.Session(program, device).run(None, feeds)
    return device.profiles


class Session(session.Session):
    """A session on a program, a program's file, or an ONNX file, which it compiles first.

    Parameters
    ----------
    config, calibration, choices, axes, fixed, outputs : for an ONNX file, as `compile` takes them.
    model, device, options : as `moeware.runtime.session.Session` takes them.
    """

    def __init__(self, model: Program | str | os.PathLike, device: str = "auto", *,
                 config: Config | str | os.PathLike | None = None,
                 calibration: Calibration | None = None,
                 choices: Mapping[str, Sequence[int]] | None = None,
                 axes: Mapping[str, int] | None = None,
                 fixed: Mapping[str, float | str] | None = None, outputs: Sequence[str] = (),
                 **options):
        if not isinstance(model, Program) and Path(model).suffix in MODEL_SUFFIXES:
            if config is None or calibration is None:
                raise ValueError("Session on an ONNX file must have a config and calibration data; "
                                 "or compile the model once and open the program")
            compiled = compile(model, config, calibration, choices=choices, axes=axes, fixed=fixed,
                               outputs=outputs)
            assert compiled is not None
            model = compiled
        super().__init__(model, device, **options)
