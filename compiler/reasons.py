"""Why nodes run on the host, in words: a rule that the node breaks, and a remedy."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moeware.compiler.canonical import REASON, is_canonical

__all__ = ["Reason", "follows", "no_form", "operator_name", "plain_reason", "reason_of"]


_INTEGERS = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits",
)  # fmt: skip


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
