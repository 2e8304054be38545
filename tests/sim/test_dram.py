import ctypes
import dataclasses
import subprocess
from pathlib import Path

import pytest

from moeware.sim import dram
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT, DramCycles, DramTiming

READ, WRITE = 0, 1
PLAIN = DramTiming(bytes_per_second=1e9, read_latency_ns=70, write_latency_ns=40)
CLOCK_HZ, BUS = 100e6, 8


class Request(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("writes", "address", "beats", "start")]


class Times(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("command", "first", "last")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs requests (READ or WRITE, address, beats[, start]); returns cycles, `Times`, bytes."""
    library = tmp_path_factory.mktemp("dram") / "bench.so"
    source = Path(__file__).with_name("dram_bench.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-I",
                    Path(dram.__file__).parent, source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_uint32
    function.argtypes = (ctypes.POINTER(DramCycles), ctypes.c_char_p, ctypes.c_uint64,
                         ctypes.c_uint32, ctypes.POINTER(Request), ctypes.POINTER(Times),
                         ctypes.c_uint32)

    def call(timing, *requests, bus_bytes=BUS, clock_hz=CLOCK_HZ, size=1 << 20):
        memory = ctypes.create_string_buffer(size)
        times = (Times * len(requests))()
        cycles = function(timing.cycles(bus_bytes, clock_hz), memory, size, len(requests),
                          (Request * len(requests))(*requests), times, 1_000_000)
        assert cycles, "the requests did not complete"
        return cycles, times, memory.raw

    return call


def stream(count, direction=READ, bus_bytes=BUS, step=4096):
    """Bursts of a page each, one after another."""
    return [(direction, step * i, 4096 // bus_bytes) for i in range(count)]


def test_one_word_comes_after_the_latency(run):
    _, (first, second), _ = run(PLAIN, (READ, 0, 1), (READ, 8, 1, 50))
    assert first.first - first.command == second.first - second.command == 1 + 7


def test_a_write_is_reported_after_its_latency_and_can_be_read(run):
    _, (write, _), memory = run(PLAIN, (WRITE, 64, 3), (READ, 64, 3, 40))
    assert write.last - write.first == 3 + 4  # a word a cycle, then the latency
    assert memory[64:88] == bytes([0] * 8 + [1] * 8 + [2] * 8)


def test_words_of_a_burst_follow_each_other_every_cycle(run):
    _, (burst, ), _ = run(PLAIN, (READ, 0, 512))
    assert burst.last - burst.first == 511


@pytest.mark.parametrize("direction", [READ, WRITE])
@pytest.mark.parametrize(("timing", "clock_hz", "bus_bytes"), [
    (SDRAM_16BIT, 100e6, 16), (SDRAM_16BIT, 80e6, 4), (DDR, 200e6, 64), (DDR, 300e6, 64)])
def test_long_bursts_reach_the_peak_less_refresh(run, timing, clock_hz, bus_bytes, direction):
    count = 256
    cycles, _, _ = run(timing, *stream(count, direction, bus_bytes), clock_hz=clock_hz,
                       bus_bytes=bus_bytes)
    share = count * 4096 / cycles / timing.bytes_per_cycle(bus_bytes, clock_hz)
    refreshing = (timing.refresh_ns + timing.precharge_ns + timing.activate_ns
                  ) / timing.refresh_interval_ns
    assert 1 - refreshing - 0.025 < share < 1 - refreshing + 0.01


@pytest.mark.parametrize("bytes_per_second", [266e6, 500e6, 799e6])
def test_a_rate_below_the_bus_holds_on_average(run, bytes_per_second):
    timing = dataclasses.replace(PLAIN, bytes_per_second=bytes_per_second)
    _, times, _ = run(timing, *stream(16))
    rate = 16 * 4096 / (times[-1].last - times[0].first)
    assert rate == pytest.approx(bytes_per_second / CLOCK_HZ, rel=0.01)


def test_a_fast_memory_gives_one_bus_word_per_cycle(run):
    for timing in (IDEAL, dataclasses.replace(PLAIN, bytes_per_second=64e9)):
        _, times, _ = run(timing, *stream(4))
        assert times[-1].last - times[0].first == 4 * 512 - 1


ROWS = dataclasses.replace(PLAIN, activate_ns=30, precharge_ns=50, banks=4, row_bytes=1024)


def test_a_miss_costs_what_opens_the_row(run):
    _, (closed, hit, miss), _ = run(ROWS, (READ, 0, 1), (READ, 64, 1, 40), (READ, 4096, 1, 80))
    base = 1 + 7
    assert closed.first - closed.command == base + 3  # activate
    assert hit.first - hit.command == base
    assert miss.first - miss.command == base + 3 + 5  # precharge, then activate


def test_rows_of_other_banks_open_while_one_transfers(run):
    _, times, _ = run(ROWS, *stream(8))  # a page is a row of each bank
    assert times[-1].last - times[0].first == 8 * 512 - 1
    same_bank = [(READ, 4096 * i, 16) for i in range(8)]
    _, times, _ = run(ROWS, *same_bank)
    assert times[-1].last - times[0].first == 8 * 16 - 1 + 7 * 8


def test_refresh_stops_everything_and_closes_rows(run):
    timing = dataclasses.replace(ROWS, refresh_interval_ns=1000, refresh_ns=200)
    quiet, _, _ = run(ROWS, *stream(8))
    cycles, _, _ = run(timing, *stream(8))
    each = 20 + 5 + 3  # tRFC, precharge of open rows, activate again
    refreshes = cycles // 100
    assert cycles - quiet == pytest.approx(refreshes * each, abs=each)


def test_a_change_of_direction_costs_a_turnaround(run):
    timing = dataclasses.replace(PLAIN, turnaround_ns=100)
    _, (_, write), _ = run(timing, (READ, 0, 1), (WRITE, 64, 1, 40))
    _, (_, plain), _ = run(PLAIN, (READ, 0, 1), (WRITE, 64, 1, 40))
    assert (write.last - write.command) - (plain.last - plain.command) == 10
    mixed = [(i % 2, 4096 * i, 512) for i in range(16)]
    cycles, _, _ = run(timing, *mixed)
    # Both directions get their turns, and none for less than a run of words.
    assert 16 * 512 * (1 + 10 / 128) < cycles < 16 * 512 * (1 + 12 / 64)


def test_both_directions_advance_together(run):
    cycles, times, _ = run(PLAIN, *[(i % 2, 4096 * i, 512) for i in range(4)])
    assert max(times[0].first, times[1].first) < 200
    assert cycles < 4 * 512 * 1.05


def test_parameters_that_no_memory_has():
    with pytest.raises(ValueError, match="DramTiming.banks must be between 1 and 64, not 0"):
        dataclasses.replace(PLAIN, banks=0)
    with pytest.raises(ValueError, match="DramTiming.row_bytes must be a power of two"):
        dataclasses.replace(PLAIN, row_bytes=1000)


def test_presets_are_what_their_names_say():
    assert SDRAM_16BIT.bytes_per_cycle(16, 100e6) == pytest.approx(2.66)
    assert DDR.bytes_per_cycle(64, 300e6) == 64
    cycles = SDRAM_16BIT.cycles(16, 100e6)
    assert (cycles.activate, cycles.precharge, cycles.refresh) == (2, 2, 7)
    assert cycles.refresh_interval == 781 and cycles.rate == round(256 * 2.66)
