"""Damaged files are refused by an error that names the fault, or compiled to what they compute."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moeware
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.pipeline import model_ports
from moeware.compiler.reference import evaluate
from moeware.runtime.session import Session

from ..test_bad_input import model as small_model
from .damage import KINDS, case
from .ordeal import CONFIG, models, refusal, verdicts

CASES = 156  # each kind three times


def test_every_damaged_file_is_refused_or_compiled_to_what_it_computes():
    found = list(verdicts(0, CASES))
    assert not [each for each in found if each.outcome == "failed"]
    assert {each.kind for each in found} == set(KINDS)
    outcomes = [each.outcome for each in found]
    assert outcomes.count("refused") > CASES / 2 and outcomes.count("compiled and equal") > CASES / 20


def test_a_seed_is_a_case():
    valid = models()
    assert [case(seed, valid) for seed in range(60)] == [case(seed, valid) for seed in range(60)]
    assert case(3, valid) != case(3 + len(KINDS), valid)


@pytest.mark.parametrize("message", [
    "Model m.onnx must be a valid ONNX graph, not one that fails with KeyError: 3; export it again",
    "Node 'a' (Add) must satisfy: 2 inputs; this is a fault of the stage before", "wrong file",
    "Node 'a' must be right"])
def test_an_error_that_names_no_fault_is_none(message):
    assert refusal(message)[0] == "failed"


def write(path, nodes, constants=(), *, shape=("batch", 4), functions=(), outputs=("y",),
          result=("any",)):
    """A model from ``x`` to ``outputs``, which it says have the shape ``result``; constants by name."""
    graph = helper.make_graph(
        nodes, "damaged", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, result) for name in outputs],
        [numpy_helper.from_array(np.array(array), name) for name, array in dict(constants).items()])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)
    onnx.save(model, path)
    return path


def refuse(path, *words):
    with pytest.raises(CompileError) as caught:
        model_ports(fuse(load(path)))
    for word in words:
        assert word in str(caught.value)


def node(operator, *inputs, output="y", **attributes):
    return helper.make_node(operator, inputs, [output], name=f"the {operator}", **attributes)


HUGE = np.array([1 << 20, 1 << 20], np.int64)
EXPLOSIONS = {
    "known from the file": ([node("ConstantOfShape", "huge", output="c"), node("Add", "x", "c")], {
        "huge": HUGE}, "'the ConstantOfShape'"),
    "known when its size is folded": (
        [node("Mul", "huge", "two", output="s"), node("ConstantOfShape", "s", output="c"),
         node("Exp", "c", output="e"), node("ReduceMax", "e", output="m"), node("Add", "x", "m")],
        {"huge": HUGE, "two": np.array([1, 2], np.int64)}, "'the ConstantOfShape'"),
    "broadcast": ([node("Add", "x", "c")], {"c": np.zeros((1 << 13, 1 << 10, 1), np.float32)},
                  "'the Add'"),
    "of an input": ([node("Tile", "x", "huge")], {"huge": HUGE}, "'the Tile'"),
}


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_sizes_are_refused_before_they_are_computed(tmp_path, name):
    nodes, constants, word = EXPLOSIONS[name]
    if name == "broadcast":
        refuse(write(tmp_path / "m.onnx", nodes, constants, shape=("batch", 1, 1 << 10)), word)
        return
    refuse(write(tmp_path / "m.onnx", nodes, constants), word, "elements in a model of")


def test_an_input_in_the_header(tmp_path):
    refuse(write(tmp_path / "m.onnx", [node("Relu", "x")], shape=("batch", 1 << 40)), "input 'x'",
           "must have at most")


def test_functions_that_double(tmp_path):
    def function(name, call):
        nodes = [helper.make_node(call, [a], [b], domain="local" if call != "Relu" else "")
                 for a, b in ("ab", "bc")]
        return helper.make_function("local", name, ["a"], ["c"], nodes, [
            helper.make_opsetid("", 20), helper.make_opsetid("local", 1)])
    functions = [function("f0", "Relu"), *(function(f"f{n}", f"f{n - 1}") for n in range(1, 40))]
    call = helper.make_node("f39", ["x"], ["y"], name="the call", domain="local")
    refuse(write(tmp_path / "m.onnx", [call], functions=functions), "local::f39", "nodes")


@pytest.mark.parametrize("trips", [1 << 60, "x"])
def test_loops_without_end(tmp_path, trips):
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["more"]), helper.make_node("Relu", ["v"], ["w"])],
        "body", [info("i", 7, []), info("go", 9, []), info("v", 1, None)],
        [info("more", 9, []), info("w", 1, None)])
    count = [node("Cast", "x", output="many", to=7), node("ReduceMax", "many", output="trips",
                                                          keepdims=0)] if trips == "x" else []
    constants = {"go": np.array(True)} | ({} if count else {"trips": np.array(trips)})
    nodes = [*count, helper.make_node("Loop", ["trips", "go", "x"], ["y"], name="it", body=body)]
    refuse(write(tmp_path / "m.onnx", nodes, constants), "'it' (Loop)", "trip count")


@pytest.mark.parametrize("entries,word", [
    ({"length": str(2 << 30)}, "16"), ({"length": "64"}, "16"), ({"offset": "-8"}, "'w.bin'"),
    ({"location": "../w.bin"}, "'../w.bin'"), ({"location": "a\0b"}, "missing"),
    ({"location": "x" * 5000}, "missing"), ({}, "16")])
def test_external_data_is_what_the_shape_takes(tmp_path, entries, word):
    path = write(tmp_path / "m.onnx", [node("Add", "x", "c")], {"c": np.zeros(4, np.float32)})
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin"} | entries).items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 << 30)
    refuse(path, "'c'", word)


def constant(change):
    def edit(model):
        change(model.graph.initializer[0])
    return edit


EDITS = {
    "too many bytes": (constant(lambda c: setattr(c, "raw_data", bytes(20))), "'c'"),
    "too many bytes of a rare type": (constant(lambda c: setattr(
        c, "data_type", TensorProto.FLOAT6E2M3)), "'c'"),
    "a segment": (constant(lambda c: setattr(c.segment, "end", 9)), "'c'"),
    "an unknown type": (constant(lambda c: setattr(c, "data_type", -1)), "'c'"),
    "strings": (constant(lambda c: c.CopyFrom(helper.make_tensor("c", TensorProto.STRING, [1], [b"a"]))),
                "'c'"),
    "sparse": (lambda m: m.graph.sparse_initializer.append(helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)), [4])), "'s'"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "m.onnx"),
    "an output twice": (lambda m: m.graph.output.append(m.graph.output[0]), "'y'"),
    "the compiler's own domain": (lambda m: (setattr(m.graph.node[0], "domain", "moeware"), m
                                  .opset_import.add(domain="moeware", version=1)), "'moeware'"),
    "an unknown type of an input": (lambda m: setattr(
        m.graph.input[0].type.tensor_type, "elem_type", 99), "'x'"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_the_checker_lets_pass(tmp_path, name):
    edit, word = EDITS[name]
    path = write(tmp_path / "m.onnx", [node("Add", "x", "c")], {"c": np.zeros(4, np.float32)})
    model = onnx.load(path)
    edit(model)
    path.write_bytes(model.SerializeToString())
    refuse(path, word)


def test_text_in_other_bytes(tmp_path):
    (tmp_path / "m.onnxtxt").write_bytes(b"<ir_version: 10> \xff\xfe")
    refuse(tmp_path / "m.onnxtxt", "m.onnxtxt must be a complete ONNX file", "0xff")


def test_a_file_that_is_no_message(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 31)
    refuse(tmp_path / "m.onnx", "m.onnx must have at most", "external data")


def test_a_constant_without_a_name_is_named_after_its_node(tmp_path):
    tensor = numpy_helper.from_array(np.zeros(4, np.float32))
    tensor.raw_data = bytes(20)
    nodes = [node("Constant", output="c", value=tensor), node("Add", "x", "c")]
    refuse(write(tmp_path / "m.onnx", nodes), "'the Constant.value'")


def test_attributes_of_another_domain_are_its_own(tmp_path):
    other = helper.make_node("Add", ["x", "x"], ["y"], name="it", domain="local", dtype="half", to=99)
    model = load(write(tmp_path / "m.onnx", [other]))
    assert [each.name for each in model.graph] == ["it"]


def test_names_in_other_bytes(tmp_path):
    path = write(tmp_path / "m.onnx", [node("Relu", "x")])
    path.write_bytes(path.read_bytes().replace(b"the Relu", b"the \xff\xfelu"))
    refuse(path, "UTF-8", r"the \xff")


NODES = {
    "random": ([node("RandomUniformLike", "x")], {}, "random"),
    "a division by zero": ([node("Div", "zero", "zero", output="z"), node("Cast", "z", output="f", to=1),
                            node("Add", "x", "f")], {"zero": np.zeros(1, np.int64)}, "'the Div'"),
    "a type that is none": ([node("Cast", "x", output="z", to=0), node("Relu", "z")], {}, "'the Cast'"),
    "strings": ([node("Cast", "x", output="z", to=8), node("Cast", "z", to=1)], {}, "'the Cast'"),
    "a sequence": ([node("SequenceConstruct", "x", output="q"),
                    node("SequenceInsert", "q", "x", output="p"), node("SequenceAt", "p", "zero")],
                   {"zero": np.array(0)}, "'the Sequence"),
    "an axis": ([node("Softmax", "x", axis=7)], {}, "'the Softmax'"),
    "fewer than no largest": ([helper.make_node("TopK", ["x", "k"], ["t", "i"], name="top"),
                               node("Mul", "t", "t")], {"k": np.array([-7], np.int64)}, "'top'"),
}


@pytest.mark.parametrize("name", NODES)
def test_nodes_that_compute_nothing(tmp_path, name):
    nodes, constants, word = NODES[name]
    refuse(write(tmp_path / "m.onnx", nodes, constants), word)


def test_a_node_that_fails_when_it_runs_is_named(tmp_path):
    """Its shape depends on data, so that nothing is known of it before."""
    nodes = [node("NonZero", "x", output="n"), node("Reshape", "n", "five", output="r"),
             node("Cast", "r", output="f", to=1), node("ReduceSum", "f", output="s"),
             node("Add", "x", "s")]
    model = fuse(load(write(tmp_path / "m.onnx", nodes, {"five": np.array([5], np.int64)})))
    with pytest.raises(CompileError, match="'the Reshape'"):
        evaluate(model, {"x": np.ones((1, 4), np.float32)})


def test_a_constant_on_an_embedding_that_others_read_is_added_on_the_host(tmp_path):
    model = small_model()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "c"))
    place = next(n for n, each in enumerate(model.graph.node) if each.op_type == "Add")
    model.graph.node[place].input[0] = "moved"
    model.graph.node.insert(place, helper.make_node("Add", ["x", "c"], ["moved"]))
    onnx.save(model, tmp_path / "m.onnx")
    image = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    program = moeware.compile(tmp_path / "m.onnx", CONFIG, {"image": image})
    assert "must be the only reader" in str(program.metadata["partition"])
    assert np.isfinite(Session(program, "torch").run(None, {"image": image})[0]).all()


@pytest.mark.parametrize("outputs", [["y", "rows"], ["y", "number"]])
def test_an_output_without_a_batch(tmp_path, outputs):
    nodes = [node("Relu", "x"), node("Squeeze", "y", "axis", output="rows"),
             node("ReduceMax", "y", output="number", keepdims=0)]
    refuse(write(tmp_path / "m.onnx", nodes, {"axis": np.array([0])}, shape=("batch", 3, 4),
                 outputs=outputs), f"First axis of {outputs[1]!r}")


@pytest.mark.parametrize("channels,biases", [(5, 4), (3, 1)])
def test_a_convolution_of_other_shapes_is_no_patch_embedding(tmp_path, channels, biases):
    """Inference of shapes does not compare them; what runs the node does, and names it."""
    nodes = [node("Conv", "x", "kernel", "bias", output="maps", strides=[2, 2]),
             node("Reshape", "maps", "rows", output="flat"), node("Transpose", "flat", perm=[0, 2, 1])]
    constants = {"kernel": np.ones((4, 3, 2, 2), np.float32), "bias": np.ones(biases, np.float32),
                 "rows": np.array([1, 4, 4], np.int64)}
    path = write(tmp_path / "m.onnx", nodes, constants, shape=("batch", channels, 4, 4))
    image = np.ones((1, channels, 4, 4), np.float32)
    with pytest.raises(CompileError, match="'the Conv'"):
        moeware.compile(path, CONFIG, {"x": image})


def test_a_router_of_rows_of_unknown_number(tmp_path):
    """No rule reads a value without a static shape."""
    nodes = [node("NonZero", "x", output="n"), node("Cast", "n", output="f", to=1),
             node("Transpose", "f", output="t", perm=[1, 0]), node("MatMul", "t", "gate", output="l"),
             helper.make_node("TopK", ["l", "two"], ["y", "indices"], name="top")]
    constants = {"gate": np.ones((2, 5), np.float32), "two": np.array([2], np.int64)}
    model = fuse(load(write(tmp_path / "m.onnx", nodes, constants)))
    assert "TopK" in [each.op_type for each in model.graph]
