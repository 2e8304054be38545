"""The bundled models in integers, against float: by the bits of their experts' weights, and how long
compilation takes.

Digits: accuracy of the class that is largest, on held-out images. Pydoc: cross entropy of the next
character, on held-out text. The integers are those of the PyTorch path, which equal the gateware's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import m3vit_model
import numpy as np
import onnxruntime
from configs import TARGETS
from measure import say
from record import ROOT, record

import moeware

# Name: arguments of `moeware.compile`.
WIDTHS = {"8 bits": {}, "experts of 4 bits": {"bits": {"experts": 4}},
          "ternary experts": {"bits": {"experts": 2}}, "experts of 3 bits on average": {"expert_bits": 3.0}}


def share_right(logits: np.ndarray, labels: np.ndarray) -> float:
    """Per cent."""
    return 100 * float((logits.argmax(-1) == labels).mean())


def cross_entropy(logits: np.ndarray, following: np.ndarray) -> float:
    """Nats a character."""
    logits = logits.astype(np.float64)
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return float((norm - np.take_along_axis(logits, following[..., None], -1)[..., 0]).mean())


def rows(name: str, config: str, inputs: str, wanted: str,
         score: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, float]:
    """Scores of a bundled model in float and with each of `WIDTHS`."""
    folder = ROOT / "examples" / name
    model, samples = folder / f"{name}.onnx", folder / f"{name}_samples.npz"
    with np.load(samples) as arrays:
        held_out, answers = arrays[inputs], arrays[wanted]
    session = onnxruntime.InferenceSession(model)
    port = session.get_inputs()[0].name
    found = {"float": score(session.run(None, {port: held_out})[0], answers)}
    for width, options in WIDTHS.items():
        say(f"{name}: {width}")
        program = moeware.compile(model, config, samples, **options)
        found[width] = score(moeware.Session(program, "torch").run(None, {port: held_out})[0], answers)
    return found


def seconds_of_m3vit(data: Path) -> float | None:
    """To compile M3ViT-tiny, a process's first model; None without its weights."""
    if not data.is_file():
        print(f"{data} is missing: M3ViT-tiny is left out")
        return None
    model, image = m3vit_model.load(data, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = m3vit_model.export(model, image, Path(folder) / "m3vit.onnx")
        began = time.perf_counter()
        moeware.compile(path, TARGETS["ecp5-85f"].config, {"image": image})
        return time.perf_counter() - began


def main(data: Path) -> None:
    seconds = seconds_of_m3vit(data)
    digits = rows("digits", "ulx3s-85f", "images", "labels", share_right)
    pydoc = rows("pydoc", str(ROOT / "examples" / "pydoc" / "config.json"), "ids", "next", cross_entropy)
    figures: dict[str, object] = {}
    for width, value in digits.items():
        figures[f"digits, {width}: accuracy, %"] = round(value, 2)
    for width, value in pydoc.items():
        figures[f"pydoc, {width}: nats a character"] = round(value, 4)
        if width != "float":
            figures[f"pydoc, {width}: nats above float"] = round(value - pydoc["float"], 4)
    if seconds is not None:
        figures["M3ViT-tiny, seconds to compile"] = round(seconds, 1)
    record("accuracy", "Accuracy of the bundled models", " ".join(__doc__.split("\n\n", 1)[1].split()),
           figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=m3vit_model.DATA)
    main(parser.parse_args().data)
