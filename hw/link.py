"""Device end of the serial host link: carries out requests on the register and the memory port."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.crc import catalog
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from .arch.link import (
    ALIGNMENT,
    MAX_PAYLOAD,
    REGISTERS,
    REQUEST_HEADER,
    RESPONSE_HEADER,
    SYNC_REQUEST,
    SYNC_RESPONSE,
    Identity,
    Operation,
    Status,
)
from .ports import MemoryPort, RegisterPort

__all__ = ["HostLink"]

HEADER = data.StructLayout({"operation": 8, "tag": 8, "address": 32, "length": 16})
CRC_BYTES = 4


class HostLink(wiring.Component):
    """Answers the frames of `arch.link`, one request at a time.

    A request waits in a buffer until its CRC has been found right, so nothing is ever carried out
    in part. Throughput is that of the byte streams; between request and response pass a few cycles
    per register, or the time of one burst, three cycles per bus word at least. Received bytes are
    never refused for longer than a cycle; from the end of a request to the end of its response
    they are dropped. A refused sent byte holds the response; a port that does not answer holds the
    link.

    Parameters
    ----------
    bus_bytes : width of the memory port in bytes.
    memory_bytes : size of the memory; accesses that start past it are refused.
    timeout_cycles : longest pause within a request.

    Members
    -------
    received : In(stream.Signature(8))
    sent : Out(stream.Signature(8))
    memory : Out(MemoryPort(bus_bytes))
    registers : Out(RegisterPort())
    """

    def __init__(self, bus_bytes: int, memory_bytes: int, timeout_cycles: int):
        self._bus_bytes = bus_bytes
        self._memory_bytes = memory_bytes
        self._timeout_cycles = timeout_cycles
        super().__init__({
            "received": In(stream.Signature(8)),
            "sent": Out(stream.Signature(8)),
            "memory": Out(MemoryPort(bus_bytes)),
            "registers": Out(RegisterPort()),
        })

    def elaborate(self, platform):
        m = Module()
        received, sent, memory, registers = self.received, self.sent, self.memory, self.registers

        header = Signal(HEADER)
        status = Signal(8)
        position = Signal(16)  # bytes of the present part of a frame, or of the buffer
        beats = header.length >> exact_log2(self._bus_bytes)

        m.submodules.request_crc = request_crc = catalog.CRC32_ISO_HDLC(8).create()
        m.submodules.response_crc = response_crc = catalog.CRC32_ISO_HDLC(8).create()
        # The CRC of the response takes a byte from a register, the cycle after it was sent.
        begun, counts = Signal(), Signal()
        m.d.comb += [received.ready.eq(1), request_crc.data.eq(received.payload)]
        m.d.sync += [response_crc.start.eq(begun), response_crc.valid.eq(counts & sent.ready),
                     response_crc.data.eq(sent.payload)]

        # --- Payload buffer: written and read at `position` by the byte, register or bus word -----

        width = max(self._bus_bytes, 4)
        m.submodules.buffer = buffer = Memory(shape=8 * width, depth=MAX_PAYLOAD // width, init=[])
        writer, reader = buffer.write_port(granularity=8), buffer.read_port()
        m.d.comb += [writer.addr.eq(position >> exact_log2(width)),
                     reader.addr.eq(position >> exact_log2(width))]

        def place(unit_bytes):
            """Index of the unit at `position` within its buffer word."""
            return position[exact_log2(unit_bytes):exact_log2(width)]

        def store(value):
            size = len(value) // 8
            m.d.comb += [writer.data.eq(value.replicate(width // size)),
                         writer.en.eq(Const(1, 1).replicate(size) << place(size) * size)]

        word = Signal(8 * width)  # what lies at `position`, two cycles after it was set
        m.d.sync += word.eq(reader.data)

        def fetched(unit_bytes):
            return word.word_select(place(unit_bytes), 8 * unit_bytes)

        waited = Signal()
        m.d.sync += waited.eq(0)

        def fetch(then):
            """Wait for `word`."""
            m.d.sync += waited.eq(1)
            with m.If(waited):
                m.next = then

        # --- Judgement of a request ---------------------------------------------------------------

        operation = header.operation
        on_registers = ((operation == Operation.READ_REGISTERS)
                        | (operation == Operation.WRITE_REGISTERS))
        on_memory = (operation == Operation.READ_MEMORY) | (operation == Operation.WRITE_MEMORY)
        has_payload = ((operation == Operation.WRITE_REGISTERS)
                       | (operation == Operation.WRITE_MEMORY)) & (header.length != 0)
        alignment = max(ALIGNMENT, self._bus_bytes)
        last_bits = exact_log2(alignment)
        offset = header.address[:exact_log2(MAX_PAYLOAD)]
        length_is_right = Signal()  # of a header that came two cycles ago or earlier
        m.d.sync += length_is_right.eq(Mux(
            on_registers,
            (header.length[:2] == 0) & (header.length != 0) & (header.address < REGISTERS)
            & (header.address[:8] + (header.length >> 2) <= REGISTERS),
            Mux(on_memory,
                (header.length[:last_bits] == 0) & (header.length != 0)
                & (header.address[:last_bits] == 0) & (offset + header.length <= MAX_PAYLOAD)
                & (header.address < self._memory_bytes),
                header.length == 0)))
        done_tag = Signal(9)  # tag of the last WRITE_REGISTERS, and that there is one

        # --- Pause within a request ---------------------------------------------------------------

        pause = Signal(range(self._timeout_cycles + 1))
        expired = pause == self._timeout_cycles
        with m.If(received.valid):
            m.d.sync += pause.eq(0)
        with m.Elif(~expired):
            m.d.sync += pause.eq(pause + 1)

        identity = Identity(Identity.VERSION, self._bus_bytes, self._memory_bytes).encode()
        response_header = Cat(Const(SYNC_RESPONSE, 8), status, header.tag, header.length)

        # Whether `position` is that of the last unit; of a length known for two cycles.
        at_last = {}
        for unit_bytes in {1, 4, self._bus_bytes}:
            last = Signal(16, name=f"last_{unit_bytes}")
            m.d.sync += last.eq(header.length - unit_bytes)
            at_last[unit_bytes] = position == last

        def give_up_on_pause():
            with m.If(expired):
                m.next = "IDLE"

        def answer(value):
            m.d.sync += [status.eq(value), position.eq(0)]
            if value != Status.OK:
                m.d.sync += header.length.eq(0)
            m.next = "SEND HEADER"

        def advance(unit_bytes, again, *, then=None):
            """Move `position` on; `again` is the next state until it reaches the length."""
            m.d.sync += position.eq(position + unit_bytes)
            m.next = again
            with m.If(at_last[unit_bytes]):
                if then is None:
                    answer(Status.OK)
                else:
                    m.next = then

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += request_crc.start.eq(1)
                m.d.sync += position.eq(0)
                with m.If(received.valid & (received.payload == SYNC_REQUEST)):
                    m.next = "HEADER"
            with m.State("HEADER"):
                give_up_on_pause()
                with m.If(received.valid):
                    m.d.comb += request_crc.valid.eq(1)
                    m.d.sync += [header.eq(Cat(header.as_value()[8:], received.payload)),
                                 position.eq(position + 1)]
                    with m.If(position == REQUEST_HEADER.size - 2):
                        m.d.sync += position.eq(0)
                        m.next = "HEADER DONE"
            with m.State("HEADER DONE"):
                m.d.comb += received.ready.eq(0)
                m.next = "CRC"
                with m.If(has_payload):
                    m.next = "PAYLOAD"
            with m.State("PAYLOAD"):
                give_up_on_pause()
                with m.If(received.valid):
                    m.d.comb += request_crc.valid.eq(1)
                    with m.If(position < MAX_PAYLOAD):
                        store(received.payload)
                    m.d.sync += position.eq(position + 1)
                    with m.If(at_last[1]):
                        m.d.sync += position.eq(0)
                        m.next = "CRC"
            with m.State("CRC"):
                give_up_on_pause()
                with m.If(received.valid):
                    m.d.comb += request_crc.valid.eq(1)
                    m.d.sync += position.eq(position + 1)
                    with m.If(position == CRC_BYTES - 1):
                        m.d.sync += position.eq(0)
                        m.next = "JUDGE"

            with m.State("JUDGE"):
                with m.If(~request_crc.match_detected):
                    answer(Status.BAD_CRC)
                with m.Elif(operation > max(Operation)):
                    answer(Status.BAD_OPERATION)
                with m.Elif(~length_is_right):
                    answer(Status.BAD_LENGTH)
                with m.Else():
                    with m.Switch(operation):
                        with m.Case(Operation.IDENTIFY):
                            m.d.sync += done_tag.eq(0)
                            answer(Status.OK)
                            m.d.sync += header.length.eq(len(identity))
                        with m.Case(Operation.WRITE_REGISTERS):
                            m.d.sync += done_tag.eq(Cat(header.tag, 1))
                            with m.If(done_tag == Cat(header.tag, 1)):
                                answer(Status.OK)
                                m.d.sync += header.length.eq(0)
                            with m.Else():
                                m.next = "FETCH REGISTER"
                        with m.Case(Operation.READ_REGISTERS):
                            m.next = "ACCESS REGISTER"
                        with m.Case(Operation.WRITE_MEMORY):
                            m.next = "COMMAND WRITE"
                        with m.Case(Operation.READ_MEMORY):
                            m.next = "COMMAND READ"

            with m.State("FETCH REGISTER"):
                fetch("ACCESS REGISTER")
            with m.State("ACCESS REGISTER"):
                m.d.comb += registers.request.valid.eq(1)
                with m.If(registers.request.ready):
                    m.next = "REGISTER RESPONSE"
            with m.State("REGISTER RESPONSE"):
                m.d.comb += registers.response.ready.eq(1)
                with m.If(registers.response.valid):
                    with m.If(operation == Operation.READ_REGISTERS):
                        store(registers.response.payload)
                        advance(4, "ACCESS REGISTER")
                    with m.Else():
                        advance(4, "FETCH REGISTER", then="WRITE DONE")
            with m.State("WRITE DONE"):
                answer(Status.OK)
                m.d.sync += header.length.eq(0)

            with m.State("COMMAND READ"):
                m.d.comb += memory.read_command.valid.eq(1)
                with m.If(memory.read_command.ready):
                    m.next = "READ MEMORY"
            with m.State("READ MEMORY"):
                m.d.comb += memory.read_data.ready.eq(1)
                with m.If(memory.read_data.valid):
                    store(memory.read_data.payload)
                    advance(self._bus_bytes, "READ MEMORY")
            with m.State("COMMAND WRITE"):
                m.d.comb += memory.write_command.valid.eq(1)
                with m.If(memory.write_command.ready):
                    m.next = "WRITE MEMORY"
            with m.State("FETCH WORD"):
                fetch("WRITE MEMORY")
            with m.State("WRITE MEMORY"):
                m.d.comb += memory.write_data.valid.eq(1)
                with m.If(memory.write_data.ready):
                    advance(self._bus_bytes, "FETCH WORD", then="WRITTEN")
            with m.State("WRITTEN"):
                with m.If(memory.written):
                    m.next = "WRITE DONE"

            with m.State("SEND HEADER"):
                m.d.comb += [
                    sent.valid.eq(1),
                    sent.payload.eq(response_header.word_select(position[:3], 8)),
                    begun.eq(position == 0), counts.eq(position != 0),
                ]
                with m.If(sent.ready):
                    m.d.sync += position.eq(position + 1)
                    with m.If(position == RESPONSE_HEADER.size - 1):
                        m.d.sync += position.eq(0)
                        m.next = "LAST BYTE COUNTS"
                        with m.If(header.length != 0):
                            m.next = "FETCH BYTE"
            with m.State("FETCH BYTE"):
                fetch("SEND BYTE")
            with m.State("SEND BYTE"):
                m.d.comb += [
                    sent.valid.eq(1),
                    sent.payload.eq(Mux(
                        operation == Operation.IDENTIFY,
                        Const(int.from_bytes(identity, "little"), 8 * len(identity)).word_select(
                            position[:4], 8),
                        fetched(1))),
                    counts.eq(1),
                ]
                with m.If(sent.ready):
                    m.d.sync += position.eq(position + 1)
                    m.next = "FETCH BYTE"
                    with m.If(at_last[1]):
                        m.d.sync += position.eq(0)
                        m.next = "LAST BYTE COUNTS"
            with m.State("LAST BYTE COUNTS"):
                m.next = "SEND CRC"
            with m.State("SEND CRC"):
                m.d.comb += [sent.valid.eq(1),
                             sent.payload.eq(response_crc.crc.word_select(position[:2], 8))]
                with m.If(sent.ready):
                    m.d.sync += position.eq(position + 1)
                    with m.If(position == CRC_BYTES - 1):
                        m.next = "IDLE"

        m.d.comb += [
            registers.request.p.write.eq(operation == Operation.WRITE_REGISTERS),
            registers.request.p.index.eq(header.address + (position >> 2)),
            registers.request.p.data.eq(fetched(4)),
            memory.read_command.p.address.eq(header.address),
            memory.read_command.p.beats.eq(beats),
            memory.write_command.p.address.eq(header.address),
            memory.write_command.p.beats.eq(beats),
            memory.write_data.payload.eq(fetched(self._bus_bytes)),
        ]
        return m
