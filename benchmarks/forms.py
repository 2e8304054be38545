"""Export forms times models: how much of each file runs on the accelerator, and how far the canonical
graph is from the file.

Configurations are those with all options of the gateware. Every file is exported anew, into a temporary folder. The largest difference is that of the outputs of
the canonical graph in float32 to ONNX Runtime's on the file, over two inputs, relative to the largest
output.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from record import ROOT, record
from tqdm import tqdm

import moeware
from moeware.compiler.fuse import fuse
from moeware.compiler.load import load
from moeware.compiler.partition import partition
from moeware.compiler.placement import report
from moeware.compiler.reference import evaluate

sys.path.insert(0, str(ROOT))
from tests import hugging_face
from tests.compiler import exports, genai, language_models
from tests.compiler.capacity_modules import CapacityMoe
from tests.compiler.contrib import to_qmoe
from tests.compiler.test_contrib_moe import TOP_2
from tests.compiler.test_contrib_moe import write as write_contrib
from tests.compiler.test_functions import divide
from tests.compiler.test_soft_experts import SoftMoe

Export = Callable[[Path], object]  # writes a file
TORCHSCRIPT, DYNAMO = dict(dynamo=False, opset=17), dict(dynamo=True, opset=20)


def vits() -> Iterator[tuple[str, str, Export]]:
    """(form, exporter, how to write the file) of vision transformers."""
    def case(form, *, how, **parts):
        name = f"{'dynamo' if how['dynamo'] else 'TorchScript'}, opset {how['opset']}"
        return form, name, lambda path: exports.export(exports.vit(**parts), path, **how)

    for form in ("loop", "where", "onehot", "scatter", "gather", "gather_einsum", "stack", "shared"):
        for how in (DYNAMO, TORCHSCRIPT):
            yield case(f"ViT, experts: {form}", how=how, mixer=exports.Moe(form))
    for opset in (18, 19, 21, 22, 23, 24):
        yield case("ViT, experts: loop", how=dict(dynamo=True, opset=opset), mixer=exports.Moe("loop"))
    for order in ("top_first", "all"):
        yield case(f"ViT, routing: {order}", how=DYNAMO, mixer=exports.Moe("loop", order=order))
    for places, order in (("slots", "token by token"), ("ranks", "first choices first")):
        for form, how in (("einsum", DYNAMO), ("scatter", DYNAMO), ("einsum", TORCHSCRIPT)):
            yield case(f"ViT, V-MoE capacity {order}: {form}", how=how,
                       mixer=CapacityMoe(form, places, "chosen"))
    for form in ("einsum", "flat", "loop"):
        yield case(f"ViT, Soft-MoE: {form}", how=DYNAMO, mixer=SoftMoe(form))
    yield case("ViT, Soft-MoE: einsum", how=TORCHSCRIPT, mixer=SoftMoe("einsum"))
    for how in (DYNAMO, TORCHSCRIPT):
        yield case("ViT, dense, timm-like", how=how)
        yield case("ViT, nn.MultiheadAttention", how=how, attention=exports.TorchAttention())


def contrib() -> Iterator[tuple[str, str, Export]]:
    """Vision transformers with ONNX Runtime's own experts, and with local functions."""
    exporter = "TorchScript, opset 17"
    yield "ViT, com.microsoft.MoE", exporter, lambda path: write_contrib(path, TOP_2)
    for bits, block in ((8, 0), (4, 0), (4, 16)):
        change = to_qmoe(bits, block, **TOP_2)
        name = f"ViT, com.microsoft.QMoE, {bits} bits" + (f", blocks of {block}" if block else "")
        yield name, exporter, lambda path, change=change: write_contrib(path, {}, change=change)

    def functions(path: Path) -> None:
        exports.export(exports.vit(mixer=exports.Moe("loop")), path, **DYNAMO)
        divide(path)
    yield "ViT, experts: loop, in local functions", "dynamo, opset 20", functions


