"""Norms of root mean squares, and queries and keys that are normalised or turned: from the canonical
graph to integers."""

import numpy as np
import pytest

from moeware.compiler.partition import partition
from moeware.compiler.verify import verify_quantised
from moeware.hw.arch import numerics
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import NormMode
from moeware.runtime.torch_path import TorchDevice
from moeware.sim.compare import compare
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import CONFIGS
from .decoders import Decoder, loss, quantised, rotary_factors
from .lowering import program
from .test_rotary_lowering import NAMES, ROTARY

FORMS = {
    "llama": {}, "qwen2": {"bias": 20.0}, "olmoe": {"norm": "heads"}, "qwen3": {"norm": "each"},
    "no positions": {"rotary": False}, "normalised only": {"norm": "each", "rotary": False},
    "scaled factors": {"scale": 1.3},
}
SIZES = {
    "even": dict(tokens=12, features=32, heads=4, kv_heads=2, width=8, hidden=48),
    "odd": dict(tokens=5, features=21, heads=3, kv_heads=1, width=6, hidden=11),
    "one token": dict(tokens=1, features=8, heads=2, kv_heads=2, width=4, hidden=5),
    "one head": dict(tokens=6, features=10, heads=1, kv_heads=1, width=14, hidden=9),
}
# Two blocks with int8 weights and activations lose 2 to 6 % on random weights, with or without
# rotary embeddings; another angle, or another pair of channels, is an error of tens of percent.
LOSS = 0.08


def made(form: str, size: str = "even", blocks: int = 2, seed: int = 1):
    """Model, quantised step and draw of its inputs."""
    sizes = dict(SIZES[size])
    decoder = Decoder(seed, sizes.pop("tokens"), sizes.pop("features"))
    x = decoder.x
    for _ in range(blocks):
        x = decoder.block(x, **sizes, **FORMS[form])
    model = decoder.model(decoder.linear(decoder.norm(x), 9))
    draw = lambda frames: decoder.random.normal(size=(frames, *x.shape[1:])).astype(np.float32)
    step = quantised(model, draw(64))
    verify_quantised(step)
    return model, step, draw


def one(step, kind, **fields):
    found = [op for op in step.operations if isinstance(op, kind)
             and all(getattr(op, name) == value for name, value in fields.items())]
    assert len(found) == 1
    return found[0]


def attended(step) -> list[q.Operation]:
    """What makes query and key of the first attention."""
    attention = next(op for op in step.operations if isinstance(op, q.Attention))
    return [one(step, (q.Norm, q.Linear), output=name) for name in (attention.query, attention.key)]


def inputs_of(step, x: np.ndarray) -> dict[str, np.ndarray]:
    (port,) = step.inputs
    return {port.tensor: port.quantise(x)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["even", "odd"])
def test_integers_are_near_the_float_model(form, size):
    model, step, draw = made(form, size)
    assert loss(model, step, program(step, ROTARY[0], trace=False), draw(16)) < LOSS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", ROTARY, ids=NAMES)
def test_golden_device_equals_pytorch(config, form):
    for size in SIZES:
        _, step, draw = made(form, size, blocks=1)
        compiled = program(step, config)
        found = compare(compiled, compiled.steps[0],
                        {"golden": GoldenDevice(), "PyTorch": TorchDevice()},
                        inputs_of(step, draw(3)))
        assert found.equal, str(found)
        assert {tensor for _, tensor, *_ in found.tensors} == {
            op.output for op in step.operations}


def test_the_channels_of_a_pair_become_neighbours():
    decoder = Decoder(0, 3, 8)
    y = decoder.norm(decoder.x)
    q_, k = (decoder.linear(y, 2 * 6) for _ in range(2))
    turned = [decoder.rotary(value, 2) for value in (q_, k)]
    y = decoder.node("Attention", *turned, decoder.linear(y, 12), heads=2, kv_heads=2, scale=1.0,
                     causal=0)
    model = decoder.model(decoder.node("Add", decoder.x, decoder.linear(y, 8)))
    step = quantised(model, decoder.random.normal(size=(9, 3, 8)).astype(np.float32))
    cos, sin = rotary_factors(3, 6)
    for norm, linear in zip(attended(step), (q_, k)):
        assert (norm.mode, norm.groups) == (NormMode.SCALE, 1)
        factors = norm.rotation.reshape(3, 3, 2) / (1 << numerics.FACTOR_BITS)
        assert np.abs(factors - np.stack([cos, sin], -1)).max() < 2.0 ** -14
        wide = one(step, q.AddLinear, output=norm.source)
        rows = next(node for node in decoder.nodes if node.outputs[0] is linear).inputs[1]
        order = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
        expected = rows.const_value.numpy()[order]
        scale = wide.affine.multiplier / np.exp2(wide.affine.shift.astype(float))
        # The norm before scales columns, the same for all rows.
        ratio = wide.weight * scale[:, None] / expected
        column = np.median(ratio, 0)
        rounding = 0.51 * scale[:, None] / np.abs(expected)
        assert (np.abs(ratio - column) < rounding + 0.05 * np.abs(column)).all()


