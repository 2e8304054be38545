"""Train the language model on Python's documentation, export it and report its held-out loss.

    python examples/pydoc/train.py    # what pydoc.onnx comes from
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from data import ALPHABET, CONTEXT, load, save_samples, sequences
from model import Experts, PydocMoE
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BATCH = 16
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
BALANCE = 0.01


def balance_loss(logits, top_k):
    """1 where tokens spread evenly over the experts, up to experts / top_k where they do not
    (Fedus et al. 2022, section 2.2)."""
    chosen = F.one_hot(logits.topk(top_k, dim=-1).indices, logits.shape[-1]).float()
    shares = chosen.mean(dim=tuple(range(chosen.ndim - 1)))
    return logits.shape[-1] * (shares * logits.softmax(dim=-1).mean(dim=0)).sum()


def train(model, text, steps):
    """Train in place with AdamW on a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    gates = []
    for moe in model.modules():
        if isinstance(moe, Experts):
            moe.gate.register_forward_hook(
                lambda _, inputs, logits, top_k=moe.top_k: gates.append(balance_loss(logits, top_k)))
    with tqdm(total=steps, desc="train", unit="step") as progress:
        for step in range(steps):
            gates.clear()
            batch = torch.from_numpy(sequences(text, BATCH, seed=step))
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            (loss + BALANCE * sum(gates)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
            if step % 100 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


def export(model, path):
    """Any batch of `CONTEXT` characters; written to a temporary name and moved into place."""
    ids = torch.zeros(2, CONTEXT, dtype=torch.int64)
    program = torch.onnx.export(
        model.eval(), (ids,), input_names=["ids"], output_names=["logits"], opset_version=23,
        dynamic_shapes={"ids": {0: torch.export.Dim("batch")}}, dynamo=True, verbose=False)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    program.save(temporary, external_data=False)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "pydoc.onnx")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums are split by thread: one repeats the run exactly, and is fast enough
    split = load()
    model = PydocMoE(len(ALPHABET), CONTEXT)
    began = time.perf_counter()
    train(model, split.train, args.steps)
    seconds = time.perf_counter() - began

    export(model, args.output)
    samples = args.output.with_name(f"{args.output.stem}_samples.npz")
    save_samples(split, samples)
    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    with np.load(samples) as arrays:
        logits = torch.from_numpy(session.run(None, {"ids": arrays["ids"]})[0])
        with torch.no_grad():
            gap = (logits - model(torch.from_numpy(arrays["ids"]))).abs().max()
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(arrays["next"]).flatten())
    print(f"parameters          {sum(p.numel() for p in model.parameters()):,}")
    print(f"training            {args.steps} steps in {seconds:.0f} s")
    print(f"held-out loss       {loss:.4f} nats per character, in ONNX Runtime")
    print(f"ONNX - PyTorch      {gap:.1e} at most")
    print(f"{args.output.name}: {args.output.stat().st_size:,} bytes; "
          f"{samples.name}: {samples.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
