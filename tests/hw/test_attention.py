# amaranth: UnusedElaboratable=no
import random

import numpy as np
import pytest

from moeware.hw.arch import numerics
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import HEAD_WORDS
from moeware.hw.attention import AttentionUnit
from moeware.hw.attention.results import ResultWriter
from moeware.hw.interfaces import READ_LATENCY

from .simulate import simulate, word_at
from .streams import put_all

WORDS = 4096  # of the activation memory
CONFIGS = [(2, 8, 2), (3, 5, 1), (1, 1, 1), (4, 4, 4), (1, 6, 3), (5, 2, 1), (2, 3, 3)]


def config(queries, depth, lanes, max_rows=24):
    return Config(
        tokens=1, outputs=lanes, depth=depth, queries=queries, lanes=lanes, bus_bytes=4,
        activation_banks=1, activation_words=WORDS, residual_words=4, weight_words=4, param_words=4,
        tables=1, row_words=64, max_rows=max_rows, max_experts=1, max_chosen=1, queue=2)


def attention(memory, f, depth):
    """What ATTENTION with the fields `f` does to `memory`, int8 [words, depth]."""
    def rows(base, count):
        return np.stack([memory[base + i * f["stride"]:][:f["words"]].reshape(-1)
                         for i in range(count)]).astype(np.int64)

    if not f["rows"] or not f["keys"] or not f["words"]:
        return
    query, key, value = (rows(f["query"], f["rows"]), rows(f["key"], f["keys"]),
                         rows(f["value"], f["keys"]))
    results = []
    for i in range(f["rows"]):
        seen = f["keys"]
        if f["causal"]:
            seen = min(seen, i + f["keys"] - f["rows"] + 1)
        if seen <= 0:
            results.append(np.zeros(f["words"] * depth, np.int64))
            continue
        scores = key[:seen] @ query[i]
        steps = numerics.octaves(scores.max() - scores, f["multiplier"], f["shift"])
        probabilities = numerics.probability(steps)
        scale = numerics.row_scale(probabilities.sum(), f["out_multiplier"], f["out_shift"])
        results.append(numerics.requantise(probabilities @ value[:seen], *scale))
    for i, result in enumerate(results):
        start = f["destination"] + i * f["destination_stride"]
        memory[start:start + f["words"]] = result.reshape(f["words"], depth)


def head(rows, keys, words, *, causal=0, base=0, gap=0, multiplier=40000, shift=16,
         out_multiplier=1 << 15, out_shift=15, **fields):
    """Fields of an instruction whose queries, keys and values lie in rows of three heads' words at
    `base`, and whose results follow them."""
    stride = 3 * words + gap
    return {"rows": rows, "keys": keys, "causal": causal, "words": words, "query": base,
            "key": base + words, "value": base + 2 * words, "stride": stride,
            "destination": base + stride * max(rows, keys), "destination_stride": words + gap,
            "multiplier": multiplier, "shift": shift, "out_multiplier": out_multiplier,
            "out_shift": out_shift} | fields


def pack(word):
    return int.from_bytes(word.astype(np.int8).tobytes(), "little")


