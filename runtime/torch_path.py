"""The PyTorch device: the quantised graph on the CPU, with the integers that gateware computes."""

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moeware.hw.arch import quantised
from moeware.hw.arch.isa import Memory
from moeware.hw.arch.program import DeviceStep, Program

from .device import Progress, check_inputs
from .torch_operations import Values, prepare

__all__ = ["TorchDevice"]

# Frames that run together: as many as keep the largest tensor (as float64) about this large, so
# that it stays in a core's second-level cache between one pass over it and the next.
CHUNK_BYTES = 1 << 21
KEPT_BYTES = 1 << 24


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads whose operations do not split up further: passes over a small tensor cost less than
    bringing PyTorch's threads together after each, above all where other processes run."""
    threads = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        ready.wait()
    pool = ThreadPoolExecutor(count, "moeware", start)
    for _ in range(count):
        pool.submit(lambda: None)
    ready.wait()
    torch.set_num_threads(threads)  # threads started later take the last number set anywhere
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)
_INPUT = {Memory.ACTIVATION: np.int8, Memory.RESIDUAL: np.float32}


class _Prepared:
    """A step's operations with their constants, and when each tensor is needed last."""

    def __init__(self, step: DeviceStep):
        read = {name for op in step.operations if not isinstance(op, quantised.Attention)
                for name in _sources(op)}
        self.operations: list[tuple[quantised.Operation, Callable[[Values, int], object]]] = [
            (op, prepare(op, op.output not in read)) for op in step.operations]
        last = {name: number for number, op in enumerate(step.operations)
                for name in (op.output, *_sources(op))}
        outputs = {port.tensor for port in step.outputs}
        self.dropped = [[name for name, when in last.items() if when == number
                         and name not in outputs] for number in range(len(step.operations))]
        self.frame_bytes = 8 * max([1, *_elements(step)])
        # glibc returns memory to the system above twice the largest block freed so far (mallopt(3)),
        # and every run would have its pages mapped anew.
        torch.empty(KEPT_BYTES, dtype=torch.uint8)

    def run(self, inputs: Values, frames: int, keep: bool) -> Values:
        """All tensors, or the step's outputs; those that enter are [frames, rows, channels]."""
        values = {name: tensor.transpose(0, 1).contiguous() for name, tensor in inputs.items()}
        for (op, function), dropped in zip(self.operations, self.dropped):
            values[op.output] = function(values, frames)
            if not keep:
                for name in dropped:
                    del values[name]
        return values


class TorchDevice:
    """A device (see `device.Device`) that runs programs of every configuration on the CPU.

    With `probes`, `run` returns the output of every operation; a route as int64
    [frames, rows, chosen, 2]: expert and gate weight.
    """

    name = "torch"
    config = None

    def __init__(self):
        self.counters: list[dict[str, int]] = []
        self._prepared: dict[int, tuple[weakref.ref, _Prepared]] = {}

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress: Progress | None = None) -> dict[str, np.ndarray]:
        frames = check_inputs(step, inputs)
        prepared = self._prepare(step)
        source = {port.tensor: torch.from_numpy(np.asarray(inputs[port.tensor], _INPUT[
                      port.region.memory])) for port in step.inputs}
        names = [port.tensor for port in step.outputs]
        if probes:
            names += [op.output for op in step.operations if op.output not in names]

        def part(start: int, stop: int) -> list[np.ndarray]:
            with torch.inference_mode():
                values = prepared.run({name: tensor[start:stop] for name, tensor in source.items()},
                                      stop - start, probes)
                return [_integers(values[name], stop - start) for name in names]

        edges = _edges(frames, CHUNK_BYTES // prepared.frame_bytes)
        parts = []
        for stop, result in zip(edges[1:], _each(part, edges, prepared.frame_bytes), strict=True):
            parts.append(result)
            if progress is not None:
                progress(stop, frames)
        return {name: np.concatenate(pieces) for name, pieces in zip(names, zip(*parts))}

    def _prepare(self, step: DeviceStep) -> _Prepared:
        key = id(step)
        if key not in self._prepared:
            forget = weakref.ref(step, lambda _: self._prepared.pop(key, None))
            with torch.inference_mode():
                self._prepared[key] = forget, _Prepared(step)
        return self._prepared[key][1]


def _edges(frames: int, most: int) -> list[int]:
    """First frame of each chunk, and the end: chunks of about equal size, of at most `most` frames,
    and at least one for each thread where each is then at least half as large: threads in smaller
    operations spend more on passing on the interpreter's lock than they gain."""
    most = max(1, most)
    chunks = max(-(-frames // most), min(2 * frames // most, frames, torch.get_num_threads()))
    return [frames * number // chunks for number in range(chunks + 1)]


def _each(part: Callable[[int, int], list[np.ndarray]], edges: list[int],
          frame_bytes: int) -> Iterator[list[np.ndarray]]:
    """`part` of each chunk, in order. A frame as large as a chunk takes all threads by itself."""
    threads = torch.get_num_threads()
    if frame_bytes >= CHUNK_BYTES or threads == 1:
        yield from map(part, edges, edges[1:])
        return
    workers = _workers(threads)
    torch.set_num_threads(1)  # MKL has one number for all threads, the last one set
    try:
        yield from workers.map(part, edges, edges[1:])
    finally:
        torch.set_num_threads(threads)


def _integers(value, frames: int) -> np.ndarray:
    if isinstance(value, tuple):
        value = torch.stack([value[0], value[1].to(torch.int64)], -1).unflatten(0, (-1, frames))
    return value.to(torch.int64).transpose(0, 1).contiguous().numpy()


def _sources(op: quantised.Operation) -> list[str]:
    names = [getattr(op, field, None)
             for field in ("source", "residual", "route", "query", "key", "value")]
    return [name for name in names if isinstance(name, str)]


def _elements(step: DeviceStep) -> list[int]:
    """Elements of the larger intermediate tensors of one frame."""
    shapes = {port.tensor: (port.region.rows, port.region.channels) for port in step.inputs}
    elements = [rows * channels for rows, channels in shapes.values()]
    for op in step.operations:
        match op:
            case quantised.Constant():
                shape = op.value.shape
            case quantised.Linear():
                shape = shapes[op.source][0], len(op.weight)
            case quantised.AddLinear():
                shape = shapes[op.residual or op.source][0], len(op.weight)
            case quantised.Norm():
                shape = op.rows, shapes[op.source][1]
            case quantised.Attention():
                keys, channels = shapes[op.value]
                rows = shapes[op.query][0] if op.query else 1
                shape = rows, channels * op.heads // op.key_heads
                elements.append(op.heads * rows * keys)
            case quantised.Route():
                shape = shapes[op.source][0], op.chosen
            case quantised.Experts():
                shape = shapes[op.residual]
                elements.append(shape[0] * shapes[op.route][1] * max(op.up.shape[1:]))
        shapes[op.output] = shape
        elements.append(shape[0] * shape[1])
    return elements
