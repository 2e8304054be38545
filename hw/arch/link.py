"""The protocol of the serial host link: frames with a CRC, one response to each request.

A request is ``SYNC_REQUEST, operation, tag, address (4), length (2), payload, CRC (4)``, a response
``SYNC_RESPONSE, status, tag, length (2), payload, CRC (4)``. Numbers are little-endian; `length`
counts bytes; the CRC is CRC-32 (that of zlib) of everything between the sync byte and itself. The
tag of a request comes back in its response.

==================  ====================  ===========================  ===========================
operation           address               length                       payload
==================  ====================  ===========================  ===========================
IDENTIFY            0                     0                            response: `Identity`
WRITE_REGISTERS     first register        4 per register               request: values
READ_REGISTERS      first register        4 per register               response: values
WRITE_MEMORY        first byte            1 to `MAX_PAYLOAD` bytes     request: content
READ_MEMORY         first byte            1 to `MAX_PAYLOAD` bytes     response: content
==================  ====================  ===========================  ===========================

A request is judged by its CRC first, then by its operation, then by its length. An unknown
operation is taken to have no payload. A response that is not OK has no payload.

A memory access lies within one page of `MAX_PAYLOAD` bytes; its address and length are multiples
of `ALIGNMENT` and of the memory bus. Register accesses end at register 255 or before.

The device ignores bytes that are no sync byte between frames, and drops a frame that stops for
longer than its timeout. A WRITE_REGISTERS with the tag of the WRITE_REGISTERS before it is answered
but not carried out again: so a request whose response was lost can be repeated, whatever it does.
IDENTIFY makes the device forget that tag.
"""

import dataclasses
import enum
import struct
import zlib

__all__ = ["ALIGNMENT", "CRC", "FRAME_TIMEOUT_S", "MAX_PAYLOAD", "REGISTERS", "REQUEST_HEADER",
           "RESPONSE_HEADER", "SYNC_REQUEST", "SYNC_RESPONSE", "FrameError", "Identity", "Operation", "Response",
           "Status", "decode_response", "encode_request", "response_length"]

SYNC_REQUEST = 0xA5
SYNC_RESPONSE = 0x5A
MAX_PAYLOAD = 4096  # bytes; also the page that a memory access must not leave
ALIGNMENT = 8  # bytes
REGISTERS = 256
FRAME_TIMEOUT_S = 0.02  # longest pause within a request, well above the gaps of a USB bridge

REQUEST_HEADER = struct.Struct("<BBBIH")  # sync, operation, tag, address, length
RESPONSE_HEADER = struct.Struct("<BBBH")  # sync, status, tag, length
CRC = struct.Struct("<I")


class Operation(enum.IntEnum):
    IDENTIFY = 0
    WRITE_REGISTERS = 1
    READ_REGISTERS = 2
    WRITE_MEMORY = 3
    READ_MEMORY = 4


class Status(enum.IntEnum):
    OK = 0
    BAD_CRC = 1
    BAD_OPERATION = 2
    BAD_LENGTH = 3  # also an address or length that breaks the rules of its operation


class FrameError(ValueError):
    """Bytes that are no response; the message says why."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What answers at the other end."""

    MAGIC = b"MOEL"
    VERSION = 1
    FORMAT = struct.Struct("<4sHHI")

    version: int
    bus_bytes: int
    memory_bytes: int

    def encode(self) -> bytes:
        return self.FORMAT.pack(self.MAGIC, self.version, self.bus_bytes, self.memory_bytes)

    @classmethod
    def decode(cls, payload: bytes) -> "Identity":
        if len(payload) != cls.FORMAT.size or payload[:4] != cls.MAGIC:
            raise FrameError(f"Identity must be {cls.FORMAT.size} bytes that start with "
                             f"{cls.MAGIC!r}, not {payload!r}")
        return cls(*cls.FORMAT.unpack(payload)[1:])


@dataclasses.dataclass(frozen=True)
class Response:
    status: Status
    tag: int
    payload: bytes


def encode_request(operation: Operation, tag: int, address: int, length: int,
                   payload: bytes = b"") -> bytes:
    """The bytes of a request. `payload` has `length` bytes where the operation sends one."""
    frame = REQUEST_HEADER.pack(SYNC_REQUEST, operation, tag, address, length) + payload
    return frame + CRC.pack(zlib.crc32(frame[1:]))


def response_length(header: bytes) -> int:
    """Bytes of a whole response, from its header of `RESPONSE_HEADER.size` bytes.

    Raises
    ------
    FrameError
        A header that no response starts with.
    """
    sync, _, _, length = RESPONSE_HEADER.unpack(header)
    if sync != SYNC_RESPONSE or length > MAX_PAYLOAD:
        raise FrameError(f"Response must start with {SYNC_RESPONSE:#x} and have at most "
                         f"{MAX_PAYLOAD} bytes, not start with {header.hex()}")
    return RESPONSE_HEADER.size + length + CRC.size


def decode_response(frame: bytes) -> Response:
    """A whole response.

    Raises
    ------
    FrameError
        A wrong length or CRC, or an unknown status.
    """
    header, crc = frame[:RESPONSE_HEADER.size], frame[-CRC.size:]
    if len(frame) != response_length(header):
        raise FrameError(f"Response must have {response_length(header)} bytes, not {len(frame)}")
    if CRC.unpack(crc)[0] != zlib.crc32(frame[1:-CRC.size]):
        raise FrameError("Response must have the CRC of its content")
    _, status, tag, _ = RESPONSE_HEADER.unpack(header)
    if status not in Status._value2member_map_:
        raise FrameError(f"Response status must be one of {[s.name for s in Status]}, "
                         f"not {status}")
    return Response(Status(status), tag, frame[RESPONSE_HEADER.size:-CRC.size])
