#!/usr/bin/env python3
"""Baton's engine and its peers on one CPU: the same file, threads and token ids, in turns.

    python3 tests/bench/peers.py

builds Baton, installs the peers from PyPI under `target/bench-venv`, measures all of them
alternately and writes `peers.json` (every sample), `peers.md` and `peers.svg` to `docs/benchmarks`.
See README.md beside this file.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
# By default Baton rounds activations and KV to sixteen bits, which gives float32's answers. With
# eight, like its peers, it does half the multiplications.
OURS = {
    "baton": [],
    "baton-8bit": ["--activation-bits", "8", "--kv-cache-dtype", "int8"],
}
# llama.cpp is built from source: the wheel on PyPI has no code for this CPU's wide vectors.
PACKAGES = {
    "llama-cpp": (["llama-cpp-python==0.3.36"], {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
    "ik-llama-cpp": (["ik-llama-cpp-python"], {}),
    "openvino": (["openvino-genai==2026.4.*", "numpy"], {}),
    "pooling": (["sentence-transformers==6.2.*", "torch==2.15.*", "onnxruntime==1.32.*",
                 "onnx==1.23.*", "openvino==2026.4.*"], {}),
    "speech": (["faster-whisper==1.2.*", "jiwer==4.*"], {}),
    "plot": (["matplotlib"], {}),
}
PEERS = ["llama-cpp", "llama-cpp-flash", "ik-llama-cpp", "ik-llama-cpp-flash", "openvino"]
STEPS = 32
MEASURES: list[dict[str, Any]] = [
    {"measure": "prefill", "tokens": 512},
    {"measure": "prefill", "tokens": 1500},
    {"measure": "decode", "streams": 1, "context": 64, "steps": STEPS},
    {"measure": "decode", "streams": 1, "context": 1024, "steps": STEPS},
    {"measure": "decode", "streams": 8, "context": 64, "steps": STEPS},
    {"measure": "decode", "streams": 32, "context": 64, "steps": STEPS},
    {"measure": "decode", "streams": 8, "context": 1024, "steps": STEPS},
    {"measure": "load"},
]


def title(ask: dict[str, Any]) -> str:
    match ask["measure"]:
        case "prefill":
            return f"prefill, {ask['tokens']} tokens"
        case "decode":
            streams = ask["streams"]
            return f"decode, {streams} stream{'s' * (streams > 1)}, context {ask['context']}"
        case _:
            return "load, to the first token"


def work(ask: dict[str, Any]) -> int | None:
    """Tokens of a measure; `None` where the time itself is the result."""
    match ask["measure"]:
        case "prefill":
            return ask["tokens"]
        case "decode":
            return ask["streams"] * ask["steps"]
        case _:
            return None


@dataclass
class Engine:
    """A process that measures on demand, stopped while it is not its turn: idle threads of some
    libraries spin."""

    name: str
    command: list[str]
    process: subprocess.Popen[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def start(self, cpus: str, log: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            ["taskset", "-c", cpus, *self.command], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, stderr=log.open("w"),
        )
        self.about = self.ask({"measure": "about"})
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, ask: dict[str, Any]) -> dict[str, Any]:
        process = self.process
        assert process and process.stdin and process.stdout
        process.send_signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(ask) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with {process.wait()}"}
        process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def measure(self, ask: dict[str, Any], counts: bool) -> None:
        name = title(ask)
        if name in self.errors:
            return
        answer = self.ask(ask)
        if "error" in answer:
            self.errors[name] = answer["error"]
        elif counts:
            self.samples.setdefault(name, []).append(answer["seconds"])

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(command: list[str | pathlib.Path], **more: Any) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT, **more)
    return done.stdout.strip()


def environment(name: str, at: pathlib.Path) -> pathlib.Path:
    """Installs one peer's packages into a venv of its own; gives its Python."""
    packages, variables = PACKAGES[name]
    python = at / name / "bin" / "python"
    done = at / name / "installed"
    if not done.exists():
        print(f"installing {' '.join(packages)}", file=sys.stderr)
        run([sys.executable, "-m", "venv", at / name])
        run([python, "-m", "pip", "install", "--quiet", *packages],
            env=dict(os.environ, **variables))
        done.touch()
    return python


