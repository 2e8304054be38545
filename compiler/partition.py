"""Decide which nodes run on the accelerator and which on the host, and cut the graph there.

The accelerator runs pre-norm residual networks. A stage of that form has a *kind*; the table
``_READS`` says which kinds each operator reads. What does not fit runs on the host, with the
reason, together with the rest of its block: the graph is cut only at values of the residual
stream, at graph inputs and after a final Linear.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from moeware.compiler.canonical import OPERATORS, is_canonical, sources
from moeware.compiler.fuse.region import inputs_of
from moeware.compiler.fuse.trace import static_shape
from moeware.compiler.macs import macs
from moeware.compiler.to_onnx import lower


@dataclass(frozen=True)
class Step:
    """Nodes that run together.

    kind: "fpga" or "host"; nodes: in order of computation; inputs, outputs: value names;
    reasons: for a host step, why each node is there; model: for a host step, an ONNX model
    (bytes) from inputs to outputs with a dynamic batch, for ONNX Runtime.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reasons: dict[str, str]
    model: bytes | None


@dataclass(frozen=True)
class Partition:
    """The steps of a model in order of execution."""

    steps: tuple[Step, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """Node name -> why it runs on the host."""
        return {name: reason for step in self.steps for name, reason in step.reasons.items()}


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
    "Linear": (("norm", "norm row", "attention", "function"), "linear"),
    "Pointwise": (("linear",), "function"),
    "Attention": (("linear",), "attention"),
    "Route": (("norm",), "route"),
    "Experts": (("norm",), "experts"),
    "MeanTokens": (("norm",), "norm row"),
    "TakeToken": (("start", "stream", "norm"), "row"),
    "Add": (("start", "stream", "linear", "experts"), "stream"),
}
_STREAMS = ("start", "stream")
_MAY_FOLLOW = {
    "norm": ("Linear", "Route", "Experts", "MeanTokens", "TakeToken"),
    "norm row": ("Linear",),
    "row": ("LayerNorm",),
    "linear": ("Pointwise", "Attention", "Add"),
    "function": ("Linear",),
    "attention": ("Linear",),
    "route": ("Experts",),
    "experts": ("Add",),
}
_INTEGERS = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits",
)  # fmt: skip
_CUTS = "the graph is cut only at the residual stream, graph inputs and a final Linear"


def partition(model: ir.Model) -> Partition:
    """Cut the canonical ``model`` into steps; every supported node runs on the accelerator."""
    host: dict[ir.Node, str] = {}
    while True:
        found = dict(_violations(model, host))
        if not found:
            break
        host.update(found)
    return Partition(tuple(_steps(model, host)))


def _violations(model: ir.Model, host: dict[ir.Node, str]) -> Iterator[tuple[ir.Node, str]]:
    """Nodes that cannot run on the accelerator while ``host`` runs on the host, with reasons."""
    kinds: dict[ir.Value, _Kind] = {value: _Kind("image") for value in model.graph.inputs}
    fresh: dict[ir.Node, str] = {}
    for number, node in enumerate(model.graph):
        if node not in host:
            reason = _plain_reason(node)
            if is_canonical(node) and node.op_type in _READS:
                reason = _rule_broken(node, kinds, {*host, *fresh})
            if reason is not None:
                fresh[node] = f"node `{node.name}`: {reason}"
        for value in node.outputs:
            if node in host or node in fresh:
                shape = static_shape(value)
                rows = shape is not None and len(shape) == 3 and shape[0] == 1
                kinds[value] = _Kind("stream" if rows else "image", number)
            else:
                kinds[value] = _result(node, kinds, number)
    # The cuts are looked at only when every node that is left fits its rule.
    yield from fresh.items() if fresh else _uses_broken(model, host, kinds)


def _rule_broken(node: ir.Node, kinds: dict[ir.Value, _Kind], host: set[ir.Node]) -> str | None:
    variable = [value for value in node.inputs if value is not None and value in kinds]
    given = [kinds[value] for value in variable]
    given_names = [kind.name for kind in given]
    allowed, _ = _READS[node.op_type]
    if node.op_type == "Add":
        branches = [value.producer() for value in variable if value.producer() in host]
        if branches and "linear" not in given_names and "experts" not in given_names:
            assert branches[-1] is not None
            return (
                f"Add joins the result of `{branches[-1].name}`, which the host computes; "
                f"repair `{branches[-1].name}` first"
            )
        return _add_broken(variable, given)
    first = given[0].name if given else "constant"
    if first not in allowed:
        return (
            f"{node.op_type} of a {first} value is not a supported form, it reads "
            f"{' or '.join(allowed)}; use pre-norm residual blocks"
        )
    if node.op_type == "Attention" and set(given_names) != {"linear"}:
        return "Attention must read three Linears; project queries, keys and values"
    if node.op_type == "Attention" and len({kind.stream for kind in given}) != 1:
        return "Attention must read one stream, not cross-attend; move it to the host model"
    if node.op_type == "Experts" and given_names[1:] != ["route", "route"]:
        return "Experts must read a Route; use softmax and top-k over a linear gate"
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


