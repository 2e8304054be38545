"""``com.microsoft.MoE`` becomes Route and Experts where these compute what ONNX Runtime does."""

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.placement import describe, report
from moeware.hw.arch.program import HostStep
from tests.compiler.contrib import EXPERTS, ContribMoe, add_constant, rewrite, set_attributes
from tests.compiler.models import Example, timm
from tests.compiler.test_fuse import ATTENTION, MOE, check, expected
from tests.compiler.test_models import EVEN, answers, error, export
from tests.compiler.test_partition import run_steps

DIM, HIDDEN = 32, 48
TOP_2 = {"k": 2, "activation_type": "gelu", "normalize_routing_weights": 1}


def model(depth=1, **options):
    """A vision transformer with a `ContribMoe` in each block."""
    torch.manual_seed(3)
    mixer = partial(ContribMoe, DIM, HIDDEN, **options)
    return Example(timm(dim=DIM, heads=4, depth=depth, mlp=mixer), (3, 8, 8))


def write(path, attributes, opset=17, change=None, **options):
    """Export `model` and give its nodes ``attributes``; then ``change(proto, node, arrays)``."""

    def edit(proto, node, arrays):
        set_attributes(node, **attributes)
        if change:
            change(proto, node, arrays)

    return rewrite(export(model(**options), path, opset), edit)


def no_biases(proto, node, arrays):
    node.input[3] = ""
    del node.input[5:]


SWIGLU = {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1}


def gated(proto, node, arrays):
    """Interleave a gate with the rows of fc1."""
    draw = np.random.default_rng(5)
    for place, name in ((2, "weight"), (3, "bias")):
        array = np.repeat(arrays[node.input[place]], 2, axis=1)
        noise = draw.normal(size=array.shape) * 0.1
        node.input[place] = add_constant(proto, name, (array + noise).astype(np.float32))


# Attributes; how they are written; function, k and normalise that these mean.
FORMS = {
    "defaults": ({}, {}, "relu", 1, "all"),
    "gelu is the tanh form": (TOP_2, {}, "gelu_tanh", 2, "chosen"),
    "weights as softmax left them": (
        {"k": 2, "activation_type": "silu", "normalize_routing_weights": 0},
        {"opset": 20},
        "silu", 2, "all",
    ),
    "three axes": (TOP_2, {"rows": False}, "gelu_tanh", 2, "chosen"),
    "no biases": ({"k": 3, "activation_type": "relu"}, {"change": no_biases}, "relu", 3, "all"),
    "all experts": ({"k": EXPERTS, "activation_type": "silu"}, {}, "silu", EXPERTS, "all"),
    "without a say": (
        TOP_2 | {"activation_alpha": 1.7, "swiglu_limit": 0.1}, {}, "gelu_tanh", 2, "chosen",
    ),
}  # fmt: skip


# alpha and beta of hidden values g * sigmoid(alpha * g) * (l + beta)
@pytest.mark.parametrize("alpha,beta", [(1.0, 0.0), (1.702, 1.0), (0.5, -0.3)])
def test_gated_experts(tmp_path, alpha, beta):
    attributes = SWIGLU | {"activation_alpha": alpha, "activation_beta": beta}
    path = write(tmp_path / "m.onnx", attributes, change=gated)
    fused = check(path, expected(ATTENTION, MOE.replace("Experts", "GatedExperts")))
    (experts,) = (node for node in fused.graph if node.op_type == "GatedExperts")
    assert experts.attributes["function"].value == "silu"


@pytest.mark.parametrize("name", FORMS)
def test_form(tmp_path, name):
    attributes, options, function, k, normalise = FORMS[name]
    path = write(tmp_path / "m.onnx", attributes, **options)
    fused = check(path, expected(ATTENTION, MOE))
    route, experts = (
        next(node for node in fused.graph if node.op_type == operator)
        for operator in ("Route", "Experts")
    )
    assert experts.attributes["function"].value == function
    assert (route.attributes["k"].value, route.attributes["normalise"].value) == (k, normalise)
    assert "MoE" in experts.metadata_props["sources"] and "gate" in route.metadata_props["sources"]


class Symbolic(nn.Module):
    """The node as the newer exporter writes it."""

    def __init__(self):
        super().__init__()
        self.inner = ContribMoe(DIM, HIDDEN)

    def forward(self, x):
        inner = self.inner
        rows = x.reshape(-1, DIM)
        given = (rows, inner.gate(rows), inner.w1, inner.b1, inner.w2, inner.b2)
        result = torch.onnx.ops.symbolic(
            "com.microsoft::MoE", given, TOP_2, dtype=x.dtype, shape=rows.shape, version=1
        )
        return result.reshape(x.shape)


def test_the_newer_exporter(tmp_path):
    torch.manual_seed(3)
    example = Example(timm(dim=DIM, heads=4, depth=2, mlp=Symbolic), (3, 8, 8))
    path = export(example, tmp_path / "m.onnx", 20, dynamo=True)
    assert sum(node.op_type == "MoE" for node in onnx.load(str(path)).graph.node) == 2
    check(path, expected(ATTENTION, MOE, ATTENTION, MOE))


