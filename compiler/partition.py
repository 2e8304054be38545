"""Decide which nodes run on the accelerator and which on the host, and cut the graph there.

What no rule of the accelerator takes (`kinds`) runs on the host, with the reason, together with the
rest of its block: the graph is cut only at values of the residual stream, at graph inputs and after a
final Linear.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from moeware.compiler.canonical import attributes, is_canonical
from moeware.compiler.fuse.region import inputs_of, region
from moeware.compiler.fuse.trace import constant, is_op, other_operand, static_shape
from moeware.compiler.kinds import MAY_FOLLOW, READS, STREAMS, Kind, result, rule_broken
from moeware.compiler.reasons import Reason, follows, plain_reason, reason_of
from moeware.compiler.to_onnx import lower
from moeware.hw.arch.config import Config


@dataclass(frozen=True)
class Step:
    """Nodes that run together.

    kind: "fpga" or "host"; nodes: in order of computation; inputs, outputs: value names;
    reasons: for a host step, why each node is there, by its name; model: for a host step, an ONNX
    model (bytes) from inputs to outputs with a dynamic batch, for ONNX Runtime.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reasons: dict[str, Reason]
    model: bytes | None


@dataclass(frozen=True)
class Partition:
    """The steps of a model in order of execution."""

    steps: tuple[Step, ...]

    @property
    def reasons(self) -> dict[str, Reason]:
        """Node name -> why it runs on the host."""
        return {name: reason for step in self.steps for name, reason in step.reasons.items()}

    @property
    def causes(self) -> dict[str, Reason]:
        """Node name -> the reason of the node that it follows to the host, its own where it is one."""
        reasons, found = self.reasons, {}
        for name, reason in reasons.items():
            while reason.follows:
                reason = reasons[reason.follows]
            found[name] = reason
        return found


# Operator: the field of `Config` that says whether there is gateware for it; for Route, for more than
# softmax scores of all experts that take any number of tokens.
OPTIONS = {"Multiply": "products", "GatedExperts": "products", "Rotary": "rotary",
           "Route": "router_forms"}
_NORMS = ("LayerNorm", "RMSNorm")
_EMBEDS = ("PatchEmbed", "ClassToken", "AddConstant")
_NORM_AS_STREAM = (
    "{} of the embedding makes the residual stream, and norms on the accelerator only make what a "
    "Linear or a router reads; accept that the host runs it, or train without it"
)
_CUTS = "the graph is cut only at the residual stream, graph inputs and a final Linear"


def partition(model: ir.Model, config: Config | None = None) -> Partition:
    """Cut the canonical ``model`` into steps; every supported node runs on the accelerator.

    config: what gateware there is for; None: all that there can be.
    """
    host = {} if config is None else dict(_without_gateware(model, config))
    while True:
        found = dict(_violations(model, host))
        if not found:
            break
        host.update(found)
    return Partition(tuple(_steps(model, host)))


def _without_gateware(model: ir.Model, config: Config) -> Iterator[tuple[ir.Node, Reason]]:
    for node in model.graph:
        field = _option(node) if is_canonical(node) else None
        if field is not None and not getattr(config, field):
            yield node, reason_of(
                node,
                f"{node.op_type} needs gateware that this configuration does not have; use one "
                f"with Config.{field} = 1",
            )


def _option(node: ir.Node) -> str | None:
    if node.op_type == "Route":
        found = attributes(node)
        if found["score"] == "softmax" and found["groups"] == 1 and not found["capacity"]:
            return None
    return OPTIONS.get(node.op_type)


def _violations(
    model: ir.Model, host: dict[ir.Node, Reason]
) -> Iterator[tuple[ir.Node, Reason]]:
    """Nodes that cannot run on the accelerator while ``host`` runs on the host, with reasons."""
    kinds = {value: Kind("stream" if _is_rows(value) else "image") for value in model.graph.inputs}
    fresh: dict[ir.Node, Reason] = {}
    for number, node in enumerate(model.graph):
        if node not in host:
            known = is_canonical(node) and node.op_type in READS
            text = rule_broken(node, kinds) if known else plain_reason(node)
            norm = _embedding_norm(node, kinds)
            if norm is not None:
                # Alone: what reads it breaks no rule where the stream enters behind it.
                yield norm, reason_of(norm, _NORM_AS_STREAM.format(norm.op_type))
                return
            if text is not None:
                before = _host_operand(node, kinds, {*host, *fresh}) if known else None
                reads = f"reads the result of `{before and before.name}`, which the host computes"
                fresh[node] = follows(node, before, reads) if before else reason_of(node, text)
        for value in node.outputs:
            if node in host or node in fresh:
                kinds[value] = Kind("stream" if _is_rows(value) else "image", number)
            else:
                kinds[value] = result(node, kinds, number)
    # The cuts are looked at only when every node that is left fits its rule.
    yield from fresh.items() if fresh else _uses_broken(model, host, kinds)


def _is_rows(value: ir.Value) -> bool:
    """Whether ``value`` may enter as a residual stream: an embedding that the caller or the host made."""
    shape = static_shape(value)
    return shape is not None and len(shape) == 3 and shape[0] == 1


def _embedding_norm(node: ir.Node, kinds: dict[ir.Value, Kind]) -> ir.Node | None:
    """The norm of an embedding whose result norm ``node`` reads as a residual stream."""
    x = node.inputs[0] if is_canonical(node) and node.op_type in _NORMS else None
    if x not in kinds or kinds[x].name != "norm":
        return None
    norm, *before = region([x], [])[0][::-1]
    embeds = all(not is_canonical(each) or each.op_type in _EMBEDS for each in before)
    return norm if embeds else None


