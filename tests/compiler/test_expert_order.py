"""Files whose nodes stand in another order: experts are told by their numbers, not by their places."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.quantization.shape_inference import quant_pre_process

from tests.compiler import exports
from tests.compiler.fused import check
from tests.compiler.test_fuse_experts import FEATURES, TOKENS, Mixture


class Columns(Mixture):
    """Loops over the columns of dense weights, and over one-hot masks."""

    def _dense(self, weights, indices):
        return torch.zeros(len(indices), self.experts).scatter(1, indices, weights)

    def _sum(self, rows, columns):
        return sum(column * self._expert(e, rows) for e, column in enumerate(columns))

    def _gathered(self, rows, weights, indices):
        dense = self._dense(weights, indices)
        return self._sum(rows, [dense[:, e].unsqueeze(-1) for e in range(self.experts)])

    def _sliced(self, rows, weights, indices):
        dense = self._dense(weights, indices)
        return self._sum(rows, [dense[:, e:e + 1] for e in range(self.experts)])

    def _from_the_end(self, rows, weights, indices):
        dense = self._dense(weights, indices)
        return self._sum(rows, [dense[:, e - self.experts, None] for e in range(self.experts)])

    def _split(self, rows, weights, indices):
        return self._sum(rows, self._dense(weights, indices).split(1, -1))

    def _masked(self, rows, weights, indices):
        """As transformers writes it."""
        mask, result = F.one_hot(indices, self.experts).permute(2, 1, 0), torch.zeros_like(rows)
        for e in range(self.experts):
            slot, token = torch.where(mask[e])
            value = self._expert(e, rows[token]) * weights[token, slot, None]
            result = result.index_add(0, token, value)
        return result

    def _stacked(self, rows, weights, indices):
        outputs = torch.stack([self._expert(e, rows) for e in range(self.experts)], 1)
        chosen = outputs.gather(1, indices[..., None].expand(-1, -1, FEATURES))
        return (chosen * weights[..., None]).sum(1)


class Plain(Columns):
    """Experts without a gate."""

    def _expert(self, e, rows):
        return F.linear(F.gelu(F.linear(rows, self.wg[e], self.bg[e])), self.wd[e], self.bd[e])


FORMS = ["loop", "where", "gathered", "sliced", "from_the_end", "split", "masked", "stacked"]


def in_another_order(path, seed: int):
    """A copy of the file at `path`, its nodes in an order by chance, or (seed 0) the last first."""
    model = onnx.load(str(path))
    generator, nodes = np.random.default_rng(seed), list(model.graph.node)
    names = {name for node in nodes for name in node.output}
    known, order = {name for node in nodes for name in node.input} - names, []
    while nodes:
        ready = [place for place, node in enumerate(nodes) if known.issuperset(node.input)]
        order.append(nodes.pop(generator.choice(ready) if seed else ready[-1]))
        known.update(order[-1].output)
    del model.graph.node[:]
    model.graph.node.extend(order)
    onnx.save(model, str(path.with_suffix(f".{seed}.onnx")))
    return path.with_suffix(f".{seed}.onnx")


def constants(model) -> list[np.ndarray]:
    """Of the experts."""
    node, = (node for node in model.graph if node.op_type.endswith("Experts"))
    return [value.const_value.numpy() for value in node.inputs[3:]]


def exported(model, tmp_path, dynamo=False):
    return exports.export_module(model, (torch.ones(1, TOKENS, FEATURES),), tmp_path / "m.onnx",
                                 20 if dynamo else 17, dynamo)


@pytest.mark.parametrize("kind,operator", [(Columns, "GatedExperts"), (Plain, "Experts")])
@pytest.mark.parametrize("form", FORMS)
def test_order_of_nodes(tmp_path, kind, operator, form):
    torch.manual_seed(8)
    path = exported(kind(form), tmp_path)
    wanted = constants(check(path, frames=1))
    for seed in range(3):
        model = check(in_another_order(path, seed), ["LayerNorm", "Route", operator, "Add"], frames=1)
        for one, other in zip(wanted, constants(model), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("experts,chosen", [(2, 1), (2, 2), (5, 5), (16, 2)])
@pytest.mark.parametrize("form", ["loop", "where", "sliced", "masked"])
def test_order_with_other_counts(tmp_path, form, experts, chosen):
    """Where as many are chosen as there are, or as an index has axes, there are more numbers about."""
    torch.manual_seed(8)
    path = exported(Columns(form, experts=experts, chosen=chosen), tmp_path)
    for seed in range(2):
        check(in_another_order(path, seed), ["LayerNorm", "Route", "GatedExperts", "Add"], frames=1)


@pytest.mark.parametrize("kind,operator,dynamo", [(Columns, "GatedExperts", False),
                                                  (Plain, "Experts", True)])
@pytest.mark.parametrize("form", ["loop", "where", "sliced", "masked"])
def test_files_that_onnxruntime_sorted(tmp_path, kind, operator, form, dynamo):
    torch.manual_seed(8)
    path = exported(kind(form), tmp_path, dynamo)
    quant_pre_process(str(path), str(tmp_path / "sorted.onnx"), skip_symbolic_shape=True)
    check(tmp_path / "sorted.onnx", ["LayerNorm", "Route", operator, "Add"], frames=1)
