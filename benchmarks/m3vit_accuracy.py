"""Integers against float PyTorch on real data: attention and routing of M3ViT-tiny's layers 0 and 1.

Only what the trained weights reach is compared: both attention halves, the stream that enters layer
1's gate, and the experts that it chooses, for both tasks. The integers are those of the PyTorch path,
which equal the gateware's (see `m3vit.py`).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from configs import TARGETS
from m3vit_model import DATA, M3ViT, export, load
from measure import Model
from record import ROOT, record

from moeware.hw.arch import quantised as q
from moeware.hw.arch.program import DeviceStep
from moeware.runtime.torch_path import TorchDevice

LIMITS = {"attention": 2.5, "stream": 2.0, "routing": 96.0}  # %; the last one from below
COMPARED = 2  # layers


def reference(model: M3ViT, image: np.ndarray) -> dict[str, np.ndarray]:
    """Float tensors [tokens, channels] of the compared layers, by name; "chosen" int [tokens, 2]."""
    found: dict[str, np.ndarray] = {}

    def keep(before: str, after: str):
        def hook(_module, given: tuple, out: torch.Tensor) -> None:
            for name, tensor in ((before, given[0]), (after, out)):
                found[name] = tensor[0].numpy().astype(np.float64)
        return hook
    for index in range(COMPARED):
        layer = model.layers[index]
        layer.attention.proj.register_forward_hook(keep(f"mixed {index}", f"projected {index}"))
        layer.norm2.register_forward_hook(keep(f"stream {index}", f"normalised {index}"))
    with torch.no_grad():
        model(torch.from_numpy(image))
    logits = found["normalised 1"] @ model.layers[1].feed_forward.gate.weight.detach().numpy().T
    found["chosen"] = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    return found


def integers(step: DeviceStep, image: np.ndarray) -> dict[str, np.ndarray]:
    """The same from the quantised graph, as real numbers."""
    values = TorchDevice().run(None, step, {port.tensor: port.quantise(image)
                                            for port in step.inputs}, probes=True)
    stream_step = step.outputs[0].scale
    mixes = [op for op in step.operations if isinstance(op, q.Attention)][:COMPARED]
    found: dict[str, np.ndarray] = {}
    for index, mix in enumerate(mixes):
        add = next(op for op in step.operations if isinstance(op, q.AddLinear)
                   and op.source == mix.output)
        found[f"stream {index}"] = values[add.output][0] * stream_step
        found[f"projected {index}"] = (values[add.output][0] - values[add.residual][0]) * stream_step
    route = next(op for op in step.operations if isinstance(op, q.Route))
    found["chosen"] = values[route.output][0, :, :, 0]
    return found


def compare(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative errors and the share of equal choices, in %."""
    figures = {f"{name}, relative error, %": round(100 * float(
        np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])), 3)
        for name in found if name != "chosen"}
    same = (wanted["chosen"][:, :, None] == found["chosen"][:, None, :]).any(-1).mean()
    return figures | {"layer 1's top-2 slots as in float, %": round(100 * float(same), 2)}


def misses(figures: dict[str, float]) -> list[str]:
    """Figures that break a limit."""
    return [name for name, value in figures.items()
            if ("top-2" in name and value < LIMITS["routing"])
            or ("stream 1" in name and value > LIMITS["stream"])
            or (name.startswith("projected") and value > LIMITS["attention"])]


def main(data: Path) -> None:
    figures, missed, tokens = {}, [], [["task", *range(16)]]
    for task in (0, 1):
        model, image = load(data, task)
        path = export(model, image, ROOT / "build" / "m3vit" / f"m3vit_task{task}.onnx")
        compiled = Model(path, {"image": image}).compile(TARGETS["ecp5-85f"])
        wanted = reference(model, image)
        found = compare(wanted, integers(compiled.step, image))
        figures |= {f"task {task}: {name}": value for name, value in found.items()}
        missed += [f"task {task}: {name}" for name in misses(found)]
        tokens.append([f"{task}", *np.bincount(wanted["chosen"].ravel(), minlength=16).tolist()])
    record("m3vit-accuracy", "M3ViT-tiny, integers against float",
           "Attention and routing of layers 0 and 1, all weights trained, one real street scene that "
           "also calibrated the number grids. Relative error: norm of the difference over norm, float "
           "PyTorch as reference. \"projected\": what the attention half adds to the stream (before the "
           "projection every channel has a grid of its own, and no tensor is like the float one); "
           "\"stream 1\": what enters the normalisation before the "
           f"gate of layer 1. Limits: {LIMITS['attention']:g} % for attention, {LIMITS['stream']:g} % "
           f"for stream 1, {LIMITS['routing']:g} % of the slots.",
           figures | {"limits missed": ", ".join(missed) or "none"},
           tables={"Slots of layer 1's experts in float": [list(map(str, tokens[0])), *tokens[1:]]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA,
                        help="the .npz file, below the repository's root (default: %(default)s)")
    main(parser.parse_args().data)
