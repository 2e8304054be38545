"""Host end of the serial link: registers and memory of a board over a serial port."""

import contextlib
import itertools
import random
import time
from typing import Protocol, Self

from moeware.hw.arch.link import (
    ALIGNMENT,
    FRAME_TIMEOUT_S,
    MAX_PAYLOAD,
    REGISTERS,
    RESPONSE_HEADER,
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

from .device import DeviceLost

__all__ = ["DEFAULT_BAUD", "LinkError", "SerialLink", "Transport", "find_ports"]

DEFAULT_BAUD = 3_000_000
USB_IDS = (0x0403, 0x6015)  # FT231X
PORT_READ_S = 0.05  # timeout of one read of the port: deadlines are seen that late
IDLE_SLEEP_S = 0.0005  # between reads of a transport that does not wait


class LinkError(DeviceLost):
    """The board does not answer, or answers nonsense, after all retries."""


class Transport(Protocol):
    """A line to the board. `read` returns up to `count` bytes, fewer when none come for a while; it
    need not wait. One whose time is not that of the host also has ``pause(seconds)``."""

    def write(self, data: bytes) -> object: ...

    def read(self, count: int) -> bytes: ...


def find_ports() -> list[str]:
    """Names of the serial ports that a board may be behind: those of an FT231X."""
    from serial.tools import list_ports
    return sorted(port.device for port in list_ports.comports() if (port.vid, port.pid) == USB_IDS)


def open_port(name: str, baud: int) -> Transport:
    import serial
    try:
        port = serial.Serial(name, baud, timeout=PORT_READ_S, write_timeout=2.0,
                             exclusive=True)
    except (OSError, ValueError) as error:
        raise LinkError(f"Serial port {name} cannot be opened: {error}. Ports with a board: "
                        f"{find_ports() or 'none; plug it in'}. On Linux your user must be allowed "
                        "to use it (group dialout).") from error
    # The bridge would hold a short answer for 16 ms. Where a driver cannot be told, it is only slower.
    with contextlib.suppress(AttributeError, OSError, ValueError, NotImplementedError):
        port.set_low_latency_mode(True)
    return port


class SerialLink:
    """Registers and memory of a board.

    Every call ends: after `retries` repetitions of a request, each given up after `timeout_s`
    without a complete answer, it raises `LinkError`. Repetition is safe for all operations, since
    the board carries out a repeated register write once.

    Parameters
    ----------
    port : name of a serial port, or a `Transport`.
    timeout_s : longest time for one request and its answer.
    retries : repetitions after a wrong CRC or a timeout.
    baud : of a port given by its name.

    Attributes
    ----------
    identity : `Identity` of the board.

    Raises
    ------
    LinkError
        The port cannot be opened, or no board of this protocol answers.
    """

    def __init__(self, port: str | Transport, timeout_s: float = 2.0, *, retries: int = 3,
                 baud: int = DEFAULT_BAUD):
        if timeout_s <= 0:
            raise ValueError(f"Timeout must be more than 0 seconds, not {timeout_s!r}")
        self._transport = open_port(port, baud) if isinstance(port, str) else port
        self._name = port if isinstance(port, str) else type(port).__name__
        self._timeout_s, self._retries = timeout_s, retries
        self._tag = random.randrange(256)
        try:
            self.identity = Identity.decode(self._request(Operation.IDENTIFY, 0, 0))
        except FrameError as error:
            raise LinkError(f"Board at {self._name} must identify itself: {error}") from error
        if self.identity.version != Identity.VERSION:
            raise LinkError(f"Board at {self._name} must speak version {Identity.VERSION} of the "
                            f"link, not {self.identity.version}. Build and deploy its bitstream "
                            f"with this version of moeware.")
        self._alignment = max(ALIGNMENT, self.identity.bus_bytes)

    def read_register(self, index: int) -> int:
        """A 32-bit register."""
        return self.read_registers(index, 1)[0]

    def write_register(self, index: int, value: int) -> None:
        self.write_registers(index, [value])

    def read_registers(self, first: int, count: int) -> list[int]:
        """`count` consecutive registers in one exchange."""
        check_registers(first, count)
        payload = self._request(Operation.READ_REGISTERS, first, 4 * count)
        return [int.from_bytes(payload[i:i + 4], "little") for i in range(0, len(payload), 4)]

    def write_registers(self, first: int, values: list[int]) -> None:
        """Consecutive registers in one exchange, in ascending order."""
        check_registers(first, len(values))
        for value in values:
            if not 0 <= value < 1 << 32:
                raise ValueError(f"Register value must be between 0 and 2**32 - 1, not {value!r}")
        payload = b"".join(value.to_bytes(4, "little") for value in values)
        self._request(Operation.WRITE_REGISTERS, first, len(payload), payload)

    def read_memory(self, address: int, length: int) -> bytes:
        """`length` bytes from byte `address` on; neither need be aligned."""
        self._check_range(address, length)
        if not length:
            return b""
        start = address - address % self._alignment
        stop = address + length + -(address + length) % self._alignment
        content = b"".join(self._request(Operation.READ_MEMORY, first, size)
                           for first, size in pages(start, stop))
        return content[address - start:][:length]

    def write_memory(self, address: int, data: bytes) -> None:
        """Bytes from byte `address` on. Where an end is not aligned, the bytes beside it are read
        and written back."""
        data = bytes(data)
        self._check_range(address, len(data))
        if not data:
            return
        before = address % self._alignment
        after = -(address + len(data)) % self._alignment
        if before:
            data = self.read_memory(address - before, before) + data
        if after:
            data += self.read_memory(address - before + len(data), after)
        start = address - before
        for first, size in pages(start, start + len(data)):
            self._request(Operation.WRITE_MEMORY, first, size,
                          data[first - start:first - start + size])

    def close(self) -> None:
        close = getattr(self._transport, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_range(self, address: int, length: int) -> None:
        size = self.identity.memory_bytes
        if not 0 <= address <= address + length <= size:
            raise ValueError(f"Memory access must lie within the board's {size} bytes, "
                             f"not at {address:#x} with {length} bytes")

    def _request(self, operation: Operation, address: int, length: int,
                 payload: bytes = b"") -> bytes:
        """One exchange with retries; returns the response's payload."""
        self._tag = (self._tag + 1) % 256
        frame = encode_request(operation, self._tag, address, length, payload)
        expected = length if operation in (Operation.READ_MEMORY, Operation.READ_REGISTERS) else 0
        problem = ""
        for attempt in range(self._retries + 1):
            try:
                if attempt:
                    self._resynchronise()
                self._transport.write(frame)
                response = self._receive()
            except OSError as error:  # also what pyserial raises when the device is gone
                raise LinkError(f"Board at {self._name} was lost: {error}. Check its cable and "
                                f"power.") from error
            except FrameError as error:
                problem = str(error)
                continue
            if response is None:
                problem = f"no answer within {self._timeout_s} s"
            elif response.status is Status.BAD_CRC:
                problem = "the board received a frame with a wrong CRC"
            elif response.tag != self._tag:
                problem = f"an answer to request {response.tag}, not {self._tag}"
            elif response.status is not Status.OK:
                raise LinkError(f"Board at {self._name} refused {operation.name} of {length} bytes "
                                f"at {address:#x}: {response.status.name}")
            elif operation is not Operation.IDENTIFY and len(response.payload) != expected:
                problem = f"an answer with {len(response.payload)} bytes, not {expected}"
            else:
                return response.payload
        raise LinkError(f"Board at {self._name} did not answer {operation.name} in "
                        f"{self._retries + 1} attempts; the last: {problem}. Check its cable, its "
                        f"power and that its bitstream is deployed.")

    def _receive(self) -> Response | None:
        """The next response, None at the end of the timeout. Bytes before it are skipped."""
        deadline = time.monotonic() + self._timeout_s
        frame = b""
        wanted = RESPONSE_HEADER.size
        while len(frame) < wanted:
            data = self._transport.read(wanted - len(frame))
            frame += data
            if not data:
                time.sleep(IDLE_SLEEP_S)
            if wanted == RESPONSE_HEADER.size:
                start = frame.find(SYNC_RESPONSE)
                frame = frame[start:] if start >= 0 else b""
                if len(frame) >= wanted:
                    wanted = response_length(frame)
            if len(frame) < wanted and time.monotonic() >= deadline:
                return None
        return decode_response(frame)

    def _resynchronise(self) -> None:
        """Wait until the board has forgotten half a frame, and forget what it has sent so far."""
        pause = getattr(self._transport, "pause", time.sleep)
        pause(2 * FRAME_TIMEOUT_S)
        deadline = time.monotonic() + self._timeout_s
        while self._transport.read(MAX_PAYLOAD) and time.monotonic() < deadline:
            pass


def check_registers(first: int, count: int) -> None:
    if count < 1 or not 0 <= first <= REGISTERS - count:
        raise ValueError(f"Register access must lie within the {REGISTERS} registers, not at "
                         f"{first} with {count} registers")


def pages(start: int, stop: int) -> list[tuple[int, int]]:
    """(address, length) of the parts of a range that lie in one page each."""
    edges = [start, *range(start - start % MAX_PAYLOAD + MAX_PAYLOAD, stop, MAX_PAYLOAD), stop]
    return [(first, last - first) for first, last in itertools.pairwise(edges)]
