"""What surrounds a linear unit: memories, queues and router, as arrays and as a bench."""

import random

import numpy as np
from amaranth import Value

from moeware.hw.arch import numerics
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Target
from moeware.hw.arch.layout import pack_params
from moeware.hw.interfaces import READ_LATENCY

from .simulate import word_at

__all__ = ["EXPERTS", "HIDDEN", "RESIDUAL", "SOURCE", "TABLE", "TABLES", "TOKENS", "Machine",
           "config", "halves", "pairs", "signed"]

EXPERTS = {0: "empty", 1: "one", 2: "some", 3: "all", 4: "ragged", 5: "repeated"}
TOKENS, SOURCE, HIDDEN = 11, 7, 150  # rows; activation word of the input; of the written rows
RESIDUAL, TABLE, TABLES = 3, 1, 2


def config(tokens, outputs, depth, lanes, **changes):
    return Config(**{
        "tokens": tokens, "outputs": outputs, "depth": depth, "lanes": lanes,
        "queries": 1, "bus_bytes": 4, "activation_banks": 1, "activation_words": 512,
        "residual_words": 512, "weight_words": 512, "param_words": 128, "tables": TABLES,
        "row_words": 5, "max_rows": 16, "max_experts": 8, "max_chosen": 2, "queue": 2} | changes)


