"""How much of an error in the residual stream the model's outputs hear."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from moeware.compiler.canonical import ROUTED, attributes, is_canonical
from moeware.compiler.operators import OPERATORS
from moeware.compiler.reference import evaluate

__all__ = ["influence"]

FRAMES = 8  # looked at, at most
PROBES = 4  # random directions of the outputs
SPREAD = 0.2  # share that all rows have alike, as few frames do not show it all


def influence(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each node of routed experts, by its name, and each of its rows, float [rows]: the expected square of the
    outputs' relative change for an error in the node's result whose square is 1, in a random
    direction, on average over the frames; 1 where no gradient reaches the outputs.

    model : canonical; feeds : as of `reference.evaluate`.

    Squared gradients of random projections of the outputs have these expectations as their sums
    (Hutchinson 1989): one backward pass sees all layers and tokens. What an error does to the choice
    of experts is not part of it.
    """
    feeds = {name: array[:FRAMES] for name, array in feeds.items()}
    if not any(node.op_type in ROUTED for node in model.graph):
        return {}
    known: dict[str, np.ndarray] = {}  # what nodes of the host make of the same
    if not all(map(is_canonical, model.graph)):
        evaluate(model, feeds, record=known.__setitem__)
    values = {value: torch.from_numpy(np.array(feeds[value.name])) for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            values[value] = torch.from_numpy(np.array(value.const_value.numpy()))
    marked: dict[str, torch.Tensor] = {}
    heard = list(model.graph.outputs)
    for node in model.graph:
        if is_canonical(node):
            inputs = [values[value] for value in node.inputs if value is not None]
            outputs = OPERATORS[node.op_type](inputs, attributes(node), str(node.name),
                                              lambda name, array: None)
        else:  # no gradient passes a node of the host: what it reads counts as an output
            heard += [value for value in node.inputs if value is not None]
            outputs = [torch.from_numpy(np.array(known[value.name])) for value in node.outputs]
        if node.op_type in ROUTED:
            outputs[0].requires_grad_() if outputs[0].is_leaf else outputs[0].retain_grad()
            marked[node.name] = outputs[0]
        values.update(zip(node.outputs, outputs))
    ends = [values[value] for value in dict.fromkeys(heard) if values[value].requires_grad]
    return _gradients(marked, ends)


def _gradients(marked: Mapping[str, torch.Tensor], ends: list[torch.Tensor]) -> dict[str, np.ndarray]:
    draw = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(value.shape[-2]) for name, value in marked.items()}
    for _ in range(PROBES if ends else 0):
        projected = torch.tensor(0.0)
        for end in ends:
            size = end.detach().norm(dim=tuple(range(1, end.ndim)), keepdim=True)
            direction = torch.randn(end.shape, generator=draw) / size.clamp(min=1e-30)
            projected = projected + (end * direction).sum()
        found = torch.autograd.grad(projected, list(marked.values()), retain_graph=True,
                                    allow_unused=True)
        for name, gradient in zip(marked, found):
            if gradient is not None:
                sums[name] += gradient.square().mean((0, 2)) / PROBES
    return {name: ((1 - SPREAD) * total + SPREAD * total.mean() if total.any()
                   else torch.ones_like(total)).double().numpy() for name, total in sums.items()}
