"""Models with local functions become what the same models without them do."""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from moeware.compiler.errors import CompileError
from moeware.compiler.functions import inline_functions
from moeware.compiler.load import load
from moeware.compiler.pipeline import compile_model
from tests.compiler import exports
from tests.compiler.exports import Moe, export, run_onnx, vit
from tests.compiler.test_fuse import ATTENTION, MOE, check, expected
from tests.compiler.test_models import EVEN, answers, error

# Float against float: ONNX Runtime may fuse other nodes of a graph without functions, a rounding or two.
ROUNDING = 1e-6
SIMPLE = (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.INTS)


def function(name, nodes, wanted, opsets):
    """A function of ``nodes`` and a call of it. Simple attributes become the function's own."""
    made = {value for node in nodes for value in node.output}
    inputs = list(dict.fromkeys(v for node in nodes for v in node.input if v and v not in made))
    outputs = [value for node in nodes for value in node.output if value in wanted]
    call = helper.make_node(name, inputs, outputs, name=f"the_{name}", domain="parts")
    bodies = []
    for number, node in enumerate(nodes):
        body = onnx.NodeProto()
        body.CopyFrom(node)
        for attribute in body.attribute:
            if attribute.type in SIMPLE:
                given = call.attribute.add()
                given.CopyFrom(attribute)
                given.name = f"{attribute.name}_{number}"
                parameter = onnx.AttributeProto(
                    name=attribute.name, type=attribute.type, ref_attr_name=given.name
                )
                attribute.CopyFrom(parameter)
        bodies.append(body)
    names = [attribute.name for attribute in call.attribute]
    return helper.make_function("parts", name, inputs, outputs, bodies, opsets, names), call


def divide(path, length=7):
    """Rewrite the model at ``path``: functions of ``length`` nodes, within others of two calls."""
    proto = onnx.load(str(path))
    opsets = [*proto.opset_import, helper.make_opsetid("parts", 1)]
    nodes = list(proto.graph.node)
    for level, size in (("inner", length), ("outer", 2)):
        parts = [nodes[start : start + size] for start in range(0, len(nodes), size)]
        nodes = []
        for number, part in enumerate(parts):
            rest = [node for other in parts if other is not part for node in other]
            wanted = {value for node in rest for value in node.input}
            wanted |= {value.name for value in proto.graph.output}
            body, call = function(f"{level}{number}", part, wanted, opsets)
            proto.functions.append(body)
            nodes.append(call)
    del proto.graph.node[:], proto.opset_import[:]
    proto.graph.node.extend(nodes)
    proto.opset_import.extend(opsets)
    proto.ir_version = 10
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))
    return path


@pytest.mark.parametrize(
    "form, options", [("loop", dict(opset=17, dynamo=False)), ("gather", dict(opset=20))]
)
def test_a_model_of_nested_functions(tmp_path, form, options):
    path = divide(export(vit(mixer=Moe(form)), tmp_path / "m.onnx", **options))
    assert all(node.domain == "parts" for node in onnx.load(str(path)).graph.node)
    fused = check(path, expected(ATTENTION, MOE))
    route = next(node for node in fused.graph if node.op_type == "Route")
    assert "the_outer" in route.metadata_props["sources"]


def test_a_model_of_functions_compiles(tmp_path):
    path = divide(export(vit(mixer=Moe("scatter")), tmp_path / "m.onnx", 17, dynamo=False))
    program = compile_model(path, EVEN, {"image": exports.example(48, seed=1)})
    assert program.placement.endswith("100.0 % of MACs")
    (found,), (real,) = answers(path, program, exports.example(4, seed=2))
    assert error(found, real) < 0.15


def parse(text):
    proto = onnx.parser.parse_model(text)
    for graph in (proto.graph, *proto.functions):
        for number, node in enumerate(graph.node):
            node.name = f"node{number}"
    return proto


def same(path, proto, run=run_onnx):
    """Write ``proto``; ``load`` leaves plain nodes, the names at its ends and the values."""
    onnx.save(proto, str(path))
    feeds = {"x": np.random.default_rng(3).normal(size=(1, 4)).astype(np.float32)}
    plain = inline_functions(onnx.load(str(path)))
    assert not plain.functions and {node.domain for node in plain.graph.node} <= {""}
    assert [value.name for value in plain.graph.input] == ["x"]
    onnx.save(plain, str(path.with_stem("plain")))
    wanted, found = run(path, **feeds), run_onnx(path.with_stem("plain"), **feeds)
    for value, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=ROUNDING)
    return load(path)


HEAD = '<ir_version: 10, opset_import: ["": 20, "local": 1]> m (float[batch, 4] x)'


def test_defaults_and_attributes_through_two_levels(tmp_path):
    model = same(tmp_path / "m.onnx", parse(HEAD + """ => (float[batch, 4] y) {
        a = local.scale <s = 3.0> (x)
        y = local.scale (a)
    }
    <domain: "local", opset_import: ["": 20, "local": 1]>
    scale <s: float = 2.0> (x) => (y) { y = local.inner <t: float = @s> (x) }
    <domain: "local", opset_import: ["": 20]>
    inner <t> (x) => (y) { k = Constant <value_float: float = @t> () y = Mul (x, k) }
    """))
    factors = [value.const_value.numpy().item() for value in model.graph.initializers.values()]
    assert sorted(factors) == [2.0, 3.0]


