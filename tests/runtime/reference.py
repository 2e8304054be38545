"""The quantised graph in plain numpy, frame by frame and row by row, on `hw.arch.numerics` alone;
and random graphs to compare devices on."""

import numpy as np

from moeware.compiler.precision import WEIGHT_BITS
from moeware.hw.arch import numerics, routing
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.program import DeviceStep, Port, Program, Region
from moeware.hw.arch.quantised import (
    AddLinear,
    Affine,
    Attention,
    Constant,
    Experts,
    Linear,
    Norm,
    Route,
)

CONFIG = Config(tokens=2, outputs=4, depth=4, queries=2, lanes=2, bus_bytes=8, activation_banks=4,
                activation_words=1024, residual_words=1024, weight_words=256, param_words=256,
                tables=4, row_words=1024, max_rows=512, max_experts=16, max_chosen=4, queue=4)


def evaluate(operations, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor, int64 [frames, rows, channels]; a route is [frames, rows, chosen, 2]."""
    frames = len(next(iter(inputs.values())))
    every = [_frame(operations, {name: np.asarray(value[frame], np.int64)
                                 for name, value in inputs.items()}) for frame in range(frames)]
    return {name: np.stack([values[name] for values in every]) for name in every[0]}


def _frame(operations, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for op in operations:
        values[op.output] = _OPERATIONS[type(op)](op, values)
    return values


def _requantise(value, affine, bits=8):
    bias, multiplier, shift = (array.astype(np.int64) for array in
                               (affine.bias, affine.multiplier, affine.shift))
    return numerics.requantise(value + bias, multiplier, shift, bits)


def _constant(op, values):
    return op.value.astype(np.int64)


def _linear(op, values):
    return _activation(values[op.source], op.weight, op.affine, op.table, op.gate, op.gate_affine)


def _activation(source, weight, affine, table, gate, gate_affine):
    def looked_up(weight, affine):
        result = _requantise(source @ weight.astype(np.int64).T, affine)
        return result if table is None else table[result & 255].astype(np.int64)

    if gate is None:
        return looked_up(weight, affine)
    return numerics.product(looked_up(gate, gate_affine),
                            _requantise(source @ weight.astype(np.int64).T, affine, 16))


def _add_linear(op, values):
    update = _requantise(values[op.source] @ op.weight.astype(np.int64).T, op.affine, 16)
    if op.residual is None:
        return update
    result = values[op.residual].copy()
    rows = slice(op.first_row, op.first_row + len(update))
    result[rows] = numerics.accumulate_residual(result[rows], update)
    return result


def _norm(op, values):
    rows = values[op.source][op.first_row:op.first_row + op.rows]
    if op.mode != NormMode.SCALE:
        groups = np.split(rows, op.groups, 1)
        rows = np.hstack([numerics.normalise(group, group.shape[1], op.epsilon,
                                             centred=op.mode == NormMode.LAYER) for group in groups])
    if op.rotation is None:
        return _requantise(rows, op.affine)
    heads = np.split(_requantise(rows, op.affine, 16), rows.shape[1] // op.rotation.shape[1], 1)
    return np.hstack([numerics.rotate(head, op.rotation) for head in heads])


def _attention(op, values):
    key, value = values[op.key], values[op.value]
    keys, values_of = (np.split(array, op.key_heads, 1) for array in (key, value))
    query = np.zeros((1, keys[0].shape[1] * op.heads), np.int64) if op.query is None else values[op.query]
    results = []
    for head, queries in enumerate(np.split(query, op.heads, 1)):
        key, value = (each[head * op.key_heads // op.heads] for each in (keys, values_of))
        rows = []
        for row, own in enumerate(queries):
            seen = row + len(key) - len(query) + 1 if op.causal else len(key)
            scores = key[:seen] @ own
            weights = numerics.probability(
                numerics.octaves(scores.max() - scores, op.multiplier, op.shift))
            scale = numerics.row_scale(weights.sum(), op.out_multiplier, op.out_shift)
            rows.append(numerics.requantise(weights @ value[:seen], *scale))
        results.append(np.stack(rows))
    return np.hstack(results)


def _route(op, values):
    logits = values[op.source] @ op.weight.astype(np.int64).T + op.bias.astype(np.int64)
    experts, weights = routing.route(logits, op.correction, **op.form)
    return np.stack([experts, weights * _kept(op, experts)], -1)


def _kept(op, experts):
    """Which choices find a place, one after another."""
    kept, taken = np.ones(experts.shape, bool), np.zeros(len(op.weight), int)
    order = sorted(np.ndindex(experts.shape), key=lambda place: place[::-1] if op.by_rank else place)
    for place in order if op.capacity else ():
        kept[place] = taken[experts[place]] < op.capacity
        taken[experts[place]] += 1
    return kept


def _experts(op, values):
    result = values[op.residual].copy()
    for expert in range(len(op.up)):
        up, down, gated = (affine and affine.part(expert)
                           for affine in (op.up_affine, op.down_affine, op.gate_affine))
        gate_weight = None if op.gate is None else op.gate[expert]
        for row, chosen in enumerate(values[op.route]):
            for gate in chosen[chosen[:, 0] == expert, 1]:
                hidden = _activation(values[op.source][row], op.up[expert], up, op.table,
                                     gate_weight, gated)
                update = _requantise(op.down[expert].astype(np.int64) @ hidden, down, 16)
                result[row] = numerics.accumulate_residual(result[row],
                                                           numerics.gated(update, gate))
    return result


_OPERATIONS = {Constant: _constant, Linear: _linear, AddLinear: _add_linear, Norm: _norm,
               Attention: _attention, Route: _route, Experts: _experts}


class Graph:
    """Builds a quantised graph with random constants; each method returns its output's name.

    gain : how far results exceed the range that they are scaled to: 1 uses it well, 4 saturates;
    bits : of the weights of products, 8, 4 or 2, those of gates left out.
    """

    def __init__(self, seed: int, *, gain: float = 1.0, bits: int = 8):
        self.random = np.random.default_rng(seed)
        self.gain, self.bits = gain, bits
        self.operations: list = []
        self.shapes: dict[str, tuple[int, int]] = {}
        self.sources: dict[str, Memory] = {}

    def input(self, rows: int, channels: int, memory: Memory = Memory.ACTIVATION) -> str:
        name = f"input{len(self.shapes)}"
        self.shapes[name], self.sources[name] = (rows, channels), memory
        return name

    def constant(self, rows: int, channels: int) -> str:
        value = self.random.integers(-20000, 20001, (rows, channels)).astype(np.int16)
        return self._add(Constant, (rows, channels), value=value)

    def linear(self, source: str, channels: int, *, table: bool = False, gated: bool = False) -> str:
        rows, depth = self.shapes[source]
        return self._add(Linear, (rows, channels), source=source,
                         **self.layers(("weight", "gate"), (channels,), depth, gated),
                         bits=self.bits, table=self.int8(256) if table else None)

    def add_linear(self, source: str, residual: str | None, channels: int,
                   first_row: int = 0) -> str:
        rows, depth = self.shapes[source]
        shape = (rows, channels) if residual is None else self.shapes[residual]
        return self._add(AddLinear, shape, source=source, residual=residual, first_row=first_row,
                         weight=self.weight(channels, depth), bits=self.bits,
                         affine=self.affine((channels,), depth, 20000, self.width))

    def norm(self, source: str, mode: NormMode = NormMode.LAYER, *, first_row: int = 0,
             rows: int | None = None, epsilon: int | None = None, groups: int = 1,
             rotation: np.ndarray | None = None) -> str:
        have, channels = self.shapes[source]
        rows = have if rows is None else rows
        reach = 20000 if mode == NormMode.SCALE else 3072
        into = 127 << (0 if rotation is None else numerics.PAIR_BITS)
        epsilon = int(self.random.integers(0, 1 << 20)) if epsilon is None else epsilon
        return self._add(Norm, (rows, channels), source=source, first_row=first_row, rows=rows,
                         mode=mode, epsilon=epsilon, groups=groups, rotation=rotation,
                         affine=self.affine((channels,), 1, into, reach))

    def rotation(self, rows: int, width: int) -> np.ndarray:
        """Factors of random angles, int16 [rows, width]."""
        angles = self.random.uniform(-np.pi, np.pi, (rows, width // 2))
        pairs = np.stack([np.cos(angles), np.sin(angles)], -1).reshape(rows, width)
        return np.rint(pairs * (1 << numerics.FACTOR_BITS)).astype(np.int16)

    def attention(self, query: str | None, key: str, value: str, heads: int, key_heads: int, *,
                  causal: bool = False, multiplier: int | None = None, shift: int = 20,
                  out_multiplier: int = 40000, out_shift: int = 15) -> str:
        width = self.shapes[value][1] // key_heads
        rows = 1 if query is None else self.shapes[query][0]
        if multiplier is None:
            multiplier = int(self.random.integers(1 << 15, 1 << 16))
        return self._add(Attention, (rows, heads * width), query=query, key=key, value=value,
                         heads=heads, key_heads=key_heads, causal=causal, multiplier=multiplier,
                         shift=shift, out_multiplier=out_multiplier, out_shift=out_shift)

    def route(self, source: str, experts: int, chosen: int, *, over_chosen: bool = False,
              weight: np.ndarray | None = None, bias: np.ndarray | None = None, **form) -> str:
        """form : `sigmoid` and all fields of Route behind it."""
        rows, depth = self.shapes[source]
        weight = self.int8(experts, depth) if weight is None else weight
        bias = (self.random.integers(-1 << 14, 1 << 14, experts).astype(np.int32) if bias is None
                else bias)
        return self._add(Route, (rows, chosen), source=source, weight=weight, bias=bias,
                         chosen=chosen, over_chosen=over_chosen,
                         multiplier=int(self.random.integers(1 << 15, 1 << 16)),
                         shift=15 if form.get("sigmoid") else 21, **form)

    def forms(self, experts: int, chosen: int):
        """Forms of a router whose experts divide into groups of two."""
        correction = self.random.integers(0, 1 << 16, experts).astype(np.uint32)
        grouped = {"group": 2, "chosen_groups": -(-chosen // 2)}
        yield from ({}, grouped, {"sigmoid": True}, {"sigmoid": True, **grouped},
                    {"sigmoid": True, "correction": correction},
                    {"sigmoid": True, "correction": correction, "pair": True, **grouped},
                    {"sparse": True, "threshold": 6000})

    def experts(self, source: str, residual: str, route: str, experts: int, hidden: int, *,
                table: bool = True, gated: bool = False) -> str:
        depth, channels = self.shapes[source][1], self.shapes[residual][1]
        return self._add(Experts, self.shapes[residual], source=source, residual=residual,
                         route=route, **self.layers(("up", "gate"), (experts, hidden), depth, gated),
                         table=self.int8(256) if table else None,
                         down=self.weight(experts, channels, hidden),
                         down_affine=self.affine((experts, channels), hidden, 20000, self.width),
                         bits=np.full(experts, self.bits, np.uint8))

    def layers(self, names: tuple[str, str], shape: tuple[int, ...], depth: int,
               gated: bool) -> dict[str, np.ndarray | Affine]:
        """The first of two products by the names of their fields, or both: then it makes the factor
        of 16 bits that the other one's values are multiplied by."""
        found = {}
        for name, reach in zip(names, (5000, 127) if gated else (127,)):
            affine = "affine" if name == "weight" else f"{name}_affine"
            found[name] = self.weight(*shape, depth)
            found[affine] = self.affine(shape, depth, reach, self.width)
        return found

    def int8(self, *shape: int) -> np.ndarray:
        return self.random.integers(-128, 128, shape).astype(np.int8)

    def weight(self, *shape: int) -> np.ndarray:
        most = WEIGHT_BITS[self.bits]
        return self.int8(*shape) if self.bits == 8 else (
            self.random.integers(-most, most + 1, shape).astype(np.int8))

    @property
    def width(self) -> int:
        """Spread of the products of a weight."""
        return 50 * WEIGHT_BITS[self.bits]

    def affine(self, shape: tuple[int, ...], depth: int, reach: int,
               width: int = 127 * 50) -> Affine:
        """Scales a sum of `depth` products of spread `width` to `reach`."""
        spread = width * np.sqrt(depth) * 2
        ratio = self.gain * reach / spread * self.random.uniform(0.5, 1, shape)
        exponent = np.frexp(ratio)[1]
        shift = np.clip(16 - exponent, 1, 47)
        multiplier = np.minimum(np.rint(ratio * 2.0 ** shift), 65535)
        bias = self.random.integers(-int(spread) // 4, int(spread) // 4 + 1, shape)
        return Affine(bias=bias.astype(np.int32), multiplier=multiplier.astype(np.uint16),
                      shift=shift.astype(np.uint8))

    def _add(self, kind, shape, **fields) -> str:
        name = f"{kind.__name__.lower()}{len(self.operations)}"
        self.operations.append(kind(name=f"/{name}", output=name, **fields))
        self.shapes[name] = shape
        return name

    def integers(self, frames: int) -> dict[str, np.ndarray]:
        """Random integers for the inputs."""
        reach = {Memory.ACTIVATION: 128, Memory.RESIDUAL: 1 << 15}
        return {name: self.random.integers(-reach[memory], reach[memory],
                                           (frames, *self.shapes[name]))
                for name, memory in self.sources.items()}

    def program(self, *outputs: str, scale: float = 1 / 64) -> Program:
        """A program of this graph for devices that execute its operations, not instructions."""
        address = 64

        def port(name: str, memory: Memory) -> Port:
            nonlocal address
            rows, channels = self.shapes[name]
            region = Region(memory=memory, rows=rows, channels=channels, address=address)
            address += -(-region.bytes(CONFIG) // 64) * 64
            return Port(name=name, tensor=name, shape=(rows, channels), scale=scale,
                        split=(rows, channels), order=(0, 1), region=region)

        wide = {op.output for op in self.operations
                if isinstance(op, (Constant, AddLinear, Experts))}
        step = DeviceStep(
            entry=0, inputs=[port(name, memory) for name, memory in self.sources.items()],
            outputs=[port(name, Memory.RESIDUAL if name in wide else Memory.ACTIVATION)
                     for name in outputs], operations=self.operations)
        tensors = {side: [(part.name, part.shape, "tensor(float)") for part in ports]
                   for side, ports in (("inputs", step.inputs), ("outputs", step.outputs))}
        return Program(config=CONFIG, image=bytes(range(64)), dram_bytes=address, steps=[step],
                       placement=f"{len(self.operations)}/{len(self.operations)} nodes on "
                       "fpga program", metadata={"model": "graph"}, **tensors)
