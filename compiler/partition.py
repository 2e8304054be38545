"""Decide which nodes run on the accelerator and which on the host, and cut the graph there.

The accelerator runs pre-norm residual networks. A stage of that form has a *kind*; the table
``_READS`` says which kinds each operator reads. What does not fit runs on the host, with the
reason, together with the rest of its block: the graph is cut only at values of the residual
stream, at graph inputs and after a final Linear.
"""

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from moeware.compiler.canonical import attributes, is_canonical, projection, sources
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.fuse.trace import static_shape
from moeware.compiler.macs import macs
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


@dataclass(frozen=True)
class _Kind:
    """What a value is to the accelerator, and the residual stream that it is computed from."""

    name: str
    stream: int = -1


# Operator: kinds that its first input may have, and the kind of its result.
_READS: dict[str, tuple[tuple[str, ...], str]] = {
    "PatchEmbed": (("image",), "start"),
    "ClassToken": (("start",), "start"),
    "AddConstant": (("start",), "start"),
    "LayerNorm": (("start", "stream", "row"), "norm"),
    "RMSNorm": (("start", "stream", "row", "linear"), "norm"),
    "Linear": (("norm", "norm row", "attention", "function", "product"), "linear"),
    "Pointwise": (("linear",), "function"),
    "Multiply": (("linear", "function"), "product"),
    "Rotary": (("linear", "normalised linear"), "turned"),
    "Attention": (("linear", "normalised linear", "turned"), "attention"),
    "Route": (("norm",), "route"),
    "Experts": (("norm",), "experts"),
    "GatedExperts": (("norm",), "experts"),
    "SoftExperts": (("norm",), "experts"),
    "MeanTokens": (("norm",), "norm row"),
    "TakeToken": (("start", "stream", "norm"), "row"),
    "Add": (("start", "stream", "linear", "experts"), "stream"),
}
_STREAMS = ("start", "stream")
_MAY_FOLLOW = {
    "norm": (
        "Linear", "Route", "Experts", "GatedExperts", "SoftExperts", "MeanTokens", "TakeToken"
    ),
    "norm row": ("Linear",),
    "row": ("LayerNorm", "RMSNorm"),
    "linear": ("Pointwise", "Multiply", "RMSNorm", "Rotary", "Attention", "Add"),
    "normalised linear": ("Rotary", "Attention"),
    "turned": ("Attention",),
    "function": ("Linear", "Multiply"),
    "product": ("Linear",),
    "attention": ("Linear",),
    "route": ("Experts", "GatedExperts"),
    "experts": ("Add",),
}
# Operator: the field of `Config` that says whether there is gateware for it.
OPTIONS = {"Multiply": "products", "GatedExperts": "products", "Rotary": "rotary"}
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
        field = OPTIONS.get(node.op_type) if is_canonical(node) else None
        if field is not None and not getattr(config, field):
            yield node, reason_of(
                node,
                f"{node.op_type} needs gateware that this configuration does not have; use one "
                f"with Config.{field} = 1",
            )


def _violations(
    model: ir.Model, host: dict[ir.Node, Reason]
) -> Iterator[tuple[ir.Node, Reason]]:
    """Nodes that cannot run on the accelerator while ``host`` runs on the host, with reasons."""
    kinds: dict[ir.Value, _Kind] = {value: _Kind("image") for value in model.graph.inputs}
    fresh: dict[ir.Node, Reason] = {}
    for number, node in enumerate(model.graph):
        if node not in host:
            known = is_canonical(node) and node.op_type in _READS
            text = _rule_broken(node, kinds) if known else plain_reason(node)
            if text is not None:
                before = _host_operand(node, kinds, {*host, *fresh}) if known else None
                reads = f"reads the result of `{before and before.name}`, which the host computes"
                fresh[node] = follows(node, before, reads) if before else reason_of(node, text)
        for value in node.outputs:
            if node in host or node in fresh:
                shape = static_shape(value)
                rows = shape is not None and len(shape) == 3 and shape[0] == 1
                kinds[value] = _Kind("stream" if rows else "image", number)
            else:
                kinds[value] = _result(node, kinds, number)
    # The cuts are looked at only when every node that is left fits its rule.
    yield from fresh.items() if fresh else _uses_broken(model, host, kinds)


def _host_operand(
    node: ir.Node, kinds: dict[ir.Value, _Kind], host: Container[ir.Node]
) -> ir.Node | None:
    """The last operand of ``node`` that the host computes, unless it is as good as another."""
    allowed = () if node.op_type == "Add" else _READS[node.op_type][0]
    producers = [
        value.producer() for value in node.inputs
        if value in kinds and kinds[value].name not in allowed
    ]
    return next((before for before in producers[::-1] if before in host), None)


