"""Signatures between the engines, the on-chip memories, the router and the sequencers."""

from amaranth import Cat, Const, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .arch.config import Config
from .arch.isa import FIELDS, Opcode
from .arch.routing import CORRECTION_BITS

__all__ = [
    "READ_LATENCY",
    "BankedAddress",
    "Corrections",
    "EngineSignature",
    "Logits",
    "Masked",
    "QueueEntry",
    "QueueIndex",
    "QueuePort",
    "ReadPort",
    "RouteSetup",
    "TableWrite",
    "WritePort",
    "activation_address",
    "fields_layout",
    "parameter_layout",
]

READ_LATENCY = 5  # cycles from the acceptance of an address to its data, for every on-chip memory


def fields_layout(opcode: Opcode) -> data.StructLayout:
    """The fields of an opcode, plus `expert` of the header, as a struct."""
    return data.StructLayout({**dict(FIELDS[opcode]), "expert": 8})


def parameter_layout(config: Config) -> data.ArrayLayout:
    """One word of the parameter memory."""
    record = data.StructLayout({"bias": signed(32), "multiplier": 16, "shift": 8, "pad": 8})
    return data.ArrayLayout(record, config.lanes)


class EngineSignature(wiring.Signature):
    """What a sequencer sees of an engine; seen from the engine.

    The engine takes an instruction when it is able to start it, perhaps while earlier ones are at
    work: what depends on those was held back by the sequencer. `done` pulses for one cycle, in
    order, once per instruction, when all its effects are visible to every later access. An
    instruction without rows or words is legal and does nothing.

    Members
    -------
    instruction : In(stream.Signature(fields_layout(opcode)))
    done : Out(1)
    busy : Out(1)
        An instruction was taken and is not done.
    stalled : Out(1)
        Busy, and no progress this cycle because a port did not answer.
    """

    def __init__(self, opcode: Opcode):
        super().__init__({
            "instruction": In(stream.Signature(fields_layout(opcode))),
            "done": Out(1), "busy": Out(1), "stalled": Out(1),
        })


class BankedAddress(data.StructLayout):
    """Where a word lies in a memory of several banks: `word` counts through all of them, and one bit
    of `bank` says again which of them that is.

    Whoever sends addresses finds the bank before the last register on their way, so that arbiters
    start from bits: comparing addresses there took as long as arbitration.
    """

    def __init__(self, banks: int, words: int):
        self.banks, self.words = banks, words
        super().__init__({"word": 20, "bank": banks})

    def of(self, word: Value) -> Value:
        """The address of a word. One past the end falls into the last bank: it is answered, with a
        word that means nothing."""
        page = word[self.page_low:self.page_low + (self.banks * self.pages - 1).bit_length()]
        past = [_at_least(page, number * self.pages) for number in range(1, self.banks)]
        begun, ended = [Const(1, 1), *past], [*past, Const(0, 1)]
        return Cat(word[:20], *(begins & ~ends for begins, ends in zip(begun, ended)))

    def within(self, word: Value, bank: int) -> Value:
        """The number of a word within its bank."""
        if self.banks == 1:
            return word[:max(self.words - 1, 1).bit_length()]
        page = (word[self.page_low:] - bank * self.pages)[:(self.pages - 1).bit_length()]
        return Cat(word[:self.page_low], page)

    # Only what tells one page from another, the largest power of two that divides a bank, is compared:
    # with sizes that are not odd, a handful of bits.
    @property
    def page_low(self) -> int:
        return (self.words & -self.words).bit_length() - 1

    @property
    def pages(self) -> int:
        """Pages of a bank."""
        return self.words >> self.page_low


def _at_least(value: Value, bound: int) -> Value:
    """``value >= bound``; of a few bits without a carry chain, which would start a path anew."""
    if len(value) > 6:
        return value >= bound
    return value.matches(*range(bound, 1 << len(value)))


