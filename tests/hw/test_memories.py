import random

import pytest
from amaranth import Module, Signal
from amaranth.lib import data
from amaranth.sim import Simulator

from moeware.hw.interfaces import READ_LATENCY, BankedAddress
from moeware.hw.memories import BankedMemory, FairArbiter

from .simulate import simulate


def number_of(address):
    return address if isinstance(address, int) else address.word


def traffic(memory, *, cycles, seed, readers, writers, spread):
    """Random clients; a model of the memory is written and read in the order of acceptance."""
    draw = random.Random(seed)
    def at(word):
        return {"word": word, "bank": 1 << word // memory.words} if memory.banks > 1 else word

    size, cells, bits = memory.banks * memory.words, memory.cells, memory.cell_bits
    contents = [[0] * cells for _ in range(size)]
    served = {"read": [0] * readers, "write": [0] * writers}

    async def bench(ctx):
        due = [[None] * (READ_LATENCY + 1) for _ in range(readers)]
        for _ in range(cycles):
            for port in memory.readers:
                if not ctx.get(port.address.valid) or ctx.get(port.address.ready):
                    ctx.set(port.address.valid, draw.random() < spread)
                    ctx.set(port.address.payload, at(draw.randrange(size)))
            for port in memory.writers:
                ctx.set(port.write.valid, draw.random() < spread)
                ctx.set(port.write.payload, {"address": at(draw.randrange(size)),
                                             "data": draw.getrandbits(bits * cells),
                                             "mask": draw.getrandbits(cells)})
            reads, writes = [], []
            for number, port in enumerate(memory.readers):
                accepted = ctx.get(port.address.valid & port.address.ready)
                address = number_of(ctx.get(port.address.payload))
                due[number] = [contents[address].copy() if accepted else None, *due[number][:-1]]
                reads += [address // memory.words] * accepted
                served["read"][number] += accepted
                expected = due[number][READ_LATENCY]
                assert ctx.get(port.data.valid) == (expected is not None)
                if expected is not None:
                    word = sum(cell << bits * i for i, cell in enumerate(expected))
                    assert ctx.get(port.data.payload) == word
            for number, port in enumerate(memory.writers):
                if ctx.get(port.write.valid & port.write.ready):
                    write = ctx.get(port.write.payload)
                    written = number_of(write.address)
                    writes.append(written // memory.words)
                    served["write"][number] += 1
                    for cell in range(cells):
                        if write.mask >> cell & 1:
                            contents[written][cell] = \
                                write.data >> bits * cell & (1 << bits) - 1
            assert len(reads) == len(set(reads)) and len(writes) == len(set(writes))
            await ctx.tick()

    simulate(memory, bench)
    return served


@pytest.mark.parametrize("banks, words, cells, readers, writers", [
    (4, 8, 3, 4, 4), (3, 7, 1, 3, 2), (1, 10, 4, 4, 2), (2, 16, 2, 1, 1), (1, 5, 1, 1, 1),
    (5, 4, 2, 2, 3), (8, 5, 2, 4, 4),
])
def test_reads_see_earlier_writes(banks, words, cells, readers, writers):
    memory = BankedMemory(cell_bits=8, cells=cells, words=words, banks=banks,
                          readers=readers, writers=writers)
    served = traffic(memory, cycles=400, seed=banks, readers=readers, writers=writers, spread=0.7)
    assert min(served["read"]) > 400 * 0.7 / max(readers, writers) / 2
    assert min(served["write"]) > 400 * 0.7 / max(readers, writers) / 2


@pytest.mark.parametrize("banks, words", [(4, 8), (3, 7), (2, 16), (5, 4), (8, 5), (4, 22), (1, 9),
                                          (4, 5632), (3, 129)])
def test_an_address_names_its_bank(banks, words):
    layout = BankedAddress(banks, words)
    m = Module()
    word, address = Signal(20), Signal(layout)
    inside = [Signal(range(words), name=f"inside_{bank}") for bank in range(banks)]
    m.d.comb += [address.eq(layout.of(word)),
                 *(signal.eq(layout.within(word, bank)) for bank, signal in enumerate(inside))]

    async def bench(ctx):
        edges = {edge + by for edge in range(0, banks * words + 1, words) for by in (-2, -1, 0, 1)}
        tried = sorted(edges & set(range(banks * words))) + random.Random(1).choices(
            range(banks * words), k=50)
        for at in tried:
            ctx.set(word, at)
            bank = at // words
            assert ctx.get(address) == layout.const({"word": at, "bank": 1 << bank})
            assert ctx.get(inside[bank]) == at % words

    sim = Simulator(m)
    sim.add_testbench(bench)
    sim.run()


def test_different_banks_serve_different_readers_in_the_same_cycle():
    memory = BankedMemory(cell_bits=8, cells=2, words=4, banks=3, readers=3, writers=3)

    async def bench(ctx):
        for bank, (reader, writer) in enumerate(zip(memory.readers, memory.writers)):
            ctx.set(reader.address.valid, 1)
            address = {"word": 4 * bank + 1, "bank": 1 << bank}
            ctx.set(reader.address.payload, address)
            ctx.set(writer.write.valid, 1)
            ctx.set(writer.write.p.address, address)
        for _ in range(10):
            for reader, writer in zip(memory.readers, memory.writers):
                assert ctx.get(reader.address.ready) and ctx.get(writer.write.ready)
            await ctx.tick()

    simulate(memory, bench)


def test_readers_of_one_bank_take_turns():
    memory = BankedMemory(cell_bits=8, cells=1, words=4, readers=3)
    turns = []

    async def bench(ctx):
        for reader in memory.readers:
            ctx.set(reader.address.valid, 1)
        for _ in range(9):
            turns.append([ctx.get(reader.address.ready) for reader in memory.readers].index(1))
            await ctx.tick()

    simulate(memory, bench)
    assert sorted(turns[:3]) == [0, 1, 2]
    assert turns == turns[:3] * 3


def test_the_client_served_longest_ago_goes_first():
    arbiter = FairArbiter(4)
    draw = random.Random(5)
    order = [0, 1, 2, 3]

    async def bench(ctx):
        for _ in range(200):
            request = draw.getrandbits(4)
            ctx.set(arbiter.request, request)
            expected = next((c for c in order if request >> c & 1), None)
            assert ctx.get(arbiter.grant) == (0 if expected is None else 1 << expected)
            if expected is not None:
                order.remove(expected)
                order.append(expected)
            await ctx.tick()

    simulate(arbiter, bench)


def test_structured_words():
    shape = data.ArrayLayout(data.StructLayout({"low": 8, "high": 4}), 2)
    memory = BankedMemory(cell_bits=24, cells=1, words=4, shape=shape)

    async def bench(ctx):
        ctx.set(memory.writers[0].write.payload, {"address": 3, "data": 0xABCDEF, "mask": 1})
        ctx.set(memory.writers[0].write.valid, 1)
        await ctx.tick()
        ctx.set(memory.writers[0].write.valid, 0)
        ctx.set(memory.readers[0].address.payload, 3)
        ctx.set(memory.readers[0].address.valid, 1)
        word, = await ctx.tick().sample(memory.readers[0].data.payload).until(
            memory.readers[0].data.valid)
        assert (word[0].low, word[0].high, word[1].low, word[1].high) == (0xEF, 0xD, 0xBC, 0xA)

    simulate(memory, bench)
