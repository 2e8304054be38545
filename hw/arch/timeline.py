"""When each instruction of a run started and was done, and what it waited for; reports of it.

A timeline is measured on simulated gateware or estimated; the same tables are made of both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .config import Config
from .isa import Engine
from .work import Work

__all__ = ["LayerEngine", "Timeline"]


@dataclass
class LayerEngine:
    """What an engine does for a layer; cycles, and bytes that cross the bus.

    first, last : cycles of the first start and the last done; busy : the oldest instruction at work
    is the layer's; waiting : no instruction is at work and the next one, the layer's, lacks a token;
    waits_for : these cycles by the engine whose token came last; stalled : part of busy.
    """

    layer: str
    engine: Engine
    instructions: int = 0
    skipped: int = 0
    first: int = 0
    last: int = 0
    busy: int = 0
    waiting: int = 0
    waits_for: dict[str, int] | None = None
    stalled: int = 0
    macs: int = 0
    bytes: int = 0


@dataclass
class Timeline:
    """A run of one device step; every array has an entry for each instruction, in program order.

    start : the cycle in which the engine took it, or it was passed over; done : that in which it
    was done (for a skipped one its start); waiting, waited_for : cycles that it kept its idle engine
    waiting for tokens, and the engine of the last of these (-1: none); stalled : cycles without
    progress while it was the oldest one at work; cycles : of the run.
    """

    config: Config
    works: Sequence[Work]
    start: np.ndarray
    done: np.ndarray
    waiting: np.ndarray
    waited_for: np.ndarray
    stalled: np.ndarray
    cycles: int

    def __post_init__(self):
        self.engines = np.array([work.engine for work in self.works], int)
        self.skipped = np.array([work.skipped for work in self.works], bool)

    @property
    def since(self) -> np.ndarray:
        """The cycle before the first in which each instruction is the oldest one at work, so that
        ``done - since`` of an engine's instructions add up to its busy cycles."""
        since = self.start.copy()
        for engine in Engine:
            own = np.flatnonzero((self.engines == engine) & ~self.skipped)
            since[own[1:]] = np.maximum(self.start[own[1:]], self.done[own[:-1]])
        since[self.skipped] = self.done[self.skipped]
        return since

    def table(self) -> list[LayerEngine]:
        """A row for each layer and engine, layers in the order of the program."""
        rows: dict[tuple[str, int], LayerEngine] = {}
        order = {work.layer: None for work in self.works}
        since = self.since
        for n, work in enumerate(self.works):
            row = rows.setdefault((work.layer, work.engine), LayerEngine(
                work.layer, work.engine, first=int(self.start[n]), waits_for={}))
            row.instructions += 1
            row.skipped += work.skipped
            row.last = int(max(row.last, self.done[n]))
            row.busy += int(self.done[n] - since[n])
            row.waiting += int(self.waiting[n])
            row.stalled += int(self.stalled[n])
            row.macs += work.macs
            row.bytes += work.beats * self.config.bus_bytes
            if self.waited_for[n] >= 0:
                name = Engine(self.waited_for[n]).name.lower()
                row.waits_for[name] = row.waits_for.get(name, 0) + int(self.waiting[n])
        places = {layer: place for place, layer in enumerate(order)}
        return sorted(rows.values(), key=lambda row: (places[row.layer], row.engine))

    def array_share(self, engine: Engine) -> float:
        """Share of the run's cycles that the engine's products take at best."""
        return sum(work.array_cycles for work in self.works
                   if work.engine == engine) / self.cycles

    def to_dict(self) -> dict:
        """JSON-able: all tables."""
        return {"cycles": self.cycles, "layer_cycles": self.layer_cycles(),
                "array_share": {engine.name.lower(): self.array_share(engine)
                                for engine in (Engine.LINEAR, Engine.ATTENTION)},
                "table": [asdict(row) | {"engine": row.engine.name.lower()}
                          for row in self.table()],
                "roofline": {name: {"macs_per_byte": x, "macs_per_cycle": y}
                             for name, (x, y) in self.roofline().items()}}

    def layer_cycles(self) -> dict[str, int]:
        """By how many cycles each layer moves the end of the run: from the last done of all
        instructions before its own to its own last done. They add up to the run, but for its end."""
        cycles: dict[str, int] = {}
        reached = 0
        for n, work in enumerate(self.works):
            gain = max(0, int(self.done[n]) - reached)
            cycles[work.layer] = cycles.get(work.layer, 0) + gain
            reached += gain
        return cycles

    def roofline(self) -> dict[str, tuple[float | None, float]]:
        """Products per byte (None: it moves none) and per cycle of each layer that has products, and
        of the run ("whole run"). A layer's cycles are those from when an array could begin with it,
        or waits for it, to the last done of its products; bytes that came before are not in them."""
        points: dict[str, tuple[float | None, float]] = {}
        arrays = np.isin(self.engines, (Engine.LINEAR, Engine.ATTENTION)) & ~self.skipped
        layers = np.array([work.layer for work in self.works])
        macs = np.array([work.macs for work in self.works], int)
        size = np.array([work.beats for work in self.works], int) * self.config.bus_bytes
        for layer in dict.fromkeys(layers.tolist()):
            own = (layers == layer) & arrays
            if not own.any() or not macs[own].sum():
                continue
            span = int((self.done[own]).max() - (self.start[own] - self.waiting[own]).min())
            moved = int(size[layers == layer].sum())
            work = int(macs[own].sum())
            points[layer] = work / moved if moved else None, work / max(1, span)
        if macs.sum() and size.sum():
            points["whole run"] = (float(macs.sum() / size.sum()), float(macs.sum() / self.cycles))
        return points