def _host_operand(
    node: ir.Node, kinds: dict[ir.Value, Kind], host: Container[ir.Node]
) -> ir.Node | None:
    """The last operand of ``node`` that the host computes, unless it is as good as another, or the
    embedding of tokens, which belongs there."""
    allowed = () if node.op_type == "Add" else READS[node.op_type][0]
    producers = [
        value.producer() for value in node.inputs
        if value in kinds and kinds[value].name not in allowed
    ]
    return next((before for before in producers[::-1]
                 if before in host and not _embeds_tokens(before)), None)


def _embeds_tokens(node: ir.Node | None) -> bool:
    """Whether ``node`` looks rows of a table up, or multiplies such by a constant (Gemma)."""
    if is_op(node, "Mul", "Div"):
        pair = other_operand(node)
        node = pair[0].producer() if pair else None
    return is_op(node, "Gather") and constant(node.inputs[0]) is not None


def _uses_broken(
    model: ir.Model, host: dict[ir.Node, Reason], kinds: dict[ir.Value, Kind]
) -> Iterator[tuple[ir.Node, Reason]]:
    """Values that would have to leave or enter the accelerator where it cannot be cut."""
    levels = _levels(model, host)
    rejoins = _before_accelerator(model, host)
    for node in model.graph:
        if node in host:
            continue
        for value in node.outputs:
            kind = kinds[value].name
            if kind in STREAMS:
                continue
            readers = [(reader, reader in host) for reader in value.consumers()]
            for reader, on_host in readers:
                if on_host and kind == "linear" and reader not in rejoins:
                    continue
                same_step = not on_host and levels[reader] == levels[node]
                if same_step and reader.op_type in MAY_FOLLOW.get(kind, ()):
                    continue
                where = "on the host" if on_host else "in another step"
                rule = f"its result feeds `{reader.name}` {where}, and {_CUTS}"
                cause = reader if on_host else _host_before(reader, host)
                remedy = f"let `{reader.name}` read the residual stream"
                yield node, follows(node, cause, rule) if cause else reason_of(
                    node, f"{rule}; {remedy}"
                )
                break
            else:
                if kind == "linear":
                    yield from _both_ways(node, value, readers)
            if value.is_graph_output() and kind != "linear":
                yield node, reason_of(
                    node,
                    f"{node.op_type} cannot end the accelerator's part, a Linear or the residual "
                    f"stream does; end the model with a Linear",
                )


def _both_ways(
    node: ir.Node, value: ir.Value, readers: list[tuple[ir.Node, bool]]
) -> Iterator[tuple[ir.Node, Reason]]:
    """A Linear whose result leaves the accelerator and is read there, too."""
    outside = [reader for reader, on_host in readers if on_host]
    inside = [reader for reader, on_host in readers if not on_host]
    if inside and (outside or value.is_graph_output()):
        rule = (
            f"its result both leaves the accelerator and is read there by `{inside[0].name}`, and a Linear "
            f"does one of these"
        )
        remedy = f"leave the output {value.name!r} out of the model"
        yield node, follows(node, outside[0], rule) if outside else reason_of(
            node, f"{rule}; {remedy}"
        )


def _host_before(node: ir.Node, host: Container[ir.Node]) -> ir.Node | None:
    """The nearest host node whose result reaches ``node``."""
    queue = [node]
    for current in queue:
        if current in host:
            return current
        producers = [value.producer() for value in inputs_of(current)]
        queue += [before for before in producers if before is not None and before not in queue]
    return None


def _before_accelerator(model: ir.Model, host: dict[ir.Node, Reason]) -> set[ir.Node]:
    """Host nodes whose results reach a node on the accelerator."""
    found: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        for value in node.outputs:
            if any(reader not in host or reader in found for reader in value.consumers()):
                found.add(node)
    return found


def _levels(model: ir.Model, host: dict[ir.Node, Reason]) -> dict[ir.Node, int]:
    """Number of the step of each node: even on the host, odd on the accelerator."""
    levels: dict[ir.Node, int] = {}
    for node in model.graph:
        kind = int(node not in host)
        level = kind
        for value in inputs_of(node):
            producer = value.producer()
            if producer is not None:
                before = levels[producer]
                level = max(level, before + (before % 2 != kind))
        levels[node] = level
    return levels


def _steps(model: ir.Model, host: dict[ir.Node, Reason]) -> Iterator[Step]:
    levels = _levels(model, host)
    for level in sorted(set(levels.values())):
        nodes = [node for node in model.graph if levels[node] == level]
        inside = set(nodes)
        read = dict.fromkeys(value for node in nodes for value in inputs_of(node))
        inputs = [
            value for value in read if value.const_value is None and value.producer() not in inside
        ]
        outputs = [
            value
            for node in nodes
            for value in node.outputs
            if value.is_graph_output() or any(user not in inside for user in value.consumers())
        ]
        on_host = level % 2 == 0
        yield Step(
            kind="host" if on_host else "fpga",
            nodes=tuple(nodes),
            inputs=tuple(str(value.name) for value in inputs),
            outputs=tuple(str(value.name) for value in outputs),
            reasons={str(node.name): host[node] for node in nodes} if on_host else {},
            model=lower(model, nodes, inputs, outputs).SerializeToString() if on_host else None,
        )