@pytest.mark.parametrize(
    "attributes", [TOP_2, {"k": 1, "activation_type": "silu"}], ids=["top-2", "top-1"]
)
def test_a_program_of_it_is_close_to_float(tmp_path, attributes):
    path = write(tmp_path / "m.onnx", attributes, depth=2)
    example = model()
    program = compile_model(path, EVEN, {"image": example.images(48, 1)})
    assert program.placement.endswith("100.0 % of MACs")
    (found,), (real,) = answers(path, program, example.images(8, 2))
    assert error(found, real) < 0.15


def third(proto, node, arrays):
    node.input.append(add_constant(proto, "weight", arrays[node.input[2]]))


def computed(proto, node, arrays):
    """Weights that depend on the input."""
    image, weight = proto.graph.input[0].name, node.input[2]
    nodes = [
        onnx.helper.make_node("ReduceSum", [image], ["sum"], "sum", keepdims=0),
        onnx.helper.make_node("Tanh", ["sum"], ["small"], "tanh"),
        onnx.helper.make_node("Add", [weight, "small"], ["weight"], "add"),
    ]
    node.input[2] = "weight"
    for number, new in enumerate(nodes):
        proto.graph.node.insert(number, new)


def nonlinear(proto, node, arrays):
    place = list(proto.graph.node).index(node)
    sine = onnx.helper.make_node("Sin", [node.input[1]], ["sine"], "sine")
    node.input[1] = "sine"
    proto.graph.node.insert(place, sine)


# Attributes and options; what the reason says; whether ONNX Runtime runs the node (None: weights of
# a frame cannot enter a step beside frames).
REFUSED = {
    "sparse mixer": (TOP_2 | {"use_sparse_mixer": 1}, {}, "use_sparse_mixer=1 is another router",
                     "export with use_sparse_mixer=0", True),
    "identity": (TOP_2 | {"activation_type": "identity"}, {}, "activation_type='identity' has no",
                 "train the experts with one of these", True),
    "bounded swiglu": (SWIGLU | {"swiglu_limit": 7.0}, {"change": gated}, "swiglu_limit=7 bounds both",
                       "train without it", True),
    "halves": (SWIGLU | {"swiglu_fusion": 2}, {"change": gated}, "swiglu_fusion=2 is a layout of one",
               "in turns (swiglu_fusion=1)", False),
    "softmax in front": (TOP_2, {"softmax": True}, "not the result of Softmax",
                         "remove the Softmax in front", True),
    "another router": (TOP_2, {"change": nonlinear}, "logits of a Linear, not the result of Sin",
                       "route with one linear gate", True),
    "computed weights": (TOP_2, {"change": computed}, "fc1_experts_weights must be an initializer",
                         "export it as a weight", None),
    "three layers": ({"k": 2, "activation_type": "silu"}, {"change": third},
                     "fc3_experts_weights (input 6) has no form", "leave it out", False),
    "unknown function": (TOP_2 | {"activation_type": "mish"}, {}, "activation_type='mish'",
                         "train", False),
    "too many": (TOP_2 | {"k": EXPERTS + 1}, {}, "ONNX Runtime does not run it (",
                 "write the experts as plain operators", False),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    attributes, options, reason, remedy, runs = REFUSED[name]
    path = write(tmp_path / "m.onnx", attributes, **options)
    fused = fuse(load(path))
    parts = partition(fused)
    (node,) = (node for node in fused.graph if node.op_type == "MoE")
    assert str(parts.reasons[node.name]).startswith(f"node `{node.name}`: ")
    what, how = str(parts.reasons[node.name]).split("; ")
    assert reason in what + how and remedy in what + how
    assert f"({what.split(': ', 1)[1]})" in describe(parts)
    if runs:
        run_steps(fused, parts, {"image": model().images(2, 4)})
    elif runs is False:
        with pytest.raises(CompileError, match=rf"Node '{node.name}' \(MoE\) must run in ONNX Run"):
            compile_model(path, EVEN, {"image": model().images(2, 4)})


def test_work_of_a_node_on_the_host_is_counted(tmp_path):
    def macs(attributes, **options):
        parts = partition(fuse(load(write(tmp_path / "m.onnx", attributes, **options))))
        entry = report(parts)["host"]
        return next(each["macs"] for each in entry if each["operator"] == "MoE")

    tokens = 5
    layer = tokens * DIM * HIDDEN
    assert macs(TOP_2 | {"use_sparse_mixer": 1}) == 2 * 2 * layer
    limited = SWIGLU | {"k": 1, "swiglu_limit": 7.0}
    assert macs(limited, change=gated) == 3 * layer
    assert macs(TOP_2 | {"use_sparse_mixer": 1, "swiglu_fusion": 0}) == 2 * 2 * layer


def test_a_session_runs_a_node_on_the_host(tmp_path):
    path = write(tmp_path / "m.onnx", TOP_2 | {"use_sparse_mixer": 1})
    example = model()
    program = compile_model(path, EVEN, {"image": example.images(48, 1)})
    assert any(isinstance(step, HostStep) for step in program.steps)
    (found,), (real,) = answers(path, program, example.images(4, 2))
    assert error(found, real) < 0.15
