"""Random transformers as quantised graphs, lowered to programs for any configuration."""

from itertools import islice

import numpy as np

from moeware.compiler.allocate import allocate
from moeware.compiler.emit import emit
from moeware.compiler.errors import CompileError
from moeware.compiler.quantise import QuantisedStep
from moeware.compiler.schedule import schedule
from moeware.compiler.tile import PLANS, tile
from moeware.compiler.verify import verify_addresses, verify_order, verify_quantised
from moeware.hw.arch.config import Config
from moeware.hw.arch.isa import Memory, NormMode
from moeware.hw.arch.program import Port, Program, Region

from ..runtime.reference import Graph

__all__ = ["decoder", "lower", "program", "transformer"]


def transformer(seed: int, *, tokens: int, depth: int, width: int, heads: int, hidden: int,
                experts: int, chosen: int, causal: bool = False, gain: float = 1.0, bits: int = 8,
                mode: NormMode = NormMode.LAYER, gated: bool = False, form: int = 0,
                capacity: int = 0, by_rank: bool = False) -> Graph:
    """Patches and a class token, a dense and a routed block, the class token's and the mean head;
    gated : whether hidden values are products; form : number of the router's among `Graph.forms`."""
    graph = Graph(seed, gain=gain, bits=bits)
    size = heads * width
    patches = graph.input(tokens, depth)
    x = graph.add_linear(patches, graph.constant(tokens + 1, size), size, first_row=1)
    y = graph.norm(x, mode)
    q, k, v = (graph.linear(y, size) for _ in range(3))
    x = graph.add_linear(graph.attention(q, k, v, heads, heads, causal=causal), x, size)
    hidden_values = graph.linear(graph.norm(x, mode), hidden, table=True, gated=gated)
    x = graph.add_linear(hidden_values, x, size)
    y = graph.norm(x, mode)
    router = next(islice(graph.forms(experts, chosen), form, None)) if form else {}
    router |= {"capacity": capacity, "by_rank": by_rank}
    x = graph.experts(y, x, graph.route(y, experts, chosen, **router), experts, hidden, gated=gated)
    y = graph.norm(x, mode)
    graph.add_linear(graph.attention(None, y, y, 1, 1), None, 7)
    graph.add_linear(graph.norm(x, NormMode.SCALE, first_row=tokens // 2, rows=1), None, 5)
    return graph


def decoder(seed: int, form: str, *, tokens: int, width: int, heads: int, hidden: int,
            causal: bool = True, gain: float = 1.0, bits: int = 8, turned: bool = True) -> Graph:
    """A block of a language model and its head, on a stream that enters; queries and keys turned by
    rotary factors as in the model `form`: llama as they are, olmoe normalised over all heads, qwen3
    head by head."""
    graph = Graph(seed, gain=gain, bits=bits)
    size = heads * width
    x = graph.input(tokens, size, Memory.RESIDUAL)
    rotation = graph.rotation(tokens, width) if turned else None
    mode = NormMode.SCALE if form == "llama" else NormMode.RMS
    y = graph.norm(x, NormMode.RMS)
    q, k = (graph.norm(graph.add_linear(y, None, size), mode, rotation=rotation,
                       groups={"llama": 1, "olmoe": 1, "qwen3": heads}[form]) for _ in range(2))
    x = graph.add_linear(graph.attention(q, k, graph.linear(y, size), heads, heads, causal=causal),
                         x, size)
    x = graph.add_linear(graph.linear(graph.norm(x, NormMode.RMS), hidden, table=True), x, size)
    graph.add_linear(graph.norm(x, NormMode.RMS, first_row=tokens - 1, rows=1), None, 7)
    return graph


def latent(seed: int, *, tokens: int, plain: int, turned: int, value: int, heads: int, hidden: int,
           rank: int | None = 5, gain: float = 1.0, bits: int = 8, joined: bool = False) -> Graph:
    """A block with multi-head latent attention: a head of a key has `plain` channels of a normalised
    latent and `turned` ones that all heads share, a head of a value `value`.

    rank : of the latent that queries are made of, or None; joined : whether queries are made of two
    products, too.
    """
    graph = Graph(seed, gain=gain, bits=bits)
    size, width = heads * value, plain + turned
    x = graph.input(tokens, size, Memory.RESIDUAL)
    y = graph.norm(x, NormMode.RMS)
    of_query, of_key = (
        graph.norm(graph.add_linear(y, None, depth), NormMode.RMS) if depth else y
        for depth in (rank, 7))
    rotation = graph.rotation(tokens, width)

    def join() -> str:
        """Of every head the first channels from one product and the last ones from another."""
        made = graph.add_linear(y, graph.add_linear(of_key, None, heads * width), heads * width)
        for op, mine in zip(graph.operations[-2:], (slice(turned, None), slice(turned))):
            for array in (op.weight, op.affine.bias):
                kept = np.zeros_like(array).reshape(heads, width, -1)
                kept[:, mine] = array.reshape(kept.shape)[:, mine]
                array[:] = kept.reshape(array.shape)
        return made

    project = lambda: graph.add_linear(of_query, None, heads * width)
    q, k = (graph.norm(made(), NormMode.SCALE, rotation=rotation)
            for made in (join if joined else project, join))
    attended = graph.attention(q, k, graph.linear(of_key, size), heads, heads, causal=True)
    x = graph.add_linear(attended, x, size)
    x = graph.add_linear(graph.linear(graph.norm(x, NormMode.RMS), hidden, table=True), x, size)
    graph.add_linear(graph.norm(x, NormMode.RMS, first_row=tokens - 1, rows=1), None, 7)
    return graph


def quantised(graph: Graph | QuantisedStep) -> QuantisedStep:
    """The graph as a step whose inputs and results that nothing reads are ports."""
    if isinstance(graph, QuantisedStep):
        return graph

    def port(name: str, memory: Memory) -> Port:
        rows, channels = graph.shapes[name]
        return Port(name=name, tensor=name, shape=(rows, channels), scale=1 / 64,
                    split=(rows, channels), order=(0, 1),
                    region=Region(memory=memory, rows=rows, channels=channels, address=0))
    heads = [op.output for op in graph.operations if getattr(op, "residual", "") is None
             and not any(op.output in (getattr(other, "source", None), getattr(other, "residual", None))
                         for other in graph.operations)]
    return QuantisedStep(graph.operations, [port(*item) for item in graph.sources.items()],
                         [port(name, Memory.RESIDUAL) for name in heads])


def lower(graph: Graph | QuantisedStep, config: Config, *, trace: bool = True, plans=PLANS, **options):
    """The graph after `allocate`, verified between the stages."""
    step = quantised(graph)
    verify_quantised(step)
    for number, plan in enumerate(plans):
        lowered = tile(step, config, trace=trace, plan=plan, **options)
        verify_order(lowered)
        schedule(lowered, config)
        verify_order(lowered)
        try:
            allocate(lowered, config)
        except CompileError:
            if number == len(plans) - 1:
                raise
        else:
            break
    verify_addresses(lowered, config)
    return lowered


def program(graph: Graph | QuantisedStep, config: Config, *, trace: bool = True,
            **options) -> Program:
    """The graph as a program; with `trace` it stores every tensor."""
    image, dram_bytes, steps = emit([lower(graph, config, trace=trace, **options)], config)
    ports = {side: [(port.name, port.shape, "tensor(float)") for port in getattr(steps[0], side)]
             for side in ("inputs", "outputs")}
    return Program(config=config, image=image, dram_bytes=dram_bytes, steps=steps,
                   placement=f"fpga {len(graph.operations)}/{len(graph.operations)} nodes", **ports)
