"""The roofline of a run: what was attained, under what the configuration could do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeware.hw.arch.timeline import Timeline

from .dram import DramTiming

__all__ = ["roofline"]


def roofline(path: Path, timelines: Sequence[Timeline], dram: DramTiming, clock_hz: float) -> None:
    """Write a PNG: products per cycle against products per byte, of each layer and of the run.

    Ceilings are the products per cycle of the linear and of the attention unit and the bytes per
    cycle of the bus with `dram` at `clock_hz` behind it.
    """
    from matplotlib.figure import Figure
    config = timelines[0].config
    linear = config.linear_macs * (1 + config.narrow)
    bandwidth = dram.bytes_per_cycle(config.bus_bytes, clock_hz)
    points = [(name, *point) for timeline in timelines
              for name, point in timeline.roofline().items()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    reach = [x for _, x, _ in points if x is not None] + [linear / bandwidth]
    span = np.geomspace(min(reach) / 2, max(reach) * 4, 100)
    for label, ceiling, style in (
            (f"linear unit, {config.linear_macs} MAC/cycle", config.linear_macs, "-"),
            *([(f"linear unit, 4-bit weights, {linear} MAC/cycle", linear, "-.")]
              if config.narrow else []),
            (f"attention unit, {config.attention_macs} MAC/cycle", config.attention_macs, "--")):
        axes.plot(span, np.minimum(ceiling, span * bandwidth), style, color="black", linewidth=1,
                  label=f"{label}; bus {bandwidth:.3g} bytes/cycle")
    for name, x, y in points:
        x = span[-1] if x is None else x  # moves no bytes
        whole = name == "whole run"
        axes.scatter([x], [y], marker="*" if whole else "o", s=120 if whole else 20, zorder=3,
                     color="tab:red" if whole else "tab:blue")
        axes.annotate(name, (x, y), fontsize=8 if whole else 6, textcoords="offset points",
                      xytext=(3, 3))
    axes.set(xscale="log", yscale="log", xlabel="MACs per byte on the bus",
             ylabel="MACs per cycle, from the first product (or the wait for it) to the last")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, format="png", dpi=120)
