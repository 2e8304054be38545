"""Files of onnxruntime-genai's model builder: all products on the accelerator, or the true reason."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import moeware
from moeware.cli.simulate import compare
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import report
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.golden import GoldenDevice
from tests.compiler import exports, genai
from tests.compiler.contrib import add_constant, set_attributes
from tests.compiler.fused import check, operators_of
from tests.compiler.genai import Sizes
from tests.compiler.test_partition import run_steps

ONE = Sizes(layers=1)
APART = replace(ONE, rotary="apart", packed=False)
DENSE = Counter(RMSNorm=3, Linear=8, Rotary=2, Attention=1, Add=2, Pointwise=1, Multiply=1)
MIXTURE = Counter(RMSNorm=3, Linear=5, Rotary=2, Attention=1, Add=2, Route=1, GatedExperts=1)

FILES = {
    "packed rows, rotation inside": (replace(ONE, layers=2), DENSE + DENSE),
    "no past": (replace(ONE, past=False, window=9), DENSE),
    "neighbours, biases": (replace(ONE, interleaved=1, bias=True), DENSE),
    "part of a head": (replace(ONE, part=0.5, dim=32), DENSE),
    "rotation apart": (APART, DENSE),
    "part of a head, apart": (replace(APART, part=0.5, interleaved=1), DENSE),
    "caches by length": (replace(ONE, long=True), DENSE),
    "norms of heads": (replace(ONE, packed=False, qk_norm=True), DENSE + Counter(RMSNorm=2)),
    "one head": (replace(ONE, heads=1, kv_heads=1, packed=False, qk_norm=True),
                 DENSE + Counter(RMSNorm=2)),
    "one token": (replace(ONE, tokens=1), DENSE),
    "no rotation": (replace(ONE, rotary="", kv_heads=1), DENSE - Counter(Rotary=2)),
    "with a mask": (replace(APART, attention="multi", kv_heads=4), DENSE),
    "gelu": (replace(ONE, function="FastGelu"), DENSE),
    "quick gelu": (replace(ONE, function="QuickGelu", opset=17), DENSE),
    "four bits": (replace(ONE, bits=4), DENSE),
    "eight bits, blocks that end early": (replace(ONE, bits=8, inner=40, zeros="packed"), DENSE),
    "two bits": (replace(ONE, bits=2, block=16, zeros="packed"), DENSE),
    "zero points as floats": (replace(ONE, bits=4, block=64, zeros="floats"), DENSE),
    "tied": (replace(ONE, bits=4, tied=True), DENSE),
    "tied, zero points": (replace(ONE, bits=8, tied=True, zeros="packed"), DENSE),
    "dequantised": (replace(ONE, bits=4, block=16, qdq=True), DENSE),
    "experts": (replace(ONE, experts=4, opset=24), MIXTURE),
    "two layers": (replace(ONE, experts=3, chosen=1, gated=False),
                   MIXTURE - Counter(GatedExperts=1) + Counter(Experts=1)),
    "blocks of experts that end early": (replace(ONE, experts=3, expert_bits=4, inner=40, block=16,
                                                 normalise=0), MIXTURE),
    "embedded": (replace(ONE, embedded=True, bits=4), DENSE),
    "the last token": (replace(ONE, last=True), DENSE + Counter(TakeToken=1)),
    "experts of four bits": (replace(ONE, experts=4, expert_bits=4, block=16, bits=4), MIXTURE),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_file(tmp_path, name):
    sizes, wanted = FILES[name]
    fused = check(genai.write(tmp_path / "m.onnx", sizes), frames=1, ids=genai.VOCABULARY)
    found = Counter(name for name in operators_of(fused) if not name.startswith("plain"))
    # `wanted` counts the head once for each layer.
    head = sizes.layers - 1
    assert found == wanted - Counter(Linear=head, RMSNorm=head)
    placed = report(partition(fused))
    assert placed["fpga_mac_share"] == 1.0
    # The look-up, and the shape of what is one token.
    assert len(placed["host"]) == (not sizes.embedded) + sizes.last


CONFIG = Path(__file__).parents[2] / "examples" / "pydoc" / "config.json"


@pytest.mark.parametrize("sizes", [
    Sizes(bits=4, block=16, zeros="packed", tied=True),
    Sizes(experts=4, expert_bits=4, block=16, packed=False, qk_norm=True),
    Sizes(experts=5, normalise=0, rotary="apart", attention="multi", kv_heads=4, packed=False),
], ids=["stored", "stored experts", "experts"])  # fmt: skip
def test_integers_are_the_same_everywhere_and_near(tmp_path, sizes):
    path, random = genai.write(tmp_path / "m.onnx", sizes, seed=3), np.random.default_rng(0)
    ids = random.integers(0, genai.VOCABULARY, (28, sizes.tokens))
    program = moeware.compile(path, CONFIG, {"input_ids": ids[:24]}, trace=True)
    found = compare(program, {"golden": GoldenDevice(), "PyTorch": TorchDevice()},
                    {"input_ids": ids[24:26]})
    assert found["equal"], found["text"]
    (logits,) = moeware.Session(program, "torch").run(None, {"input_ids": ids[24:]})
    real = np.concatenate([exports.run_onnx(path, input_ids=each[None])[0] for each in ids[24:]])
    # Of random weights, which nothing has made robust.
    assert np.square(logits - real).mean() < 0.1**2 * np.square(real).mean()


def edited(path, change, sizes=ONE):
    """The file of ``sizes`` after ``change(proto, node)`` of its attention."""
    proto = onnx.load(str(genai.write(path, sizes)))
    (node,) = (each for each in proto.graph.node if each.op_type == "GroupQueryAttention")
    change(proto, node)
    onnx.save(proto, str(path))
    return path


def attributes(**values):
    def change(proto, node):
        old = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        set_attributes(node, **old | values)
    return change


def constant(place, array):
    def change(proto, node):
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = add_constant(proto, "constant", np.asarray(array))
    return change


PLAIN = {
    "own scale": attributes(scale=0.4),
    "scale of the head": attributes(scale=0.0),
    "both directions": attributes(causal=0),
    "unused": attributes(smooth_softmax=-1, k_quant_type="NONE", qk_norm_epsilon=1e-3),
    "from a later place": constant(9, np.arange(4, 4 + ONE.tokens)[None]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_attention(tmp_path, name):
    found = check(edited(tmp_path / "m.onnx", PLAIN[name]), frames=1, seeds=(1, 2))
    assert Counter(operators_of(found)) == DENSE + Counter(["plain Gather"])
    # Scores do not depend on where places start, angles do.
    first = 4 if name == "from a later place" else 0
    for node in found.graph:
        if node.op_type == "Rotary":
            assert np.allclose(node.inputs[1].const_value.numpy()[0, 0], np.cos(first), atol=1e-6)


def given(place, name, shape, kind=onnx.TensorProto.FLOAT):
    def change(proto, node):
        proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        node.input[place] = name
    return change


def given_mask(proto, node):
    proto.graph.initializer.remove(
        next(each for each in proto.graph.initializer if each.name == "attention_mask"))
    given(0, "attention_mask", (1, ONE.tokens), onnx.TensorProto.INT64)(
        proto, helper.make_node("Identity", [""], ["unused"]))


def padded(proto, node):
    mask = next(each for each in proto.graph.initializer if each.name == "attention_mask")
    mask.CopyFrom(onnx.numpy_helper.from_array(np.array([[1] * 7 + [0] * 2]), "attention_mask"))


def key_for_later(proto, node):
    shape = (1, ONE.kv_heads, ONE.tokens, ONE.dim)
    proto.graph.output.append(
        helper.make_tensor_value_info(node.output[1], onnx.TensorProto.FLOAT, shape))


PAST = (1, ONE.kv_heads, 3, ONE.dim)

# What is edited; the reason; the remedy; whether ONNX Runtime computes such a node.
REFUSED = {
    "a bound of scores": (attributes(softcap=5.0), "softcap=5.0 has no form", "softcap=0.0", True),
    "a smooth softmax": (attributes(smooth_softmax=1), "smooth_softmax=1 has no", "export", True),
    "a window": (attributes(local_window_size=4), "local_window_size=4 hides keys from 9 tokens",
                 "sequences of at most 4 tokens", True),
    "sinks": (constant(11, np.ones(4, np.float32)), "head_sink (input 11) has no form", "leave", True),
    "a bias": (constant(10, np.ones((1, 4, 9, 9), np.float32)), "attention_bias (input 10)", "leave",
               True),
    "norms inside": (constant(14, np.ones(16, np.float32)), "q_norm_weight (input 14) normalises",
                     "in front", False),
    "places out of order": (constant(9, [[0, 2, 1, 3, 4, 5, 6, 7, 8]]), "must follow one another",
                            "for this length", True),
    "places beyond the caches": (constant(9, np.arange(10, 19)[None]), "have a row in cos_cache",
                                 "for this length", False),
    "a past": (lambda *parts: [constant(place, np.ones(PAST, np.float32))(*parts) for place in (3, 4)],
               "past_key holds tokens of an earlier run", "no elements", False),
    "keys for later": (key_for_later, "'present.0.key' keeps keys or values for a later run",
                       "(--outputs)", True),
    "a mask per input": (given_mask, "seqlens_k depends on an input", "fix the mask to ones", None),
    "padding": (padded, "seqlens_k must be 8 for 9 tokens, not [6]", "fix the mask", True),
    "heads of two sizes": (attributes(kv_num_heads=1), "rows of 4, 1 and 1 heads of one size",
                           "fixed length", False),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    change, rule, remedy, runs = REFUSED[name]
    sizes = replace(ONE, packed=False, rotary="") if name == "heads of two sizes" else ONE
    fused = fuse(load(edited(tmp_path / "m.onnx", change, sizes)))
    (node,) = (node for node in fused.graph if node.op_type == "GroupQueryAttention")
    parts = partition(fused)
    reason = parts.reasons[str(node.name)]
    assert rule in reason.rule and remedy in reason.remedy
    assert sum(entry["macs"] for entry in report(parts)["host"] if entry["node"] == node.name) > 0
    if runs:
        ids = np.random.default_rng(1).integers(0, genai.VOCABULARY, (1, ONE.tokens))
        run_steps(fused, parts, {"input_ids": ids})


def test_rows_that_are_no_heads(tmp_path):
    with pytest.raises(CompileError, match="whole heads, not 128 features for num_heads=3 and kv_num_"):
        load(edited(tmp_path / "m.onnx", attributes(num_heads=3)))


@pytest.mark.parametrize("rotary", ["apart", ""])
def test_an_output_inside_of_a_block_says_what_it_costs(tmp_path, rotary):
    """Without rotation, keys are the result of a Linear, which may leave the accelerator."""
    sizes = replace(APART, attention="multi", kv_heads=4, presents=True, rotary=rotary)
    path = genai.write(tmp_path / "m.onnx", sizes)
    parts = partition(check(path, frames=1))
    shown = [reason for reason in parts.reasons.values() if "inside of a block" in reason.rule]
    assert {reason.rule.split()[0] for reason in shown} == {"present.0.key", "present.0.value"}
    assert all(reason.remedy.endswith("(--outputs)") for reason in shown)
    assert not any(step.kind == "fpga" and node.op_type == "Attention"
                   for step in parts.steps for node in step.nodes)
    ids = np.random.default_rng(6).integers(0, genai.VOCABULARY, (4, sizes.tokens))
    program = moeware.compile(path, CONFIG, {"input_ids": ids})
    found = moeware.Session(program, "torch").run(None, {"input_ids": ids[:1]})
    for value, real in zip(found, exports.run_onnx(path, input_ids=ids[:1]), strict=True):
        assert np.square(value - real).mean() < 0.1**2 * np.square(real).mean()
