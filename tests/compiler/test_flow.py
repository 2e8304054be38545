"""What keeps engines at work side by side: blocks of rows behind attention, experts in turns, loads
before the router, words that have rested. None of it may change a result."""

import itertools

import numpy as np
import pytest

from moeware.compiler.allocate import allocate
from moeware.compiler.lowered import Buffer, Instr, Lowered
from moeware.compiler.pace import least_times
from moeware.compiler.synchronise import synchronise
from moeware.compiler.tile import Plan, chain
from moeware.hw.arch.isa import Engine, Memory, NormMode, Opcode, Target
from moeware.sim.golden import GoldenDevice

from ..hw.arch.configs import config
from ..runtime.reference import Graph, evaluate
from .lowering import lower, program, transformer

ROWS = dict(tokens=95, depth=8, width=8, heads=3, hidden=16, experts=4, chosen=2)
LARGE = dict(activation_words=4096, residual_words=16384, max_rows=200)
CONFIG = config(2, 4, 8, 2, 2, 8, **LARGE)


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of rows however little their products take."""
    monkeypatch.setattr(chain, "LEAST_CYCLES", 1)


def routed(seed: int, *, causal: bool) -> Graph:
    """Attention whose projection is followed by experts, not by a feed-forward network."""
    graph = Graph(seed)
    x = graph.add_linear(graph.input(96, 8), graph.constant(96, 24), 24)
    y = graph.norm(x)
    q, k, v = (graph.linear(y, 24) for _ in range(3))
    x = graph.add_linear(graph.attention(q, k, v, 3, 3, causal=causal), x, 24)
    y = graph.norm(x)
    x = graph.experts(y, x, graph.route(y, 4, 2), 4, 16)
    graph.add_linear(graph.norm(x, NormMode.SCALE, rows=1), None, 5)
    return graph


def layers(lowered: Lowered, opcode: Opcode) -> list[str]:
    """Layers of an engine's instructions in their order, each run of one layer once."""
    names = [instr.layer for instr in lowered.instructions if instr.opcode is opcode]
    return [name for name, _ in itertools.groupby(names)]


def operations(graph, *kinds: str) -> list[str]:
    return [op.name for op in graph.operations if type(op).__name__ in kinds]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("model", [lambda **more: transformer(3, **ROWS, **more),
                                   lambda **more: routed(3, **more)], ids=["dense", "routed"])
def test_blocks_of_rows_give_the_same(short_blocks, model, frames, causal, queries):
    graph = model(causal=causal)
    compiled = program(graph, config(2, 4, 8, queries, 2, 8, **LARGE), frames=frames)
    inputs = graph.integers(3)
    found = GoldenDevice().run(compiled, compiled.steps[0], inputs, probes=True)
    expected = evaluate(graph.operations, inputs)
    assert {op.output for op in graph.operations} - set(found) == {
        op.output for op in graph.operations if type(op).__name__ == "Route"}
    for tensor, values in found.items():
        np.testing.assert_array_equal(values, expected[tensor], err_msg=tensor)


def test_a_network_has_the_next_projection_in_its_middle(short_blocks):
    graph = transformer(3, **ROWS)
    lowered = lower(graph, CONFIG, trace=False)
    project, down = operations(graph, "AddLinear")[1:3]
    up = next(op.name for op in graph.operations if op.output == next(
        o.source for o in graph.operations if o.name == down))
    found = layers(lowered, Opcode.LINEAR)
    first = found.index(project)
    assert found[first:first + 9] == [project, up, project, down, up, project, down, up, down]


def test_the_last_rows_are_attended_beside_the_first_projection(short_blocks):
    graph = transformer(3, **ROWS)
    lowered = lower(graph, CONFIG, trace=False)
    attention, project = operations(graph, "Attention")[0], operations(graph, "AddLinear")[1]
    order = [instr.layer for instr in lowered.instructions]
    assert order.index(project) < len(order) - 1 - order[::-1].index(attention)


