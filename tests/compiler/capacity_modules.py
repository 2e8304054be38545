"""Mixtures whose experts take a limited number of tokens, as models write them."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler import exports


class CapacityMoe(exports.Moe):
    """A `Moe` of which each expert takes `capacity` tokens of a frame.

    form : how tokens go to the experts and back:
        "einsum" (GShard, V-MoE): a combine tensor [T, E, C], and where it is not 0 the dispatch;
        "apart": both made by themselves; "frames": with an axis of frames;
        "list" (DeepSpeed): as "einsum", expert by expert;
        "scatter" (Tutel): into buffers of E * C rows and one for what is dropped, and a gather back;
        "weights" (Hugging Face's Switch): all experts on all tokens, the weights of the dropped are 0.
    places : how places are counted: "tokens" (of several-hot rows), "slots" (of one-hot rows [T * k]),
        "ranks" (rank after rank, counts carried on: GShard), "turned" (of one-hot rows [k * T]),
        "triangle" (as "slots", by a product), "priority" (as "ranks", tokens by their largest weight).
    divide : weights by their sum "chosen" before tokens are dropped, "kept" behind it, or not ("all").
    """

    def __init__(self, form="einsum", places="tokens", divide="all", k=exports.TOP_K, capacity=2,
                 function=None):
        super().__init__(form, "all", k, function)
        self.places, self.divide, self.capacity = places, divide, capacity

    def forward(self, x):
        rows = x.reshape(-1, exports.DIM)
        probabilities = self.gate(rows).softmax(-1)
        weights, indices = probabilities.topk(self.k, -1)
        if self.divide == "chosen":
            weights = weights / weights.sum(-1, keepdim=True)
        place = getattr(self, f"_by_{self.places}")(indices, weights)
        kept = place < self.capacity
        if self.divide == "kept":
            masked = weights * kept
            weights = masked / masked.sum(-1, keepdim=True).clamp(min=1e-9)
        return getattr(self, f"_{self.form}")(rows, weights, indices, place, kept).reshape(x.shape)

    # Places [T, k]

    def _by_tokens(self, indices, weights):
        hot = F.one_hot(indices, exports.EXPERTS).sum(1)
        return (hot.cumsum(0) - hot).gather(1, indices)

    def _by_slots(self, indices, weights):
        hot = F.one_hot(indices.reshape(-1), exports.EXPERTS)
        return ((hot.cumsum(0) - 1) * hot).sum(-1).view_as(indices)

    def _by_triangle(self, indices, weights):
        hot = F.one_hot(indices.reshape(-1), exports.EXPERTS).float()
        before = torch.tril(torch.ones(len(hot), len(hot)), -1) @ hot
        return (before * hot).sum(-1).view_as(weights)

    def _by_turned(self, indices, weights):
        hot = F.one_hot(indices.t().reshape(-1), exports.EXPERTS)
        return ((hot.cumsum(0) - 1) * hot).sum(-1).view(self.k, -1).t()

    def _by_ranks(self, indices, weights):
        found, before = [], 0
        for rank in range(self.k):
            hot = F.one_hot(indices[:, rank], exports.EXPERTS)
            found.append(((hot.cumsum(0) - 1 + before) * hot).sum(-1))
            before = before + hot.sum(0)
        return torch.stack(found, 1)

    def _by_priority(self, indices, weights):
        order = weights.max(-1).values.argsort(descending=True)
        return self._by_ranks(indices[order], weights)[order.argsort()]

    # Dispatch and combination

    def _experts(self, slots):
        """[E, C, D] to [E, C, D]."""
        hidden = torch.matmul(slots, self.w1.transpose(1, 2)) + self.b1[:, None]
        return torch.matmul(self.function(hidden), self.w2.transpose(1, 2)) + self.b2[:, None]

    def _seats(self, indices, place, kept):
        """[T, k, E, C]: 1 where a choice has a place."""
        seat = F.one_hot(place.long().clamp(max=self.capacity - 1), self.capacity) * kept[..., None]
        return (F.one_hot(indices, exports.EXPERTS)[..., None] * seat[..., None, :]).float()

    def _einsum(self, rows, weights, indices, place, kept):
        combine = torch.einsum("tk,tkec->tec", weights, self._seats(indices, place, kept))
        slots = torch.einsum("td,tec->ecd", rows, (combine > 0).float())
        return torch.einsum("ecd,tec->td", self._experts(slots), combine)

    def _list(self, rows, weights, indices, place, kept):
        combine = torch.einsum("tk,tkec->tec", weights, self._seats(indices, place, kept))
        slots = torch.einsum("tec,td->ecd", (combine > 0).float(), rows)
        results = [self._expert(e, part[0]) for e, part in enumerate(slots.chunk(exports.EXPERTS))]
        return torch.einsum("tec,ecd->td", combine, torch.stack(results))

    def _apart(self, rows, weights, indices, place, kept):
        seats = self._seats(indices, place, kept)
        slots = torch.einsum("td,tec->ecd", rows, seats.sum(1))
        return torch.einsum("ecd,tec->td", self._experts(slots), (seats * weights[..., None, None]).sum(1))

    def _frames(self, rows, weights, indices, place, kept):
        combine = torch.einsum("tk,tkec->tec", weights, self._seats(indices, place, kept))[None]
        slots = torch.einsum("bnd,bnec->becd", rows[None], (combine > 0).float())
        return torch.einsum("becd,bnec->bnd", self._experts(slots[0])[None], combine)

    def _scatter(self, rows, weights, indices, place, kept):
        most = exports.EXPERTS * self.capacity
        seat = torch.where(kept, indices * self.capacity + place.long(), most).reshape(-1)
        slots = rows.new_zeros(most + 1, rows.shape[1])
        slots = slots.index_put((seat,), rows.repeat_interleave(self.k, 0))
        output = self._experts(slots[:most].view(exports.EXPERTS, self.capacity, -1))
        output = torch.cat([output.view(most, -1), output.new_zeros(1, rows.shape[1])])
        return (output[seat].view(*indices.shape, -1) * (weights * kept)[..., None]).sum(1)

    def _weights(self, rows, weights, indices, place, kept):
        return self._loop(rows, weights * kept, indices)


class TopOneTwice(CapacityMoe):
    """The second expert is the largest of those left (GShard, and what follows it)."""

    def forward(self, x):
        rows = x.reshape(-1, exports.DIM)
        probabilities = self.gate(rows).softmax(-1)
        first, one = probabilities.topk(1, -1)
        left = probabilities * (1 - F.one_hot(one[:, 0], exports.EXPERTS))
        second, two = left.topk(1, -1)
        weights, indices = torch.cat([first, second], 1), torch.cat([one, two], 1)
        if self.divide == "chosen":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-9)
        place = getattr(self, f"_by_{self.places}")(indices, weights)
        kept = place < self.capacity
        return getattr(self, f"_{self.form}")(rows, weights, indices, place, kept).reshape(x.shape)


class Switch(CapacityMoe):
    """One expert, the largest, and a mask of those that have a place (Hugging Face's Switch)."""

    def forward(self, x):
        rows = x.reshape(-1, exports.DIM)
        probabilities = self.gate(rows).softmax(-1)
        hot = F.one_hot(probabilities.argmax(-1), exports.EXPERTS)
        hot = hot * (hot.cumsum(-2) <= self.capacity)
        results = sum(hot[:, e, None] * self._expert(e, rows) for e in range(exports.EXPERTS))
        return (results * probabilities.max(-1, keepdim=True).values).reshape(x.shape)


class ArgMaxTwice(CapacityMoe):
    """The second expert is the largest of the logits left (GShard in fairseq)."""

    def forward(self, x):
        rows = x.reshape(-1, exports.DIM)
        logits = self.gate(rows)
        probabilities, one = logits.softmax(-1), logits.argmax(-1)
        first = F.one_hot(one, exports.EXPERTS)
        two = logits.masked_fill(first.bool(), float("-inf")).argmax(-1)
        indices = torch.stack([one, two], 1)
        weights = probabilities.gather(1, indices)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-7)
        place = getattr(self, f"_by_{self.places}")(indices, weights)
        kept = place < self.capacity
        return getattr(self, f"_{self.form}")(rows, weights, indices, place, kept).reshape(x.shape)


class MaskTwice(CapacityMoe):
    """Two masks of one expert each, and gates that are what is left of the softmax (DeepSpeed's top2gating)."""

    def forward(self, x):
        rows = x.reshape(-1, exports.DIM)
        logits = self.gate(rows)
        gates = logits.softmax(1)
        one = F.one_hot(gates.argmax(1), exports.EXPERTS)
        two = F.one_hot(logits.masked_fill(one.bool(), float("-inf")).argmax(1), exports.EXPERTS)
        places = [one.cumsum(0) - 1, two.cumsum(0) - 1 + one.sum(0, keepdim=True)]
        masks = [mask * (place < self.capacity) for mask, place in zip((one, two), places)]
        weights = [torch.einsum("se,se->s", gates, mask.float()) for mask in masks]
        total = (weights[0] + weights[1]).clamp(min=torch.finfo(torch.float32).eps)
        combine = 0
        for mask, place, weight in zip(masks, places, weights):
            seat = F.one_hot((place * mask).sum(1), self.capacity).float()
            gate = torch.einsum("s,se->se", weight / total, mask.float())
            combine = combine + torch.einsum("se,sc->sec", gate, seat)
        slots = torch.einsum("sec,sm->ecm", combine.bool().float(), rows)
        return torch.einsum("sec,ecm->sm", combine, self._experts(slots)).reshape(x.shape)


def vit(*mixers):
    """A vision transformer with a block for each mixer, without attention, as an export takes time."""
    torch.manual_seed(5)
    blocks = (exports.Block(nn.Identity(), mixer, lambda: nn.LayerNorm(exports.DIM)) for mixer in mixers)
    return exports.randomise(exports.Vit(*blocks))