def draw(script: str, description: str, report: str) -> None:
    """The command line of a program that draws a report of `docs/benchmarks` beside it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=pathlib.Path, nargs="?",
                        default=ROOT / "docs" / "benchmarks" / report)
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / "target" / "bench-venv")
    options = parser.parse_args()
    options.venv.mkdir(parents=True, exist_ok=True)
    plot = environment("plot", options.venv)
    out = options.file.with_suffix(".svg")
    run([plot, "-c", script, options.file.resolve(), out.resolve()])
    print(out, file=sys.stderr)


def machine(cpus: str) -> dict[str, Any]:
    info = pathlib.Path("/proc/cpuinfo").read_text()
    value = lambda key: next(  # noqa: E731
        (line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith(key)), "?"
    )
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": value("model name"),
        "flags": [flag for flag in wanted if flag in value("flags").split()],
        "cores": os.cpu_count(), "cores used": cpus, "memory GiB": round(memory),
        "kernel": platform.release(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def bandwidth(program: pathlib.Path, cpus: str, threads: int, megabytes: int) -> float:
    out = run(["taskset", "-c", cpus, program, "--threads", str(threads),
               "--megabytes", str(megabytes)])
    return json.loads(out)["bytes_per_second"]


def results(engines: list[Engine]) -> list[dict[str, Any]]:
    """Of each measure the medians, and ours against the best peer's: above one is faster."""
    rows = []
    for ask in MEASURES:
        name, tokens = title(ask), work(ask)
        medians = {e.name: statistics.median(e.samples[name]) for e in engines if name in e.samples}
        rate = {e: (tokens / s if tokens else s) for e, s in medians.items()}
        peers = {e: s for e, s in medians.items() if e not in OURS}
        best = min(peers, key=peers.__getitem__) if peers else None
        llama = min((s for e, s in peers.items() if e.startswith("llama-cpp")), default=None)
        against = lambda seconds: {  # noqa: E731
            ours: seconds / medians[ours] for ours in OURS if seconds and ours in medians
        }
        rows.append({
            "measure": name, "unit": "tokens/s" if tokens else "s", "medians": rate, "best": best,
            "to the best": against(medians[best] if best else None), "to llama.cpp": against(llama),
        })
    return rows


def shares(engines: list[Engine], weights: int, bandwidth: float) -> list[dict[str, Any]]:
    """What part of the memory's speed decoding for one stream reaches, by the bytes it must read."""
    rows = []
    for ask in MEASURES:
        if ask["measure"] != "decode" or ask["streams"] != 1:
            continue
        for engine in engines:
            samples = engine.samples.get(title(ask))
            if engine.name in OURS and samples:
                context = ask["context"] + ask["steps"] / 2
                needs = weights + context * engine.about["kv_bytes_per_token"]
                rate = ask["steps"] / statistics.median(samples)
                rows.append({"measure": title(ask), "engine": engine.name,
                             "share": rate * needs / bandwidth})
    return rows


def markdown(report: dict[str, Any]) -> str:
    names = [engine["name"] for engine in report["engines"]]
    ours = [name for name in names if name in OURS]
    lines = [
        "# Baton's engine and its peers on one CPU", "",
        f"Made by `tests/bench/peers.py`: {report['model']}, {report['threads']} threads, medians of "
        f"{report['rounds']} rounds in turns. Tokens a second; `load` in seconds. The ratios are ours "
        "to the best peer's, and to llama.cpp's with or without flash attention, whichever is faster: "
        "above one, Baton is faster.", "",
        "| measure | " + " | ".join(names) + " | best peer | "
        + " | ".join(f"{name} / {to}" for to in ("best", "llama.cpp") for name in ours) + " |",
        "| --- |" + " --- |" * (len(names) + 1 + 2 * len(ours)),
    ]
    for row in report["results"]:
        digits = 0 if row["unit"] == "tokens/s" else 2
        cells = [f"{row['medians'][n]:,.{digits}f}" if n in row["medians"] else "–" for n in names]
        cells.append(row["best"] or "–")
        cells += [f"**{row[to][n]:.2f}**" if n in row[to] else "–"
                  for to in ("to the best", "to llama.cpp") for n in ours]
        lines.append(f"| {row['measure']} | {' | '.join(cells)} |")
    memory = report["bandwidth"]
    lines += ["", "Memory read on the same threads: " + ", ".join(
        f"{rate / 1e9:.1f} GB/s over {size} MB" for size, rate in memory.items())
        + ". Of the faster of these, weights and KV read for each token take:", ""]
    lines += [f"* {row['engine']}, {row['measure']}: {row['share']:.0%}" for row in report["shares"]]
    lines += [""]
    lines += [f"* {key}: {value if isinstance(value, (str, int)) else ', '.join(value)}"
              for key, value in report["machine"].items()]
    lines += ["", "| engine | version | notes |", "| --- | --- | --- |"]
    for engine in report["engines"]:
        about = engine["about"]
        lines.append(f"| {engine['name']} | {about.get('version', '–')} | {about.get('notes', '')} |")
    failed = [f"* {e['name']}, {measure}: {error}" for e in report["engines"]
              for measure, error in e["errors"].items()]
    failed += [f"* {name}: {error}" for name, error in report["absent"].items()]
    if failed:
        lines += ["", "What did not run:", "", *failed]
    return "\n".join(lines) + "\n"


