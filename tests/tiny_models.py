"""Tiny models with random weights, one for each way in which architectures differ where planning is concerned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# Widths are multiples of 64 (the 4-bit formats' block), but not all of the products are, so that a block is cut off.
_COMMON = {"vocab_size": 512, "hidden_size": 64, "max_position_embeddings": 512}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}

# name -> (config class, its options, dtype of the checkpoint)
TINY_MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": (
        "LlamaConfig",
        {**_COMMON, **_ATTENTION, "intermediate_size": 128, "num_hidden_layers": 4, "tie_word_embeddings": False},
        "bfloat16",
    ),
    "llama-tied": (
        "LlamaConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "intermediate_size": 200,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "float16",
    ),
    # Conv1D in place of Linear, tied, learned positions, no list of key-value heads.
    "gpt2": ("GPT2Config", {"vocab_size": 512, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512}, "float32"),
    # Experts fused into 3-D parameters; the router and the attention are Linear.
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "head_dim": 16,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
        },
        "bfloat16",
    ),
    "mixtral": (
        "MixtralConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_hidden_layers": 2,
            "sliding_window": None,
        },
        "bfloat16",
    ),
    # A window of 80 in five layers of six, buffers, tied.
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "head_dim": 16,
            "intermediate_size": 128,
            "num_hidden_layers": 7,
            "sliding_window": 80,
        },
        "bfloat16",
    ),
    "mistral": (
        "MistralConfig",
        {**_COMMON, **_ATTENTION, "intermediate_size": 128, "num_hidden_layers": 2, "sliding_window": 200},
        "bfloat16",
    ),
    # A Linear of its own class, which bitsandbytes leaves alone; tied.
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "max_position_embeddings": 512,
        },
        "bfloat16",
    ),
    # Latent attention, a dense layer before the experts, a buffer that stays in float32.
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_COMMON,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
        "bfloat16",
    ),
    # Biases, norms that stay in float32 under float16, a window in every other layer.
    "gpt-oss": (
        "GptOssConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "head_dim": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "sliding_window": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "bfloat16",
    ),
    # Routers and a correction that stay in float32 under both 16-bit types.
    "ernie-moe": (
        "Ernie4_5_MoeConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "num_hidden_layers": 2,
        },
        "bfloat16",
    ),
    # Convolutions with a fixed state beside attention.
    "lfm2": (
        "Lfm2Config",
        {
            **_COMMON,
            **_ATTENTION,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        "bfloat16",
    ),
    # Mamba states beside attention and experts.
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_COMMON,
            **_ATTENTION,
            "intermediate_size": 64,
            "shared_intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        "bfloat16",
    ),
}


def make_tiny_model(name: str, folder: Path) -> None:
    """Save one of them as safetensors, with random weights from a seed of its own."""
    import torch
    import transformers

    class_name, options, dtype = TINY_MODELS[name]
    config = getattr(transformers, class_name)(**options, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
