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

    def __init__(self, config, seed=0, entry=0x80):
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
            shape = words, word_bytes(self.config, memory)
            values = self.random.integers(0, 256, shape, np.uint8)
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


def run(config, programs, *, latency, stall, deadline=30_000):
    """Runs (entry, image) one after the other on one machine.

    Returns for each the final STATUS, the registers by number, and DRAM before and after."""
    dut = Accelerator(config)
    dram = Dram(config.bus_bytes, size=1 << 15, latency=latency, stall=stall, seed=1)
    last = counter(Engine.STORE, "stalled")
    results = []

    async def bench(ctx):
        for entry, image in programs:
            for address, data in image.items():
                dram.image[address:address + len(data)] = data
            before = bytes(dram.image)
            await write(ctx, dut.registers, Register.PROGRAM, entry)
            await write(ctx, dut.registers, Register.CONTROL, Control.START)
            while (status := await read(ctx, dut.registers, Register.STATUS)) & Status.BUSY:
                for _ in range(20):
                    await ctx.tick()
            registers = {index: await read(ctx, dut.registers, index)
                         for index in range(Register.CYCLES, last + 1)}
            results.append((status, registers, before, bytes(dram.image)))

    simulate_beside(dut, [bench], dram.serve(dut.memory), deadline)
    return results


def check(config, assembly, result):
    """The gateware leaves DRAM as the golden machine does, in as many instructions."""
    status, registers, before, after = result
    memory = np.frombuffer(before, np.uint8).copy()
    count = Machine(config, memory).run(assembly.entry)
    expected = memory.tobytes()
    assert status == DONE
    assert registers[Register.INSTRUCTIONS] == count
    assert after == expected, f"DRAM differs at {first_difference(after, expected):#x}"
    assert expected != before or count == 1


def first_difference(a, b):
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def round_trips(config, seed=0):
    """Words go in by LOAD and out by STORE; their places are used again, in order by tokens."""
    assembly = Assembly(config, seed)
    for memory, local, words in ((Memory.ACTIVATION, 0, 9), (Memory.RESIDUAL, 3, 11),
                                 (Memory.ACTIVATION, 5, 1), (Memory.RESIDUAL, 0, 0),
                                 (Memory.ACTIVATION, 17, 26)):
        assembly.load(memory, local, words=words, signal=bit(Engine.STORE))
        assembly.store(memory, local, words, wait=bit(Engine.LOAD), signal=bit(Engine.LOAD))
        assembly.load(memory, local, words=words, wait=bit(Engine.STORE), signal=bit(Engine.STORE))
        assembly.store(memory, local, words, wait=bit(Engine.LOAD))
    return assembly


def linear(config):
    """A product to activations by a table, and one that is added to the residual stream."""
    assembly = Assembly(config, seed=2)
    rows, words, channels = 5, 2, 7
    assembly.load(Memory.ACTIVATION, 0, words=rows * words)
    assembly.load(Memory.WEIGHT, 1, words=4)
    assembly.load(Memory.PARAM, 2, assembly.params(channels))
    assembly.load(Memory.TABLE, 0, words=256)
    assembly.load(Memory.ACTIVATION, 20, words=rows * 2)
    assembly.load(Memory.RESIDUAL, 4, words=rows * 4, signal=bit(Engine.LINEAR))
    common = {"rows": rows, "source": 0, "source_stride": words, "source_words": words, "weight": 1,
              "param": 2, "channels": channels}
    assembly.add(Opcode.LINEAR, **common, target=Target.ACTIVATION, tabled=1, destination=20,
                 destination_stride=2, wait=bit(Engine.LOAD), signal=bit(Engine.STORE))
    assembly.add(Opcode.LINEAR, **common, target=Target.RESIDUAL, accumulate=1, destination=4,
                 destination_stride=4, signal=bit(Engine.STORE))
    assembly.store(Memory.ACTIVATION, 20, rows * 2, wait=bit(Engine.LINEAR))
    assembly.store(Memory.RESIDUAL, 4, rows * 4, wait=bit(Engine.LINEAR))
    return assembly


