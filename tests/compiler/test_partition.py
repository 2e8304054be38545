"""Everything supported runs on the accelerator; the rest has a reason and a runnable model."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import moeware
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import describe, report
from moeware.compiler.reference import evaluate
from tests.compiler import exports
from tests.compiler.canonical_models import CHANNELS, SIDE, Canonical
from tests.compiler.exports import Block, Mlp, Moe, Odd, PackedAttention, Vit, export
from tests.compiler.ordeal import CONFIG

CASES = Path(__file__).parent / "cases"

# Sums of float32 of order one in another order, through a few blocks: what two kernels may differ by.
SUM = 1e-4


def run_steps(model, parts, feeds):
    """Run the host steps in ONNX Runtime and take what the accelerator would give from float."""
    record = dict(feeds)
    evaluate(model, feeds, record.__setitem__)
    for step in parts.steps:
        if step.kind == "host":
            session = onnxruntime.InferenceSession(step.model)
            outputs = session.run(None, {name: record[name] for name in step.inputs})
            for name, output in zip(step.outputs, outputs, strict=True):
                assert output.shape == record[name].shape
                assert np.allclose(output, record[name], atol=SUM)
    assert {name for step in parts.steps for name in step.outputs} >= {
        value.name for value in model.graph.outputs
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    def block(mixer):
        return Block(PackedAttention(), mixer, lambda: nn.LayerNorm(exports.DIM))

    built = exports.randomise(Vit(block(Mlp()), block(Odd()), block(Moe("gather"))))
    path = tmp_path_factory.mktemp("partition") / "m.onnx"
    export(exports.Preprocessed(built).eval(), path, opset=17, dynamo=False)
    return fuse(load(path))


@pytest.mark.parametrize("mixer", [Mlp, lambda: Moe("loop")])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_whole_model_on_the_accelerator(tmp_path, mixer, pool):
    path = export(exports.vit(mixer=mixer(), pool=pool), tmp_path / "m.onnx", 17, dynamo=False)
    model = fuse(load(path))
    parts = partition(model)
    (step,) = parts.steps
    assert (step.kind, step.inputs, step.outputs) == ("fpga", ("image",), ("logits",))
    count = len(model.graph)
    assert describe(parts) == f"fpga {count}/{count} nodes, 100.0 % of MACs"


@pytest.mark.parametrize("blocks", [1, 2])
def test_rows_enter_as_the_stream(tmp_path, blocks):
    """An encoder alone, whose caller makes the embedding."""
    layers = [Block(PackedAttention(), Mlp(), lambda: nn.LayerNorm(exports.DIM)) for _ in range(blocks)]
    model = exports.randomise(nn.Sequential(*layers, nn.LayerNorm(exports.DIM), nn.Linear(exports.DIM, 3)))
    rows = np.random.default_rng(0).normal(size=(12, 5, exports.DIM)).astype(np.float32)
    path = exports.export_module(model, (torch.from_numpy(rows[:1]),), tmp_path / "m.onnx", 17, False,
                                 input_names=["rows"])
    (step,) = partition(fuse(load(path))).steps
    assert step.kind == "fpga"
    program = moeware.compile(path, CONFIG, {"rows": rows})
    golden, torch_path = (moeware.Session(program, device).run(None, {"rows": rows[:2]})[0]
                          for device in ("golden", "torch"))
    np.testing.assert_array_equal(golden, torch_path)
    # Of int8 on random weights: the noise of a few roundings, far below the signal.
    wanted = np.concatenate([exports.run_onnx(path, rows=row[None])[0] for row in rows[:2]])
    assert np.square(golden - wanted).mean() < 0.01 * np.square(wanted).mean()


def test_only_the_norm_of_an_embedding_stays_on_the_host():
    """CLIP: the first norm makes the stream; what it reads and what reads it is on the accelerator."""
    made = Canonical(5)
    x = made.norm(made.start(12))
    x = made.residual(x, made.linear(made.pointwise(made.linear(made.norm(x), 16), "quick_gelu"), 12))
    model = made.model(made.linear(made.norm(x), 5))
    parts = partition(model)
    assert [step.kind for step in parts.steps] == ["fpga", "host", "fpga"]
    (node,) = parts.steps[1].nodes
    reason = parts.reasons[node.name]
    assert node.op_type == "LayerNorm" and reason.rule.startswith("LayerNorm of the embedding makes")
    image = np.random.default_rng(0).normal(size=(3, CHANNELS, SIDE, SIDE)).astype(np.float32)
    run_steps(model, parts, {"image": image})


def test_steps_are_cut_at_the_stream(mixed):
    parts = partition(mixed)
    assert [step.kind for step in parts.steps] == ["host", "fpga", "host", "fpga", "host"]
    operators = [[node.op_type for node in step.nodes] for step in parts.steps]
    assert operators[0] == ["Sub", "Clip", "Mul"]
    assert operators[1][0] == "PatchEmbed" and operators[1][-1] == "Add"
    assert operators[2] == ["LayerNorm", "Einsum", "Sin", "Add"]
    assert operators[3][-1] == "Linear"
    assert operators[4] == ["Softmax"]
    for before, after in zip(parts.steps, parts.steps[1:]):
        assert before.outputs == after.inputs


def test_host_steps_run_with_any_batch(mixed):
    for frames in (1, 3):
        run_steps(mixed, partition(mixed), {"image": exports.example(frames)})


def test_every_host_node_has_a_reason(mixed):
    parts = partition(mixed)
    for step in parts.steps:
        if step.kind == "fpga":
            assert step.reasons == {} and step.model is None
            continue
        for node in step.nodes:
            reason = step.reasons[node.name]
            assert str(reason) == f"node `{node.name}`: {reason.rule}; {reason.remedy}"
            assert reason.rule and reason.remedy
    reasons = {
        node.op_type: step.reasons.get(node.name) for step in parts.steps for node in step.nodes
    }
    assert "Sin has no form" in reasons["Sin"].rule and reasons["Sin"].follows is None
    norm = parts.reasons["LayerNorm_3"]
    assert "feeds" in norm.rule and norm.follows == reasons["Einsum"].node
    assert norm.remedy == f"repair `{norm.follows}` first"
    assert parts.causes["LayerNorm_3"] == reasons["Einsum"]
    assert parts.causes["Add_3"] == reasons["Sin"] == parts.causes[reasons["Sin"].node]
    assert describe(parts).endswith(f"; host 8 ({reasons['Einsum'].rule})")


def test_report_counts_macs(mixed):
    content = json.loads(json.dumps(report(partition(mixed))))
    assert content["fpga_nodes"] + content["host_nodes"] == len(mixed.graph)
    (einsum,) = [entry for entry in content["host"] if entry["operator"] == "Einsum"]
    tokens, dim = exports.PATCHES + 1, exports.DIM
    assert einsum["macs"] == tokens * tokens * dim
    assert content["fpga_mac_share"] == pytest.approx(1 - einsum["macs"] / content["macs"])
    patches = exports.PATCHES * dim * exports.CHANNELS * exports.PATCH**2
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    dense = 2 * tokens * dim * exports.HIDDEN
    moe = tokens * dim * exports.EXPERTS + exports.TOP_K * dense
    head = dim * exports.CLASSES
    total = patches + 3 * attention + dense + moe + head + einsum["macs"]
    assert content["macs"] == total
    assert describe(partition(mixed)).startswith(
        f"fpga {content['fpga_nodes']}/{len(mixed.graph)} "
    )


@pytest.mark.parametrize(
    "case,words",
    [
        ("three_operand_einsum", "3-operand Einsum is not a supported form; write"),
        ("post_norm", "or attention or function or product or normalised linear; use pre-norm"),
        ("masked_attention", "Softmax of an attention that no rule recognises; write it as"),
    ],
)
def test_reason(case, words):
    model = fuse(load(CASES / f"{case}.onnxtxt"))
    parts = partition(model)
    assert [step.kind for step in parts.steps] == ["host"]
    assert any(words in str(reason) for reason in parts.reasons.values())
    assert "Transpose" not in describe(parts)  # what moves elements alone is no cause
    generator = np.random.default_rng(2)
    feeds = {
        value.name: generator.normal(size=(2, *list(value.shape)[1:])).astype(np.float32)
        for value in model.graph.inputs
    }
    run_steps(model, parts, feeds)


def test_long_skip_connection_is_refused(tmp_path):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block(PackedAttention(), Mlp(), lambda: nn.LayerNorm(exports.DIM))

        def forward(self, x):
            return self.inner(x) + x

    model = exports.randomise(Vit(Skip()))
    parts = partition(fuse(load(export(model, tmp_path / "m.onnx", 17, dynamo=False))))
    kinds = {node.name: step.kind for step in parts.steps for node in step.nodes}
    assert kinds["Add_2"] == "host" and kinds["Add_1"] == "fpga" and kinds["Linear_6"] == "fpga"
    assert "joins the residual stream with a Linear or Experts" in str(parts.reasons["Add_2"])


def test_fork_of_the_stream_is_refused(tmp_path):
    class Fork(Vit):
        def forward(self, image):
            x = self.conv(image).flatten(2).transpose(1, 2) + self.position
            left, right = self.blocks
            ends = x + left(self.norm(x)), x + right(self.norm(x))
            return self.head(self.norm(ends[0]).mean(1)) + self.head(self.norm(ends[1]).mean(1))

    model = exports.randomise(Fork(Mlp(), Moe("gather"), pool="mean"))
    fused = fuse(load(export(model, tmp_path / "m.onnx", 17, dynamo=False)))
    parts = partition(fused)
    forks = [node.name for node in fused.graph if node.op_type == "Add" and node.domain][:2]
    assert all("must not fork" in parts.reasons[name].rule for name in forks)
    run_steps(fused, parts, {"image": exports.example(2)})