def _rule_broken(node: ir.Node, kinds: dict[ir.Value, _Kind]) -> str | None:
    """Why canonical ``node`` cannot read operands of these kinds: "rule; remedy"."""
    variable = [value for value in node.inputs if value is not None and value in kinds]
    given = [kinds[value] for value in variable]
    given_names = [kind.name for kind in given]
    allowed, _ = _READS[node.op_type]
    if node.op_type == "Add":
        return _add_broken(variable, given)
    first = given[0].name if given else "constant"
    if first not in allowed:
        return (
            f"{node.op_type} of {'an' if first[0] in 'aeiou' else 'a'} {first} value is not a "
            f"supported form, it reads {' or '.join(allowed)}; use pre-norm residual blocks"
        )
    alone = len(variable[0].uses()) == 1 and not variable[0].is_graph_output()
    if node.op_type in ("ClassToken", "AddConstant") and not alone:
        return (
            f"{node.op_type} must be the only reader of the embedding that it completes; let all "
            f"others read its result"
        )
    if node.op_type in ("RMSNorm", "Rotary") and first not in (*_STREAMS, "row"):
        if not alone:
            return f"a projection before {node.op_type} must have no other reader; remove it"
    elif node.op_type == "RMSNorm" and attributes(node)["groups"] != 1:
        return "RMSNorm of the residual stream must have 1 group; normalise whole rows"
    if node.op_type == "Attention":
        return _attention_broken(node, given)
    if node.op_type in ("Experts", "GatedExperts") and given_names[1:] != ["route", "route"]:
        return f"{node.op_type} must read a Route; use softmax and top-k over a linear gate"
    if node.op_type == "Multiply":
        return _multiply_broken(node, given_names)
    return None


def _multiply_broken(node: ir.Node, given_names: list[str]) -> str | None:
    if given_names not in (["function", "linear"], ["linear", "function"], ["linear", "linear"]):
        return (
            f"Multiply of {given_names[0]} and {given_names[-1]} is not a supported form, it joins "
            f"a Linear with a Linear or a function of one; write a gated linear unit"
        )
    operands = list(dict.fromkeys(node.inputs))
    layers = []
    for value in operands:
        producer = value.producer()
        if producer.op_type == "Pointwise":
            operands.append(producer.inputs[0])
        else:
            layers.append(producer)
    if len(layers) != 2 or any(len(v.uses()) != 1 or v.is_graph_output() for v in operands):
        return "the factors of Multiply must be two Linears without other readers; repeat the Linear"
    if layers[0].inputs[0] is not layers[1].inputs[0]:
        return "the factors of Multiply must be Linears of one value; write a gated linear unit"
    return None


def _attention_broken(node: ir.Node, given: list[_Kind]) -> str | None:
    """What attention reads: projections of one stream, normalised and turned as their heads are."""
    kinds, attrs = [kind.name for kind in given], attributes(node)
    if len(kinds) != 3 or not set(kinds) <= set(_READS["Attention"][0]):
        return "Attention must read three Linears; project queries, keys and values"
    if len({kind.stream for kind in given}) != 1:
        return "Attention must read one stream, not cross-attend; move it to the host model"
    if [kind == "turned" for kind in kinds] not in ([True, True, False], [False, False, False]):
        return (
            "Attention must have rotary queries and keys, or neither, and no rotary values; turn "
            "both, or none"
        )
    for value, heads in zip(node.inputs, (attrs["heads"], attrs["kv_heads"], attrs["kv_heads"])):
        _, norm, rotary = projection(value)
        if rotary is not None and attributes(rotary)["heads"] != heads:
            return f"Attention of {heads} heads must have Rotary of as many; turn whole heads"
        if norm is not None and attributes(norm)["groups"] not in (1, heads):
            return (
                f"RMSNorm before Attention must have 1 or {heads} groups, a head each; normalise "
                f"heads or whole rows"
            )
    return None


def _add_broken(variable: list[ir.Value], given: list[_Kind]) -> str | None:
    streams = [kind for kind in given if kind.name in _STREAMS]
    branches = [kind for kind in given if kind.name in ("linear", "experts")]
    if len(streams) != 1 or len(branches) != 1:
        return (
            f"Add of {given[0].name} and {given[-1].name} is not a supported form, it joins the "
            f"residual stream with a Linear or Experts; use pre-norm residual blocks"
        )
    if streams[0].stream != branches[0].stream:
        return "Add must join the stream that its branch reads; remove the long skip connection"
    branch = variable[given.index(branches[0])]
    if len(branch.uses()) != 1 or branch.is_graph_output():
        return "the branch of a residual Add must have no other reader; remove the other reader"
    stream = variable[given.index(streams[0])]
    joins = [node for node in stream.consumers() if is_canonical(node) and node.op_type == "Add"]
    if len(joins) > 1:
        return "the residual stream must not fork into two Adds; remove the long skip connection"
    return None


