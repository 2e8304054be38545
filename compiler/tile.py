"""Quantised operations to instructions: matrix products cut into weight tiles that fit on chip.

A tile is a run of output channels with the whole depth, so that a result needs no partial sums and
the integers do not depend on the configuration.
"""

import math

import numpy as np

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Block, Buffer, Instr, Lowered, Span
from moeware.compiler.quantise import QuantisedStep
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import HEAD_WORDS, NORM_CHANNELS, Memory, Opcode, Target
from moeware.hw.arch.program import Probe, Region

__all__ = ["tile"]


def tile(step: QuantisedStep, config: Config, *, trace: bool = False) -> Lowered:
    """Instructions of one device step, in an order that is right without any overlap.

    trace : store every operation's result in DRAM, as a probe.

    Raises
    ------
    CompileError
        A row, tile or count that the configuration has no room for: which, and by how much.
    """
    return _Tiler(step, config).run(trace)


class _Tiler:
    def __init__(self, step: QuantisedStep, config: Config):
        self.step, self.config = step, config
        self.instructions: list[Instr] = []
        self.buffers: dict[str, Buffer] = {}  # by tensor
        self.shapes: dict[str, tuple[int, int]] = {}  # rows, channels
        self.groups = self._head_groups()
        self.tables = 0
        self.macs = 0

    def run(self, trace: bool) -> Lowered:
        inputs, outputs, probes = [], [], []
        for port in self.step.inputs:
            block = Block(port.name, port.region.bytes(self.config))
            buffer = self._buffer(port.tensor, port.region.memory, port.region.rows,
                                  port.region.channels)
            self._load(buffer[0], block, "input")
            inputs.append((port, block))
        for operation in self.step.operations:
            getattr(self, f"_{type(operation).__name__}")(operation)
            if trace and operation.output in self.buffers:
                probes.append(self._probe(operation))
            # At once, as the stream is updated in place.
            outputs += [(port, self._store(port.tensor, port.region, port.name))
                        for port in self.step.outputs if port.tensor == operation.output]
        return Lowered(self.instructions, inputs, outputs, probes, self.step.operations, self.macs)

    # Tensors

    def _head_groups(self) -> dict[str, int]:
        """Groups of channels that start at a word: the heads of what attention reads and writes."""
        groups: dict[str, int] = {}
        for op in self.step.operations:
            if isinstance(op, q.Attention) and op.query is not None:
                for tensor, count in ((op.query, op.heads), (op.key, op.key_heads),
                                      (op.value, op.key_heads), (op.output, op.heads)):
                    if groups.setdefault(tensor, count) != count:
                        raise CompileError(f"Tensor {tensor!r} must have one number of heads, not "
                                           f"{groups[tensor]} and {count}")
        return groups

    def _buffer(self, tensor: str, memory: Memory, rows: int, channels: int, bank: int = 0) -> Buffer:
        region = Region(memory=memory, rows=rows, channels=channels, address=0,
                        groups=self.groups.get(tensor, 1))
        words = rows * region.words_per_row(self.config)
        self.shapes[tensor] = rows, channels
        self.buffers[tensor] = Buffer(tensor, memory, words, bank % self.config.activation_banks)
        return self.buffers[tensor]

    def _stride(self, tensor: str) -> int:
        return self.buffers[tensor].words // self.shapes[tensor][0]

    def _columns(self, tensor: str) -> np.ndarray:
        """Place of each channel in a row of activations, groups filled up to whole words."""
        channels, groups = self.shapes[tensor][1], self.groups.get(tensor, 1)
        size = channels // groups
        padded = -(-size // self.config.depth) * self.config.depth
        return (np.arange(groups)[:, None] * padded + np.arange(size)).ravel()

    def _require(self, value: int, limit: int, what: str, field: str) -> None:
        if value > limit:
            raise CompileError(f"{what} takes {value}, {value - limit} more than Config.{field} = "
                               f"{limit}; use a configuration with more")

    # Instructions

    def _emit(self, opcode: Opcode, layer: str, reads=(), writes=(), **fields) -> Instr:
        queue = {name: bool(fields.pop(name, False)) for name in ("queue_read", "queue_write")}
        instr = Instr(opcode, fields, layer, list(reads), list(writes), **queue)
        self.instructions.append(instr)
        return instr

    def _load(self, target: Span, block: Block, layer: str, expert: int | None = None) -> None:
        condition = {} if expert is None else {"conditional": 1, "expert": expert,
                                               "queue_read": True}
        self._emit(Opcode.LOAD, layer, writes=[target], memory=target.buffer.memory, local=target,
                   words=target.words, address=block, **condition)

    def _constant(self, name: str, memory: Memory, words: np.ndarray, expert: int | None = None,
                  layer: str = "") -> Buffer:
        """A buffer that is loaded with words, uint8 [words, word_bytes]."""
        image = layout.pack(self.config, memory, words)
        buffer = Buffer(name, memory, len(words))
        self._load(buffer[0], Block(name, len(image), image), layer or name, expert)
        return buffer

    def _store(self, tensor: str, region: Region, name: str) -> Block:
        block, buffer = Block(name, region.bytes(self.config)), self.buffers[tensor]
        self._emit(Opcode.STORE, name, reads=[buffer[0]], memory=buffer.memory, local=buffer[0],
                   words=buffer.words, address=block)
        return block

    def _probe(self, operation: q.Operation) -> tuple[Probe, Block]:
        tensor = operation.output
        rows, channels = self.shapes[tensor]
        region = Region(memory=self.buffers[tensor].memory, rows=rows, channels=channels, address=0,
                        groups=self.groups.get(tensor, 1))
        return (Probe(name=operation.name, tensor=tensor, region=region),
                self._store(tensor, region, operation.name))

    # Matrix products

    def _product(self, layer: str, source: Span, stride: int, weight: np.ndarray, affine: q.Affine,
                 unit: int, reads: list[Span], writes: list[Span], **fields) -> None:
        """LINEAR for weight int8 [channels, source columns], tile after tile.

        unit : tiles start at multiples of it; fields["destination"] : span of channel 0, in a
        memory of `lanes` or `depth` channels a word.
        """
        c = self.config
        depth_words, channels = weight.shape[1] // c.depth, len(weight)
        self._require(depth_words, c.row_words, f"A row of {layer}", "row_words")
        per_word = c.depth if fields["target"] == Target.ACTIVATION else c.lanes
        destination, expert = fields.pop("destination", None), fields.get("expert")
        size = self._tile_channels(layer, channels, depth_words, unit)
        for start in range(0, channels, size):
            stop = min(start + size, channels)
            groups = -(-(stop - start) // c.outputs)
            padded = np.zeros((groups * c.outputs, weight.shape[1]), np.int8)
            padded[:stop - start] = weight[start:stop]
            words = padded.reshape(groups, c.outputs, depth_words, c.depth).transpose(0, 2, 1, 3)
            words = words.reshape(groups * depth_words, -1).view(np.uint8)
            params = layout.pack_params(c, affine.bias[start:stop], affine.multiplier[start:stop],
                                        affine.shift[start:stop])
            name = f"{layer}/{start}"
            weights = self._constant(f"{name}/weight", Memory.WEIGHT, words, expert, layer)
            param = self._constant(f"{name}/param", Memory.PARAM, params, expert, layer)
            place = {}
            if destination is not None:
                place["destination"] = destination.buffer[destination.start + start // per_word]
            self._emit(Opcode.LINEAR, layer, [*reads, weights[0], param[0]], writes,
                       source=source, source_stride=stride, source_words=depth_words,
                       weight=weights[0], param=param[0], channels=stop - start, **place, **fields)

    def _tile_channels(self, layer: str, channels: int, depth_words: int, unit: int) -> int:
        """Channels of a tile: half of the weight and parameter memories, so that the next one loads
        meanwhile; one unit at least."""
        c = self.config

        def fits(size: int, share: int) -> bool:
            return (-(-size // c.outputs) * depth_words <= c.weight_words // share
                    and -(-size // c.lanes) <= c.param_words // share)

        unit = min(unit, channels)
        if not fits(unit, 1):
            self._require(-(-unit // c.outputs) * depth_words, c.weight_words,
                          f"The smallest weight tile of {layer}, in words,", "weight_words")
            self._require(-(-unit // c.lanes), c.param_words,
                          f"The smallest parameter tile of {layer}, in words,", "param_words")
        size = unit
        while size < channels and fits(size + unit, 2):
            size += unit
        return min(size, channels)

    def _table(self, table: np.ndarray | None, layer: str) -> tuple[dict, list[Span]]:
        """Fields of LINEAR for a pointwise table, and the table's span."""
        if table is None:
            return {}, []
        buffer = self._constant(f"{layer}/table", Memory.TABLE, table.view(np.uint8)[:, None],
                                layer=layer)
        buffer.address = 256 * (self.tables % self.config.tables)
        self.tables += 1
        return {"tabled": 1, "table": buffer.address // 256}, [buffer[0]]

    def _spread(self, weight: np.ndarray, source: str) -> np.ndarray:
        """Weight columns moved to where the source's channels lie in its rows; zeros elsewhere."""
        spread = np.zeros((len(weight), self._stride(source) * self.config.depth), np.int8)
        spread[:, self._columns(source)] = weight
        return spread

    def _fill(self, weight: np.ndarray, affine: q.Affine, output: str) -> tuple[np.ndarray, q.Affine]:
        """Rows and parameters moved to where the output's channels lie; zero results elsewhere, as
        later products read whole words."""
        columns, width = self._columns(output), self._stride(output) * self.config.depth
        rows = np.zeros((width, weight.shape[1]), np.int8)
        rows[columns] = weight
        parts = {}
        for name, default in (("bias", 0), ("multiplier", 0), ("shift", 1)):
            array = getattr(affine, name)
            parts[name] = np.full(width, default, array.dtype)
            parts[name][columns] = array
        return rows, q.Affine(**parts)

    # Operations

    def _Constant(self, op: q.Constant) -> None:
        rows, channels = op.value.shape
        buffer = self._buffer(op.output, Memory.RESIDUAL, rows, channels)
        region = Region(memory=Memory.RESIDUAL, rows=rows, channels=channels, address=0)
        image = region.pack(self.config, op.value)
        self._load(buffer[0], Block(op.output, len(image), image), op.name)

    def _Linear(self, op: q.Linear) -> None:
        rows = self.shapes[op.source][0]
        role = {tensor: bank for o in self.step.operations if isinstance(o, q.Attention)
                for bank, tensor in ((2, o.query), (1, o.key), (2, o.value))}
        buffer = self._buffer(op.output, Memory.ACTIVATION, rows, len(op.weight),
                              role.get(op.output, 1))
        table, table_span = self._table(op.table, op.name)
        weight, affine = self._fill(self._spread(op.weight, op.source), op.affine, op.output)
        self._product(op.name, self.buffers[op.source][0], self._stride(op.source), weight, affine,
                      math.lcm(self.config.outputs, self.config.depth),
                      [self.buffers[op.source][0], *table_span], [buffer[0]], rows=rows,
                      target=Target.ACTIVATION, destination=buffer[0],
                      destination_stride=self._stride(op.output), **table)
        self.macs += rows * op.weight.size

    def _AddLinear(self, op: q.AddLinear) -> None:
        rows, channels = self.shapes[op.source][0], len(op.weight)
        if op.residual is None:
            buffer = self._buffer(op.output, Memory.RESIDUAL, rows, channels)
        else:
            buffer = self._inherit(op.output, op.residual)
        stride = self._stride(op.output)
        self._product(op.name, self.buffers[op.source][0], self._stride(op.source),
                      self._spread(op.weight, op.source), op.affine, self.config.outputs,
                      [self.buffers[op.source][0], buffer[0]], [buffer[0]], rows=rows,
                      target=Target.RESIDUAL, accumulate=int(op.residual is not None),
                      destination=buffer[op.first_row * stride], destination_stride=stride)
        self.macs += rows * op.weight.size

    def _inherit(self, output: str, residual: str) -> Buffer:
        """The stream is updated in place: its old value must not be needed any more."""
        uses = [op.name for op in self.step.operations
                if residual in (getattr(op, "residual", None), getattr(op, "source", None))]
        writers = [op.name for op in self.step.operations
                   if getattr(op, "residual", None) == residual]
        if len(writers) > 1 or uses[-1] != writers[0]:
            raise CompileError(f"Residual {residual!r} must not be used after {writers[0]!r} adds to "
                               f"it, but {uses} use it")
        self.buffers[output], self.shapes[output] = self.buffers[residual], self.shapes[residual]
        return self.buffers[output]

    def _Norm(self, op: q.Norm) -> None:
        c, source = self.config, self.buffers[op.source]
        channels, stride = self.shapes[op.source][1], self._stride(op.source)
        self._require(-(-channels // c.depth), c.row_words, f"A row of {op.name}", "row_words")
        if channels > NORM_CHANNELS:
            raise CompileError(f"A row of {op.name} must have at most {NORM_CHANNELS} channels, not "
                               f"{channels}")
        buffer = self._buffer(op.output, Memory.ACTIVATION, op.rows, channels)
        params = self._constant(f"{op.name}/param", Memory.PARAM,
                                layout.pack_params(c, op.affine.bias, op.affine.multiplier,
                                                   op.affine.shift), layer=op.name)
        self._require(params.words, c.param_words, f"The parameters of {op.name}, in words,",
                      "param_words")
        read = Span(source, op.first_row * stride, op.rows * stride)
        self._emit(Opcode.NORM, op.name, [read, params[0]], [buffer[0]], rows=op.rows, mode=op.mode,
                   channels=channels, source=read, source_stride=stride, destination=buffer[0],
                   destination_stride=self._stride(op.output), param=params[0], epsilon=op.epsilon)

    def _Attention(self, op: q.Attention) -> None:
        c, (keys, channels) = self.config, self.shapes[op.key]
        self._require(keys, c.max_rows, f"The keys of {op.name}", "max_rows")
        rows = 1 if op.query is None else self.shapes[op.query][0]
        key, value, stride = self.buffers[op.key], self.buffers[op.value], self._stride(op.key)
        out = self._buffer(op.output, Memory.ACTIVATION, rows, channels, 3)
        if op.query is None:
            query = Buffer(f"{op.output}/zeros", Memory.ACTIVATION, stride)
            zeros = layout.pack(c, Memory.ACTIVATION, np.zeros((stride, c.depth), np.uint8))
            self._load(query[0], Block(query.name, len(zeros), zeros), op.name)
            # Equal scores stay equal however the channels are cut into heads.
            parts = [(at, min(HEAD_WORDS, stride - at)) for at in range(0, stride, HEAD_WORDS)]
        else:
            query, words = self.buffers[op.query], stride // op.heads
            if words > HEAD_WORDS or op.heads != op.key_heads:
                raise CompileError(f"A head of {op.name} must be at most {HEAD_WORDS} words of "
                                   f"{c.depth} channels and have a key head of its own, not {words} "
                                   "words; use a configuration with a larger Config.depth")
            parts = [(h * words, words) for h in range(op.heads)]
        for at, words in parts:
            self._emit(Opcode.ATTENTION, op.name, [query[0], key[0], value[0]], [out[0]], rows=rows,
                       keys=keys, causal=int(op.causal), words=words, query=query[at],
                       key=key[at], value=value[at], destination=out[at], stride=stride,
                       destination_stride=self._stride(op.output), multiplier=op.multiplier,
                       shift=op.shift, out_multiplier=op.out_multiplier, out_shift=op.out_shift)
        self.macs += 2 * rows * keys * channels

    def _Route(self, op: q.Route) -> None:
        c, rows = self.config, self.shapes[op.source][0]
        self._require(len(op.weight), c.max_experts, f"The experts of {op.name}", "max_experts")
        self._require(op.chosen, c.max_chosen, f"The chosen experts of {op.name}", "max_chosen")
        self._require(rows, c.max_rows, f"The tokens of {op.name}", "max_rows")
        affine = q.Affine(bias=op.bias, multiplier=np.zeros(len(op.bias), np.uint16),
                          shift=np.ones(len(op.bias), np.uint8))
        self._product(op.name, self.buffers[op.source][0], self._stride(op.source),
                      self._spread(op.weight, op.source), affine, len(op.weight),
                      [self.buffers[op.source][0]], [], rows=rows, target=Target.ROUTER,
                      chosen=op.chosen, over_chosen=int(op.over_chosen), multiplier=op.multiplier,
                      shift=op.shift, queue_write=True)
        self.macs += rows * op.weight.size

    def _Experts(self, op: q.Experts) -> None:
        experts, hidden, _ = op.up.shape
        rows, source = self.shapes[op.source][0], self.buffers[op.source]
        stream = self._inherit(op.output, op.residual)
        table, table_span = self._table(op.table, op.name)
        name = f"{op.output}/hidden"
        chosen = next(o.chosen for o in self.step.operations if o.output == op.route)
        for e in range(experts):
            middle = self._buffer(name, Memory.ACTIVATION, rows, hidden, 1 + e)
            queued = {"queued": 1, "expert": e, "queue_read": True, "conditional": 1}
            weight, affine = self._fill(self._spread(op.up[e], op.source), _take(op.up_affine, e),
                                        name)
            self._product(f"{op.name}/expert{e}", source[0], self._stride(op.source), weight, affine,
                          math.lcm(self.config.outputs, self.config.depth),
                          [source[0], *table_span], [middle[0]], gather=1, destination=middle[0],
                          destination_stride=self._stride(name), target=Target.ACTIVATION,
                          **queued, **table)
            self._product(f"{op.name}/expert{e}", middle[0], self._stride(name),
                          self._spread(op.down[e], name), _take(op.down_affine, e),
                          self.config.outputs, [middle[0], stream[0]], [stream[0]], scatter=1,
                          gated=1, accumulate=1, destination=stream[0],
                          destination_stride=self._stride(op.output), target=Target.RESIDUAL,
                          **queued)
        self.macs += rows * chosen * (op.up[0].size + op.down[0].size)


def _take(affine: q.Affine, expert: int) -> q.Affine:
    return q.Affine(bias=affine.bias[expert], multiplier=affine.multiplier[expert],
                    shift=affine.shift[expert])
