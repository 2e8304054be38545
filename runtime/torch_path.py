"""The PyTorch device: the quantised graph on the CPU, with the integers that gateware computes."""

import weakref
from collections.abc import Callable

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
CHUNK_BYTES = 1 << 20
_INPUT = {Memory.ACTIVATION: np.int8, Memory.RESIDUAL: np.float64}


class _Prepared:
    """A step's operations with their constants, and when each tensor is needed last."""

    def __init__(self, step: DeviceStep):
        self.operations: list[tuple[quantised.Operation, Callable[[Values, int], object]]] = [
            (op, prepare(op)) for op in step.operations]
        last = {name: number for number, op in enumerate(step.operations)
                for name in (op.output, *_sources(op))}
        outputs = {port.tensor for port in step.outputs}
        self.dropped = [[name for name, when in last.items() if when == number
                         and name not in outputs] for number in range(len(step.operations))]
        self.frame_bytes = 8 * max([1, *_elements(step)])

    def run(self, inputs: Values, frames: int, keep: bool) -> Values:
        values = dict(inputs)
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
        chunks = -(-frames // max(1, CHUNK_BYTES // prepared.frame_bytes))
        chunk = -(-frames // chunks)
        names = [port.tensor for port in step.outputs]
        if probes:
            names += [op.output for op in step.operations if op.output not in names]
        results: dict[str, list[np.ndarray]] = {name: [] for name in names}
        with torch.inference_mode():
            for start in range(0, frames, chunk):
                count = min(chunk, frames - start)
                values = prepared.run({name: tensor[start:start + count]
                                       for name, tensor in source.items()}, count, probes)
                for name in names:
                    results[name].append(_integers(values[name], count))
                if progress is not None:
                    progress(start + count, frames)
        return {name: np.concatenate(parts) for name, parts in results.items()}

    def _prepare(self, step: DeviceStep) -> _Prepared:
        key = id(step)
        if key not in self._prepared:
            forget = weakref.ref(step, lambda _: self._prepared.pop(key, None))
            with torch.inference_mode():
                self._prepared[key] = forget, _Prepared(step)
        return self._prepared[key][1]


def _integers(value, frames: int) -> np.ndarray:
    if isinstance(value, tuple):
        pair = torch.stack([value[0], value[1].to(torch.int64)], -1)
        return pair.unflatten(0, (frames, -1)).numpy()
    return value.to(torch.int64).contiguous().numpy()


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
