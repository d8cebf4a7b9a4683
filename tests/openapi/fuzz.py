"""Sends a gateway what its OpenAPI document allows, and what it does not, and holds the replies
against the document, with schemathesis: all of its checks, in all of its phases. Then looks
whether every status that the document has was seen.

Usage: fuzz.py BASE_URL KEY MODEL
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

CONFIG = """
hooks = "fuzz_hooks.py"
seed = 7
continue-on-failure = true

[checks]
positive_data_acceptance.expected-statuses = ["2xx"]
"""

# What else may be said to a request that fits the schema, and why: an operation that is not here
# has to take it.
MAY_REFUSE = {
}

RUNS = [("with", "examples,coverage"), ("without", "fuzzing,stateful")]

def main() -> None:
    base_url, key, model = sys.argv[1:]
    failed = False
    seen = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        sections = [CONFIG]
        for name, statuses in MAY_REFUSE.items():
            accepted = json.dumps(["2xx", *(str(status) for status in statuses)])
            sections.append(
                f'[[operations]]\ninclude-name = "{name}"\n'
                f"checks.positive_data_acceptance.expected-statuses = {accepted}\n"
            )
        config.write_text("\n".join(sections))
        hooks = Path(__file__).with_name("fuzz_hooks.py").read_text()
        (Path(folder) / "fuzz_hooks.py").write_text(hooks)
        for rules, phases in RUNS:
            report = Path(folder) / f"{rules}.ndjson"
            ran = subprocess.run(
                [
                    Path(sys.executable).with_name("schemathesis"),
                    *("--config-file", config, "run", f"{base_url}/openapi.json"),
                    *("--checks", "all", "--phases", phases),
                    *("--header", f"Authorization: Bearer {key}"),
                    # One worker: CPython 3.11 counts the depth of its parser over all threads.
                    *("--max-examples", "10", "--workers", "1", "--request-timeout", "60"),
                    *("--no-color", "--report-ndjson-path", report),
                ],
                cwd=folder,
                env={**os.environ, "FUZZ_MODEL": model, "FUZZ_RULES": rules},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            print(ran.stdout)
            failed |= ran.returncode != 0
            look(report, seen)
    for name in sorted(seen):
        print(name, dict(sorted(seen[name].items())))
    sys.exit(failed)


def look(report: Path, seen) -> None:
    """Counts the statuses that each operation has answered with."""
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for name, made in recorder.get("interactions", {}).items():
            case, response = recorder["cases"][name]["value"], made.get("response")
            if response:
                seen[f"{case['method']} {case['path']}"][response["status_code"]] += 1


if __name__ == "__main__":
    main()
