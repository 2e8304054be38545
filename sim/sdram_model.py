"""An SDRAM chip at its pins, which checks every timing rule: the Python twin of sdram_chip.h."""

from collections import deque

from moeware.hw.sdram_timing import SDRAMTiming

__all__ = ["SDRAMChip", "SDRAMViolation"]

COMMANDS = {(0, 0, 0): "NOP", (1, 0, 0): "ACTIVATE", (0, 1, 0): "READ", (0, 1, 1): "WRITE",
            (1, 0, 1): "PRECHARGE", (1, 1, 0): "REFRESH", (1, 1, 1): "SET MODE"}


class SDRAMViolation(AssertionError):
    """A rule of the chip was broken; the message names the rule, the command and the cycle."""


class SDRAMChip:
    """A 16-bit chip, stepped once per clock.

    Parameters
    ----------
    timing : its rules.
    clock_hz : its clock.
    capture_cycles : as of `SDRAMController`: how late the controller samples a read word.

    Attributes
    ----------
    cells : dict from word address (bank, row, column from the top) to 16-bit value; unwritten
        cells read as 0xDEAD.
    """

    def __init__(self, timing: SDRAMTiming, clock_hz: float, capture_cycles: int = 1):
        self.timing = timing
        self.cells: dict[int, int] = {}
        self.period = 1e9 / clock_hz
        self.capture_cycles = capture_cycles
        self.cycle = 0
        self.refreshes = 0
        self.counted_from: float | None = None
        banks = range(1 << timing.bank_bits)
        never = float("-inf")
        self.open_row: list[int | None] = [None for _ in banks]
        self.activated = [never for _ in banks]
        self.precharged = [never for _ in banks]
        self.last_word = [never for _ in banks]  # written to the bank
        self.read_end = [-1 for _ in banks]  # first cycle at which a PRECHARGE cuts no read short
        self.refreshed = self.mode_set = never
        self.mode: tuple[int, int] | None = None  # CAS latency, burst length
        self.output: deque[tuple[int, int]] = deque()  # (clock edge at which it is valid, word)
        self.writing: tuple[int, int, int] | None = None  # bank, cell, words left

    def step(self, pins: dict[str, int]) -> int:
        """One rising edge of the chip's clock with `pins` (named as `SDRAMPins`).

        Returns the value of `dq_i` in the cycle that follows the one of `pins`; where the chip has
        two clocks in a cycle, the part of it that belongs to this one.

        Raises
        ------
        SDRAMViolation
        """
        now = self.cycle * self.period
        command = "NOP"
        if pins["clock_enable"] and pins["cs"]:
            strobes = pins["ras"], pins["cas"], pins["we"]
            self.require(strobes in COMMANDS, f"no such command: {strobes}")
            command = COMMANDS[strobes]
        if command != "NOP":
            self.execute(command, pins["bank"], pins["address"], now)
        self.write_column(pins, now)
        self.check_refresh(now)

        reading = any(edge == self.cycle for edge, _ in self.output)
        self.require(not (pins["dq_oe"] and (reading or self.output_at(self.cycle - 1))),
                     "bus contention: the chip still drives DQ")
        sampled = self.cycle + 3 - self.capture_cycles
        value = next((word for edge, word in self.output if edge == sampled), 0xBAD0)
        while self.output and self.output[0][0] < self.cycle - 2:
            self.output.popleft()
        self.cycle += 1
        return value

    def output_at(self, cycle: int) -> bool:
        return any(edge == cycle for edge, _ in self.output)

    def require(self, condition: bool, rule: str):
        if not condition:
            raise SDRAMViolation(f"SDRAM at cycle {self.cycle}: {rule}")

    def elapsed(self, since: float, least_ns: float, rule: str):
        now = self.cycle * self.period
        self.require(now - since >= least_ns - 1e-3, f"{rule}: {now - since:g} ns, not {least_ns}")

    def execute(self, command: str, bank: int, address: int, now: float):
        timing = self.timing
        self.elapsed(0, timing.power_up_ns, f"{command} before the end of power-up")
        self.elapsed(self.refreshed, timing.rfc_ns, f"tRFC before {command}")
        self.require(now - self.mode_set >= timing.mode_cycles * self.period - 1e-3,
                     f"tMRD before {command}")
        if command in ("ACTIVATE", "READ", "WRITE"):
            self.require(self.mode is not None, f"{command} before SET MODE")
        self.require(self.writing is None or command in ("ACTIVATE", "PRECHARGE"),
                     f"{command} cuts a write burst short")
        getattr(self, command.lower().replace(" ", "_"))(bank, address, now)

    def activate(self, bank: int, address: int, now: float):
        timing = self.timing
        self.require(self.open_row[bank] is None, f"ACTIVATE of open bank {bank}")
        self.elapsed(self.precharged[bank], timing.rp_ns, "tRP before ACTIVATE")
        self.elapsed(self.activated[bank], timing.rc_ns, "tRC before ACTIVATE")
        self.elapsed(max(self.activated), timing.rrd_ns, "tRRD before ACTIVATE")
        self.open_row[bank], self.activated[bank] = address, now

    def precharge(self, bank: int, address: int, now: float):
        every = address >> 10 & 1
        for b in range(len(self.open_row)) if every else (bank,):
            if self.open_row[b] is None:
                continue
            self.elapsed(self.activated[b], self.timing.ras_ns, "tRAS before PRECHARGE")
            self.require(now - self.activated[b] <= self.timing.ras_max_ns, "tRAS, the longest")
            self.elapsed(self.last_word[b], max(self.timing.wr_ns,
                         self.timing.wr_cycles * self.period), "tWR before PRECHARGE")
            self.require(self.writing is None or self.writing[0] != b,
                         "PRECHARGE cuts a write burst short")
            self.require(self.cycle >= self.read_end[b], "PRECHARGE cuts a read burst short")
            self.open_row[b], self.precharged[b] = None, now

    def refresh(self, bank: int, address: int, now: float):
        self.require(all(row is None for row in self.open_row), "REFRESH with an open row")
        self.elapsed(max(self.precharged), self.timing.rp_ns, "tRP before REFRESH")
        self.elapsed(max(self.activated), self.timing.rc_ns, "tRC before REFRESH")
        self.refreshed = now
        self.refreshes += 1

    def set_mode(self, bank: int, address: int, now: float):
        self.require(all(row is None for row in self.open_row), "SET MODE with an open row")
        self.require(max(self.precharged) > float("-inf") or self.refreshes > 0,
                     "SET MODE before PRECHARGE")
        self.require(self.refreshes >= self.timing.power_up_refreshes, "SET MODE before REFRESH")
        latency, burst = address >> 4 & 7, 1 << (address & 7)
        self.require(burst <= 8 and not address & ~0x77 and bank == 0, f"mode {address:#x}")
        self.require(latency == 3 or (latency == 2 and self.period >= self.timing.cas2_ns - 1e-3),
                     f"CAS latency {latency} at a period of {self.period:g} ns")
        self.mode, self.mode_set = (latency, burst), now
        self.counted_from, self.refreshes = now, 0

    def read(self, bank: int, address: int, now: float):
        latency, burst = self.mode
        for column, cell in enumerate(self.cells_of(bank, address, burst)):
            edge = self.cycle + latency + column
            self.require(not self.output_at(edge), "READ cuts a read burst short")
            self.output.append((edge, self.cells.get(cell, 0xDEAD)))
        self.read_end[bank] = self.cycle + burst

    def write(self, bank: int, address: int, now: float):
        burst = self.mode[1]
        self.writing = bank, next(iter(self.cells_of(bank, address, burst))), burst

    def cells_of(self, bank: int, address: int, burst: int) -> range:
        timing = self.timing
        row = self.open_row[bank]
        self.require(row is not None, f"access to closed bank {bank}")
        self.elapsed(self.activated[bank], timing.rcd_ns, "tRCD before access")
        self.require(not address >> timing.column_bits, f"column address {address:#x}")
        self.require(address % burst == 0, f"column {address} is not aligned to the burst")
        first = ((row << timing.bank_bits | bank) << timing.column_bits) + address
        return range(first, first + burst)

    def write_column(self, pins: dict[str, int], now: float):
        if self.writing is None:
            return
        bank, cell, left = self.writing
        self.require(bool(pins["dq_oe"]), "no data on DQ during a write burst")
        old = self.cells.get(cell, 0xDEAD)
        keep = (0x00FF if pins["dqm"] & 1 else 0) | (0xFF00 if pins["dqm"] & 2 else 0)
        self.cells[cell] = old & keep | pins["dq_o"] & ~keep
        self.last_word[bank] = now
        self.writing = (bank, cell + 1, left - 1) if left > 1 else None

    def check_refresh(self, now: float):
        if self.counted_from is not None:
            owed = (now - self.counted_from) / self.timing.refresh_interval_ns - self.refreshes
            self.require(owed <= 8, f"refresh interval: {owed:.1f} refreshes behind")

    def load(self, address: int, content: bytes):
        """Store bytes from byte address `address` on (both even), without the pins."""
        for i in range(0, len(content), 2):
            self.cells[(address + i) // 2] = int.from_bytes(content[i:i + 2], "little")

    def dump(self, address: int, length: int) -> bytes:
        """The bytes from byte address `address` on (even address and length)."""
        return b"".join(self.cells.get((address + i) // 2, 0xDEAD).to_bytes(2, "little")
                        for i in range(0, length, 2))
