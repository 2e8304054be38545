"""Softmax and the choice of the largest scores, however they were written, are Softmax and TopK."""

import onnx
import onnx_ir as ir
import pytest
import torch

from moeware.compiler.fuse.choice import rewrite_choice, rewrite_softmax
from moeware.compiler.load import load
from tests.compiler.exports import DIM, EXPERTS, TOP_K, Moe, example, export, run_onnx, vit
from tests.compiler.fused import check


def noisy(logits):
    """Noisy gates (Shazeer et al. 2017) in evaluation, as M3ViT has them: one more than is used."""
    top, indices = logits.topk(TOP_K + 1, -1)
    return top[:, :TOP_K].softmax(-1), indices[:, :TOP_K]


def by_sorting(logits):
    scores, indices = logits.softmax(-1).sort(-1, descending=True)
    return scores[..., :TOP_K], indices[..., :TOP_K]


def switch(logits):
    scores, indices = logits.softmax(-1).max(-1, keepdim=True)
    return scores, indices


def largest(logits):
    scores = logits.softmax(-1)
    indices = scores.argmax(-1)
    return scores.gather(-1, indices[:, None]), indices[:, None]


def written_out(logits):
    power = (logits - logits.amax(-1, keepdim=True)).exp()
    scores, indices = (power / power.sum(-1, keepdim=True)).topk(TOP_K, -1)
    return scores / scores.sum(-1, keepdim=True), indices


def cooled(logits):
    scores, indices = (logits / 0.7).softmax(-1).topk(TOP_K, -1)
    return scores / scores.sum(-1, keepdim=True), indices


# Spelling: attributes of Route.
ROUTERS = {noisy: (TOP_K, "chosen"), by_sorting: (TOP_K, "all"), switch: (1, "all"),
           largest: (1, "all"), written_out: (TOP_K, "chosen"), cooled: (TOP_K, "chosen")}


class Routed(Moe):
    def __init__(self, router, form):
        super().__init__(form)
        self.router = router

    def forward(self, x):
        rows = x.reshape(-1, DIM)
        weights, indices = self.router(self.gate(rows))
        return getattr(self, f"_{self.form}")(rows, weights, indices).reshape(x.shape)


@pytest.mark.parametrize("form, dynamo", [("loop", False), ("gather", True)],
                         ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_router(tmp_path, router, form, dynamo):
    path = tmp_path / "m.onnx"
    model = check(export(vit(mixer=Routed(router, form)), path, 18 if dynamo else 17, dynamo))
    operators = [node.op_type for node in model.graph if node.domain]
    assert operators.count("Experts") == 1 and len(operators) == len(model.graph)
    (route,) = [node for node in model.graph if node.op_type == "Route"]
    assert tuple(route.attributes[name].value for name in ("k", "normalise")) == ROUTERS[router]


def test_attention_with_its_softmax_written_out(tmp_path):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(DIM, 3 * DIM)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            power = (q @ k.transpose(-1, -2) * DIM**-0.5).exp()
            return power / power.sum(-1, keepdim=True) @ v

    path = export(vit(attention=Attention()), tmp_path / "m.onnx", 17, dynamo=False)
    assert "Attention" in [node.op_type for node in check(path).graph]


def rewritten(tmp_path, text):
    """Operators of a textual model after both rules; its values are the same."""
    path, result = tmp_path / "m.onnxtxt", tmp_path / "rewritten.onnx"
    path.write_text(f'<ir_version: 8, opset_import: ["" : 17]> model (float[1, 4, {EXPERTS}] x) {text}')
    model = load(path)
    rewrite_softmax(model)
    rewrite_choice(model)
    ir.save(model, result)
    onnx.checker.check_model(str(result), full_check=True)
    x = example().reshape(-1)[: 4 * EXPERTS].reshape(1, 4, EXPERTS)
    for found, wanted in zip(run_onnx(result, x=x), run_onnx(path, x=x), strict=True):
        assert found.shape == wanted.shape and abs(found - wanted).max() < 1e-6
    return [node.op_type for node in model.graph], model


@pytest.mark.parametrize("text", [
    "=> (int64[1, 4] y) { y = ArgMax <axis: int = -1, keepdims: int = 0> (x) }",
    # Of equal scores the last one.
    """=> (float[1, 1, 5] y) { i = ArgMax <axis: int = -1, select_last_index: int = 1> (x)
        f = Cast <to: int = 1> (i) t = Transpose <perm = [0, 2, 1]> (f) y = MatMul (t, x) }""",
    # Over tokens.
    """=> (float[1, 1, 4] y) { i = ArgMax <axis: int = 1> (x) f = Cast <to: int = 1> (i)
        t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (f, t) }""",
    # The second largest, too.
    """=> (float[1, 1, 5] y) <int64 experts = {5}, float far = {100}, int64[2] ends = {0, 1}> {
        i = ArgMax <axis: int = -1, keepdims: int = 0> (x) h = OneHot (i, experts, ends)
        n = Cast <to: int = 1> (h) m = Mul (n, far) o = Sub (x, m) j = ArgMax <axis: int = -1> (o)
        f = Cast <to: int = 1> (j) t = Transpose <perm = [0, 2, 1]> (f) y = MatMul (t, x) }""",
])
def test_other_largest_values_stay(tmp_path, text):
    operators, _ = rewritten(tmp_path, text)
    assert "ArgMax" in operators and "TopK" not in operators


@pytest.mark.parametrize("selected,used", [
    ("w = Slice (v, zero, two, last)", 2), ("w = Gather <axis: int = -1> (v, zero)", 1),
    ("w = Slice (v, zero, back, last)", 4), ("w = Gather <axis: int = -1> (v, back)", 4),
    ("w = Neg (v)", 4), ("a = Slice (v, zero, two, first) w = Slice (a, zero, two, last)", 2),
    ("w = Slice (v, two, four, last)", 4)])
def test_no_more_is_chosen_than_is_read(tmp_path, selected, used):
    """Counted from the end, a place is another one of a shorter choice."""
    _, model = rewritten(tmp_path, f"""=> (float[a, b, c] w)
        <int64[1] k = {{4}}, int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] four = {{4}},
         int64[1] back = {{-1}}, int64[1] last = {{2}}, int64[1] first = {{1}}>
        {{ v, i = TopK (x, k) {selected} }}""")
    (top_k,) = [node for node in model.graph if node.op_type == "TopK"]
    assert top_k.inputs[1].const_value.numpy().tolist() == [used]


@pytest.mark.parametrize("total,axis", [
    ("s = ReduceSum (p, first)", 1), ("s = ReduceSum (p, last)", 2), ("s = ReduceSum (p, both)", None),
    ("r = ReduceSum <keepdims: int = 0> (p, last) t = Transpose (r) s = MatMul (t, ones)", None)])
def test_what_is_divided_by_a_sum(tmp_path, total, axis):
    _, model = rewritten(tmp_path, f"""=> (float[a, b, c] y)
        <int64[1] last = {{2}}, int64[1] first = {{1}}, int64[2] both = {{1, 2}},
         float[1, 5] ones = {{1, 1, 1, 1, 1}}> {{ p = Exp (x) {total} y = Div (p, s) }}""")
    found = [node.attributes["axis"].value for node in model.graph if node.op_type == "Softmax"]
    assert found == ([] if axis is None else [axis])
