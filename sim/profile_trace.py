"""Timelines as a trace that Perfetto (https://ui.perfetto.dev) opens."""

from collections.abc import Sequence

from moeware.hw.arch.isa import Engine, Memory, Opcode, Target
from moeware.hw.arch.timeline import Timeline
from moeware.hw.arch.work import Work

__all__ = ["trace"]


def trace(timelines: Sequence[Timeline]) -> dict:
    """The Chrome trace event format, JSON-able: a process for each timeline, in it a thread for each
    engine. A cycle is shown as a microsecond.

    A slice is an instruction from when it is the oldest one at work to when it is done, so that
    slices of an engine do not overlap; its argument "start" is when the engine took it. Slices of
    the category "waiting" are the cycles in which the engine had nothing but an instruction without
    its tokens; an instant event of the category "skipped" is an instruction that was passed over.
    """
    events: list[dict] = []
    for process, timeline in enumerate(timelines, 1):
        events.append(_name("process_name", process, 0, f"step {process}, 1 us = 1 cycle"))
        events += [_name("thread_name", process, engine, engine.name.lower()) for engine in Engine]
        events += _slices(timeline, process)
    return {"traceEvents": events, "displayTimeUnit": "ns",
            "otherData": {"unit": "1 us is 1 cycle"}}


def _name(kind: str, process: int, thread: int, name: str) -> dict:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slices(timeline: Timeline, process: int) -> list[dict]:
    events = []
    since = timeline.since
    tiles: dict[tuple[str, Engine], int] = {}
    for number, work in enumerate(timeline.works):
        engine = work.engine
        tile = tiles[work.layer, engine] = tiles.get((work.layer, engine), -1) + 1
        place = {"pid": process, "tid": int(engine)}
        start = int(timeline.start[number])
        arguments = {"instruction": number, "layer": work.layer, "tile": tile, "start": start,
                     **_arguments(work)}
        waits = int(timeline.waiting[number])
        if waits:
            who = Engine(timeline.waited_for[number]).name.lower()
            # Two cycles lie between the last token and the start; three where it is conditional.
            events.append({"ph": "X", "cat": "waiting", "name": f"waits for {who}", **place,
                           "ts": max(0, start - 1 - work.instruction.conditional - waits),
                           "dur": waits, "args": {"layer": work.layer, "for": who}})
        if work.skipped:
            events.append({"ph": "i", "cat": "skipped", "name": work.layer, "s": "t", **place,
                           "ts": start, "args": arguments})
            continue
        first = int(since[number]) + 1
        events.append({"ph": "X", "cat": "instruction", "name": work.layer, **place, "ts": first,
                       "dur": int(timeline.done[number]) + 1 - first,
                       "args": arguments | {"stalled": int(timeline.stalled[number])}})
    return sorted(events, key=lambda event: (event["tid"], event["ts"]))


def _arguments(work: Work) -> dict:
    """What people want to know of an instruction."""
    i = work.instruction
    if i.opcode in (Opcode.LOAD, Opcode.STORE):
        return {"memory": Memory(i.memory).name.lower(), "words": i.words, "beats": work.beats}
    known = {name: getattr(i, name) for name in ("channels", "keys", "expert")
             if i.fields.get(name)}
    if i.opcode is Opcode.LINEAR:
        known["target"] = Target(i.target).name.lower()
    return {"rows": work.rows, **known, "macs": work.macs, "array_cycles": work.array_cycles}
