"""What a model needs at least, block by block, and how much of the measured time that is.

A block is what data dependencies keep apart in one frame: the patch embedding, the attention half or
the feed-forward half of a layer, or the head. Within one the engines may overlap, so the least time of
a block is that of its busiest resource: products of the linear unit, products of the attention unit,
bytes on the bus.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, Opcode

__all__ = ["Block", "blocks", "latency_efficiency", "throughput_efficiency"]


@dataclass
class Block:
    """Work of one block of one run.

    linear_macs, attention_macs : as routed; narrow_macs : those of `linear_macs` with narrow weights,
    of which the unit makes two where it makes one else; bytes : that cross the bus, but for
    instructions; bytes_spare : those of them that need not, and do not belong to the least times: of
    constants that crossed in the same block before, or of experts without tokens.
    """

    name: str
    operations: list[q.Operation] = field(default_factory=list)
    linear_macs: int = 0
    narrow_macs: int = 0
    attention_macs: int = 0
    bytes: int = 0
    bytes_spare: int = 0

    def cycles(self, config: Config, bytes_per_cycle: float) -> dict[str, float]:
        """Least cycles of each resource."""
        return {"linear": (self.linear_macs - self.narrow_macs / 2) / config.linear_macs,
                "attention": self.attention_macs / config.attention_macs,
                "bus": (self.bytes - self.bytes_spare) / bytes_per_cycle}


def blocks(operations: list[q.Operation], instructions: Iterable, shapes: dict[str, tuple[int, int]],
           chosen: dict[str, np.ndarray], config: Config, *, frames: int = 1) -> list[Block]:
    """The blocks of a device step in the order of execution.

    instructions : of the step, lowered, of `frames` frames in flight together; shapes : rows and
    channels of the step's inputs; chosen : the experts of each row, those of one frame after those of
    the other, int64 [frames * rows, chosen] by the route's name.

    Raises
    ------
    ValueError
        An instruction that belongs to no operation.
    """
    found = _split(operations)
    place = {op.name: block for block in found for op in block.operations}
    queues = _Queues(operations, chosen)
    narrow: set[tuple[str, int | None]] = set()  # operations, or with an expert
    loaded: set[tuple[int, int, int]] = set()  # constants, by the block that loads them
    needless: dict[int, int] = {}  # bytes of buffers that were loaded before it was known who needs them
    for instr in instructions:
        name = _operation(instr.layer, place)
        if name:
            block = place[name]
        elif instr.opcode in (Opcode.LOAD, Opcode.STORE):  # an input or an output
            block = found[0] if instr.opcode is Opcode.LOAD else found[-1]
        else:
            raise ValueError(f"Instruction of layer {instr.layer!r} must belong to one of {list(place)}")
        fields = instr.fields
        if instr.queue_write:
            queues.route(name, fields["rows"], keep=bool(fields.get("append")))
        if fields.get("conditional") and not queues.lengths[fields["expert"]]:
            block.bytes_spare += sum(needless.pop(id(span.buffer), 0) for span in instr.reads)
            continue
        if instr.opcode is Opcode.LINEAR and fields.get("narrow"):
            narrow.add((name, fields.get("expert")))
        if instr.opcode in (Opcode.LOAD, Opcode.STORE):
            size = config.bus_bytes * layout.transfer_beats(config, fields)
            block.bytes += size
            part = fields["address"]
            if instr.opcode is Opcode.LOAD and part.block.data is not None:
                constant = id(block), id(part.block), part.offset
                if constant in loaded:
                    block.bytes_spare += size
                elif not fields.get("conditional") and fields["memory"] != Memory.TABLE:
                    needless[id(instr.writes[0].buffer)] = size
                loaded.add(constant)
    sizes = dict(shapes)
    for block in found:
        for op in block.operations:
            _count(op, block, sizes, chosen, narrow, frames)
    return found


def latency_efficiency(found: list[Block], config: Config, bytes_per_cycle: float,
                       cycles: float) -> float:
    """Sum over the blocks of their least times, as a share of the cycles of one frame."""
    return sum(max(block.cycles(config, bytes_per_cycle).values()) for block in found) / cycles


def throughput_efficiency(found: list[Block], config: Config, bytes_per_cycle: float,
                          cycles: float) -> float:
    """Least time of the busiest resource over all blocks, as a share of the cycles: with frames in
    flight, every resource may work all the time. `found` and `cycles` are of the same frames."""
    each = [block.cycles(config, bytes_per_cycle) for block in found]
    return max(sum(cycles[name] for cycles in each) for name in each[0]) / cycles


def _operation(layer: str, known: Iterable[str]) -> str:
    """The operation whose name, perhaps with parts like "/expert3" behind it, a layer has; else ""."""
    while layer and layer not in known:
        layer = layer.rpartition("/")[0]
    return layer


def _split(operations: list[q.Operation]) -> list[Block]:
    """Blocks begin where the residual stream is normalised."""
    groups: list[list[q.Operation]] = [[]]
    wide = {op.output for op in operations if isinstance(op, q.AddLinear) and op.residual is None}
    for op in operations:
        if isinstance(op, q.Norm) and op.source not in wide and groups[-1]:
            groups.append([])
        groups[-1].append(op)
    found, layer = [], -1
    for group in groups:
        attention = any(isinstance(op, q.Attention) and op.query is not None for op in group)
        layer += attention
        adds = any(isinstance(op, q.Experts) or getattr(op, "residual", None) for op in group)
        if not isinstance(group[0], q.Norm):
            name = "embedding"
        elif attention:
            name = f"layer {layer}, attention"
        elif adds:
            kind = "experts" if any(isinstance(op, q.Experts) for op in group) else "feed-forward"
            name = f"layer {layer}, {kind}"
        else:
            name = "head"
        found.append(Block(name, group))
    return found


class _Queues:
    """Rows in the experts' queues, as routing instructions fill them in the order of the rows."""

    def __init__(self, operations: list[q.Operation], chosen: dict[str, np.ndarray]):
        self._chosen = {op.name: chosen[op.output] for op in operations if isinstance(op, q.Route)}
        self._experts = {op.name: len(op.weight) for op in operations if isinstance(op, q.Route)}
        self._done = dict.fromkeys(self._chosen, 0)
        self.lengths = np.zeros(0, np.int64)

    def route(self, name: str, rows: int, *, keep: bool) -> None:
        """The next rows of the route `name`; keep : behind what the queues hold already."""
        first = self._done[name]
        self._done[name] += rows
        counts = np.bincount(self._chosen[name][first:first + rows].ravel(),
                             minlength=self._experts[name])
        self.lengths = self.lengths + counts if keep else counts


