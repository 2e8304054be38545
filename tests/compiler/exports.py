"""Small vision transformers, dense and mixture-of-experts, and their exports for the tests."""

import contextlib
import io
import logging
import math
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

DIM, HIDDEN, EXPERTS, TOP_K, HEADS, CLASSES = 20, 24, 5, 2, 4, 3
CHANNELS, HEIGHT, WIDTH, PATCH = 3, 8, 12, 4
PATCHES = (HEIGHT // PATCH) * (WIDTH // PATCH)


class PackedAttention(nn.Module):
    """Packed qkv; ``kind``: "sdpa", "manual" (scale on scores), "scale_q", "scale_both"."""

    def __init__(self, kind="sdpa", causal=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.kind, self.causal = kind, causal

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scale = (DIM // HEADS) ** -0.5
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            if self.kind == "scale_q":
                scores = (q * scale) @ k.transpose(-2, -1)
            elif self.kind == "scale_both":
                scores = (q * math.sqrt(scale)) @ (k * math.sqrt(scale)).transpose(-2, -1)
            else:
                scores = q @ k.transpose(-2, -1) / math.sqrt(DIM // HEADS)
            if self.causal:
                mask = torch.triu(torch.full((n, n), float("-inf")), 1)
                scores = scores + mask
            y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, DIM))


class SeparateAttention(nn.Module):
    """Three projections; two key heads shared by four query heads where ``grouped``."""

    def __init__(self, grouped=False):
        super().__init__()
        self.kv_heads = 2 if grouped else HEADS
        kv = DIM // HEADS * self.kv_heads
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, kv), nn.Linear(DIM, kv)
        self.o = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, -1).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        if self.kv_heads != HEADS:
            k = k.repeat_interleave(HEADS // self.kv_heads, dim=1)
            v = v.repeat_interleave(HEADS // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention as self-attention."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Mlp(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.function = function or nn.GELU()

    def forward(self, x):
        return self.fc2(self.function(self.fc1(x)))


class PrimitiveNorm(nn.Module):
    """LayerNorm written out."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(DIM)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.gamma + self.beta


class Moe(nn.Module):
    """Mixture of experts; ``form`` says how the experts are applied, ``order`` how routed.

    order: "chosen" (softmax, top-k, renormalise), "top_first" (top-k, softmax), "all".
    """

    def __init__(self, form="loop", order="chosen", k=TOP_K, function=None):
        super().__init__()
        self.form, self.order, self.k = form, order, k
        self.gate = nn.Linear(DIM, EXPERTS, bias=order != "all")
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) * 0.3)
        self.b1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN) * 0.3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) * 0.3)
        self.b2 = nn.Parameter(torch.randn(EXPERTS, DIM) * 0.3)
        self.function = function or nn.GELU()

    def forward(self, x):
        b, n, _ = x.shape
        rows = x.reshape(-1, DIM)
        logits = self.gate(rows)
        if self.order == "top_first":
            weights, indices = logits.topk(self.k, -1)
            weights = weights.softmax(-1)
        else:
            weights, indices = logits.softmax(-1).topk(self.k, -1)
            if self.order == "chosen":
                weights = weights / weights.sum(-1, keepdim=True)
        return getattr(self, f"_{self.form}")(rows, weights, indices).reshape(b, n, DIM)

    def _shared(self, rows, weights, indices):
        """A loop, and expert 0 for every token beside it."""
        return self._loop(rows, weights, indices) + self._expert(0, rows)

    def _stack(self, rows, weights, indices):
        """Every expert on every token, and the outputs of the chosen gathered."""
        outputs = torch.stack([self._expert(e, rows) for e in range(EXPERTS)], 1)
        chosen = outputs.gather(1, indices[..., None].expand(-1, -1, DIM))
        return (chosen * weights[..., None]).sum(1)

    def _expert(self, e, rows):
        hidden = self.function(F.linear(rows, self.w1[e], self.b1[e]))
        return F.linear(hidden, self.w2[e], self.b2[e])

    def _loop(self, rows, weights, indices):
        result = torch.zeros_like(rows)
        for e in range(EXPERTS):
            factor = (weights * (indices == e)).sum(-1, keepdim=True)
            result = result + factor * self._expert(e, rows)
        return result

    def _where(self, rows, weights, indices):
        result = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token, slot = torch.where(indices == e)
            value = self._expert(e, rows[token]) * weights[token, slot][:, None]
            result = result.index_add(0, token, value)
        return result

    def _combine(self, rows, dense):
        hidden = torch.einsum("td,efd->tef", rows, self.w1) + self.b1
        output = torch.einsum("tef,edf->ted", self.function(hidden), self.w2) + self.b2
        return torch.einsum("ted,te->td", output, dense)

    def _scatter(self, rows, weights, indices):
        dense = torch.zeros(rows.shape[0], EXPERTS).scatter(1, indices, weights)
        return self._combine(rows, dense)

    def _onehot(self, rows, weights, indices):
        dense = (F.one_hot(indices, EXPERTS) * weights[..., None]).sum(1)
        return self._combine(rows, dense)

    def _sorted_split(self, rows, weights, indices):
        """Silently wrong when traced: the split sizes are the counts of the example input."""
        order = indices.reshape(-1).argsort()
        counts = torch.bincount(indices.reshape(-1), minlength=EXPERTS).tolist()
        pieces = rows[order // self.k].split(counts)
        output = torch.cat([self._expert(e, piece) for e, piece in enumerate(pieces)])
        output = output * weights.reshape(-1)[order][:, None]
        return torch.zeros_like(rows).index_add(0, order // self.k, output)

    def _gather(self, rows, weights, indices):
        w1, b1 = self.w1[indices], self.b1[indices]
        w2, b2 = self.w2[indices], self.b2[indices]
        hidden = self.function((w1 @ rows[:, None, :, None]).squeeze(-1) + b1)
        output = (w2 @ hidden[..., None]).squeeze(-1) + b2
        return (output * weights[..., None]).sum(1)

    def _slots(self, rows, weights, indices):
        """The weights of one choice after the other gathered."""
        result = 0
        for slot in range(self.k):
            e = indices[:, slot]
            hidden = self.function((rows[:, None] @ self.w1[e].transpose(1, 2)).squeeze(1) + self.b1[e])
            output = (hidden[:, None] @ self.w2[e].transpose(1, 2)).squeeze(1) + self.b2[e]
            result = result + output * weights[:, slot, None]
        return result

    def _index_add(self, rows, weights, indices):
        """A list of all choices, added to their tokens; TorchScript exports it wrong."""
        token, e = torch.arange(rows.shape[0]).repeat_interleave(self.k), indices.reshape(-1)
        hidden = torch.bmm(self.w1[e], rows[token][..., None]).squeeze(-1) + self.b1[e]
        output = torch.bmm(self.w2[e], self.function(hidden)[..., None]).squeeze(-1) + self.b2[e]
        return torch.zeros_like(rows).index_add(0, token, output * weights.reshape(-1, 1))

    def _gather_einsum(self, rows, weights, indices):
        hidden = torch.einsum("td,tkhd->tkh", rows, self.w1[indices]) + self.b1[indices]
        output = torch.einsum("tkh,tkdh->tkd", self.function(hidden), self.w2[indices])
        return torch.einsum("tkd,tk->td", output + self.b2[indices], weights)


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer, pre-norm."""

    def __init__(self):
        super().__init__()
        options = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        self.inner = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options)

    def forward(self, x):
        return self.inner(x)


class Odd(nn.Module):
    """A mixer that no rule knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(PATCHES + 1, PATCHES + 1))

    def forward(self, x):
        return torch.sin(torch.einsum("bnd,nm->bmd", x, self.weight))


class Preprocessed(nn.Module):
    """A model between plain operators on the image and a softmax of the logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        return self.inner((image - 0.5).clamp(-3, 3) * 2).softmax(-1)


class Block(nn.Module):
    def __init__(self, attention, mixer, norm, layer_scale=False):
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attention, self.mixer = attention, mixer
        self.scale = nn.Parameter(torch.randn(DIM)) if layer_scale else None

    def forward(self, x):
        scale = 1.0 if self.scale is None else self.scale
        x = x + self.attention(self.norm1(x)) * scale
        return x + self.mixer(self.norm2(x)) * scale


class Vit(nn.Module):
    """``embed``: "conv" or "rearrange"; ``pool``: "class", "mean" or "registers" (and class)."""

    def __init__(self, *blocks, embed="conv", pool="class", norm=None):
        super().__init__()
        self.embed, self.pool = embed, pool
        self.conv = nn.Conv2d(CHANNELS, DIM, PATCH, PATCH)
        self.linear = nn.Linear(CHANNELS * PATCH * PATCH, DIM)
        rows = PATCHES + (pool != "mean")
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        rows += 2 * (pool == "registers")
        self.registers = nn.Parameter(torch.randn(1, 2, DIM))
        self.position = nn.Parameter(torch.randn(1, rows, DIM))
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm() if norm else nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, image):
        b = image.shape[0]
        if self.embed == "conv":
            x = self.conv(image).flatten(2).transpose(1, 2)
        else:
            x = image.reshape(b, CHANNELS, HEIGHT // PATCH, PATCH, WIDTH // PATCH, PATCH)
            x = self.linear(x.permute(0, 2, 4, 3, 5, 1).reshape(b, PATCHES, -1))
        if self.pool == "class":
            x = torch.cat([self.token.expand(b, -1, -1), x], 1)
        if self.pool == "registers":
            first = self.token.expand(b, -1, -1), self.registers.expand(b, -1, -1)
            x = torch.cat([*first, x], 1)
        x = self.norm(self.blocks(x + self.position))
        return self.head(x.mean(1) if self.pool == "mean" else x[:, 0])


class TaskGate(nn.Module):
    """One gate for each of two tasks; ``form`` says how the task selects it: "index" or "select"."""

    def __init__(self, form="index"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, EXPERTS, DIM))
        self.bias = nn.Parameter(torch.randn(2, EXPERTS))
        self.form, self.task = form, None

    def forward(self, x):
        if self.form == "select":
            index = self.task.reshape(1)
            return F.linear(x, *(each.index_select(0, index)[0] for each in (self.weight, self.bias)))
        shape = self.weight.shape[1:]
        return F.linear(x, self.weight[self.task].reshape(shape),
                        self.bias[self.task].reshape(shape[:1]))


