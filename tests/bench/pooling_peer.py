"""One peer of pooling.py: embeds texts on demand, a JSON object a line, in an environment of its own.

    pooling_peer.py ENGINE MODEL THREADS

`texts` are embedded in the order of their length, so many at once as is fastest: `batches` finds
that out. Times take in everything from texts to vectors of length one, as with Baton.
"""

import json
import pathlib
import sys
import time
from typing import Any, Callable

import numpy as np

ENGINE, MODEL, THREADS = sys.argv[1], sys.argv[2], int(sys.argv[3])
BATCHES = (1, 4, 16, 64)
Encode = Callable[[list[str]], np.ndarray]


def sentence_transformers() -> tuple[Encode, str]:
    import sentence_transformers
    import torch

    torch.set_num_threads(THREADS)
    model = sentence_transformers.SentenceTransformer(MODEL, device="cpu")

    def encode(texts: list[str]) -> np.ndarray:
        return model.encode(
            texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False
        )

    return encode, f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"


def exported() -> pathlib.Path:
    """The model in ONNX, made once; both of the others read it."""
    file = pathlib.Path(sys.executable).parents[1] / f"{pathlib.Path(MODEL).name}.onnx"
    if file.exists():
        return file
    import torch
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(MODEL).eval()

        def forward(self, input_ids, attention_mask, token_type_ids):  # type: ignore[no-untyped-def]
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in names)
    axes = {name: {0: "texts", 1: "tokens"} for name in [*names, "hidden"]}
    unfinished = file.with_suffix(".part")
    torch.onnx.export(
        Hidden(), example, str(unfinished), input_names=names, output_names=["hidden"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )
    unfinished.rename(file)
    return file


def pooled(forward: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Encode:
    """Tokenizer before and mean pooling after a model that gives hidden states."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pathlib.Path(MODEL) / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()

    def encode(texts: list[str]) -> np.ndarray:
        encoded = tokenizer.encode_batch(texts)
        mask = np.array([text.attention_mask for text in encoded], dtype=np.int64)
        hidden = forward({
            "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        })
        sums = np.einsum("tsd,ts->td", hidden, mask.astype(np.float32))
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    return encode


def onnxruntime() -> tuple[Encode, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(exported()), options, ["CPUExecutionProvider"])
    return pooled(lambda inputs: session.run(None, inputs)[0]), f"ONNX Runtime {onnxruntime.__version__}"


def openvino() -> tuple[Encode, str]:
    import openvino

    # Otherwise it computes in bfloat16 where the CPU has it.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(exported()), "CPU", settings).create_infer_request()

    def forward(inputs: dict[str, np.ndarray]) -> np.ndarray:
        request.infer(inputs)
        return request.get_output_tensor().data

    return pooled(forward), f"OpenVINO {openvino.__version__}"


def seconds(encode: Encode, texts: list[str], batch: int) -> float:
    start = time.perf_counter()
    ordered = sorted(texts, key=len)
    for at in range(0, len(ordered), batch):
        encode(ordered[at : at + batch])
    return time.perf_counter() - start


def answer(ask: dict[str, Any], encode: Encode, state: dict[str, int]) -> dict[str, Any]:
    match ask["measure"]:
        case "batches":
            times = {batch: min(seconds(encode, ask["texts"], batch) for _ in range(2))
                     for batch in BATCHES}
            state["batch"] = min(times, key=times.__getitem__)
            return {"batch": state["batch"]}
        case "throughput":
            return {"seconds": seconds(encode, ask["texts"], state["batch"])}
        case "latency":
            times = []
            for _ in range(ask["runs"]):
                start = time.perf_counter()
                encode([ask["text"]])
                times.append(time.perf_counter() - start)
            return {"seconds": float(np.median(times))}
        case "vectors":
            return {"vectors": [encode([text])[0].tolist() for text in ask["texts"]]}
        case other:
            return {"error": f"unknown measure {other}"}


def main() -> None:
    engines = {"sentence-transformers": sentence_transformers, "onnxruntime": onnxruntime,
               "openvino": openvino}
    encode, version = engines[ENGINE]()
    state = {"batch": 1}
    # What libraries print must not get between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            result = {"version": version} if ask["measure"] == "about" else answer(ask, encode, state)
        except Exception as error:  # noqa: BLE001
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
