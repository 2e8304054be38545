"""Compile a model for a target, run it on simulated gateware, compare devices: what the benchmarks of
whole models share."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from configs import Target
from efficiency import Block, blocks, latency_efficiency, throughput_efficiency
from tqdm import tqdm

from moeware.compiler.calibrate import Calibration
from moeware.compiler.lowered import Lowered
from moeware.compiler.pipeline import STAGES, State
from moeware.compiler.quantise import QuantisedStep
from moeware.hw.arch import isa
from moeware.hw.arch.isa import Engine
from moeware.hw.arch.program import DeviceStep, Program
from moeware.hw.arch.quantised import Route
from moeware.hw.arch.registers import ENGINE_COUNTERS
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import Comparison, compare
from moeware.sim.golden import GoldenDevice
from moeware.sim.rtl import RtlDevice

__all__ = ["Compiled", "Model", "Run", "counter_table", "lower", "measure", "say"]

FETCHED_AHEAD = 2048  # bytes of instructions that no engine got, at most
LOOK_SECONDS = 2  # between two looks at a simulation


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of one device step, and the instructions it was made from."""

    program: Program
    lowered: Lowered

    @property
    def step(self) -> DeviceStep:
        return self.program.steps[0]


class Model:
    """An ONNX file, to be compiled for several targets; the stages that look at no target run once.

    samples : calibration inputs [frames, ...] by input name.

    Raises
    ------
    CompileError
    """

    def __init__(self, path: Path, samples: dict[str, np.ndarray]):
        self.name = path.stem
        self._state = State(path, None, samples)  # the target comes with `compile`
        self._names = list(STAGES)
        self._shared = self._names.index("quantise")
        for name in self._names[:self._shared]:
            say(f"{self.name}: {name}")
            STAGES[name](self._state)

    def compile(self, target: Target, *, trace: bool = False, **options) -> Compiled:
        """options : further fields of the compiler's state, such as how many frames are in flight.

        Raises
        ------
        ValueError
            A part of the model is left to the host.
        """
        state = dataclasses.replace(self._state, config=target.config, bits=target.bits, trace=trace,
                                    **options)
        for name in self._names[self._shared:]:
            say(f"{self.name} for {target.name}{', traced' if trace else ''}: {name}")
            STAGES[name](state)
        if len(state.program.steps) != 1 or not isinstance(state.program.steps[0], DeviceStep):
            raise ValueError(f"{self.name} must run on the accelerator as a whole, not "
                             f"{state.placement}")
        return Compiled(state.program, state.lowered[0])


