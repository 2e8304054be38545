"""Where a model's nodes run, in a line and in full."""

from collections import Counter

from moeware.compiler.canonical import sources
from moeware.compiler.fuse.trace import LAYOUT, is_op
from moeware.compiler.macs import macs
from moeware.compiler.partition import Partition

__all__ = ["describe", "report"]


def describe(parts: Partition) -> str:
    """One line: ``fpga 38/41 nodes, 99.2 % of MACs; host 3 (Gather …)``, with the cause that keeps
    the most MACs on the host, or of equals the most nodes; one that computes, if there is any."""
    counts = report(parts)
    total = counts["fpga_nodes"] + counts["host_nodes"]
    share = 100 * counts["fpga_mac_share"]
    line = f"fpga {counts['fpga_nodes']}/{total} nodes, {share:.1f} % of MACs"
    if not counts["host"]:
        return line
    causes, stakes, followers = parts.causes, Counter(), Counter()
    for entry in counts["host"]:
        stakes[causes[str(entry["node"])]] += entry["macs"]
        followers[causes[str(entry["node"])]] += 1
    computing = {str(node.name) for step in parts.steps for node in step.nodes
                 if not is_op(node, *LAYOUT)}
    cause = max(followers, key=lambda each: (each.node in computing, stakes[each], followers[each]))
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
