"""Cycles of LINEAR, ATTENTION and NORM, as the contracts of their units say."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from moeware.compiler.estimate_dram import Clock
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import NormMode, Target
from moeware.hw.arch.work import Work

__all__ = ["Attention", "Linear", "Norm"]


def ceil_log2(value: int) -> int:
    return (value - 1).bit_length()


class Engine(ABC):
    """An engine whose times are known when it takes an instruction; as `estimate_dma.Loads`."""

    def __init__(self, clock: Clock, config: Config):
        self.clock, self.config = clock, config
        self.on_ready: Callable[[], None] = lambda: None
        self._free = 0

    def takes(self) -> bool:
        return self.clock.now >= self._free

    def begin(self, work: Work, done: Callable[[int], None]) -> None:
        self._free, cycle = self.times(work, self.clock.now)
        self.clock.at(self._free, self.on_ready)
        done(cycle)

    @abstractmethod
    def times(self, work: Work, start: int) -> tuple[int, int]:
        """The cycle from which the next instruction is taken, and that in which this one is done."""


class Norm(Engine):
    """Statistics of a row run beside the application of the one before. What is common to a row goes
    through two stages, the variance and its inverse root."""

    VARIANCE, ROOT = 14, 19  # cycles between rows
    VARIANCE_LATENCY, ROOT_LATENCY = 13, 45
    FIRST, LAST = 13, 24  # from the start to the first sums, but for its words; from the last word
    SCALE = 3  # from the start to the moments where no statistics are taken
    ROTATE = 7  # more to the last word's end where there is gateware that turns pairs

    def __init__(self, clock: Clock, config: Config):
        super().__init__(clock, config)
        self._read = self._variance = self._root = self._applied = self._done = 0

    def times(self, work: Work, start: int) -> tuple[int, int]:
        i, lanes = work.instruction, self.config.lanes
        before = self._done
        if not i.rows or not i.channels:
            self._done = max(start, before) + 3
            return max(start, before) + 1, self._done
        words = -(-i.channels // lanes)
        # Factors share the port that values come from.
        each = 2 * words if i.factor_words else words
        self._read = max(start, self._read)
        for _ in range(i.rows):
            self._read += words
            if i.mode == NormMode.SCALE:
                moments = start + self.SCALE
            else:
                self._variance = max(self._variance + self.VARIANCE,
                                     self._read + self.FIRST + ceil_log2(lanes))
                moments = self._variance + self.VARIANCE_LATENCY
            self._root = max(self._root + self.ROOT, moments)
            self._applied = max(self._applied + each, self._root + self.ROOT_LATENCY + words)
        self._done = self._applied + self.LAST + self.ROTATE * self.config.rotary
        # One more instruction is taken while this one is at work.
        return max(start, before) + 1, self._done


class Attention(Engine):
    """Two stages on two groups of query rows, with two score buffers between them. In the second
    one, the last value word of a pass over the keys waits for the write-back of the pass before."""

    FIRST, GROUP_READ = 4, 10  # cycles before the first group's query words; of a group at least
    SCORES, SUMS = 18, 16  # from the last key word to the second stage, and through that
    PASS = 27  # cycles between the ends of two passes at least
    WRITE, LAST = 15, 1  # write-back of a pass, besides its results; from there to done
    GROUP, RELEASE = 7, 2  # between groups of the second stage; until a score buffer is free
    RECIPROCAL, INTERVAL, ROWS_PER_DIVIDER = 24, 18, 4

    def __init__(self, clock: Clock, config: Config):
        super().__init__(clock, config)
        self._released = [0, 0]
        self._walked = self._claimed = self._written = self._done = 0
        self._scores = self.SCORES + ceil_log2(config.depth)
        rows = min(config.queries, self.ROWS_PER_DIVIDER)
        self._reciprocal = self.RECIPROCAL + self.INTERVAL * (rows - 1)

    def times(self, work: Work, start: int) -> tuple[int, int]:
        i, c = work.instruction, self.config
        before = self._done
        if not (i.rows and i.keys and i.words):
            self._done = max(start + 2, before)
            return self._done + 1, self._done
        read = start + self.FIRST
        # Where keys and values lie in one bank, a group's values are read in turn with the keys of
        # the next.
        banks, shared = [word // c.activation_words for word in (i.key, i.value)], 0
        for first in range(0, i.rows, c.queries):
            rows = min(c.queries, i.rows - first)
            keys = i.keys
            if i.causal:
                keys = min(max(first + rows + i.keys - i.rows, 1), i.keys)
            read += max(rows * i.words + 1, self.GROUP_READ if first else 0)
            read = max(read, self._released[0], shared) + keys * i.words
            shared = read + keys * i.words if banks[0] == banks[1] else 0
            end = max(read + self._scores, self._walked + self.GROUP) + self.SUMS
            for word in range(i.words):
                self._claimed = max(end + keys, self._written, self._claimed + self.PASS)
                end = self._claimed
                self._written = (end + rows * c.depth // c.lanes + self.WRITE
                                 + (self._reciprocal if word == 0 else 0))
            self._walked = end - self.SUMS
            self._released = [self._released[1], self._walked + self.RELEASE]
        self._done = self._written + self.LAST
        # Two instructions at most are at work.
        return max(read, before) + 1, self._done


class Linear(Engine):
    """A pipeline over instructions: rows are fetched into one half of the tile memory while the
    array works on the other; results leave it an output group at a time; the router may follow."""

    TAKE, TAKE_QUEUED = 2, 5  # cycles between instructions
    ROWS, QUEUED = 8, 3  # from the start to the first row's address; more for rows of a queue
    GROUP, ROW = 5, 2  # until the words of a group are there; to fetch a row at least
    LATENCY = 32  # from the last product to the last result, but for the adder tree's stages
    PRODUCTS = 2  # more, where results can be multiplied by each other
    ACTIVATE, RESIDUAL, ACCUMULATE = 1, 1, 6
    ROUTE, ROUTE_ROW = 41, 18  # the router's latency; cycles of a row at least
    FORMS, GROUPS = 23, 1  # more latency with `Config.router_forms`; with groups, beside the experts

    def __init__(self, clock: Clock, config: Config):
        super().__init__(clock, config)
        self._latency = self.LATENCY + self.PRODUCTS * config.products + ceil_log2(config.depth)
        self._fetched = self._array = self._done = 0
        self._released = [0, 0]

    def times(self, work: Work, start: int) -> tuple[int, int]:
        i, c = work.instruction, self.config
        free = start + (self.TAKE_QUEUED if i.queued else self.TAKE)
        if not work.rows or not i.channels or not i.source_words:
            self._done = max(self._done + 1, free)
            return free, self._done
        outputs = c.outputs * (1 + i.narrow)
        groups = -(-i.channels // outputs)
        tail = i.channels - (groups - 1) * outputs
        self._fetched = max(self._fetched, start + self.ROWS + self.QUEUED * i.queued)
        alone = i.over_chosen | i.sigmoid  # only the chosen are weighed
        rounds, chosen = (i.chosen, 1) if i.sparse else (1, i.chosen)
        each = max(i.channels + (0 if alone else chosen), self.ROUTE_ROW)  # of a round
        routed = 0
        for first in range(0, work.rows, c.tokens):
            rows = min(c.tokens, work.rows - first)
            self._fetched = (max(self._fetched, self._released[0])
                             + rows * max(self.ROW, i.source_words))
            full, last = rows * -(-min(outputs, i.channels) // c.lanes), rows * -(-tail // c.lanes)
            # The results of an output group leave while the next one is summed.
            begin = max(self._array, self._fetched + self.GROUP)
            end = begin + i.source_words + (groups - 1) * max(i.source_words, full)
            left = end + last
            self._array = max(end, left - i.source_words)
            self._released = [self._released[1], end]
            if i.target == Target.ROUTER:
                for row in range(rows):  # its logits come one row after another
                    came = left - last * (rows - 1 - row) // rows + self._latency
                    routed = max(routed + rounds * each, came)
        more = {Target.ACTIVATION: self.ACTIVATE, Target.ROUTER: 0,
                Target.RESIDUAL: self.RESIDUAL + self.ACCUMULATE * i.accumulate}[i.target]
        self._done = max(self._done + 1, left + self._latency + more)
        if i.target == Target.ROUTER:
            self._done = (routed + self.ROUTE + 2 * chosen + i.channels * (1 if alone else 2)
                          + (rounds - 1) * each + self.FORMS * c.router_forms
                          + (i.channels + self.GROUPS if i.group else 0))
            free = self._done + 1
        return free, self._done
