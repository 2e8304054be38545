"""Serial line, 8 data bits, no parity, 1 stop bit."""

from math import gcd

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

__all__ = ["BitClock", "UARTReceiver", "UARTTransmitter"]


class BitClock(wiring.Component):
    """Ticks at the baud rate on average, to the cycle, for any ratio of clock and baud rate.

    The first tick comes a bit after `restart`, or half a bit, the next ones a bit apart.

    Parameters
    ----------
    clock_hz, baud : system clock and bits per second, integers; at least 4 cycles a bit.
    half : the first tick comes after half a bit.

    Members
    -------
    restart : In(1)
    tick : Out(1)
    """

    restart: In(1)
    tick: Out(1)

    def __init__(self, clock_hz: int, baud: int, *, half: bool):
        if not 0 < 4 * baud <= clock_hz:
            raise ValueError(f"Baud rate must be between 1 and a fourth of the clock, "
                             f"{clock_hz // 4}, not {baud!r}. Choose a lower rate.")
        divisor = gcd(clock_hz, baud)
        self._period, self._step = clock_hz // divisor, baud // divisor
        self._start = self._period // 2 if half else 0
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        phase = Signal(range(self._period))
        wrap = self._period - self._step
        m.d.comb += self.tick.eq(phase >= wrap)
        m.d.sync += phase.eq(Mux(self.tick, phase - wrap, phase + self._step))
        with m.If(self.restart):
            m.d.sync += phase.eq(self._start)
        return m


class UARTReceiver(wiring.Component):
    """Bytes from a serial line.

    A byte appears in the middle of its stop bit; one whose stop bit is 0 is dropped, and the line
    must be 1 before the next one. There is no
    back-pressure on a line: a byte that is not taken before the next one arrives is lost.

    Members
    -------
    line : In(1)
        Asynchronous; 1 while idle.
    bytes : Out(stream.Signature(8))
    """

    line: In(1, init=1)
    bytes: Out(stream.Signature(8))

    def __init__(self, clock_hz: int, baud: int):
        self._clock = BitClock(clock_hz, baud, half=True)
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.clock = clock = self._clock
        line = Signal(init=1)
        m.submodules += FFSynchronizer(self.line, line, init=1)

        shift = Signal(9)  # start bit and data, newest on top
        bits_left = Signal(range(11))
        was_idle = Signal()  # only a falling edge starts a byte: not the rest of a long 0
        with m.If(self.bytes.ready):
            m.d.sync += self.bytes.valid.eq(0)
        with m.If(bits_left == 0):
            m.d.comb += clock.restart.eq(1)
            m.d.sync += was_idle.eq(line)
            with m.If(~line & was_idle):
                m.d.sync += bits_left.eq(10)
        with m.Elif(clock.tick):
            m.d.sync += [shift.eq(Cat(shift[1:], line)), bits_left.eq(bits_left - 1),
                         was_idle.eq(line)]
            with m.If((bits_left == 10) & line):
                m.d.sync += bits_left.eq(0)  # a spike, not a start bit
            with m.If((bits_left == 1) & line):
                m.d.sync += [self.bytes.payload.eq(shift[1:]), self.bytes.valid.eq(1)]
        return m


class UARTTransmitter(wiring.Component):
    """Bytes to a serial line, without a gap while there are bytes.

    Members
    -------
    bytes : In(stream.Signature(8))
    line : Out(1)
        1 while idle.
    """

    bytes: In(stream.Signature(8))
    line: Out(1, init=1)

    def __init__(self, clock_hz: int, baud: int):
        self._clock = BitClock(clock_hz, baud, half=False)
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.clock = clock = self._clock
        shift = Signal(9, init=0x1FF)
        bits_left = Signal(range(11))
        m.d.comb += [
            self.line.eq(shift[0]),
            clock.restart.eq(bits_left == 0),
            # Where the last bit ends the next byte may start at once.
            self.bytes.ready.eq((bits_left == 0) | ((bits_left == 1) & clock.tick)),
        ]
        with m.If(clock.tick & (bits_left != 0)):
            m.d.sync += [shift.eq(Cat(shift[1:], 1)), bits_left.eq(bits_left - 1)]
        with m.If(self.bytes.valid & self.bytes.ready):
            m.d.sync += [shift.eq(Cat(0, self.bytes.payload)), bits_left.eq(10)]
        return m
