"""Everything on the FPGA but clocks and IO cells: accelerator, memory controller and host link."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .arbiter import MemoryArbiter
from .arch.link import FRAME_TIMEOUT_S
from .arch.registers import Register
from .link import HostLink
from .ports import RegisterPort
from .sdram import SDRAMController
from .sdram_pins import SDRAMPins
from .sdram_timing import SDRAMTiming
from .slices import sliced
from .uart import UARTReceiver, UARTTransmitter

__all__ = ["StatusWatch", "System"]

WATCH_INTERVAL = 1 << 16  # cycles


class StatusWatch(wiring.Component):
    """Passes register accesses on, and reads the status register now and then.

    An access passes without latency, except that it may find the port taken by a status read and
    then waits for that one's response.

    Members
    -------
    host : In(RegisterPort())
    device : Out(RegisterPort())
    status : Out(32)
        The status register, at most `interval` cycles and two accesses old.
    """

    host: In(RegisterPort())
    device: Out(RegisterPort())
    status: Out(32)

    def __init__(self, interval: int = WATCH_INTERVAL):
        self._interval = interval
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        request, response = self.device.request, self.device.response
        elapsed = Signal(range(self._interval + 1))
        due = elapsed == self._interval
        with m.If(~due):
            m.d.sync += elapsed.eq(elapsed + 1)
        with m.FSM():
            with m.State("PASS"):
                m.d.comb += [
                    request.valid.eq(self.host.request.valid),
                    request.payload.eq(self.host.request.payload),
                    self.host.request.ready.eq(request.ready),
                ]
                with m.If(request.valid & request.ready):
                    m.next = "HOST RESPONSE"
                with m.Elif(due & ~self.host.request.valid):
                    m.next = "ASK"
            with m.State("HOST RESPONSE"):
                m.d.comb += [
                    self.host.response.valid.eq(response.valid),
                    self.host.response.payload.eq(response.payload),
                    response.ready.eq(self.host.response.ready),
                ]
                with m.If(response.valid & response.ready):
                    m.next = "PASS"
            with m.State("ASK"):
                m.d.comb += [request.valid.eq(1), request.p.index.eq(Register.STATUS)]
                with m.If(request.ready):
                    m.next = "STATUS RESPONSE"
            with m.State("STATUS RESPONSE"):
                m.d.comb += response.ready.eq(1)
                with m.If(response.valid):
                    m.d.sync += [self.status.eq(response.payload), elapsed.eq(0)]
                    m.next = "PASS"
        return m


class System(wiring.Component):
    """An accelerator with its SDRAM and its serial host link.

    Throughput and latency are those of the parts: see `SDRAMController`, `MemoryArbiter` and
    `HostLink`.

    Parameters
    ----------
    accelerator : component with members ``memory: Out(MemoryPort(bus_bytes))`` and
        ``registers: In(RegisterPort())``.
    bus_bytes : width of its memory port.
    clock_hz, baud : integers.
    timing, capture_cycles, rate : as of `SDRAMController`.

    Members
    -------
    rx : In(1)
        Serial line from the host; 1 while idle.
    tx : Out(1)
        Serial line to the host.
    sdram : Out(SDRAMPins(timing, rate))
    ready : Out(1)
        The memory is initialised.
    status : Out(32)
        The accelerator's status register, for display.
    """

    def __init__(self, accelerator: wiring.Component, bus_bytes: int, *, clock_hz: int, baud: int,
                 timing: SDRAMTiming = SDRAMTiming(), capture_cycles: int = 1, rate: int = 1):
        self._accelerator, self._bus_bytes = accelerator, bus_bytes
        self._controller = SDRAMController(bus_bytes, clock_hz, timing, capture_cycles, rate)
        self._link = HostLink(bus_bytes, timing.size_bytes, round(FRAME_TIMEOUT_S * clock_hz))
        self._arbiter = MemoryArbiter(bus_bytes, count=2)
        self._receiver = UARTReceiver(clock_hz, baud)
        self._transmitter = UARTTransmitter(clock_hz, baud)
        super().__init__({
            "rx": In(1, init=1),
            "tx": Out(1, init=1),
            "sdram": Out(SDRAMPins(timing, rate)),
            "ready": Out(1),
            "status": Out(32),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.accelerator = accelerator = self._accelerator
        m.submodules.controller = controller = self._controller
        m.submodules.link = link = self._link
        m.submodules.arbiter = arbiter = self._arbiter
        m.submodules.receiver = receiver = self._receiver
        m.submodules.transmitter = transmitter = self._transmitter
        m.submodules.watch = watch = StatusWatch()

        wiring.connect(m, receiver.bytes, link.received)
        wiring.connect(m, link.sent, transmitter.bytes)
        # The link looks at what it received as late as it can: it meets the rest in registers.
        wiring.connect(m, sliced(m, "requests", link.registers.request), watch.host.request)
        wiring.connect(m, watch.host.response, link.registers.response)
        wiring.connect(m, watch.device, accelerator.registers)
        for client, memory, port in (("accelerator", accelerator.memory, arbiter.clients[0]),
                                     ("link", link.memory, arbiter.clients[1])):
            for name in ("read_command", "write_command", "write_data"):
                wiring.connect(m, sliced(m, f"{client}_{name}", getattr(memory, name)),
                               getattr(port, name))
            wiring.connect(m, sliced(m, f"{client}_read_data", port.read_data), memory.read_data)
            m.d.comb += memory.written.eq(port.written)
        memory = arbiter.memory
        for name in ("read_command", "write_command"):
            wiring.connect(m, getattr(memory, name), getattr(controller.memory, name))
        # The controller lies at the chip's pins, what writes anywhere.
        wiring.connect(m, sliced(m, "write_data", memory.write_data), controller.memory.write_data)
        wiring.connect(m, sliced(m, "read_data", controller.memory.read_data), memory.read_data)
        m.d.comb += memory.written.eq(controller.memory.written)
        wiring.connect(m, controller.pins, wiring.flipped(self.sdram))
        m.d.comb += [
            receiver.line.eq(self.rx), self.tx.eq(transmitter.line),
            self.ready.eq(controller.ready), self.status.eq(watch.status),
        ]
        return m
