"""Plain text for people."""

from collections.abc import Sequence

__all__ = ["counter_table", "estimate_table", "expert_bits_table", "idle_table", "kept_lines",
           "layer_table", "table", "working_line"]


def table(rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Rows in columns as wide as their widest cell; the columns numbered in `right` end flush."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    return "\n".join("  ".join(
        cell.rjust(width) if number in right else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells)


def counter_table(counters: dict[str, float]) -> str:
    """Counters of a frame (see `drive.counter_names`) as a line of totals and a table by engine."""
    from moeware.hw.arch.isa import Engine
    from moeware.hw.arch.registers import ENGINE_COUNTERS
    totals = [f"{value:,.0f} {name.replace('_', ' ')}" for name, value in counters.items()
              if not name.endswith(ENGINE_COUNTERS)]
    lines = [", ".join(totals)]
    cycles = counters.get("cycles")
    if cycles and f"{Engine.LOAD.name.lower()}_{ENGINE_COUNTERS[0]}" in counters:
        lines.append(table([["engine", *ENGINE_COUNTERS], *(
            [engine.name.lower(), *(f"{counters[f'{engine.name.lower()}_{state}'] / cycles:.1%}"
                                    for state in ENGINE_COUNTERS)]
            for engine in Engine)], right=(1, 2, 3)))
    return "\n".join(lines)


def kept_lines(kept: dict, verb: str, most: int = 6) -> list[str]:
    """What becomes of the scales that a quantised model brings along (see `Kept.report`): none for a
    float model; at most so many names for a reason."""
    if not kept["scales"]:
        return []
    lines = [f"{verb} {kept['kept']} of {kept['scales']} scales of the file"]
    for reason, names in kept["others"].items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"  {reason}: {', '.join(names[:most])}{more}")
    return lines


def layer_table(step: dict) -> str:
    """What each engine does for each layer; `step` is `Timeline.to_dict`."""
    rows = [["layer", "engine", "first", "last", "busy", "waiting", "for", "stalled", "MACs",
             "bytes"]]
    layer = None
    for row in step["table"]:
        waits = ", ".join(f"{name} {cycles:,}" for name, cycles in row["waits_for"].items())
        rows.append([row["layer"] if row["layer"] != layer else "", row["engine"],
                     *(f"{row[name]:,}" for name in ("first", "last", "busy", "waiting")), waits,
                     *(f"{row[name]:,}" for name in ("stalled", "macs", "bytes"))])
        layer = row["layer"]
    return table(rows, right=(2, 3, 4, 5, 7, 8, 9))


def working_line(step: dict) -> str:
    """Shares of the run's cycles in which the arrays and the bus work."""
    cycles, working = step["cycles"], step["working"]
    shares = {name: sum(value for key, value in working.items() if name in key.split(" + "))
              / cycles for name in ("linear", "attention", "bus")}
    best = step["array_share"]
    return (f"of {cycles:,} cycles the linear unit works in {shares['linear']:.1%} (its products "
            f"take {best['linear']:.1%} at best), the attention unit in {shares['attention']:.1%} "
            f"(at best {best['attention']:.1%}), the bus moves a word in {shares['bus']:.1%}, and "
            f"none of them works in {working['nothing'] / cycles:.1%}")


def expert_bits_table(found: dict) -> str:
    """Bits of each expert, and what they cost; `found` is `mixed_precision.Allocation.to_dict`."""
    alike = ", ".join(f"{error:.2%} with {bits} bits for each"
                      for bits, error in found["uniform_errors"].items())
    return "\n".join([
        f"bits of experts' weights: {found['average']:.2f} on average, {found['bytes']:,} bytes; "
        f"relative error of the outputs from experts about {found['error']:.2%} ({alike})",
        table([["layer", "average", "bits of expert 0, 1, …"], *(
            [layer, f"{sum(bits) / len(bits):.2f}", " ".join(map(str, bits))]
            for layer, bits in found["layers"].items())], right=(1,))])


def idle_table(step: dict, most: int = 10) -> str:
    """What everyone does while neither array works: the `most` frequent cases, and the rest."""
    cycles, idle = step["cycles"], list(step["idle"].items())
    rest = sum(value for _, value in idle[most:])
    rows = [[f"{value / cycles:.1%}", what] for what, value in idle[:most]]
    if rest:
        rows.append([f"{rest / cycles:.1%}", f"{len(idle) - most} other cases"])
    total = sum(value for _, value in idle)
    return "\n".join([f"neither array works in {total / cycles:.1%}:", table(rows, right=(0,))])


def estimate_table(estimate: dict, least: float = 0.01) -> str:
    """Estimated cycles of each layer that takes the share `least` of them or more."""
    cycles = estimate["cycles"]
    rows: list[list[str]] = [["layer", "MACs", "bytes", "cycles", "share"]]
    left, count = 0, 0
    for step in estimate["steps"]:
        for layer, taken in step["layer_cycles"].items():
            own = [row for row in step["table"] if row["layer"] == layer]
            if taken < least * cycles:
                left, count = left + taken, count + 1
                continue
            rows.append([layer, *(f"{sum(row[what] for row in own):,}"
                                  for what in ("macs", "bytes")), f"{taken:,}",
                         f"{taken / cycles:.1%}"])
    if count:
        rows.append([f"{count} others", "", "", f"{left:,}", f"{left / max(1, cycles):.1%}"])
    return "\n".join([
        f"estimate: {cycles:,} cycles a frame, {1e3 * estimate['seconds']:.3g} ms at "
        f"{estimate['clock_hz'] / 1e6:g} MHz with {estimate['dram']} memory, experts with equal shares",
        table(rows, right=(1, 2, 3, 4))])
