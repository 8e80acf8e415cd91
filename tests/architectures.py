"""A small config for every architecture that transformers maps to a causal language model.

A config is the library's own default, shrunk: known fields get small values, and lists with an entry a layer are cut so
that every kind of layer stays. What makes an architecture special (experts, windows, latent attention, states, ties) is
thus as its authors set it. OVERRIDES mends the types whose fields contradict each other when they are shrunk this way.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

LAYERS = 4
HEADS = 4

# Field name -> small value. Fields that a config lacks, or leaves at None to be derived, stay as they are.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), 512),
    **dict.fromkeys(("audio_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"), 64),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "attention_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(("dim_model_base", "input_embedding_size", "output_embedding_size", "lru_width"), 64),
    **dict.fromkeys(("backbone_hidden_size", "embedding_dim", "cross_attention_hidden_size", "out_hidden_size"), 64),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "dff",
            "dim_ff",
            "d_inner",
            "feed_forward_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "prefix_dense_intermediate_size",
        ),
        128,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "moe_latent_size",
            "router_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_blocks",
            "depth",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "linear_num_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "global_head_dim",
            "swa_head_dim",
            "d_head",
            "dim_head",
            "attention_head_size",
            "attention_head_dim",
            "kv_channels",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "index_head_dim",
            "indexer_head_dim",
            "mamba_d_head",
            "mamba_head_dim",
            "rotary_dim",
        ),
        16,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank", "hc_lowrank"), 32),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(("index_topk", "indexer_budget"), 16),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_ssm"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ),
        4,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "max_target_positions",
            "max_source_positions",
            "context_length",
            "seq_length",
        ),
        512,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size"), 32
    ),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    "pad_token_id": 2,
}
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads")

# model type -> fields that the rules above get wrong
_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 16, "global_head_dim": 32}
_NO_PER_LAYER_INPUT = {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
_DOTS3_NOTE = {
    **{f"swa_{name}": HEADS for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 32 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
    **{f"swa_{name}": 16 for name in ("qk_nope_head_dim", "v_head_dim")},
}
_QWEN4_EXP = {
    **_INDEXER,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "eos_token_id": 1,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense", "sparse"] * (LAYERS // 2),
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 32},
    },
    "dots3_note_text": _DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4": {"text_config": _PER_LAYER_INPUT, "vision_config": {}, "audio_config": {}},
    "gemma4_assistant": {"text_config": _NO_PER_LAYER_INPUT},
    "gemma4_text": {**_NO_PER_LAYER_INPUT, **_EXPERTS},
    "gemma4_unified": {
        "text_config": _PER_LAYER_INPUT,
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
        "audio_config": {"audio_embed_dim": 64},
    },
    "gemma4_unified_assistant": {"text_config": _NO_PER_LAYER_INPUT},
    "gemma4_unified_text": _PER_LAYER_INPUT,
    "got_ocr2": {
        "vision_config": {"output_channels": 32, "image_size": 128, "mlp_dim": 128, "global_attn_indexes": [1]}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "llama4": {"vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64},
        "vision_config": {"image_size": 56, "crop_size": 56},
    },
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> tuple[str, ...]:
    """Return all types that transformers maps to a causal language model, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def seq2seq_types() -> tuple[str, ...]:
    """Return all types that transformers maps to an encoder-decoder that reads text, sorted."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    found = []
    for name in sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        config_class = CONFIG_MAPPING[name]
        writes_text = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[config_class].main_input_name == "input_ids"
        if writes_text and (name == "encoder-decoder" or getattr(config_class(), "is_encoder_decoder", False)):
            found.append(name)
    return tuple(found)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of a type, small enough for a model of a few hundred kilobytes.

    Raises:
        Exception: Whatever the config class itself has against these values.
    """
    from transformers import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def save_model(model_type: str, folder: Path, *, seq2seq: bool = False) -> int:
    """Save a model with random bfloat16 weights and the config of its type, as it would come from the Hub.

    Args:
        model_type: As transformers names it.
        folder: Where to.
        seq2seq: Save the encoder-decoder of the type.

    Returns:
        Its parameters, tied ones once.

    Raises:
        Exception: Whatever the libraries have against building or saving it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    config = tiny_config(model_type)
    if seq2seq:
        config.is_decoder = False
    config.dtype = torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    config.dtype = torch.bfloat16  # some models keep a few weights in float32 and would say that of all
    config.save_pretrained(folder)  # some classes keep only the text part of it
    return sum(parameter.numel() for parameter in model.parameters())


def _shrink(config_class: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError

    nested = {name: given for name, given in overrides.items() if name in config_class.sub_configs}
    try:
        defaults = config_class()
    except StrictDataclassError:  # some contradict themselves by default
        defaults = config_class(**nested)
    values = vars(defaults)  # what differs from layer to layer cannot be asked for as an attribute
    layers = getattr(defaults, "num_hidden_layers", None)
    heads = values.get("num_attention_heads")
    options: dict[str, Any] = {}
    for name in (field.name for field in fields(config_class)):
        value = values.get(config_class.attribute_map.get(name, name))
        if name in config_class.sub_configs:
            if value is not None or name in nested:
                sub_class = config_class.sub_configs[name] if value is None else type(value)
                options[name] = _shrink(sub_class, nested.get(name, {}))
        elif name == "is_decoder":
            options[name] = True
        elif name in _KEY_VALUE_HEADS and isinstance(value, int):
            options[name] = HEADS if value == heads else min(value, HEADS // 2)
        elif name in _SMALL and value is not None and value != 0:
            options[name] = _SMALL[name]
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers:
            options[name] = _cut(value)
    options.update((name, value) for name, value in overrides.items() if name not in nested)
    return config_class(**options)


def _cut(values: Any) -> list[Any]:
    """Return a list of LAYERS entries in which every kind of layer occurs, in the order in which they come first."""
    kinds = list(dict.fromkeys(values))
    return [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]
