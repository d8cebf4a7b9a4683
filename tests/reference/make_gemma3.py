#!/usr/bin/env python3
"""Makes `gemma3.json`, to which the engine is held on Gemma 3 270M (Q4_K_M).

As `make_fixtures.py`: greedy tokens and logits are those of `transformers` on the dequantized
blocks in float32, token ids those of llama.cpp's tokenizer. The longest prompt is longer than the
sliding window.

    venv/bin/python make_gemma3.py --model gemma-3-270m-q4_k_m.gguf --out gemma3.json
"""

import argparse
import json
import pathlib
import random

import llama_cpp
import torch
from transformers import AutoModelForCausalLM

from make_fixtures import CODE, PROSE

STEPS = 24
TOP = 4
TEXTS = [
    "", "a", " leading", "trailing ", "Hello, world!", "  two  spaces\n\nand lines\t tab",
    "naïve café – 北京 🙂 ẞ", "1234567890 and 3.14", "I'll don't we've", "Ünïcödé 𝔘 ＦＵＬＬ",
    "<start_of_turn>user\nHi<end_of_turn>\n", "\u200d🧑\u200d🚀 zero width", "\x07bell", CODE,
]


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[list]]:
    """Tokens, and of each step the largest logits."""
    tokens, top, cache, step = [], [], None, torch.tensor([prompt])
    for _ in range(STEPS):
        with torch.no_grad():
            result = model(step, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[0, -1]
        best = logits.topk(TOP)
        top.append([[int(i), round(float(v), 5)] for v, i in zip(best.values, best.indices)])
        tokens.append(int(logits.argmax()))
        step = torch.tensor([tokens[-1:]])
    return tokens, top


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    tokenizer = llama_cpp.Llama(str(arguments.model), vocab_only=True, verbose=False)
    tokenize = lambda text: tokenizer.tokenize(text.encode(), add_bos=True, special=True)  # noqa: E731
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.parent, gguf_file=arguments.model.name, dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    shuffled = random.Random(7)
    long = " ".join(shuffled.sample(PROSE, len(PROSE)) [i % len(PROSE)] for i in range(40))
    prompts = ["", "The capital of France is", *PROSE[:3], CODE, long]
    cases = []
    for text in prompts:
        prompt = tokenize(text)
        tokens, top = greedy(model, prompt)
        cases.append({"prompt_token_ids": prompt, "output_token_ids": tokens, "top": top})
        print(len(prompt), "tokens:", repr(tokenizer.detokenize(tokens).decode(errors="replace")))
    texts = [{"text": text, "token_ids": tokenize(text)} for text in TEXTS]
    arguments.out.write_text(json.dumps({"greedy": cases, "tokenize": texts}) + "\n")


if __name__ == "__main__":
    main()
