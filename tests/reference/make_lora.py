#!/usr/bin/env python3
"""Makes seeded LoRA adapters for the checkpoints of `make_small.py`, written by PEFT itself, and
what PEFT computes with them in float32.

    venv/bin/pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2
    venv/bin/python make_lora.py --small small --out small/lora
"""

import argparse
import json
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

STEPS = 16
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    # name: (model, settings, whether the file is in bfloat16)
    "mistral-all": ("mistral", dict(r=8, lora_alpha=16, target_modules=ALL), False),
    "mistral-attention": ("mistral", dict(r=3, lora_alpha=4, target_modules=ALL[:2]), True),
    "qwen2-all": ("qwen2", dict(r=4, lora_alpha=8, target_modules=ALL), False),
    "qwen3-root": ("qwen3", dict(r=5, lora_alpha=6, target_modules=ALL, use_rslora=True), False),
    "gemma3-mlp": ("gemma3", dict(r=16, lora_alpha=16, target_modules=ALL[3:]), False),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    for seed, (name, (base, settings, short)) in enumerate(ADAPTERS.items()):
        model = AutoModelForCausalLM.from_pretrained(args.small / base, dtype=torch.float32).eval()
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        model = get_peft_model(model, config).eval()
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    # PEFT starts with B = 0, which adds nothing.
                    parameter.copy_(torch.randn_like(parameter) * (0.1 if "lora_A" in key else 0.2))
                    parameter.copy_(parameter.bfloat16().float())
        cases = []
        for length in (1, 20, 150):
            prompt = torch.randint(1, 256, (length,)).tolist()
            tokens, logits = list(prompt), []
            for _ in range(STEPS):
                with torch.no_grad():
                    last = model(torch.tensor([tokens])).logits[0, -1]
                    with model.disable_adapter():
                        plain = model(torch.tensor([tokens])).logits[0, -1]
                logits.append([round(float(value), 5) for value in last[:8]])
                tokens.append(int(last.argmax()))
            cases.append({
                "prompt_token_ids": prompt, "output_token_ids": tokens[length:], "logits": logits,
                # How far the adapter moves logits at the last step.
                "moved": round(float((last - plain).abs().max()), 3),
            })
        folder = args.out / name
        # Last: it rounds the base model too.
        saved = model.to(torch.bfloat16) if short else model
        saved.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        written = json.loads((folder / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = base
        # Sets have no order of their own.
        written["target_modules"] = sorted(written["target_modules"])
        (folder / "adapter_config.json").write_text(json.dumps(written, indent=1) + "\n")
        (args.out / f"{name}.json").write_text(json.dumps(cases) + "\n")
        print(name, [(case["output_token_ids"][:6], case["moved"]) for case in cases])


if __name__ == "__main__":
    main()
