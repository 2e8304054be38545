"""What an SDRAM chip allows: its open rows, and the waits between commands."""

from amaranth import Array, Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .sdram_timing import SDRAMCycles, SDRAMTiming

__all__ = ["Banks", "Command", "Known", "Place"]


class Command(data.StructLayout):
    """One of the strobes is 1, or none."""

    def __init__(self, timing: SDRAMTiming):
        super().__init__({
            "cas": 1, "write": 1, "cas_bank": timing.bank_bits,  # READ or WRITE, and its bank
            "activate": 1, "precharge": 1, "bank": timing.bank_bits, "row": timing.row_bits,
            "precharge_all": 1, "refresh": 1, "set_mode": 1,
        })


class Place(data.StructLayout):
    """A row of a bank."""

    def __init__(self, timing: SDRAMTiming):
        super().__init__({"bank": timing.bank_bits, "row": timing.row_bits})


class Known(data.Struct):
    """Of a place: its row is open, a row of its bank is, and what may be done to the bank."""

    hit: 1
    open: 1
    precharge: 1
    activate: 1
    cas: 1


class Countdown:
    """Cycles until something is allowed: `ready` is 1 from `n` cycles after `start(n)` on."""

    def __init__(self, m: Module, longest: int, name: str):
        self._m = m
        self._left = Signal(range(longest), name=name)
        self.ready = Signal(init=1, name=f"{name}_ready")
        with m.If(~self.ready):
            m.d.sync += [self._left.eq(self._left - 1), self.ready.eq(self._left == 1)]

    def start(self, cycles: int):
        """Wait `cycles` from now, or longer where a longer wait is already running."""
        with self._m.If(self._left < cycles):
            self._m.d.sync += [self._left.eq(cycles - 1), self.ready.eq(cycles == 1)]


class Banks(wiring.Component):
    """Follows the commands that a chip is given, and says what it allows next.

    What is said holds for the present cycle; a command counts from the next one on. Waits are of
    whole cycles, rounded up. The rules of single-data-rate SDRAM (JEDEC 21-C, 3.11.5).

    Parameters
    ----------
    timing, chip : the chip, and its rules in cycles of its clock.
    rate : these in a system clock.
    burst : columns of one READ or WRITE.
    read_slot : chip clock of its cycle in which a READ counts; other commands count in the first.

    Members
    -------
    command : In(Command(timing))
        Given in this cycle.
    asked : In(data.ArrayLayout(Place(timing), 2))
    known : Out(data.ArrayLayout(Known, 2))
        Of the places asked for.
    may_cas : Out(1)
        The data pins are free for another burst.
    may_write : Out(1)
        A burst that was read has left them.
    may_activate : Out(1)
        Some bank, as far as the others go.
    may_precharge_all : Out(1)
    may_refresh : Out(1)
        Or set the mode.
    """

    def __init__(self, timing: SDRAMTiming, chip: SDRAMCycles, rate: int, burst: int,
                 read_slot: int):
        self._timing, self._chip, self._rate = timing, chip, rate
        self._burst, self._read_slot = burst, read_slot
        super().__init__({
            "command": In(Command(timing)),
            "asked": In(data.ArrayLayout(Place(timing), 2)),
            "known": Out(data.ArrayLayout(Known, 2)),
            "may_cas": Out(1), "may_write": Out(1), "may_activate": Out(1),
            "may_precharge_all": Out(1), "may_refresh": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        chip, rate, burst, command = self._chip, self._rate, self._burst, self.command

        def in_cycles(chip_clocks: int) -> int:
            return -(-chip_clocks // rate)

        rcd, rp, ras, rc, rfc, rrd, mode = map(in_cycles, (
            chip.rcd, chip.rp, chip.ras, chip.rc, chip.rfc, chip.rrd, chip.mode))
        read_to_precharge = in_cycles(self._read_slot + burst)
        write_to_precharge = in_cycles(burst - 1 + chip.wr)
        read_to_write = in_cycles(self._read_slot + chip.cas + burst + 1)

        banks = range(1 << self._timing.bank_bits)
        open_row = Array(Signal(self._timing.row_bits, name=f"open_row{b}") for b in banks)
        is_open = Signal(len(banks))
        before_cas = [Countdown(m, rcd, f"before_cas{b}") for b in banks]
        before_precharge = [Countdown(m, max(ras, read_to_precharge, write_to_precharge),
                                      f"before_precharge{b}") for b in banks]
        before_activate = [Countdown(m, max(rc, rfc, mode), f"before_activate{b}") for b in banks]
        between_cas = Countdown(m, burst // rate, "between_cas")
        before_write = Countdown(m, read_to_write, "before_write")
        between_activates = Countdown(m, rrd, "between_activates")

        cas_allowed = Cat(t.ready for t in before_cas)
        precharge_allowed = Cat(t.ready for t in before_precharge)
        activate_allowed = Cat(t.ready for t in before_activate)
        for place, known in zip(self.asked, self.known):
            m.d.comb += [
                known.open.eq(is_open.bit_select(place.bank, 1)),
                known.hit.eq(known.open & (open_row[place.bank] == place.row)),
                known.precharge.eq(precharge_allowed.bit_select(place.bank, 1)),
                known.activate.eq(activate_allowed.bit_select(place.bank, 1)),
                known.cas.eq(cas_allowed.bit_select(place.bank, 1)),
            ]
        m.d.comb += [
            self.may_cas.eq(between_cas.ready), self.may_write.eq(before_write.ready),
            self.may_activate.eq(between_activates.ready),
            self.may_precharge_all.eq(precharge_allowed.all()),
            self.may_refresh.eq(activate_allowed.all()),
        ]

        with m.If(command.cas):
            between_cas.start(burst // rate)
            with m.If(~command.write):
                before_write.start(read_to_write)
        with m.If(command.activate):
            between_activates.start(rrd)
        for bank in banks:
            with m.If(command.cas & (command.cas_bank == bank)):
                with m.If(command.write):
                    before_precharge[bank].start(write_to_precharge)
                with m.Else():
                    before_precharge[bank].start(read_to_precharge)
            with m.If(command.activate & (command.bank == bank)):
                m.d.sync += [is_open[bank].eq(1), open_row[bank].eq(command.row)]
                before_cas[bank].start(rcd)
                before_precharge[bank].start(ras)
                before_activate[bank].start(rc)
            with m.If((command.precharge & (command.bank == bank)) | command.precharge_all):
                m.d.sync += is_open[bank].eq(0)
                before_activate[bank].start(rp)
            with m.If(command.refresh):
                before_activate[bank].start(rfc)
            with m.If(command.set_mode):
                before_activate[bank].start(mode)
        return m
