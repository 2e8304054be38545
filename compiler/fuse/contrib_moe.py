"""``com.microsoft.MoE`` and ``QMoE``: a mixture of experts in one node of ONNX Runtime's domain.

The documentation leaves open what the attributes do, and versions differ. So the node runs on
random rows and logits, and the canonical form that gives the same values is taken. Measured with
ONNX Runtime 1.32 on a CPU:

- ``router_probs`` holds logits: softmax is applied to it, over all experts. MoE divides the chosen
  weights by their sum where ``normalize_routing_weights`` says so; QMoE always does;
- weights are ``[E, out, in]``; ``gelu`` is the tanh form; ``swiglu`` is silu of one half of the first
  layer's rows times the other, the rows of both in turns where ``swiglu_fusion`` is 1;
- ``use_sparse_mixer`` changes nothing there, but does on other providers: it is refused.

What is refused stays a plain node, with the reason in its metadata for `partition`.
"""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from moeware.compiler.canonical import REASON
from moeware.compiler.fuse.contrib_weights import Refused, bits_of, expert_weights
from moeware.compiler.fuse.linear import LinearMatch, match_linear
from moeware.compiler.fuse.moe import replace_moe
from moeware.compiler.fuse.moe_proof import TOLERANCE, Proof, nearest_form
from moeware.compiler.fuse.moe_samples import sample_rows, sample_scores
from moeware.compiler.fuse.moe_weights import ExpertWeights
from moeware.compiler.fuse.rebuild import flat_root
from moeware.compiler.fuse.routers import plain_forms
from moeware.compiler.fuse.trace import (
    attribute,
    is_op,
    operand,
    same_elements,
    size,
    static_shape,
    traces,
)

CONTRIB = "com.microsoft"

# The canonical function of each activation_type.
_FUNCTIONS = {"relu": "relu", "gelu": "gelu_tanh", "silu": "silu", "swiglu": "silu"}
_ROWS = 32  # of a proof, at least
_NEEDED = {"MoE": (0, 1, 2, 4), "QMoE": (0, 1, 2, 3, 5, 6)}
_LATER_INPUTS = {"MoE": ((6, "fc3_experts_weights"),),
                 "QMoE": ((8, "fc3_experts_weights"), (14, "router_weights"),
                          *((place, "a further scale") for place in range(15, 24)))}  # fmt: skip


def is_contrib_moe(node: ir.Node) -> bool:
    """Whether ``node`` is a mixture of experts of ONNX Runtime's domain."""
    return node.domain == CONTRIB and node.op_type in _LATER_INPUTS


def fuse_contrib_moe(model: ir.Model) -> None:
    """Replace each proven ``MoE`` and ``QMoE`` by ``Route`` and ``Experts`` or ``GatedExperts``.

    Forms
    -----
    Route, Experts, GatedExperts
        - ``com.microsoft.MoE``; ``com.microsoft.QMoE`` of 4 or 8 bits, per row or per block
    """
    for node in list(model.graph):
        if not is_contrib_moe(node):
            continue
        try:
            _fuse(model, node)
        except Refused as reason:
            node.metadata_props[REASON] = str(reason)


def _fuse(model: ir.Model, node: ir.Node) -> None:
    _check_form(node)
    x, logits = node.inputs[:2]
    router = _router(logits)
    shape = static_shape(x)
    if shape is None:
        raise Refused(f"input must be rows of fixed number, not {x.shape}; export with a fixed size")
    features = shape[-1]
    weights = expert_weights(node, features)
    experts = len(weights.w1)
    if router.weight.shape != (experts, features) or size(router.x) != size(x):
        raise Refused(
            f"router_probs must be {experts} logits of the rows of the input, not a Linear of "
            f"shape {list(router.weight.shape)} on {size(router.x)} values; route and apply the "
            f"experts on the same rows"
        )
    proof = _prove(node, weights)
    tokens = size(x) // features
    replace_moe(model, x, node.outputs[0], router, tokens, proof)