@pytest.mark.parametrize("queries, rows", [(1, 32), (64, 96)])
def test_slow_attention_has_the_first_rows_pass_all_heads_first(short_blocks, queries, rows):
    """Rows of the first head that are attended before another head is."""
    lowered = lower(transformer(3, **ROWS), config(2, 4, 8, queries, 2, 8, **LARGE), trace=False)
    attended = [instr.fields for instr in lowered.instructions if instr.opcode is Opcode.ATTENTION]
    key = attended[0]["key"].buffer
    first = itertools.takewhile(lambda fields: fields["key"].buffer is key, attended)
    assert sum(fields["rows"] for fields in first) == rows


@pytest.mark.parametrize("together, turns", [
    (1, [0, 1, 2, 3]), (2, [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3])])
def test_experts_take_turns(together, turns):
    small = config(2, 4, 8, 2, 2, 8, **LARGE | {"weight_words": 24})
    lowered = lower(transformer(3, **ROWS), small, trace=False, plans=[Plan(experts=together)])
    names = [name.rpartition("/expert") for name in layers(lowered, Opcode.LINEAR)]
    assert [int(number) for _, _, number in names if number.isdigit()] == turns


def test_weights_with_room_load_before_the_router_has_decided():
    graph = transformer(3, **ROWS)
    lowered = lower(graph, config(2, 4, 8, 2, 2, 8, **LARGE | {"weight_words": 64}), trace=False)
    router = next(n for n, instr in enumerate(lowered.instructions) if instr.queue_write)
    loads = [(n < router, bool(instr.fields.get("conditional")))
             for n, instr in enumerate(lowered.instructions)
             if instr.opcode is Opcode.LOAD and "/expert" in instr.layer[1:]]
    assert set(loads) == {(True, False), (False, True)}


def product(source: Buffer, target: Buffer, rows: int) -> Instr:
    return Instr(Opcode.LINEAR, dict(rows=rows, channels=8, source_words=1, narrow=0,
                                     target=Target.ACTIVATION), "linear", [source[0]], [target[0]])


def attention(source: Buffer, target: Buffer) -> Instr:
    return Instr(Opcode.ATTENTION, dict(rows=64, keys=64, words=1), "attention", [source[0]],
                 [target[0]])


def buffers(words: int, count: int, **fields) -> list[Buffer]:
    return [Buffer(f"b{n}", Memory.ACTIVATION, words, **fields) for n in range(count)]


def test_least_times_wait_for_the_engine_and_for_what_is_read():
    a, b, c, d = buffers(64, 4)
    lowered = Lowered([product(a, b, 64), product(a, c, 64), attention(b, d), product(d, a, 2)],
                      [], [], [], [], 0)
    each, attended = 64 // 2 * 2, 64 // 2 * 64
    assert least_times(lowered, CONFIG) == [
        (0, each), (each, 2 * each), (each, each + attended),
        (each + attended, each + attended + 2)]


def test_words_that_another_engine_still_reads_are_given_away_last():
    a, b, c, d = buffers(64, 4, bank=1)
    instructions = [product(a, b, 64), attention(b, c), product(a, d, 64), attention(d, c)]
    lowered = Lowered(instructions, [], [], [], [], 0)
    allocate(lowered, config(2, 4, 8, 2, 2, 8, activation_banks=2, activation_words=128))
    assert d.address != b.address
    tight = Lowered(instructions, [], [], [], [], 0)
    allocate(tight, config(2, 4, 8, 2, 2, 8, activation_banks=2, activation_words=96))
    assert d.address == b.address


def test_products_of_experts_wait_for_the_router_of_their_own_engine():
    """Their weights may be there before it has decided, and then nothing else keeps them."""
    graph = transformer(3, **ROWS)
    lowered = lower(graph, CONFIG, trace=False)
    router, first = (next(n for n, instr in enumerate(lowered.instructions) if which(instr))
                     for which in (lambda i: i.queue_write, lambda i: i.fields.get("conditional")
                                   and i.opcode is Opcode.LINEAR))
    last = max(n for n in range(router, first) if lowered.instructions[n].queue_write)
    masks = synchronise(lowered, CONFIG)
    assert masks[last][1] >> Engine.LINEAR & 1
    assert masks[first][0] >> Engine.LINEAR & 1
