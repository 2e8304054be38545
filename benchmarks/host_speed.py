"""The PyTorch path's integers against ONNX Runtime's floats: the same file, threads and batch."""

import statistics
import time

import numpy as np
import onnxruntime
import torch
from record import ROOT, record

import moeware

DIGITS = ROOT / "examples" / "digits"
BATCH, RUNS = 64, 60


def main() -> None:
    with np.load(DIGITS / "digits_samples.npz") as archive:
        images = archive["images"][:BATCH]
    program = moeware.compile(DIGITS / "digits.onnx", "ulx3s-85f", DIGITS / "digits_samples.npz")
    session = moeware.Session(program, "torch")
    figures = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        reference = onnxruntime.InferenceSession(str(DIGITS / "digits.onnx"), options)
        candidates = {"moeware": lambda: session.run(None, {"image": images}),
                      "onnxruntime": lambda: reference.run(None, {"image": images})}
        times = {name: [] for name in candidates}
        for turn in range(RUNS + 5):  # in turns, so that a drift of the machine meets both
            for name, run in candidates.items():
                began = time.perf_counter()
                run()
                if turn >= 5:
                    times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            figures[f"{name}, {threads} thread{'s'[:threads - 1]}, ms"] = round(1e3 * median, 3)
        figures[f"onnxruntime time / moeware time, {threads} thread{'s'[:threads - 1]}"] = round(
            statistics.median(b / a for a, b in zip(*times.values())), 3)
    record("host-speed", "PyTorch path against ONNX Runtime",
           f"Batch of {BATCH} digits, session to session with quantisation and dequantisation; "
           f"medians of {RUNS} runs in turns, ratio pair by pair. moeware computes the "
           "accelerator's integers, ONNX Runtime float32. Above 1 moeware is faster.", figures)


if __name__ == "__main__":
    main()
