#!/usr/bin/env python3
"""Draws `planner.json`, as `tests/examples/simulate.rs` writes it, as `planner.svg` beside it.

    python3 tests/bench/plot_planner.py [FILE]

matplotlib comes from PyPI, into the same environment under `target/bench-venv` that peers.py uses.
"""

from peers import draw

PLOT = """
import json, sys
import matplotlib
matplotlib.use("svg")
import matplotlib.pyplot as plt
matplotlib.rcParams["svg.hashsalt"] = "planner"
report = json.load(open(sys.argv[1]))
workloads = list(dict.fromkeys(run["workload"] for run in report["runs"]))
figure, axes = plt.subplots(len(workloads), 2, figsize=(10, 3.2 * len(workloads)), squeeze=False)
for (left, right), workload in zip(axes, workloads):
    runs = [run for run in report["runs"] if run["workload"] == workload]
    for color, policy in enumerate(["static", "utilization", "planner"]):
        points = [(run["worker_hours"], 100 * run["good"], run) for run in runs
                  if run["policy"].startswith(policy) and "only" not in run["policy"]]
        points.sort(key=lambda point: point[:2])
        left.plot([x for x, *_ in points], [y for _, y, _ in points], marker="o", markersize=3,
                  color=f"C{color}", label=policy)
        if policy != "static":
            for x, y, run in points:
                left.annotate(f"{100 * run['setting']:.0f}", (x, y), fontsize=6,
                              textcoords="offset points", xytext=(3, -7))
    left.set_title(workload, fontsize=9)
    left.set_ylabel("requests with both promises kept, %")
    left.set_xlabel("worker-hours")
    for color, policy, setting in [(1, "utilization", 0.7), (2, "planner", 0.95)]:
        run = next(run for run in runs if run["policy"] == policy and run["setting"] == setting)
        for pool, style in enumerate(["-", ":"]):
            hours = [i * run["every_minutes"] / 60 for i in range(len(run["sizes"]))]
            name = f"{policy}, {['prefill', 'decode'][pool]}"
            right.plot(hours, [sizes[pool] for sizes in run["sizes"]], style, color=f"C{color}",
                       linewidth=0.9, label=name)
    right.set_ylabel("workers")
    right.set_xlabel("hours")
    for axis in (left, right):
        axis.grid(linewidth=0.4)
        axis.legend(fontsize=7)
figure.tight_layout()
figure.savefig(sys.argv[2], metadata={"Date": None})
"""


if __name__ == "__main__":
    draw(PLOT, __doc__.splitlines()[0], "planner.json")
