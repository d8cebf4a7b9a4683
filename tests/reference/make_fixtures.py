#!/usr/bin/env python3
"""Makes the fixtures that Baton's engine and tokenizer are held to.

The reference is independent of Baton: Hugging Face `transformers` on the same GGUF, whose blocks
it dequantizes to float32, with float32 activations and a float32 KV cache; for the tokenizer,
llama.cpp's own.

    python3 -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 accelerate llama-cpp-python==0.3.36
    venv/bin/python make_fixtures.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out .

Everything is seeded; the same versions give the same files.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import random
import sys

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 32
TOP = 4

PROSE = [
    "The lighthouse keeper climbed the stairs before dawn, counting each step aloud as his father had done.",
    "Rain fell on the harbour all morning, and the boats rocked gently against the old stone wall.",
    "A small engine, well kept, will carry a village through a hard winter without complaint.",
    "In the market the baker argued with the miller about the price of flour and the weight of a sack.",
    "She opened the letter twice, folded it three times, and put it back under the clock.",
    "The river is slow in summer, quick in spring, and silent under ice for most of January.",
    "Nobody remembered who had planted the orchard, yet everyone knew which tree bore the best pears.",
    "When the bridge was finished the engineers walked across it first, as custom demands.",
]
CODE = '''def merge(left, right):
    """Merge two sorted lists."""
    out, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            out.append(left[i]); i += 1
        else:
            out.append(right[j]); j += 1
    return out + left[i:] + right[j:]


class Counter:
    def __init__(self):
        self.n = 0

    def add(self, k: int = 1) -> int:
        self.n += k
        return self.n
'''
WORLD = [
    "Der Zug nach München fährt um 7:45 Uhr von Gleis 12 ab.",
    "La forêt était silencieuse, hormis le chant d'un oiseau solitaire.",
    "El niño preguntó cuántas estrellas había en el cielo.",
    "Поезд прибыл вовремя, и пассажиры вышли на перрон.",
    "今日は天気がいいので、散歩に行きましょう。",
    "我们明天早上八点在图书馆门口见面。",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "नमस्ते दुनिया, आज मौसम अच्छा है।",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "🎉🚀 emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 flags 🇫🇷",
]


def prose(seed, sentences):
    rng = random.Random(seed)
    words = " ".join(PROSE).replace(".", "").replace(",", "").split()
    out = []
    for _ in range(sentences):
        if rng.random() < 0.5:
            out.append(rng.choice(PROSE))
        else:
            picked = [rng.choice(words).lower() for _ in range(rng.randint(5, 16))]
            out.append(" ".join(picked).capitalize() + rng.choice([".", "?", "!"]))
    return " ".join(out)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_cases(path, made_by, cases, **more):
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"made_by":' + json.dumps(made_by, ensure_ascii=False))
        for key, value in more.items():
            file.write(f',\n"{key}":' + json.dumps(value, ensure_ascii=False))
        file.write(',\n"cases":[\n')
        file.write(",\n".join(json.dumps(c, ensure_ascii=False, separators=(",", ":")) for c in cases))
        file.write("\n]}\n")


def prompts(encode, render):
    """(name, token ids), 1 to 1,500 tokens."""
    long = encode(prose(1, 400))
    code = encode(CODE * 12)
    mixed = encode("\n".join(WORLD * 12))
    cases = [("one_token", encode("The")[:1]), ("two_tokens", encode("Once upon")[:2])]
    for n, source, seed in [
        (3, long, 2), (5, long, 11), (8, code, 0), (12, long, 23), (15, long, 31), (16, long, 37), (17, long, 41),
        (31, long, 50), (32, code, 60), (33, long, 70), (63, mixed, 0), (64, long, 90), (65, long, 100),
        (127, long, 120), (128, code, 30), (129, long, 140), (255, long, 160), (256, mixed, 40), (257, long, 180),
        (511, long, 200), (512, code, 100), (513, long, 230), (700, mixed, 100), (1000, long, 300),
        (1023, long, 350), (1024, code, 10), (1025, long, 400), (1400, long, 450), (1500, long, 500), (1500, mixed, 5),
    ]:
        cases.append((f"{'code' if source is code else 'mixed' if source is mixed else 'prose'}_{n}", source[seed : seed + n]))
    shared = long[600 : 600 + 300]
    for i, tail in enumerate(["So the answer is", "Then, in the evening,", "def f(x):", "1, 2, 3,", "However, the", "Finally"]):
        cases.append((f"shared_300_{i}", shared + encode(" " + tail)))
    cases.append(("digits", encode("3.14159265358979323846264338327950288419716939937510 and 2, 4, 8, 16, 32, 64,")))
    cases.append(("repeated", encode("again and " * 60)))
    for i, chat in enumerate([
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Write a haiku about the sea."}],
        [{"role": "system", "content": "You are a terse assistant."}, {"role": "user", "content": "Name three prime numbers."}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help?"}, {"role": "user", "content": "Translate 'good morning' to French."}],
        [{"role": "user", "content": "Explain this code:\n" + CODE}],
        [{"role": "user", "content": "Summarize:\n" + prose(7, 60)}],
        [{"role": "user", "content": "Summarize:\n" + prose(8, 20)}],
        [{"role": "user", "content": WORLD[4] + WORLD[5]}],
    ]):
        cases.append((f"chat_{i}", encode(render(chat, True))))
    for name, ids in cases:
        assert ids, name
    return cases


def chats():
    user = lambda text: {"role": "user", "content": text}
    assistant = lambda text: {"role": "assistant", "content": text}
    system = lambda text: {"role": "system", "content": text}
    lists = [
        [user("Hello")],
        [system("Be brief."), user("Hello")],
        [user("Hi"), assistant("Hello!"), user("How are you?")],
        [system("Sys"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
        [user("  leading and trailing blanks \n")],
        [user("日本語 🎉 émigré")],
        [user("")],
        [user("line one\nline two\n\n\ttabbed")],
    ]
    for messages in lists:
        yield messages, True
    for messages in (lists[0], lists[1], lists[2], [user("Hi"), assistant("Half an answ")]):
        yield messages, False


def texts():
    fixed = [
        "", " ", "  ", "\n", "\n\n", "\t", " \n \t x", "a", "Hello, world!", "Hello world", " Hello world ", "I'm you're we'll they'd it's don't I've",
        "I'M YOU'RE", "2024", "12345678901234567890", "1 22 333 4444", "3.14e-10", "x=1;y=2", "a  b   c    d", "trailing   ",
        "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "<|im_start|>", "text<|im_end|>more", "<|im_start", "<file_sep>x",
        "supercalifragilisticexpialidocious" * 5, "a" * 300, "ab" * 200, "é", "e\u0301", "ﬁ ligature", "Ångström", "\u200b zero width", "naïve café",
        "🎉", "👩‍👩‍👧‍👦", "🏳️‍🌈🇫🇷", "😀😃😄", "…—–“”‘’", "©®™", "Ⅷ ½ ² ₃", "１２３ fullwidth", "٣٤٥ ١٢", "\r\n windows \r\n", "http://example.org/a?b=c&d=%20",
        "foo_bar.baz(qux)->quux", "<html><body class=\"x\">&nbsp;</body></html>", "{\"key\": [1, 2.5, null]}", "SELECT * FROM t WHERE a='b';", "#!/bin/sh\nset -eu\n",
    ] + WORLD + PROSE + [CODE, CODE.replace("    ", "\t")]
    yield from fixed
    rng = random.Random(99)
    pieces = fixed[8:] + [" ", "  ", "\n", "\t", "0", "42", ",", ".", "'s", "'LL", "—", "ß", "ñ", "한국어", "ελληνικά", "עברית"]
    while True:
        yield "".join(rng.choice(pieces)[: rng.randint(1, 40)] + rng.choice(["", " ", "\n"]) for _ in range(rng.randint(1, 8)))


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=pathlib.Path, required=True, help="the GGUF file")
    arguments.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder to write to")
    options = arguments.parse_args()
    torch.manual_seed(0)

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "llama-cpp-python")}
    made_by = {
        "script": "make_fixtures.py", "python": sys.version.split()[0], "packages": versions,
        "model": options.model.name, "sha256": sha256(options.model), "dtype": "float32",
        "date": datetime.date.today().isoformat(),
    }
    where = dict(pretrained_model_name_or_path=str(options.model.parent), gguf_file=options.model.name)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    hf = AutoTokenizer.from_pretrained(**where)
    vocab = llama_cpp.Llama(str(options.model), vocab_only=True, verbose=False)

    def encode(text):
        return vocab.tokenize(text.encode(), add_bos=False, special=True)

    def render(messages, add_generation_prompt):
        return hf.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    # Tokenizer.
    cases, disagree = [], []
    for text in texts():
        ids = encode(text)
        case = {"text": text, "ids": ids}
        back = vocab.detokenize(ids, special=True).decode(errors="replace") if ids else ""
        if back != text:
            case["decoded"] = back
        if hf(text, add_special_tokens=False)["input_ids"] != ids:
            disagree.append(text)
        cases.append(case)
        if len(cases) == 200:
            break
    write_cases(options.out / "tokenize.json", {**made_by, "reference": "llama.cpp", "transformers_disagrees_on": disagree}, cases)
    print("tokenizer cases", len(cases), "transformers disagrees on", len(disagree))

    # Chat template.
    write_cases(options.out / "chat_template.json", made_by, [
        {"messages": messages, "add_generation_prompt": generation, "rendered": (text := render(messages, generation)), "ids": encode(text)}
        for messages, generation in chats()
    ])

    # Greedy continuations.
    eos = model.config.eos_token_id
    cases, logit_cases, noise = [], [], 0.0
    for name, prompt in prompts(encode, render):
        out = model(torch.tensor([prompt]), use_cache=True)
        last = out.logits[0, -1]
        if name in ("one_token", "prose_17", "chat_0", "code_128", "prose_513", "prose_1500"):
            ids = list(range(0, last.numel(), last.numel() // 64))[:64]
            logit_cases.append({"name": name, "prompt_token_ids": prompt, "logits": [[i, round(last[i].item(), 5)] for i in ids],
                                "logsumexp": round(torch.logsumexp(last.double(), 0).item(), 6)})
        tokens, top, steps = [], [], []
        while True:
            steps.append(last)
            values, ids = last.topk(TOP)
            top.append([[i, round(v, 5)] for i, v in zip(ids.tolist(), values.tolist())])
            tokens.append(ids[0].item())
            if len(tokens) == STEPS or tokens[-1] == eos:
                break
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            last = out.logits[0, -1]
        # Float noise: the same logits from one pass over everything.
        whole = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        noise = max(noise, (whole - torch.stack(steps)).abs().max().item())
        margin = min(t[0][1] - t[1][1] for t in top)
        cases.append({"name": name, "prompt_token_ids": prompt, "output_token_ids": tokens, "top": top, "margin_min": round(margin, 5)})
        print(name, len(prompt), len(tokens), f"margin {margin:.5f}", flush=True)
    write_cases(options.out / "greedy.json", made_by, cases, eos_token_id=eos, noise_max=round(noise, 7))
    write_cases(options.out / "logits.json", made_by, logit_cases)
    print("cases", len(cases), "noise", noise, "margins below 0.01:", [(c["name"], c["margin_min"]) for c in cases if c["margin_min"] < 0.01])


if __name__ == "__main__":
    main()
