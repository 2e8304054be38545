"""The bounds that benchmarks hold measured cycles against."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeware.compiler.lowered import Instr
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, Opcode

from .compiler.lowering import lower, transformer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from efficiency import Block, blocks, latency_efficiency, throughput_efficiency

CONFIG = Config(tokens=2, outputs=4, depth=4, queries=2, lanes=2, bus_bytes=8, activation_banks=2,
                activation_words=512, residual_words=1024, weight_words=64, param_words=64, tables=2,
                row_words=16, max_rows=16, max_experts=4, max_chosen=2, queue=4)


@pytest.fixture
def lowered():
    graph = transformer(0, tokens=6, depth=8, width=4, heads=2, hidden=12, experts=4, chosen=2)
    return graph, lower(graph, CONFIG, trace=False)


def chosen(*counts: int) -> np.ndarray:
    """Experts of 7 rows, 2 to each, so that expert e gets counts[e] of them."""
    return np.repeat(np.arange(len(counts)), counts).reshape(-1, 2)


EVERY, FEWER = chosen(2, 4, 7, 1), chosen(5, 8, 0, 1)


def work(lowered, chosen=EVERY, **options) -> list[Block]:
    graph, code = lowered
    route = next(op.output for op in code.operations if type(op).__name__ == "Route")
    return blocks(code.operations, options.pop("instructions", code.instructions),
                  {name: graph.shapes[name] for name in graph.sources}, {route: chosen},
                  CONFIG, **options)


def test_blocks_are_the_halves_of_layers_and_have_all_products(lowered):
    found = work(lowered)
    assert [block.name for block in found] == [
        "embedding", "layer 0, attention", "layer 0, feed-forward", "layer 0, experts", "head", "head"]
    assert sum(block.linear_macs + block.attention_macs for block in found) == lowered[1].macs
    tokens, size = 7, 8
    assert found[1].attention_macs == 2 * tokens * tokens * size
    assert found[1].linear_macs == 4 * tokens * size * size


def test_products_of_experts_are_counted_as_routed(lowered):
    gate = 7 * 8 * 4
    assert work(lowered)[3].linear_macs == work(lowered, FEWER)[3].linear_macs == (
        gate + 14 * 2 * 8 * 12)


def test_experts_without_tokens_cross_no_bus(lowered):
    every, fewer = work(lowered), work(lowered, FEWER)
    assert every[3].bytes > fewer[3].bytes
    assert sum(block.bytes for block in every) - sum(block.bytes for block in fewer) == (
        every[3].bytes - fewer[3].bytes)


def test_constants_that_cross_again_do_not_raise_the_bound(lowered):
    graph = lowered[0]
    again = graph, lower(graph, CONFIG, trace=False, frames=2)
    one, two = work(lowered)[1], work(again, np.concatenate([EVERY, EVERY]), frames=2)[1]
    assert one.bytes_spare == 0 < two.bytes_spare  # heads of the second frame
    assert two.bytes - two.bytes_spare == one.bytes
    assert two.cycles(CONFIG, 1)["bus"] == one.cycles(CONFIG, 1)["bus"]


def test_queues_hold_the_rows_since_they_were_emptied(lowered):
    # Routed in two parts, the second of which empties the queues: experts 2 and 3 then have rows,
    # and loads of 0 and 1 are left out that stand behind.
    instructions = []
    for i in lowered[1].instructions:
        if i.queue_write:
            for rows in (3, 4):
                part = Instr(i.opcode, i.fields | {"rows": rows, "append": 0}, i.layer,
                             queue_write=True)
                instructions.append(part)
        else:
            instructions.append(i)
    halves = work(lowered, instructions=instructions)
    kept = {i.fields["expert"] for i in lowered[1].instructions if i.opcode is Opcode.LOAD
            and i.fields.get("conditional") and i.fields["expert"] > 1}
    assert kept == {2, 3} and halves[3].bytes == work(lowered, chosen(0, 0, 7, 7))[3].bytes


def test_narrow_products_take_half_the_time(lowered):
    plain = work(lowered)
    instructions = [Instr(i.opcode, i.fields | {"narrow": 1}, i.layer, i.reads, i.writes)
                    if i.opcode is Opcode.LINEAR and "expert" in i.fields else i
                    for i in lowered[1].instructions]
    narrow = work(lowered, instructions=instructions)
    assert narrow[3].narrow_macs == 14 * 2 * 8 * 12 and not plain[3].narrow_macs
    saved = (plain[3].cycles(CONFIG, 1)["linear"] - narrow[3].cycles(CONFIG, 1)["linear"])
    assert saved == narrow[3].narrow_macs / 2 / CONFIG.linear_macs


def test_packed_weights_cross_the_bus_as_fewer_bytes(lowered):
    """A weight word takes two bus words, packed one."""
    graph = transformer(0, tokens=6, depth=8, width=4, heads=2, hidden=12, experts=4, chosen=2, bits=4)
    packed = work((graph, lower(graph, CONFIG, trace=False)))
    weights = [i for i in lowered[1].instructions if i.opcode is Opcode.LOAD
               and i.fields["memory"] == Memory.WEIGHT and "/expert" in i.layer[1:]]
    bus_words = [2 * i.fields["words"] for i in weights]
    assert work(lowered)[3].bytes - packed[3].bytes == 8 * sum(
        words - -(-words // 2) for words in bus_words) == 4 * sum(bus_words)
    assert not packed[3].narrow_macs


def test_products_grow_with_frames_in_flight(lowered):
    one, two = work(lowered), work(lowered, np.concatenate([EVERY, EVERY]), frames=2)
    for a, b in zip(one, two):
        assert (b.linear_macs, b.attention_macs) == (2 * a.linear_macs, 2 * a.attention_macs)


def test_an_instruction_must_belong_to_an_operation(lowered):
    stray = Instr(Opcode.NORM, {}, "elsewhere")
    with pytest.raises(ValueError, match="'elsewhere' must belong"):
        work(lowered, instructions=[*lowered[1].instructions, stray])


def test_efficiencies():
    # 32 and 16 products a cycle, 2 bytes a cycle: 10, 5, 20 cycles and 30, 40, 0 cycles.
    found = [Block("a", linear_macs=320, attention_macs=80, bytes=40),
             Block("b", linear_macs=960, attention_macs=640)]
    assert latency_efficiency(found, CONFIG, 2, 100) == pytest.approx((20 + 40) / 100)
    assert throughput_efficiency(found, CONFIG, 2, 100) == pytest.approx((5 + 40) / 100)


@pytest.mark.parametrize("script", ["m3vit.py", "m3vit_accuracy.py"])
def test_missing_data_are_told_in_one_line(script, tmp_path):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--data", tmp_path / "none.npz"],
                          capture_output=True, text=True)
    assert done.returncode and not done.stdout
    assert done.stderr.count("\n") == 1 and "none.npz" in done.stderr and "--data" in done.stderr
