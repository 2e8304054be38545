"""Instructions of one device step in the making: transfers, constants, matrix products."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moeware.compiler.lowered import Block, Buffer, Instr, Span
from moeware.compiler.tile.products import channel_unit, fits_pair, tiles, weight_words
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, Opcode, Target

__all__ = ["Assembly", "Run"]


@dataclass(frozen=True)
class Run:
    """Rows that one LINEAR takes: of `source`, to `target` (channel 0; None: the router)."""

    source: Span
    target: Span | None
    fields: dict = field(default_factory=dict)


class Assembly:
    """Instructions in the order in which they are emitted.

    Inputs are loaded in pieces, each before the first instruction that reads it.
    """

    def __init__(self, config: Config):
        self.config = config
        self.instructions: list[Instr] = []
        self._unloaded: dict[int, list[tuple[Span, Block, int, str]]] = {}  # by buffer
        self._blocks: dict[str, Block] = {}  # constants, by name
        self._tables = 0

    def emit(self, opcode: Opcode, layer: str, reads=(), writes=(), **fields) -> None:
        queue = {name: bool(fields.pop(name, False)) for name in ("queue_read", "queue_write")}
        for span in reads:
            self._fetch(span)
        self.instructions.append(Instr(opcode, fields, layer, list(reads), list(writes), **queue))

    # Transfers

    def load(self, target: Span, block: Block, layer: str, *, expert: int | None = None,
             offset: int = 0, packed: int = 0) -> None:
        """A contiguous span from a block; for an expert only if it has tokens. packed : of LOAD."""
        condition = {} if expert is None else {"conditional": 1, "expert": expert,
                                               "queue_read": True}
        self.emit(Opcode.LOAD, layer, writes=[target], memory=target.buffer.memory, local=target,
                  words=target.end - target.start, address=block[offset], packed=packed,
                  **condition)

    def load_later(self, target: Span, block: Block, layer: str, *, offset: int = 0) -> None:
        """A load that is emitted when a first instruction reads from it."""
        self._unloaded.setdefault(id(target.buffer), []).append((target, block, offset, layer))

    def _fetch(self, span: Span) -> None:
        waiting = self._unloaded.get(id(span.buffer), [])
        for piece in [p for p in waiting if p[0].start < span.end and span.start < p[0].end]:
            waiting.remove(piece)
            self.load(piece[0], piece[1], piece[3], offset=piece[2])

    def store(self, source: Span, block: Block, layer: str, *, offset: int = 0) -> None:
        self.emit(Opcode.STORE, layer, reads=[source], memory=source.buffer.memory, local=source,
                  words=source.end - source.start, address=block[offset])

    def store_tensor(self, tensor: Tensor, block: Block, layer: str, *, cut: bool,
                     frame: int | None = None, group: int | None = None) -> None:
        """A tensor, or one group of one frame of it. cut : in chunks of rows."""
        size = block.bytes // tensor.frames
        wanted = slice(None) if group is None else slice(group, group + 1)
        for each in range(tensor.frames) if frame is None else [frame]:
            for span, offset in list(tensor.pieces(each, cut=cut))[wanted]:
                self.store(span, block, layer, offset=each * size + offset)

    def constant(self, name: str, memory: Memory, words: np.ndarray, layer: str,
                 expert: int | None = None, packed: int = 0) -> Span:
        """A buffer that is loaded with words, uint8 [words, word_bytes]. A name stands for the same
        words every time. packed : of LOAD."""
        if name not in self._blocks:
            image = layout.pack(self.config, memory, words, packed)
            self._blocks[name] = Block(name, len(image), image)
        span = Buffer(name, memory, len(words))[0]
        self.load(span, self._blocks[name], layer, expert=expert, packed=packed)
        return span

    def table(self, table: np.ndarray | None, layer: str) -> tuple[dict, list[Span]]:
        """Fields of LINEAR for a pointwise table, and the table's span."""
        if table is None:
            return {}, []
        span = self.constant(f"{layer}/table", Memory.TABLE, table.view(np.uint8)[:, None], layer)
        span.buffer.address = 256 * (self._tables % self.config.tables)
        self._tables += 1
        return {"tabled": 1, "table": span.buffer.address // 256}, [span]

    # Matrix products

    def narrow(self, bits: int) -> bool:
        """Whether weights of so many bits go two to a multiplier."""
        return bits <= 4 and bool(self.config.narrow)

    def packed(self, bits: int) -> int:
        """LOAD.packed of weights of so many bits: narrow ones share bytes on chip, too."""
        return 0 if bits > 4 or self.narrow(bits) else 1 if bits > 2 else 2

    def product(self, *arguments, **fields) -> None:
        """All of `product_tiles`."""
        for _ in self.product_tiles(*arguments, **fields):
            pass

    def product_tiles(self, layer: str, weight: np.ndarray, affine: q.Affine, runs: list[Run], *,
                      bits: int = 8, name: str = "", reads=(), unit: int | None = None,
                      first: bool = True, last: bool = True, **fields) -> Iterator[None]:
        """LINEAR for weight int8 [channels, source columns], tile after tile; goes on behind each.

        name : of the constants, where a layer has several products; unit : tiles start at multiples of
        it; first, last : cut the first tiles, the last one into chunks of rows, so that they follow
        what makes the source, or lead what reads the target.
        """
        c, expert, narrow = self.config, fields.get("expert"), self.narrow(bits)
        depth_words, to_activation = weight.shape[1] // c.depth, fields["target"] == Target.ACTIVATION
        # Channels that fill a word of the target.
        per_word = c.depth << fields.get("product", 0) if to_activation else c.lanes
        unit = unit or channel_unit(c, narrow, per_word)

        def load(start: int, stop: int) -> tuple[int, int, Span, Span]:
            tile = f"{name or layer}/{start}"
            weights = self.constant(f"{tile}/weight", Memory.WEIGHT,
                                    weight_words(c, weight[start:stop], narrow), layer, expert,
                                    self.packed(bits))
            params = layout.pack_params(c, affine.bias[start:stop], affine.multiplier[start:stop],
                                        affine.shift[start:stop])
            return start, stop, weights, self.constant(f"{tile}/param", Memory.PARAM, params, layer,
                                                       expert)

        def multiply(run: Run, start: int, stop: int, weights: Span, param: Span) -> None:
            place, writes = {}, []
            if run.target is not None:
                writes = [run.target.columns(start // per_word, -(-(stop - start) // per_word))]
                place = {"destination": writes[0], "destination_stride": run.target.stride}
            old = writes if fields.get("accumulate") else []
            self.emit(Opcode.LINEAR, layer, [run.source, *reads, *old, weights, param], writes,
                      rows=run.source.rows, source=run.source, source_stride=run.source.stride,
                      source_words=depth_words, weight=weights, param=param, channels=stop - start,
                      narrow=int(narrow), **place, **run.fields, **fields)

        ranges = tiles(c, layer, len(weight), depth_words, unit, narrow)
        # A chunk of rows that has just come passes two tiles, as one takes less time than a chunk's
        # normalisation or load.
        pair = first and len(ranges) > 1 and fits_pair(c, ranges, depth_words, narrow)
        for group in [ranges[:2], *([r] for r in ranges[2:])] if pair else [[r] for r in ranges]:
            loaded = [load(*each) for each in group]
            cut = first and group[0][0] == 0 or last and group[-1][1] == len(weight)
            for run in self._cut(runs) if cut else runs:
                for tile in loaded:
                    multiply(run, *tile)
            yield

    def _cut(self, runs: list[Run]) -> list[Run]:
        return [dataclasses.replace(run, source=run.source.part(a, b),
                                    target=run.target and run.target.part(a, b))
                for run in runs for a, b in chunks(self.config, 0, run.source.rows)]
