#!/usr/bin/env python3
"""Embeddings of Baton and its peers on one CPU, in float32: the same model, texts and threads, in turns.

    python3 tests/bench/pooling.py

builds Baton, installs the peers from PyPI under `target/bench-venv`, measures all of them
alternately and writes `pooling.json` (every sample), `pooling.md` and `pooling.svg` to
`docs/benchmarks`. See README.md beside this file.
"""

import argparse
import asyncio
import base64
import json
import math
import os
import pathlib
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

from peers import ROOT, Engine, environment, machine, run

CLIENTS = 64
PEERS = ["sentence-transformers", "onnxruntime", "openvino"]
MODEL = "minilm"
SHORT = "how do i change the oil of my car"
# Shortest and longest text, in tokens.
TOKENS = (8, 256)
# Where Baton means to be: texts a second and time of one, of the best peer's.
TARGETS = {"throughput": 1.3, "latency": 0.8}


def texts(model: pathlib.Path, count: int, seed: int) -> list[str]:
    """Texts of words that are one token each; with the two special ones they have 8 to 256."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(*TOKENS) - 2)) for _ in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Baton:
    """etcd, a gateway and a pooling worker, and clients that keep their connections."""

    name = "baton"

    def __init__(self, built: pathlib.Path, model: pathlib.Path, threads: int, cpus: str,
                 extra: list[str], log: pathlib.Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.samples: dict[str, list[float]] = {}
        self.errors: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        client, peer = free_port(), free_port()
        self.port = free_port()
        etcd = f"http://127.0.0.1:{client}"
        commands: list[list[Any]] = [
            ["etcd", "--data-dir", self.folder.name, "--listen-client-urls", etcd,
             "--advertise-client-urls", etcd, "--log-level", "error",
             "--listen-peer-urls", f"http://127.0.0.1:{peer}"],
            [built / "baton-worker", "--role", "pooling", "--model", model, "--etcd", etcd,
             "--served-model-name", MODEL, "--threads", str(threads), "--listen",
             f"127.0.0.1:{free_port()}", *extra],
            [built / "baton-gateway", "--etcd", etcd, "--listen", f"127.0.0.1:{self.port}"],
        ]
        for i, command in enumerate(commands):
            out = log.with_suffix(f".{i}.log").open("w")
            self.processes.append(
                subprocess.Popen(["taskset", "-c", cpus, *command], stdout=out, stderr=out)
            )
        version = run([built / "baton-worker", "--version"])
        self.about = {"version": version, "notes": "over HTTP, " + f"{CLIENTS} connections"}

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                url = f"http://127.0.0.1:{self.port}/v1/models"
                if MODEL in urllib.request.urlopen(url, timeout=5).read().decode():
                    return
            except OSError:
                pass
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise SystemExit(f"Baton does not serve; ended: {ended}; see the logs")
            time.sleep(0.2)

    def request(self, text: str) -> bytes:
        # base64 is what OpenAI's client asks for.
        body = json.dumps({"model": MODEL, "input": text, "encoding_format": "base64"}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: baton\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def exchange(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
                       request: bytes) -> bytes:
        reader, writer = connection
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(body.decode())
        return body

    async def clients(self, requests: list[bytes], count: int) -> tuple[float, list[float], list[bytes]]:
        """All requests by so many clients, each waiting for an answer before it asks again."""
        connections = [await asyncio.open_connection("127.0.0.1", self.port) for _ in range(count)]
        times, answers, waiting = [], [b""] * len(requests), iter(enumerate(requests))

        async def client(connection: Any) -> None:
            for i, request in waiting:
                start = time.perf_counter()
                answers[i] = await self.exchange(connection, request)
                times.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*map(client, connections))
        total = time.perf_counter() - start
        for _, writer in connections:
            writer.close()
        return total, times, answers

    def ask(self, ask: dict[str, Any]) -> dict[str, Any]:
        match ask["measure"]:
            case "throughput":
                requests = [self.request(text) for text in ask["texts"]]
                return {"seconds": asyncio.run(self.clients(requests, CLIENTS))[0]}
            case "latency":
                requests = [self.request(ask["text"])] * ask["runs"]
                return {"seconds": statistics.median(asyncio.run(self.clients(requests, 1))[1])}
            case "vectors":
                requests = [self.request(text) for text in ask["texts"]]
                answers = asyncio.run(self.clients(requests, CLIENTS))[2]
                coded = [json.loads(body)["data"][0]["embedding"] for body in answers]
                plain = [base64.b64decode(vector) for vector in coded]
                return {"vectors": [struct.unpack(f"<{len(v) // 4}f", v) for v in plain]}
        return {"batch": None}

    def end(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def markdown(report: dict[str, Any]) -> str:
    names = list(report["engines"])
    lines = [
        "# Embeddings of Baton and its peers on one CPU", "",
        f"Made by `tests/bench/pooling.py`: {report['model']} in float32, {report['threads']} threads, "
        f"medians of {report['rounds']} rounds in turns. Throughput: {CLIENTS} texts of {TOKENS[0]} to "
        f"{TOKENS[1]} tokens wait at any time, {report['texts']} in all; Baton gets each in an HTTP "
        "request of its own, its peers as a list that they embed in the order of length and in "
        "batches of whatever size is fastest for them. Latency: the p50 of one text of "
        f"{report['short tokens']} tokens. All from text to vector.", "",
        "| measure | " + " | ".join(names) + " | best peer | Baton / best | target |",
        "| --- |" + " --- |" * (len(names) + 3),
    ]
    for key, title, digits in (("throughput", "texts a second", 1), ("latency", "one text, ms", 2)):
        row = report["results"][key]
        bound = "≥" if key == "throughput" else "≤"
        cells = [f"{row['medians'][n]:,.{digits}f}" if n in row["medians"] else "–" for n in names]
        lines.append(f"| {title} | {' | '.join(cells)} | {row['best']} | **{row['ratio']:.2f}** | "
                     f"{bound} {TARGETS[key]} |")
    lines += ["", f"Least cosine of Baton's vectors and sentence-transformers': "
              f"{report['least cosine']:.7f}.", ""]
    lines += [f"* {key}: {value if isinstance(value, (str, int)) else ', '.join(value)}"
              for key, value in report["machine"].items()]
    lines += ["", "| engine | version | texts at once |", "| --- | --- | --- |"]
    lines += [f"| {name} | {engine['version']} | {engine['batch'] or 'as they come'} |"
              for name, engine in report["engines"].items()]
    failed = [f"* {name}: {why}" for name, why in report["absent"].items()]
    if failed:
        lines += ["", "What did not run:", "", *failed]
    return "\n".join(lines) + "\n"


PLOT = """
import json, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
report = json.load(open(sys.argv[1]))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for axis, key, label in zip(axes, ("throughput", "latency"), ("texts a second", "one text, ms")):
    medians = report["results"][key]["medians"]
    names = list(medians)
    axis.barh(names, medians.values(), color=["C1" if n == "baton" else "C0" for n in names])
    for at, name in enumerate(names):
        samples = report["samples"][name][key]
        axis.plot(samples, [at] * len(samples), "|", color="black", markersize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.grid(axis="x", linewidth=0.4)
figure.tight_layout()
figure.savefig(sys.argv[2])
"""


def results(engines: list[Any], count: int) -> dict[str, Any]:
    """Of each measure the medians, and ours to the best peer's."""
    rows = {}
    for key in TARGETS:
        medians = {e.name: statistics.median(e.samples[key]) for e in engines if key in e.samples}
        peers = {name: value for name, value in medians.items() if name != "baton"}
        best = min(peers, key=peers.__getitem__)
        ratio = medians["baton"] / peers[best]
        shown = {name: count / s if key == "throughput" else 1e3 * s for name, s in medians.items()}
        rows[key] = {"medians": shown, "best": best,
                     "ratio": 1 / ratio if key == "throughput" else ratio}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a folder; by default all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpus", default="0,1", help="cores for all engines, as taskset takes them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=4 * CLIENTS, help="texts of a round")
    parser.add_argument("--runs", type=int, default=100, help="single texts of a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--worker-args", nargs="*", default=[], help="more flags of the worker")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / "target" / "bench-venv")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    if not shutil.which("etcd"):
        raise SystemExit("etcd is not installed; deploy/up installs it")
    if not options.no_build:
        run(["cargo", "build", "--release", "--workspace", "--bins"])
    built = ROOT / "target" / "release"
    model = options.model or pathlib.Path(run([built / "baton", "model", "fetch", MODEL]))
    options.venv.mkdir(parents=True, exist_ok=True)
    python = environment("pooling", options.venv)
    script = str(pathlib.Path(__file__).with_name("pooling_peer.py"))
    engines: list[Any] = [
        Engine(name, [str(python), script, name, str(model), str(options.threads)])
        for name in options.peers
    ]
    absent: dict[str, str] = {}
    os.environ["HF_HUB_OFFLINE"] = "1"
    load = texts(model, options.texts, options.seed)
    waves = [load[at : at + CLIENTS] for at in range(0, len(load), CLIENTS)]
    batches: dict[str, int | None] = {"baton": None}
    baton = Baton(built, model, options.threads, options.cpus, options.worker_args,
                  options.venv / "pooling")
    try:
        baton.wait()
        for engine in list(engines):
            engine.start(options.cpus, options.venv / f"{engine.name}.log")
            found = engine.ask({"measure": "batches", "texts": waves[0]})
            if "error" in engine.about or "error" in found:
                absent[engine.name] = engine.about.get("error") or found["error"]
                engine.end()
                engines.remove(engine)
            else:
                batches[engine.name] = found["batch"]
        engines = [baton, *engines]
        # The first round warms up.
        for turn in range(options.rounds + 1):
            for engine in engines:
                print(f"\rround {turn} of {options.rounds}: {engine.name:30}", end="",
                      file=sys.stderr, flush=True)
                # Clients of Baton never wait for each other; a peer has 64 texts at a time.
                parts = [load] if engine is baton else waves
                asks = {"throughput": [{"measure": "throughput", "texts": part} for part in parts],
                        "latency": [{"measure": "latency", "text": SHORT, "runs": options.runs}]}
                for key, several in asks.items():
                    answers = [engine.ask(ask) for ask in several]
                    if any("error" in answer for answer in answers):
                        raise SystemExit(f"{engine.name}: {answers}")
                    if turn > 0:
                        seconds = sum(answer["seconds"] for answer in answers)
                        engine.samples.setdefault(key, []).append(seconds)
        print(file=sys.stderr)
        ours, theirs = (engine.ask({"measure": "vectors", "texts": waves[0]})["vectors"]
                        for engine in engines[:2])
    finally:
        for engine in {id(engine): engine for engine in [*engines, baton]}.values():
            engine.end()
    report = {
        "model": "all-MiniLM-L6-v2" if options.model is None else model.name,
        "threads": options.threads, "rounds": options.rounds, "texts": len(load),
        "short tokens": len(SHORT.split()) + 2, "machine": machine(options.cpus),
        "results": results(engines, len(load)),
        "least cosine": min(map(cosine, ours, theirs)),
        "absent": absent, "samples": {engine.name: engine.samples for engine in engines},
        "engines": {engine.name: {"version": engine.about["version"], "batch": batches[engine.name]}
                    for engine in engines},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pooling.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "pooling.md").write_text(markdown(report) + "\n![Embeddings](pooling.svg)\n")
    plot = environment("plot", options.venv)
    run([plot, "-c", PLOT, options.out / "pooling.json", options.out / "pooling.svg"])
    print(markdown(report))


if __name__ == "__main__":
    main()
