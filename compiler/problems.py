"""What keeps nodes off the accelerator: one entry for each cause, with the nodes that it takes along.

A form that no rule recognises arrives as a chain of plain operators, often once in each layer. The
chain is one cause, named after its most telling operator; equal causes in several places are one
entry. What merely follows a cause to the host (see `Reason.follows`) stands with it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from moeware.compiler.canonical import is_canonical, sources
from moeware.compiler.fuse.trace import LAYOUT, is_op
from moeware.compiler.macs import macs
from moeware.compiler.partition import Partition
from moeware.compiler.reasons import Reason, no_form, operator_name

# Operators that say what a chain was meant to be, the most telling first.
_TELLING = (
    "TopK", "NonZero", "ScatterND", "ScatterElements", "Softmax", "MatMul", "Gemm", "Einsum",
    "ReduceMean", "Sqrt", "Rsqrt",
)  # fmt: skip


@dataclass
class Problem:
    """A cause, in all its places.

    operators: of the cause, in order of computation; nodes: names in the user's file, one for each
    place; reason, remedy; macs: of the cause's own nodes, for one frame; follow: nodes on the host
    only because of it; follow_macs: theirs.
    """

    operators: tuple[str, ...]
    reason: str
    remedy: str
    nodes: list[str] = field(default_factory=list)
    macs: int = 0
    follow: list[ir.Node] = field(default_factory=list)
    follow_macs: int = 0

    def to_dict(self, total: int) -> dict:
        """As a value that ``json.dumps`` takes; total: MACs of the model."""
        return {
            "operators": list(self.operators),
            "nodes": self.nodes,
            "reason": self.reason,
            "remedy": self.remedy,
            "mac_share": self.macs / total if total else 0.0,
            "follow": [_file_name(node) for node in self.follow],
            "follow_mac_share": self.follow_macs / total if total else 0.0,
        }


def problems(parts: Partition) -> list[Problem]:
    """Every cause of a node on the host, those with the most MACs at stake first."""
    nodes = {str(node.name): node for step in parts.steps for node in step.nodes}
    reasons, cause_of = parts.reasons, parts.causes
    causes = [nodes[name] for name, reason in reasons.items() if not reason.follows]
    chains = list(_chains(causes, [nodes[name] for name in reasons]))
    chain_of = {node.name: number for number, chain in enumerate(chains) for node in chain}
    follow: dict[int, list[ir.Node]] = defaultdict(list)
    for name, reason in reasons.items():
        if reason.follows:
            follow[chain_of[cause_of[name].node]].append(nodes[name])
    found: dict[tuple, Problem] = {}
    for number, chain in enumerate(chains):
        own = [node for node in chain if not _moves(node)] or chain
        operators = tuple(dict.fromkeys(map(operator_name, own)))
        head = min(own, key=lambda node: _rank(node, reasons))
        rule, remedy = _text(operators, _rank(head, reasons), reasons[str(head.name)])
        problem = found.setdefault((operators, rule, remedy), Problem(operators, rule, remedy))
        problem.nodes.append(_file_name(head))
        problem.macs += sum(map(macs, own))
        taken = [*(node for node in chain if node not in own), *follow[number]]
        problem.follow += taken
        problem.follow_macs += sum(map(macs, taken))
    return sorted(found.values(), key=lambda each: -(each.macs + each.follow_macs))


def _chains(causes: list[ir.Node], on_host: list[ir.Node]) -> Iterator[list[ir.Node]]:
    """Causes in groups: a canonical node alone, plain nodes with those that they read."""
    plain = {node for node in causes if not is_canonical(node)}
    linked = plain | {node for node in on_host if is_canonical(node) and _between(node, plain)}
    left = dict.fromkeys(causes)
    while left:
        first = next(iter(left))
        members = [first] if first not in plain else _connected(first, linked)
        yield [node for node in causes if node in members]
        for node in members:
            left.pop(node, None)


def _between(node: ir.Node, plain: set[ir.Node]) -> bool:
    """Whether ``node`` stands within a chain of plain nodes: an addition that a rule did read."""
    producers = {value.producer() for value in node.inputs if value is not None} - {None}
    readers = {reader for value in node.outputs for reader in value.consumers()}
    return bool(producers and readers) and producers | readers <= plain


def _connected(first: ir.Node, allowed: set[ir.Node]) -> list[ir.Node]:
    found = {first: None}
    queue = [first]
    for node in queue:
        beside = [value.producer() for value in node.inputs if value is not None]
        beside += [reader for value in node.outputs for reader in value.consumers()]
        new = [other for other in dict.fromkeys(beside) if other in allowed and other not in found]
        found |= dict.fromkeys(new)
        queue += new
    return queue


def _moves(node: ir.Node) -> bool:
    return is_op(node, *LAYOUT) and not node.op_type.startswith("Reduce")


def _rank(node: ir.Node, reasons: Mapping[str, Reason]) -> int:
    """How telling a node is: by its operator, else by whether its reason is its own."""
    if node.op_type in _TELLING:
        return _TELLING.index(node.op_type)
    reason = reasons[str(node.name)]
    return len(_TELLING) + (f"{reason.rule}; {reason.remedy}" == no_form([operator_name(node)]))


def _text(operators: tuple[str, ...], rank: int, reason: Reason) -> tuple[str, str]:
    if len(operators) == 1 or rank <= len(_TELLING):
        return reason.rule, reason.remedy
    rule, _, remedy = no_form(operators).partition("; ")
    return rule, remedy


def _file_name(node: ir.Node) -> str:
    """The first node of the user's file that ``node`` stands for."""
    return next(iter(sources(node)), str(node.name))
