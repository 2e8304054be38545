"""Gated layers, RMSNorm, and queries and keys that are normalised and turned, of models that come
quantised by onnxruntime's static quantiser."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.pipeline import compile_model
from moeware.hw.arch import quantised as q
from moeware.runtime.session import Session
from moeware.sim.golden import GoldenDevice

from . import exports
from .decoders import rotary_factors
from .quantised import quantise_file, quantised_step
from .test_models import EVEN
from .test_qdq import SETTINGS, operation

WITH = dataclasses.replace(EVEN, products=1, rotary=1)
WIDTH = 8  # of a head, which rotation takes in pairs


class Swiglu(nn.Module):
    def __init__(self, function=F.silu):
        super().__init__()
        self.gate, self.up = (nn.Linear(exports.DIM, exports.HIDDEN) for _ in range(2))
        self.down, self.function = nn.Linear(exports.HIDDEN, exports.DIM), function

    def forward(self, x):
        return self.down(self.function(self.gate(x)) * self.up(x))


class GatedMoe(exports.Moe):
    def __init__(self):
        super().__init__(function=F.silu)
        self.w3 = nn.Parameter(torch.randn(exports.EXPERTS, exports.HIDDEN, exports.DIM) * 0.3)

    def _expert(self, e, rows):
        hidden = self.function(F.linear(rows, self.w1[e], self.b1[e])) * F.linear(rows, self.w3[e])
        return F.linear(hidden, self.w2[e], self.b2[e])


class Turned(nn.Module):
    """Queries and keys normalised by head and turned."""

    def __init__(self):
        super().__init__()
        wide = exports.HEADS * WIDTH
        self.q, self.k, self.v = (nn.Linear(exports.DIM, wide) for _ in range(3))
        self.o, self.norms = nn.Linear(wide, exports.DIM), nn.ModuleList([norm(WIDTH), norm(WIDTH)])
        cos, sin = rotary_factors(exports.PATCHES + 1, WIDTH)
        for name, each in (("cos", cos), ("sin", sin)):
            self.register_buffer(name, torch.tensor(np.tile(each, 2), dtype=torch.float32))

    def _turn(self, x):
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], exports.HEADS, WIDTH).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        q, k = (self._turn(normalise(each)) for normalise, each in zip(self.norms, (q, k)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RmsNorm(nn.Module):
    """Written out, as models have it."""

    def __init__(self, channels=exports.DIM):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def norm(channels=exports.DIM):
    return RmsNorm(channels)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Quantised files by model and setting, made once."""
    made = {}

    def get(kind: str, setting: str):
        if (kind, setting) not in made:
            path = tmp_path_factory.mktemp("qdq") / "model.onnx"
            torch.manual_seed(4)  # of layers that are made before `vit` seeds
            model = {"swiglu": lambda: exports.vit(mixer=Swiglu(), norm=norm),
                     "bilinear": lambda: exports.vit(mixer=Swiglu(lambda x: x), norm=norm),
                     "turned": lambda: exports.vit(attention=Turned(), mixer=Swiglu(), norm=norm),
                     "experts": lambda: exports.vit(mixer=GatedMoe(), norm=norm)}[kind]()
            exports.export(model, path, opset=17, dynamo=False)
            made[kind, setting] = quantise_file(path, exports.example(16, 1), prepare=False,
                                                **SETTINGS[setting])
        return made[kind, setting]
    return get


def integers(path, kept, name: str, *places: int, norm: str = "") -> list[np.ndarray]:
    """Of the weights of a canonical node; `norm` in front of it holds channels of negative gamma
    negated."""
    nodes = {node.name: node for node in fuse(load(path)).graph}
    found = [kept.integers(nodes[name].inputs[place].const_value.numpy())[0] for place in places]
    gamma = nodes[norm].inputs[1].const_value.numpy() if norm else np.ones(1)
    return [each * np.where(gamma < 0, -1, 1) for each in found]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["swiglu", "bilinear"])