def norm(config):
    assembly = Assembly(config, seed=3)
    rows, channels = 4, 6
    assembly.load(Memory.PARAM, 0, assembly.params(channels))
    assembly.load(Memory.RESIDUAL, 1, words=3 * rows, signal=bit(Engine.NORM))
    for number, mode in enumerate(NormMode):
        assembly.add(Opcode.NORM, rows=rows, mode=mode, channels=channels, source=1,
                     source_stride=3, destination=10 * number, destination_stride=2, param=0,
                     epsilon=1000, wait=bit(Engine.LOAD) * (number == 0),
                     signal=bit(Engine.STORE))
        assembly.store(Memory.ACTIVATION, 10 * number, 2 * rows, wait=bit(Engine.NORM))
    return assembly


def attention(config, seed=4):
    assembly = Assembly(config, seed)
    assembly.load(Memory.ACTIVATION, 0, words=15, signal=bit(Engine.ATTENTION))
    assembly.add(Opcode.ATTENTION, rows=5, keys=5, causal=1, words=1, query=0, key=1, value=2,
                 destination=30, stride=3, destination_stride=1, multiplier=50_000, shift=20,
                 out_multiplier=60_000, out_shift=16, wait=bit(Engine.LOAD),
                 signal=bit(Engine.STORE))
    assembly.store(Memory.ACTIVATION, 30, 5, wait=bit(Engine.ATTENTION))
    return assembly


def experts(config, seed=5, **form):
    """Routing, then for each expert a LOAD of weights and a marker, and its products; the last
    expert is never chosen, so its marker must not be loaded, unless another `form` of router chooses
    by more than logits."""
    assembly = Assembly(config, seed)
    rows, count = 6, config.max_experts
    params = assembly.params(count + 4)
    bias = params.view(np.int32).reshape(-1, 2)[:, 0]
    bias[count - 1] = -10_000_000
    assembly.load(Memory.PARAM, 0, params)
    assembly.load(Memory.ACTIVATION, 0, words=rows + 4 + count)
    assembly.load(Memory.RESIDUAL, 0, words=2 * rows)
    assembly.load(Memory.WEIGHT, 0, words=1, signal=bit(Engine.LINEAR))
    common = {"source": 0, "source_stride": 1, "source_words": 1, "channels": 4}
    assembly.add(Opcode.LINEAR, **common, rows=rows, target=Target.ROUTER, weight=0, param=0,
                 **{"chosen": 2, "over_chosen": 1, "multiplier": 40_000, "shift": 20} | form,
                 wait=bit(Engine.LOAD), signal=bit(Engine.LOAD))
    for expert in range(count):
        chosen = {"conditional": 1, "expert": expert}
        assembly.load(Memory.WEIGHT, 1 + expert, words=1, **chosen,
                      wait=bit(Engine.LINEAR) * (expert == 0))
        assembly.load(Memory.ACTIVATION, rows + expert, words=1, **chosen,
                      signal=bit(Engine.LINEAR, Engine.STORE))
        assembly.add(Opcode.LINEAR, **common, **chosen, rows=0, queued=1, gather=1, scatter=1,
                     gated=1, accumulate=1, target=Target.RESIDUAL, weight=1 + expert,
                     param=count // config.lanes, destination=0, destination_stride=2,
                     wait=bit(Engine.LOAD), signal=bit(Engine.STORE))
        assembly.store(Memory.ACTIVATION, rows + expert, 1, wait=bit(Engine.LOAD, Engine.LINEAR))
    assembly.store(Memory.RESIDUAL, 0, 2 * rows)
    return assembly


