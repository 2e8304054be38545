"""Controller of a 16-bit single-data-rate SDRAM behind a memory port."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, fifo, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from .ports import MemoryPort
from .sdram_admission import QUEUE_WORDS, Admission
from .sdram_banks import Banks, Known
from .sdram_chunks import CHUNK_WORDS
from .sdram_pins import RATES, SDRAMPins
from .sdram_timing import SDRAMTiming
from .sdram_words import WordPath

__all__ = ["SDRAMController"]

class SDRAMController(wiring.Component):
    """Serves a memory port from an SDRAM chip whose clock is the system clock, or twice as fast.

    A CAS command moves a bus word as one burst of the chip (of 1 to 8 columns); while it moves,
    the free command slots prepare the bank of the chunk that comes next. Address bits, from the
    lowest: byte, column, bank, row; so consecutive rows lie in different banks, and a burst over
    several rows runs without a gap. Addresses past the end of the chip wrap around.

    There is one command slot in a cycle. With two chip clocks in a cycle, a command counts in the
    first, but a READ in that one which makes the words of its burst arrive in whole cycles; bursts
    start with a cycle and fill it, so nothing shifts data by half a cycle.

    Throughput: 16 bits per chip clock within and across rows, less 2 to 3 % for refresh; changing
    from reading to writing costs CAS latency + 1 chip clocks, and after a run of chunks waiting
    traffic of the other direction gets its turn. A row conflict in one bank costs
    tRP + tRCD; so does each new row where a bus word takes but one cycle, as no command slot is
    free beside it. Latency of a read in an open row: `LATENCY` + `OUTPUT_CYCLES` + `INPUT_CYCLES`
    of the IO cells + (CAS latency + `capture_cycles` - 1 + `bus_bytes` / 2) / `rate`, rounded up,
    cycles from command to first word; a closed row adds tRCD, a conflict tRCD + tRP, a refresh up
    to tRP + tRFC + tRCD. Each of these waits is rounded up to whole cycles.

    Stalls: a chunk of `CHUNK_WORDS` bus words is admitted only when its read data have room, or
    its write data have arrived; so refused read data stop only reads and missing write data
    only writes. `written` pulses when the last word goes to the chip: every read that is
    admitted later sees it.

    Parameters
    ----------
    bus_bytes : width of the memory port in bytes, a power of two from 2 to 64; with rate 2 from 4.
    clock_hz : system clock, from which all waits are derived.
    timing : the chip.
    capture_cycles : chip clocks from the clock edge at which the chip's clock pin would rise with
        phase 0 to the edge that captures a word with CAS latency 1: 1 while output delay, access
        time and input delay fit into what the phase of the chip's clock leaves of one period, else
        2.
    rate : chip clocks in a system clock, 1 or 2.

    Members
    -------
    memory : In(MemoryPort(bus_bytes))
    pins : Out(SDRAMPins(timing, rate))
    ready : Out(1)
        The chip is initialised.
    """

    LATENCY = 9

    def __init__(self, bus_bytes: int, clock_hz: float, timing: SDRAMTiming = SDRAMTiming(),
                 capture_cycles: int = 1, rate: int = 1):
        if bus_bytes not in (2, 4, 8, 16, 32, 64):
            raise ValueError(f"Bus width must be a power of two from 2 to 64 bytes, "
                             f"not {bus_bytes!r}")
        if capture_cycles not in (1, 2):
            raise ValueError(f"Capture cycles must be 1 or 2, not {capture_cycles!r}")
        if rate not in RATES:
            raise ValueError(f"SDRAM rate must be 1 or 2 chip clocks in a system clock, "
                             f"not {rate!r}")
        if bus_bytes // 2 % rate:
            raise ValueError(f"Bus width must be at least {2 * rate} bytes with SDRAM rate {rate}, "
                             f"as the chip moves so many in a cycle, not {bus_bytes!r}. Choose a "
                             f"wider bus or rate 1.")
        self._bus_bytes = bus_bytes
        self._timing = timing
        self._cycles = timing.cycles(clock_hz * rate)
        self._capture_cycles = capture_cycles
        self._rate = rate
        super().__init__({
            "memory": In(MemoryPort(bus_bytes)),
            "pins": Out(SDRAMPins(timing, rate)),
            "ready": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        timing, chip, rate, memory = self._timing, self._cycles, self._rate, self.memory

        burst = min(self._bus_bytes // 2, 8)  # columns of one CAS command
        parts = self._bus_bytes // 2 // burst  # CAS commands of one bus word
        bursts_per_row = (1 << timing.column_bits) // burst

        # The first word of a burst is captured this many chip clocks after the start of the cycle
        # in which its READ is at the pads: a whole number of cycles, by the choice of the slot.
        read_slot = -(chip.cas - 1 + self._capture_cycles) % rate
        captured = read_slot + chip.cas - 1 + self._capture_cycles

        # --- Data FIFOs, and what is promised of them ---------------------------------------------

        # One word deeper than the promises, for the FIFO's output register.
        m.submodules.reads = reads = fifo.SyncFIFOBuffered(
            width=8 * self._bus_bytes, depth=QUEUE_WORDS + 1)
        m.submodules.writes = writes = fifo.SyncFIFOBuffered(
            width=8 * self._bus_bytes, depth=QUEUE_WORDS + 1)
        m.d.comb += [
            memory.read_data.payload.eq(reads.r_data),
            memory.read_data.valid.eq(reads.r_rdy),
            reads.r_en.eq(memory.read_data.ready),
        ]
        write_room = Signal(range(QUEUE_WORDS + 1), init=QUEUE_WORDS)
        write_arrives = Signal()
        m.d.comb += [
            memory.write_data.ready.eq(write_room != 0),
            write_arrives.eq(memory.write_data.valid & memory.write_data.ready),
            writes.w_data.eq(memory.write_data.payload),
            writes.w_en.eq(write_arrives),
        ]
        m.d.sync += write_room.eq(write_room - write_arrives + writes.r_en)

        # --- Admission: chunks of both directions into the slot "following" -----------------------

        m.submodules.admission = admission = Admission(self._bus_bytes)
        wiring.connect(m, wiring.flipped(memory.read_command), admission.read)
        wiring.connect(m, wiring.flipped(memory.write_command), admission.write)
        m.d.comb += [
            admission.read_leaves.eq(memory.read_data.valid & memory.read_data.ready),
            admission.write_arrives.eq(write_arrives),
        ]

        slot = data.StructLayout({
            "write": 1,
            "burst": range(bursts_per_row),
            "bank": timing.bank_bits,
            "row": timing.row_bits,
            "left": range(CHUNK_WORDS * parts + 1),  # CAS commands
            "last": 1,
        })
        following, current = Signal(slot), Signal(slot)
        following_valid, current_valid = Signal(), Signal()
        # What is known of the bank of either slot, as of a cycle ago, and whether it was this slot.
        following_known, current_known = Signal(Known), Signal(Known)
        following_checked = Signal()
        promote = Signal()

        chunk, admit = admission.admitted.p.chunk, Signal()
        m.d.comb += [
            # Not yet in the cycle of `promote`: that is known late in it.
            admission.admitted.ready.eq(~following_valid),
            admit.eq(admission.admitted.valid & ~following_valid),
        ]

        # --- What the chip allows -----------------------------------------------------------------

        m.submodules.banks = banks = Banks(timing, chip, rate, burst, read_slot)
        for asked, place in zip(banks.asked, (current, following)):
            m.d.comb += [asked.bank.eq(place.bank), asked.row.eq(place.row)]

        # --- Command choice -----------------------------------------------------------------------

        command = banks.command
        cas, activate, precharge, precharge_all, refresh, set_mode = (
            command.cas, command.activate, command.precharge, command.precharge_all,
            command.refresh, command.set_mode)
        finished = Signal()
        m.d.comb += [
            command.write.eq(current.write), command.cas_bank.eq(current.bank),
            finished.eq(cas & (current.left == 1)),
            promote.eq(following_valid & (~current_valid | finished)),
        ]

        # What is known lags a command to a bank, and a new slot, by a cycle.
        settled = Signal()
        m.d.sync += settled.eq(~(activate | precharge | promote
                                 | precharge_all | refresh | set_mode))

        def prepare(place, known):
            m.d.comb += [command.bank.eq(place.bank), command.row.eq(place.row)]
            with m.If(known.open):
                m.d.comb += precharge.eq(known.precharge & settled)
            with m.Else():
                m.d.comb += activate.eq(known.activate & banks.may_activate & settled)

        refresh_interval, power_up_cycles = chip.refresh_interval // rate, -(-chip.power_up // rate)
        refresh_timer = Signal(range(refresh_interval))
        refresh_due = Signal()
        power_up = Signal(range(power_up_cycles), init=power_up_cycles - 1)
        refreshes = Signal(range(timing.power_up_refreshes), init=timing.power_up_refreshes - 1)

        with m.FSM():
            with m.State("POWER UP"):
                m.d.sync += power_up.eq(power_up - 1)
                with m.If(power_up == 0):
                    m.next = "PRECHARGE"
            with m.State("PRECHARGE"):
                m.d.comb += precharge_all.eq(banks.may_precharge_all)
                with m.If(precharge_all):
                    m.next = "REFRESH"
            with m.State("REFRESH"):
                m.d.comb += refresh.eq(banks.may_refresh)
                with m.If(refresh):
                    with m.If(self.ready):
                        m.next = "RUN"
                    with m.Elif(refreshes == 0):
                        m.next = "SET MODE"
                    with m.Else():
                        m.d.sync += refreshes.eq(refreshes - 1)
            with m.State("SET MODE"):
                m.d.comb += set_mode.eq(banks.may_refresh)
                with m.If(set_mode):
                    m.d.sync += self.ready.eq(1)
                    m.next = "RUN"
            with m.State("RUN"):
                with m.If(refresh_due):
                    m.next = "PRECHARGE"
                with m.Elif(current_valid & current_known.hit & banks.may_cas
                            & current_known.cas & (~current.write | banks.may_write)):
                    m.d.comb += cas.eq(1)
                with m.Elif(current_valid & ~current_known.hit):
                    prepare(current, current_known)
                with m.Elif(following_valid & following_checked & ~following_known.hit
                            & (~current_valid | (following.bank != current.bank))):
                    prepare(following, following_known)

        with m.If(self.ready):
            m.d.sync += refresh_timer.eq(Mux(refresh_timer == 0, refresh_interval - 1,
                                             refresh_timer - 1))
            with m.If(refresh_timer == 0):
                m.d.sync += refresh_due.eq(1)
            with m.Elif(refresh):
                m.d.sync += refresh_due.eq(0)

        # --- Consequences of the command ----------------------------------------------------------

        # A hit cannot come of a bank that was just closed: its row was another one.
        m.d.sync += [current_known.eq(banks.known[0]), following_known.eq(banks.known[1]),
                     following_checked.eq(1)]
        with m.If(cas):
            m.d.sync += [current.burst.eq(current.burst + 1), current.left.eq(current.left - 1)]
            with m.If(finished):
                m.d.sync += current_valid.eq(0)
        with m.If(promote):
            m.d.sync += [current.eq(following), current_valid.eq(1),
                         current_known.eq(banks.known[1]), following_valid.eq(0)]
        with m.If(admit):
            m.d.sync += [
                Cat(following.burst, following.bank, following.row).eq(
                    chunk.word << exact_log2(parts)),
                following.write.eq(admission.admitted.p.write),
                following.left.eq(chunk.words << exact_log2(parts)),
                following.last.eq(chunk.last),
                following_valid.eq(1),
                following_checked.eq(0),
            ]
        m.d.sync += self.memory.written.eq(finished & current.write & current.last)

        # --- Pins ---------------------------------------------------------------------------------

        pins = self.pins
        all_banks = 1 << 10  # A10 of a PRECHARGE
        mode = chip.cas << 4 | exact_log2(burst)  # sequential bursts, also for writes
        # A command is known late in its cycle, and the pins and the words are far away: it reaches
        # them from a register.
        decided = Signal(data.StructLayout({
            "ras": 1, "cas": 1, "we": 1, "bank": timing.bank_bits, "address": len(pins.address)}))
        reading = ~decided.ras & decided.cas & ~decided.we
        m.d.sync += [
            decided.ras.eq(activate | precharge | precharge_all | refresh | set_mode),
            decided.cas.eq(cas | refresh | set_mode),
            decided.we.eq((cas & current.write) | precharge | precharge_all | set_mode),
            decided.bank.eq(Mux(set_mode, 0, Mux(cas, current.bank, command.bank))),
            pins.clock_enable.eq(1),
            pins.cs.eq(Mux(reading, 1 << read_slot, 1) if read_slot else 1),
            pins.dqm.eq(Mux(self.ready, 0, 0b11)),
            *(pins_part.eq(decided[name]) for name, pins_part in (
                ("ras", pins.ras), ("cas", pins.cas), ("we", pins.we), ("bank", pins.bank),
                ("address", pins.address))),
        ]
        with m.If(cas):
            m.d.sync += decided.address.eq(current.burst << exact_log2(burst))
        with m.Elif(activate):
            m.d.sync += decided.address.eq(command.row)
        with m.Elif(set_mode):
            m.d.sync += decided.address.eq(mode)
        with m.Else():
            m.d.sync += decided.address.eq(Mux(precharge_all, all_banks, 0))

        m.submodules.words = words = WordPath(parts, burst, rate, captured)
        m.d.comb += [
            words.read.eq(cas & ~current.write), words.write.eq(cas & current.write),
            words.part.eq(current.burst[:exact_log2(parts)]), words.free.eq(banks.may_cas),
            words.word_in.eq(writes.r_data), writes.r_en.eq(words.taken),
            reads.w_data.eq(words.word_out), reads.w_en.eq(words.arrived),
            pins.dq_o.eq(words.dq_o), pins.dq_oe.eq(words.dq_oe), words.dq_i.eq(pins.dq_i),
        ]
        return m
