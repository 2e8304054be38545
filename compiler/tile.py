"""Quantised operations to instructions, in the order in which the linear unit is to work.

Wherever one engine hands over to another, an instruction is cut into chunks of rows, so that the
next engine starts on the first rows while the last ones are still made: the first tile of a product
follows its source chunk by chunk, and the last one leads what comes after. The heads of attention
are made one after another, so that attention works on one while the linear unit makes the next.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Block, Buffer, Instr, Lowered, Span
from moeware.compiler.products import (
    channel_unit,
    filled,
    require,
    spread,
    tiles,
    weight_words,
)
from moeware.compiler.quantise import QuantisedStep
from moeware.compiler.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import HEAD_WORDS, NORM_CHANNELS, Memory, Opcode, Target
from moeware.hw.arch.program import Port, Probe

__all__ = ["tile"]


def tile(step: QuantisedStep, config: Config, *, trace: bool = False, frames: int = 1,
         ahead: bool = True) -> Lowered:
    """Instructions of one device step, in an order that is right without any overlap.

    trace : store every operation's result in DRAM, as a probe; frames : that a run works on at
    once; ahead : an expert's first product stands before the second one of the expert before, which
    hides its latency and takes another buffer for hidden values.

    Raises
    ------
    CompileError
        A row, tile or count that the configuration has no room for: which, and by how much.
    """
    return _Tiler(step, config, frames, trace, ahead).run()


@dataclass(frozen=True)
class _Run:
    """Rows that one LINEAR takes: of `source`, to `target` (channel 0; None: the router)."""

    rows: int
    source: Span
    target: Span | None
    fields: dict


class _Tiler:
    def __init__(self, step: QuantisedStep, config: Config, frames: int, trace: bool, ahead: bool):
        self.step, self.config, self.frames = step, config, frames
        self.trace, self.ahead = trace, ahead
        self.instructions: list[Instr] = []
        self.tensors: dict[str, Tensor] = {}
        self.groups, self.split = self._heads()
        self.deferred: dict[str, q.Linear] = {}  # queries, keys and values, made head by head
        self.inputs: list[tuple[Port, Block]] = []
        self.unloaded: dict[str, list[tuple[Span, Block, int]]] = {}  # inputs, in pieces
        self.probes: list[tuple[Probe, Block]] = []
        self.tables = self.macs = 0

    def run(self) -> Lowered:
        outputs = []
        for port in self.step.inputs:
            self._input(port)
        for operation in self.step.operations:
            made = getattr(self, f"_{type(operation).__name__}")(operation) or [operation]
            for done in made if self.trace else ():
                if done.output in self.tensors and done.output not in self.split:
                    self._probe(done)
            # At once, as the stream is updated in place.
            outputs += [self._output(port) for port in self.step.outputs
                        if port.tensor in [done.output for done in made]]
        return Lowered(self.instructions, self.inputs, outputs, self.probes, self.step.operations,
                       self.macs, self.frames)

    # Tensors

    def _heads(self) -> tuple[dict[str, int], set[str]]:
        """Groups of channels that start at a word, which are the heads of what attention reads and
        writes; and the tensors that are made head by head."""
        groups: dict[str, int] = {}
        split: set[str] = set()
        made = {op.output: op for op in self.step.operations}
        kept = {port.tensor for port in self.step.outputs}
        for op in self.step.operations:
            if not isinstance(op, q.Attention) or op.query is None:
                continue
            sources = {op.query: op.heads, op.key: op.key_heads, op.value: op.key_heads}
            for tensor, count in (*sources.items(), (op.output, op.heads)):
                if groups.setdefault(tensor, count) != count:
                    raise CompileError(f"Tensor {tensor!r} must have one number of heads, not "
                                       f"{groups[tensor]} and {count}")
            if all(isinstance(made.get(tensor), q.Linear) and tensor not in kept
                   and self._head_fills_groups(made[tensor], count)
                   and [user is op for user in self._users(tensor)] == [True] for tensor, count in sources.items()):
                split |= set(sources)
        return groups, split

    def _head_fills_groups(self, op: q.Operation, heads: int) -> bool:
        """Whether heads apart from each other leave no output of the array without work."""
        c = self.config
        words = -(-(len(op.weight) // heads) // c.depth)
        return words * c.depth % (c.outputs << self._narrow(op.bits)) == 0

    def _users(self, tensor: str) -> list[q.Operation]:
        roles = ("source", "residual", "query", "key", "value", "route")
        return [op for op in self.step.operations
                if any(isinstance(getattr(op, role, None), str) and getattr(op, role) == tensor
                       for role in roles)]

    def _tensor(self, name: str, memory: Memory, rows: int, channels: int, bank: int = 0) -> Tensor:
        self.tensors[name] = Tensor(self.config, name, memory, self.frames, rows, channels,
                                    groups=self.groups.get(name, 1), split=name in self.split,
                                    bank=bank)
        return self.tensors[name]

    def _input(self, port: Port) -> None:
        region = port.region
        tensor = self._tensor(port.tensor, region.memory, region.rows, region.channels)
        block, size = self._frames_block(port.name, tensor)
        self.inputs.append((dataclasses.replace(port, region=tensor.region()), block))
        self.unloaded[port.tensor] = [
            (span, block, frame * size + offset)
            for frame in range(self.frames) for span, offset in tensor.pieces(frame)]

    def _frames_block(self, name: str, tensor: Tensor) -> tuple[Block, int]:
        """Room for a tensor of all frames in DRAM, and the bytes from frame to frame."""
        size = layout.aligned(tensor.region().bytes(self.config))
        return Block(name, self.frames * size), size

    def _output(self, port: Port) -> tuple[Port, Block]:
        tensor = self.tensors[port.tensor]
        block, _ = self._frames_block(port.name, tensor)
        self._store(tensor, port.name, block, cut=True)
        return dataclasses.replace(port, region=tensor.region()), block

    def _probe(self, operation: q.Operation, group: int | None = None) -> None:
        """Store a result, or one head of it as soon as it is made."""
        tensor, name = self.tensors[operation.output], operation.name
        if not group:
            probe = Probe(name=name, tensor=operation.output, region=tensor.region())
            self.probes.append((probe, self._frames_block(name, tensor)[0]))
        block = next(b for probe, b in self.probes if probe.tensor == operation.output)
        self._store(tensor, name, block, cut=False, group=group)

    def _store(self, tensor: Tensor, name: str, block: Block, *, cut: bool,
               group: int | None = None) -> None:
        size = block.bytes // self.frames
        for frame in range(self.frames):
            for span, offset in list(tensor.pieces(frame, cut=cut))[_one(group)]:
                self._emit(Opcode.STORE, name, reads=[span], memory=tensor.memory, local=span,
                           words=span.end - span.start, address=block[frame * size + offset])

    # Instructions

    def _emit(self, opcode: Opcode, layer: str, reads=(), writes=(), **fields) -> Instr:
        queue = {name: bool(fields.pop(name, False)) for name in ("queue_read", "queue_write")}
        for span in reads:
            self._load_input(span)
        instr = Instr(opcode, fields, layer, list(reads), list(writes), **queue)
        self.instructions.append(instr)
        return instr

    def _load_input(self, span: Span) -> None:
        """Load those pieces of an input that `span` touches, once."""
        pieces = self.unloaded.get(span.buffer.name, [])
        for piece in [p for p in pieces if p[0].buffer is span.buffer
                      and p[0].start < span.end and span.start < p[0].end]:
            pieces.remove(piece)
            self._load(piece[0], piece[1], "input", offset=piece[2])

    def _load(self, target: Span, block: Block, layer: str, expert: int | None = None,
              offset: int = 0) -> None:
        condition = {} if expert is None else {"conditional": 1, "expert": expert,
                                               "queue_read": True}
        self._emit(Opcode.LOAD, layer, writes=[target], memory=target.buffer.memory, local=target,
                   words=target.end - target.start, address=block[offset], **condition)

    def _constant(self, name: str, memory: Memory, words: np.ndarray, expert: int | None = None,
                  layer: str = "") -> Span:
        """A buffer that is loaded with words, uint8 [words, word_bytes]."""
        image = layout.pack(self.config, memory, words)
        span = Buffer(name, memory, len(words))[0]
        self._load(span, Block(name, len(image), image), layer or name, expert)
        return span

    # Matrix products

    def _product(self, layer: str, weight: np.ndarray, affine: q.Affine, runs: list[_Run],
                 stride: int, *, narrow: bool = False, reads=(), unit: int | None = None,
                 first: bool = True, last: bool = True, **fields) -> None:
        """LINEAR for weight int8 [channels, source columns], tile after tile.

        stride : of the source's rows; unit : tiles start at multiples of it; first, last : cut the
        first, the last tile into chunks of rows.
        """
        c, expert = self.config, fields.get("expert")
        depth_words, to_activation = weight.shape[1] // c.depth, fields["target"] == Target.ACTIVATION
        unit = unit or channel_unit(c, narrow, whole_words=to_activation)
        parts = tiles(c, layer, len(weight), depth_words, unit, narrow)
        per_word = c.depth if to_activation else c.lanes
        for start, stop in parts:
            name = f"{layer}/{start}"
            weights = self._constant(f"{name}/weight", Memory.WEIGHT,
                                     weight_words(c, weight[start:stop], narrow), expert, layer)
            param = self._constant(
                f"{name}/param", Memory.PARAM, layout.pack_params(
                    c, affine.bias[start:stop], affine.multiplier[start:stop],
                    affine.shift[start:stop]), expert, layer)
            cut = first and start == 0 or last and stop == len(weight)
            for run in self._cut(runs) if cut else runs:
                place, writes = {}, []
                if run.target is not None:
                    writes = [run.target.columns(start // per_word,
                                                 -(-(stop - start) // per_word))]
                    place = {"destination": writes[0], "destination_stride": run.target.stride}
                old = writes if fields.get("accumulate") else []
                self._emit(Opcode.LINEAR, layer, [run.source, *reads, *old, weights, param], writes,
                           rows=run.rows, source=run.source, source_stride=stride,
                           source_words=depth_words, weight=weights, param=param,
                           channels=stop - start, narrow=int(narrow), **place, **run.fields,
                           **fields)

    def _cut(self, runs: list[_Run]) -> list[_Run]:
        pieces = []
        for run in runs:
            for a, b in chunks(self.config, 0, run.rows):
                pieces.append(_Run(b - a, _rows(run.source, a, b),
                                   run.target and _rows(run.target, a, b), run.fields))
        return pieces

    def _narrow(self, bits: int) -> bool:
        return bits <= 4 and bool(self.config.narrow)

    def _table(self, table: np.ndarray | None, layer: str) -> tuple[dict, list[Span]]:
        """Fields of LINEAR for a pointwise table, and the table's span."""
        if table is None:
            return {}, []
        span = Buffer(f"{layer}/table", Memory.TABLE, 256)[0]
        span.buffer.address = 256 * (self.tables % self.config.tables)
        self.tables += 1
        image = layout.pack(self.config, Memory.TABLE, table.view(np.uint8)[:, None])
        self._load(span, Block(span.buffer.name, len(image), image), layer)
        return {"tabled": 1, "table": span.buffer.address // 256}, [span]

    # Operations. Each returns the operations whose results are there now, if not just its own.

    def _Constant(self, op: q.Constant) -> None:
        tensor = self._tensor(op.output, Memory.RESIDUAL, *op.value.shape)
        image = tensor.region().pack(self.config, op.value)
        block = Block(op.output, len(image), image)
        for frame in range(self.frames):
            self._load(tensor.span(frame * tensor.rows, (frame + 1) * tensor.rows), block, op.name)

    def _Linear(self, op: q.Linear) -> list[q.Operation]:
        source = self.tensors[op.source]
        if op.output in self.split:
            self.deferred[op.output] = op
            return []
        roles = {tensor: bank for o in self.step.operations if isinstance(o, q.Attention)
                 for bank, tensor in ((2, o.query), (1, o.key), (2, o.value))}
        target = self._tensor(op.output, Memory.ACTIVATION, source.rows, len(op.weight),
                              roles.get(op.output, 1))
        weight, affine = filled(spread(op.weight, source), op.affine, target.columns(),
                                target.stride * self.config.depth)
        table, span = self._table(op.table, op.name)
        run = _Run(self.frames * source.rows, source.span(), target.span(), {})
        self._product(op.name, weight, affine, [run], source.stride, reads=span,
                      narrow=self._narrow(op.bits), target=Target.ACTIVATION, **table)
        self.macs += source.rows * op.weight.size
        return [op]

    def _make_head(self, name: str, group: int, bank: int, *, first: bool, last: bool) -> None:
        """One head of queries, keys or values, of all frames."""
        op = self.deferred[name]
        source, depth = self.tensors[op.source], self.config.depth
        if name not in self.tensors:
            self._tensor(name, Memory.ACTIVATION, source.rows, len(op.weight), bank)
        target = self.tensors[name]
        size = target.channels // target.groups
        rows = slice(group * size, (group + 1) * size)
        part = q.Affine(bias=op.affine.bias[rows], multiplier=op.affine.multiplier[rows],
                        shift=op.affine.shift[rows])
        weight, affine = filled(spread(op.weight[rows], source), part, np.arange(size),
                                target.width * depth)
        table, span = self._table(op.table, op.name)
        runs = [_Run(source.rows, source.span(frame * source.rows, (frame + 1) * source.rows),
                     target.head(frame, group), {}) for frame in range(self.frames)]
        self._product(op.name, weight, affine, runs, source.stride, reads=span, first=first,
                      last=last, narrow=self._narrow(op.bits), target=Target.ACTIVATION, **table)
        self.macs += source.rows * size * op.weight.shape[1]
        if self.trace:
            self._probe(op, group)

    def _AddLinear(self, op: q.AddLinear) -> None:
        source = self.tensors[op.source]
        if op.residual is None:
            target = self._tensor(op.output, Memory.RESIDUAL, source.rows, len(op.weight))
        else:
            target = self._inherit(op.output, op.residual)
        if source.rows == target.rows:
            runs = [_Run(self.frames * source.rows, source.span(), target.span(), {})]
        else:
            runs = [_Run(source.rows, source.span(frame * source.rows, (frame + 1) * source.rows),
                         target.span(at, at + source.rows), {})
                    for frame in range(self.frames)
                    for at in [frame * target.rows + op.first_row]]
        self._product(op.name, spread(op.weight, source), op.affine, runs, source.stride,
                      narrow=self._narrow(op.bits), target=Target.RESIDUAL,
                      accumulate=int(op.residual is not None))
        self.macs += source.rows * op.weight.size

    def _inherit(self, output: str, residual: str) -> Tensor:
        """The stream is updated in place: its old value must not be needed any more."""
        users = self._users(residual)
        writers = [op.name for op in users if getattr(op, "residual", None) == residual]
        if len(writers) > 1 or users[-1].name != writers[0]:
            raise CompileError(f"Residual {residual!r} must not be used after {writers[0]!r} adds to "
                               f"it, but {[op.name for op in users]} use it")
        self.tensors[output] = self.tensors[residual]
        return self.tensors[output]

    def _Norm(self, op: q.Norm) -> None:
        c, source = self.config, self.tensors[op.source]
        channels = source.channels
        require(-(-channels // c.depth), c.row_words, f"A row of {op.name}", "row_words")
        if channels > NORM_CHANNELS:
            raise CompileError(f"A row of {op.name} must have at most {NORM_CHANNELS} channels, not "
                               f"{channels}")
        target = self._tensor(op.output, Memory.ACTIVATION, op.rows, channels)
        words = layout.pack_params(c, op.affine.bias, op.affine.multiplier, op.affine.shift)
        require(len(words), c.param_words, f"The parameters of {op.name}, in words,", "param_words")
        params = self._constant(f"{op.name}/param", Memory.PARAM, words, layer=op.name)
        if op.rows == source.rows:
            pieces = [(a, b, a) for a, b in chunks(c, 0, self.frames * op.rows)]
        else:
            pieces = [(a, b, frame * source.rows + op.first_row + a - frame * op.rows)
                      for frame in range(self.frames)
                      for a, b in chunks(c, frame * op.rows, (frame + 1) * op.rows)]
        for first, last, row in pieces:
            read, write = source.span(row, row + last - first), target.span(first, last)
            self._emit(Opcode.NORM, op.name, [read, params], [write], rows=last - first,
                       mode=op.mode, channels=channels, source=read, source_stride=source.stride,
                       destination=write, destination_stride=target.stride, param=params,
                       epsilon=op.epsilon)

    def _Attention(self, op: q.Attention) -> list[q.Operation]:
        if op.query is None:
            return self._mean(op)
        c, split = self.config, op.query in self.split
        operations = [op]
        if split:
            operations = [self.deferred[name] for name in dict.fromkeys((op.key, op.value, op.query))]
            operations.append(op)
        out, made = None, set()
        for head in range(op.heads):
            at = head * op.key_heads // op.heads
            final = head == op.heads - 1
            heads = ((op.key, at, 1), (op.value, at, 2), (op.query, head, 3))
            for name, group, bank in heads if split else ():
                if (name, group) not in made:
                    made.add((name, group))
                    self._make_head(name, group, bank, first=head == 0,
                                    last=final and name == op.query)
            query, key, value = (self.tensors[name] for name in (op.query, op.key, op.value))
            if out is None:
                self._check_attention(op, query, key)
                out = self._tensor(op.output, Memory.ACTIVATION, query.rows, query.channels, 3)
            for frame in range(self.frames):
                for a, b in chunks(c, 0, query.rows) if final else [(0, query.rows)]:
                    # The last row of a causal chunk sees all keys that its chunk needs.
                    keys = key.rows - (query.rows - b if op.causal else 0)
                    self._attend(op, query.head(frame, head, a, b), key.head(frame, at),
                                 value.head(frame, at), out.head(frame, head, a, b), keys)
        self.macs += 2 * query.rows * key.rows * query.channels
        return operations

    def _check_attention(self, op: q.Attention, query: Tensor, key: Tensor) -> None:
        require(key.rows, self.config.max_rows, f"The keys of {op.name}", "max_rows")
        if query.width > HEAD_WORDS or query.width != key.width or not (
                query.stride == key.stride == self.tensors[op.value].stride):
            raise CompileError(f"A head of {op.name} must be at most {HEAD_WORDS} words of "
                               f"{self.config.depth} channels, and queries, keys and values must lie "
                               f"alike, not {query.width} words; use a configuration with a larger "
                               "Config.depth, and as many heads of keys as of queries")

    def _mean(self, op: q.Attention) -> list[q.Operation]:
        """The mean of the value rows: one query of zeros sees all keys alike."""
        key, value = self.tensors[op.key], self.tensors[op.value]
        require(key.rows, self.config.max_rows, f"The keys of {op.name}", "max_rows")
        out = self._tensor(op.output, Memory.ACTIVATION, 1, value.channels, 3)
        zeros = np.zeros((value.stride, self.config.depth), np.uint8)
        query = self._constant(f"{op.output}/zeros", Memory.ACTIVATION, zeros, layer=op.name)
        for frame in range(self.frames):
            for at in range(0, value.stride, HEAD_WORDS):
                words = min(HEAD_WORDS, value.stride - at)
                rows = slice(frame * key.rows, (frame + 1) * key.rows)
                self._attend(op, query.columns(at, words),
                             key.span(rows.start, rows.stop).columns(at, words),
                             value.span(rows.start, rows.stop).columns(at, words),
                             out.span(frame, frame + 1).columns(at, words), key.rows)
        self.macs += 2 * key.rows * value.channels
        return [op]

    def _attend(self, op: q.Attention, query: Span, key: Span, value: Span, out: Span,
                keys: int) -> None:
        self._emit(Opcode.ATTENTION, op.name, [query, key, value], [out], rows=query.rows,
                   keys=keys, causal=int(op.causal), words=key.words, query=query, key=key,
                   value=value, destination=out, stride=key.stride, destination_stride=out.stride,
                   multiplier=op.multiplier, shift=op.shift, out_multiplier=op.out_multiplier,
                   out_shift=op.out_shift)

    def _Route(self, op: q.Route) -> None:
        c, source = self.config, self.tensors[op.source]
        experts, rows = len(op.weight), self.frames * source.rows
        require(experts, c.max_experts, f"The experts of {op.name}", "max_experts")
        require(op.chosen, c.max_chosen, f"The chosen experts of {op.name}", "max_chosen")
        require(rows, c.max_rows, f"The tokens of {op.name}, of all frames in flight,", "max_rows")
        affine = q.Affine(bias=op.bias, multiplier=np.zeros(experts, np.uint16),
                          shift=np.ones(experts, np.uint8))
        self._product(op.name, spread(op.weight, source), affine,
                      [_Run(b - a, source.span(a, b), None, {"destination": a, "append": int(a > 0)})
                       for a, b in chunks(c, 0, rows)],
                      source.stride, unit=experts, first=False, last=False, target=Target.ROUTER,
                      chosen=op.chosen, over_chosen=int(op.over_chosen), multiplier=op.multiplier,
                      shift=op.shift, queue_write=True)
        self.macs += source.rows * op.weight.size

    def _Experts(self, op: q.Experts) -> None:
        experts, hidden, _ = op.up.shape
        source = self.tensors[op.source]
        stream = self._inherit(op.output, op.residual)
        table, table_span = self._table(op.table, op.name)
        chosen = next(o.chosen for o in self.step.operations if o.output == op.route)
        seconds = []
        for e in range(experts):
            name, layer = f"{op.output}/hidden{e}", f"{op.name}/expert{e}"
            middle = Tensor(self.config, name, Memory.ACTIVATION, self.frames, source.rows, hidden,
                            bank=1 + e)
            narrow = self._narrow(8 if op.bits is None else int(op.bits[e]))
            queued = {"queued": 1, "expert": e, "queue_read": True, "conditional": 1}
            weight, affine = filled(spread(op.up[e], source), _take(op.up_affine, e),
                                    middle.columns(), middle.stride * self.config.depth)
            rows = self.frames * source.rows
            self._product(layer, weight, affine, [_Run(rows, source.span(), middle.span(), {})],
                          source.stride, narrow=narrow, reads=table_span, gather=1, first=False,
                          last=False, target=Target.ACTIVATION, **queued, **table)

            def second(e=e, layer=layer, middle=middle, narrow=narrow, queued=queued, rows=rows):
                self._product(layer, spread(op.down[e], middle), _take(op.down_affine, e),
                              [_Run(rows, middle.span(), stream.span(), {})], middle.stride,
                              narrow=narrow, scatter=1, gated=1, accumulate=1, first=False,
                              last=False, target=Target.RESIDUAL, **queued)
            seconds.append(second)
            while len(seconds) > self.ahead:
                seconds.pop(0)()
        for second in seconds:
            second()
        self.macs += source.rows * chosen * (op.up[0].size + op.down[0].size)


def _one(group: int | None) -> slice:
    return slice(None) if group is None else slice(group, group + 1)


def _rows(span: Span, first: int, last: int) -> Span:
    return Span(span.buffer, span.start + first * span.stride, span.words, last - first, span.stride)


def _take(affine: q.Affine, expert: int) -> q.Affine:
    return q.Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                    shift=affine.shift[expert])