def test_a_gated_layer_keeps_the_weights_of_its_file(files, kind, setting):
    path = files(kind, setting)
    step, kept = quantised_step(path, exports.example(16, 1))
    gated, = (op for op in step.operations if isinstance(op, q.Linear) and op.gate is not None)
    theirs = [integers(path, kept, name, 1, norm="RMSNorm_1")[0] for name in ("Linear_4", "Linear_5")]
    for ours in (gated.gate, gated.weight):
        assert any(np.array_equal(ours, each) for each in theirs)
    down = operation(step, "Linear_6")
    np.testing.assert_array_equal(down.weight, integers(path, kept, "Linear_6", 1)[0])
    assert kept.weights and not any(kept.noted.get(name, "unseen") for name in kept.weights)


@pytest.mark.parametrize("setting", ["symmetric, per tensor", "products alone"])
def test_gated_experts_keep_the_weights_of_their_file(files, setting):
    path = files("experts", setting)
    step, kept = quantised_step(path, exports.example(16, 1))
    experts = operation(step, "GatedExperts_0")
    theirs = integers(path, kept, "GatedExperts_0", 3, 7, norm="RMSNorm_1")
    for ours, each in zip((experts.gate, experts.up), theirs, strict=True):
        np.testing.assert_array_equal(ours, each)
    np.testing.assert_array_equal(experts.down, integers(path, kept, "GatedExperts_0", 5)[0])


@pytest.mark.parametrize("options, reason", [
    (dict(bits={"experts": 4}), "weights of 4 bits were asked for"),
    (dict(bits={"GatedExperts_0/expert1": 2}), "weights of 2 bits were asked for"),
    (dict(expert_bits=6.0), "weights of 4 bits were asked for"),
    (dict(nested=True), "nested weights were asked for"),
])
def test_experts_of_other_bits_give_their_integers_up(files, options, reason):
    path = files("experts", "symmetric, per channel")
    program = compile_model(path, WITH, {"image": exports.example(16, 1)}, **options)
    bits = [2 if e == 1 else 8 for e in range(exports.EXPERTS)]
    if "expert_bits" in options:
        bits, = program.metadata["expert_bits"]["layers"].values()
        assert {4, 8} <= set(bits)
    narrow = exports.EXPERTS if reason.startswith("nested") or "experts" in options.get("bits", ()) else (
        sum(f"of {each} bits" in reason for each in bits))
    given_up = [name for why, names in program.metadata["kept"]["others"].items() for name in names
                if why.startswith(reason)]
    assert len(given_up) == 3 * narrow  # tensors of the file
    images = exports.example(4, 3)
    ours, = Session(program, GoldenDevice()).run(None, {"image": images})
    np.testing.assert_array_equal(ours, Session(program, "torch").run(None, {"image": images})[0])


@pytest.mark.parametrize("setting", ["symmetric, per channel", "uint8"])
@pytest.mark.parametrize("kind", ["swiglu", "turned", "experts"])
def test_it_answers_like_its_file(files, kind, setting):
    """As a ViT in `test_qdq` does, and as near; ONNX Runtime itself may be far from the float model."""
    path, images = files(kind, setting), exports.example(48, 3)
    program = compile_model(path, WITH, {"image": exports.example(16, 1)})
    assert "100.0 % of MACs" in program.placement
    ours, = Session(program, GoldenDevice()).run(None, {"image": images})
    np.testing.assert_array_equal(ours, Session(program, "torch").run(None, {"image": images})[0])
    real = exports.run_onnx(path.with_name("model.onnx"), image=images)[0]
    theirs = np.concatenate([exports.run_onnx(path, image=image[None])[0] for image in images])
    lost, file_lost, apart = (np.sqrt(np.square(a - b).mean()) / real.std()
                              for a, b in ((ours, real), (theirs, real), (ours, theirs)))
    assert lost <= min(file_lost + 0.01, 0.08) and apart <= np.hypot(lost, file_lost) + 0.01
    assert not {name for reason, names in program.metadata["kept"]["others"].items()
                for name in names if reason == "no layer of the accelerator uses it"}
