"""Train the digits MoE-ViT, export it to ONNX and report its held-out accuracy.

    python examples/digits/train.py    # what digits.onnx comes from
    python examples/digits/train.py --pool mean --experts einsum --output variant.onnx
"""
import argparse
import time
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import torch
from data import augment, load, save_samples
from export import export
from forms import EinsumExperts, GatherExperts
from model import DigitsMoEViT, LoopExperts, MoE
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
BALANCE = 0.01
FORMS = {"loop": LoopExperts, "einsum": EinsumExperts, "gather": GatherExperts}


@contextmanager
def recorded_gates(model):
    """Collects every gate's (logits [tokens, experts], top_k), in order of execution."""
    gates = []
    hooks = [moe.gate.register_forward_hook(
                 lambda _, inputs, logits, top_k=moe.top_k: gates.append((logits, top_k)))
             for moe in model.modules() if isinstance(moe, MoE)]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def shares(logits, top_k):
    """Share of the token slots that each expert receives, [experts]."""
    chosen = logits.topk(top_k, dim=-1).indices
    return F.one_hot(chosen, logits.shape[-1]).float().mean(dim=(0, 1))


def balance_loss(logits, top_k):
    """1 where tokens spread evenly over the experts, up to experts / top_k where they do not."""
    probabilities = logits.softmax(dim=-1).mean(dim=0)
    return logits.shape[-1] * (shares(logits, top_k) * probabilities).sum()


def train(model, images, labels, epochs):
    """Train in place with AdamW on a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    with recorded_gates(model) as gates, tqdm(total=steps, desc="train", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images))
            for chosen in order[:len(images) // BATCH * BATCH].split(BATCH):
                gates.clear()
                logits = model(augment(images[chosen]))
                loss = F.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
                loss = loss + BALANCE * sum(balance_loss(*gate) for gate in gates)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", choices=["class", "mean"], default="class")
    parser.add_argument("--experts", choices=list(FORMS), default="loop",
                        help="how the experts are written: the same maths in three forms")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "digits.onnx")
    parser.add_argument("--samples", type=Path,
                        help="where the demo's images go (default: beside the output)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(2)  # sums are split by thread: a fixed number repeats the run exactly
    split = load()
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    model = DigitsMoEViT(pool=args.pool, experts_type=FORMS[args.experts])
    began = time.perf_counter()
    train(model, images, labels, args.epochs)
    model.eval()
    seconds = time.perf_counter() - began

    export(model, args.output)
    samples = args.samples or args.output.with_name(f"{args.output.stem}_samples.npz")
    save_samples(split, samples)

    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"image": split.images})[0]
    with torch.no_grad(), recorded_gates(model) as gates:
        gap = abs(logits - model(torch.from_numpy(split.images)).numpy()).max()
    accuracy = (logits.argmax(axis=1) == split.labels).mean()
    print(f"parameters          {sum(p.numel() for p in model.parameters()):,}")
    print(f"training            {args.epochs} epochs in {seconds:.0f} s")
    print(f"held-out accuracy   {accuracy:.2%} of {len(logits)} images, in ONNX Runtime")
    print(f"ONNX - PyTorch      {gap:.1e} at most")
    for number, gate in enumerate(gates):
        print(f"expert shares, MoE {number} " + " ".join(f"{s:.1%}" for s in shares(*gate)))
    print(f"{args.output.name}: {args.output.stat().st_size:,} bytes; "
          f"{samples.name}: {samples.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
