"""Sends a gateway what its OpenAPI document allows, and what it does not, and holds the replies
against the document, with schemathesis.

Usage: fuzz.py BASE_URL KEY MODEL
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
hooks = "fuzz_hooks.py"
seed = 7
continue-on-failure = true

[checks]
# What fits the schema may still contradict itself, or the model: a rule between two fields, a
# template's rule on roles, a length.
positive_data_acceptance.expected-statuses = ["2xx", "304", "307", "400", "404"]
# A key is checked first, so a request without one is 401, whatever else it lacks.
missing_required_header.enabled = false
"""


def main() -> None:
    base_url, key, model = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG)
        hooks = Path(__file__).with_name("fuzz_hooks.py").read_text()
        (Path(folder) / "fuzz_hooks.py").write_text(hooks)
        ran = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                *("--config-file", config, "run", f"{base_url}/openapi.json"),
                *("--checks", "all", "--phases", "examples,coverage,fuzzing"),
                *("--header", f"Authorization: Bearer {key}"),
                # One worker: CPython 3.11 counts the depth of its parser over all threads.
                *("--max-examples", "10", "--workers", "1", "--request-timeout", "60"),
                "--no-color",
            ],
            cwd=folder,
            env={**os.environ, "FUZZ_MODEL": model},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    print(ran.stdout)
    sys.exit(ran.returncode)


if __name__ == "__main__":
    main()
