"""One of Baton's peers as a process that measures on demand. `peers.py` starts it:

    peer.py llama-cpp|llama-cpp-flash|ik-llama-cpp|ik-llama-cpp-flash|openvino MODEL THREADS

It speaks the protocol of `worker/examples/bench_model.rs --json`: each line on stdin asks for one
measure, each line on stdout answers one. What libraries print goes to stderr.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import sys
import time
from typing import Any, Protocol

CHUNK = 512
"""Tokens of a prompt that llama.cpp computes together; Baton's chunk too."""
WAKE_TOKENS = 32
WAKE_STEPS = 4
"""Computed before the clock starts: a process that slept has lost its place in the caches."""


def text(length: int) -> list[int]:
    """The token ids that every engine computes."""
    return [1000 + i * 37 % 20_000 for i in range(length)]


class Engine(Protocol):
    """What the protocol asks of an engine. Times are in seconds."""

    def about(self) -> dict[str, Any]:
        """Version, and what the reader of a result must know."""

    def load(self) -> float:
        """From the file to the first token computed, in a second copy of the model."""

    def prefill(self, tokens: int) -> tuple[float, int]:
        """One prompt into an empty cache; also the most likely next token."""

    def decode(self, streams: int, context: int, steps: int) -> float:
        """`steps` tokens of each stream, the first at position `context`."""


