import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from moeware.hw.arch.registers import Register, Status
from moeware.runtime.serial_link import LinkError, SerialLink
from moeware.sim.board_device import SimulatedBoard, SimulationError
from tests.hw.exerciser import COPY, PAGE, READ, SOURCE, SUM, Exerciser


def board_with(bus_bytes=8, **options):
    return SimulatedBoard(SimpleNamespace(bus_bytes=bus_bytes), accelerator=Exerciser(bus_bytes),
                          **options)


GEARED = {"clock_hz": 50_000_000, "capture_cycles": 2, "rate": 2}


@pytest.fixture(scope="module", params=[
    {"clock_hz": 50_000_000}, {"clock_hz": 100_000_000, "capture_cycles": 2, "baud": 3_000_000},
    GEARED, GEARED | {"clock_hz": 62_500_000}],
    ids=["50MHz", "100MHz", "50MHz-100MHz", "62MHz-125MHz"])
def linked(request):
    board = board_with(**request.param)
    with SerialLink(board.transport, timeout_s=60) as link:
        yield board, link


def wait(board, link):
    for _ in range(100):
        if link.read_register(Register.STATUS) == Status.DONE:
            return link.read_register(Register.CYCLES)
        board.idle(2000)
    raise AssertionError("not done")


def test_memory(linked):
    board, link = linked
    assert link.identity.bus_bytes == 8 and link.identity.memory_bytes == 1 << 25
    draw = random.Random(3)
    image = np.array(board.memory[:1 << 14])
    for address, length in [(0, 8), (4088, 16), (5001, 3), (4095, 2), (8190, 4100), (16, 0)]:
        content = draw.randbytes(length)
        link.write_memory(address, content)
        image[address:address + length] = list(content)
        assert link.read_memory(address, length) == content
    assert np.array_equal(board.memory[:1 << 14], image)
    last = (1 << 25) - 8
    link.write_memory(last, b"the last")
    assert bytes(board.memory[last:]) == b"the last"


def test_copy_beside_the_link(linked):
    board, link = linked
    draw = np.random.default_rng(1)
    content = draw.integers(0, 256, 20 * PAGE, dtype=np.uint8)
    source, target = 1 << 20, 3 << 20
    board.memory[source:source + len(content)] = content
    link.write_registers(SOURCE, [source, target, 20])
    link.write_register(Register.CONTROL, COPY)
    for number in range(3):
        link.write_memory(number * PAGE, bytes([number] * 64))
        assert link.read_memory(number * PAGE, 64) == bytes([number] * 64)
    wait(board, link)
    assert np.array_equal(board.memory[target:target + len(content)], content)
    expected = int(content.view("<u8").astype(np.uint32).sum(dtype=np.uint32))
    assert link.read_register(SUM) == expected


def test_long_reads_use_the_bus_fully(linked):
    board, link = linked
    link.write_registers(SOURCE, [0, 0, 50])
    link.write_register(Register.CONTROL, READ)
    share = 50 * PAGE / 2 / (board.rate * wait(board, link))
    assert 0.97 < share <= 1, f"{share:.2%} of 16 bits a chip clock"


def test_time_is_counted_in_system_clocks(linked):
    board, _ = linked
    before = board.cycles
    board.idle(123)
    assert board.cycles == before + 123


@pytest.mark.parametrize("options", [{}, GEARED], ids=["one", "two"])
def test_a_broken_rule_of_the_chip_ends_the_simulation(options):
    board = board_with(**options)
    board.rules.rcd_ns = 1e6
    board.restart()
    with pytest.raises(SimulationError, match="tRCD"):
        SerialLink(board.transport).write_memory(0, bytes(8))
    board.close()


def test_a_silent_board_ends_in_an_error():
    board = board_with()
    transport = SimpleNamespace(write=lambda data: None, read=board.transport.read,
                                pause=board.transport.pause)
    started = time.monotonic()
    with pytest.raises(LinkError, match="did not answer IDENTIFY in 2 attempts"):
        SerialLink(transport, timeout_s=0.2, retries=1)
    assert time.monotonic() - started < 20
    board.close()
