"""Tiny random models of five families, with 2 layers each, for tests that must pass on all."""

import torch

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt2")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
COMMON_CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make_family_model(family):
    import transformers as t

    torch.manual_seed(3)
    if family == "gpt2":
        config = t.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
            **NO_DROPOUT,
        )
        return t.GPT2LMHeadModel(config)
    if family == "gemma3":
        return t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**COMMON_CONFIG, head_dim=8, sliding_window=64)
        )
    kinds = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
    }
    config, model_class = kinds[family]
    more = {"head_dim": 8} if family == "qwen3" else {}
    return model_class(config(**COMMON_CONFIG, **more))


def save_family_model(family, folder):
    make_family_model(family).save_pretrained(folder)
    return folder