def _count(op: q.Operation, block: Block, sizes: dict[str, tuple[int, int]],
           chosen: dict[str, np.ndarray], narrow: set[tuple[str, int | None]], frames: int) -> None:
    """Add the products of an operation; note the shape of its output."""
    linear = attention = halved = 0
    match op:
        case q.Constant():
            sizes[op.output] = op.value.shape
        case q.Linear() | q.AddLinear() | q.Route():
            rows = sizes[op.source][0]
            residual = getattr(op, "residual", None)
            sizes[op.output] = sizes[residual] if residual else (rows, len(op.weight))
            linear = frames * rows * getattr(op, "row_macs", op.weight.size)
            halved = linear if (op.name, None) in narrow else 0
        case q.Norm():
            sizes[op.output] = op.rows, sizes[op.source][1]
        case q.Attention():
            (keys, channels), results = sizes[op.key], sizes[op.value][1]
            rows = 1 if op.query is None else sizes[op.query][0]
            sizes[op.output] = rows, results
            attention = frames * rows * keys * (channels + results)
        case q.Experts():
            sizes[op.output] = sizes[op.residual]
            tokens = np.bincount(chosen[op.route].ravel(), minlength=len(op.up))
            macs = tokens * op.row_macs
            linear = int(macs.sum())
            halved = int(sum(macs[expert] for expert in range(len(macs))
                             if (op.name, expert) in narrow))
    block.linear_macs += linear
    block.narrow_macs += halved
    block.attention_macs += attention
