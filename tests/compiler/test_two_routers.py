"""Two mixtures of one value: the accelerator has one set of queues, which each router fills anew."""

import numpy as np
import pytest
import torch
from torch import nn

import moeware
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.verify import verify_quantised
from tests.compiler.exports import DIM, Moe, example, export, vit
from tests.compiler.lowering import quantised, transformer
from tests.compiler.ordeal import CONFIG


class Shared(Moe):
    """An expert for all tokens, times a sigmoid, before or after those that a router chooses."""

    def __init__(self, before):
        super().__init__("gather")
        self.share, self.before = nn.Linear(DIM, 1), before

    def forward(self, x):
        if self.before:
            return torch.sigmoid(self.share(x)) * self._expert(0, x) + super().forward(x)
        return super().forward(x) + torch.sigmoid(self.share(x)) * self._expert(0, x)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_devices_agree(tmp_path, before, dynamo):
    path = export(vit(mixer=Shared(before)), tmp_path / "m.onnx", 20 if dynamo else 17, dynamo)
    chosen = {}
    for node in fuse(load(path)).graph:
        if node.op_type == "Route":
            chosen = set(node.outputs)
        elif node.op_type == "Experts":
            assert set(node.inputs[1:3]) == chosen
    program = moeware.compile(path, CONFIG, {"image": example(24)})
    results = [moeware.Session(program, device).run(None, {"image": example(3, seed=1)})[0]
               for device in ("golden", "torch")]
    np.testing.assert_array_equal(*results)


def test_experts_behind_another_router_are_refused():
    graph = transformer(3, tokens=5, depth=8, width=8, heads=2, hidden=16, experts=4, chosen=2)
    step = quantised(graph)
    verify_quantised(step)
    route = graph.route(next(op.source for op in step.operations if type(op).__name__ == "Route"), 4, 2)
    place = next(n for n, op in enumerate(step.operations) if type(op).__name__ == "Experts")
    step.operations.insert(place, step.operations.pop())
    assert step.operations[place].output == route
    with pytest.raises(CompileError, match="is the last choice before"):
        verify_quantised(step)
