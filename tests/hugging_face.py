"""Small models of the transformers library with random weights: what users' mixtures look like.

The library takes seconds to import, so it is imported where a model is made.
"""

VOCABULARY, TOKENS = 64, 8
_SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
              bos_token_id=1, eos_token_id=2, pad_token_id=0)
_DEEPSEEK = _SIZES | dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
                          n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=0,
                          kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
                          v_head_dim=8, n_group=2, topk_group=1)
# Name: configuration class, and what it takes.
CONFIGS = {
    "mixtral": ("MixtralConfig", _SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("OlmoeConfig", _SIZES | dict(num_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": ("Qwen2MoeConfig", _SIZES | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40)),
    "qwen3-moe": ("Qwen3MoeConfig", _SIZES | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)),
    "phi-moe": ("PhimoeConfig", _SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v2": ("DeepseekV2Config", _DEEPSEEK | dict(topk_method="group_limited_greedy")),
    "deepseek-v3": ("DeepseekV3Config", _DEEPSEEK),
}


def language_model(name: str, **changes):
    """A causal language model as its library makes it, in training mode."""
    import transformers
    kind, sizes = CONFIGS[name]
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**sizes | changes))


def image_model():
    """A vision transformer with a classifier, for images [3, 8, 12]."""
    import transformers
    return transformers.AutoModelForImageClassification.from_config(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        image_size=(8, 12), patch_size=4, num_labels=5))
