"""Signal to noise and routing of a program, layer by layer, as a picture."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moeware.accuracy import Accuracy, TensorAccuracy

__all__ = ["plot"]

CEILING_DB = 100.0  # stands for a layer without an error
# What adds up along the model, what is added to it, and what stands between.
_KINDS: dict[str, tuple[str, Callable[[TensorAccuracy], bool]]] = {
    "residual stream": ("o-", lambda layer: layer.operator in ("AddConstant", "ClassToken", "Add")),
    "experts": ("s", lambda layer: layer.operator.endswith("Experts")),
    "all else": (".", lambda layer: True),
}


def plot(path: str | os.PathLike, accuracy: Accuracy) -> None:
    """Write a PNG; an existing file is replaced only by a complete new one."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(9.0, 0.16 * len(accuracy.layers)), 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    points: dict[str, list[tuple[int, float]]] = {kind: [] for kind in _KINDS}
    routers = []
    for number, layer in enumerate(accuracy.layers):
        if isinstance(layer, TensorAccuracy):
            kind = next(kind for kind, (_, belongs) in _KINDS.items() if belongs(layer))
            points[kind].append((number, min(max(layer.snr_db, 0.0), CEILING_DB)))
        else:
            routers.append((number, layer.tokens))
    for kind, (style, _) in _KINDS.items():
        if points[kind]:
            upper.plot(*zip(*points[kind]), style, label=kind, linewidth=1)
    upper.axhline(accuracy.least_snr_db, color="black", linewidth=1, linestyle="--")
    upper.set(ylabel="signal to noise, dB", ylim=(0, None),
              title=f"integers against float, {accuracy.frames} frames")
    upper.legend(fontsize=8)
    if routers:
        lower.bar(*zip(*routers), color="tab:orange")
    lower.axhline(accuracy.least_agreement, color="black", linewidth=1, linestyle="--")
    lower.set(ylabel="tokens with\nthe same experts", ylim=(0, 1.05))
    lower.set_xticks(range(len(accuracy.layers)), [layer.layer for layer in accuracy.layers],
                     rotation=90, fontsize=6)
    if accuracy.degraded is not None:
        number = accuracy.layers.index(accuracy.degraded)
        for axes in (upper, lower):
            axes.axvline(number, color="tab:red", linewidth=1)
        upper.annotate(f"degrades at {accuracy.degraded.layer}", (number, 0), rotation=90,
                       color="tab:red", fontsize=8, textcoords="offset points", xytext=(-10, 5))
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
    os.close(handle)
    try:
        figure.savefig(name, format="png", dpi=120)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