def test_a_key_keeps_its_bias_where_it_is_turned_or_normalised():
    for form, kept in (("qwen2", True), ("no positions", False)):
        decoder = Decoder(2, 4, 16)
        x = decoder.block(decoder.x, 2, 2, 8, 5, **FORMS[form] | {"bias": 9.0})
        step = quantised(decoder.model(decoder.linear(decoder.norm(x), 3)),
                         decoder.random.normal(size=(20, 4, 16)).astype(np.float32))
        key = attended(step)[1]
        product = one(step, q.AddLinear, output=key.source) if kept else key
        assert product.affine.bias.any() == kept


@pytest.mark.parametrize("norm, channels", [("heads", 4 * 8), ("each", 8)])
def test_epsilon_is_in_squared_steps_of_the_wide_tensor(norm, channels):
    decoder = Decoder(3, 4, 16)
    x = decoder.block(decoder.x, 4, 2, 8, 5, norm=norm)
    step = quantised(decoder.model(decoder.linear(decoder.norm(x), 3)),
                     decoder.random.normal(size=(20, 4, 16)).astype(np.float32))
    for op in attended(step):
        assert op.groups == (1 if norm == "heads" else 4) and op.mode is NormMode.RMS
        assert len(op.affine.bias) == 32
        assert 1e-5 * (channels / 1e-3) ** 2 < op.epsilon < 1e-5 * (channels / 1e-6) ** 2


def broken(change) -> str:
    decoder = Decoder(0, 4, 16)
    y = decoder.norm(decoder.x)
    q_, k, v = (decoder.linear(y, count * 8) for count in (4, 2, 2))
    q_, k, v, outputs = change(decoder, q_, k, v)
    y = decoder.node("Attention", q_, k, v, heads=4, kv_heads=2, scale=1.0, causal=0)
    model = decoder.model(decoder.node("Add", decoder.x, decoder.linear(y, 16)), *outputs)
    return " ".join(map(str, partition(model).reasons.values()))


@pytest.mark.parametrize("change, reason", [
    (lambda d, q, k, v: (d.rotary(q, 4), k, v, []), "rotary queries and keys, or neither"),
    (lambda d, q, k, v: (d.rotary(q, 4), d.rotary(k, 2), d.rotary(v, 2), []), "no rotary values"),
    (lambda d, q, k, v: (d.rotary(q, 2), d.rotary(k, 2), v, []), "4 heads must have Rotary of as many"),
    (lambda d, q, k, v: (d.norm(q, 2), k, v, []), "must have 1 or 4 groups"),
    (lambda d, q, k, v: (d.norm(q, 4), k, v, [q]), "a projection before RMSNorm must have no other"),
    (lambda d, q, k, v: (d.norm(d.norm(q, 4)), k, v, []), "RMSNorm of a normalised linear value"),
    (lambda d, q, k, v: (d.norm(d.rotary(q, 4)), k, v, []), "RMSNorm of a turned value"),
])
def test_what_attention_cannot_read_runs_on_the_host(change, reason):
    assert reason in broken(change)


def test_rotary_runs_on_the_host_where_there_is_no_gateware():
    decoder = Decoder(0, 4, 16)
    x = decoder.block(decoder.x, 2, 2, 8, 5)
    model = decoder.model(decoder.linear(decoder.norm(x), 3))
    parts = partition(model, CONFIGS[0])
    reasons = [reason for reason in parts.reasons.values() if "Config.rotary = 1" in str(reason)]
    assert len(reasons) == 2
    attention = next(node for node in decoder.nodes if node.op_type == "Attention")
    assert attention.name in parts.reasons  # as what it reads is there
    device = [step for step in parts.steps if step.kind == "fpga"]
    assert {"Linear", "Pointwise", "Add"} <= {n.op_type for step in device for n in step.nodes}
    assert partition(model, ROTARY[0]).reasons.keys() == {"host"}


def test_groups_of_the_stream_run_on_the_host():
    decoder = Decoder(0, 4, 16)
    model = decoder.model(decoder.linear(decoder.norm(decoder.x, 4), 3))
    assert "RMSNorm of the residual stream must have 1 group" in " ".join(
        map(str, partition(model).reasons.values()))
