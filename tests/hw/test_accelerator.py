import random

import numpy as np
import pytest

from moeware.hw.accelerator import Accelerator
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Instruction, Memory, NormMode, Opcode, Target, encode
from moeware.hw.arch.layout import ALIGNMENT, beats, pack, pack_params, word_bytes
from moeware.hw.arch.registers import Control, Register, Status, counter
from moeware.sim.golden import Machine

from .background import simulate_beside
from .dram import Dram
from .host import read, write

DONE, FAILED = Status.DONE, Status.DONE | Status.ERROR


def config(**changes):
    fields = {"tokens": 2, "outputs": 4, "depth": 4, "queries": 2, "lanes": 2, "bus_bytes": 4,
              "activation_banks": 3, "activation_words": 20, "residual_words": 40,
              "weight_words": 32, "param_words": 16, "tables": 1, "row_words": 4, "max_rows": 8,
              "max_experts": 4, "max_chosen": 2, "queue": 3}
    return Config(**fields | changes)


class Assembly:
    """A program and its data in DRAM. Regions are handed out from the front."""

    def __init__(self, config, seed=0, entry=0x40):
        self.config, self.entry = config, entry
        self.random = np.random.default_rng(seed)
        self.instructions, self.data = [], {}
        self.free = 0x1000 + ALIGNMENT * seed

    def region(self, memory, words):
        address = self.free
        size = beats(self.config, memory, words) * self.config.bus_bytes
        self.free += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return address

    def add(self, opcode, **fields):
        self.instructions.append(Instruction(opcode, fields))

    def load(self, memory, local, values=None, *, words=None, **fields):
        """LOAD of an array uint8 [words, bytes], or of random words."""
        if values is None:
            values = self.random.integers(0, 256, (words, word_bytes(self.config, memory)), np.uint8)
        address = self.region(memory, len(values))
        self.data[address] = pack(self.config, memory, values)
        self.add(Opcode.LOAD, memory=memory, local=local, words=len(values), address=address,
                 **fields)

    def store(self, memory, local, words, **fields):
        self.add(Opcode.STORE, memory=memory, local=local, words=words,
                 address=self.region(memory, words), **fields)

    def params(self, channels):
        """Words of parameters that keep most results of small products unsaturated."""
        return pack_params(self.config, self.random.integers(-300, 300, channels),
                           self.random.integers(1 << 14, 1 << 16, channels),
                           self.random.integers(19, 22, channels))

    def image(self):
        """(address, bytes) of the program and its data."""
        text = b"".join(encode(i) for i in [*self.instructions, Instruction(Opcode.END, {})])
        return {self.entry: text} | self.data


def bit(*engines):
    return sum(1 << engine for engine in engines)


def run(config, programs, *, latency=3, stall=0.1, seed=0, deadline=20_000):
    """Runs (entry, image) one after the other on one machine.

    Returns for each the final STATUS, the registers by number, and DRAM at its end."""
    dut = Accelerator(config)
    dram = Dram(config.bus_bytes, size=1 << 14, latency=latency, stall=stall, seed=seed)
    results = []

    async def bench(ctx):
        for entry, image in programs:
            for address, data in image.items():
                dram.image[address:address + len(data)] = data
            await write(ctx, dut.registers, Register.PROGRAM, entry)
            await write(ctx, dut.registers, Register.CONTROL, Control.START)
            while (status := await read(ctx, dut.registers, Register.STATUS)) & Status.BUSY:
                pass
            last = counter(Engine.STORE, "stalled")
            registers = [await read(ctx, dut.registers, index) for index in range(last + 1)]
            results.append((status, registers, bytes(dram.image)))

    simulate_beside(dut, [bench], dram.serve(dut.memory), deadline)
    return results


def expect(config, programs, statuses=None):
    """DRAM after each program, from the golden machine, and the number of its instructions."""
    memory = np.zeros(1 << 14, np.uint8)
    machine = Machine(config, memory)
    for entry, image in programs:
        for address, data in image.items():
            memory[address:address + len(data)] = np.frombuffer(data, np.uint8)
        count = machine.run(entry)
        yield count, memory.tobytes()


def check(config, assemblies, **keywords):
    """The gateware leaves DRAM as the golden machine does; returns the registers of each run."""
    programs = [(assembly.entry, assembly.image()) for assembly in assemblies]
    results = run(config, programs, **keywords)
    for (status, registers, image), (count, expected) in zip(results, expect(config, programs),
                                                             strict=True):
        assert status == DONE
        assert image == expected, f"DRAM differs at {first_difference(image, expected):#x}"
        assert registers[Register.INSTRUCTIONS] == count
    return [registers for _, registers, _ in results]