class LlamaCpp:
    """llama.cpp, by the C API that its Python package declares."""

    package = "llama-cpp-python"
    module = "llama_cpp"

    def __init__(self, model: str, threads: int, flash: bool) -> None:
        self.api: Any = importlib.import_module(self.module)
        self.api.llama_backend_init()
        self.path, self.threads, self.flash = model.encode(), threads, flash
        self.model = self.open_model()
        self.contexts: dict[tuple, "LlamaContext"] = {}

    def about(self) -> dict[str, Any]:
        system_info = self.api.llama_print_system_info().decode().strip()
        cache = "KV in float16, one cache per sequence"
        return {
            "version": importlib.metadata.version(self.package),
            "notes": f"prompts in chunks of {CHUNK}; {cache}",
            "build": system_info,
        }

    def load(self) -> float:
        start = time.perf_counter()
        model = self.open_model()
        context = LlamaContext(self, model, 1, CHUNK)
        context.compute(1, 0, 1)
        taken = time.perf_counter() - start
        context.close()
        self.close_model(model)
        return taken

    def prefill(self, tokens: int) -> tuple[float, int]:
        context = self.context(1, tokens, 0)
        context.compute(1, 0, WAKE_TOKENS)
        context.forget(0)
        start = time.perf_counter()
        context.compute(1, 0, tokens)
        taken = time.perf_counter() - start
        top = context.top()
        context.forget(0)
        return taken, top

    def decode(self, streams: int, context: int, steps: int) -> float:
        # Each measure has a cache of its own: its prompts are computed once, not in every round.
        cache = self.context(streams, context + steps, context)
        for _ in range(WAKE_STEPS):
            cache.compute(streams, context, 1)
            cache.forget(context)
        start = time.perf_counter()
        for step in range(steps):
            cache.compute(streams, context + step, 1)
        taken = time.perf_counter() - start
        cache.forget(context)
        return taken

    def context(self, streams: int, positions: int, filled: int) -> "LlamaContext":
        """The cache for a measure; its sequences hold the first `filled` tokens."""
        key = (streams, positions, filled)
        if key not in self.contexts:
            context = LlamaContext(self, self.model, streams, positions)
            if filled:
                context.fill(filled)
            self.contexts[key] = context
        return self.contexts[key]

    # What differs between llama.cpp and its fork.

    def open_model(self) -> int:
        model = self.api.llama_model_load_from_file(
            self.path, self.api.llama_model_default_params()
        )
        if not model:
            raise RuntimeError("the model does not load")
        return model

    def close_model(self, model: int) -> None:
        self.api.llama_model_free(model)

    def set_attention(self, params: Any) -> None:
        """Completes the parameters of a context."""
        params.flash_attn_type = int(self.flash)
        # One cache for all would make each stream attend over all streams' tokens, masked.
        params.kv_unified = False

    def remove(self, context: int, sequence: int, start: int) -> None:
        """Forgets a sequence's tokens from position `start` on."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(context), sequence, start, -1)

    def vocabulary(self) -> int:
        return self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))


class IkLlamaCpp(LlamaCpp):
    """The fork ik_llama.cpp: older names, one cache for all sequences.

    Its package declares only a part of the C API; the rest is declared here.
    """

    package = "ik-llama-cpp-python"
    module = "ik_llama_cpp._ctypes_api"

    def __init__(self, model: str, threads: int, flash: bool) -> None:
        library = importlib.import_module(self.module)._lib
        library.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p] + [ctypes.c_int32] * 3
        library.llama_kv_cache_seq_rm.restype = ctypes.c_bool
        library.llama_print_system_info.restype = ctypes.c_char_p
        self.library = library
        super().__init__(model, threads, flash)

    def about(self) -> dict[str, Any]:
        return {
            "version": importlib.metadata.version(self.package),
            "notes": f"prompts in chunks of {CHUNK}; KV in float16, one cache for all sequences",
            "build": self.library.llama_print_system_info().decode().strip(),
        }

    def close_model(self, model: int) -> None:
        self.api.llama_free_model(model)

    def set_attention(self, params: Any) -> None:
        params.flash_attn = self.flash

    def remove(self, context: int, sequence: int, start: int) -> None:
        self.library.llama_kv_cache_seq_rm(context, sequence, start, -1)


class LlamaContext:
    """A KV cache for some sequences of at most `positions` tokens, and a batch to compute in it."""

    def __init__(self, engine: LlamaCpp, model: int, streams: int, positions: int) -> None:
        self.engine, self.api, self.streams = engine, engine.api, streams
        params = self.api.llama_context_default_params()
        # Caches are divided among sequences in units of 256 tokens.
        params.n_ctx = streams * (-(-positions // 256) * 256)
        params.n_seq_max = streams
        params.n_batch = max(CHUNK, positions)
        params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = engine.threads
        engine.set_attention(params)
        self.context = self.api.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"no context for {streams} x {positions} tokens")
        self.batch = self.api.llama_batch_init(max(streams, positions), 0, 1)
        self.text = text(positions)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)

    def compute(self, streams: int, start: int, length: int, first: int = 0) -> None:
        """Computes `length` tokens from position `start` on, in `streams` sequences from `first`
        on; the logits of each one's last token are wanted, and waited for."""
        batch, i = self.batch, 0
        for sequence in range(first, first + streams):
            for position in range(start, start + length):
                batch.token[i], batch.pos[i] = self.text[position], position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = position == start + length - 1
                i += 1
        batch.n_tokens = i
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        self.api.llama_get_logits_ith(self.context, i - 1)

    def fill(self, length: int) -> None:
        """Computes the first `length` tokens of every sequence."""
        for sequence in range(self.streams):
            self.compute(1, 0, length, first=sequence)

    def forget(self, start: int) -> None:
        """Leaves each sequence its tokens before position `start`."""
        for sequence in range(self.streams):
            self.engine.remove(self.context, sequence, start)

    def top(self) -> int:
        """The most likely token by the logits of the last pass, which wanted one row."""
        logits = self.api.llama_get_logits_ith(self.context, self.batch.n_tokens - 1)
        return max(range(self.engine.vocabulary()), key=logits.__getitem__)