def illegal(config, opcode):
    """A LOAD and a STORE, two instructions that can never start, and one behind the fault."""
    assembly = Assembly(config, seed=6)
    assembly.load(Memory.ACTIVATION, 0, words=8, signal=bit(Engine.STORE))
    assembly.store(Memory.ACTIVATION, 0, 8, wait=bit(Engine.LOAD))
    assembly.store(Memory.ACTIVATION, 1, 8, wait=bit(Engine.NORM))
    assembly.add(Opcode.LOAD, wait=bit(Engine.LINEAR, Engine.STORE))
    assembly.add(Opcode.END)
    assembly.store(Memory.ACTIVATION, 2, 8)
    image = assembly.image()
    text = bytearray(image[assembly.entry])
    text[4 * 32] = opcode
    return assembly, image | {assembly.entry: bytes(text)}


def endless(config, count):
    """STOREs that wait for tokens that nobody gives."""
    assembly = Assembly(config, seed=7)
    for _ in range(count):
        assembly.store(Memory.ACTIVATION, 0, 8, wait=bit(Engine.LOAD))
    return assembly


PROGRAMS = {
    "end": Assembly,
    "loads and stores": round_trips,
    "linear": linear,
    "norm": norm,
    "attention": attention,
    "experts": experts,
    "illegal opcode 5": lambda config: illegal(config, 5),
    "experts again": lambda config: experts(config, seed=9),
    "illegal opcode 6": lambda config: illegal(config, 6),
    "tokens never come": lambda config: endless(config, 1),
    "queue full": lambda config: endless(config, 9),
    "attention again": lambda config: attention(config, seed=10),
}


@pytest.fixture(scope="module")
def machine():
    """Every program of `PROGRAMS`, run back to back on one machine: name -> assembly, result."""
    assemblies = {name: program(config()) for name, program in PROGRAMS.items()}
    programs = [(assembly[0].entry, assembly[1]) if isinstance(assembly, tuple)
                else (assembly.entry, assembly.image()) for assembly in assemblies.values()]
    results = run(config(), programs, latency=10, stall=0.2)
    return {name: (assembly, result)
            for (name, assembly), result in zip(assemblies.items(), results, strict=True)}


@pytest.mark.parametrize("name", [
    "end", "loads and stores", "linear", "norm", "attention", "experts", "experts again",
    "attention again"])
def test_program_equals_golden(machine, name):
    check(config(), *machine[name])


def test_an_end_alone_moves_nothing(machine):
    _, (_, registers, _, _) = machine["end"]
    assert 0 < registers[Register.CYCLES] < 400
    assert registers[Register.WRITE_BEATS] == 0
    assert all(registers[counter(engine, "busy")] == 0 for engine in Engine)


def test_counters(machine):
    assembly, (_, registers, _, _) = machine["loads and stores"]
    moved = {opcode: sum(beats(config(), Memory(i.memory), i.words)
                         for i in assembly.instructions if i.opcode is opcode)
             for opcode in (Opcode.LOAD, Opcode.STORE)}
    assert registers[Register.WRITE_BEATS] == moved[Opcode.STORE]
    fetched = (registers[Register.READ_BEATS] - moved[Opcode.LOAD]) * config().bus_bytes / 32
    assert len(assembly.instructions) + 1 <= fetched <= len(assembly.instructions) + 17
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
def test_illegal_opcode(machine, opcode):
    """What can execute is executed, what waits is given up, what comes after is not seen."""
    (assembly, image), (status, registers, before, after) = machine[f"illegal opcode {opcode}"]
    assert status == FAILED
    assert registers[Register.INSTRUCTIONS] == 4
    loaded = image[assembly.instructions[0].address]
    stored = assembly.instructions[1].address
    expected = before[:stored] + loaded + before[stored + len(loaded):]
    assert after == expected
    assert registers[Register.WRITE_BEATS] == len(loaded) // config().bus_bytes


@pytest.mark.parametrize("name", ["tokens never come", "queue full"])
def test_tokens_that_never_come(machine, name):
    """Also where the queue is full, so that END is never reached."""
    _, (status, registers, before, after) = machine[name]
    assert status == FAILED
    assert before == after
    assert registers[counter(Engine.STORE, "busy")] == 0