def test_an_output_that_is_an_input_keeps_the_names_of_the_caller(tmp_path):
    proto = parse(HEAD + """ => (float[batch, 4] y, float[batch, 4] z) {
        a, b = local.both (x)
        y = Add (a, x)
        z = Mul (b, a)
    }
    <domain: "local", opset_import: ["": 20]> both (x) => (x, x) { }
    """)
    # ONNX Runtime does not load such a body.
    reference = ReferenceEvaluator(proto)
    same(tmp_path / "m.onnx", proto, lambda path, **feeds: reference.run(None, feeds))


def test_a_call_in_a_branch_and_a_branch_in_a_body(tmp_path):
    same(tmp_path / "m.onnx", parse(HEAD + """ => (float[batch, 4] y) {
        total = ReduceSum <keepdims = 0> (x)
        zero = Constant <value_float = 0.0> ()
        positive = Greater (total, zero)
        a = If (positive) <
            then_branch = yes () => (float[batch, 4] p) { p = local.twice (x) },
            else_branch = no () => (float[batch, 4] n) { n = Neg (x) }
        >
        y = local.choose (a, positive)
    }
    <domain: "local", opset_import: ["": 20, "local": 1]>
    choose (x, c) => (y) {
        y = If (c) <
            then_branch = yes () => (p) { p = local.twice (x) },
            else_branch = no () => (n) { n = Abs (x) }
        >
    }
    <domain: "local", opset_import: ["": 20]> twice (x) => (y) { y = Add (x, x) }
    """))


def test_shapes_of_the_exported_batch_in_a_body_are_forgotten(tmp_path):
    proto = parse(HEAD + """ => (float[batch, 4] y) { y = local.f (x) }
    <domain: "local", opset_import: ["": 20]>
    f (x) => (y) { a = Add (x, x) s = Shape (a) b = Reshape (a, s) y = Neg (b) }
    """)
    proto.functions[0].value_info.append(
        helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, (7, 4))
    )
    same(tmp_path / "m.onnx", proto)
    assert list(load(tmp_path / "m.onnx").graph.outputs[0].shape) == [1, 4]


OPSETS = HEAD + """ => (float[batch, 4] y) {{ y = local.f (x) }}
    <domain: "local", opset_import: ["": 17]> f (x) => (y) {{ y = {} (x) }}
    """


def test_an_older_opset_in_a_body_that_means_the_same(tmp_path):
    same(tmp_path / "m.onnx", parse(OPSETS.format("Neg")))


@pytest.mark.parametrize("operator", ["ReduceMax", "Gelu"])
def test_an_older_opset_in_a_body_that_means_something_else(tmp_path, operator):
    with pytest.raises(
        CompileError,
        match=f"'local::f' must use opset 20 as the model does, not opset 17, in which {operator}",
    ):
        inline_functions(parse(OPSETS.format(operator)))


def test_recursion_is_named(tmp_path):
    proto = parse(HEAD + """ => (float[batch, 4] y) { y = local.f (x) }
    <domain: "local", opset_import: ["": 20, "local": 1]> f (x) => (y) { y = local.g (x) }
    <domain: "local", opset_import: ["": 20, "local": 1]> g (x) => (y) { y = local.f (x) }
    """)
    onnx.save(proto, str(tmp_path / "m.onnx"))
    with pytest.raises(
        CompileError, match=r"Function 'local::f' must be free of recursion.*f -> local::g -> "
    ):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("call, word", [
    ("y = local.f (x, x, x)", "at most 1 inputs as the function 'local::f' that it calls, not 3"),
    ("y, z = local.f (x)", "at most 1 outputs as the function 'local::f' that it calls, not 2"),
    ("y = local.f <g = inner () => (float[1] p) { p = Constant <value_float = 1.0> () }> (x)",
     "Attribute 'g' of node 'node0' must be a value"),
])  # fmt: skip
def test_a_call_that_does_not_fit_is_named(call, word):
    body = '<domain: "local", opset_import: ["": 20]> f (a) => (b) { b = Neg (a) }'
    with pytest.raises(CompileError, match=word):
        inline_functions(parse(HEAD + " => (float[batch, 4] y) {" + call + "}" + body))


def test_many_calls_of_functions_that_are_small_enough_are_too_many():
    calls = " ".join(f"v{number} = local.f (x)" for number in range(60))
    body = " ".join(f"w{number} = Neg (a)" for number in range(1999))
    proto = parse(HEAD + f""" => (float[batch, 4] y) {{ {calls} y = Neg (v0) }}
    <domain: "local", opset_import: ["": 20]> f (a) => (w0) {{ {body} }}
    """)
    with pytest.raises(CompileError, match="'node50' must call a function with which the model has"):
        inline_functions(proto)