class Machine:
    """The memories, queues and router around a linear unit: as numpy arrays for `execute`, and as
    a bench that refuses at random with probability `refuse`."""

    def __init__(self, config, seed, refuse=0.0):
        self.config, self.refuse = config, refuse
        self.draw, rng = random.Random(seed), np.random.default_rng(seed)
        self.activation = rng.integers(-128, 128, (config.activation_words, config.depth))
        self.residual = rng.integers(-32768, 32768, (config.residual_words, config.lanes))
        self.weight = rng.integers(-128, 128, (config.weight_words, config.outputs, config.depth))
        if config.narrow:
            self.weight = halves(rng.integers(-7, 8, (2, *self.weight.shape)))
        channels = config.param_words * config.lanes
        self.bias = rng.integers(-2**31, 2**31, channels) >> rng.integers(13, 31, channels)
        self.bias[5::13] = rng.choice((-2**31, 2**31 - 1), len(self.bias[5::13]))  # sums wrap
        self.multiplier = rng.integers(0, 1 << 16, channels)
        self.shift = rng.integers(14, 30, channels)
        self.shift[6::7], self.shift[3::11] = 1, 47
        params = pack_params(config, self.bias, self.multiplier, self.shift)
        self.params = [int.from_bytes(word.tobytes(), "little") for word in params]
        self.tables = rng.integers(-128, 128, (config.tables, 256))
        tokens = {"empty": [], "one": [TOKENS - 1], "some": [2, 3, 5, 9],
                  "all": range(TOKENS), "ragged": [10, 0, 1, 4, 7],
                  "repeated": [3, 3, 3, 2, 3, 3]}
        self.queues = {expert: [(token, (0, 65535, 32768, self.draw.randrange(1 << 16))[i % 4])
                                for i, token in enumerate(tokens[name])]
                       for expert, name in EXPERTS.items()}
        self.logits, self.setups, self.writes, self.over = [], [], 0, False
        self.routed = 0

    # The unit's ports, on the same arrays.

    async def bench(self, ctx, unit):
        reads = [(unit.activation_read, lambda a: _pack(self.activation[word_at(a, self.config)], 8)),
                 (unit.residual_read, lambda a: _pack(self.residual[a], 16)),
                 (unit.weight_read, lambda a: _pack(self.weight[a].ravel(), 8)),
                 (unit.param_read, self.params.__getitem__)]
        writes = [(unit.activation_write.write, self.activation, 8),
                  (unit.residual_write.write, self.residual, 16)]
        readies = ([port.address.ready for port, _ in reads if port is not unit.weight_read]
                   + [port.ready for port, _, _ in writes] + [unit.logits.ready, unit.route.ready])
        ctx.set(unit.weight_read.address.ready, 1)
        pending = [[None] * (READ_LATENCY - 1) for _ in reads]
        entries, length, route_in = [None] * (READ_LATENCY - 1), 0, 0
        sampled = ([s for port, _ in reads
                    for s in (port.address.valid, port.address.ready, port.address.payload)]
                   + [s for port, _, _ in writes for s in (port.valid, port.ready, port.payload)]
                   + [unit.logits.valid, unit.logits.ready, unit.logits.payload,
                      unit.route.valid, unit.route.ready, unit.route.payload,
                      unit.queue.expert, unit.queue.index.valid, unit.queue.index.payload])
        while not self.over:
            for ready in readies:
                ctx.set(ready, self.draw.random() >= self.refuse)
            values = iter((await ctx.tick().sample(*sampled))[2:])
            for i, (port, look_up) in enumerate(reads):
                valid, ready, address = next(values), next(values), next(values)
                payload, word = Value.cast(port.data.payload), pending[i].pop(0)
                # What is on the port when nothing arrives must not matter.
                ctx.set(payload, self.draw.getrandbits(len(payload)) if word is None else word)
                ctx.set(port.data.valid, word is not None)
                pending[i].append(look_up(address) if valid and ready else None)
            for port, memory, bits in writes:
                valid, ready, payload = next(values), next(values), next(values)
                if valid and ready:
                    self.writes += 1
                    for cell in range(memory.shape[1]):
                        if payload.mask >> cell & 1:
                            memory[word_at(payload.address, self.config), cell] = signed(
                                payload.data >> bits * cell, bits)
            valid, ready, payload = next(values), next(values), next(values)
            ctx.set(unit.route_done, route_in == 1)
            route_in = max(0, route_in - 1)
            if valid and ready:
                experts, rows = self.setups[-1].experts, self.setups[-1].rows
                count = min(self.config.lanes, experts - payload.channel)
                self.logits.append((payload.row, payload.channel, *payload.logits[:count]))
                self.routed += 1
                if self.routed == rows * -(-experts // self.config.lanes):
                    route_in = 1
            valid, ready, payload = next(values), next(values), next(values)
            if valid and ready:
                self.setups.append(payload)
                self.routed = 0
            expert, valid, index = next(values), next(values), next(values)
            ctx.set(unit.queue.length, length)
            length = len(self.queues.get(expert, ()))
            token, weight = entries.pop(0) or (self.draw.getrandbits(13), self.draw.getrandbits(16))
            ctx.set(unit.queue.entry.payload, {"token": token, "weight": weight})
            entries.append(self.queues[index.expert][index.index] if valid else None)

    # The same in numpy.

    def execute(self, fields):
        """Effects of LINEAR on the arrays, given every field. Returns the writes that it takes."""
        f, c = fields, self.config
        queue = self.queues[f["expert"]] if f["queued"] else [(i, 0) for i in range(f["rows"])]
        sources, targets = ([token if f[by] and f["queued"] else i
                             for i, (token, _) in enumerate(queue)] for by in ("gather", "scatter"))
        if not queue or not f["channels"] or not f["source_words"]:
            return 0
        outputs = c.outputs << f["narrow"]
        groups = -(-f["channels"] // outputs)
        weight = self.weight[f["weight"]:][:groups * f["source_words"]]
        if f["narrow"]:
            weight = np.concatenate([signed(weight, 4), weight >> 4], 1)
        weight = weight.reshape(groups, -1, outputs, c.depth).swapaxes(1, 2)
        weight = weight.reshape(groups * outputs, -1)[:f["channels"]]
        rows = [self.activation[f["source"] + row * f["source_stride"]:][:f["source_words"]].ravel()
                for row in sources]
        channels = slice(f["param"] * c.lanes, f["param"] * c.lanes + f["channels"])
        bias, scale = self.bias[channels], (self.multiplier[channels], self.shift[channels])
        values = (np.array(rows) @ weight.T + bias).astype(np.int32).astype(np.int64)

        if f["target"] == Target.ROUTER:
            for first in range(0, len(rows), c.tokens):
                for base in range(0, f["channels"], outputs):
                    for row in range(first, min(first + c.tokens, len(rows))):
                        for channel in range(base, min(base + outputs, f["channels"]), c.lanes):
                            self.logits.append((row, channel, *values[row, channel:][
                                :min(c.lanes, f["channels"] - channel)].tolist()))
            return 0
        for row, target in enumerate(targets):
            start = f["destination"] + target * f["destination_stride"]
            if f["target"] == Target.ACTIVATION:
                result = numerics.requantise(values[row], *scale)
                if f["tabled"]:
                    result = self.tables[f["table"]][result & 255]
                if f["product"]:
                    second = pairs(c, f)
                    factor = numerics.requantise(values[row], *scale, bits=16)
                    result = numerics.product(result[second - c.lanes], factor[second])
                self.activation[start:].reshape(-1)[:len(result)] = result
            else:
                result = numerics.requantise(values[row], *scale, bits=16)
                if f["gated"] and f["queued"]:
                    result = numerics.gated(result, queue[row][1])
                flat = self.residual[start:].reshape(-1)[:f["channels"]]
                flat[:] = numerics.accumulate_residual(flat, result) if f["accumulate"] else result
        paired = f["product"] and f["target"] == Target.ACTIVATION
        return len(rows) * -(-f["channels"] // c.lanes) // (1 + paired)


def pairs(config, fields):
    """The channels of the second results of LINEAR.product."""
    return np.flatnonzero(np.arange(fields["channels"]) // config.lanes % 2)


def halves(weights):
    """Bytes, as signed numbers, of the weights [low or high, ...] of 4 bits."""
    return weights[1] * 16 + (weights[0] & 15)


def _pack(values, bits):
    return sum((int(value) & (1 << bits) - 1) << bits * i for i, value in enumerate(values))


def signed(value, bits):
    value = value & (1 << bits) - 1
    return value - (value >> bits - 1 << bits)
