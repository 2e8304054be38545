"""A model of token ids: the host looks their embeddings up, all else runs on the accelerator."""

import numpy as np
import pytest
import torch
from torch import nn

import moeware
from moeware.compiler.calibrate import calibrate
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import report
from tests.compiler.exports import DIM, Block, Mlp, PackedAttention, export_module, run_onnx

TOKENS, VOCABULARY = 7, 30
# int8 activations of one random block: 1 % of the largest logit was measured.
QUANTISED = 0.03


class Language(nn.Module):
    """Causal, with tied embeddings; logits of all tokens or of the last."""

    def __init__(self, last):
        super().__init__()
        self.last, self.table = last, nn.Embedding(VOCABULARY, DIM)
        self.block = Block(PackedAttention("sdpa", True), Mlp(), lambda: nn.LayerNorm(DIM))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.norm(self.block(self.table(ids)))
        return self.head(x[:, -1] if self.last else x)


def ids(frames, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (frames, TOKENS))


@pytest.fixture(scope="module", params=[False, True], ids=["all tokens", "last token"])
def path(request, tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("language") / "m.onnx"
    example = (torch.zeros(1, TOKENS, dtype=torch.int64),)
    names = {"input_names": ["ids"], "output_names": ["logits"]}
    return export_module(Language(request.param), example, path, 17, False, **names)


def test_one_host_step_in_front(path):
    parts = partition(fuse(load(path)))
    assert [step.kind for step in parts.steps] == ["host", "fpga"]
    assert [node.op_type for node in parts.steps[0].nodes] == ["Gather"]
    assert parts.steps[1].outputs == ("logits",)
    (entry,) = report(parts)["host"]
    assert "look-up without products" in entry["reason"] and entry["macs"] == 0


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_embedding_is_no_cause_of_what_follows(tmp_path, factor):
    """What reads it in another form than pre-norm is to be changed, not the look-up."""
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.attention = nn.Embedding(VOCABULARY, DIM), PackedAttention("sdpa", True)
            self.norm = nn.LayerNorm(DIM)

        def forward(self, ids):
            x = self.table(ids) * factor
            return x + self.norm(self.attention(x))

    example = (torch.zeros(1, TOKENS, dtype=torch.int64),)
    parts = partition(fuse(load(export_module(PostNorm(), example, tmp_path / "m.onnx", 17, False))))
    causes = {reason for name, reason in parts.causes.items() if name.startswith("Linear")}
    assert causes and all("Linear of a stream value" in reason.rule for reason in causes)


def test_calibration_with_ids(path):
    found = calibrate(fuse(load(path)), {"ids": ids(5)})
    assert found.frames == 5
    assert found.samples["LayerNorm_0"].shape == (5 * TOKENS, DIM)


def test_session_takes_ids(path):
    program = moeware.compile(path, "ulx3s-85f", {"ids": ids(64)})
    found, = moeware.Session(program, device="torch").run(None, {"ids": ids(4, seed=1)})
    for frame, given in zip(found, ids(4, seed=1)):
        wanted = run_onnx(path, ids=given[None])[0]
        assert np.abs(frame - wanted[0]).max() < QUANTISED * np.abs(wanted).max()
