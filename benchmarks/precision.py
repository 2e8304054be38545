"""Bits of experts' weights: what uniform, mixed, nested and randomly spread ones lose against float.

Two models: the bundled digits model, trained, on its held-out images; and M3ViT-tiny, whose experts come
from a seeded generator, on shifted and mirrored views of its one street scene, other ones than those it
was calibrated with. The integers are those of the PyTorch path.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import m3vit_model
import numpy as np
from measure import say
from record import ROOT, record

import moeware
from moeware.compiler.pipeline import STAGES, State
from moeware.compiler.reference import evaluate
from moeware.hw.arch.program import DeviceStep
from moeware.hw.arch.quantised import Experts, Route
from moeware.runtime.torch_path import TorchDevice

FOLDER = ROOT / "examples" / "digits"
CONFIG = moeware.find_config("ulx3s-85f")  # ternary weights are stored in 2 bits
AVERAGES = (3.0, 2.5)
DRAWS = 6


class Model:
    """A model up to calibration, and what its float form answers.

    labels : of the inputs, or None.
    """

    def __init__(self, path: Path, calibration: np.ndarray, inputs: np.ndarray, labels=None):
        self.inputs, self.labels = inputs, labels
        self._state = State(path, CONFIG, {"image": calibration})
        for name in ("load", "fuse", "partition", "calibrate"):
            say(f"{path.stem}: {name}")
            STAGES[name](self._state)
        self._real: dict[str, np.ndarray] = {}
        answers = evaluate(self._state.models[0], {"image": inputs}, self._real.__setitem__)
        self.answers, = answers.values()

    def row(self, name: str, **options) -> tuple[list, float, dict[str, list[int]]]:
        """A row of the table, the relative error in it, and the bits of experts by layer."""
        say(name)
        state = dataclasses.replace(self._state, **options)
        STAGES["quantise"](state)
        step, = state.quantised
        return self._measured(name, step)

    def nested_rows(self) -> list[list]:
        say("nested")
        state = dataclasses.replace(self._state, nested=True)
        STAGES["quantise"](state)
        return [self._measured(f"nested, {bits} bits", steps[0])[0]
                for bits, steps in ((8, state.quantised), (4, state.upper))]

    def _measured(self, name: str, step) -> tuple[list, float, dict[str, list[int]]]:
        run = DeviceStep(entry=0, inputs=step.inputs, outputs=step.outputs, operations=step.operations)
        port, = step.outputs
        found = TorchDevice().run(None, run, {each.tensor: each.quantise(self.inputs)
                                              for each in step.inputs}, probes=True)
        answers = port.dequantise(found[port.tensor])
        error = float(np.linalg.norm(answers - self.answers) / np.linalg.norm(self.answers))
        experts = [op for op in step.operations if isinstance(op, Experts)]
        stored = sum(int(bits) * (op.up[0].size + op.down[0].size) // 8
                     for op in experts for bits in op.bits)
        same = np.mean([(found[op.output][..., :, None, 0] == self._real[op.output][..., None, :])
                        .any(-1).mean() for op in step.operations if isinstance(op, Route)])
        row = [name, stored, round(100 * error, 2), round(100 * float(same), 2)]
        if self.labels is not None:
            row += [round(100 * float((answers.argmax(-1) == self.labels).mean()), 2),
                    round(100 * float((answers.argmax(-1) == self.answers.argmax(-1)).mean()), 2)]
        return row, error, {op.name: op.bits.tolist() for op in experts}


def table(model: Model, name: str, figures: dict[str, object]) -> list[list]:
    """Rows for all precisions; what mixing is worth goes to `figures`."""
    head = ["experts", "bytes", "error of the outputs, %", "experts chosen as in float, %"]
    rows = [head + (["accuracy, %", "answers as in float, %"] if model.labels is not None else [])]
    uniform = {}
    for bits in (8, 4, 2):
        row, uniform[bits], _ = model.row(f"{bits} bits", bits={"experts": bits})
        rows.append(row)
    for average in AVERAGES:
        row, error, chosen = model.row(f"{average:g} bits on average", expert_bits=average)
        rows.append(row)
        others = [model.row(f"spread randomly, {seed}", bits=_shuffled(chosen, seed))
                  for seed in range(DRAWS)]
        rows.append([f"the same bits, spread randomly, mean of {DRAWS}", *(
            round(float(np.mean([each[0][column] for each in others])), 2)
            for column in range(1, len(row)))])
        share = (average - 2) / 2
        line = share * uniform[4] + (1 - share) * uniform[2]
        figures[f"{name}: error at {average:g} bits, % (line between 4 and 2 bits)"] = (
            f"{100 * error:.2f} ({100 * line:.2f})")
    return rows + model.nested_rows()


def _shuffled(chosen: Mapping[str, list[int]], seed: int) -> dict[str, int]:
    names = [f"{layer}/expert{e}" for layer, bits in chosen.items() for e in range(len(bits))]
    bits = [each for layer in chosen.values() for each in layer]
    return dict(zip(names, np.random.default_rng(seed).permutation(bits).tolist(), strict=True))


def digits() -> Model:
    with np.load(FOLDER / "digits_samples.npz") as archive:
        return Model(FOLDER / "digits.onnx", archive["calibration"], archive["images"],
                     archive["labels"])


def m3vit(data: Path) -> Model:
    model, image = m3vit_model.load(data, task=0)
    path = m3vit_model.export(model, image, ROOT / "build" / "m3vit" / "m3vit_task0.onnx")
    draw, views = np.random.default_rng(0), []
    for _ in range(24):
        view = np.roll(image, (draw.integers(-64, 64), draw.integers(-128, 128)), (2, 3))
        view = view[..., ::-1] if draw.random() < 0.5 else view
        views.append(view * np.float32(draw.uniform(0.8, 1.2)))
    views = np.concatenate(views)
    return Model(path, views[:16], views[16:])


def main(data: Path) -> None:
    figures: dict[str, object] = {}
    tables = {"Digits MoE-ViT, 450 held-out images": table(digits(), "digits", figures),
              "M3ViT-tiny, 8 views": table(m3vit(data), "M3ViT-tiny", figures)}
    record("precision", "Bits of experts' weights",
           "Integers of the PyTorch path, all other weights of 8 bits, against float: norm of the "
           "outputs' difference over norm. Mixed: an integer program over measured errors and "
           "frequencies. M3ViT-tiny: 16 views of one street scene calibrate, 8 others are measured; "
           f"its outputs are the last layer's tokens. {m3vit_model.EXPERTS_NOTE}",
           figures, tables=tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=m3vit_model.DATA,
                        help="M3ViT's .npz file, below the repository's root (default: %(default)s)")
    main(parser.parse_args().data)
