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
from moeware.hw.arch.isa import Memory
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

    split : tensors whose heads are made one by one, by the attention that reads them; deferred : the
    operations that make these; apart : inputs with a tensor for each frame, as the room for all at
    once would be for a single product.
    """

    def __init__(self, step: QuantisedStep, config: Config, frames: int, trace: bool, plan: Plan):
        self.step, self.config, self.frames = step, config, frames
        self.trace, self.plan = trace, plan
        self.assembly = Assembly(config)
        self.tensors: dict[str, Tensor] = {}
        self.groups, self.split = self._heads()
        self.deferred: dict[str, q.Linear] = {}
        self.apart: dict[str, list[Tensor]] = {}
        self.inputs: list[tuple[Port, Block]] = []
        self.outputs: list[tuple[Port, Block]] = []
        self.probes: list[tuple[Probe, Block]] = []
        self.macs = 0

    def _heads(self) -> tuple[dict[str, int], set[str]]:
        """Groups of channels that start at a word, which are the heads of what attention reads and
        writes; and the tensors that are made head by head."""
        groups: dict[str, int] = {}
        split: set[str] = set()
        made = {op.output: op for op in self.step.operations}
        for op in self.step.operations:
            if not isinstance(op, q.Attention) or op.query is None:
                continue
            sources = {op.query: op.heads, op.key: op.key_heads, op.value: op.key_heads}
            for tensor, count in (*sources.items(), (op.output, op.heads)):
                if groups.setdefault(tensor, count) != count:
                    raise CompileError(f"Tensor {tensor!r} must have one number of heads, not "
                                       f"{groups[tensor]} and {count}")
            if all(isinstance(made.get(tensor), q.Linear) and self._only_user(tensor, op)
                   and self._head_fills_groups(made[tensor], count)
                   for tensor, count in sources.items()):
                split |= set(sources)
        return groups, split

    def _head_fills_groups(self, op: q.Operation, heads: int) -> bool:
        """Whether heads apart from each other leave no output of the array without work."""
        c = self.config
        words = -(-(len(op.weight) // heads) // c.depth)
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

    def users(self, tensor: str) -> list[q.Operation]:
        roles = ("source", "residual", "query", "key", "value", "route")
        return [op for op in self.step.operations
                if any(isinstance(getattr(op, role, None), str) and getattr(op, role) == tensor
                       for role in roles)]

    def _only_user(self, tensor: str, op: q.Operation) -> bool:
        return ([user is op for user in self.users(tensor)] == [True]
                and tensor not in [port.tensor for port in self.step.outputs])

    def tensor(self, name: str, memory: Memory, rows: int, channels: int, bank: int = 0) -> Tensor:
        self.tensors[name] = Tensor(self.config, name, memory, self.frames, rows, channels,
                                    groups=self.groups.get(name, 1), split=name in self.split,
                                    bank=bank)
        return self.tensors[name]

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
                       groups=self.groups.get(name, 1))
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
