"""The PyTorch path against a plain numpy evaluation of the quantised graph, exactly."""

import gc

import numpy as np
import pytest
import torch

from moeware.hw.arch import numerics
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.quantised import AddLinear, Affine, Experts
from moeware.runtime import torch_arithmetic, torch_path
from moeware.runtime.device import DeviceError, open_device
from moeware.runtime.torch_arithmetic import Scale
from moeware.runtime.torch_path import TorchDevice

from .reference import Graph, evaluate


@pytest.fixture(params=[False, True], ids=["float32", "int8"])
def int8_products(request, monkeypatch):
    if request.param and not torch_arithmetic.INT8_PRODUCTS:
        request.param = False  # this CPU has one way only
    monkeypatch.setattr(torch_arithmetic, "INT8_PRODUCTS", request.param)


def compare(graph: Graph, frames: int = 3) -> dict[str, np.ndarray]:
    """Runs all of `graph` on PyTorch; returns the tensors, which are those of the reference."""
    program = graph.program(graph.operations[-1].output)
    inputs = graph.integers(frames)
    found = TorchDevice().run(program, program.steps[0], inputs, probes=True)
    expected = evaluate(graph.operations, inputs)
    for op in graph.operations:
        assert found[op.output].dtype == np.int64
        np.testing.assert_array_equal(found[op.output], expected[op.output], err_msg=op.output)
    return found


def transformer(graph: Graph, tokens: int, depth: int, width: int, heads: int, key_heads: int, *,
                hidden: int, experts: int, chosen: int, causal: bool = False,
                mode: NormMode = NormMode.LAYER) -> None:
    """One block with a class token, dense and expert halves, pooling and a head."""
    patches = graph.input(tokens, depth)
    x = graph.constant(tokens + 1, heads * width)
    x = graph.add_linear(patches, x, heads * width, first_row=1)
    y = graph.norm(x, mode)
    q, k, v = (graph.linear(y, n * width) for n in (heads, key_heads, key_heads))
    y = graph.attention(q, k, v, heads, key_heads, causal=causal)
    x = graph.add_linear(y, x, heads * width)
    x = graph.add_linear(graph.linear(graph.norm(x, mode), hidden, table=True), x, heads * width)
    y = graph.norm(x, mode)
    x = graph.experts(y, x, graph.route(y, experts, chosen), experts, hidden)
    y = graph.norm(x, mode)
    pooled = graph.attention(None, y, y, 1, 1)
    graph.add_linear(pooled, None, 7)


@pytest.mark.parametrize("gain", [1, 6], ids=["fitting", "saturating"])
@pytest.mark.parametrize("sizes", [
    {"tokens": 7, "depth": 5, "width": 3, "heads": 4, "key_heads": 2, "hidden": 9, "experts": 5,
     "chosen": 2},
    {"tokens": 1, "depth": 1, "width": 1, "heads": 1, "key_heads": 1, "hidden": 1, "experts": 1,
     "chosen": 1},
    {"tokens": 16, "depth": 24, "width": 16, "heads": 3, "key_heads": 3, "hidden": 33,
     "experts": 16, "chosen": 4,     "causal": True, "mode": NormMode.RMS},
    {"tokens": 4, "depth": 6, "width": 5, "heads": 6, "key_heads": 4, "hidden": 3, "experts": 3,
     "chosen": 3}],
    ids=["odd", "one", "causal", "all-experts"])
def test_transformer(int8_products, sizes, gain):
    for seed in range(3):
        graph = Graph(seed, gain=gain)
        transformer(graph, **sizes)
        compare(graph, frames=1 + seed)


def coarse(graph: Graph) -> None:
    """Leaves multipliers so few bits that float32 scales exactly."""
    for op in graph.operations:
        for name, bits in (("affine", 4 if isinstance(op, AddLinear) else 6), ("up_affine", 6),
                           ("down_affine", 4), ("gate_affine", 6)):
            if getattr(op, name, None) is not None:
                getattr(op, name).multiplier[...] &= 65536 - (1 << (16 - bits))


@pytest.mark.parametrize("gain", [1, 6], ids=["fitting", "saturating"])
def test_transformer_in_float32(int8_products, gain, monkeypatch):
    scales, start = [], Scale.__init__

    def record(scale, *values, **options):
        start(scale, *values, **options)
        scales.append(scale)
    monkeypatch.setattr(Scale, "__init__", record)
    graph = Graph(8, gain=gain)
    transformer(graph, 7, 24, 8, 2, 2, hidden=33, experts=5, chosen=2)
    coarse(graph)
    compare(graph)
    assert len(scales) == 12 + 2 * 5 and {scale.dtype for scale in scales} == {torch.float32}


