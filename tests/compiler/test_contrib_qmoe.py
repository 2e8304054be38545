"""``com.microsoft.QMoE``: stored integers become the weights that ONNX Runtime computes with."""

import numpy as np
import onnx
import pytest

from moeware.compiler.fuse import fuse
from moeware.compiler.fuse.contrib_weights import unpacked
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.pipeline import compile_model
from moeware.compiler.precision import WEIGHT_BITS
from moeware.hw.arch import quantised as q
from tests.compiler.contrib import add_constant, packed, rewrite, set_attributes, to_qmoe
from tests.compiler.test_contrib_moe import HIDDEN, TOP_2, model
from tests.compiler.test_fuse import ATTENTION, MOE, check, expected
from tests.compiler.test_models import EVEN, answers, error, export
from tests.compiler.test_partition import run_steps


def write(path, *layout, depth=1, change=None, attributes=TOP_2, **options):
    """Export a model whose nodes are QMoE of ``layout`` (bits, block, zeros)."""
    rewrite(export(model(depth), path, 17), to_qmoe(*layout, **attributes, **options))
    if change:
        proto = onnx.load(str(path))
        for node in proto.graph.node:
            if node.op_type == "QMoE":
                change(proto, node)
        onnx.save(proto, str(path))
    return path


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_unpacked_reads_what_packed_wrote(bits):
    integers = np.random.default_rng(bits).integers(0, 1 << bits, (3, 5, 8)).astype(np.uint8)
    np.testing.assert_array_equal(unpacked(packed(integers, bits), bits), integers)
    assert unpacked(np.array([0xB4], np.uint8), bits).tolist() == (
        {8: [0xB4], 4: [4, 11], 2: [0, 1, 3, 2]}[bits]
    )


# Bits, inputs that share a scale (0: all of an output), zero points.
LAYOUTS = [(8, 0, False), (8, 0, True), (8, 16, False), (8, 16, True), (4, 0, False), (4, 0, True),
           (4, 16, False), (4, 16, True), (2, 0, True)]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout(tmp_path, monkeypatch, layout):
    # The kernel for blocks of 8 bits rounds activations to int8, too; this selects another.
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")
    path = write(tmp_path / "m.onnx", *layout)
    fused = check(path, expected(ATTENTION, MOE))
    (route,) = (node for node in fused.graph if node.op_type == "Route")
    assert route.attributes["normalise"].value == "chosen"


def test_a_kernel_that_rounds_activations_does_not_hide_the_form(tmp_path):
    path = write(tmp_path / "m.onnx", 8, 16)
    # The kernel's rounding, of activations to int8 per block.
    check(path, expected(ATTENTION, MOE), tolerance=2e-2)


@pytest.mark.parametrize("normalise", [0, 1])
def test_weights_of_the_chosen_sum_to_one_whatever_the_attribute_says(tmp_path, normalise):
    """ONNX Runtime ignores it for this operator."""
    attributes = TOP_2 | {"normalize_routing_weights": normalise}
    fused = check(write(tmp_path / "m.onnx", 8, attributes=attributes), expected(ATTENTION, MOE))
    (route,) = (node for node in fused.graph if node.op_type == "Route")
    assert route.attributes["normalise"].value == "chosen"