class OpenVino:
    """OpenVINO GenAI's continuous batching, stepped by hand.

    It always samples, here greedily, and goes on with the token that it chose: the streams' texts
    differ from the other engines', their lengths do not.
    """

    def __init__(self, model: str, threads: int) -> None:
        self.genai: Any = importlib.import_module("openvino_genai")
        self.openvino: Any = importlib.import_module("openvino")
        self.numpy: Any = importlib.import_module("numpy")
        self.model, self.threads = model, threads
        self.pipeline = self.open()
        self.requests = 0

    def open(self) -> Any:
        scheduler = self.genai.SchedulerConfig()
        # All prompts of a measure fit one step, so all streams begin to decode together.
        scheduler.max_num_batched_tokens = 8192
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2
        properties = {"INFERENCE_NUM_THREADS": self.threads}
        return self.genai.ContinuousBatchingPipeline(self.model, scheduler, "CPU", properties)

    def about(self) -> dict[str, Any]:
        core = self.openvino.Core()
        settings = {
            name: str(core.get_property("CPU", name))
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        }
        return {
            "version": importlib.metadata.version("openvino-genai"),
            "notes": "a prompt in one chunk; steps include greedy sampling; a stream's own tokens; "
            f"its defaults: KV in {settings['KV_CACHE_PRECISION']}, "
            f"computes in {settings['INFERENCE_PRECISION_HINT']}",
            "build": self.openvino.get_version(),
        }

    def load(self) -> float:
        start = time.perf_counter()
        pipeline = self.open()
        requests = self.start(pipeline, 1, 1, 1)
        pipeline.step()
        taken = time.perf_counter() - start
        self.check(requests, 1)
        return taken

    def prefill(self, tokens: int) -> tuple[float, int]:
        awake = self.start(self.pipeline, 1, WAKE_TOKENS, 1)
        self.pipeline.step()
        self.check(awake, 1)
        requests = self.start(self.pipeline, 1, tokens, 1)
        start = time.perf_counter()
        self.pipeline.step()
        taken = time.perf_counter() - start
        return taken, self.check(requests, 1)

    def decode(self, streams: int, context: int, steps: int) -> float:
        # The prompts' own step yields the first of the new tokens; then the untimed steps.
        new_tokens = 1 + WAKE_STEPS + steps
        requests = self.start(self.pipeline, streams, context - WAKE_STEPS, new_tokens)
        for _ in range(1 + WAKE_STEPS):
            self.pipeline.step()
        start = time.perf_counter()
        for _ in range(steps):
            self.pipeline.step()
        taken = time.perf_counter() - start
        self.check(requests, new_tokens)
        return taken

    def start(self, pipeline: Any, streams: int, prompt: int, new_tokens: int) -> list[Any]:
        """Queues requests for exactly `new_tokens` tokens. One that is dropped is cancelled."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = self.openvino.Tensor(self.numpy.array([text(prompt)], dtype=self.numpy.int64))
        self.requests += streams
        return [pipeline.add_request(self.requests - i, ids, config) for i in range(streams)]

    def check(self, requests: list[Any], new_tokens: int) -> int:
        """Fails unless the steps made the tokens that were asked for; returns the last one."""
        made = [
            [token for output in request.read_all() for token in output.generated_ids]
            if request.can_read()
            else []
            for request in requests
        ]
        if any(len(tokens) != new_tokens for tokens in made):
            raise RuntimeError(f"steps made {[len(tokens) for tokens in made]} tokens")
        return made[0][-1]


def answer(engine: Engine, ask: dict[str, Any]) -> dict[str, Any]:
    """Takes one measure."""
    match ask["measure"]:
        case "about":
            return engine.about()
        case "load":
            return {"seconds": engine.load()}
        case "prefill":
            taken, top = engine.prefill(ask["tokens"])
            return {"seconds": taken, "top": top}
        case "decode":
            return {"seconds": engine.decode(ask["streams"], ask["context"], ask["steps"])}
        case other:
            raise ValueError(f"unknown measure {other}")


def engine(name: str, model: str, threads: int) -> Engine:
    flash = name.endswith("-flash")
    match name.removesuffix("-flash"):
        case "llama-cpp":
            return LlamaCpp(model, threads, flash)
        case "ik-llama-cpp":
            return IkLlamaCpp(model, threads, flash)
        case "openvino":
            return OpenVino(model, threads)
        case other:
            raise ValueError(f"unknown engine {other}")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, model, threads = sys.argv[1:]
    measured = engine(name, model, int(threads))
    for line in sys.stdin:
        try:
            reply = answer(measured, json.loads(line))
        except Exception as error:  # one measure's failure is not the next one's
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