def test_experts_of_both_formats(int8_products):
    graph = Graph(9)
    source, residual = graph.input(6, 8), graph.input(6, 10, Memory.RESIDUAL)
    graph.experts(source, residual, graph.route(source, 4, 2), 4, 5)
    coarse(graph)
    experts = graph.operations[-1]
    assert isinstance(experts, Experts)
    experts.up_affine.multiplier[1:3] |= 1
    experts.down_affine.multiplier[2:] |= 1
    compare(graph, frames=8)


@pytest.mark.parametrize("multiplier, shift, bias, reach, wide, dtype", [
    (255, 16, 32768, np.inf, False, torch.float32),  # 128 + 128 = 2**24 / 2**16
    (255, 16, 32769, np.inf, False, torch.float64),
    (255 << 8, 24, -32768, np.inf, False, torch.float32),
    (257, 17, 0, np.inf, False, torch.float64),  # 128 + 1/2 > 2**24 / 2**17
    (257, 17, 0, 65024, False, torch.float32),  # 127.498 + 1/2
    (65535, 24, 0, np.inf, False, torch.float64),
    (3, 8, 2796160, np.inf, True, torch.float32),  # 32768 + 32768 = 2**24 / 2**8
    (3, 8, 2796161, np.inf, True, torch.float64),
    (5, 12, 0, 3355033, True, torch.float32),  # 4095.5 + 1/2 = 2**24 / 2**12
    (5, 12, 0, 3355034, True, torch.float64),
    (40001, 18, 0, np.inf, True, torch.float64),
    (65535, 1, 0, np.inf, True, torch.float32),
    (0, 1, 1 << 30, np.inf, False, torch.float32)])
def test_float32_where_it_is_exact(multiplier, shift, bias, reach, wide, dtype):
    affine = Affine(bias=np.array([bias], np.int32), multiplier=np.array([multiplier], np.uint16),
                    shift=np.array([shift], np.uint8))
    scale = Scale(affine, wide=wide, reach=reach)
    assert scale.dtype is dtype
    limit = int(min(reach, (1 << 31) - 1 - abs(bias)))
    middle = np.clip(np.arange(-300_000, 300_001) - bias, -limit, limit)
    value = np.concatenate([middle, np.linspace(-limit, limit, 200_001).astype(np.int64)])
    found = scale(torch.from_numpy(value.astype(np.int32)).view(-1, 1))
    expected = numerics.requantise(value + bias, multiplier, shift, 16 if wide else 8)
    np.testing.assert_array_equal(found.view(-1).numpy(), expected)


def test_float32_is_not_exact_everywhere():
    values = np.arange(200_000)
    real = np.floor(values.astype(np.float32) * np.float32(40001 / 2 ** 18) + np.float32(0.5))
    assert real.max() < 32767 and (real != numerics.requantise(values, 40001, 18, 16)).any()


@pytest.mark.parametrize("depth", [1024, 1025, 3000])
def test_deep_product(int8_products, depth):
    graph = Graph(depth)
    source = graph.input(3, depth)
    graph.linear(source, 5)
    graph.route(source, 4, 2)
    graph.add_linear(source, None, 6)
    compare(graph)


def test_products_at_the_limits(int8_products):
    graph = Graph(0)
    source = graph.input(2, 2048)
    graph.add_linear(source, None, 2)
    graph.operations[0].weight[:] = -128
    program = graph.program(graph.operations[0].output)
    inputs = {source: np.full((1, 2, 2048), -128)}
    inputs[source][0, 1] = 127
    found = TorchDevice().run(program, program.steps[0], inputs)
    expected = evaluate(graph.operations, inputs)
    np.testing.assert_array_equal(found["addlinear0"], expected["addlinear0"])


def test_attention_reads_turned_queries_and_keys():
    graph = Graph(3)
    source, rotation = graph.input(7, 9), graph.rotation(7, 6)
    q, k = (graph.norm(graph.add_linear(source, None, heads * 6), NormMode.RMS, groups=heads,
                       rotation=rotation) for heads in (4, 2))
    graph.attention(q, k, graph.linear(source, 12), 4, 2, causal=True)
    compare(graph)


