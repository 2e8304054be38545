import random
import sys
import time
import zlib
from types import SimpleNamespace

import pytest

from moeware.hw.arch.link import CRC, RESPONSE_HEADER, SYNC_RESPONSE, Identity, Operation, Status
from moeware.runtime.serial_link import LinkError, SerialLink, find_ports, pages

from .fake_board import FakeBoard


def lose(response):
    return b""


def flip(response):
    return response[:-1] + bytes([response[-1] ^ 1])


def cut(response):
    return response[:len(response) // 2]


def precede_by_garbage(response):
    return bytes([0, 1, 0xFF, 0x33]) + response


def false_start(response):
    return bytes([SYNC_RESPONSE, 0, 0, 0xFF, 0xFF]) + response


def refuse_crc(response):
    body = RESPONSE_HEADER.pack(SYNC_RESPONSE, Status.BAD_CRC, response[2], 0)
    return body + CRC.pack(zlib.crc32(body[1:]))


def answer_another(response):
    body = bytes([response[0], response[1], (response[2] + 1) % 256]) + response[3:-CRC.size]
    return body + CRC.pack(zlib.crc32(body[1:]))


def linked(faults=(), **options):
    board = FakeBoard([None, *faults], **options)
    return board, SerialLink(board, timeout_s=0.02)


def test_registers():
    board, link = linked()
    link.write_register(3, 0xFFFFFFFF)
    link.write_registers(254, [1, 2])
    assert link.read_register(3) == 0xFFFFFFFF
    assert link.read_registers(253, 3) == [0, 1, 2] == board.registers[253:]


@pytest.mark.parametrize("bus_bytes", [8, 32])
@pytest.mark.parametrize("address, length", [
    (0, 8), (0, 0), (4, 8), (4095, 2), (4096, 4096), (8190, 9000), (65535, 1), (0, 65536)])
def test_memory_of_any_alignment(bus_bytes, address, length):
    board, link = linked(bus_bytes=bus_bytes)
    draw = random.Random(length)
    board.memory[:] = draw.randbytes(len(board.memory))
    expected = bytearray(board.memory)
    content = draw.randbytes(length)
    expected[address:address + length] = content
    link.write_memory(address, memoryview(content))
    assert board.memory == expected
    assert link.read_memory(address, length) == content


def test_pages():
    assert pages(8, 16) == [(8, 8)]
    assert pages(0, 4096) == [(0, 4096)]
    assert pages(4000, 8200) == [(4000, 96), (4096, 4096), (8192, 8)]


@pytest.mark.parametrize("fault", [lose, flip, cut, false_start, refuse_crc, answer_another])
def test_a_fault_is_repaired(fault):
    board, link = linked([fault, None, fault, fault, None, fault])
    link.write_memory(16, b"8 bytes.")
    assert link.read_memory(16, 8) == b"8 bytes."
    link.write_register(1, 7)
    assert board.registers[1] == link.read_register(1) == 7
    assert len(board.requests) > 5


def test_garbage_before_a_response_is_skipped():
    board, link = linked([precede_by_garbage])
    link.write_register(1, 2)
    assert len(board.requests) == 2


def test_a_repeated_request_keeps_its_tag():
    """So a register write whose answer was lost is not carried out twice."""
    board, link = linked([lose, lose, None])
    tags = set()
    execute = board.execute
    board.execute = lambda operation, tag, *rest: (tags.add(tag), execute(operation, tag, *rest))[1]
    link.write_register(2, 1)
    assert len(tags) == 1 and len(board.requests) == 4


def test_a_vanished_board_ends_in_an_error_in_bounded_time():
    board, link = linked()
    board.faults.extend([lose] * 100)
    started = time.monotonic()
    with pytest.raises(LinkError, match="did not answer READ_REGISTERS in 4 attempts; the last: "
                                        "no answer within 0.02 s"):
        link.read_register(0)
    assert time.monotonic() - started < 4 * 0.02 + 1


def test_endless_garbage_ends_in_an_error_in_bounded_time():
    board, link = linked()
    board.read = lambda count: bytes(count)
    started = time.monotonic()
    with pytest.raises(LinkError, match="no answer within"):
        link.read_register(0)
    assert time.monotonic() - started < 2


def test_an_unplugged_port_is_a_lost_board():
    board, link = linked()

    def unplugged(*arguments):
        raise OSError(5, "Input/output error")

    board.read = unplugged
    with pytest.raises(LinkError, match="was lost: .*Input/output error"):
        link.read_memory(0, 8)


def test_a_refusal_is_not_repeated():
    board, link = linked()
    board.execute = lambda *arguments: (Status.BAD_LENGTH, b"")
    with pytest.raises(LinkError, match="refused READ_MEMORY of 8 bytes at 0x10: BAD_LENGTH"):
        link.read_memory(16, 8)
    assert board.requests[1:] == [(Operation.READ_MEMORY, 16, 8)]


def test_a_wrong_length_is_no_answer():
    board, link = linked()
    board.execute = lambda *arguments: (Status.OK, b"")
    with pytest.raises(LinkError, match="an answer with 0 bytes, not 8"):
        link.read_memory(16, 8)


def test_a_device_of_another_kind_is_refused():
    board = FakeBoard()
    board.identity = Identity(99, 8, 1 << 16)
    with pytest.raises(LinkError, match="must speak version 1 of the link, not 99"):
        SerialLink(board)
    board.identity = SimpleNamespace(bus_bytes=8, encode=lambda: b"something")
    with pytest.raises(LinkError, match="must identify itself"):
        SerialLink(board)


@pytest.mark.parametrize("call, words", [
    (lambda link: link.read_register(256), "within the 256 registers, not at 256"),
    (lambda link: link.write_register(0, 1 << 32), "between 0 and 2"),
    (lambda link: link.read_memory(65536, 1), "within the board's 65536 bytes, not at 0x10000"),
    (lambda link: link.write_memory(65535, b"ab"), "within the board's 65536 bytes"),
    (lambda link: link.read_memory(-8, 8), "within the board's")])
def test_arguments_are_checked(call, words):
    _, link = linked()
    with pytest.raises(ValueError, match=words):
        call(link)


def test_timeout_is_checked():
    with pytest.raises(ValueError, match="Timeout must be more than 0"):
        SerialLink(FakeBoard(), timeout_s=0)


def test_closing():
    board, link = linked()
    with link:
        pass
    assert board.closed


def test_a_missing_port_is_named():
    with pytest.raises(LinkError, match="/dev/no-such-port cannot be opened"):
        SerialLink("/dev/no-such-port")


def test_ports_are_found_by_their_usb_ids(monkeypatch):
    from serial.tools import list_ports
    ports = [SimpleNamespace(device=name, vid=vid, pid=pid) for name, vid, pid in [
        ("/dev/ttyUSB1", 0x0403, 0x6015), ("/dev/ttyUSB0", 0x0403, 0x6015),
        ("/dev/ttyACM0", 0x0403, 0x6001), ("/dev/ttyS0", None, None)]]
    monkeypatch.setattr(list_ports, "comports", lambda: ports)
    assert find_ports() == ["/dev/ttyUSB0", "/dev/ttyUSB1"]


def test_pyserial_is_not_imported_without_a_port():
    code = ("import sys, moeware.runtime.serial_link; "
            "sys.exit(any(m.split('.')[0] in ('serial', 'amaranth') for m in sys.modules))")
    import subprocess
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
