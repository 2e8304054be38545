"""Exact comparison of devices, tensor by tensor, on a program that stores every layer's result."""

import math
from dataclasses import dataclass

import numpy as np

from moeware.hw.arch.config import Config
from moeware.hw.arch.program import DeviceStep, Probe, Program
from moeware.runtime.device import Device

__all__ = ["Comparison", "Difference", "compare"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One element in which devices differ.

    token_group, output_group : the tile of the linear unit's array that the element lies in
    (`Config.tokens` rows by `Config.outputs` channels), counted from the layer's first row;
    values : by device.
    """

    layer: str
    tensor: str
    frame: int
    row: int
    channel: int
    token_group: int
    output_group: int
    values: dict[str, int]

    def __str__(self):
        values = ", ".join(f"{device} {value}" for device, value in self.values.items())
        return (f"layer `{self.layer}` (tensor {self.tensor}), frame {self.frame}, tile (token "
                f"group {self.token_group}, output group {self.output_group}), row {self.row}, channel "
                f"{self.channel}: {values}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    devices : their names; values : elements that were compared; differences : those in which some
    device differs from the first one that has the tensor; tensors : (layer, tensor, values,
    differences) in program order; first : the first difference in that order, by frame, row and
    channel; results : what the first device returned.
    """

    devices: tuple[str, ...]
    values: int
    differences: int
    tensors: tuple[tuple[str, str, int, int], ...]
    first: Difference | None
    results: dict[str, np.ndarray]

    @property
    def equal(self) -> bool:
        return self.differences == 0

    def __str__(self):
        relation = " = " if self.equal else " / "
        text = (f"{relation.join(self.devices)}: {self.values:,} values, {self.differences:,} "
                f"difference{'' if self.differences == 1 else 's'}")
        return text if self.first is None else f"{text}\nfirst difference: {self.first}"


def compare(program: Program, step: DeviceStep, devices: dict[str, Device],
            inputs: dict[str, np.ndarray]) -> Comparison:
    """Run a step on every device and compare the integers of all tensors that two of them return.

    Parameters
    ----------
    devices : by the names that the result calls them.
    inputs : as `Device.run` takes them; several frames run back to back.

    Raises
    ------
    ValueError
        Fewer than two devices; devices that disagree about a tensor's shape; nothing to compare.
    """
    if len(devices) < 2:
        raise ValueError(f"Devices to compare must be two or more, not {sorted(devices)}")
    results = {name: device.run(program, step, inputs, probes=True)
               for name, device in devices.items()}
    places = {probe.tensor: probe for probe in step.probes}
    counts, first = [], None
    for layer, tensor in _in_order(step):
        found = {name: np.asarray(result[tensor]) for name, result in results.items()
                 if tensor in result}
        if len(found) < 2:
            continue
        shapes = {name: values.shape for name, values in found.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Tensor {tensor!r} must have one shape on all devices, not {shapes}")
        reference, *others = found.values()
        wrong = np.zeros(reference.shape, bool)
        for other in others:
            wrong |= other != reference
        counts.append((layer, tensor, wrong.size, int(wrong.sum())))
        if first is None and wrong.any():
            first = _difference(program.config, step, layer, tensor, places.get(tensor), wrong,
                                found)
    if not counts:
        raise ValueError("Devices must return a tensor in common, but these return "
                         f"{ {name: sorted(result) for name, result in results.items()} }")
    return Comparison(devices=tuple(devices), values=sum(size for *_, size, _ in counts),
                      differences=sum(wrong for *_, wrong in counts), tensors=tuple(counts),
                      first=first, results=next(iter(results.values())))


def _in_order(step: DeviceStep) -> list[tuple[str, str]]:
    """(layer, tensor) in program order, each tensor once."""
    order = {operation.output: operation.name for operation in step.operations}
    for place in [*step.probes, *step.outputs]:
        order.setdefault(place.tensor, place.name)
    return [(layer, tensor) for tensor, layer in order.items()]


def _difference(config: Config, step: DeviceStep, layer: str, tensor: str, place: Probe | None,
                wrong: np.ndarray, found: dict[str, np.ndarray]) -> Difference:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    frame, row, channel = at[:3]
    first_row = next((getattr(operation, "first_row", 0) for operation in step.operations
                      if operation.output == tensor and hasattr(operation, "residual")), 0)
    column = channel
    if place is not None:  # each of the groups of channels starts at a word of activations
        size = wrong.shape[2] // place.region.groups
        column += channel // size * (math.ceil(size / config.depth) * config.depth - size)
    return Difference(layer=layer, tensor=tensor, frame=frame, row=row, channel=channel,
                      token_group=max(row - first_row, 0) // config.tokens,
                      output_group=column // config.outputs,
                      values={name: int(values[at]) for name, values in found.items()})
