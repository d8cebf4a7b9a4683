#!/usr/bin/env python3
"""Draws `load.json`, as `tests/examples/load.rs` writes it, as `load.svg` beside it.

    python3 tests/bench/plot_load.py [FILE]

matplotlib comes from PyPI, into the same environment under `target/bench-venv` that peers.py uses.
"""

from peers import draw

PLOT = """
import json, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
report = json.load(open(sys.argv[1]))
pools = list(dict.fromkeys(run["pool"] for run in report["runs"]))
panels = [
    ("answered requests, 1/s", [("throughput", None, "-")]),
    ("goodput, 1/s", [("goodput", None, "-")]),
    ("time to the first token, ms", [("ttft", "p50", "-"), ("ttft", "p99", "--")]),
    ("time between tokens, ms", [("itl", "p50", "-"), ("itl", "p99", "--")]),
]
figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
for axis, (label, lines) in zip(axes.flat, panels):
    for i, pool in enumerate(pools):
        runs = [run for run in report["runs"] if run["pool"] == pool]
        rates = [run["rate"] for run in runs]
        for key, part, style in lines:
            values = [run[key][part] if part else run[key] for run in runs]
            name = f"{pool}, {part}" if part else pool
            axis.plot(rates, values, style, color=f"C{i}", marker="o", markersize=3, label=name)
    if lines[0][1]:
        axis.set_yscale("log")
    else:
        # What a pool answers when it keeps up.
        axis.plot(*[[0, max(run["rate"] for run in report["runs"])]] * 2, color="grey",
                  linewidth=0.6)
    axis.set_ylabel(label)
    axis.grid(linewidth=0.4)
    axis.legend()
for axis in axes[-1]:
    axis.set_xlabel("offered requests, 1/s")
figure.tight_layout()
figure.savefig(sys.argv[2])
"""


if __name__ == "__main__":
    draw(PLOT, __doc__.splitlines()[0], "load.json")
