import dataclasses
import itertools
import math
import random

import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeware.hw.ports import MemoryPort
from moeware.hw.sdram import SDRAMController
from moeware.hw.sdram_admission import QUEUE_WORDS
from moeware.hw.sdram_chunks import CHUNK_WORDS, Chunker
from moeware.hw.sdram_pins import INPUT_CYCLES, OUTPUT_CYCLES, SDRAMPinRegisters, SDRAMPins
from moeware.hw.sdram_timing import SDRAMTiming
from moeware.sim.sdram_model import SDRAMChip, SDRAMViolation

from .background import simulate_beside
from .simulate import simulate
from .streams import get_all, put_all

QUICK = SDRAMTiming(power_up_ns=500)
# System clock, capture_cycles, rate. With rate 2, CAS latency and capture_cycles add up to odd and
# even numbers of chip clocks, with CAS latencies of 2 and 3.
CLOCKS = [(50e6, 1, 1), (100e6, 2, 1), (133e6, 2, 1),
          (40e6, 1, 2), (50e6, 2, 2), (60e6, 1, 2), (66.5e6, 2, 2)]
GEARED = [clock for clock in CLOCKS if clock[2] == 2]  # READ in the first and second slot by turns
PIN_NAMES = ("clock_enable", "cs", "ras", "cas", "we", "bank", "address", "dqm", "dq_o", "dq_oe")