def _plain_reason(node: ir.Node) -> str:
    operands = [value for value in node.inputs if value is not None]
    domain = f"{node.domain}." if node.domain else ""
    if node.op_type in _INTEGERS or node.op_type.startswith(("QLinear", "QAttention")):
        return (
            f"{node.op_type} works on integers whose scales are no constants, or in a form that is "
            f"not read; export in QDQ format (static, quant_format=QuantFormat.QDQ)"
        )
    if node.op_type == "Einsum" and len(operands) > 2:
        return (
            f"{len(operands)}-operand Einsum is not a supported form; "
            f"write it as products of two operands"
        )
    if node.op_type in ("MatMul", "Gemm", "Einsum"):
        return (
            f"{node.op_type} that belongs to no attention and no constant weight is not a "
            f"supported form; write the block as scaled dot-product attention or Linear"
        )
    if node.op_type in ("TopK", "NonZero", "ScatterND", "ScatterElements"):
        return (
            f"{node.op_type} outside a recognised mixture of experts; write the router as linear, "
            f"softmax, top-k and the experts as two layers with one function between"
        )
    return (
        f"{domain}{node.op_type} has no form on the accelerator; "
        f"leave it out of the model or accept that the host runs it"
    )


def _result(node: ir.Node, kinds: dict[ir.Value, _Kind], number: int) -> _Kind:
    given = [kinds[value] for value in node.inputs if value in kinds]
    _, name = _READS[node.op_type]
    first = given[0]
    if node.op_type == "PatchEmbed":
        return _Kind(name, number)
    if node.op_type == "Add":
        first = next(kind for kind in given if kind.name in _STREAMS)
    if node.op_type == "LayerNorm" and first.name == "row":
        name = "norm row"
    if node.op_type == "TakeToken" and first.name == "norm":
        name = "norm row"
    return _Kind(name, first.stream)


def _uses_broken(
    model: ir.Model, host: dict[ir.Node, str], kinds: dict[ir.Value, _Kind]
) -> Iterator[tuple[ir.Node, str]]:
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
                reason = (
                    f"node `{node.name}`: its result feeds `{reader.name}` {where}, and {_CUTS}; "
                    f"repair `{reader.name}` first"
                )
                yield node, reason
                break
            if value.is_graph_output() and kind != "linear":
                reason = (
                    f"node `{node.name}`: {node.op_type} cannot end the accelerator's part, a "
                    f"Linear or the residual stream does; end the model with a Linear"
                )
                yield node, reason


def _before_accelerator(model: ir.Model, host: dict[ir.Node, str]) -> set[ir.Node]:
    """Host nodes whose results reach a node on the accelerator."""
    found: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        for value in node.outputs:
            if any(reader not in host or reader in found for reader in value.consumers()):
                found.add(node)
    return found


def _levels(model: ir.Model, host: dict[ir.Node, str]) -> dict[ir.Node, int]:
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


def _steps(model: ir.Model, host: dict[ir.Node, str]) -> Iterator[Step]:
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
    """One line: ``fpga 38/41 nodes, 99.2 % of MACs; host 3 (Gather: …)``."""
    counts = report(parts)
    total = counts["fpga_nodes"] + counts["host_nodes"]
    share = 100 * counts["fpga_mac_share"]
    line = f"fpga {counts['fpga_nodes']}/{total} nodes, {share:.1f} % of MACs"
    if not counts["host"]:
        return line
    # The nodes without a canonical form are the cause; the others follow from them.
    causes = [entry for entry in counts["host"] if entry["operator"] not in OPERATORS]
    first = (causes or counts["host"])[0]
    reason = first["reason"].split(": ", 1)[1].split(";")[0]
    return f"{line}; host {counts['host_nodes']} ({first['operator']}: {reason})"


def report(parts: Partition) -> dict:
    """Where every node runs, as a value that ``json.dumps`` takes.

    Keys: fpga_nodes, host_nodes, macs (of one frame), fpga_mac_share (0 to 1), steps (kind, nodes,
    inputs, outputs), host (node, operator, sources, reason, macs, mac_share).
    """
    work = {node: macs(node) for step in parts.steps for node in step.nodes}
    total = sum(work.values())
    host = [
        {
            "node": node.name,
            "operator": node.op_type,
            "sources": sources(node),
            "reason": step.reasons[str(node.name)],
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
