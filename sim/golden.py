"""The golden device: executes a program instruction by instruction in numpy.

It defines what the gateware must do: the memories have the configuration's sizes and word formats,
every instruction is decoded from DRAM, and dependency tokens are counted.
"""

import numpy as np

from moeware.hw.arch import isa, layout, numerics, routing
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Engine, Instruction, Memory, NormMode, Opcode, Target
from moeware.hw.arch.program import DeviceStep, Program
from moeware.runtime.device import runs

__all__ = ["GoldenDevice", "GoldenError", "Machine"]

# With Config.router_forms.
_ROUTER_FORM = ("sigmoid", "by_score", "group", "chosen_groups", "pair", "sparse", "threshold")
_PLACES = ("destination_stride", "same_frame", "choice")


class GoldenError(ValueError):
    """An instruction that no accelerator could execute; names its number and the rule it breaks."""


class Machine:
    """The state of one accelerator and its DRAM.

    dram : uint8 array, shared with the caller. Arithmetic is in int64, with the wrap of 32-bit
    accumulators applied where the gateware has it.
    """

    def __init__(self, config: Config, dram: np.ndarray):
        self.config, self.dram = config, dram
        c = config
        self.activation = np.zeros((c.activation_banks * c.activation_words, c.depth), np.int8)
        self.residual = np.zeros((c.residual_words, c.lanes), np.int16)
        self.weight = np.zeros((c.weight_words, c.outputs, c.depth), np.int8)
        self.param = np.zeros((c.param_words, c.lanes), layout.PARAM)
        self.table = np.zeros((256 * c.tables, 1), np.int8)
        self.queues: list[list[tuple[int, int]]] = [[] for _ in range(c.max_experts)]
        self.taken = np.zeros(c.max_experts, int)  # of a frame, by each queue
        self.tokens = np.zeros((len(Engine), len(Engine)), int)

    def run(self, entry: int) -> int:
        """Execute from byte address `entry` to END; returns the number of instructions.

        Raises
        ------
        GoldenError
        """
        self.reset()
        instructions = self.decode(entry)
        for number, instruction in enumerate(instructions):
            try:
                if not self.ready(instruction):
                    raise ValueError(f"{instruction.opcode.name} waits for a token that only a "
                                     "later instruction could give")
                self.execute(instruction)
            except (ValueError, IndexError) as error:
                raise GoldenError(f"instruction {number} at {entry + number * isa.BYTES:#x}: "
                                  f"{error}") from error
        return len(instructions) + 1

    def reset(self) -> None:
        """What START does: no tokens, empty queues. The memories keep their contents."""
        self.tokens[:] = 0
        self.queues = [[] for _ in range(self.config.max_experts)]

    def decode(self, entry: int) -> list[Instruction]:
        """The instructions from byte address `entry` up to END, without it."""
        instructions: list[Instruction] = []
        while True:
            address = entry + len(instructions) * isa.BYTES
            try:
                instruction = isa.decode(self.dram[address:address + isa.BYTES].tobytes())
            except ValueError as error:
                raise GoldenError(f"instruction {len(instructions)} at {address:#x}: "
                                  f"{error}") from error
            if instruction.opcode is Opcode.END:
                return instructions
            instructions.append(instruction)

    def ready(self, instruction: Instruction) -> bool:
        """Whether the tokens that an instruction waits for are there."""
        engine = Engine(instruction.opcode)
        return all(self.tokens[other, engine] for other in Engine if instruction.wait >> other & 1)

    def execute(self, instruction: Instruction) -> None:
        """Take an instruction's tokens, carry it out, give its tokens."""
        engine = Engine(instruction.opcode)
        for other in Engine:
            self.tokens[other, engine] -= instruction.wait >> other & 1
        if not (instruction.conditional and not self.queues[instruction.expert]):
            {Opcode.LOAD: self._load, Opcode.STORE: self._store, Opcode.LINEAR: self._linear,
             Opcode.ATTENTION: self._attention, Opcode.NORM: self._norm,
             }[instruction.opcode](instruction)
        for other in Engine:
            self.tokens[engine, other] += instruction.signal >> other & 1
            if self.tokens[engine, other] > isa.TOKEN_LIMIT:
                raise ValueError(f"at most {isa.TOKEN_LIMIT} tokens may wait from "
                                 f"{engine.name} to {other.name}")

    def _memory(self, memory: int) -> np.ndarray:
        """A memory as bytes [words, word_bytes], a view."""
        array = {Memory.ACTIVATION: self.activation, Memory.RESIDUAL: self.residual,
                 Memory.WEIGHT: self.weight, Memory.PARAM: self.param,
                 Memory.TABLE: self.table}[Memory(memory)]
        return array.reshape(len(array), -1).view(np.uint8)

    def _words(self, array: np.ndarray, start: int, count: int) -> slice:
        if start + count > len(array):
            raise ValueError(f"words {start} to {start + count - 1} must lie in a memory of "
                             f"{len(array)} words")
        return slice(start, start + count)

    def _load(self, i: Instruction) -> None:
        if not i.words:
            return
        memory = self._memory(i.memory)
        if i.packed > (2 if i.memory == Memory.WEIGHT else 0):
            raise ValueError("LOAD.packed must be 0, 1 or 2 for WEIGHT and 0 for other memories, not "
                             f"{i.packed} for {Memory(i.memory).name}")
        size = layout.transfer_beats(self.config, i.fields) * self.config.bus_bytes
        image = self.dram[i.address:i.address + size].tobytes()
        memory[self._words(memory, i.local, i.words)] = layout.unpack(
            self.config, Memory(i.memory), image, i.words, i.packed)

    def _store(self, i: Instruction) -> None:
        memory = self._memory(i.memory)
        image = layout.pack(self.config, Memory(i.memory), memory[self._words(memory, i.local, i.words)])
        self.dram[i.address:i.address + len(image)] = np.frombuffer(image, np.uint8)

    def _rows(self, first: int, rows: np.ndarray, stride: int, words: int) -> np.ndarray:
        """Activations int64 [rows, words * depth] of the given row numbers."""
        index = first + rows[:, None] * stride + np.arange(words)
        if index.size and index.max() >= len(self.activation):
            raise ValueError(f"activation word {index.max()} must be below {len(self.activation)}")
        return self.activation[index].reshape(len(rows), words * self.config.depth).astype(np.int64)

    def _params(self, first: int, channels: int) -> np.ndarray:
        words = -(-channels // self.config.lanes)
        return self.param[self._words(self.param, first, words)].reshape(-1)[:channels]

    def _write(self, array: np.ndarray, first: int, rows: np.ndarray, stride: int,
               values: np.ndarray) -> None:
        """Store values [rows, channels] in an array of words; other lanes keep their contents."""
        lanes = array.shape[1]
        channel = np.arange(values.shape[1])
        word = first + rows[:, None] * stride + channel // lanes
        if word.size and word.max() >= len(array):
            raise ValueError(f"word {word.max()} must be below {len(array)}")
        array[word, channel % lanes] = values

    def _linear(self, i: Instruction) -> None:
        c = self.config
        entries = np.array(self.queues[i.expert] if i.queued else [(r, 0) for r in range(i.rows)],
                           np.int64).reshape(-1, 2)
        if not (len(entries) and i.source_words and i.channels):
            return
        own = np.arange(len(entries))
        source = self._rows(i.source, entries[:, 0] if i.gather else own, i.source_stride,
                            i.source_words)
        if i.source_words > c.row_words:
            raise ValueError(f"LINEAR.source_words must be at most {c.row_words}, not {i.source_words}")
        for field, have in (("narrow", c.narrow), ("product", c.products)):
            if getattr(i, field) and not have:
                raise ValueError(f"LINEAR.{field} must be 0 on this configuration, which has no "
                                 "gateware for it, not 1")
        weight = self._weights(i)
        param = self._params(i.param, i.channels)
        value = (source @ weight.T + param["bias"]).astype(np.int32).astype(np.int64)
        if i.target == Target.ROUTER:
            self._route(i, value, param)
            return
        target = entries[:, 0] if i.scatter else own
        if i.target == Target.ACTIVATION:
            result = numerics.requantise(value, param["multiplier"], param["shift"])
            if i.tabled:
                result = self.table[256 * i.table + (result & 255), 0]
            if i.product:
                result = self._product(i, result, value, param)
            self._write(self.activation, i.destination, target, i.destination_stride, result)
            return
        update = numerics.requantise(value, param["multiplier"], param["shift"], bits=16)
        if i.gated and i.queued:
            update = numerics.gated(update, entries[:, 1:])
        if i.accumulate:
            channel = np.arange(i.channels)
            word = i.destination + target[:, None] * i.destination_stride + channel // c.lanes
            update = numerics.accumulate_residual(self.residual[word, channel % c.lanes], update)
        self._write(self.residual, i.destination, target, i.destination_stride, update)

    def _product(self, i: Instruction, result: np.ndarray, value: np.ndarray,
                 param: np.ndarray) -> np.ndarray:
        """Products [rows, products] of the channels' results in pairs of words."""
        lanes = self.config.lanes
        if -(-i.channels // lanes) % 2:
            raise ValueError("LINEAR.channels must fill an even number of words with product, not be "
                             f"{i.channels} with Config.lanes = {lanes}")
        second = np.flatnonzero(np.arange(i.channels) // lanes % 2)
        factor = numerics.requantise(value, param["multiplier"], param["shift"], bits=16)
        return numerics.product(result[:, second - lanes], factor[:, second])

    def _weights(self, i: Instruction) -> np.ndarray:
        """Weights int64 [channels, source_words * depth]."""
        c, wide = self.config, 1 + i.narrow
        groups = -(-i.channels // (wide * c.outputs))
        words = self.weight[self._words(self.weight, i.weight, groups * i.source_words)]
        words = words.reshape(groups, i.source_words, 1, c.outputs, c.depth)
        if i.narrow:  # shifts of int8 keep the sign
            words = np.concatenate([words << 4 >> 4, words >> 4], 2)
            if (words == -8).any():
                raise ValueError("Weights of LINEAR.narrow must be between -7 and 7, not -8")
        weight = words.transpose(0, 2, 3, 1, 4).reshape(groups * wide * c.outputs, -1)
        return weight[:i.channels].astype(np.int64)

    def _route(self, i: Instruction, logits: np.ndarray, param: np.ndarray) -> None:
        if not i.append:
            self.queues = [[] for _ in range(self.config.max_experts)]
        self._check_form(i)
        form = {name: getattr(i, name) for name in ("chosen", "over_chosen", "multiplier", "shift",
                                                    *_ROUTER_FORM)}
        chosen, weights = routing.route(logits, layout.corrections(param), **form)
        if not i.same_frame:
            self.taken[:] = 0
        capacity = i.destination_stride
        own = slice(i.choice - 1, i.choice) if i.choice else slice(None)
        for token, (experts, gates) in enumerate(zip(chosen[:, own].tolist(), weights[:, own].tolist()),
                                                 i.destination):
            for expert, gate in zip(experts, gates):
                if not capacity or self.taken[expert] < capacity:
                    self.queues[expert].append((token, gate))
                    self.taken[expert] += capacity > 0

    def _check_form(self, i: Instruction) -> None:
        """Refuse what the router has no gateware for."""
        used = {name: getattr(i, name) for name in _ROUTER_FORM + _PLACES if getattr(i, name)}
        if used and not self.config.router_forms:
            raise ValueError(f"LINEAR's {', '.join(used)} must be 0 where Config.router_forms is 0, "
                             f"not {', '.join(map(str, used.values()))}")
        if i.by_score and not i.sigmoid or i.pair and not i.by_score:
            raise ValueError("LINEAR.by_score must come with sigmoid, and pair with by_score")
        if i.choice > i.chosen:
            raise ValueError(f"LINEAR.choice must be at most its {i.chosen} chosen experts, not {i.choice}")
        if i.destination_stride > self.config.max_rows:
            raise ValueError(f"LINEAR.destination_stride, a queue's capacity, must be at most "
                             f"Config.max_rows = {self.config.max_rows}, not {i.destination_stride}")
        if i.sparse and (i.over_chosen or i.sigmoid or i.group):
            raise ValueError("LINEAR.sparse must come without over_chosen, sigmoid and group")
        if i.group and (i.channels % i.group or not 1 <= i.chosen_groups <= self.config.max_chosen
                        or i.chosen > i.chosen_groups * i.group
                        or i.chosen_groups * i.group > i.channels):
            raise ValueError(
                f"LINEAR.group must divide its {i.channels} channels, and its {i.chosen_groups} chosen "
                f"groups must be 1 to {self.config.max_chosen}, hold the {i.chosen} chosen experts "
                f"and exist, not be groups of {i.group}")

    def _attention(self, i: Instruction) -> None:
        rows, keys = np.arange(i.rows), np.arange(i.keys)
        if not i.rows:
            return
        if i.keys > self.config.max_rows:
            raise ValueError(f"ATTENTION.keys must be at most {self.config.max_rows}, not {i.keys}")
        query = self._rows(i.query, rows, i.stride, i.words)
        key = self._rows(i.key, keys, i.stride, i.words)
        value = self._rows(i.value, keys, i.stride, i.words)
        score = query @ key.T
        seen = keys <= rows[:, None] + i.keys - i.rows if i.causal else np.ones(score.shape, bool)
        maximum = np.where(seen, score, np.iinfo(np.int64).min).max(-1, keepdims=True)
        steps = numerics.octaves(np.where(seen, maximum - score, 0), i.multiplier, i.shift)
        probability = np.where(seen, numerics.probability(steps), 0)
        multiplier, shift = numerics.row_scale(probability.sum(-1, keepdims=True),
                                               i.out_multiplier, i.out_shift)
        result = numerics.requantise(probability @ value, multiplier, shift)
        self._write(self.activation, i.destination, rows, i.destination_stride, result)

    def _norm(self, i: Instruction) -> None:
        c, rows = self.config, np.arange(i.rows)
        words = -(-i.channels // c.lanes)
        index = i.source + rows[:, None] * i.source_stride + np.arange(words)
        if index.size and index.max() >= len(self.residual):
            raise ValueError(f"residual word {index.max()} must be below {len(self.residual)}")
        value = self.residual[index].reshape(len(rows), words * c.lanes)[:, :i.channels]
        value = value.astype(np.int64)
        if i.mode != NormMode.SCALE and i.channels > c.row_words * c.depth:
            raise ValueError("NORM.channels must be at most Config.row_words * Config.depth = "
                             f"{c.row_words * c.depth}, not {i.channels}")
        if (i.counted or i.factor_words) and not c.rotary:
            raise ValueError("NORM.counted and NORM.factor_words must be 0 where Config.rotary is 0, "
                             f"not {i.counted} and {i.factor_words}")
        if i.factor_words and i.channels % 2:
            raise ValueError(f"NORM.channels must be even where pairs are turned, not {i.channels}")
        if i.mode != NormMode.SCALE:
            value = numerics.normalise(value, i.counted or i.channels, i.epsilon,
                                       centred=i.mode == NormMode.LAYER)
        param = self._params(i.param, i.channels)
        value = (value + param["bias"]).astype(np.int32)
        bits = 16 if i.factor_words else 8
        result = numerics.requantise(value, param["multiplier"], param["shift"], bits)
        if i.factor_words:
            index = i.factors + rows[:, None] * i.factor_stride + np.arange(words) % i.factor_words
            if index.size and index.max() >= len(self.residual):
                raise ValueError(f"residual word {index.max()} must be below {len(self.residual)}")
            factors = self.residual[index].reshape(len(rows), words * c.lanes)
            result = numerics.rotate(result, factors[:, :i.channels])
        padded = np.zeros((len(rows), -(-i.channels // c.depth) * c.depth), np.int64)
        padded[:, :i.channels] = result  # later products read whole words
        self._write(self.activation, i.destination, rows, i.destination_stride, padded)


class GoldenDevice:
    """A device (see `moeware.runtime.device`) that runs `Machine`.

    Frames run back to back on one machine, so that what a frame leaves behind is seen by the next.
    """

    name = "golden"
    config = None

    def __init__(self):
        self.counters: list[dict[str, int]] = []
        self._program: Program | None = None

    def run(self, program: Program, step: DeviceStep, inputs: dict[str, np.ndarray], *,
            probes: bool = False, progress=None) -> dict[str, np.ndarray]:
        if program is not self._program:
            dram = np.zeros(program.dram_bytes, np.uint8)
            dram[:len(program.image)] = np.frombuffer(program.image, np.uint8)
            self._machine, self._program = Machine(program.config, dram), program
        machine, config = self._machine, program.config
        frames = len(next(iter(inputs.values())))
        places = {place.tensor: place.region
                  for place in [*step.outputs, *(step.probes if probes else ())]}
        results: dict[str, list[np.ndarray]] = {tensor: [] for tensor in places}
        self.counters = []
        for batch in runs(frames, step.frames):
            for port in step.inputs:
                for place, frame in enumerate(batch):
                    region = port.region.of_frame(config, place)
                    raw = region.pack(config, inputs[port.tensor][frame])
                    machine.dram[region.address:][:len(raw)] = np.frombuffer(raw, np.uint8)
            self.counters.append({"instructions": machine.run(step.entry)})
            for tensor, first in places.items():
                for place in range(step.frames):
                    region = first.of_frame(config, place)
                    raw = machine.dram[region.address:][:region.bytes(config)].tobytes()
                    results[tensor].append(region.unpack(config, raw))
            if progress:
                progress(batch[-1] + 1, frames)
        return {tensor: np.stack(values[:frames]) for tensor, values in results.items()}
