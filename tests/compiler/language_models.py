"""Tiny language models of Hugging Face with random weights, and their exports for the tests."""

import logging

import torch
import transformers
from torch import nn

from tests.compiler.exports import export_module

VOCABULARY, HIDDEN, LAYERS = 40, 32, 1
SIZES = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
             num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
              first_k_dense_replace=0, n_shared_experts=1)
LATENT = dict(ROUTED, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
              num_key_value_heads=4)

# Name: (class of the configuration, sizes beside `SIZES`).
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=8)),
    "phi": ("PhiConfig", dict(partial_rotary_factor=0.5)),
    "phi3": ("Phi3Config", {}),
    "gemma": ("GemmaConfig", dict(head_dim=8)),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-j": ("GPTJConfig", dict(n_embd=HIDDEN, n_head=4, n_layer=LAYERS, rotary_dim=4,
                                 n_positions=64)),
    "cohere": ("CohereConfig", {}),
    "falcon": ("FalconConfig", dict(multi_query=True, parallel_attn=True, new_decoder_architecture=False,
                                    alibi=False, ffn_hidden_size=48)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("OlmoeConfig", EXPERTS),
    "qwen2-moe": ("Qwen2MoeConfig", dict(EXPERTS, moe_intermediate_size=24,
                                         shared_expert_intermediate_size=20)),
    "qwen3-moe": ("Qwen3MoeConfig", dict(EXPERTS, moe_intermediate_size=24, head_dim=8,
                                         norm_topk_prob=True)),
    "phi-moe": ("PhimoeConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "glm4-moe": ("Glm4MoeConfig", dict(ROUTED, n_group=2, topk_group=1, head_dim=8)),
    "dots1": ("Dots1Config", dict(ROUTED, n_routed_experts=16, n_group=4, topk_group=2, head_dim=8)),
    "minimax-m2": ("MiniMaxM2Config", dict(num_local_experts=4, num_experts_per_tok=2)),
    "youtu": ("YoutuConfig", dict(LATENT, q_lora_rank=24)),
    "minicpm3": ("MiniCPM3Config", dict(LATENT, q_lora_rank=24)),
    "deepseek-v3": ("DeepseekV3Config", dict(LATENT, q_lora_rank=24, n_group=2, topk_group=1)),
}


class Logits(nn.Module):
    """Logits of all tokens, or of the last ``keep``."""

    def __init__(self, model, keep=0):
        super().__init__()
        self.model, self.keep = model, keep

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=self.keep).logits


def build(name, *, attention="eager", seed=0, keep=0, **sizes):
    """The model ``name`` with random weights; ``sizes`` replace those of `MODELS`."""
    config_class, own = MODELS[name]
    config = getattr(transformers, config_class)(**{**SIZES, **own, **sizes})
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    for parameter in model.parameters():
        centre, width = (0.8, 0.3) if parameter.ndim == 1 else (0, 0.15)
        nn.init.normal_(parameter, centre, width)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, 0, 0.1)
    return Logits(model, keep)


def export(model, path, opset=20, tokens=9):
    """Write ``model`` (as `build` makes it) for sequences of ``tokens`` to ``path``."""
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    logging.disable(logging.WARNING)
    try:
        names = {"input_names": ["ids"], "output_names": ["logits"]}
        return export_module(model, (ids,), path, opset, **names)
    finally:
        logging.disable(logging.NOTSET)
