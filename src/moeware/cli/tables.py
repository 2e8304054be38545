"""Plain text for people."""

from collections.abc import Sequence

__all__ = ["counter_table", "table"]


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
