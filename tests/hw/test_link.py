import random
import zlib

import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeware.hw.arch.link import (
    CRC,
    MAX_PAYLOAD,
    RESPONSE_HEADER,
    SYNC_REQUEST,
    SYNC_RESPONSE,
    FrameError,
    Identity,
    Operation,
    Response,
    Status,
    decode_response,
    encode_request,
    response_length,
)
from moeware.hw.link import HostLink
from moeware.hw.uart import BitClock, UARTReceiver, UARTTransmitter

from .background import simulate_beside
from .dram import Dram
from .simulate import simulate
from .streams import get_all, put_all

TIMEOUT_CYCLES = 50
MEMORY_BYTES = 1 << 16


class Bench:
    """A link between bytes, a memory and 256 registers."""

    def __init__(self, bus_bytes=8, latency=3, stall=0.2):
        self.dut = HostLink(bus_bytes, MEMORY_BYTES, TIMEOUT_CYCLES)
        self.dram = Dram(bus_bytes, MEMORY_BYTES, latency, stall)
        self.registers = list(range(1000, 1256))
        self.accesses = []

    async def serve_registers(self, ctx):
        port = self.dut.registers
        while True:
            ctx.set(port.request.ready, 1)
            _, _, asked, access = await ctx.tick().sample(port.request.valid, port.request.payload)
            if not asked:
                continue
            ctx.set(port.request.ready, 0)
            self.accesses.append((access.write, access.index, access.data if access.write else 0))
            if access.write:
                self.registers[access.index] = access.data
            await ctx.tick()
            ctx.set(port.response.payload, self.registers[access.index])
            ctx.set(port.response.valid, 1)
            taken = False
            while not taken:
                _, _, taken = await ctx.tick().sample(port.response.ready)
            ctx.set(port.response.valid, 0)

    async def send(self, ctx, frame):
        await put_all(ctx, self.dut.received, frame)

    async def receive(self, ctx, pauses=()):
        header = bytes(await get_all(ctx, self.dut.sent, RESPONSE_HEADER.size, pauses))
        rest = response_length(header) - len(header)
        return decode_response(header + bytes(await get_all(ctx, self.dut.sent, rest, pauses)))

    async def exchange(self, ctx, operation, tag, address, length, payload=b""):
        await self.send(ctx, encode_request(operation, tag, address, length, payload))
        return await self.receive(ctx)

    def run(self, *benches, deadline=20_000):
        simulate_beside(self.dut, benches,
                        [*self.dram.serve(self.dut.memory), self.serve_registers], deadline)


def test_identify():
    bench = Bench()

    async def host(ctx):
        response = await bench.exchange(ctx, Operation.IDENTIFY, 9, 0, 0)
        assert response.tag == 9
        assert Identity.decode(response.payload) == Identity(Identity.VERSION, 8, MEMORY_BYTES)

    bench.run(host)