def run(size, heads, memory, *, stalls=(0.0, 0.0, 0.0), seed=0, deadline=20_000):
    """Runs instructions back to back on `memory`; at each `done` the results so far must be there.
    `stalls` : share of cycles in which key_read, value_read and activation_write are not ready.
    Returns the cycles at which instructions were done, and those in which the unit said stalled."""
    dut = AttentionUnit(size)
    draw = random.Random(seed)
    depth = size.depth
    expected = memory.copy()
    written, finished, stalled = set(), [], []

    async def memories(ctx):
        """All three ports on one memory; a word that nobody asked for is noise."""
        ports, write = [dut.key_read, dut.value_read], dut.activation_write.write
        arriving = [[None] * (READ_LATENCY - 1) for _ in ports]
        words = [None] * len(ports)
        cycle = idle = 0
        while idle < 30:  # nothing may come after the last `done`
            ready = [draw.random() >= share for share in stalls]
            for port, word, r in zip(ports, words, ready):
                ctx.set(port.data.valid, word is not None)
                ctx.set(port.data.payload, draw.getrandbits(8 * depth) if word is None else word)
                ctx.set(port.address.ready, r)
            ctx.set(write.ready, ready[2])
            sampled = await ctx.tick().sample(
                *(s for port in ports for s in (port.address.valid, port.address.payload)),
                write.valid, write.payload, dut.engine.done, dut.engine.busy, dut.engine.stalled)
            *reads, writes, stored, done, busy, no_progress = sampled[2:]
            for i, queue in enumerate(arriving):
                accepted = reads[2 * i] and ready[i]
                queue.append(pack(memory[word_at(reads[2 * i + 1], size)]) if accepted else None)
                words[i] = queue.pop(0)
            if done:  # before the write of this cycle, which would be too late
                finish(cycle)
            if writes and ready[2]:
                word = np.frombuffer(stored.data.to_bytes(depth, "little"), np.int8)
                address = word_at(stored.address, size)
                for i in range(depth):
                    if stored.mask >> i & 1:
                        assert (address, i) not in written, "written twice"
                        written.add((address, i))
                        memory[address, i] = word[i]
            if no_progress:
                stalled.append(cycle)
            idle = idle + 1 if len(finished) == len(heads) else 0
            assert not (idle > 1 and busy)
            cycle += 1

    def finish(cycle):
        assert len(finished) < len(heads), "done too often"
        f = heads[len(finished)]
        attention(expected, f, depth)
        places = [f["destination"] + i * f["destination_stride"] + w
                  for i in range(f["rows"]) for w in range(f["words"] if f["keys"] else 0)]
        assert np.array_equal(memory[places], expected[places]), f"head {len(finished)}: {f}"
        written.difference_update((a, i) for a in places for i in range(depth))
        finished.append(cycle)

    async def sequencer(ctx):
        await put_all(ctx, dut.engine.instruction, heads)

    simulate(dut, memories, sequencer, deadline=deadline)
    assert np.array_equal(memory, expected), "a word outside the results was written"
    return finished, stalled


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(-128, 128, (WORDS, size.depth)).astype(np.int8)


def random_heads(count, seed, max_rows=24):
    """Heads that do not touch one another: nothing orders them but tokens, which are not here."""
    draw = random.Random(seed)
    heads, base = [], draw.randrange(1000)
    for _ in range(count):
        f = head(draw.randint(1, 9), draw.randint(1, max_rows if draw.random() < 0.2 else 9),
                 draw.randint(1, 3), causal=draw.randint(0, 1), gap=draw.randint(0, 2), base=base,
                 multiplier=draw.randrange(1 << 16), shift=draw.randint(12, 22),
                 out_multiplier=draw.randrange(1 << 16), out_shift=draw.randint(12, 18))
        heads.append(f)
        base = f["destination"] + f["rows"] * f["destination_stride"]
    return heads


STALLS = [(0.0, 0.0, 0.0), (0.4, 0.4, 0.4)]


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize("shape", CONFIGS)
def test_heads_of_all_shapes(shape, stalls):
    size = config(*shape)
    run(size, random_heads(5, seed=sum(shape)), noise(size), stalls=stalls, seed=sum(shape))


@pytest.mark.parametrize("rows, keys, causal", [
    (1, 1, 0), (1, 1, 1), (1, 24, 1), (1, 7, 0), (7, 1, 0), (2, 2, 1), (8, 8, 1), (5, 9, 1),
    (9, 2, 0), (9, 4, 1), (24, 24, 1)])
def test_rows_and_keys(rows, keys, causal):
    size = config(3, 2, 2)
    run(size, [head(rows, keys, 2, causal=causal), head(3, 3, 1, base=2000)], noise(size, seed=1))


def test_row_without_keys_is_zero():
    size = config(2, 4, 2)
    memory = noise(size)
    f = head(6, 3, 2, causal=1, out_shift=1, out_multiplier=65535)
    run(size, [f], memory)
    assert not memory[f["destination"]:f["destination"] + 3 * f["destination_stride"]].any()
    assert memory[f["destination"] + 3 * f["destination_stride"]].any()


def test_nothing_to_do_is_done_in_order():
    size = config(2, 2, 1)
    heads = [head(*shape) for shape in [(0, 3, 1), (3, 3, 1), (2, 0, 1), (2, 3, 0), (3, 4, 2),
                                        (0, 0, 0)]]
    run(size, heads, noise(size))


