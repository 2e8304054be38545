"""The harness of the RTL device, its DRAM and its checks, with a design that copies memory."""

import random

import pytest

from moeware.hw.arch.config import Config
from moeware.hw.arch.registers import Control, Register, Status
from moeware.runtime.device import DeviceError
from moeware.sim.dram import DDR, IDEAL, SDRAM_16BIT
from moeware.sim.rtl import RtlTarget, build
from moeware.sim.verilog import to_verilog

from .copier import FAULT, LENGTH, SOURCE, TARGET, Copier, Fault

CONFIG = Config(tokens=1, outputs=1, depth=1, queries=1, lanes=1, bus_bytes=4, activation_banks=1,
                activation_words=4, residual_words=4, weight_words=4, param_words=4, tables=1,
                row_words=2, max_rows=2, max_experts=1, max_chosen=1, queue=1)
SIZE = 1 << 15


@pytest.fixture(scope="module", params=[4, 64])
def bus_bytes(request):
    return request.param


@pytest.fixture(scope="module")
def library(bus_bytes):
    return build(CONFIG, to_verilog(Copier(bus_bytes), "accelerator"), fast=False)


@pytest.fixture
def target(library, bus_bytes):
    def make(**options):
        made = RtlTarget(library, bus_bytes=bus_bytes, **{"dram": SDRAM_16BIT} | options)
        made.reserve(SIZE)
        made.write_memory(0, random.Random(1).randbytes(SIZE))
        return made
    return make


def copy(target, source, destination, words, fault=Fault.NONE, timeout_s=60):
    registers = {SOURCE: source, TARGET: destination, LENGTH: words, FAULT: fault,
                 Register.CONTROL: Control.START}
    for index, value in registers.items():
        target.write_register(index, value)
    target.wait_done(timeout_s)


@pytest.mark.parametrize("stall_seed", [None, 0, 1, 2])
@pytest.mark.parametrize("dram", [IDEAL, SDRAM_16BIT, DDR])
def test_copies_back_to_back(target, bus_bytes, dram, stall_seed):
    made = target(dram=dram, stall_seed=stall_seed)
    expected = bytearray(made.read_memory(0, SIZE))
    page = 4096 // bus_bytes
    for source, destination, words in ((0, 8192, page), (64, 4096, 1), (8192, 16384, page - 5)):
        size = words * bus_bytes
        expected[destination:destination + size] = expected[source:source + size]
        copy(made, source, destination, words)
        assert made.read_register(Register.STATUS) == Status.DONE
        assert made.read_memory(0, SIZE) == expected


def test_stalls_differ_from_seed_to_seed(target):
    cycles = set()
    for seed in (None, 3, 4, 5):
        made = target(stall_seed=seed)
        copy(made, 0, 8192, 32)
        cycles.add(made.cycles)
    assert len(cycles) == 4


@pytest.mark.parametrize(("source", "destination", "bytes_", "message"), [
    (4032, 8192, 128, "asked for a read from 0xfc0 to 0x103f, across a 4096-byte boundary"),
    (0, 8128, 128, "asked for a write from 0x1fc0 to 0x203f, across a 4096-byte boundary"),
    (2, 8192, 64, "asked for a read of .* at 0x2: it must be one word at least and aligned"),
    (0, 8192, 0, "asked for a .* of 0 bus words"),
    (0x100000, 0, 64, "past the end of a DRAM of 0x8000 bytes")])
def test_bursts_must_obey_the_rules(target, bus_bytes, source, destination, bytes_, message):
    with pytest.raises(DeviceError, match=message):
        copy(target(), source, destination, bytes_ // bus_bytes)


@pytest.mark.parametrize(("fault", "message"), [
    (Fault.CHANGE_COMMAND, "memory.read_command changed its payload before ready"),
    (Fault.CHANGE_DATA, "memory.write_data changed its payload before ready"),
    (Fault.WITHDRAW, "memory.write_command withdrew valid before ready")])
def test_a_stream_must_hold_what_it_offers(target, fault, message):
    with pytest.raises(DeviceError, match=message):
        for seed in range(8):  # some seed withholds ready at the right time
            copy(target(stall_seed=seed), 0, 8192, 32, fault)


def test_a_run_without_progress_ends_with_the_engines_states(target):
    with pytest.raises(DeviceError, match="must make progress within 5000 cycles, but nothing moved: "
                       "STATUS .*BUSY.*, 0 instructions dispatched, load idle, linear idle, "
                       "attention idle, norm idle, store idle; counters"):
        copy(target(stall_cycles=5000), 0, 8192, 8, Fault.HANG)


def test_a_host_without_answer_is_told(target):
    made = target()
    made.write_register(FAULT, Fault.NONE)
    with pytest.raises(DeviceError, match="did not answer an access to register"):
        made.write_register(FAULT, Fault.SILENT)
        made.read_register(Register.MAGIC)


def test_timeout(target):
    with pytest.raises(TimeoutError):
        copy(target(), 0, 8192, 8, Fault.HANG, timeout_s=0)


def test_accesses_beyond_the_memory(target):
    made = target()
    with pytest.raises(DeviceError, match="must lie in a DRAM of 0x8000 bytes, not at 0x7fff"):
        made.read_memory(SIZE - 1, 2)
    with pytest.raises(DeviceError, match="must lie in a DRAM of 0x8000 bytes"):
        made.write_memory(SIZE, b"a")


def test_bus_width_must_be_the_designs(library, bus_bytes):
    with pytest.raises(DeviceError, match="memory bus of another width"):
        RtlTarget(library, bus_bytes=bus_bytes // 2)


def test_a_simulation_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEWARE_CACHE", str(tmp_path))
    lines = []
    verilog = to_verilog(Copier(2), "accelerator")
    paths = {build(CONFIG, verilog, fast=False, notify=lines.append) for _ in range(2)}
    assert len(paths) == len(lines) == 1
    assert lines[0].startswith("Compiling a simulation of 'accelerator', once (about 5 s)")
    RtlTarget(paths.pop(), bus_bytes=2).read_register(Register.MAGIC)
