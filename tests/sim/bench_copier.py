"""cocotb tests of the drivers and checkers on the copier, which can be told to break the rules."""

import random

import cocotb

from moeware.hw.arch.registers import Status
from moeware.sim.benches.bench import Bench
from moeware.sim.benches.protocol import ProtocolError
from tests.sim.copier import FAULT, LENGTH, TARGET, Fault

BUS_BYTES, SIZE = 4, 1 << 14


async def copy(dut, source, target, words, fault=Fault.NONE, stall=0.8, seed=1):
    contents = bytearray(random.Random(1).randbytes(SIZE))
    expected = bytearray(contents)
    moved = words * BUS_BYTES
    expected[target:target + moved] = contents[source:source + moved]
    bench = Bench(dut, BUS_BYTES, contents, stall=stall, seed=seed)
    await bench.start()
    for index, value in ((TARGET, target), (LENGTH, words), (FAULT, fault)):
        await bench.access(index, value)
    for _ in range(8):  # back to back
        contents[target:target + moved] = bytes(moved)
        assert await bench.run(source, deadline=20_000) == Status.DONE
        assert contents == expected


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5, 0.95], words=[1, 100])
async def copies_under_stalls(dut, stall, words):
    await copy(dut, 64, 8192, words, stall=stall)


async def refused(dut, rule, *arguments, **options):
    try:
        await copy(dut, *arguments, **options)
    except ProtocolError as error:
        assert rule in str(error), str(error)
    else:
        raise AssertionError(f"no checker noticed: {rule}")


@cocotb.test()
@cocotb.parametrize((("fault", "rule"), [
    (Fault.CHANGE_COMMAND, "Payload of memory.read_command must hold"),
    (Fault.CHANGE_DATA, "Payload of memory.write_data must hold"),
    (Fault.WITHDRAW, "Valid of memory.write_command must hold"),
    (Fault.SILENT, "must answer within"),
    (Fault.SHORT, "memory.write must move the 64 words that they announced, not 63")]))
async def faults_are_noticed(dut, fault, rule):
    await refused(dut, rule, 0, 8192, 64, fault)


@cocotb.test()
@cocotb.parametrize((("source", "target", "words", "rule"), [
    (4032, 8192, 17, "memory.read must not cross a 4096-byte boundary"),
    (0, 12228, 16, "memory.write must not cross a 4096-byte boundary"),
    (0, 8192, 0, "must have a word at least"),
    (0, 8193, 4, "memory.write must start at a multiple of 4"),
    (0, 1 << 15, 4, "memory.write must end within 0x4000 bytes")]))
async def illegal_bursts_are_noticed(dut, source, target, words, rule):
    await refused(dut, rule, source, target, words)
