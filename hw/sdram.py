"""Controller of a 16-bit single-data-rate SDRAM behind a memory port."""

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, fifo, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from .ports import MemoryPort
from .sdram_chunks import CHUNK_WORDS, Chunk, Chunker
from .sdram_pins import INPUT_CYCLES, OUTPUT_CYCLES, RATES, SDRAMPins
from .sdram_timing import SDRAMTiming

__all__ = ["SDRAMController"]

FIFO_WORDS = 32  # bus words of each data FIFO: one chunk on the pins, one being admitted
RUN_CHUNKS = 4  # chunks before waiting traffic of the other direction gets its turn


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
    from reading to writing costs CAS latency + 1 chip clocks, and after `RUN_CHUNKS` chunks waiting
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
        burst_cycles = burst // rate

        # The first word of a burst is captured this many chip clocks after the start of the cycle
        # in which its READ is at the pads: a whole number of cycles, by the choice of the slot.
        read_slot = -(chip.cas - 1 + self._capture_cycles) % rate
        captured = read_slot + chip.cas - 1 + self._capture_cycles

        # --- Data FIFOs, and what is promised of them ---------------------------------------------

        # One word deeper than the promises, for the FIFO's output register.
        m.submodules.reads = reads = fifo.SyncFIFOBuffered(
            width=8 * self._bus_bytes, depth=FIFO_WORDS + 1)
        m.submodules.writes = writes = fifo.SyncFIFOBuffered(
            width=8 * self._bus_bytes, depth=FIFO_WORDS + 1)
        m.d.comb += [
            memory.read_data.payload.eq(reads.r_data),
            memory.read_data.valid.eq(reads.r_rdy),
            reads.r_en.eq(memory.read_data.ready),
        ]
        write_room = Signal(range(FIFO_WORDS + 1), init=FIFO_WORDS)
        write_words = Signal(range(FIFO_WORDS + 1))  # arrived and not yet part of an admitted chunk
        read_room = Signal(range(FIFO_WORDS + 1), init=FIFO_WORDS)
        write_arrives = Signal()
        m.d.comb += [
            memory.write_data.ready.eq(write_room != 0),
            write_arrives.eq(memory.write_data.valid & memory.write_data.ready),
            writes.w_data.eq(memory.write_data.payload),
            writes.w_en.eq(write_arrives),
        ]
        m.d.sync += write_room.eq(write_room - write_arrives + writes.r_en)

        # --- Admission: chunks of both directions into the slot "following" -----------------------

        m.submodules.read_chunks = read_chunks = Chunker(self._bus_bytes)
        m.submodules.write_chunks = write_chunks = Chunker(self._bus_bytes)
        wiring.connect(m, wiring.flipped(memory.read_command), read_chunks.burst)
        wiring.connect(m, wiring.flipped(memory.write_command), write_chunks.burst)
        read, write = read_chunks.chunk, write_chunks.chunk

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
        known = data.StructLayout({"hit": 1, "open": 1, "precharge": 1, "activate": 1, "cas": 1})
        following_known, current_known = Signal(known), Signal(known)
        following_checked = Signal()
        promote = Signal()

        read_fits, write_fits = Signal(), Signal()
        writing = Signal()  # direction of the last admitted chunk
        run = Signal(range(RUN_CHUNKS))
        change = Signal()
        admit_read, admit_write = Signal(), Signal()
        free = ~following_valid  # not yet in the cycle of `promote`: that is known late in it
        m.d.comb += [
            change.eq(Mux(writing, read_fits & (~write_fits | (run == 0)),
                          write_fits & (~read_fits | (run == 0)))),
            admit_read.eq(free & read_fits & (writing == change)),
            admit_write.eq(free & write_fits & (writing != change)),
            read.ready.eq(admit_read),
            write.ready.eq(admit_write),
        ]
        m.d.sync += [
            read_room.eq(read_room - Mux(admit_read, read.p.words, 0)
                         + (memory.read_data.valid & memory.read_data.ready)),
            write_words.eq(write_words - Mux(admit_write, write.p.words, 0) + write_arrives),
        ]
        # Whether a chunk fits is known a cycle late: room and words only grow until it is admitted.
        m.d.sync += [
            read_fits.eq(read.valid & (read_room >= read.p.words) & ~admit_read),
            write_fits.eq(write.valid & (write_words >= write.p.words) & ~admit_write),
        ]
        chunk = Mux(admit_write, write.payload.as_value(), read.payload.as_value())
        chunk = data.View(Chunk, chunk)
        with m.If(admit_read | admit_write):
            m.d.sync += writing.eq(admit_write)
            with m.If(change):
                m.d.sync += run.eq(RUN_CHUNKS - 1)
            with m.Elif(run != 0):
                m.d.sync += run.eq(run - 1)

        # --- What the chip allows -----------------------------------------------------------------

        banks = range(1 << timing.bank_bits)

        def in_cycles(chip_clocks: int) -> int:
            """The shortest wait of whole cycles, between commands that count in a first slot."""
            return -(-chip_clocks // rate)

        rcd, rp, ras, rc, rfc, rrd, mode_wait = map(in_cycles, (
            chip.rcd, chip.rp, chip.ras, chip.rc, chip.rfc, chip.rrd, chip.mode))
        read_to_precharge = in_cycles(read_slot + burst)
        write_to_precharge = in_cycles(burst - 1 + chip.wr)
        read_to_write = in_cycles(read_slot + chip.cas + burst + 1)
        refresh_interval = chip.refresh_interval // rate
        power_up_cycles = in_cycles(chip.power_up)

        open_row = Array(Signal(timing.row_bits, name=f"open_row{b}") for b in banks)
        is_open = Signal(len(banks))
        before_cas = [Countdown(m, rcd, f"before_cas{b}") for b in banks]
        before_precharge = [Countdown(m, max(ras, read_to_precharge, write_to_precharge),
                                      f"before_precharge{b}") for b in banks]
        before_activate = [Countdown(m, max(rc, rfc, mode_wait), f"before_activate{b}")
                           for b in banks]
        between_cas = Countdown(m, burst_cycles, "between_cas")
        before_write = Countdown(m, read_to_write, "before_write")
        between_activates = Countdown(m, rrd, "between_activates")

        cas_allowed = Cat(t.ready for t in before_cas)
        precharge_allowed = Cat(t.ready for t in before_precharge)
        activate_allowed = Cat(t.ready for t in before_activate)

        def look(s):
            """Hit: its row is open; the rest: what may be done to its bank."""
            is_open_here = is_open.bit_select(s.bank, 1)
            return Cat(is_open_here & (open_row[s.bank] == s.row), is_open_here,
                       *(allowed.bit_select(s.bank, 1)
                         for allowed in (precharge_allowed, activate_allowed, cas_allowed)))

        # --- Command choice -----------------------------------------------------------------------

        cas, activate, precharge, precharge_all, refresh, set_mode = (
            Signal(name=name)
            for name in ("cas", "activate", "precharge", "precharge_all", "refresh", "set_mode"))
        preparing = Signal(slot)  # whose row `activate` and `precharge` are about
        finished = Signal()
        m.d.comb += [
            finished.eq(cas & (current.left == 1)),
            promote.eq(following_valid & (~current_valid | finished)),
        ]

        # What is known lags a command to a bank, and a new slot, by a cycle.
        settled = Signal()
        m.d.sync += settled.eq(~(activate | precharge | promote
                                 | precharge_all | refresh | set_mode))

        def prepare(known):
            with m.If(known.open):
                m.d.comb += precharge.eq(known.precharge & settled)
            with m.Else():
                m.d.comb += activate.eq(known.activate & between_activates.ready & settled)

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
                m.d.comb += precharge_all.eq(precharge_allowed.all())
                with m.If(precharge_all):
                    m.next = "REFRESH"
            with m.State("REFRESH"):
                m.d.comb += refresh.eq(activate_allowed.all())
                with m.If(refresh):
                    with m.If(self.ready):
                        m.next = "RUN"
                    with m.Elif(refreshes == 0):
                        m.next = "SET MODE"
                    with m.Else():
                        m.d.sync += refreshes.eq(refreshes - 1)
            with m.State("SET MODE"):
                m.d.comb += set_mode.eq(activate_allowed.all())
                with m.If(set_mode):
                    m.d.sync += self.ready.eq(1)
                    m.next = "RUN"
            with m.State("RUN"):
                with m.If(refresh_due):
                    m.next = "PRECHARGE"
                with m.Elif(current_valid & current_known.hit & between_cas.ready
                            & current_known.cas & (~current.write | before_write.ready)):
                    m.d.comb += cas.eq(1)
                with m.Elif(current_valid & ~current_known.hit):
                    m.d.comb += preparing.eq(current)
                    prepare(current_known)
                with m.Elif(following_valid & following_checked & ~following_known.hit
                            & (~current_valid | (following.bank != current.bank))):
                    m.d.comb += preparing.eq(following)
                    prepare(following_known)

        with m.If(self.ready):
            m.d.sync += refresh_timer.eq(Mux(refresh_timer == 0, refresh_interval - 1,
                                             refresh_timer - 1))
            with m.If(refresh_timer == 0):
                m.d.sync += refresh_due.eq(1)
            with m.Elif(refresh):
                m.d.sync += refresh_due.eq(0)

        # --- Consequences of the command ----------------------------------------------------------

        # A hit cannot come of a bank that was just closed: its row was another one.
        m.d.sync += [current_known.eq(look(current)), following_known.eq(look(following)),
                     following_checked.eq(1)]
        with m.If(cas):
            m.d.sync += [current.burst.eq(current.burst + 1), current.left.eq(current.left - 1)]
            between_cas.start(burst_cycles)
            with m.If(~current.write):
                before_write.start(read_to_write)
            with m.If(finished):
                m.d.sync += current_valid.eq(0)
        with m.If(promote):
            m.d.sync += [current.eq(following), current_valid.eq(1),
                         current_known.eq(look(following)), following_valid.eq(0)]
        with m.If(admit_read | admit_write):
            m.d.sync += [
                Cat(following.burst, following.bank, following.row).eq(
                    chunk.word << exact_log2(parts)),
                following.write.eq(admit_write),
                following.left.eq(chunk.words << exact_log2(parts)),
                following.last.eq(chunk.last),
                following_valid.eq(1),
                following_checked.eq(0),
            ]
        m.d.sync += self.memory.written.eq(finished & current.write & current.last)

        for bank in banks:
            with m.If(cas & (current.bank == bank)):
                with m.If(current.write):
                    before_precharge[bank].start(write_to_precharge)
                with m.Else():
                    before_precharge[bank].start(read_to_precharge)
            with m.If(activate & (preparing.bank == bank)):
                m.d.sync += [is_open[bank].eq(1), open_row[bank].eq(preparing.row)]
                before_cas[bank].start(rcd)
                before_precharge[bank].start(ras)
                before_activate[bank].start(rc)
            with m.If((precharge & (preparing.bank == bank)) | precharge_all):
                m.d.sync += is_open[bank].eq(0)
                before_activate[bank].start(rp)
            with m.If(refresh):
                before_activate[bank].start(rfc)
            with m.If(set_mode):
                before_activate[bank].start(mode_wait)
        with m.If(activate):
            between_activates.start(rrd)

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
            decided.bank.eq(Mux(set_mode, 0, Mux(cas, current.bank, preparing.bank))),
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
            m.d.sync += decided.address.eq(preparing.row)
        with m.Elif(set_mode):
            m.d.sync += decided.address.eq(mode)
        with m.Else():
            m.d.sync += decided.address.eq(Mux(precharge_all, all_banks, 0))

        part = current.burst[:exact_log2(parts)]  # of its bus word
        out = Signal(16 * burst)
        writing_part, write_starts, write_ends = Signal.like(part), Signal(), Signal()
        m.d.comb += pins.dq_o.eq(out[:16 * rate])
        m.d.sync += [writing_part.eq(part), write_starts.eq(cas & current.write),
                     write_ends.eq(between_cas.ready),
                     writes.r_en.eq(cas & current.write & part.all())]
        with m.If(write_starts):
            m.d.sync += [out.eq(writes.r_data.word_select(writing_part, len(out))),
                         pins.dq_oe.eq(1)]
        with m.Else():
            m.d.sync += out.eq(out >> 16 * rate)
            with m.If(write_ends):
                m.d.sync += pins.dq_oe.eq(0)

        # From the choice of a READ to its last columns in `dq_i`: two cycles to `pins`, the way
        # out, chip and burst less the cycle of the last columns, the way in.
        arriving = Signal(2 + OUTPUT_CYCLES[rate] + (captured + burst) // rate - 1
                          + INPUT_CYCLES[rate])
        earlier = Signal(16 * (burst - rate))  # columns of the burst before the present ones
        columns = Cat(earlier, pins.dq_i)
        word = Signal(8 * self._bus_bytes)
        arrived = Signal(range(parts))
        m.d.sync += [
            arriving.eq(Cat(cas & ~current.write, arriving)),
            earlier.eq(columns[16 * rate:]),
            reads.w_en.eq(arriving[-1] & (arrived == parts - 1)),
        ]
        m.d.comb += reads.w_data.eq(word)
        with m.If(arriving[-1]):
            m.d.sync += [word.eq(Cat(word, columns)[len(columns):]), arrived.eq(arrived + 1)]

        return m
