"""Operations that work row by row, in blocks of rows: projection of attention, normalisation,
feed-forward network.

While attention is still at work on the last rows, the linear unit is at work on the first ones, which
have passed all heads. A block's weights are loaded again, so a block has as many rows as keep the
products slower than the bus.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moeware.compiler.tile.assembly import Run
from moeware.compiler.tile.attention import attend_blocks
from moeware.compiler.tile.lowering import Lowering
from moeware.compiler.tile.norm import norm_rows
from moeware.compiler.tile.rows import add_rows, linear_rows
from moeware.compiler.tile.tensors import Tensor, chunks
from moeware.hw.arch import layout
from moeware.hw.arch import quantised as q
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory

__all__ = ["Chain", "chains", "lower_chain"]

BUS_SHARE = 4  # of the words that a bus moves at best, one in so many is a weight
LEAST_CYCLES = 4096  # of a block's projection, so that beginning it costs little
FILLED = 7 / 8  # of the activation memory, so that what comes next finds words that have rested
MOST_BLOCKS = 3  # of one frame


@dataclass(frozen=True)
class Chain:
    """Consecutive operations: `attention`, the projection `project` that only reads it, and `norm`; a
    feed-forward network, `up` and `down`; or all of them; or queries or keys that are made as a whole, by
    `products` that add up, and normalised, `norm`. What is missing is None."""

    attention: q.Attention | None = None
    project: q.AddLinear | None = None
    norm: q.Norm | None = None
    up: q.Linear | None = None
    down: q.AddLinear | None = None
    products: tuple[q.AddLinear, ...] = ()

    @property
    def operations(self) -> list[q.Operation]:
        found = (*self.products, self.attention, self.project, self.norm, self.up, self.down)
        return [op for op in found if op is not None]


def chains(lowering: Lowering) -> Iterator[Chain | q.Operation]:
    """The operations of a step, in order, those of a chain together."""
    operations, place = lowering.step.operations, 0
    while place < len(operations):
        chain = _chain(lowering, operations[place:])
        if chain is None:
            yield operations[place]
            place += 1
        else:
            yield chain
            place += len(chain.operations)


def _chain(lowering: Lowering, operations: list[q.Operation]) -> Chain | None:
    match operations:
        case [q.Attention() as attention, q.AddLinear() as project, q.Norm() as norm, *rest] if (
                attention.query is not None and _adds(lowering, project, attention)
                and _reads(lowering, norm, project, alone=False)
                and lowering.frames * _frame_blocks(lowering, project) > 1):
            up, down = _feed_forward(lowering, rest)
            if up is not None and not (_reads(lowering, up, norm, alone=True)
                                       and down.residual == project.output):
                up = down = None
            return Chain(attention, project, norm, up, down)
    if lowering.plan.blocks == 1:
        return None
    count = next((n for n, op in enumerate(operations) if not isinstance(op, q.AddLinear)), 0)
    products, norm = operations[:count], operations[count]
    wide = lowering.wide.get(norm.output, [])
    if wide and list(map(id, products)) == list(map(id, wide)) and norm.output not in lowering.split and (
            _reads(lowering, norm, wide[-1], alone=True)):
        return Chain(products=tuple(wide), norm=norm)
    up, down = _feed_forward(lowering, operations)
    return Chain(up=up, down=down) if up is not None else None


def _feed_forward(lowering: Lowering, operations: list[q.Operation]):
    match operations:
        case [q.Linear() as up, q.AddLinear() as down, *_] if _adds(lowering, down, up):
            return up, down
    return None, None


def _adds(lowering: Lowering, add: q.AddLinear, made: q.Operation) -> bool:
    """Whether `add` adds to as many rows of a stream what only it reads."""
    return (add.residual is not None and add.first_row == 0
            and _reads(lowering, add, made, alone=True))


def _reads(lowering: Lowering, op: q.Operation, made: q.Operation, *, alone: bool) -> bool:
    """Whether an operation reads what another one made, row for row; alone : nothing else does."""
    kept = [port.tensor for port in lowering.step.outputs]
    rows = lowering.rows
    return (op.source == made.output and made.output not in kept
            and rows[op.output] == rows[made.output]
            and (not alone or [user is op for user in lowering.users(made.output)] == [True]))


def lower_chain(lowering: Lowering, chain: Chain) -> None:
    """A block of rows after the other. The feed-forward network of a block has the projection of the
    next one in its middle, so that nothing waits for what another engine has just begun."""
    blocks = _blocks(lowering, chain)
    rows = lowering.rows[chain.operations[-1].output]
    if chain.attention is None and chain.norm is not None:
        for block in blocks:
            _normalised(lowering, chain, block)
    elif chain.attention is None:
        for block in blocks:
            hidden = _up(lowering, chain, lowering.tensors[chain.up.source], block, block[0])
            _down(lowering, chain, hidden, block)
    else:
        _follow(lowering, chain, blocks)
    lowering.macs += sum(rows * op.row_macs for op in chain.operations
                         if isinstance(op, (q.Linear, q.AddLinear)))


def _follow(lowering: Lowering, chain: Chain, blocks: list[tuple[int, int]]) -> None:
    """What follows attention, which stays a block ahead."""
    rows = lowering.rows[chain.attention.output]
    last_frame = sum(last <= rows * (lowering.frames - 1) for _, last in blocks)
    attended = attend_blocks(lowering, chain.attention, blocks, _together(lowering, chain, blocks))
    ready, hidden = 0, None
    for number, block in enumerate(blocks):
        while ready < min(max(number, last_frame) + 2, len(blocks)):
            next(attended)
            ready += 1
        normed, base = _project(lowering, chain, block)
        if chain.up is not None:
            if hidden is not None:
                _down(lowering, chain, hidden, blocks[number - 1])
            hidden = _up(lowering, chain, normed, block, block[0] - base)
    if hidden is not None:
        _down(lowering, chain, hidden, blocks[-1])


def _together(lowering: Lowering, chain: Chain, blocks: list[tuple[int, int]]) -> int:
    """Heads that a block passes before the next block does. Before a feed-forward network, so many
    that the first rows have passed all heads when the last head is made."""
    op, c = chain.attention, lowering.config
    tensors = (op.query, op.key, op.value)
    if chain.up is None or not set(tensors) <= set(lowering.deferred):
        return 1
    rows, channels = lowering.rows[op.output], lowering.channels[op.query]
    macs = sum(part.row_macs for tensor in tensors for part in lowering.deferred_products(tensor))
    made = rows * macs / c.linear_macs / op.heads
    attended = 2 * rows * lowering.rows[op.key] * channels / c.attention_macs / op.heads
    share = lowering.frames / len(blocks)
    wanted = next((count for count in range(1, op.heads)
                   if attended * (op.heads - count + count * share) <= made * (op.heads - 1)),
                  op.heads)
    # So many heads beside what has passed attention, and a block's normalised and hidden rows.
    head = rows * -(-channels // op.heads // c.depth)
    others = op.heads * head * lowering.frames + share * rows * (
        -(-chain.up.weight.shape[1] // c.depth) - (-len(chain.up.weight) // c.depth))
    room = FILLED * c.activation_banks * c.activation_words - others
    return max(1, min(wanted, int(room / (3 * head))))


def _blocks(lowering: Lowering, chain: Chain) -> list[tuple[int, int]]:
    """Rows [first, last) of each block, counted through all frames; behind attention, which takes one
    frame after the other, and of queries and keys, which depend on the row, a block is of one frame."""
    c, frames, rows = lowering.config, lowering.frames, lowering.rows[chain.operations[-1].output]
    if chain.norm is None:
        return _split(c, 0, frames * rows, lowering.plan.blocks)
    count = (lowering.plan.blocks if chain.attention is None
             else _frame_blocks(lowering, chain.project))
    return [block for frame in range(frames)
            for block in _split(c, frame * rows, (frame + 1) * rows, count)]


def _frame_blocks(lowering: Lowering, project: q.AddLinear) -> int:
    """Blocks that the rows of a frame make; 0 where even a whole frame is at work too shortly."""
    c, rows = lowering.config, lowering.rows[project.output]
    least = max(BUS_SHARE * c.linear_macs // c.bus_bytes,
                -(-LEAST_CYCLES * c.linear_macs // project.weight.size))
    count = min(rows // least, MOST_BLOCKS if lowering.frames == 1 else 1)
    return max(lowering.plan.blocks, count) if count or lowering.plan.blocks > 1 else 0


def _split(config: Config, first: int, last: int, count: int) -> list[tuple[int, int]]:
    """About `count` blocks of whole chunks, each of which starts at a whole bus word in DRAM."""
    words = config.bus_bytes // min(layout.word_bytes(config, memory)
                                    for memory in (Memory.ACTIVATION, Memory.RESIDUAL))
    starts = [a for a, _ in chunks(config, first, last) if (a - first) % max(1, words) == 0]
    count = min(count, len(starts))
    edges = [starts[len(starts) * n // count] for n in range(count)]
    return list(zip(edges, [*edges[1:], last]))


def _project(lowering: Lowering, chain: Chain, block: tuple[int, int]) -> tuple[Tensor, int]:
    """The projection and the normalisation of a block; the tensor that has the result, and the row of
    all that its first one is."""
    op, norm, (first, last) = chain.project, chain.norm, block
    source = lowering.tensors[op.source]
    lowering.probe_rows(chain.attention, source.span(first, last), first, source.channels)
    if op.output not in lowering.tensors:
        lowering.inherit(op.output, op.residual)
    stream = lowering.tensors[op.output]
    add_rows(lowering, op, source, stream, [Run(source.span(first, last), stream.span(first, last))])
    lowering.probe_rows(op, stream.span(first, last), first, stream.channels)
    if chain.up is not None:  # which alone reads it
        normed, base = _block_tensor(lowering, norm.output, block, stream.channels), first
    else:
        normed, base = lowering.tensors.get(norm.output) or lowering.tensor(
            norm.output, Memory.ACTIVATION, norm.rows, stream.channels), 0
    norm_rows(lowering, norm, stream, normed, [(a - base, b - base, a)
                                               for a, b in chunks(lowering.config, first, last)])
    lowering.probe_rows(norm, normed.span(first - base, last - base), first, stream.channels)
    return normed, base


def _normalised(lowering: Lowering, chain: Chain, block: tuple[int, int]) -> None:
    """A block of queries or keys, whose product stays no longer than its norm needs it."""
    norm, (first, last) = chain.norm, block
    name, channels = norm.source, lowering.channels[norm.source]
    wide = Tensor(lowering.config, f"{name}/{first}", Memory.RESIDUAL, 1, last - first, channels,
                  groups=lowering.groups[name], room=lowering.rooms.get(name, 0), bank=1)
    for op in chain.products:
        source = lowering.tensors[op.source]
        add_rows(lowering, op, source, wide, [Run(source.span(first, last), wide.span())])
        lowering.probe_rows(op, wide.span(), first, channels)
    target = lowering.tensors.get(norm.output) or lowering.tensor(
        norm.output, Memory.ACTIVATION, norm.rows, channels, lowering.attended[norm.output])
    norm_rows(lowering, norm, wide, target, [(a, b, a - first)
                                             for a, b in chunks(lowering.config, first, last)])
    lowering.probe_rows(norm, target.span(first, last), first, channels)


def _up(lowering: Lowering, chain: Chain, source: Tensor, block: tuple[int, int],
        first: int) -> Tensor:
    """Hidden values of a block, whose rows begin at row `first` of the source."""
    op, rows = chain.up, block[1] - block[0]
    hidden = _block_tensor(lowering, op.output, block, len(op.weight), bank=1)
    linear_rows(lowering, op, source, hidden, Run(source.span(first, first + rows), hidden.span()))
    lowering.probe_rows(op, hidden.span(), block[0], hidden.channels)
    return hidden


def _down(lowering: Lowering, chain: Chain, hidden: Tensor, block: tuple[int, int]) -> None:
    op = chain.down
    if op.output not in lowering.tensors:
        lowering.inherit(op.output, op.residual)
    stream = lowering.tensors[op.output]
    target = stream.span(*block)
    add_rows(lowering, op, hidden, stream, [Run(hidden.span(), target)])
    lowering.probe_rows(op, target, block[0], len(op.weight))


def _block_tensor(lowering: Lowering, name: str, block: tuple[int, int], channels: int, *,
                  bank: int = 0) -> Tensor:
    first, last = block
    return Tensor(lowering.config, f"{name}/{first}", Memory.ACTIVATION, 1, last - first, channels,
                  bank=bank)