def decoders() -> Iterator[tuple[str, str, Export]]:
    """Language models of Hugging Face, experts as batched_mm."""
    for name in language_models.MODELS:
        for opset, attention in ((20, "eager"), (23, "sdpa")):
            if (name, attention) in (("gpt-j", "sdpa"), ("falcon", "sdpa")):
                continue  # transformers has none; torch does not export it
            yield (f"{name}, {attention}", f"dynamo, opset {opset}",
                   lambda path, name=name, opset=opset, attention=attention: language_models.export(
                       language_models.build(name, attention=attention), path, opset))
    # Its rotary embedding multiplies complex numbers, which only moeware.export writes otherwise.
    ids = torch.zeros(1, hugging_face.TOKENS, dtype=torch.int64)
    yield "deepseek-v2", "moeware.export", lambda path: moeware.export(
        hugging_face.language_model("deepseek-v2"), ids, path)


def built() -> Iterator[tuple[str, str, Export]]:
    """Language models as onnxruntime-genai's model builder writes them."""
    apart = dict(rotary="apart", packed=False)
    experts = dict(experts=4, expert_bits=4, block=16)
    for name, sizes in {
        "GroupQueryAttention": {}, "GroupQueryAttention, rotation apart": apart,
        "GroupQueryAttention, norms of heads": dict(packed=False, qk_norm=True),
        "GroupQueryAttention, part of a head turned": dict(part=0.5, dim=32, interleaved=1),
        "MultiHeadAttention with a mask": dict(apart, attention="multi", kv_heads=4),
        "MatMulNBits, 4 bits": dict(bits=4), "MatMulNBits, 8 bits": dict(bits=8, zeros="packed"),
        "MatMulNBits, 4 bits, tied embedding": dict(bits=4, tied=True),
        "DequantizeLinear of blocks": dict(bits=4, block=16, qdq=True), "MoE, SwiGLU": dict(experts=4),
        "QMoE, SwiGLU, 4 bits": experts, "QMoE and MatMulNBits, 4 bits": dict(experts, bits=4),
    }.items():
        yield (f"decoder, {name}", "model builder",
               lambda path, sizes=sizes: genai.write(path, genai.Sizes(**sizes)))


def measure(path: Path) -> dict:
    """Share of MACs on the accelerator, the largest relative difference, and why nodes stay."""
    began = time.perf_counter()
    model = fuse(load(path))
    parts = report(partition(model))
    seconds = time.perf_counter() - began
    session = onnxruntime.InferenceSession(str(path))
    difference = 0.0
    for seed in range(2):
        feeds = {value.name: _example(value, seed) for value in session.get_inputs()}
        found = evaluate(model, feeds)
        for output, expected in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            gap = np.abs(found[output.name] - expected).max()
            difference = max(difference, float(gap / np.abs(expected).max()))
    causes = {entry["reason"].split(": ", 1)[-1].split(";")[0] for entry in parts["host"]
              if entry["mac_share"] > 0}
    return {"share": parts["fpga_mac_share"], "difference": difference, "seconds": seconds,
            "causes": sorted(causes)}


def _example(value, seed: int) -> np.ndarray:
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    generator = np.random.default_rng(seed)
    if "int" in value.type:
        return generator.integers(1, 32, shape).astype(np.int64)
    return generator.normal(size=shape).astype(np.float32)


def main() -> None:
    torch.manual_seed(0)
    rows, shares, differences, seconds = [], [], [], []
    cases = [*vits(), *contrib(), *decoders(), *built()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (form, exporter, write) in enumerate(tqdm(cases, unit="file")):
            path = Path(folder) / f"{number}.onnx"
            write(path)
            found = measure(path)
            shares.append(found["share"])
            differences.append(found["difference"])
            seconds.append(found["seconds"])
            rows.append([form, exporter, f"{100 * found['share']:.1f}",
                         f"{found['difference']:.1e}", "; ".join(found["causes"])])
    record("forms", "Export forms and models that compile", __doc__.split("\n\n", 1)[1].replace("\n", " "),
           {"files": len(rows),
            "files with at least 99 % of MACs on the accelerator": sum(s >= 0.99 for s in shares),
            "largest relative difference to ONNX Runtime": float(f"{max(differences):.1e}"),
            "seconds from file to partition, mean": round(float(np.mean(seconds)), 2)},
           tables={"Files": [["model and form", "exporter", "MACs on the accelerator, %",
                              "difference", "why not all"], *rows]})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