class AtPads(wiring.Component):
    """The controller and its IO registers."""

    def __init__(self, bus_bytes, clock_hz, timing, capture_cycles, rate):
        self.controller = SDRAMController(bus_bytes, clock_hz, timing, capture_cycles, rate)
        self.rate = rate
        super().__init__({"memory": In(MemoryPort(bus_bytes)),
                          "pads": Out(SDRAMPins(timing, rate))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.controller = self.controller
        m.submodules.registers = registers = SDRAMPinRegisters(rate=self.rate)
        wiring.connect(m, self.controller.pins, registers.core)
        wiring.connect(m, wiring.flipped(self.memory), self.controller.memory)
        wiring.connect(m, registers.pads, wiring.flipped(self.pads))
        return m


class Bench:
    """A controller with a chip; `run` takes the benches that use `memory`."""

    def __init__(self, bus_bytes=8, clock_hz=100e6, capture_cycles=1, rate=1, *, timing=QUICK,
                 promised=QUICK):
        self.dut = AtPads(bus_bytes, clock_hz, promised, capture_cycles, rate)
        self.memory = self.dut.memory
        self.chip = SDRAMChip(timing, clock_hz * rate, capture_cycles)
        self.bus_bytes, self.rate = bus_bytes, rate

    async def run_chip(self, ctx):
        pads = self.dut.pads
        while True:
            _, _, *values = await ctx.tick().sample(*(getattr(pads, name) for name in PIN_NAMES))
            pins = dict(zip(PIN_NAMES, values, strict=True))
            words = [self.chip.step(pins | {"cs": pins["cs"] >> slot & 1,
                                            "dq_o": pins["dq_o"] >> 16 * slot & 0xFFFF})
                     for slot in range(self.rate)]
            ctx.set(pads.dq_i, sum(word << 16 * slot for slot, word in enumerate(words)))

    def run(self, *benches, deadline=10_000):
        """Run every bench to completion, with the chip at the pads."""
        simulate_beside(self.dut, benches, [self.run_chip], deadline)

    def words(self, content):
        return [int.from_bytes(content[i:i + self.bus_bytes], "little")
                for i in range(0, len(content), self.bus_bytes)]

    async def write(self, ctx, bursts, contents, pauses=()):
        """Send write data; the commands go first."""
        for (address, beats), content in zip(bursts, contents, strict=True):
            await put_all(ctx, self.memory.write_command, [{"address": address, "beats": beats}])
            await put_all(ctx, self.memory.write_data, self.words(content), pauses)


def draw_bursts(draw, count, bus_bytes, size=1 << 25):
    """Bursts of all lengths that touch few rows, so that rows and banks conflict."""
    bursts = []
    for _ in range(count):
        page = draw.choice([0, 4096, 3 * 4096, size - 4096])
        first = draw.randrange(4096 // bus_bytes)
        beats = min(draw.choice([1, 2, 5, 17, 40]), 4096 // bus_bytes - first)
        bursts.append((page + first * bus_bytes, beats))
    return bursts


def content_of(draw, bursts, bus_bytes):
    return [draw.randbytes(beats * bus_bytes) for _, beats in bursts]


@pytest.mark.parametrize("clock_hz, capture_cycles, rate", CLOCKS)
@pytest.mark.parametrize("columns", [1, 4, 16])
def test_what_was_written_is_read(columns, clock_hz, capture_cycles, rate):
    """Bus words from one cycle to several bursts."""
    bus_bytes = 2 * max(columns, rate)
    bench = Bench(bus_bytes, clock_hz, capture_cycles, rate)
    draw = random.Random(bus_bytes)
    bursts = draw_bursts(draw, 12, bus_bytes)
    contents = content_of(draw, bursts, bus_bytes)
    expected = bytearray(1 << 25)
    for (address, _), content in zip(bursts, contents, strict=True):
        expected[address:address + len(content)] = content

    async def user(ctx):
        await bench.write(ctx, bursts, contents)
        for _ in range(400):
            await ctx.tick()
        for address, beats in bursts:
            await put_all(ctx, bench.memory.read_command, [{"address": address, "beats": beats}])
            assert await get_all(ctx, bench.memory.read_data, beats) == bench.words(
                expected[address:address + beats * bus_bytes])

    bench.run(user)
    for address, beats in bursts:
        assert bench.chip.dump(address, beats * bus_bytes) == expected[
            address:address + beats * bus_bytes]


@pytest.mark.parametrize("idle", [(), (1, 0, 0, 1, 1, 1, 0), (1,) * 9 + (0,)])
@pytest.mark.parametrize("refuse", [(), (1, 1, 0), (1,) * 400 + (0,) * 100])
@pytest.mark.parametrize("clock_hz, capture_cycles, rate", [(100e6, 1, 1), *GEARED[-2:]])
def test_reads_beside_writes(idle, refuse, clock_hz, capture_cycles, rate):
    bench = Bench(8, clock_hz, capture_cycles, rate)
    draw = random.Random(7)
    reads = draw_bursts(draw, 25, 8)
    writes = [(1 << 20 | address & 0xFFFF, beats) for address, beats in draw_bursts(draw, 25, 8)]
    contents = content_of(draw, writes, 8)
    image = draw.randbytes(4096)
    for address, _ in reads:
        bench.chip.load(address & ~4095, image)
    pulses = 0

    async def commands(ctx):
        await put_all(ctx, bench.memory.read_command,
                      [{"address": a, "beats": b} for a, b in reads])

    async def reader(ctx):
        expected = [word for a, b in reads for word in bench.words(image[a & 4095:][:8 * b])]
        assert await get_all(ctx, bench.memory.read_data, len(expected),
                             itertools.cycle(refuse)) == expected

    async def writer(ctx):
        await bench.write(ctx, writes, contents, itertools.cycle(idle))

    async def count_pulses(ctx):
        nonlocal pulses
        while pulses < len(writes):
            await ctx.tick().until(bench.memory.written)
            pulses += 1
        for _ in range(100):
            _, _, written = await ctx.tick().sample(bench.memory.written)
            assert not written

    bench.run(commands, reader, writer, count_pulses, deadline=20_000)
    expected = bytearray(1 << 25)
    for (address, _), content in zip(writes, contents, strict=True):
        expected[address:address + len(content)] = content
    for address, beats in writes:
        assert bench.chip.dump(address, 8 * beats) == expected[address:address + 8 * beats]


def test_closed_banks_are_opened_one_behind_the_other():
    bench = Bench()
    rows = [0, 1024, 2048, 3072]
    for row in rows:
        bench.chip.load(row, row.to_bytes(8, "little"))

    async def ask(ctx):
        await put_all(ctx, bench.memory.read_command, [{"address": a, "beats": 1} for a in rows])

    async def read(ctx):
        assert await get_all(ctx, bench.memory.read_data, len(rows)) == rows

    bench.run(ask, read)


def test_written_data_can_be_read_back_at_once():
    bench = Bench()

    async def user(ctx):
        for turn, address in enumerate([0, 8, 4096 * 4, 0]):
            await put_all(ctx, bench.memory.write_command, [{"address": address, "beats": 1}])
            await put_all(ctx, bench.memory.write_data, [turn + 1])
            await ctx.tick().until(bench.memory.written)
            await put_all(ctx, bench.memory.read_command, [{"address": address, "beats": 1}])
            assert await get_all(ctx, bench.memory.read_data, 1) == [turn + 1]

    bench.run(user)


def test_a_write_without_data_blocks_no_read_and_the_reverse():
    bench = Bench()

    async def user(ctx):
        await put_all(ctx, bench.memory.write_command, [{"address": 0, "beats": 2}])
        await put_all(ctx, bench.memory.write_data, [11])
        for _ in range(3):
            await put_all(ctx, bench.memory.read_command, [{"address": 4096, "beats": 512}])
            await get_all(ctx, bench.memory.read_data, 512)
        await put_all(ctx, bench.memory.read_command, [{"address": 4096, "beats": 512}])
        await put_all(ctx, bench.memory.write_data, [12])
        await ctx.tick().until(bench.memory.written)
        assert len(await get_all(ctx, bench.memory.read_data, 512)) == 512

    bench.run(user)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("clock_hz, capture_cycles, rate", [(100e6, 2, 1), *GEARED])
@pytest.mark.parametrize("bus_bytes", [8, 16])
def test_long_bursts_use_the_bus_fully(bus_bytes, write, clock_hz, capture_cycles, rate):
    """16 bits a chip clock less refresh, over rows and 4,096-byte pages."""
    bench = Bench(bus_bytes, clock_hz, capture_cycles, rate)
    pages, beats = 6, 4096 // bus_bytes
    command = bench.memory.write_command if write else bench.memory.read_command
    spent = 0

    async def commands(ctx):
        await put_all(ctx, command, [{"address": 4096 * p, "beats": beats} for p in range(pages)])

    async def words(ctx):
        nonlocal spent
        if write:
            await put_all(ctx, bench.memory.write_data, range(QUEUE_WORDS + CHUNK_WORDS))
        else:
            await get_all(ctx, bench.memory.read_data, 1)
        for spent in range(100_000):
            data = bench.memory.write_data if write else bench.memory.read_data
            if write:
                ctx.set(data.valid, 1)
            else:
                ctx.set(data.ready, 1)
            _, _, valid, ready = await ctx.tick().sample(data.valid, data.ready)
            moved = valid and ready
            words.left -= moved
            if not words.left:
                break

    words.left = pages * beats - (QUEUE_WORDS + CHUNK_WORDS if write else 1)
    moved_words = words.left
    bench.run(commands, words, deadline=30_000)
    share = moved_words * bus_bytes / 2 / (spent * rate)
    assert 0.96 < share <= 1.0, f"{share:.1%} of 16 bits a chip clock"


@pytest.mark.parametrize("clock_hz, capture_cycles, rate", CLOCKS)
def test_latency_in_an_open_row(clock_hz, capture_cycles, rate):
    bench = Bench(8, clock_hz, capture_cycles, rate)
    cas = QUICK.cycles(clock_hz * rate).cas
    chip_clocks = cas + capture_cycles - 1 + 8 // 2

    async def user(ctx):
        latencies = set()
        for _ in range(3):
            await put_all(ctx, bench.memory.read_command, [{"address": 0, "beats": 1}])
            ctx.set(bench.memory.read_data.ready, 1)
            latency = 0
            while not ctx.get(bench.memory.read_data.valid):
                await ctx.tick()
                latency += 1
            await ctx.tick()
            latencies.add(latency)
        assert min(latencies) == (bench.dut.controller.LATENCY + OUTPUT_CYCLES[rate]
                                  + INPUT_CYCLES[rate] + math.ceil(chip_clocks / rate))

    bench.run(user)


def test_refreshes_come_while_idle_and_while_busy():
    bench = Bench(clock_hz=50e6, timing=QUICK)

    async def user(ctx):
        for _ in range(3000):
            await ctx.tick()
        await put_all(ctx, bench.memory.read_command, [{"address": 0, "beats": 512}])
        await get_all(ctx, bench.memory.read_data, 512)

    bench.run(user)
    since = bench.chip.cycle * bench.chip.period - bench.chip.counted_from
    assert bench.chip.refreshes >= int(since / QUICK.refresh_interval_ns) - 1


@pytest.mark.parametrize("field, slower", [
    ("rcd_ns", 45), ("rp_ns", 30), ("ras_ns", 150), ("rc_ns", 180), ("rfc_ns", 90),
    ("rrd_ns", 150), ("wr_ns", 80), ("power_up_ns", 1000), ("refresh_ns", 4e6), ("cas2_ns", 15)])
@pytest.mark.parametrize("clock_hz, capture_cycles, rate", [(100e6, 1, 1), (50e6, 2, 2)])
def test_the_chip_notices_a_controller_that_promises_too_much(field, slower, clock_hz,
                                                              capture_cycles, rate):
    # What the controller decides takes as many cycles with either clock, so twice the time.
    bench = Bench(8, clock_hz, capture_cycles, rate, promised=QUICK,
                  timing=dataclasses.replace(QUICK, **{field: slower * rate}))

    async def user(ctx):
        for address in (0, 4096, 1024, 5120):
            await bench.write(ctx, [(address, 1)], [bytes(8)])
            await ctx.tick().until(bench.memory.written)
        await put_all(ctx, bench.memory.read_command, [{"address": 0, "beats": 512}])
        await get_all(ctx, bench.memory.read_data, 512)
        for _ in range(1000):
            await ctx.tick()

    with pytest.raises(SDRAMViolation):
        bench.run(user)


def test_chunker():
    dut = Chunker(8)
    bursts = [(0, 1), (8 * 15, 3), (4096, 512), (4096 + 8 * 7, 9), (2**32 - 8, 1)]
    expected = []
    for address, beats in bursts:
        words = range(address // 8, address // 8 + beats)
        groups = [list(g) for _, g in itertools.groupby(words, lambda w: w // CHUNK_WORDS)]
        expected += [(g[0], len(g), g is groups[-1]) for g in groups]

    async def send(ctx):
        await put_all(ctx, dut.burst, [{"address": a, "beats": b} for a, b in bursts])

    async def receive(ctx):
        ctx.set(dut.chunk.ready, 1)
        got, cycles = [], 0
        while len(got) < len(expected):
            _, _, valid, p = await ctx.tick().sample(dut.chunk.valid, dut.chunk.payload)
            cycles += bool(got) or bool(valid)
            if valid:
                got.append((p.word, p.words, bool(p.last)))
        assert got == expected
        assert cycles == len(expected)

    simulate(dut, send, receive)


@pytest.mark.parametrize("arguments, words", [
    ((12, 100e6), "Bus width must be"), ((8, 200e6), "SDRAM clock must be"),
    ((8, 100e6, QUICK, 3), "Capture cycles must be"),
    ((8, 50e6, QUICK, 1, 3), "SDRAM rate must be"),
    ((8, 100e6, QUICK, 1, 2), "SDRAM clock must be between 20 MHz and 133 MHz, not 200 MHz"),
    ((2, 50e6, QUICK, 1, 2), "Bus width must be at least 4 bytes with SDRAM rate 2.*not 2")])
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        SDRAMController(*arguments)
