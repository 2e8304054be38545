"""A step whose tensors do not fit on chip: they lie in DRAM, and blocks of rows pass through.

Slow, as everything crosses the bus, but it works for any number of rows: what must fit is a few rows
at a time, and the keys and values of one head.
"""

import dataclasses
import math

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Block, Lowered
from moeware.compiler.tile.attention import attend, lower_attention
from moeware.compiler.tile.experts import lower_experts, lower_route
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.norm import head_of, lower_norm
from moeware.compiler.tile.products import require
from moeware.compiler.tile.rows import lower_add_linear, lower_linear
from moeware.compiler.tile.tensors import Tensor
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.isa import HEAD_WORDS, Memory, NormMode
from moeware.hw.arch.program import Probe

__all__ = ["spill"]


def spill(lowering: Lowering) -> Lowered:
    """Instructions of a step, operation after operation, block of rows after block of rows.

    Raises
    ------
    CompileError
        As `tile`.
    """
    return _Spiller(lowering).run()


class _Spiller:
    """Every operation is lowered like a small step of its own, for a few rows of one frame."""

    def __init__(self, whole: Lowering):
        self.whole, self.config, self.assembly = whole, whole.config, whole.assembly
        self.shapes: dict[str, Tensor] = {}  # one frame; never on chip as a whole
        self.blocks: dict[str, Block] = {}  # where they lie, frame after frame
        self.heads = self._heads()  # tensors whose heads lie apart, and how many
        self.routes: dict[str, q.Route] = {}
        c = self.config
        per_beat = max(1, c.bus_bytes // c.depth, c.bus_bytes // (2 * c.lanes))
        # Blocks start at whole bus words, token groups and groups of queries.
        self.step_rows = math.lcm(c.tokens, c.queries, per_beat)

    def run(self) -> Lowered:
        whole, outputs = self.whole, []
        for port in whole.step.inputs:
            region = port.region
            self._tensor(port.tensor, region.memory, region.rows, region.channels)
        for op in whole.step.operations:
            getattr(self, f"_{type(op).__name__}")(op)
        for port in whole.step.outputs:
            outputs.append((self._placed(port), self.blocks[port.tensor]))
        probes = [(Probe(name=op.name, tensor=op.output, region=self.shapes[op.output].region()),
                   self.blocks[op.output])
                  for op in whole.step.operations if whole.trace and op.output in self.blocks]
        inputs = [(self._placed(port), self.blocks[port.tensor]) for port in whole.step.inputs]
        return Lowered(self.assembly.instructions, inputs, outputs, probes, whole.step.operations,
                       whole.macs, whole.frames)

    def _heads(self) -> dict[str, int]:
        heads: dict[str, int] = {}
        made = {op.output: op for op in self.whole.step.operations}
        for op in self.whole.step.operations:
            if isinstance(op, q.Attention) and op.query is not None:
                tensors = {op.query: op.heads, op.key: op.key_heads, op.value: op.key_heads}
                wide = {product.output: count for tensor, count in tensors.items()
                        for product in self.whole.wide.get(tensor, [])}
                # What is normalised over all heads is made as a whole.
                apart = all(made[tensor].mode is NormMode.SCALE or made[tensor].groups == count
                            for tensor, count in tensors.items() if tensor in self.whole.wide)
                if apart and all(len(self.whole.users(tensor)) == 1 for tensor in tensors | wide):
                    heads |= tensors | wide
        return heads

    # Tensors in DRAM

    def _placed(self, port):
        return dataclasses.replace(port, region=self.shapes[port.tensor].region())

    def _tensor(self, name: str, memory: Memory, rows: int, channels: int) -> Tensor:
        groups = self.heads.get(name, self.whole.groups.get(name, 1))
        self.shapes[name] = tensor = Tensor(self.config, name, memory, 1, rows, channels,
                                            groups=groups, split=name in self.heads,
                                            room=self.whole.rooms.get(name, 0))
        size = layout.aligned(tensor.region().bytes(self.config))
        self.blocks[name] = Block(name, self.whole.frames * size)
        return tensor

    def _offset(self, name: str, frame: int, first: int, group: int) -> int:
        """Bytes of a block before a row, which starts at a whole bus word."""
        tensor, c = self.shapes[name], self.config
        region = tensor.region()
        words = first * tensor.stride
        return (self.blocks[name].bytes // self.whole.frames * frame
                + group * region.part_bytes(c)
                + layout.beats(c, tensor.memory, words) * c.bus_bytes)

    def _fetch(self, name: str, frame: int, first: int, last: int, group: int = 0,
               bank: int = 0) -> Tensor:
        """Rows [first, last) of a frame, or of one group of it, on chip; and a few rows before, where
        the first one starts within a bus word."""
        shape, c = self.shapes[name], self.config
        per_beat = max(1, c.bus_bytes // layout.word_bytes(c, shape.memory))
        lead = first % (per_beat // math.gcd(per_beat, shape.stride))
        groups, channels = shape.groups, shape.channels
        if shape.split:
            groups, channels = 1, shape.channels // shape.groups
        tensor = Tensor(c, name, shape.memory, 1, last - first, channels, groups=groups,
                        room=shape.room, bank=bank, lead=lead)
        self.assembly.load(tensor.span(-lead, last - first), self.blocks[name], name,
                           offset=self._offset(name, frame, first - lead, group))
        return tensor

    def _keep(self, tensor: Tensor, name: str, frame: int, first: int, group: int = 0) -> None:
        self.assembly.store(tensor.span(), self.blocks[name], name,
                            offset=self._offset(name, frame, first, group))

    def _row_blocks(self, rows: int, activation: int, residual: int = 0, fixed: int = 0,
                    most: int | None = None):
        """(frame, first, last) of all blocks of rows of a tensor.

        activation, residual : words on chip for each row; fixed : activation words besides; most :
        rows of a block, where there is another limit.
        """
        c = self.config
        most = rows if most is None else min(rows, most)
        for words, each in ((c.activation_banks * c.activation_words - fixed, activation),
                            (c.residual_words, residual)):
            if each:
                # A few rows more may come with the first one.
                most = min(most, max(0, words // each - self.step_rows))
        size = max(self.step_rows, most // self.step_rows * self.step_rows)
        return [(frame, first, min(first + size, rows))
                for frame in range(self.whole.frames) for first in range(0, rows, size)]

    def _small(self, *operations: q.Operation) -> Lowering:
        """A step of a few operations and rows that adds to the same instructions."""
        step = dataclasses.replace(self.whole.step, operations=list(operations), inputs=[], outputs=[])
        small = Lowering(step, self.config, 1, False, self.whole.plan)
        small.assembly, small.rooms = self.assembly, self.whole.rooms
        small.groups |= {op.output: self.shapes[op.output].groups for op in operations
                         if op.output in self.shapes and not self.shapes[op.output].split}
        return small

    def _parts(self, op, target: Tensor):
        """What makes each head of a tensor whose heads lie apart, with its number; else the whole."""
        if not target.split:
            return [(0, op)]
        return [(head, head_of(op, head, target.groups)) for head in range(target.groups)]

    # Operations

    def _Constant(self, op: q.Constant) -> None:
        tensor = self._tensor(op.output, Memory.RESIDUAL, *op.value.shape)
        image = tensor.region().pack(self.config, op.value)
        image = image.ljust(layout.aligned(len(image)), b"\0") * self.whole.frames
        self.blocks[op.output] = Block(op.output, len(image), image)

    def _Linear(self, op: q.Linear) -> None:
        source = self.shapes[op.source]
        target = self._tensor(op.output, Memory.ACTIVATION, source.rows, len(op.weight))
        for frame, a, b in self._row_blocks(source.rows, source.stride + target.stride):
            rows = self._fetch(op.source, frame, a, b)
            for head, part in self._parts(op, target):
                small = self._small(part)
                small.tensors[op.source] = rows
                lower_linear(small, part)
                self._keep(small.tensors[op.output], op.output, frame, a, head)
        self.whole.macs += source.rows * op.row_macs

    def _AddLinear(self, op: q.AddLinear) -> None:
        source = self.shapes[op.source]
        rows = source.rows if op.residual is None else self.shapes[op.residual].rows
        target = self._tensor(op.output, Memory.RESIDUAL, rows, len(op.weight))
        for frame, a, b in self._row_blocks(rows, source.stride, target.stride):
            first, last = max(a - op.first_row, 0), min(b - op.first_row, source.rows)
            fetched = self._fetch(op.source, frame, first, last) if first < last else None
            for head, part in self._parts(op, target):
                part = dataclasses.replace(part, first_row=max(op.first_row - a, 0))
                small = self._small(part)
                if op.residual is not None:
                    small.tensors[op.residual] = self._fetch(op.residual, frame, a, b, head)
                if fetched is not None:
                    small.tensors[op.source] = fetched
                    lower_add_linear(small, part)
                else:
                    small.tensors[op.output] = small.tensors[op.residual]
                self._keep(small.tensors[op.output], op.output, frame, a, head)
        self.whole.macs += source.rows * op.row_macs

    def _Norm(self, op: q.Norm) -> None:
        source = self.shapes[op.source]
        target = self._tensor(op.output, Memory.ACTIVATION, op.rows, source.channels)
        factors = source.width if op.rotation is not None else 0
        for frame, a, b in self._row_blocks(op.rows, target.stride, source.stride + factors):
            for head, part in self._parts(op, target):
                part = dataclasses.replace(part, first_row=0, rows=b - a, rotation=(
                    None if op.rotation is None else op.rotation[a:b]))
                small = self._small(part)
                small.tensors[op.source] = self._fetch(op.source, frame, op.first_row + a,
                                                       op.first_row + b, head)
                lower_norm(small, part)
                self._keep(small.tensors[op.output], op.output, frame, a, head)

    def _Attention(self, op: q.Attention) -> None:
        key, value = self.shapes[op.key], self.shapes[op.value]
        require(key.rows, self.config.max_rows, f"The keys of {op.name}", "max_rows")
        if op.query is None:
            self._mean(op)
            return
        query = self.shapes[op.query]
        if query.width > HEAD_WORDS or query.width != key.width:
            raise CompileError(f"A head of {op.name} must be at most {HEAD_WORDS} words of "
                               f"{self.config.depth} channels, not {query.width}; use a configuration "
                               "with a larger Config.depth")
        target = self._tensor(op.output, Memory.ACTIVATION, query.rows,
                              self.whole.channels[op.output])
        for frame, a, b in self._row_blocks(query.rows, query.stride + target.stride,
                                            fixed=(key.stride + value.stride) * key.rows):
            whole: dict[str, Tensor] = {}

            def part(name, first, last, group, bank, frame=frame, whole=whole):
                if self.shapes[name].split:
                    return self._fetch(name, frame, first, last, group, bank).head(0, 0)
                if name not in whole:  # one for all heads
                    whole[name] = self._fetch(name, frame, first, last, 0, bank)
                return whole[name].head(0, group)

            out = Tensor(self.config, op.output, Memory.ACTIVATION, 1, b - a, target.channels,
                         groups=op.heads, room=target.room, bank=3)
            for head in range(op.heads):
                at = head * op.key_heads // op.heads
                seen = key.rows - (query.rows - b if op.causal else 0)
                attend(self.whole, op, part(op.query, a, b, head, 3),
                       part(op.key, 0, key.rows, at, 1), part(op.value, 0, key.rows, at, 2),
                       out.head(0, head), seen)
            self._keep(out, op.output, frame, a)
        self.whole.macs += query.rows * key.rows * (query.channels + target.channels)

    def _mean(self, op: q.Attention) -> None:
        key, value = self.shapes[op.key], self.shapes[op.value]
        self._tensor(op.output, Memory.ACTIVATION, 1, value.channels)
        for frame in range(self.whole.frames):
            small = self._small(op)
            for name in dict.fromkeys((op.key, op.value)):
                small.tensors[name] = self._fetch(name, frame, 0, key.rows)
            lower_attention(small, op)
            self._keep(small.tensors[op.output], op.output, frame, 0)
        self.whole.macs += 2 * key.rows * value.channels

    def _Route(self, op: q.Route) -> None:
        self.routes[op.output] = op

    def _Experts(self, op: q.Experts) -> None:
        """A block's tokens are routed, and pass through all experts, before the next block's."""
        route = self.routes[op.route]
        source, stream = self.shapes[op.source], self.shapes[op.residual]
        self._tensor(op.output, Memory.RESIDUAL, stream.rows, stream.channels)
        hidden = -(-op.up.shape[1] // self.config.depth)
        blocks = self._row_blocks(source.rows, source.stride + hidden, stream.stride,
                                  most=self.config.max_rows)
        if route.by_rank and len(blocks) > self.whole.frames:
            raise CompileError(f"The rows of a frame of {op.name} must lie on chip together, as its "
                               "router gives the first choices of all of them a place before any "
                               "second one; use a configuration with more activation_words or "
                               "residual_words")
        for frame, a, b in blocks:
            small = self._small(route, op)
            small.tensors[op.source] = self._fetch(op.source, frame, a, b)
            small.tensors[op.residual] = self._fetch(op.residual, frame, a, b)
            lower_route(small, route, same_frame=a > 0)
            lower_experts(small, op)
            self._keep(small.tensors[op.output], op.output, frame, a)
        self.whole.macs += source.rows * (route.weight.size + route.chosen * op.row_macs)
