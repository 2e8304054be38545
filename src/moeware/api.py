"""The Python interface above all rooms: compile a model, open a session on a model or a program."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moeware.hw.arch.config import Config, ConfigError
from moeware.hw.arch.program import Program
from moeware.runtime import session

__all__ = ["Config", "Program", "Session", "compile", "find_board", "find_config", "profile"]

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
            calibration: Calibration | None = None, **options) -> Program | None:
    """Compile an ONNX file.

    Parameters
    ----------
    model : path of the ONNX file.
    config : as `find_config` takes it.
    calibration : real inputs, float32 [frames, ...] by input name, or a file or folder of them.
    options : as `moeware.compiler.pipeline.compile_model` takes them; None is returned where they
        stop before the last stage.

    Raises
    ------
    CompileError, ConfigError
    """
    from moeware.compiler.calibrate import load_samples
    from moeware.compiler.fuse import fuse
    from moeware.compiler.load import load
    from moeware.compiler.pipeline import compile_model, model_ports
    if isinstance(calibration, (str, os.PathLike)):
        calibration = load_samples(calibration, model_ports(fuse(load(Path(model))))[0])
    return compile_model(model, find_config(config), dict(calibration or {}), **options)


def profile(program: Program | str | os.PathLike, feeds: Mapping[str, np.ndarray], **options):
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
    config, calibration : for an ONNX file, as `compile` takes them.
    model, device, options : as `moeware.runtime.session.Session` takes them.
    """

    def __init__(self, model: Program | str | os.PathLike, device: str = "auto", *,
                 config: Config | str | os.PathLike | None = None,
                 calibration: Calibration | None = None, **options):
        if not isinstance(model, Program) and Path(model).suffix in MODEL_SUFFIXES:
            if config is None or calibration is None:
                raise ValueError("Session on an ONNX file must have a config and calibration data; "
                                 "or compile the model once and open the program")
            compiled = compile(model, config, calibration)
            assert compiled is not None
            model = compiled
        super().__init__(model, device, **options)
