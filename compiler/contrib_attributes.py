"""Attributes of ONNX Runtime's operators, of which the ONNX checker knows nothing."""

import onnx

from moeware.compiler.errors import CompileError

__all__ = ["check_attributes"]


def check_attributes(node: onnx.NodeProto) -> None:
    """Raise ``CompileError`` for an attribute of another type than its operator has, and for a switch
    that is neither 0 nor 1, which kernels read in different ways."""
    for attribute in node.attribute:
        wanted = _TYPES.get(attribute.name, attribute.type)
        if attribute.type != wanted:
            found, expected = (onnx.AttributeProto.AttributeType.Name(each)
                               for each in (attribute.type, wanted))
            raise CompileError(
                f"Attribute {attribute.name!r} of node {node.name!r} ({node.op_type}) must be {expected}, "
                f"not {found}; repair the node or export the model again"
            )
        if attribute.name in _SWITCHES and attribute.i not in (0, 1):
            raise CompileError(
                f"Attribute {attribute.name!r} of node {node.name!r} ({node.op_type}) must be 0 or 1, not "
                f"{attribute.i}; repair the node or export the model again"
            )


_SWITCHES = (
    "do_rotary", "interleaved", "normalize_routing_weights", "past_present_share_buffer",
    "rotary_interleaved", "transA", "transB", "transBatchA", "transBatchB", "unidirectional",
    "use_sparse_mixer",
)  # fmt: skip


_TYPES = {
    name: kind
    for kind, names in {
        onnx.AttributeProto.INT: (
            "K N accuracy_level axis bits block_size causal do_rotary expert_weight_bits "
            "fc1_expert_weight_bits fc2_expert_weight_bits gather_axis interleaved k kv_num_heads "
            "local_window_size normalize_routing_weights num_heads past_present_share_buffer qk_output "
            "quantize_axis rotary_embedding_dim rotary_interleaved sliding_window_cache smooth_softmax "
            "swiglu_fusion transA transB transBatchA transBatchB unidirectional use_sparse_mixer "
            "weight_prepacked weights_prepacked"
        ),
        onnx.AttributeProto.FLOAT: (
            "activation_alpha activation_beta alpha epsilon scale softcap swiglu_limit"
        ),
        onnx.AttributeProto.STRING: "activation activation_type k_quant_type quant_type v_quant_type",
        onnx.AttributeProto.INTS: "qkv_hidden_sizes",
    }.items()
    for name in names.split()
}