def first_difference(a, b):
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def round_trips(config, seed=0):
    """Words go in, move by LOAD and STORE, and come out; slots are used again, by tokens."""
    assembly = Assembly(config, seed)
    for memory, local, words in ((Memory.ACTIVATION, 0, 9), (Memory.RESIDUAL, 3, 11),
                                 (Memory.ACTIVATION, 5, 1), (Memory.RESIDUAL, 0, 0),
                                 (Memory.ACTIVATION, 17, 26)):
        assembly.load(memory, local, words=words, signal=bit(Engine.STORE))
        assembly.store(memory, local, words, wait=bit(Engine.LOAD), signal=bit(Engine.LOAD))
        assembly.load(memory, local, words=words, wait=bit(Engine.STORE), signal=bit(Engine.STORE))
        assembly.store(memory, local, words, wait=bit(Engine.LOAD))
    return assembly


@pytest.mark.parametrize("shape", [
    {}, {"bus_bytes": 2}, {"bus_bytes": 16, "depth": 6, "outputs": 6, "lanes": 3},
    {"bus_bytes": 8, "depth": 12, "outputs": 4, "lanes": 4}, {"bus_bytes": 32, "depth": 4},
    {"bus_bytes": 64, "depth": 5, "outputs": 5, "lanes": 5, "activation_banks": 4}],
    ids=lambda shape: "-".join(f"{name}{value}" for name, value in shape.items()) or "base")
def test_load_and_store(shape):
    subject = config(**shape)
    check(subject, [round_trips(subject, seed) for seed in range(2)], latency=7, stall=0.2)


def test_end_only():
    empty = Assembly(config())
    registers, again = check(config(), [empty, empty], stall=0)
    assert registers == again
    assert 0 < registers[Register.CYCLES] < 150
    assert registers[Register.INSTRUCTIONS] == 1 and registers[Register.WRITE_BEATS] == 0


def test_counters():
    subject = config()
    assembly = round_trips(subject)
    registers, = check(subject, [assembly], latency=20, stall=0)
    moved = {opcode: sum(beats(subject, Memory(i.memory), i.words)
                         for i in assembly.instructions if i.opcode is opcode)
             for opcode in (Opcode.LOAD, Opcode.STORE)}
    assert registers[Register.WRITE_BEATS] == moved[Opcode.STORE]
    program = registers[Register.READ_BEATS] - moved[Opcode.LOAD]
    assert len(assembly.instructions) + 1 <= program * 4 / 32 <= len(assembly.instructions) + 17
    for engine in Engine:
        busy, waiting, stalled = (registers[counter(engine, name)]
                                  for name in ("busy", "waiting", "stalled"))
        assert stalled <= busy <= busy + waiting <= registers[Register.CYCLES]
        assert (busy > 0) == (engine in (Engine.LOAD, Engine.STORE))
    assert registers[counter(Engine.LOAD, "busy")] >= moved[Opcode.LOAD]
    assert registers[counter(Engine.STORE, "busy")] >= moved[Opcode.STORE]
    assert registers[counter(Engine.STORE, "waiting")] > 0
    assert registers[counter(Engine.LOAD, "stalled")] > 0


@pytest.mark.parametrize("opcode", [5, 6])
def test_illegal_opcode(opcode):
    """What came before is finished, what cannot start is given up, and the next run is sound."""
    subject = config()
    assembly = Assembly(subject)
    assembly.load(Memory.ACTIVATION, 0, words=8, signal=bit(Engine.STORE))
    assembly.store(Memory.ACTIVATION, 0, 8, wait=bit(Engine.LOAD))
    assembly.store(Memory.ACTIVATION, 0, 8, wait=bit(Engine.NORM))
    assembly.add(Opcode.LOAD, wait=bit(Engine.LINEAR, Engine.STORE))
    executed = 2
    image = assembly.image()
    after = Assembly(subject, seed=3)
    after.store(Memory.RESIDUAL, 0, 8)
    text = b"".join(encode(i) for i in assembly.instructions)
    text += bytes([opcode]) + bytes(31) + encode(after.instructions[0])
    faulty = image | after.image() | {assembly.entry: text}
    sound = round_trips(subject, seed=1)

    results = run(subject, [(assembly.entry, faulty), (sound.entry, sound.image())])
    status, registers, memory = results[0]
    assert status == FAILED
    assert registers[Register.INSTRUCTIONS] == 4
    store = assembly.instructions[1]
    loaded = image[assembly.instructions[0].address]
    assert memory[store.address:store.address + len(loaded)] == loaded
    assert registers[Register.WRITE_BEATS] == len(loaded) // subject.bus_bytes
    assert results[1][0] == DONE
    assert registers[Register.WRITE_BEATS] and executed == 2


@pytest.mark.parametrize("count", [1, 9])
def test_tokens_that_never_come(count):
    """Also where the queue is full, so that END is never reached."""
    subject = config()
    assembly = Assembly(subject)
    for _ in range(count):
        assembly.store(Memory.ACTIVATION, 0, 8, wait=bit(Engine.LOAD))
    sound = round_trips(subject, seed=1)
    programs = [(assembly.entry, assembly.image()), (sound.entry, sound.image())]
    (status, registers, _), (then, _, image) = run(subject, programs)
    assert status == FAILED and registers[Register.WRITE_BEATS] == 0
    assert then == DONE
    (_, expected), = expect(subject, programs[1:])
    address = sound.instructions[-1].address
    assert image[address:] == expected[address:]