class Tasks(nn.Module):
    """``forward(image, task)`` of a model with a `TaskGate`."""

    def __init__(self, form="index"):
        super().__init__()
        torch.manual_seed(4)
        mixer = Moe()
        mixer.gate = TaskGate(form)
        # The task's gate meets wide features: it has a say in how they are smoothed.
        self.inner, self.gate = vit(mixer=mixer), mixer.gate
        with torch.no_grad():
            self.gate.weight[1, :, :4] *= 8

    def forward(self, image, task):
        self.gate.task = task
        return self.inner(image)


def vit(attention=None, mixer=None, norm=None, **options):
    """A one-block model with random weights (norms and biases included), in eval mode."""
    torch.manual_seed(5)
    scale = options.pop("layer_scale", False)
    norm = norm or (lambda: nn.LayerNorm(DIM))
    block = Block(attention or PackedAttention(), mixer or Mlp(), norm, scale)
    return randomise(Vit(block, norm=norm, **options))


def randomise(model):
    """Give every vector parameter random values: constructors fill them with zeros and ones."""
    torch.manual_seed(6)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.4)
    return model.eval()


def example(frames=1, seed=0):
    """Random images ``[frames, 3, 8, 12]``, float32."""
    shape = (frames, CHANNELS, HEIGHT, WIDTH)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def export(model, path, opset=20, dynamo=True, dynamic=True, task=None):
    """Write ``model`` to ``path``; the batch axis is dynamic where ``dynamic``. ``task``: an example
    for a second input."""
    inputs = {"image": torch.from_numpy(example(2 if dynamic else 1))}
    if task is not None:
        inputs["task"] = task
    options = {"input_names": list(inputs), "output_names": ["logits"]}
    if dynamic and dynamo:
        fixed = (None,) * (len(inputs) - 1)
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")}, *fixed)
    elif dynamic:
        options["dynamic_axes"] = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return export_module(model, tuple(inputs.values()), path, opset, dynamo, **options)


def export_module(model, inputs, path, opset=20, dynamo=True, **options):
    """Write ``model`` to ``path``, in eval mode; ``inputs``: an example for each input, a tuple."""
    options |= {"opset_version": opset, "dynamo": dynamo}
    if dynamo:
        options |= {"external_data": False, "verbose": False}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), inputs, str(path), **options)
    return path


def run_onnx(path, **feeds):
    """All outputs of the model at ``path`` in ONNX Runtime."""
    model = onnx.load(str(path)).SerializeToString()
    return onnxruntime.InferenceSession(model).run(None, feeds)