def activation_address(config: Config) -> BankedAddress:
    return BankedAddress(config.activation_banks, config.activation_words)


class ReadPort(wiring.Signature):
    """Read access to an on-chip memory, seen from the reader.

    A word arrives exactly `READ_LATENCY` cycles after its address was accepted, in order, and the
    reader must take it (there is no back-pressure on `data`). An address may have to wait for
    `ready` (other readers). A read sees every write that was accepted in an earlier cycle.

    Members
    -------
    address : Out(stream.Signature(address))
    data : In(stream.Signature(shape, always_ready=True))
    """

    def __init__(self, shape, address=unsigned(20)):
        self.shape = shape
        super().__init__({
            "address": Out(stream.Signature(address)),
            "data": In(stream.Signature(shape, always_ready=True)),
        })


class Masked(data.StructLayout):
    """A memory word of `cells` cells with a write enable for each cell."""

    def __init__(self, cell_bits: int, cells: int, address=unsigned(20)):
        super().__init__({"address": address, "data": cell_bits * cells, "mask": cells})


class WritePort(wiring.Signature):
    """Write access to an on-chip memory, seen from the writer: a write is done when accepted.

    Members
    -------
    write : Out(stream.Signature(Masked(cell_bits, cells, address)))
    """

    def __init__(self, cell_bits: int, cells: int, address=unsigned(20)):
        self.cell_bits, self.cells = cell_bits, cells
        super().__init__({"write": Out(stream.Signature(Masked(cell_bits, cells, address)))})


class QueueEntry(data.Struct):
    """A token that a router sent to an expert."""

    token: 13
    weight: 16  # gate weight, 65535 is one


class QueueIndex(data.Struct):
    """Which entry of which queue to read."""

    expert: 8
    index: 13


class QueuePort(wiring.Signature):
    """The router's queues, seen from the linear unit.

    Members
    -------
    expert : Out(8)
        Whose `length` is asked for; hold it for two cycles before using that.
    length : In(13)
    index : Out(stream.Signature(QueueIndex, always_ready=True))
    entry : In(stream.Signature(QueueEntry, always_ready=True))
        `READ_LATENCY` cycles after its index.
    """

    def __init__(self):
        super().__init__({
            "expert": Out(8), "length": In(13),
            "index": Out(stream.Signature(QueueIndex, always_ready=True)),
            "entry": In(stream.Signature(QueueEntry, always_ready=True)),
        })


class TableWrite(data.Struct):
    """One entry of a pointwise table: entry i of table t has address ``256 * t + i``."""

    address: 12
    data: 8


class RouteSetup(data.Struct):
    """How the router decides, sent once before the logits of a LINEAR with Target.ROUTER; it also
    empties all queues, unless it appends."""

    rows: 13
    token: 13  # of row 0
    append: 1
    experts: 16
    chosen: 5
    over_chosen: 1
    multiplier: 16
    shift: 6
    sigmoid: 1
    by_score: 1
    group: 8
    chosen_groups: 5
    pair: 1
    sparse: 1
    threshold: 16
    capacity: 13
    same_frame: 1
    choice: 5


class Logits(data.StructLayout):
    """`lanes` consecutive logits of one token row; those at or past `experts` are to be ignored.

    The linear unit sends them by token group (`tokens` rows), within it by output group, within it
    by row, within it by channel; rows and channels past the end are not sent. `row` counts tokens
    from 0; `channel` is that of the first logit and a multiple of `lanes`.
    """

    def __init__(self, config: Config):
        super().__init__({"row": 13, "channel": 16,
                          "logits": data.ArrayLayout(signed(32), config.lanes)})


class Corrections(data.StructLayout):
    """Corrections of `lanes` consecutive experts, from `channel` on, of which the linear unit sends
    those before their logits, again and again."""

    def __init__(self, config: Config):
        super().__init__({"channel": 16,
                          "values": data.ArrayLayout(CORRECTION_BITS, config.lanes)})