@pytest.mark.parametrize("multiplier, shift", [
    (0, 1), (1, 47), (65535, 1), (40000, 14), (40000, 22)])
@pytest.mark.parametrize("out_multiplier, out_shift", [(40000, 15), (65535, 1), (51200, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_scale(multiplier, shift, out_multiplier, out_shift, causal):
    graph = Graph(shift)
    q, k, v = graph.input(5, 12), graph.input(9, 6), graph.input(9, 6)
    graph.attention(q, k, v, 4, 2, causal=causal, multiplier=multiplier, shift=shift,
                    out_multiplier=out_multiplier, out_shift=out_shift)
    compare(graph)


def test_attention_over_many_keys():
    graph = Graph(3)
    q, k, v = graph.input(2, 8), graph.input(300, 8), graph.input(300, 8)
    graph.attention(q, k, v, 1, 1, multiplier=0)  # all alike: sums above 2**24
    graph.attention(q, k, v, 2, 2)
    graph.attention(None, k, v, 1, 1)
    compare(graph, frames=2)


def test_attention_sums_beyond_float32():
    keys, random = 400, np.random.default_rng(0)
    value = random.integers(120, 128, (1, keys, 64))
    exact = 1023 * value.sum(1)[0]
    rounded = torch.matmul(torch.full((1, 1, 1, keys), 1023.0),
                           torch.from_numpy(value[None]).float()).numpy()[0, 0, 0].astype(int)
    assert (exact != rounded).any()
    # An output scale with which the rounding of a float32 sum shows in the result.
    scales = numerics.row_scale(np.full(65536, 1023 * keys), np.arange(65536), 15)
    shows = (numerics.requantise(exact[:, None], *scales)
             != numerics.requantise(rounded[:, None], *scales)).any(0)
    assert shows.any()
    graph = Graph(0)
    names = [graph.input(1, 64), graph.input(keys, 64), graph.input(keys, 64)]
    output = graph.attention(*names, 1, 1, multiplier=0, out_multiplier=int(np.argmax(shows)))
    program = graph.program(output)
    inputs = dict(zip(names, (value[:, :1], value, value)))
    found = TorchDevice().run(program, program.steps[0], inputs)
    np.testing.assert_array_equal(found[output], evaluate(graph.operations, inputs)[output])


@pytest.mark.parametrize("over_chosen", [False, True])
def test_ties_go_to_the_lower_expert(over_chosen):
    graph = Graph(4)
    source = graph.input(6, 8)
    equal = np.repeat(graph.int8(3, 8), 5, axis=0)
    graph.route(source, 15, 4, over_chosen=over_chosen, weight=equal, bias=np.zeros(15, np.int32))
    route = compare(graph)["route0"]
    assert (route[..., :3, 0] % 5 == [0, 1, 2]).all()


@pytest.mark.parametrize("over_chosen, number", [
    *((over_chosen, number) for number in range(6) for over_chosen in (False, True)), (False, 6)])
def test_router_forms(over_chosen, number):
    graph = Graph(8 + number)
    source = graph.input(40, 8)
    form = list(graph.forms(12, 3))[number]
    graph.route(source, 12, 3, over_chosen=over_chosen, **form)
    equal = np.repeat(graph.int8(4, 8), 3, axis=0)  # logits that tie
    graph.route(source, 12, 3, over_chosen=over_chosen, weight=equal, bias=np.zeros(12, np.int32),
                **form)
    far = np.repeat(np.array([-(1 << 30), (1 << 30), 0, 1 << 20], np.int32), 3)  # scores saturate
    graph.route(source, 12, 3, over_chosen=over_chosen, bias=far, **form)
    compare(graph)


@pytest.mark.parametrize("threshold", [0, 655, 1 << 14, 1 << 15, 0xffff])
@pytest.mark.parametrize("base", [-(1 << 20), -1, 0, 1, 1 << 20])
def test_sparse_routers(base, threshold):
    """All logits negative, around zero, or positive, some equal; one expert chosen, or every one."""
    graph = Graph(9)
    source = graph.input(40, 8)
    weight = np.repeat(graph.int8(3, 8), 2, axis=0)
    bias = np.full(6, base, np.int32)
    for chosen in (1, 2, 6):
        graph.route(source, 6, chosen, weight=weight, bias=bias, sparse=True, threshold=threshold)
    graph.route(source, 6, 2, weight=np.zeros((6, 8), np.int8), bias=bias, sparse=True,
                threshold=threshold)
    compare(graph)


def test_experts_without_rows():
    graph = Graph(5)
    source, residual = graph.input(6, 8), graph.input(6, 10, Memory.RESIDUAL)
    bias = np.full(9, -1 << 24, np.int32)
    bias[[2, 7]] = 1 << 24, (1 << 24) + 1
    route = graph.route(source, 9, 2, bias=bias)
    graph.experts(source, residual, route, 9, 5, table=False)
    chosen = compare(graph)[route][..., 0]
    assert (np.sort(chosen) == [2, 7]).all()


@pytest.mark.parametrize("gain", [1, 6, 40], ids=["fitting", "saturating", "loud"])
@pytest.mark.parametrize("rough", [False, True], ids=["float64", "float32"])
def test_gated_products(int8_products, gain, rough):
    for seed, table in enumerate((True, False)):
        graph = Graph(seed, gain=gain)
        source, residual = graph.input(6, 8), graph.input(6, 10, Memory.RESIDUAL)
        gated = graph.linear(source, 9, table=table, gated=True)
        graph.experts(source, residual, graph.route(source, 5, 2), 5, 7, table=table, gated=True)
        if rough:
            coarse(graph)
        products = compare(graph, frames=4)[gated]
        assert gain == 1 or {-128, 127} <= set(products.ravel().tolist())


def test_products_of_the_largest_values_are_exact():
    """All int8 values that meet int16 factors at and next to borders of saturation and rounding."""
    value, factor = np.meshgrid(np.arange(-128, 128), np.concatenate([
        np.arange(-1300, 1300), np.arange(-32768, -32700), np.arange(32700, 32768)]))
    found = torch_arithmetic.paired(torch.from_numpy(value.astype(np.int8)),
                                    torch.from_numpy(factor.astype(np.float32)))
    np.testing.assert_array_equal(found.numpy(), numerics.product(value, factor))


def test_logits_beyond_float32_are_told_apart():
    graph = Graph(6)
    source = graph.input(4, 3)
    graph.route(source, 3, 2, weight=np.zeros((3, 3), np.int8),
                bias=np.array([2 ** 30, 2 ** 30 + 1, 2 ** 31 - 1], np.int32))
    assert (compare(graph)["route0"][..., 0] == [2, 1]).all()


def test_frames_in_chunks_agree(monkeypatch):
    graph = Graph(7)
    transformer(graph, 5, 6, 4, 2, 1, hidden=8, experts=4, chosen=2)
    whole = compare(graph, frames=7)
    monkeypatch.setattr(torch_path, "CHUNK_BYTES", 1500)
    program = graph.program(graph.operations[-1].output)
    graph.random = np.random.default_rng(0)
    inputs, seen = graph.integers(7), []
    found = TorchDevice().run(program, program.steps[0], inputs,
                              progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 2 and seen[-1] == (7, 7)
    expected = evaluate(graph.operations, inputs)
    np.testing.assert_array_equal(found["addlinear16"], expected["addlinear16"])
    assert list(found) == ["addlinear16"] and whole["addlinear16"].shape == (7, 1, 7)


@pytest.mark.parametrize("frames, most, edges", [
    (1, 0, [0, 1]), (1, 1, [0, 1]), (2, 1, [0, 1, 2]), (3, 2, [0, 1, 3]), (8, 8, [0, 4, 8]),
    (8, 64, [0, 8])])
def test_every_chunk_has_a_frame(frames, most, edges, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch_path._edges(frames, most) == edges


def test_prepared_steps_are_forgotten_with_their_program():
    device = TorchDevice()
    for seed in range(3):
        graph = Graph(seed)
        graph.linear(graph.input(2, 3), 4)
        program = graph.program("linear0")
        device.run(program, program.steps[0], graph.integers(1))
    del program, graph
    gc.collect()
    assert not device._prepared


def test_inputs_must_be_those_of_the_step():
    graph = Graph(0)
    graph.linear(graph.input(2, 3), 4)
    program = graph.program("linear0")
    device = open_device("torch", None)
    for inputs in ({}, {"input0": np.zeros((0, 2, 3))}, {"input0": np.zeros((1, 3, 2))},
                   {"other": np.zeros((1, 2, 3))}):
        with pytest.raises(DeviceError, match="Inputs of a device step must be"):
            device.run(program, program.steps[0], inputs)