PLOT = """
import json, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
report = json.load(open(sys.argv[1]))
rows = [row for row in report["results"] if row["best"] and row["unit"] == "tokens/s"]
names = [engine["name"] for engine in report["engines"]]
figure, axes = plt.subplots(figsize=(10, 5.5))
height = 0.8 / len(names)
for i, name in enumerate(names):
    # Relative to the best peer, so that all measures fit one axis.
    values = [row["medians"].get(name, 0) / row["medians"][row["best"]] for row in rows]
    places = [at + (i - (len(names) - 1) / 2) * height for at in range(len(rows))]
    axes.barh(places, values, height, label=name, zorder=2)
axes.set_yticks(range(len(rows)), [row["measure"] for row in rows])
axes.invert_yaxis()
axes.axvline(1, color="black", linewidth=0.8)
axes.set_xlabel("throughput, best peer = 1")
axes.grid(axis="x", linewidth=0.4)
axes.legend(loc="lower right")
figure.tight_layout()
figure.savefig(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF; by default the default model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpus", default="0,1", help="cores for all engines, as taskset takes them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / "target" / "bench-venv")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    run(["cargo", "build", "--release", "--bin", "baton"])
    run(["cargo", "build", "--release", "-p", "baton-worker", "--example", "bench_model",
         "--example", "bench_memory"])
    built = ROOT / "target" / "release"
    model = options.model or pathlib.Path(run([built / "baton", "model", "fetch"]))
    options.venv.mkdir(parents=True, exist_ok=True)
    threads = str(options.threads)
    bench = str(built / "examples" / "bench_model")
    engines = [Engine(name, [bench, str(model), "--threads", threads, "--json", *flags])
               for name, flags in OURS.items()]
    absent: dict[str, str] = {}
    for name in options.peers:
        try:
            python = environment(name.removesuffix("-flash"), options.venv)
            script = str(pathlib.Path(__file__).with_name("peer.py"))
            engines.append(Engine(name, [str(python), script, name, str(model), threads]))
        except subprocess.CalledProcessError as error:
            absent[name] = f"cannot be installed: {error}"
    try:
        for engine in list(engines):
            engine.start(options.cpus, options.venv / f"{engine.name}.log")
            if "error" in engine.about:
                absent[engine.name] = engine.about["error"]
                engines.remove(engine)
        # The first round warms up.
        for turn in range(options.rounds + 1):
            for ask in MEASURES:
                print(f"\rround {turn} of {options.rounds}: {title(ask):40}", end="",
                      file=sys.stderr, flush=True)
                for engine in engines:
                    engine.measure(ask, counts=turn > 0)
        print(file=sys.stderr)
    finally:
        for engine in engines:
            engine.end()
    weights = model.stat().st_size
    memory = {size: bandwidth(built / "examples" / "bench_memory", options.cpus, options.threads, size)
              for size in (weights // 1_000_000, 1024)}
    report = {
        "model": model.name, "threads": options.threads, "rounds": options.rounds,
        "machine": machine(options.cpus), "bandwidth": memory, "results": results(engines),
        "shares": shares(engines, weights, max(memory.values())),
        "absent": absent,
        "engines": [{key: getattr(engine, key) for key in ("name", "about", "samples", "errors")}
                    for engine in engines],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "peers.md").write_text(markdown(report) + "\n![Throughput](peers.svg)\n")
    plot = environment("plot", options.venv)
    run([plot, "-c", PLOT, options.out / "peers.json", options.out / "peers.svg"])
    print(markdown(report))


if __name__ == "__main__":
    main()
