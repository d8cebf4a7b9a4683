#!/usr/bin/env python3
"""Makes small seeded checkpoints of architectures of which no real small weights are at hand.

For each: a folder as Hugging Face publishes models and (but for Gemma 3, of which there is a real
one) a GGUF, both with matrices in float16, and what `transformers` computes from the same numbers
in float32. The models are untrained: they show that the arithmetic is the architecture's, no more.

    venv/bin/python make_small.py --out small
"""

import argparse
import copy
import json
import pathlib

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM, Qwen2Config,
    Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

VOCAB, LAYERS, STEPS = 256, 2, 16
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0,
    tie_word_embeddings=False,
)
MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": True}, head_dim=32,
        query_pre_attn_scalar=32, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )),
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


ALPHABET = [chr(i) if 33 <= i < 127 else chr(256 + i) for i in range(VOCAB - 1)]


def write_folder(path: pathlib.Path, model: torch.nn.Module) -> None:
    """`config.json`, `model.safetensors`, and a tokenizer of single characters."""
    # A copy: rounding would reach the angles of RoPE too.
    copy.deepcopy(model).half().save_pretrained(path)
    vocab = {token: i for i, token in enumerate([*ALPHABET, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` is `blk.0.ffn_up.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's Llama rotates pairs of neighbours where transformers rotates halves."""
    width = weight.shape[0] // heads // 2
    shape = (heads, 2, width, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write(path: pathlib.Path, name: str, model: torch.nn.Module) -> None:
    config = model.config
    architecture = "llama" if name == "mistral" else name
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"untrained {name}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default" if name == "mistral" else "qwen2")
    writer.add_token_list([*ALPHABET, "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for key, tensor in model.state_dict().items():
        data = tensor.numpy()
        if architecture == "llama" and "q_proj" in key:
            data = neighbours(data, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in key:
            data = neighbours(data, config.num_key_value_heads)
        writer.add_tensor(gguf_name(key), data.astype(np.float16 if data.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(11)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Far from the small uniform start, so that norms, biases and softmax all matter.
                parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 2 else 0.5))
                parameter.copy_(parameter.half().float())
        write_folder(out / name, model)
        if name != "gemma3":
            write(out / f"{name}.gguf", name, model)
        cases = []
        for length in (1, 20, 150):
            prompt = torch.randint(1, VOCAB, (length,)).tolist()
            tokens, logits = list(prompt), []
            for _ in range(STEPS):
                with torch.no_grad():
                    last = model(torch.tensor([tokens])).logits[0, -1]
                logits.append([round(float(value), 5) for value in last[:8]])
                tokens.append(int(last.argmax()))
            cases.append({
                "prompt_token_ids": prompt, "output_token_ids": tokens[length:], "logits": logits,
            })
        (out / f"{name}.json").write_text(json.dumps(cases) + "\n")
        print(name, [case["output_token_ids"][:6] for case in cases])


if __name__ == "__main__":
    main()
