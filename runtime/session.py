"""Sessions: a compiled model that answers float inputs, wherever it runs."""

import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np

from moeware.hw.arch.program import DeviceStep, HostStep, Program

from .device import Device, DeviceError, DeviceLost, Progress, check_digest, open_device
from .feeds import FeedError, NodeArg, check_feeds, check_names, take_choice
from .host_step import run_host_step

__all__ = ["FeedError", "NodeArg", "PlacementError", "Session"]

log = logging.getLogger("moeware")


class PlacementError(ValueError):
    """Nodes that would run elsewhere than a strict session was asked to run them."""


class Session:
    """Runs a program; the interface is that of `onnxruntime.InferenceSession`.

    The session says in one line, in `placement` and to the logger "moeware", where the nodes run;
    as a warning if that is not what was asked for.

    Parameters
    ----------
    program : the program, or the path of its file.
    expert_bits : 8 or 4, of a program with nested experts (None: as it is, 8).
    device : "auto" (a board if one answers, otherwise PyTorch), a name that `open_device` knows, or
        a device.
    strict : refuse nodes on the host, and PyTorch in place of a board that was asked for.
    fallback : run on PyTorch, with a warning and the same integers, where a board that was asked
        for is not there or vanishes; otherwise that is an error.
    port : serial port of the board; timeout_s : longest time that a board may take for one frame.

    Raises
    ------
    PlacementError
        `strict`, and the program has nodes for the host.
    DeviceError
        The device is not there, or of another configuration than the program.
    ProgramError, OSError
        The file is not a program, or cannot be read; it has no experts of so many bits.
    """

    def __init__(self, program: Program | str | os.PathLike, device: str | Device = "auto", *,
                 strict: bool = False, fallback: bool = True, port: str | None = None,
                 timeout_s: float = 10.0, expert_bits: int | None = None):
        self.program = program if isinstance(program, Program) else Program.load(program)
        if expert_bits is not None:
            self.program = self.program.with_expert_bits(expert_bits)
        self._fallback = fallback and not strict
        self._counters: list[dict[str, int]] = []
        if strict:
            self._refuse_host_nodes()
        note = ""
        if device in ("auto", "board"):
            self._device, note = self._find_board(device == "auto", port, timeout_s)
        elif isinstance(device, str):
            self._device = open_device(device, self.program.config)
        else:
            self._device = device
        if (config := self._device.config) is not None:
            check_digest(self._device.name, config.digest, config, self.program.config)
        self._place(note)

    def _refuse_host_nodes(self) -> None:
        reasons = [f"node {name}: {reason}" for step in self.program.steps
                   if isinstance(step, HostStep) for name, reason in step.reasons.items()]
        if any(isinstance(step, HostStep) for step in self.program.steps):
            raise PlacementError("Nodes of a strict session must all be on the accelerator, but "
                                 f"{len(reasons)} run on the host ({'; '.join(reasons)}): change "
                                 "the model, or open the session without strict")

    def _find_board(self, auto: bool, port: str | None, timeout_s: float) -> tuple[Device, str]:
        try:
            return open_device("board", self.program.config, port=port, timeout_s=timeout_s), ""
        except DeviceError as error:
            if not (auto or self._fallback):
                raise
            return open_device("torch", self.program.config), f" ({error})"

    def _place(self, note: str) -> None:
        model = self.program.metadata.get("model", "program")
        self.placement = (f"{model}: {self.program.placement}, executed by {self._device.name}"
                          f"{note}")
        elsewhere = note or any(isinstance(step, HostStep) for step in self.program.steps)
        log.log(logging.WARNING if elsewhere else logging.INFO, "%s", self.placement)

    @property
    def device_name(self) -> str:
        """Name of the device that the next run uses."""
        return self._device.name

    @property
    def last_counters(self) -> list[dict[str, int]]:
        """Of the last run: one dictionary for each frame, sums over the device steps; empty where
        the device has no counters."""
        return [dict(frame) for frame in self._counters]

    def get_inputs(self) -> list[NodeArg]:
        inputs = [NodeArg(name, ["batch", *shape], kind)
                  for name, shape, kind in self.program.inputs]
        return inputs + [NodeArg(name, [], "tensor(int64)") for name in self.program.choices]

    def get_outputs(self) -> list[NodeArg]:
        return [NodeArg(name, ["batch", *shape], kind)
                for name, shape, kind in self.program.outputs]

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray | int], *,
            progress: Progress | None = None) -> list[np.ndarray]:
        """Outputs, each [batch, ...], for feeds [batch, ...] by the name of the input. A choice of
        the program, such as a task, is one integer for the whole batch.

        output_names : which outputs, in which order; None for all.

        Raises
        ------
        FeedError
            A feed is missing, unknown, empty, or of another type or shape; a choice that the program was
            not compiled for; an unknown output.
        DeviceError
            The device failed; `DeviceLost` only without `fallback`.
        """
        names = check_names(self.program, output_names)
        choice, values = take_choice(self.program, feeds)
        frames = check_feeds(self.program, values)
        self._counters = []
        for step in self.program.steps_of(choice):
            if isinstance(step, HostStep):
                values |= run_host_step(step, values)
            else:
                values |= self._run_device_step(step, values, progress)
        for name in names:
            assert len(values[name]) == frames
        return [values[name] for name in names]

    def _run_device_step(self, step: DeviceStep, values: dict[str, np.ndarray],
                         progress: Progress | None) -> dict[str, np.ndarray]:
        inputs = {port.tensor: port.quantise(values[port.name]) for port in step.inputs}
        try:
            results = self._device.run(self.program, step, inputs, progress=progress)
        except DeviceLost as error:
            if not self._fallback:
                raise
            self._device = open_device("torch", self.program.config)
            self._place(f" ({error})")
            results = self._device.run(self.program, step, inputs, progress=progress)
        self._count(self._device.counters)
        return {port.name: port.dequantise(results[port.tensor]) for port in step.outputs}

    def _count(self, frames: list[dict[str, int]]) -> None:
        if not self._counters:
            self._counters = [dict(frame) for frame in frames]
            return
        for total, frame in zip(self._counters, frames):
            for name, value in frame.items():
                total[name] = total.get(name, 0) + value