def lower(step: QuantisedStep, target: Target) -> Compiled:
    """A quantised graph, made without a model, as a program.

    Raises
    ------
    CompileError
        The target has no room for it.
    """
    state = State(Path("graph"), target.config, {}, calibration=Calibration(), quantised=[step])
    names = list(STAGES)
    for name in names[names.index("tile"):]:
        STAGES[name](state)
    return Compiled(state.program, state.lowered[0])


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured run: `frames` frames in flight together, `cycles` from start to done.

    counters : of the run; blocks : what it had to do; comparison : of all layers on all devices, or
    None.
    """

    target: Target
    frames: int
    macs: int
    counters: dict[str, int]
    blocks: list[Block]
    comparison: Comparison | None
    seconds: float

    @property
    def cycles(self) -> int:
        return self.counters["cycles"]

    @property
    def bytes_per_cycle(self) -> float:
        return self.target.dram.bytes_per_cycle(self.target.config.bus_bytes, self.target.clock_hz)

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.cycles / self.target.clock_hz

    @property
    def latency_efficiency(self) -> float:
        return latency_efficiency(self.blocks, self.target.config, self.bytes_per_cycle, self.cycles)

    @property
    def throughput_efficiency(self) -> float:
        return throughput_efficiency(self.blocks, self.target.config, self.bytes_per_cycle,
                                     self.cycles)

    @property
    def bound_milliseconds(self) -> float:
        """Least latency that the blocks allow."""
        return self.milliseconds * self.latency_efficiency

    def figures(self) -> dict[str, object]:
        """What is reported of every run of a whole model."""
        config, bus = self.target.config, self.target.config.bus_bytes
        found: dict[str, object] = {
            f"latency at {self.target.clock_hz / 1e6:g} MHz, ms": round(self.milliseconds, 3),
            "cycles from start to done": self.cycles,
            "latency efficiency, %": round(100 * self.latency_efficiency, 1),
            f"throughput efficiency, {self.frames} frame{'s' * (self.frames > 1)} in flight, %":
                round(100 * self.throughput_efficiency, 1),
            "multiply-accumulates, million": round(self.macs / 1e6, 1),
            "products per cycle, linear and attention":
                f"{config.linear_macs} and {config.attention_macs}",
            "million bytes read, instructions included":
                round(self.counters["read_beats"] * bus / 1e6, 2),
            "million bytes written": round(self.counters["write_beats"] * bus / 1e6, 2)}
        if self.frames > 1:
            found = {"latency" + name[7:] if name.startswith("latency at") else name: value
                     for name, value in found.items() if name != "latency efficiency, %"}
            found["frames per second"] = round(1e3 * self.frames / self.milliseconds, 1)
        if self.comparison is not None:
            found["all layers"] = str(self.comparison)
        return found

    def block_table(self) -> list[list[object]]:
        """Blocks of one kind together: their number, work, and the least cycles of each resource."""
        kinds: dict[str, list[Block]] = {}
        for block in self.blocks:
            kinds.setdefault(block.name.split(", ")[-1], []).append(block)
        table: list[list[object]] = [["blocks", "number", "linear MMAC", "attention MMAC", "MB",
                                      "linear cycles", "attention cycles", "bus cycles",
                                      "sum of maxima"]]
        for kind, members in kinds.items():
            cycles = [block.cycles(self.target.config, self.bytes_per_cycle) for block in members]
            table.append([
                kind, len(members), round(sum(block.linear_macs for block in members) / 1e6, 1),
                round(sum(block.attention_macs for block in members) / 1e6, 1),
                round(sum(block.bytes for block in members) / 1e6, 2),
                *(round(sum(each[name] for each in cycles)) for name in cycles[0]),
                round(sum(max(each.values()) for each in cycles))])
        return table

    def to_json(self) -> dict[str, object]:
        """Everything of the run that a page or a plot may want."""
        return {"target": self.target.name, "clock_hz": self.target.clock_hz,
                "frames": self.frames, "config": self.target.config.to_dict(),
                "macs": self.macs, "cycles": self.cycles,
                "milliseconds": self.milliseconds, "counters": self.counters,
                "latency_efficiency": self.latency_efficiency,
                "throughput_efficiency": self.throughput_efficiency,
                "seconds_of_simulation": round(self.seconds, 1),
                "blocks": [{"name": block.name, "linear_macs": block.linear_macs,
                            "narrow_macs": block.narrow_macs,
                            "attention_macs": block.attention_macs, "bytes": block.bytes,
                            "bytes_spare": block.bytes_spare,
                            "least_cycles": {name: round(value, 1) for name, value in block.cycles(
                                self.target.config, self.bytes_per_cycle).items()}}
                           for block in self.blocks]}


def measure(model: Model, target: Target, inputs: dict[str, np.ndarray], *, frames: int = 1,
            compared: bool = True) -> Run:
    """Run a model once on the target's gateware.

    inputs : float [1 or more, ...] by input name; the first `frames` of them, over and over where
    there are fewer, are in flight together; compared : before, run a traced program on the golden
    device, the gateware and PyTorch, and compare the integers of all layers.
    """
    feeds = {name: np.take(values, range(frames), axis=0, mode="wrap")
             for name, values in inputs.items()}
    options = {"frames": frames} if frames > 1 else {}
    device = RtlDevice(target.config, dram=target.dram, clock_hz=target.clock_hz)
    comparison = None
    if compared:
        traced = model.compile(target, trace=True, **options)
        with simulated_cycles(device, f"{model.name} on {target.name}, all layers"):
            comparison = compare(traced.program, traced.step, {
                "RTL": device, "golden": GoldenDevice(), "PyTorch": TorchDevice()},
                _integers(traced.step, feeds))
        say(str(comparison))
    compiled = model.compile(target, **options)
    return run(compiled, target, device, feeds, f"{model.name} on {target.name}", comparison)


def run(compiled: Compiled, target: Target, device: RtlDevice, feeds: dict[str, np.ndarray],
        label: str, comparison: Comparison | None = None) -> Run:
    """Run a program on gateware, and count what it had to do."""
    integers, began = _integers(compiled.step, feeds), time.perf_counter()
    frames = len(next(iter(feeds.values())))
    with simulated_cycles(device, label):
        results = device.run(compiled.program, compiled.step, integers)
    seconds = time.perf_counter() - began
    every = TorchDevice().run(compiled.program, compiled.step, integers, probes=True)
    for tensor, values in results.items():
        if not np.array_equal(values, every[tensor]):
            raise ValueError(f"Tensor {tensor!r} must be the same on PyTorch and gateware")
    shapes = {port.tensor: (port.region.rows, port.region.channels)
              for port in compiled.step.inputs}
    chosen = {op.output: every[op.output][..., 0].reshape(-1, op.chosen)
              for op in compiled.step.operations if isinstance(op, Route)}
    counters = {name: sum(counted[name] for counted in device.counters)
                for name in device.counters[0]}
    found = blocks(compiled.step.operations, compiled.lowered.instructions, shapes, chosen,
                   target.config, frames=frames)
    _check_bytes(found, counters, target)
    macs = sum(block.linear_macs + block.attention_macs for block in found)
    return Run(target, frames, macs, counters, found, comparison, seconds)


def _check_bytes(found: list[Block], counters: dict[str, int], target: Target) -> None:
    """That the blocks' bytes and the instructions are what crossed the bus, but for instructions that
    were fetched ahead."""
    crossed = (counters["read_beats"] + counters["write_beats"]) * target.config.bus_bytes
    known = sum(block.bytes for block in found) + isa.BYTES * counters["instructions"]
    if not 0 <= crossed - known <= FETCHED_AHEAD:
        raise ValueError(f"Bytes of the blocks and instructions must be the {crossed} that crossed "
                         f"the bus, not {known}")


def counter_table(runs: dict[str, Run]) -> list[list[object]]:
    """How each engine spent its cycles, side by side."""
    return [["engine", *(f"{name}, {state}" for name in runs for state in ENGINE_COUNTERS)], *(
        [engine.name.lower(), *(f"{each.counters[f'{engine.name.lower()}_{state}'] / each.cycles:.1%}"
                                for each in runs.values() for state in ENGINE_COUNTERS)]
        for engine in Engine)]


def _integers(step: DeviceStep, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {port.tensor: port.quantise(feeds[port.name]) for port in step.inputs}


@contextmanager
def simulated_cycles(device: RtlDevice, label: str) -> Iterator[None]:
    """A bar of the cycles that a device simulates meanwhile."""
    done = threading.Event()
    with tqdm(desc=label, unit="cycle", unit_scale=True, leave=False, disable=None,
              initial=0) as bar:
        first = device.target.cycles

        def look() -> None:
            while not done.wait(LOOK_SECONDS):
                bar.update(device.target.cycles - first - bar.n)
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def say(text: str) -> None:
    """A line of progress, with the time of day."""
    tqdm.write(f"{time.strftime('%H:%M:%S')} {text}")