def _result(node: ir.Node, kinds: dict[ir.Value, _Kind], number: int) -> _Kind:
    given = [kinds[value] for value in node.inputs if value in kinds]
    _, name = _READS[node.op_type]
    first = given[0]
    if node.op_type == "PatchEmbed":
        return _Kind(name, number)
    if node.op_type == "Add":
        first = next(kind for kind in given if kind.name in _STREAMS)
    if node.op_type in ("LayerNorm", "RMSNorm") and first.name == "row":
        name = "norm row"
    if node.op_type == "RMSNorm" and first.name == "linear":
        name = "normalised linear"
    if node.op_type == "TakeToken" and first.name == "norm":
        name = "norm row"
    return _Kind(name, first.stream)


def _uses_broken(
    model: ir.Model, host: dict[ir.Node, Reason], kinds: dict[ir.Value, _Kind]
) -> Iterator[tuple[ir.Node, Reason]]:
    """Values that would have to leave or enter the accelerator where it cannot be cut."""
    levels = _levels(model, host)
    rejoins = _before_accelerator(model, host)
    for node in model.graph:
        if node in host:
            continue
        for value in node.outputs:
            kind = kinds[value].name
            if kind in _STREAMS:
                continue
            readers = [(reader, reader in host) for reader in value.consumers()]
            for reader, on_host in readers:
                if on_host and kind == "linear" and reader not in rejoins:
                    continue
                same_step = not on_host and levels[reader] == levels[node]
                if same_step and reader.op_type in _MAY_FOLLOW.get(kind, ()):
                    continue
                where = "on the host" if on_host else "in another step"
                rule = f"its result feeds `{reader.name}` {where}, and {_CUTS}"
                cause = reader if on_host else _host_before(reader, host)
                remedy = f"let `{reader.name}` read the residual stream"
                yield node, follows(node, cause, rule) if cause else reason_of(
                    node, f"{rule}; {remedy}"
                )
                break
            if value.is_graph_output() and kind != "linear":
                yield node, reason_of(
                    node,
                    f"{node.op_type} cannot end the accelerator's part, a Linear or the residual "
                    f"stream does; end the model with a Linear",
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


def describe(parts: Partition) -> str:
    """One line: ``fpga 38/41 nodes, 99.2 % of MACs; host 3 (Gather …)``, with the cause that keeps
    the most nodes on the host."""
    counts = report(parts)
    total = counts["fpga_nodes"] + counts["host_nodes"]
    share = 100 * counts["fpga_mac_share"]
    line = f"fpga {counts['fpga_nodes']}/{total} nodes, {share:.1f} % of MACs"
    if not counts["host"]:
        return line
    ((cause, _),) = Counter(parts.causes.values()).most_common(1)
    return f"{line}; host {counts['host_nodes']} ({cause.rule})"


def report(parts: Partition) -> dict:
    """Where every node runs, as a value that ``json.dumps`` takes.

    Keys: fpga_nodes, host_nodes, macs (of one frame), fpga_mac_share (0 to 1), steps (kind, nodes,
    inputs, outputs), host (node, operator, sources, reason, remedy, follows, macs, mac_share).
    """
    work = {node: macs(node) for step in parts.steps for node in step.nodes}
    total = sum(work.values())
    host = [
        {
            "node": node.name,
            "operator": node.op_type,
            "sources": sources(node),
            "reason": step.reasons[str(node.name)].rule,
            "remedy": step.reasons[str(node.name)].remedy,
            "follows": step.reasons[str(node.name)].follows,
            "macs": work[node],
            "mac_share": work[node] / total if total else 0.0,
        }
        for step in parts.steps
        if step.kind == "host"
        for node in step.nodes
    ]
    on_host = sum(entry["macs"] for entry in host)
    return {
        "fpga_nodes": len(work) - len(host),
        "host_nodes": len(host),
        "macs": total,
        "fpga_mac_share": 1 - on_host / total if total else 0.0,
        "steps": [
            {
                "kind": step.kind,
                "nodes": [node.name for node in step.nodes],
                "inputs": list(step.inputs),
                "outputs": list(step.outputs),
            }
            for step in parts.steps
        ],
        "host": host,
    }
