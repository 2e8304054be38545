"""The host's side of a run: the one routine for boards, simulated gateware and test doubles.

Whatever offers registers and memory is a `Target`; a `Driver` uploads a program, writes a frame's
inputs, starts, waits and reads the outputs and the counters.
"""

import hashlib
import time
from typing import Protocol

import numpy as np

from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.layout import ALIGNMENT
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.registers import ENGINE_COUNTERS, MAGIC, Control, Register, Status, counter

from .device import DeviceError, Progress, check_digest, check_inputs, runs

__all__ = ["Driver", "Target", "counter_names", "read_counters"]

_RUN_COUNTERS = (Register.CYCLES, Register.INSTRUCTIONS, Register.READ_BEATS, Register.WRITE_BEATS)
_COUNTERS = {register.name.lower(): int(register) for register in _RUN_COUNTERS} | {
    f"{engine.name.lower()}_{state}": counter(engine, state)
    for engine in Engine for state in ENGINE_COUNTERS}

POLL_INTERVAL_S = 0.001


class Target(Protocol):
    """Registers and DRAM of an accelerator.

    A target whose time passes only when it is asked (a simulation) also has
    ``wait_done(timeout_s)``, which returns when STATUS says DONE, or raises `TimeoutError`; other
    targets are polled. One to which every request is a journey also has
    ``read_registers(first, count)``.
    """

    def read_register(self, index: int) -> int: ...

    def write_register(self, index: int, value: int) -> None: ...

    def read_memory(self, address: int, length: int) -> bytes: ...

    def write_memory(self, address: int, data: bytes) -> None: ...


def counter_names() -> list[str]:
    """Keys of a frame's counters: ``cycles``, ``instructions``, ``read_beats``, ``write_beats``
    and, for each engine and each of `ENGINE_COUNTERS`, for example ``linear_busy``."""
    return list(_COUNTERS)


def read_counters(target: Target) -> dict[str, int]:
    """All counters of the last run."""
    if not hasattr(target, "read_registers"):
        return {name: target.read_register(index) for name, index in _COUNTERS.items()}
    first, last = min(_COUNTERS.values()), max(_COUNTERS.values())
    values = target.read_registers(first, last - first + 1)
    return {name: values[index - first] for name, index in _COUNTERS.items()}


class Driver:
    """Runs programs on a target.

    name : what errors call the target; config : what it was built for, where that is known;
    timeout_s : longest time for one frame.

    Raises
    ------
    DeviceError
        No accelerator answers.
    """

    def __init__(self, target: Target, *, name: str, config: Config | None = None,
                 timeout_s: float = 10.0):
        self.target = target
        self.name = name
        self.config = config
        self.timeout_s = timeout_s
        self._image: bytes | None = None
        self._image_hash = b""
        magic = target.read_register(Register.MAGIC)
        if magic != MAGIC:
            raise DeviceError(f"Register MAGIC of {name} must read {MAGIC:#010x}, not "
                              f"{magic:#010x}: deploy a moeware bitstream, or name another port")
        self.digest = target.read_register(Register.DIGEST)

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None,
            ) -> tuple[dict[str, np.ndarray], list[dict[str, int]]]:
        """As `Device.run`; returns the tensors and the counters of each run."""
        frames = check_inputs(step, inputs)
        self.load(program)
        results, counters = [], []
        for batch in runs(frames, step.frames):
            result, counted = self.run_once(
                program, step, {name: values[batch] for name, values in inputs.items()},
                probes=probes)
            results.append(result)
            counters.append(counted)
            if progress is not None:
                progress(batch[-1] + 1, frames)
        return {tensor: np.concatenate([result[tensor] for result in results])[:frames]
                for tensor in results[0]}, counters

    def load(self, program: Program) -> None:
        """Write the program's image, unless it is there already.

        The first and last bytes are read back to notice a target that was reset or used by someone
        else since.

        Raises
        ------
        DeviceError
            The target is of another configuration than the program.
        """
        check_digest(self.name, self.digest, self.config, program.config)
        image = program.image
        if image is not self._image:
            digest = hashlib.sha256(image).digest()
            if digest != self._image_hash:
                self._image = None
            self._image_hash = digest
        if self._image is None or not self._holds(image):
            self.target.write_memory(0, image + bytes(-len(image) % ALIGNMENT))
        self._image = image

    def _holds(self, image: bytes) -> bool:
        last = max(0, len(image) - 1) // ALIGNMENT * ALIGNMENT
        return all(self.target.read_memory(start, ALIGNMENT)[:len(image) - start]
                   == image[start:start + ALIGNMENT] for start in {0, last})

    def run_once(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
                 probes: bool = False) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """One run of a program that `load` has written.

        inputs : integers [step.frames, rows, channels] under `Port.tensor`. Returns int64 of such
        shapes under `Port.tensor` (and `Probe.tensor`), and the counters.

        Raises
        ------
        DeviceError
            The run ended in an error, or did not end within `timeout_s`.
        """
        target, config = self.target, program.config
        for port in step.inputs:
            for frame, values in enumerate(inputs[port.tensor]):
                region = port.region.of_frame(config, frame)
                target.write_memory(region.address, region.pack(config, values))
        target.write_register(Register.PROGRAM, step.entry)
        target.write_register(Register.CONTROL, Control.START)
        self._wait()
        results = {}
        for part in [*step.outputs, *(step.probes if probes else [])]:
            regions = [part.region.of_frame(config, frame) for frame in range(step.frames)]
            results[part.tensor] = np.stack([
                region.unpack(config, target.read_memory(region.address, region.bytes(config)))
                for region in regions])
        return results, read_counters(target)

    def _wait(self) -> None:
        try:
            if hasattr(self.target, "wait_done"):
                self.target.wait_done(self.timeout_s)
            status = self._poll()
        except TimeoutError:
            self._image = None
            raise DeviceError(f"Run on {self.name} must end within {self.timeout_s} s, but is "
                              "still busy: reset the device, or give a longer timeout_s") from None
        if status & Status.ERROR:
            count = self.target.read_register(Register.INSTRUCTIONS)
            self._image = None
            raise DeviceError(f"Run on {self.name} must end without an error, but met an illegal "
                              f"instruction after {count} instructions: the program's image was "
                              "damaged; run it again")

    def _poll(self) -> int:
        deadline = time.monotonic() + self.timeout_s
        while True:
            status = self.target.read_register(Register.STATUS)
            if status & (Status.DONE | Status.ERROR) and not status & Status.BUSY:
                return status
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_INTERVAL_S)
