"""Tiny random models of every family, as transformers saves them, for tests that compare with it."""

import torch


def _rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


FAMILIES = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": _rope(1e4)},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_parameters": _rope(1e6)},
    "mistral-window": {"model_type": "mistral", "sliding_window": 20, "rope_parameters": _rope(1e4)},
    "qwen2": {
        "model_type": "qwen2", "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112,
        "rope_parameters": _rope(1e6),
    },
    "qwen2-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1,
        "rope_parameters": _rope(1e6),
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": _rope(1e6)},
    "qwen3-yarn": {
        "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    },
}  # fmt: skip

BASE = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def hf_model(family: str, seed: int = 0, **overrides):
    """A transformers model of the family with weights large enough that its logits are far from ties; biases and gains too."""
    import transformers

    fields = BASE | FAMILIES[family] | overrides
    config = transformers.AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name else p.normal_(0.0, 0.3 if "bias" in name else 0.12)
    return model
