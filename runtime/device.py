"""What every device is to a session, and the names that devices are opened by.

A device runs the integers of one `DeviceStep`. Sessions quantise and dequantise; a device never
sees a float. `open_device` finds factories by name, so that a device needs importing only when it
is wanted and devices of other rooms can be had without this room knowing them.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from moeware.hw.arch.config import Config
from moeware.hw.arch.program import DeviceStep, Program

__all__ = ["Device", "DeviceError", "DeviceLost", "Progress", "check_digest", "check_inputs",
           "device_names", "open_device", "register", "runs"]

Progress = Callable[[int, int], None]  # called with (frames done, frames in all) as frames complete


class DeviceError(RuntimeError):
    """A device that cannot be opened, is of another configuration, or failed while it ran."""


class DeviceLost(DeviceError):
    """A device that stopped answering: the same frames can be run elsewhere."""


class Device(Protocol):
    """Runs device steps.

    name : as a placement line says it; config : what the device was built for, or None where it
    runs programs of any configuration; counters : of the last call, one dictionary for each run
    of the hardware, which takes `DeviceStep.frames` frames (see `drive.counter_names`), empty where the device has none.
    """

    name: str
    config: Config | None
    counters: list[dict[str, int]]

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        """Integers of the step's outputs.

        Parameters
        ----------
        program : the program that `step` is part of.
        inputs : integers [frames, rows, channels] under `Port.tensor` of each of `step.inputs`.
        probes : return the integers of `step.probes` too.

        Returns
        -------
        int64 [frames, rows, channels] under `Port.tensor` and, with `probes`, `Probe.tensor`.

        Raises
        ------
        DeviceError
            `DeviceLost` where the device stopped answering.
        """
        ...


Factory = Callable[..., Device]  # takes the configuration, then options by name
_factories: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Let `open_device` call ``factory(config, **options)`` for `name`."""
    _factories[name] = factory


def device_names() -> list[str]:
    """The names that `open_device` knows."""
    return sorted(_factories)


def open_device(name: str, config: Config | None, **options) -> Device:
    """The device called `name`, for programs of `config`.

    Raises
    ------
    DeviceError
        No device has this name, or it cannot be opened.
    """
    if name not in _factories:
        raise DeviceError(f"Device must be one of {device_names()}, not {name!r}")
    return _factories[name](config, **options)


def check_digest(device: str, found: int, config: Config | None, wanted: Config) -> None:
    """That a device with the digest `found` runs programs of the configuration `wanted`.

    config : the device's, where it is known.
    """
    if found != wanted.digest:
        of_device = f" ({config.to_dict()})" if config is not None else ""
        raise DeviceError(
            f"Configuration of {device} must have the digest {wanted.digest:#010x} that the "
            f"program was compiled for ({wanted.to_dict()}), not {found:#010x}{of_device}: compile "
            "the model for this device, or build and deploy the program's configuration")


def runs(frames: int, per_run: int) -> list[list[int]]:
    """Frames of each run; the last run is filled up with its last frame again."""
    return [[min(first + i, frames - 1) for i in range(per_run)]
            for first in range(0, frames, per_run)]


def check_inputs(step: DeviceStep, inputs: dict[str, np.ndarray]) -> int:
    """That `inputs` are those of `step`, for at least one frame; returns the number of frames."""
    wanted = {port.tensor: (port.region.rows, port.region.channels) for port in step.inputs}
    found = {name: values.shape[1:] for name, values in inputs.items()}
    frames = {len(values) for values in inputs.values()}
    if found != wanted or len(frames) != 1 or 0 in frames:
        shapes = {name: values.shape for name, values in inputs.items()}
        raise DeviceError(f"Inputs of a device step must be one or more frames of {wanted}, "
                          f"not {shapes}")
    return frames.pop()


def _open_torch(config, **options):
    from moeware.runtime.torch_path import TorchDevice
    return TorchDevice(**options)


def _open_board(config, **options):
    from moeware.runtime.board_device import open_board
    return open_board(config, **options)


register("torch", _open_torch)
register("board", _open_board)
