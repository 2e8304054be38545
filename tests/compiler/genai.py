"""Language models as onnxruntime-genai's model builder writes them, with random weights: one input of
tokens, operators of ONNX Runtime's domain, the attention mask and a past without elements as constants.

Its graph of a layer: SkipSimplifiedLayerNormalization with the stream as its fourth output,
GroupQueryAttention behind one product of queries, keys and values or behind three, lengths computed
from the mask, ``Sigmoid`` and ``Mul``, or MoE behind a product whose result is reshaped to rows.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.compiler.contrib import packed, quantised

__all__ = ["VOCABULARY", "Sizes", "write"]

VOCABULARY = 40
_OWN = "com.microsoft"


@dataclass(frozen=True)
class Sizes:
    """What a file holds.

    rotary : "inside" the attention, "apart", or "" for none; part : of a head that is turned; long : caches
    are chosen by the length, as LongRoPE does;
    packed : queries, keys and values of one product; qk_norm : of each head;
    attention : "group" (GroupQueryAttention) or "multi" (MultiHeadAttention with a mask);
    bits : of the products' weights in MatMulNBits, 0 for floats; qdq : DequantizeLinear in its place;
    experts : 0 for a dense network; gated : of experts; expert_bits : of QMoE, 0 for MoE;
    past : a constant past without elements; presents : whether keys and values are outputs;
    embedded : the input is the embedding of tokens; last : logits are of the last token only.
    """

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    inner: int = 48
    tokens: int = 9
    rotary: str = "inside"
    interleaved: int = 0
    part: float = 1.0
    long: bool = False
    packed: bool = True
    bias: bool = False
    qk_norm: bool = False
    attention: str = "group"
    window: int = -1
    function: str = "silu"
    bits: int = 0
    block: int = 32
    zeros: str = ""  # of weights: "packed", "floats" or none
    accuracy: int = 0
    tied: bool = False
    qdq: bool = False
    experts: int = 0
    chosen: int = 2
    gated: bool = True
    normalise: int = 1
    expert_bits: int = 0
    past: bool = True
    presents: bool = False
    embedded: bool = False
    last: bool = False
    mask: tuple[int, ...] | None = None  # ones where None
    opset: int = 21


def write(path, sizes=Sizes(), seed=0):
    """Write the model of ``sizes`` to ``path``, an input ``input_ids`` and an output ``logits``."""
    writer = _Writer(sizes, seed)
    writer.model()
    onnx.save(writer.proto(), str(path))
    return path


class _Writer:
    def __init__(self, sizes: Sizes, seed: int):
        self.sizes, self.random = sizes, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.outputs = {"logits": (1, 1 if sizes.last else sizes.tokens, VOCABULARY)}

    def proto(self):
        sizes = self.sizes
        tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, (1, sizes.tokens))
        if sizes.embedded:
            shape = (1, sizes.tokens, sizes.hidden)
            tokens = helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, shape)
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                   for name, shape in self.outputs.items()]
        graph = helper.make_graph(self.nodes, "main_graph", [tokens], outputs, [*self.weights.values()])
        opsets = [helper.make_opsetid("", sizes.opset), helper.make_opsetid(_OWN, 1)]
        return helper.make_model(graph, ir_version=10, opset_imports=opsets)

    def constant(self, name, array):
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def integer(self, value, kind=np.int64):
        return self.constant(f"/model/constants/{np.dtype(kind).name}/{value}", np.array(value, kind))

    def draw(self, *shape, width=None):
        width = shape[-1] ** -0.5 if width is None else width
        return (self.random.normal(size=shape) * width).astype(np.float32)

    def node(self, operator, name, *inputs, outputs=None, domain="", **attributes):
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(
            helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes)
        )
        return outputs[0]

    def product(self, name, x, weight, bias=None, output=""):
        """``weight`` [N, K] in the form of the file."""
        sizes, outputs = self.sizes, [output] if output else None
        rows, columns = weight.shape
        if not sizes.bits:
            y = self.node("MatMul", name, x, self.constant(f"{name}.weight", weight.T), outputs=outputs)
        elif sizes.qdq:
            y = self.dequantised_product(name, x, weight, outputs)
        else:
            stored = [self.constant(f"{name}.{part}", array)
                      for part, array in self.stored(weight).items()]
            y = self.node("MatMulNBits", f"{name}NBits", x, *stored, outputs=outputs, domain=_OWN, N=rows,
                          K=columns, bits=sizes.bits, block_size=sizes.block,
                          accuracy_level=sizes.accuracy)
        if bias is None:
            return y
        return self.node("Add", f"{name}/Add", y, self.constant(f"{name}.bias", bias))

    def blocks(self, weight):
        """(integers [N, K], scales [N, blocks], zero points or None)."""
        sizes = self.sizes
        found = quantised(weight[None], sizes.bits, sizes.block, bool(sizes.zeros))
        return [None if each is None else each[0] for each in found]

    def stored(self, weight):
        """Inputs of MatMulNBits."""
        integers, scale, zero = self.blocks(weight)
        whole = np.pad(integers, ((0, 0), (0, -integers.shape[1] % self.sizes.block)))
        parts = whole.reshape(*scale.shape, -1)
        found = {"qweight": packed(parts, self.sizes.bits), "scales": scale}
        if zero is not None:
            as_bytes = self.sizes.zeros == "packed"
            # Zero points of the type of the scales may lie between integers.
            floats = zero + np.float32(0.25)
            found["qzeros"] = packed(zero, self.sizes.bits) if as_bytes else floats
        return found

    def dequantised_product(self, name, x, weight, outputs):
        sizes = self.sizes
        integers, scale, zero = self.blocks(weight)
        kind = {4: TensorProto.UINT4, 8: TensorProto.UINT8}[sizes.bits]
        zero = np.full(scale.shape, 1 << (sizes.bits - 1)) if zero is None else zero
        arrays = {"qweight": integers, "qzeros": zero}
        for part, array in arrays.items():
            tensor = helper.make_tensor(f"{name}.{part}", kind, array.shape, array.reshape(-1))
            self.weights[tensor.name] = tensor
        floats = self.node("DequantizeLinear", f"{name}/DequantizeLinear", f"{name}.qweight",
                           self.constant(f"{name}.scales", scale), f"{name}.qzeros", axis=-1,
                           block_size=sizes.block)
        turned = self.node("Transpose", f"{name}/Transpose", floats, perm=[1, 0])
        return self.node("MatMul", name, x, turned, outputs=outputs)

    def model(self):
        sizes = self.sizes
        self.lengths()
        table = self.draw(VOCABULARY, sizes.hidden, width=1.0)
        stream = "inputs_embeds" if sizes.embedded else self.embedding(table)
        skip = None
        for layer in range(sizes.layers):
            base = f"/model/layers.{layer}"
            y, stream = self.norm(f"{base}/input_layernorm", stream, skip)
            skip = self.attention(base, layer, y)
            y, stream = self.norm(f"{base}/post_attention_layernorm", stream, skip)
            skip = self.mixture(base, y) if sizes.experts else self.network(base, y)
        y, _ = self.norm("/model/final_norm", stream, skip, last=True)
        if sizes.last:
            y = self.node("Gather", "/lm_head/prune/Gather", y, self.integer(-1), axis=1)
            y = self.node("Unsqueeze", "/lm_head/prune/Unsqueeze", y, self.integer([1]))
        self.product("/lm_head/MatMul", y, table, output="logits")

    def embedding(self, table):
        sizes, name = self.sizes, "/model/embed_tokens"
        if not sizes.tied:
            return self.node("Gather", f"{name}/Gather", self.constant(f"{name}.weight", table),
                             "input_ids")
        stored = {part: self.constant(f"/lm_head/MatMul.{part}", array)
                  for part, array in self.stored(table).items()}
        width = sizes.hidden * sizes.bits // 8
        rows = self.node("Reshape", f"{name}/Reshape", stored["qweight"],
                         self.integer([VOCABULARY, width]))
        zeros = [stored["qzeros"]] if sizes.zeros else []
        return self.node("GatherBlockQuantized", f"{name}/GatherBlockQuantized", rows, "input_ids",
                         stored["scales"], *zeros, domain=_OWN, bits=sizes.bits, gather_axis=0,
                         quantize_axis=1, block_size=sizes.block)

    def norm(self, name, stream, skip, last=False):
        """(normalised, the stream)."""
        gamma = self.constant(f"{name}.weight", 1 + self.draw(self.sizes.hidden, width=0.3))
        if skip is None:
            y = self.node("SimplifiedLayerNormalization", f"{name}/LayerNorm", stream, gamma, axis=-1,
                          epsilon=1e-5, stash_type=1)
            return y, stream
        outputs = [f"{name}/output_0", *([] if last else ["", "", f"{name}/output_3"])]
        y = self.node("SkipSimplifiedLayerNormalization", f"{name}/SkipLayerNorm", stream, skip, gamma,
                      outputs=outputs, domain=_OWN, epsilon=1e-5)
        return y, outputs[-1]

    def lengths(self):
        """What GroupQueryAttention reads, of the mask."""
        base = "/model/attn_mask_reformat/attn_mask_subgraph"
        mask = np.array([self.sizes.mask or (1,) * self.sizes.tokens])
        mask = self.constant("attention_mask", mask.astype(np.int64))
        total = self.node("ReduceSum", f"{base}/ReduceSum", mask, self.integer([1]), keepdims=0)
        last = self.node("Sub", f"{base}/Sub", total, self.integer([1]))
        shape = self.node("Shape", f"{base}/Shape", mask)
        length = self.node("Gather", f"{base}/Gather", shape, self.integer(1), axis=0)
        self.last, self.length = (
            self.node("Cast", f"{name}/Cast", value, to=TensorProto.INT32)
            for name, value in ((f"{base}/Sub", last), (f"{base}/Gather", length))
        )

    def caches(self):
        names, (cos, sin) = ("cos_cache", "sin_cache"), self.angles(100.0)
        if not self.sizes.long:
            return [self.constant(name, array) for name, array in zip(names, (cos, sin))]
        if not any(node.op_type == "If" for node in self.nodes):
            base = "/model/rotemb_caches_subgraph"
            count = "/model/attn_mask_reformat/attn_mask_subgraph/Gather/output_0"
            longer = self.node("Greater", f"{base}/Greater", count, self.integer(2 * self.sizes.tokens))
            branches = {}
            for branch, arrays in (("then", self.angles(7.0)), ("else", (cos, sin))):
                nodes = [helper.make_node("Constant", [], [f"{name}_{branch}"],
                                          value=numpy_helper.from_array(array))
                         for name, array in zip(names, arrays)]
                outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, array.shape)
                           for node, array in zip(nodes, arrays)]
                branches[f"{branch}_branch"] = helper.make_graph(nodes, branch, [], outputs)
            self.node("If", f"{base}/If", longer, outputs=list(names), **branches)
        return list(names)

    def causal_mask(self):
        """What MultiHeadAttention adds to scores, [1, heads, tokens, tokens], of mask and input."""
        base, least = "/model/attn_mask_reformat", self.number(np.finfo(np.float32).min)
        name = lambda operator: f"{base}/{operator}_{len(self.nodes)}"
        add = lambda operator, *inputs, **more: self.node(operator, name(operator), *inputs, **more)
        source = "inputs_embeds" if self.sizes.embedded else "input_ids"
        batch, count = (add("Gather", add("Shape", source), self.integer(axis), axis=0) for axis in (0, 1))
        batch, count = (add("Unsqueeze", each, self.integer([0])) for each in (batch, count))
        fill = helper.make_tensor("least", TensorProto.FLOAT, [1], [np.finfo(np.float32).min])
        hidden = add("ConstantOfShape", add("Concat", count, count, axis=0), value=fill)
        last = [self.integer([-1]), self.integer([np.iinfo(np.int64).max]), self.integer([0])]
        length = add("Squeeze", add("Slice", add("Shape", hidden), *last), self.integer([0]))
        places = add("Range", self.integer(0), length, self.integer(1))
        column = add("Concat", add("Unsqueeze", length, self.integer([0])), self.integer([1]), axis=0)
        later = add("Reshape", add("Add", places, self.integer(1)), column)
        causal = add("Where", add("Less", places, later), self.number(0), hidden)
        shape = add("Concat", batch, self.integer([1]), count, count, axis=0)
        ones = add("ConstantOfShape", add("Shape", shape),
                   value=helper.make_tensor("one", TensorProto.INT64, [1], [1]))
        shape = add("Where", add("Equal", shape, add("Mul", ones, self.integer(-1))), ones, shape)
        causal = add("Expand", self.unsqueezed(name, causal, 0, 1), shape)
        seen = add("Expand", self.unsqueezed(name, "attention_mask", 1, 2), shape)
        unseen = add("Sub", self.number(1), add("Cast", seen, to=TensorProto.FLOAT))
        padding = add("Where", add("Cast", unseen, to=TensorProto.BOOL), least, unseen)
        return add("Tile", add("Add", padding, causal), self.integer([1, self.sizes.heads, 1, 1]))

    def unsqueezed(self, name, value, *axes):
        for axis in axes:
            value = self.node("Unsqueeze", name("Unsqueeze"), value, self.integer([axis]))
        return value

    def number(self, value):
        return self.constant(f"/model/constants/FLOAT/{value}", np.float32(value))

    def angles(self, base):
        width, positions = int(self.sizes.dim * self.sizes.part), np.arange(2 * self.sizes.tokens)
        angles = np.outer(positions, base ** (-np.arange(0, width, 2) / width)).astype(np.float32)
        return np.cos(angles), np.sin(angles)

    def projections(self, base, x):
        sizes, counts = self.sizes, (self.sizes.heads, self.sizes.kv_heads, self.sizes.kv_heads)
        weights = [self.draw(count * sizes.dim, sizes.hidden, width=0.3) for count in counts]
        biases = [self.draw(len(weight), width=0.2) if sizes.bias else None for weight in weights]
        if sizes.packed:
            bias = np.concatenate(biases) if sizes.bias else None
            return [self.product(f"{base}/qkv_proj/MatMul", x, np.concatenate(weights), bias), "", ""]
        return [self.product(f"{base}/{part}_proj/MatMul", x, weight, bias)
                for part, weight, bias in zip("qkv", weights, biases)]

    def head_norm(self, name, x, heads):
        rows = self.node("Reshape", f"{name}/Reshape_1", x, self.integer([0, -1, self.sizes.dim]))
        gamma = self.constant(f"{name}.weight", 1 + self.draw(self.sizes.dim, width=0.3))
        rows = self.node("SimplifiedLayerNormalization", f"{name}/SimplifiedLayerNormalization", rows,
                         gamma, axis=-1, epsilon=1e-5, stash_type=1)
        return self.node("Reshape", f"{name}/Reshape_2", rows,
                         self.integer([0, -1, heads * self.sizes.dim]))

    def attention(self, base, layer, x):
        sizes, base = self.sizes, f"{base}/attn"
        rows = self.projections(base, x)
        counts = {"q": (0, sizes.heads), "k": (1, sizes.kv_heads)}
        for part, (place, heads) in counts.items():
            if sizes.qk_norm:
                rows[place] = self.head_norm(f"{base}/{part}_norm", rows[place], heads)
            if sizes.rotary == "apart":
                positions = self.constant("position_ids", np.arange(sizes.tokens)[None])
                whole = sizes.part == 1.0
                rows[place] = self.node(
                    "RotaryEmbedding", f"{base}/{part}_rotary/RotaryEmbedding", rows[place], positions,
                    *self.caches(), domain=_OWN, interleaved=sizes.interleaved,
                    num_heads=0 if whole else heads,
                    rotary_embedding_dim=0 if whole else int(sizes.dim * sizes.part))
        past = ["", ""]
        if sizes.past:
            empty = np.zeros((1, sizes.kv_heads, 0, sizes.dim), np.float32)
            past = [self.constant(f"past_key_values.{layer}.{part}", empty) for part in ("key", "value")]
        presents = [f"present.{layer}.{part}" for part in ("key", "value")]
        y = f"{base}/{sizes.attention}/output_0"
        if sizes.attention == "group":
            inside = sizes.rotary == "inside"
            self.node(
                "GroupQueryAttention", f"{base}/GroupQueryAttention", *rows, *past, self.last,
                self.length, *(self.caches() if inside else ["", ""]), "", "", "",
                outputs=[y, *presents], domain=_OWN, num_heads=sizes.heads,
                kv_num_heads=sizes.kv_heads, scale=sizes.dim**-0.5, local_window_size=sizes.window,
                softcap=0.0, do_rotary=int(inside), rotary_interleaved=sizes.interleaved)
        else:
            if layer == 0:
                self.mask = self.causal_mask()
            self.node(
                "MultiHeadAttention", f"{base}/MultiHeadAttention", *rows, "", "", self.mask, *past, outputs=[y, *presents], domain=_OWN,
                num_heads=sizes.heads, scale=sizes.dim**-0.5, unidirectional=0)
        if sizes.presents:
            shape = (1, sizes.kv_heads, sizes.tokens, sizes.dim)
            self.outputs |= dict.fromkeys(presents, shape)
        weight = self.draw(sizes.hidden, sizes.heads * sizes.dim, width=0.2)
        return self.product(f"{base}/o_proj/MatMul", y, weight)

    def network(self, base, x):
        sizes, base = self.sizes, f"{base}/mlp"
        up, gate = (self.product(f"{base}/{name}_proj/MatMul", x, self.draw(sizes.inner, sizes.hidden))
                    for name in ("up", "gate"))
        if sizes.function == "silu":
            sigmoid = self.node("Sigmoid", f"{base}/act_fn/Sigmoid", gate)
            gate = self.node("Mul", f"{base}/act_fn/Mul", gate, sigmoid)
        else:
            gate = self.node(sizes.function, f"{base}/act_fn/{sizes.function}", gate, domain=_OWN)
        y = self.node("Mul", f"{base}/Mul", gate, up)
        return self.product(f"{base}/down_proj/MatMul", y, self.draw(sizes.hidden, sizes.inner))

    def mixture(self, base, x):
        sizes, base = self.sizes, f"{base}/moe"
        logits = self.product(f"{base}/gate/MatMul", x, self.draw(sizes.experts, sizes.hidden, width=0.5))
        shape = self.node("Shape", f"{base}/gate/Shape", logits)
        count = self.node("Gather", f"{base}/gate/Gather", shape, self.integer(2), axis=0)
        count = self.node("Unsqueeze", f"{base}/gate/Unsqueeze", count, self.integer([0]))
        shape = self.node("Concat", f"{base}/gate/Concat", self.integer([-1]), count, axis=0)
        logits = self.node("Reshape", f"{base}/gate/Reshape", logits, shape)
        first = self.draw(sizes.experts, (1 + sizes.gated) * sizes.inner, sizes.hidden)
        second = self.draw(sizes.experts, sizes.hidden, sizes.inner)
        inputs = []
        for name, weight in (("weight_1", first), ("weight_2", second)):
            inputs += self.expert_weight(f"{base}.{name}", weight)
        attributes = dict(activation_type="swiglu" if sizes.gated else sizes.function,
                          swiglu_fusion=int(sizes.gated), activation_alpha=1.0, activation_beta=0.0,
                          k=sizes.chosen, normalize_routing_weights=sizes.normalise,
                          use_sparse_mixer=0)
        if sizes.expert_bits:
            attributes |= dict(expert_weight_bits=sizes.expert_bits, block_size=sizes.block)
        return self.node("QMoE" if sizes.expert_bits else "MoE", base, x, logits, *inputs, domain=_OWN,
                         **attributes)

    def expert_weight(self, name, weight):
        """Inputs of MoE or QMoE for one layer, without bias."""
        sizes = self.sizes
        if not sizes.expert_bits:
            return [self.constant(name, weight), ""]
        integers, scale, _ = quantised(weight, sizes.expert_bits, sizes.block)
        return [self.constant(name, packed(integers, sizes.expert_bits)),
                self.constant(f"{name}.scales", scale), ""]