@pytest.mark.parametrize(
    "layout, options", [((4, 0), {}), ((8, 16, True), {"bits": {"experts": 4}})]
)
def test_a_program_of_it_is_close_to_float(tmp_path, layout, options):
    path = write(tmp_path / "m.onnx", *layout, depth=2)
    example = model()
    program = compile_model(path, EVEN, {"image": example.images(48, 1)}, **options)
    assert program.placement.endswith("100.0 % of MACs")
    (found,), (real,) = answers(path, program, example.images(8, 2))
    # As for float experts; of 4 bits on a grid of their own, twice as much.
    assert error(found, real) < (0.3 if options else 0.15)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_again_moves_a_weight_by_half_a_step(tmp_path, bits):
    """A stored grid is not kept: channel factors of the norm in front go into the first layer, and
    steps of the second are rounded up by an eighth at most (`coarsened`)."""
    path = write(tmp_path / "m.onnx", bits)
    (experts,) = (node for node in fuse(load(path)).graph if node.op_type == "Experts")
    stored = experts.inputs[5].const_value.numpy().astype(np.float64)
    program = compile_model(path, EVEN, {"image": model().images(16, 1)})
    (found,) = (op for op in program.steps[0].operations if isinstance(op, q.Experts))
    size, count = np.abs(stored), np.abs(found.down.astype(np.float64))
    # Each row is rounded to nearest on one grid: there is a step with which all its integers agree.
    smallest = (size / (count + 0.5)).max(-1)
    largest = np.divide(size, count - 0.5, out=np.full(size.shape, np.inf), where=count > 0).min(-1)
    assert (smallest <= largest * (1 + 1e-6)).all() and (found.down * stored >= 0).all()
    # And the step is the finest, or coarser by an eighth. So 4 bits lose a sixteenth of what they
    # lost when the file was made, as 7 of its steps are 112 of these.
    assert (count.max(-1) >= WEIGHT_BITS[8] // (9 / 8)).all()


def attribute(**attributes):
    def change(proto, node):
        old = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        set_attributes(node, **old | attributes)
    return change


def third(proto, node):
    node.input.extend([""] * (8 - len(node.input)))
    node.input.append(node.input[2])


def weights_of_router(proto, node):
    node.input.extend([""] * (14 - len(node.input)))
    node.input.append(node.input[1])


def odd_scales(proto, node):
    node.input[3] = add_constant(proto, "scale", np.ones((4, HIDDEN, 5), np.float32))


REFUSED = {
    "sparse mixer": (attribute(use_sparse_mixer=1), "use_sparse_mixer=1 is", "export", True),
    "two weights": (weights_of_router, "router_weights (input 14)", "leave it out", True),
    "three layers": (third, "fc3_experts_weights (input 8)", "leave it out", False),
    "floats": (attribute(quant_type="fp8"), "quant_type='fp8' is no grid", "as MoE", False),
    "a provider's": (attribute(weights_prepacked=1), "the layout of one provider", "=0", False),
    "three bits": (attribute(expert_weight_bits=3), "not uint8 with expert_weight_bits=3",
                   "quantise the experts to one of these", False),
    "odd scales": (odd_scales, "fc1_scales must be [E, N] or [E, N, blocks]", "again", False),
    "mixed": (attribute(fc1_expert_weight_bits=4, fc2_expert_weight_bits=8),
              "fc1 and fc2 must have the shapes", "two layers", False),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    change, reason, remedy, runs = REFUSED[name]
    fused = fuse(load(write(tmp_path / "m.onnx", 4, change=change)))
    (node,) = (node for node in fused.graph if node.op_type == "QMoE")
    parts = partition(fused)
    what, how = str(parts.reasons[node.name]).split("; ")
    assert reason in what and remedy in how
    if runs:
        run_steps(fused, parts, {"image": model().images(2, 4)})


def test_half_precision_around_the_node(tmp_path):
    """As exported for older kernels: casts to half precision in front, and back behind."""
    path = write(tmp_path / "m.onnx", 8)
    proto = onnx.load(str(path))
    (node,) = (node for node in proto.graph.node if node.op_type == "QMoE")
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    place, output = list(proto.graph.node).index(node), node.output[0]
    half = onnx.TensorProto.FLOAT16
    before = [onnx.helper.make_node("Cast", [node.input[i]], [f"half{i}"], f"half{i}", to=half)
              for i in (0, 1)]  # fmt: skip
    after = onnx.helper.make_node("Cast", ["half"], [output], "single", to=1)
    for i in (4, 7):
        bias = arrays[node.input[i]].astype(np.float16)
        node.input[i] = add_constant(proto, "bias", bias)
    node.input[:2], node.output[0] = ["half0", "half1"], "half"
    proto.graph.node.insert(place + 1, after)
    for new in before:
        proto.graph.node.insert(place, new)
    onnx.save(proto, str(path))
    # A few roundings to half precision, of 2**-11 each.
    check(path, expected(ATTENTION, MOE), tolerance=4e-3)