@pytest.mark.parametrize("low, high", [(-128, -128), (127, 127), (-128, 127)])
def test_extreme_values(low, high):
    """All scores and sums at their limits, in heads of the greatest width and number of keys."""
    size = config(2, 5, 5, max_rows=8)
    blocks = np.random.default_rng(2).choice(np.array([low, high], np.int8), WORDS // HEAD_WORDS)
    memory = np.repeat(blocks, HEAD_WORDS)[:, None].repeat(size.depth, 1)
    run(size, [head(3, 8, HEAD_WORDS), head(2, 8, 2, multiplier=1, shift=17)], memory)


@pytest.mark.parametrize("multiplier, shift, out_multiplier, out_shift", [
    (0, 1, 0, 1), (65535, 1, 65535, 1), (1, 47, 1, 40), (65535, 47, 65535, 40),
    (65535, 20, 65535, 14), (1, 1, 65535, 15), (65535, 24, 1, 5)])
def test_scales(multiplier, shift, out_multiplier, out_shift):
    size = config(2, 4, 2)
    run(size, [head(5, 6, 2, multiplier=multiplier, shift=shift, out_multiplier=out_multiplier,
                    out_shift=out_shift)], noise(size))


def test_zero_queries_give_the_mean():
    size = config(3, 4, 2)
    memory = noise(size)
    f = head(2, 16, 2)
    memory[f["query"]:f["query"] + f["words"]] = 0
    value = np.stack([memory[f["value"] + j * f["stride"]:][:2].reshape(-1) for j in range(16)])
    run(size, [f], memory)
    mean = np.floor(value.mean(0) * (65535 / 65536) + 0.5)
    got = memory[f["destination"]:f["destination"] + 2].reshape(-1)
    assert np.abs(got - mean).max() <= 1 and (got == mean).mean() > 0.8


def test_nothing_of_one_head_shows_in_the_next():
    """High scores and large sums, then low ones, for one row each and for whole groups."""
    size = config(3, 2, 1)
    memory = np.full((WORDS, size.depth), 127, np.int8)
    memory[2000:3000] = -1
    memory[3000:] = np.random.default_rng(0).integers(-3, 4, (1096, size.depth))
    loud, low, quiet = {"base": 0}, {"base": 2000}, {"base": 3000}
    heads = [head(*shape, **where) for shape in [(1, 1, 1), (3, 5, 2), (4, 2, 1)]
             for where in (loud, low, quiet)]
    run(size, heads, memory)


@pytest.mark.parametrize("slow", range(3))
def test_one_slow_port(slow):
    size = config(2, 4, 2)
    heads = random_heads(3, seed=7) + [head(1, 5, 1), head(1, 2, 1, base=1000), head(2, 1, 1)]
    run(size, heads, noise(size), stalls=tuple(0.9 * (port == slow) for port in range(3)))


@pytest.mark.parametrize("shape, keys, words", [((2, 4, 2), 80, 2), ((3, 5, 1), 110, 1),
                                                ((2, 2, 2), 60, 3)])
def test_throughput(shape, keys, words):
    """Heads follow one another at the rate that `AttentionUnit` states."""
    size = config(*shape, max_rows=128)
    queries, groups = size.queries, 3
    finished, stalled = run(size, [head(groups * queries, keys, words)] * 4, noise(size))
    assert not stalled
    per_group = keys * words + max(queries * words + 1, 10)
    assert (np.diff(finished) <= groups * per_group + 6).all(), np.diff(finished)


def test_throughput_of_write_back():
    """With few keys, results leave at the rate that `AttentionUnit` states."""
    size, words, groups = config(3, 4, 1), 5, 2
    finished, _ = run(size, [head(groups * 3, 2, words)] * 4, noise(size))
    per_group = words * (3 * 4 + READ_LATENCY + 10) + ResultWriter(size).reciprocal_cycles
    assert (np.diff(finished) <= groups * per_group).all(), np.diff(finished)


def test_causal_skips_hidden_keys():
    size = config(2, 2, 2, max_rows=32)
    (whole,), _ = run(size, [head(32, 32, 4)], noise(size))
    (causal,), _ = run(size, [head(32, 32, 4, causal=1)], noise(size))
    assert causal < 0.9 * whole


def test_counts_refused_cycles_as_stalled():
    size = config(2, 2, 2)
    (done,), stalled = run(size, [head(4, 8, 2)], noise(size), stalls=(0.5, 0.0, 0.0))
    assert 0.1 * done < len(stalled) < 0.5 * done
