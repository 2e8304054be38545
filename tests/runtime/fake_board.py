"""A board's end of the serial link in Python, with faults on demand."""

import zlib
from collections import deque

from moeware.hw.arch.link import (
    CRC,
    MAX_PAYLOAD,
    REQUEST_HEADER,
    RESPONSE_HEADER,
    SYNC_REQUEST,
    SYNC_RESPONSE,
    Identity,
    Operation,
    Status,
)

WRITES = (Operation.WRITE_MEMORY, Operation.WRITE_REGISTERS)


class FakeBoard:
    """A transport. Each item of `faults` is about one request, in order: a function from the bytes
    of its response to what the host receives of it, or None where all is well."""

    def __init__(self, faults=(), bus_bytes=8, size=1 << 16):
        self.memory = bytearray(size)
        self.registers = [0] * 256
        self.identity = Identity(Identity.VERSION, bus_bytes, size)
        self.faults = deque(faults)
        self.requests = []  # (operation, address, length) of those that were carried out
        self.answer = b""
        self.done_tag = None
        self.closed = False

    def write(self, frame):
        response = self.respond(bytes(frame))
        fault = self.faults.popleft() if self.faults else None
        self.answer += fault(response) if fault else response

    def read(self, count):
        data, self.answer = self.answer[:count], self.answer[count:]
        return data

    def pause(self, seconds):
        pass

    def close(self):
        self.closed = True

    def respond(self, frame):
        sync, operation, tag, address, length = REQUEST_HEADER.unpack(frame[:REQUEST_HEADER.size])
        assert sync == SYNC_REQUEST
        payload = frame[REQUEST_HEADER.size:-CRC.size]
        assert len(payload) == (length if operation in WRITES else 0)
        assert frame[-CRC.size:] == CRC.pack(zlib.crc32(frame[1:-CRC.size]))
        self.requests.append((Operation(operation), address, length))
        status, content = self.execute(operation, tag, address, length, payload)
        body = RESPONSE_HEADER.pack(SYNC_RESPONSE, status, tag, len(content)) + content
        return body + CRC.pack(zlib.crc32(body[1:]))

    def execute(self, operation, tag, address, length, payload):
        alignment = max(8, self.identity.bus_bytes)
        if operation in (Operation.WRITE_MEMORY, Operation.READ_MEMORY) and (
                address % alignment or length % alignment or not length
                or address % MAX_PAYLOAD + length > MAX_PAYLOAD):
            return Status.BAD_LENGTH, b""
        match operation:
            case Operation.IDENTIFY:
                return Status.OK, self.identity.encode()
            case Operation.WRITE_MEMORY:
                self.memory[address:address + length] = payload
            case Operation.READ_MEMORY:
                return Status.OK, bytes(self.memory[address:address + length])
            case Operation.READ_REGISTERS:
                return Status.OK, b"".join(value.to_bytes(4, "little") for value in
                                           self.registers[address:address + length // 4])
            case Operation.WRITE_REGISTERS if tag != self.done_tag:
                self.done_tag = tag
                for i in range(length // 4):
                    self.registers[address + i] = int.from_bytes(payload[4 * i:4 * i + 4], "little")
        return Status.OK, b""
