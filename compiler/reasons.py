"""Why nodes run on the host, in words: a rule that the node breaks, and a remedy."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moeware.compiler.canonical import REASON, is_canonical
from moeware.compiler.fuse.trace import LAYOUT, is_op
from moeware.compiler.interface import LEAVE_OUT, RANGE

__all__ = ["Reason", "follows", "no_form", "operator_name", "plain_reason", "reason_of"]


_INTEGERS = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
)  # fmt: skip


_WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_NEAR = 200  # nodes that are looked at for what a node depends on
_ATTENTION = (
    "that no rule recognises; write it as scaled_dot_product_attention of three Linears, causal or "
    "without a mask (nor a bias by position); queries and keys may pass RMSNorm and rotary embeddings, "
    "no LayerNorm"
)


@dataclass(frozen=True)
class Reason:
    """Why node `node` runs on the host, and what to change in the model.

    follows: the host node that it is there for, and would not be without; None for a cause.
    """

    node: str
    rule: str
    remedy: str
    follows: str | None = None

    def __str__(self) -> str:
        return f"node `{self.node}`: {self.rule}; {self.remedy}"


def reason_of(node: ir.Node, text: str) -> Reason:
    """The reason of a cause, from a text "rule; remedy"."""
    rule, _, remedy = text.partition("; ")
    return Reason(str(node.name), rule, remedy)


def follows(node: ir.Node, cause: ir.Node, rule: str) -> Reason:
    """The reason of a node that only follows another one to the host."""
    return Reason(str(node.name), rule, f"repair `{cause.name}` first", str(cause.name))


def plain_reason(node: ir.Node) -> str:
    """Of a node that no rule of the accelerator is for: "rule; remedy"."""
    operands = [value for value in node.inputs if value is not None]
    if REASON in node.metadata_props:
        return node.metadata_props[REASON]
    settings = _settings(node)
    if settings:
        return (
            f"{operator_name(node)} depends on {' and '.join(map(repr, settings))}, integers that are not "
            f"known before; fix what is the same in every run ({' '.join(map(_fixed, settings))})"
        )
    shown = _shown(node)
    if shown is not None:
        return (
            f"{shown} is an output of the model inside of a block, whose values stay on the accelerator; "
            f"{LEAVE_OUT}"
        )
    if node.op_type in _INTEGERS or node.op_type.startswith(("QLinear", "QAttention")):
        return (
            f"{node.op_type} works on integers whose scales are no constants, or in a form that is "
            f"not read; export in QDQ format (static, quant_format=QuantFormat.QDQ)"
        )
    if node.op_type in ("Attention", "MultiHeadAttention") and node.domain == "com.microsoft":
        return (
            f"{node.op_type} of ONNX Runtime is read with a bias and what is added to scores, and without a "
            f"mask of padding, a past or rotary embedding inside; export it in that form"
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
            f"softmax, top-k and the experts as two layers with one function between, or three if "
            f"gated"
        )
    if node.op_type == "Softmax" and any(
        reader.op_type in ("MatMul", "Einsum") for reader in node.outputs[0].consumers()
    ):
        return f"Softmax of an attention {_ATTENTION}"
    if operator_name(node) == "Attention":
        return f"Attention {_ATTENTION}"
    if node.op_type in ("ReduceMean", "Sqrt", "Rsqrt"):
        return (
            f"{node.op_type} outside a recognised normalisation or mean over tokens; normalise the "
            f"last axis, with epsilon added under the root"
        )
    return no_form([operator_name(node)])


def _settings(node: ir.Node) -> list[str]:
    """Inputs of the model, of integers, that come to ``node`` without a product or a table between, as
    masks and positions do."""
    seen: dict[ir.Node, None] = {node: None}
    names: set[str] = set()
    pending = [node]
    while pending and len(seen) < _NEAR:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in seen and not _makes_features(producer):
                seen[producer] = None
                pending.append(producer)
            elif value is not None and value.is_graph_input() and value.dtype in _WHOLE:
                names.add(str(value.name))
    return sorted(names) if not _makes_features(node) else []


def _fixed(name: str) -> str:
    """The option that makes a constant of an input, as of a sequence without padding."""
    return f"--fix {name}={RANGE if 'position' in name else 1}"


def _makes_features(node: ir.Node) -> bool:
    table = node.op_type == "Gather" and node.inputs[0].const_value is not None
    return table or is_canonical(node) or node.op_type in ("MatMul", "Gemm", "Einsum", "Conv")


def _shown(node: ir.Node) -> str | None:
    """The output of the model that layout operators from ``node`` on make of a value which the model itself
    reads, too."""
    root, reached = node.inputs[0], [node]
    while root is not None and is_op(root.producer(), *LAYOUT):
        root = root.producer().inputs[0]  # type: ignore[union-attr]
    if not is_op(node, *LAYOUT) or root is None or all(is_op(user, *LAYOUT) for user in root.consumers()):
        return None
    for each in reached:
        for value in each.outputs:
            if value.is_graph_output():
                return str(value.name)
            reached += [user for user in value.consumers() if is_op(user, *LAYOUT)]
    return None


def no_form(operators: Sequence[str]) -> str:
    """The reason "rule; remedy" of operators that no rule reads, of whatever form."""
    return (
        f"{', '.join(operators)} {'has' if len(operators) == 1 else 'have'} no form on the "
        f"accelerator; leave it out of the model or accept that the host runs it"
    )


def operator_name(node: ir.Node) -> str:
    """Operator of ``node``, with its domain where it is neither a standard nor a canonical one."""
    plain = is_canonical(node) or node.domain in ("", "ai.onnx")
    return node.op_type if plain else f"{node.domain}.{node.op_type}"