def _check_form(node: ir.Node) -> None:
    """Refuse what the canonical operator has no form for, whatever ONNX Runtime does with it."""
    activation = attribute(node, "activation_type", "relu")
    if activation not in _FUNCTIONS:
        raise Refused(
            f"activation_type={activation!r} has no form on the accelerator, whose experts are two "
            f"layers with {', '.join(_FUNCTIONS)} between; train the experts with one of these"
        )
    fusion, limit = attribute(node, "swiglu_fusion", 0), attribute(node, "swiglu_limit", np.inf)
    if activation == "swiglu" and fusion != 1:
        raise Refused(
            f"swiglu_fusion={fusion} is a layout of one provider; export with the rows of gate and "
            f"factor in turns (swiglu_fusion=1)"
        )
    if activation == "swiglu" and not np.isposinf(limit):
        raise Refused(
            f"swiglu_limit={limit:g} bounds both factors of hidden values, for which the accelerator has "
            f"no form; train without it, or accept that the host runs it"
        )
    if attribute(node, "use_sparse_mixer", 0):
        raise Refused(
            "use_sparse_mixer=1 is another router than softmax and top-k, and not the same one on "
            "every provider; export with use_sparse_mixer=0"
        )
    for place, name in _LATER_INPUTS[node.op_type]:
        if operand(node, place) is not None:
            raise Refused(
                f"{name} (input {place}) has no form on the accelerator, whose experts are two "
                f"layers weighted by softmax; leave it out"
            )
    if attribute(node, "quant_type", "int") != "int":
        raise Refused(
            f"quant_type={attribute(node, 'quant_type', 'int')!r} is no grid of integers; "
            f"quantise with quant_type='int', or export the experts in float as MoE"
        )
    if attribute(node, "weights_prepacked", 0) == 1:
        raise Refused(
            "weights_prepacked=1 is the layout of one provider; export with weights_prepacked=0"
        )
    absent = [place for place in _NEEDED[node.op_type] if operand(node, place) is None]
    if absent:
        raise Refused(f"input {absent[0]} must be there, not left out; export the node again")


def _router(logits: ir.Value) -> LinearMatch:
    """The linear map that makes the logits."""
    for trace in traces(logits):
        router = match_linear(trace.root) if same_elements(trace) else None
        if router is not None:
            return router
    before = flat_root(logits).producer()
    if is_op(before, "Softmax"):
        raise Refused(
            "router_probs must hold the logits of a Linear, not the result of Softmax, as the "
            "operator itself applies softmax; remove the Softmax in front"
        )
    raise Refused(
        f"router_probs must hold the logits of a Linear, not the result of "
        f"{before.op_type if before else 'no node'}; route with one linear gate"
    )


def _prove(node: ir.Node, weights: ExpertWeights) -> Proof:
    """The canonical form that computes what ``node`` does."""
    generator = np.random.default_rng(7)
    count = max(_ROWS, len(weights.w1))
    rows = sample_rows(generator, count, weights)
    wanted = "chosen" if attribute(node, "normalize_routing_weights", 0) else "all"
    routers = plain_forms(len(weights.w1), attribute(node, "k", 1))
    routers.sort(key=lambda router: router.attributes["normalise"] != wanted)
    scores = sample_scores(generator, count, routers[0])
    form = nearest_form(
        rows,
        scores,
        _run(node, rows, scores),
        [weights],
        routers,
        [_FUNCTIONS[attribute(node, "activation_type", "relu")]],
    )
    if form.error < _tolerance(node):
        return Proof(weights, form.function, form.router, [node])
    raise Refused(
        "ONNX Runtime computes something else with these attributes than softmax, top-k and "
        "experts of two layers; write the experts as plain operators"
    )


def _tolerance(node: ir.Node) -> float:
    """Difference that the kernel's own rounding may make, in proportion as `Form.error`."""
    blocks = node.op_type == "QMoE" and len(node.inputs[3].shape) == 3
    if blocks and (bits_of(node, 0) == 8 or attribute(node, "accuracy_level", 0) == 4):
        return 3e-2  # the kernel rounds activations to int8
    return TOLERANCE


def _run(node: ir.Node, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``node`` alone in ONNX Runtime."""
    feeds = {"rows": rows.astype(np.float32), "scores": scores.astype(np.float32)}
    proto = ir.to_proto(node)
    proto.input[:2] = list(feeds)
    constants = [value for value in node.inputs[2:] if value is not None]
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
         for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=proto.output[0])],
        [onnx.numpy_helper.from_array(value.const_value.numpy(), value.name)
         for value in dict.fromkeys(constants)],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(CONTRIB, 1)]
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=opsets)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, feeds)[0]
    except Exception as error:  # ONNX Runtime raises many types
        # A reason ends at its first semicolon, where the remedy begins.
        message = str(error).splitlines()[0].split("Status Message: ")[-1].replace(";", ",")
        raise Refused(
            f"ONNX Runtime does not run it ({message}); write the experts as plain operators"
        ) from error
