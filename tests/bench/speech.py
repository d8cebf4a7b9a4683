#!/usr/bin/env python3
"""Baton's Whisper and faster-whisper on one CPU: the same weights, threads and sound, in turns.

    python3 tests/bench/speech.py

builds Baton and installs faster-whisper under `target/bench-venv`; it needs espeak-ng and sox.
A minute of speech is written down greedily (beam 1), with times, without the text of the window
before, by both in turn, each stopped (`SIGSTOP`) while it is not its turn; the ratio is the median
over pairs of neighbours. Writes `speech.json` (every sample), `speech.md` and `speech.svg` to `docs/benchmarks`.
See README.md beside this file.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from peers import ROOT, environment

VENV = ROOT / "target" / "bench-venv"
TARGET = 1.2
SENTENCES = (
    "The committee met on Tuesday to discuss the new bridge across the river.",
    "Several engineers explained why the old one could not carry any more traffic.",
    "They had measured it every month for two years, and the numbers were getting worse.",
    "A farmer asked whether his fields would be under water in the spring.",
    "Nobody could promise him that, but the plans show a wall along the northern bank.",
    "In the afternoon the visitors walked to the mill, where lunch was waiting for them.",
    "It rained a little, the bread was warm, and the children played under the tables.",
    "Before they left, the mayor thanked everybody and asked for patience.",
    "The work will begin in September and should take less than eighteen months.",
    "Until then the ferry leaves every half hour from the lower harbor.",
    "Tickets are free for people who live on the eastern side.",
    "Please write to the council if you have any further questions.",
    "Letters are read on the first Monday of the month, and every one of them is answered.",
    "Thank you for listening, and have a pleasant evening.",
)


PLOT = """
import json, statistics, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
samples = {name: [run["seconds"] for run in runs] for name, runs in json.load(open(sys.argv[1])).items()}
figure, axis = plt.subplots(figsize=(7, 2.4))
medians = [statistics.median(runs) for runs in samples.values()]
axis.barh(list(samples), medians, color=["C1" if name == "baton" else "C0" for name in samples])
for at, runs in enumerate(samples.values()):
    axis.plot(runs, [at] * len(runs), "|", color="black", markersize=8)
axis.invert_yaxis()
axis.set_xlabel("seconds for a minute of speech")
axis.grid(axis="x", linewidth=0.4)
figure.tight_layout()
figure.savefig(sys.argv[2])
"""


def speak(folder):
    """About a minute of speech, as 16 kHz samples, and how many seconds."""
    wav, raw = f"{folder}/speech.wav", f"{folder}/speech.s16"
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "155", "-w", wav, " ".join(SENTENCES)],
                   check=True)
    form = ["-r", "16000", "-c", "1", "-b", "16", "-e", "signed", "-t", "raw"]
    subprocess.run(["sox", "-D", wav, *form, raw], check=True)
    return raw, pathlib.Path(raw).stat().st_size / 32_000


class Engine:
    """A process that answers each line with a run, stopped while it is not its turn."""

    def __init__(self, command, environment):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | environment, **pipes)
        self.run()
        self.process.send_signal(signal.SIGSTOP)

    def run(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the engine ended"
        return json.loads(line)

    def turn(self):
        found = self.run()
        self.process.send_signal(signal.SIGSTOP)
        return found

    def end(self):
        self.process.kill()
        self.process.wait()


def peer(model, sound, threads, kind):
    """faster-whisper, a run for each line on stdin."""
    import numpy as np
    from faster_whisper import WhisperModel

    samples = np.fromfile(sound, dtype="<i2").astype(np.float32) / 32768.0
    whisper = WhisperModel(model, device="cpu", compute_type=kind, cpu_threads=threads)
    for _ in sys.stdin:
        begin = time.perf_counter()
        segments, _ = whisper.transcribe(
            samples, language="en", beam_size=1, best_of=1, temperature=0.0,
            condition_on_previous_text=False, without_timestamps=False)
        segments = list(segments)
        seconds = time.perf_counter() - begin
        text = "".join(segment.text for segment in segments)
        tokens = sum(len(segment.tokens) for segment in segments)
        windows = len({segment.seek for segment in segments})
        print(json.dumps({"seconds": seconds, "windows": windows, "tokens": tokens, "text": text}),
              flush=True)


def errors(text, said):
    import jiwer

    plain = lambda text: re.sub(r"[^a-z0-9 ]", "", text.lower())
    return jiwer.wer(plain(said), plain(text))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder of CTranslate2; by default whisper-base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=str(ROOT / "docs/benchmarks"))
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options.model, options.peer[0], options.threads, options.peer[1])
    python = str(environment("speech", VENV))
    if pathlib.Path(sys.prefix) != VENV / "speech":
        os.execv(python, [python, *sys.argv])
    build = ["cargo", "build", "--release", "--workspace", "--bins", "--example", "bench_whisper"]
    subprocess.run(build, cwd=ROOT, check=True)
    fetch = [ROOT / "target/release/baton", "model", "fetch", "whisper-base"]
    model = options.model or subprocess.check_output(fetch, text=True).strip()
    ours = str(ROOT / "target/release/examples/bench_whisper")
    threads = str(options.threads)
    limits = {"OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        sound, length = speak(folder)
        own = [python, __file__, "--model", model, "--threads", threads, "--peer", sound]
        engines = {
            "baton": Engine([ours, model, sound, "--threads", threads, "--json"], limits),
            "faster-whisper, float32": Engine([*own, "float32"], limits),
            "faster-whisper, int8": Engine([*own, "int8"], limits),
        }
        samples = {name: [] for name in engines}
        for _ in range(options.rounds):
            for name, engine in engines.items():
                samples[name].append(engine.turn())
        for engine in engines.values():
            engine.end()
    medians = {name: statistics.median(run["seconds"] for run in runs)
               for name, runs in samples.items()}
    lines = [
        "# Speech", "",
        f"Made by `tests/bench/speech.py` on {platform.machine()}, {cpu()}: {length:.1f} s of "
        f"English by espeak-ng, `{pathlib.Path(model).name}`, {threads} threads, greedy, with "
        f"times, medians of {options.rounds} rounds in turns. Target: {TARGET}× faster-whisper with "
        "the same weights.", "",
        "| engine | seconds | × real time | windows | tokens | word errors | ratio to Baton |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    said = " ".join(SENTENCES)
    for name, runs in samples.items():
        ratio = statistics.median(run["seconds"] / own["seconds"]
                                  for run, own in zip(runs, samples["baton"]))
        last = runs[-1]
        lines.append(f"| {name} | {medians[name]:.2f} | {length / medians[name]:.1f} | "
                     f"{last['windows']} | {last['tokens']} | {errors(last['text'], said):.1%} | "
                     f"{ratio:.2f} |")
    out = pathlib.Path(options.out)
    (out / "speech.json").write_text(json.dumps(samples, indent=1) + "\n")
    (out / "speech.md").write_text("\n".join(lines) + "\n\n![Speech](speech.svg)\n")
    subprocess.run([environment("plot", VENV), "-c", PLOT, out / "speech.json", out / "speech.svg"],
                   check=True)
    print("\n".join(lines))


def cpu():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    return re.search(r"model name\s*: (.*)", info).group(1)


main()