def narrow(config):
    """Products with weights of 4 and of 8 bits in turn, from and to places of their own."""
    assembly = Assembly(config, seed=11)
    nibbles = assembly.random.integers(-7, 8, (2, 24, config.outputs * config.depth))
    assembly.load(Memory.WEIGHT, 0, (nibbles[1] * 16 + (nibbles[0] & 15)).astype(np.uint8))
    assembly.load(Memory.PARAM, 0, assembly.params(16))
    assembly.load(Memory.TABLE, 0, words=256)
    assembly.load(Memory.ACTIVATION, 0, words=12)
    assembly.load(Memory.RESIDUAL, 0, words=40, signal=bit(Engine.LINEAR))
    for number in range(6):
        activation = number % 3 == 0
        channels = int(assembly.random.integers(1, 2 * config.outputs + 3))
        assembly.add(
            Opcode.LINEAR, rows=int(assembly.random.integers(1, 4)), narrow=(number + 1) % 2,
            source=number, source_words=1 + number % 2, source_stride=2, weight=number, param=0,
            channels=channels, tabled=number % 2, accumulate=number % 2,
            target=Target.ACTIVATION if activation else Target.RESIDUAL,
            destination=12 + 5 * number if activation else 12 * (number % 3),
            destination_stride=-(-channels // (config.depth if activation else config.lanes)),
            wait=bit(Engine.LOAD) if number == 0 else 0,
            signal=bit(Engine.STORE) if number == 5 else 0)
    assembly.store(Memory.ACTIVATION, 12, 48, wait=bit(Engine.LINEAR))
    assembly.store(Memory.RESIDUAL, 0, 40)
    return assembly


@pytest.mark.parametrize("shape", [{}, {"depth": 12, "outputs": 3, "lanes": 1, "tokens": 1}],
                         ids=["even", "deep"])
def test_narrow_weights(shape):
    subject = config(narrow=1, **shape)
    assembly = narrow(subject)
    result, = run(subject, [(assembly.entry, assembly.image())], latency=5, stall=0.1)
    check(subject, assembly, result)


FORMS = [
    {}, {"sigmoid": 1, "shift": 14}, {"sigmoid": 1, "by_score": 1, "over_chosen": 0, "shift": 14},
    {"group": 2, "chosen_groups": 1, "over_chosen": 0},
    {"sigmoid": 1, "by_score": 1, "group": 4, "chosen_groups": 1, "pair": 1, "shift": 14},
    {"sigmoid": 1, "by_score": 1, "group": 2, "chosen_groups": 1, "pair": 1, "shift": 14},
    {"sparse": 1, "threshold": 12_000, "over_chosen": 0},
]


@pytest.mark.parametrize("shape", [{}, {"lanes": 4, "tokens": 1}], ids=["two lanes", "four lanes"])
def test_router_forms(shape):
    """One after the other, each with corrections of its own."""
    subject = config(router_forms=1, max_experts=8, residual_words=80, **shape)
    assemblies = [experts(subject, seed=12 + number, **form) for number, form in enumerate(FORMS)]
    results = run(subject, [(assembly.entry, assembly.image()) for assembly in assemblies],
                  latency=5, stall=0.1, deadline=60_000)
    for assembly, result in zip(assemblies, results, strict=True):
        check(subject, assembly, result)


@pytest.mark.parametrize("shape", [
    {"bus_bytes": 2}, {"bus_bytes": 16, "depth": 6, "outputs": 6, "lanes": 3},
    {"bus_bytes": 64, "depth": 5, "outputs": 5, "lanes": 5, "activation_banks": 4}],
    ids=["narrow bus", "three lanes", "wide bus"])
def test_shapes(shape):
    subject = config(**shape)
    assembly = round_trips(subject)
    result, = run(subject, [(assembly.entry, assembly.image())], latency=5, stall=0)
    check(subject, assembly, result)
