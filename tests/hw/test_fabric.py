# amaranth: UnusedElaboratable=no
"""Products out of look-up tables: every operand of the widths in use, and the cells of ECP5."""

import itertools
import random
import subprocess

import pytest
from amaranth import signed, unsigned
from amaranth.back import rtlil

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config
from moeware.hw.fabric import RowPair
from moeware.hw.multiply import Multipliers
from moeware.sim.verilog import find_yosys

from .simulate import simulate


class Ecp5:
    device = "LFE5U-85F"


def values(shape):
    return range(-(1 << shape.width - 1), 1 << shape.width - 1) if shape.signed else range(
        1 << shape.width)


def check(dut, pairs):
    """Products of all pairs, `dut.count` a cycle."""
    rows = [pairs[i:i + dut.count] for i in range(0, len(pairs), dut.count)]

    async def bench(ctx):
        ctx.set(dut.advance, 1)
        for i in range(len(rows) + dut.LATENCY):
            if i >= dut.LATENCY:
                expected = [a * b for a, b in rows[i - dut.LATENCY]]
                assert list(ctx.get(dut.product))[:len(expected)] == expected
            row = rows[min(i, len(rows) - 1)]
            ctx.set(dut.a, [a for a, _ in row] + [0] * (dut.count - len(row)))
            ctx.set(dut.b, [b for _, b in row] + [0] * (dut.count - len(row)))
            await ctx.tick()

    simulate(dut, bench, deadline=100_000)


@pytest.mark.parametrize(("a", "b"), [
    (signed(8), signed(8)), (unsigned(10), signed(8)), (signed(4), unsigned(5)),
    (unsigned(3), unsigned(1)), (signed(1), signed(3)), (signed(5), signed(7))])
def test_every_product(a, b):
    check(Multipliers(a, b, 64, primitive="fabric"), list(itertools.product(values(a), values(b))))


@pytest.mark.parametrize(("a", "b"), [
    (signed(18), unsigned(16)), (unsigned(16), unsigned(16)), (signed(18), signed(18))])
def test_wide_products(a, b):
    draw = random.Random(3)
    limits = [(v[0], v[1], v[-1], v[len(v) // 2]) for v in (values(a), values(b))]
    pairs = list(itertools.product(*limits))
    pairs += [(draw.choice(values(a)), draw.choice(values(b))) for _ in range(400)]
    check(Multipliers(a, b, 4, primitive="fabric"), pairs)


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("a", [signed(8), unsigned(10), signed(3), unsigned(1)])
def test_carry_cells_equal_their_description(tmp_path, a, subtract):
    """Yosys proves it for every operand, with its own model of the CCU2C."""
    for name, chain in (("gold", False), ("gate", True)):
        (tmp_path / name).write_text(rtlil.convert(RowPair(a, subtract=subtract, chain=chain),
                                                   name=name))
    script = ("read_verilog -overwrite +/ecp5/cells_sim.v; read_rtlil -overwrite gate; "
              "hierarchy -top gate; proc; flatten; read_rtlil gold; proc; "
              "miter -equiv -flatten gold gate miter; sat -verify -prove trigger 0 miter")
    subprocess.run([find_yosys(), "-q", "-p", script], cwd=tmp_path, check=True, capture_output=True)


def test_ecp5_gets_carry_cells_and_no_multiplier():
    dut = Multipliers(signed(8), signed(8), primitive="fabric")
    text = rtlil.convert(dut, platform=Ecp5())
    assert "MULT18X18D" not in text and "$mul" not in text
    assert text.count("cell \\CCU2C ") == 4 * 5
    assert "CCU2C" not in rtlil.convert(dut)


def test_accelerator_with_attention_of_fabric():
    config = Config(tokens=1, outputs=2, depth=2, queries=1, lanes=1, bus_bytes=2,
                    activation_banks=1, activation_words=16, residual_words=16, weight_words=16,
                    param_words=16, tables=1, row_words=4, max_rows=4, max_experts=2, max_chosen=1, queue=2)
    blocks = [rtlil.convert(Accelerator(config, fabric=fabric), platform=Ecp5()).count(
        "cell \\MULT18X18D ") for fabric in ((), ("attention",))]
    scaling = 2 + 1 + 2  # of differences, of rows, of sums
    assert blocks[0] - blocks[1] == config.attention_macs + scaling
    with pytest.raises(ValueError, match="must name units of .* not .'dma'."):
        Accelerator(config, fabric=["dma"])
