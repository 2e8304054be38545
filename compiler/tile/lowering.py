"""What the operations of one device step share while they become instructions."""

import dataclasses
from functools import cached_property

from moeware.compiler.errors import CompileError
from moeware.compiler.lowered import Block, Span
from moeware.compiler.quantise import QuantisedStep
from moeware.compiler.tile.assembly import Assembly
from moeware.compiler.tile.tensors import Tensor
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.program import Port, Probe

__all__ = ["Lowering", "Plan"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a lowering trades for room in the activation memory.

    experts : that take turns in the linear unit, tile by tile, so that few and many tokens even out;
    each takes a buffer of hidden values. blocks : of rows at least, that a feed-forward network's
    hidden values are made for, one block after another (see `tile.chain`); its weights are loaded
    for each.
    spill : every tensor lies in DRAM (see `tile.spill`).
    """

    experts: int = 2
    blocks: int = 1
    spill: bool = False

    def __str__(self) -> str:
        if self.spill:
            return "activations do not fit on chip and pass through DRAM"
        if self.blocks > 1:
            return f"hidden values are made in {self.blocks} blocks of rows, with weights for each"
        return "activations stay on chip"


class Lowering:
    """Instructions, tensors, ports and probes of a step of `frames` frames in the making.

    groups : of channels that start at a word, which are the heads of what attention reads and writes;
    rooms : channels that each of these takes words for, where others of its attention have more; split :
    tensors whose heads are made one by one, by the attention that reads them; deferred : the
    operations that make these; rotations : factors of `q.Norm.rotation` on chip, by their words;
    apart : inputs with a tensor for each frame, as the room for all at
    once would be for a single product.
    """

    def __init__(self, step: QuantisedStep, config: Config, frames: int, trace: bool, plan: Plan):
        self.step, self.config, self.frames = step, config, frames
        self.trace, self.plan = trace, plan
        self.assembly = Assembly(config)
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}
        self.rooms: dict[str, int] = {}
        self.split: set[str] = set()
        self._heads()
        self.deferred: dict[str, q.Linear | q.AddLinear | q.Norm] = {}
        self.rotations: dict[bytes, Span] = {}
        self.apart: dict[str, list[Tensor]] = {}
        self.inputs: list[tuple[Port, Block]] = []
        self.outputs: list[tuple[Port, Block]] = []
        self.probes: list[tuple[Probe, Block]] = []
        self.macs = 0

    def _heads(self) -> None:
        """Find `groups`, `rooms` and `split`."""
        for op in self.step.operations:
            if not isinstance(op, q.Attention) or op.query is None:
                continue
            sources = {op.query: op.heads, op.key: op.key_heads, op.value: op.key_heads}
            sources |= {product.output: count for tensor, count in sources.items()
                        for product in self.wide.get(tensor, [])}
            tensors = sources | {op.output: op.heads}
            widest = max(self.channels[tensor] // count for tensor, count in tensors.items())
            for tensor, count in tensors.items():
                if self.groups.setdefault(tensor, count) != count:
                    raise CompileError(f"Tensor {tensor!r} must have one number of heads, not "
                                       f"{self.groups[tensor]} and {count}")
                if self.channels[tensor] // count < widest:
                    self.rooms[tensor] = widest
            # Queries come in blocks of rows: their products would be stored when they are sums.
            if len(self.wide.get(op.query, [])) < 2 and all(
                    self._made_by_heads(tensor, count) for tensor, count in sources.items()):
                self.split |= set(sources)

    @cached_property
    def wide(self) -> dict[str, list[q.AddLinear]]:
        """The products whose sums are normalised or turned on their way to attention, by the tensor
        that they become."""
        made = {op.output: op for op in self.step.operations}
        found = {}
        for norm in [made.get(tensor) for op in made.values() if isinstance(op, q.Attention)
                     for tensor in (op.query, op.key, op.value)]:
            op, products = norm and made.get(getattr(norm, "source", None)), []
            while isinstance(norm, q.Norm) and isinstance(op, q.AddLinear):
                products.insert(0, op)
                op = made.get(op.residual)
            if products and products[0].residual is None:
                found[norm.output] = products
        return found

    @cached_property
    def attended(self) -> dict[str, int]:
        """Activation banks of what attention reads, so that its engine finds keys beside values."""
        return {tensor: bank for op in self.step.operations if isinstance(op, q.Attention)
                for bank, tensor in ((2, op.query), (1, op.key), (2, op.value))}

    def _made_by_heads(self, tensor: str, heads: int) -> bool:
        """Whether each head can be made by itself, for one reader, and leaves no output of the array
        without work."""
        op = next((op for op in self.step.operations if op.output == tensor), None)
        kept = [port.tensor for port in self.step.outputs]
        if op is None or len(self.users(tensor)) != 1 or tensor in kept:
            return False
        if isinstance(op, q.Norm):
            return tensor in self.wide and (op.mode is NormMode.SCALE or op.groups == heads)
        if not isinstance(op, (q.Linear, q.AddLinear)):
            return False
        c = self.config
        words = -(-max(len(op.weight) // heads, self.rooms.get(tensor, 0)) // c.depth)
        return words * c.depth % (c.outputs << self.assembly.narrow(op.bits)) == 0

    @cached_property
    def rows(self) -> dict[str, int]:
        """Of each tensor of a whole step, of one frame."""
        rows = {port.tensor: port.region.rows for port in self.step.inputs}
        for op in self.step.operations:
            match op:
                case q.Constant():
                    rows[op.output] = len(op.value)
                case q.Norm():
                    rows[op.output] = op.rows
                case q.Attention():
                    rows[op.output] = rows[op.query] if op.query is not None else 1
                case _:
                    rows[op.output] = rows[getattr(op, "residual", None) or op.source]
        return rows

    @cached_property
    def channels(self) -> dict[str, int]:
        """Of each tensor of a whole step, but of routes."""
        channels = {port.tensor: port.region.channels for port in self.step.inputs}
        for op in self.step.operations:
            match op:
                case q.Constant():
                    channels[op.output] = op.value.shape[1]
                case q.Linear() | q.AddLinear():
                    channels[op.output] = len(op.weight)
                case q.Norm():
                    channels[op.output] = len(op.affine.bias)
                case q.Attention():
                    channels[op.output] = channels[op.value] // op.key_heads * op.heads
                case q.Experts():
                    channels[op.output] = channels[op.residual]
        return channels

    def users(self, tensor: str) -> list[q.Operation]:
        roles = ("source", "residual", "query", "key", "value", "route")
        return [op for op in self.step.operations
                if any(isinstance(getattr(op, role, None), str) and getattr(op, role) == tensor
                       for role in roles)]

    def deferred_products(self, name: str) -> list[q.Linear] | list[q.AddLinear]:
        """The products of a tensor that is made head by head."""
        op = self.deferred[name]
        return self.wide[name] if isinstance(op, q.Norm) else [op]

    def tensor(self, name: str, memory: Memory, rows: int, channels: int, bank: int = 0) -> Tensor:
        self.tensors[name] = self.shape(name, memory, rows, channels, bank)
        return self.tensors[name]

    def shape(self, name: str, memory: Memory, rows: int, channels: int, bank: int = 0) -> Tensor:
        """How a tensor lies, or will lie."""
        return Tensor(self.config, name, memory, self.frames, rows, channels,
                      groups=self.groups.get(name, 1), split=name in self.split,
                      room=self.rooms.get(name, 0), bank=bank)

    def block(self, name: str, tensor: Tensor) -> Block:
        """Room for a tensor of all frames in DRAM."""
        return Block(name, self.frames * layout.aligned(tensor.region().bytes(self.config)))

    def input(self, port: Port) -> None:
        region = port.region
        tensor = self.tensor(port.tensor, region.memory, region.rows, region.channels)
        block = self.block(port.name, tensor)
        self.inputs.append((dataclasses.replace(port, region=tensor.region()), block))
        users = self.users(port.tensor)
        if len(users) == 1 and isinstance(users[0], q.AddLinear) and users[0].source == port.tensor:
            self.apart[port.tensor] = [
                Tensor(self.config, f"{port.tensor}/{frame}", tensor.memory, 1, tensor.rows,
                       tensor.channels) for frame in range(self.frames)]
        for frame in range(self.frames):
            alone = self.apart.get(port.tensor)
            for span, offset in alone[frame].pieces(0) if alone else tensor.pieces(frame):
                self.assembly.load_later(span, block, "input",
                                         offset=frame * block.bytes // self.frames + offset)

    def output(self, port: Port) -> None:
        tensor = self.tensors[port.tensor]
        block = self.block(port.name, tensor)
        self.assembly.store_tensor(tensor, block, port.name, cut=True)
        self.outputs.append((dataclasses.replace(port, region=tensor.region()), block))

    def probe(self, operation: q.Operation, frame: int | None = None,
              group: int | None = None) -> None:
        """Store a result, or one head of one frame of it as soon as that is made."""
        tensor, name = self.tensors[operation.output], operation.name
        if not (frame or group):
            probe = Probe(name=name, tensor=operation.output, region=tensor.region())
            self.probes.append((probe, self.block(name, tensor)))
        block = next(b for probe, b in self.probes if probe.tensor == operation.output)
        self.assembly.store_tensor(tensor, block, name, cut=False, frame=frame, group=group)

    def probe_rows(self, operation: q.Operation, span: Span, first: int, channels: int) -> None:
        """Store rows of a result from row `first` on, counted through all frames, if traced."""
        if not self.trace:
            return
        name, rows = operation.output, self.rows[operation.output]
        shape = Tensor(self.config, name, span.buffer.memory, self.frames, rows, channels,
                       groups=self.groups.get(name, 1), room=self.rooms.get(name, 0))
        block = next((b for probe, b in self.probes if probe.tensor == name), None)
        if block is None:
            block = self.block(operation.name, shape)
            self.probes.append((Probe(name=operation.name, tensor=name, region=shape.region()),
                                block))
        frame, row = divmod(first, rows)
        beats = layout.beats(self.config, shape.memory, row * shape.stride)
        self.assembly.store(span, block, operation.name, offset=block.bytes // self.frames * frame
                            + beats * self.config.bus_bytes)

    def inherit(self, output: str, residual: str) -> Tensor:
        """The stream is updated in place: its old value must not be needed any more."""
        users = self.users(residual)
        writers = [op.name for op in users if getattr(op, "residual", None) == residual]
        if len(writers) > 1 or users[-1].name != writers[0]:
            raise CompileError(f"Residual {residual!r} must not be used after {writers[0]!r} adds to "
                               f"it, but {[op.name for op in users]} use it")
        self.tensors[output] = self.tensors[residual]
        return self.tensors[output]