@pytest.mark.parametrize("bus_bytes", [2, 4, 8, 32])
def test_memory_is_written_and_read(bus_bytes):
    bench = Bench(bus_bytes)
    draw = random.Random(bus_bytes)
    content = draw.randbytes(96)

    async def host(ctx):
        assert await bench.exchange(ctx, Operation.WRITE_MEMORY, 1, 4096 - 96, 96, content
                                    ) == Response(Status.OK, 1, b"")
        assert bench.dram.image[4000:4096] == content
        assert await bench.exchange(ctx, Operation.READ_MEMORY, 2, 4096 - 64, 64
                                    ) == Response(Status.OK, 2, content[32:])

    bench.run(host)
    assert bench.dram.writes == [(4000, 96 // bus_bytes)]
    assert bench.dram.reads == [(4032, 64 // bus_bytes)]


def test_a_whole_page():
    bench = Bench(stall=0)
    content = random.Random(1).randbytes(MAX_PAYLOAD)

    async def host(ctx):
        response = await bench.exchange(ctx, Operation.WRITE_MEMORY, 1, 8192, MAX_PAYLOAD, content)
        assert response.status is Status.OK

    bench.run(host)
    assert bench.dram.image[8192:8192 + MAX_PAYLOAD] == content


@pytest.mark.parametrize("bus_bytes", [2, 8])
def test_registers_are_written_and_read(bus_bytes):
    bench = Bench(bus_bytes)
    values = [0xDEADBEEF, 1, 0x80000000]

    async def host(ctx):
        payload = b"".join(value.to_bytes(4, "little") for value in values)
        assert await bench.exchange(ctx, Operation.WRITE_REGISTERS, 1, 253, 12, payload
                                    ) == Response(Status.OK, 1, b"")
        response = await bench.exchange(ctx, Operation.READ_REGISTERS, 2, 252, 16)
        assert response == Response(Status.OK, 2, (1252).to_bytes(4, "little") + payload)

    bench.run(host)
    assert bench.accesses == [(1, 253 + i, value) for i, value in enumerate(values)] + [
        (0, 252 + i, 0) for i in range(4)]


def test_a_repeated_register_write_is_carried_out_once():
    bench = Bench()

    async def host(ctx):
        for tag in (1, 1, 2, 2):
            assert (await bench.exchange(ctx, Operation.WRITE_REGISTERS, tag, 3, 4, bytes(4))
                    ).status is Status.OK
        await bench.exchange(ctx, Operation.IDENTIFY, 2, 0, 0)
        await bench.exchange(ctx, Operation.WRITE_REGISTERS, 2, 3, 4, bytes(4))

    bench.run(host)
    assert len(bench.accesses) == 3


@pytest.mark.parametrize("operation, address, length", [
    (Operation.IDENTIFY, 0, 4),
    (Operation.READ_REGISTERS, 0, 0), (Operation.READ_REGISTERS, 0, 6),
    (Operation.READ_REGISTERS, 255, 8), (Operation.READ_REGISTERS, 256, 4),
    (Operation.READ_REGISTERS, 0, 1028), (Operation.READ_REGISTERS, 1 << 31, 4),
    (Operation.WRITE_REGISTERS, 255, 8), (Operation.WRITE_REGISTERS, 0, 0),
    (Operation.READ_MEMORY, 0, 0), (Operation.READ_MEMORY, 0, 4), (Operation.READ_MEMORY, 4, 8),
    (Operation.READ_MEMORY, 4088, 16), (Operation.READ_MEMORY, 0, 4104),
    (Operation.READ_MEMORY, MEMORY_BYTES, 8), (Operation.READ_MEMORY, 0, 65528),
    (Operation.WRITE_MEMORY, 4088, 16), (Operation.WRITE_MEMORY, 0, 4104),
])
def test_bad_lengths_are_refused(operation, address, length):
    bench = Bench()
    payload = bytes(length) if operation.name.startswith("WRITE") else b""

    async def host(ctx):
        for turn in range(2):  # the second shows that the link is in step after the first
            assert await bench.exchange(ctx, operation, turn, address, length, payload
                                        ) == Response(Status.BAD_LENGTH, turn, b"")

    bench.run(host)
    assert not bench.accesses and not bench.dram.writes and not bench.dram.reads


def test_bad_operation_and_bad_crc_are_refused():
    bench = Bench()
    draw = random.Random(5)
    good = encode_request(Operation.WRITE_MEMORY, 7, 64, 16, draw.randbytes(16))

    async def host(ctx):
        assert await bench.exchange(ctx, 5, 1, 0, 0) == Response(Status.BAD_OPERATION, 1, b"")
        assert await bench.exchange(ctx, 255, 2, 0, 0) == Response(Status.BAD_OPERATION, 2, b"")
        for position in (2, 3, 9, 12, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 0x10
            await bench.send(ctx, bad)
            if position == 9:  # its length was hit: the link waits for more, then gives up
                for _ in range(TIMEOUT_CYCLES + 5):
                    await ctx.tick()
            else:
                assert (await bench.receive(ctx)).status is Status.BAD_CRC
        assert not bench.dram.writes
        await bench.send(ctx, good)
        assert (await bench.receive(ctx)).status is Status.OK

    bench.run(host)
    assert bench.dram.writes == [(64, 2)]


def test_garbage_and_truncated_frames_are_forgotten():
    bench = Bench()
    request = encode_request(Operation.READ_MEMORY, 3, 0, 8)

    async def host(ctx):
        await bench.send(ctx, bytes(b for b in range(256) if b != SYNC_REQUEST))
        await bench.send(ctx, request)
        assert (await bench.receive(ctx)).status is Status.OK
        for cut in (1, 5, len(request) - 1):
            await bench.send(ctx, request[:cut])
            for _ in range(TIMEOUT_CYCLES + 5):
                await ctx.tick()
            await bench.send(ctx, request)
            assert (await bench.receive(ctx, iter([1, 0] * 40))).status is Status.OK

    bench.run(host)


def test_a_pause_shorter_than_the_timeout_is_allowed():
    bench = Bench()

    async def host(ctx):
        for byte in encode_request(Operation.READ_MEMORY, 3, 0, 8):
            await bench.send(ctx, [byte])
            for _ in range(TIMEOUT_CYCLES - 5):
                await ctx.tick()

    async def answer(ctx):
        assert (await bench.receive(ctx)).status is Status.OK

    bench.run(host, answer)


def test_responses_are_checked():
    body = bytes([Status.OK, 1, 2, 0]) + b"ab"
    frame = bytes([SYNC_RESPONSE]) + body + CRC.pack(zlib.crc32(body))
    assert decode_response(frame) == Response(Status.OK, 1, b"ab")
    unknown = bytes([9, 1, 0, 0])
    for wrong, words in [
            (b"\x00" + frame[1:], "must start with"), (frame + b"\x00", "must have 11 bytes"),
            (frame[:-1] + bytes([frame[-1] ^ 1]), "must have the CRC"),
            (bytes([SYNC_RESPONSE]) + unknown + CRC.pack(zlib.crc32(unknown)), "status must be")]:
        with pytest.raises(FrameError, match=words):
            decode_response(wrong)
    with pytest.raises(FrameError, match="Identity must be"):
        Identity.decode(b"MOEL")


class Loopback(wiring.Component):
    """A transmitter on a receiver, whose clock may be a little off."""

    def __init__(self, clock_hz, baud, received_baud):
        self.transmitter = UARTTransmitter(clock_hz, baud)
        self.receiver = UARTReceiver(clock_hz, received_baud)
        super().__init__({"line": Out(1), "break_line": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.transmitter, m.submodules.receiver = self.transmitter, self.receiver
        m.d.comb += [self.line.eq(self.transmitter.line & ~self.break_line),
                     self.receiver.line.eq(self.line)]
        return m


@pytest.mark.parametrize("clock_hz, baud, received_baud", [
    (50_000_000, 3_000_000, 3_000_000), (80_000_000, 3_000_000, 3_000_000),
    (50_000_000, 3_000_000, 3_060_000), (50_000_000, 3_000_000, 2_940_000), (4, 1, 1)])
def test_serial_line(clock_hz, baud, received_baud):
    dut = Loopback(clock_hz, baud, received_baud)
    content = [0, 255, 0x55, 0xAA, *random.Random(1).randbytes(20)]

    async def send(ctx):
        await put_all(ctx, dut.transmitter.bytes, content, iter([0] * 10 + [1] * 60))

    async def receive(ctx):
        assert await get_all(ctx, dut.receiver.bytes, len(content)) == content

    simulate(dut, send, receive)


def test_bits_have_the_length_of_the_baud_rate():
    dut = Loopback(50_000_000, 3_000_000, 3_000_000)

    async def send(ctx):
        await put_all(ctx, dut.transmitter.bytes, [0x55] * 6)

    async def measure(ctx):
        edges, before = [], 1
        for cycle in range(1100):
            _, _, line = await ctx.tick().sample(dut.line)
            if line != before:
                edges.append(cycle)
            before = line
        for number, edge in enumerate(edges):
            assert abs(edge - edges[0] - number * 50 / 3) <= 1

    simulate(dut, send, measure)


def test_a_byte_without_stop_bit_and_a_spike_are_dropped():
    dut = Loopback(16, 1, 1)

    async def bench(ctx):
        ctx.set(dut.break_line, 1)
        for _ in range(16 * 9 + 30):
            await ctx.tick()
        ctx.set(dut.break_line, 0)
        for _ in range(16 * 12):
            await ctx.tick()
        ctx.set(dut.break_line, 1)
        for _ in range(3):
            await ctx.tick()
        ctx.set(dut.break_line, 0)
        for _ in range(16 * 12):
            await ctx.tick()
        ctx.set(dut.transmitter.bytes.payload, 0x3C)
        ctx.set(dut.transmitter.bytes.valid, 1)
        await ctx.tick()
        ctx.set(dut.transmitter.bytes.valid, 0)

    async def receive(ctx):
        assert await get_all(ctx, dut.receiver.bytes, 1) == [0x3C]

    simulate(dut, bench, receive)


def test_too_fast_a_baud_rate_is_refused():
    with pytest.raises(ValueError, match="Baud rate must be between 1 and"):
        BitClock(10_000_000, 3_000_000, half=True)
