"""Sends a gateway what its OpenAPI document allows, and what it does not, and holds the replies
against the document, with schemathesis: all of its checks, in all of its phases. Then looks
whether every status that the document has was seen.

Usage: fuzz.py BASE_URL KEY MODELS

MODELS is JSON: the model of each route, and under an empty name that of all others.
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

[phases.stateful.generation]
max-examples = 80

[checks]
positive_data_acceptance.expected-statuses = ["2xx"]
"""

# What else may be said to a request that fits the schema: the rule behind it, which no schema can
# say. Whatever is not here has to be taken.
NO_MODEL = {404: "a model of this name"}
OF_PROMPT = {
    400: "a prompt that is not empty, and that fits the model's context with its answer",
    **NO_MODEL,
}
OF_ANSWER = {
    400: f"""{OF_PROMPT[400]}; token ids within the vocabulary; `min_tokens` up to `max_tokens`;
        --max-logprobs; a grammar, an expression or a schema that compiles and can be met; names of
        tools that differ, and one of them in `tool_choice`""",
    **NO_MODEL,
}
OF_TEXTS = {
    400: """texts that are not empty, fit the model's context, and are one field's or the other's;
        token ids within the vocabulary; dimensions that the model has; a task that it has""",
    **NO_MODEL,
}
STORED = {404: "a response of this id"}
MAY_REFUSE = {
    "POST /v1/chat/completions": OF_ANSWER,
    "POST /v1/completions": OF_ANSWER,
    "POST /v1/messages": {
        400: f"""{OF_ANSWER[400]}; a message that is not the system's; a last message of the
            assistant that has text and no open call""",
        **NO_MODEL,
    },
    "POST /v1/messages/count_tokens": {
        400: """names of tools; a message that is not the system's; a last message of the assistant
            that has text and no open call""",
        **NO_MODEL,
    },
    "POST /v1/responses": {
        400: f"{OF_ANSWER[400]}; a message among the items; a call before its output; a new id",
        404: "a model of this name, an earlier response of this id",
    },
    "GET /v1/responses/{id}": {400: "a response that has events, for a stream", **STORED},
    "DELETE /v1/responses/{id}": STORED,
    "POST /v1/responses/{id}/cancel": {400: "a response that is being made", **STORED},
    "GET /v1/responses/{id}/input_items": {400: "`after` is the id of an item", **STORED},
    "POST /invocations": OF_PROMPT | {400: f"{OF_PROMPT[400]}; token ids of the vocabulary"},
    **{
        f"POST {path}": OF_TEXTS
        for path in (
            *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
            *("/rerank", "/v1/rerank", "/v2/rerank"),
        )
    },
    "POST /tokenize": {400: "names of tools, and one of them in `tool_choice`", **NO_MODEL},
    "POST /detokenize": {400: "token ids of the vocabulary", **NO_MODEL},
    "GET /tokenizer_info": NO_MODEL,
    "GET /v1/models/{name}": NO_MODEL,
    "POST /v1/load_lora_adapter": {400: "an adapter that fits the model", 404: "a folder there"},
    "POST /v1/unload_lora_adapter": {404: "an adapter of this name"},
    "GET /": {304: "a page that has changed"},
    "HEAD /": {304: "a page that has changed"},
    "GET /docs": {307: "it leads elsewhere"},
    "GET /docs/{file}": {404: "a file of this name"},
}

# Statuses that this cannot bring about, and where they are seen. `*` is every operation.
ELSEWHERE = {
    ("*", 403): "needs an admin key: access.rs",
    ("*", 408): "a slow client: cancel.rs",
    ("*", 413): "a body of megabytes: bad_input.rs",
    ("*", 429): "a queue that is full: access.rs, slow_clients.rs",
    ("*", 500): "a failure of the server, which no request may cause",
    ("*", 502): "workers that die: membership.rs",
    ("*", 503): "no worker: access.rs, responses.rs",
    ("*", 504): "a request that takes too long: cancel.rs",
    ("POST /v1/load_lora_adapter", 200): "needs an adapter: lora.rs",
    ("POST /v1/unload_lora_adapter", 200): "needs an adapter: lora.rs",
    ("GET /openapi.json", 200): "where the document comes from",
    ("GET /tokenizer_info", 400): "a query that names the model twice: openapi.rs",
    # A key is left out of what was answered with 2xx.
    ("POST /v1/load_lora_adapter", 401): "access.rs",
    ("POST /v1/unload_lora_adapter", 401): "access.rs",
}

# Statuses that come by chance, and where they are seen for sure.
BY_CHANCE = {
    ("GET /v1/responses/{id}", 200): "a step must follow the one that stored it: responses.rs",
    ("GET /v1/responses/{id}", 401): "as above: access.rs",
    ("POST /v1/responses/{id}/cancel", 200): "the response must still be running: responses.rs",
    ("POST /v1/responses/{id}/cancel", 401): "the key is left out of what was taken: access.rs",
    ("POST /score", 200): "two fields of texts that go together: pooling",
    ("POST /score", 401): "access.rs",
    ("POST /v1/score", 200): "as /score",
    ("POST /v1/score", 401): "access.rs",
}
# A form has strings only, in which numbers and lists are written: what is drawn to be wrong often
# is not, so the forms of sound are left to audio.rs. Scaling fails where nothing can be launched,
# which is the server's failure: it is left to scale.rs.
ELSEWHERE_ALL = ("/v1/audio/", "/scale_elastic_ep")

# The generator draws from at most four rules between fields, so the phases that draw do without.
RUNS = [("with", "examples,coverage"), ("without", "fuzzing,stateful")]


def main() -> None:
    base_url, key, models = sys.argv[1:]
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
        left_out = f"^({'|'.join(ELSEWHERE_ALL)})"
        for rules, phases in RUNS:
            report = Path(folder) / f"{rules}.ndjson"
            ran = subprocess.run(
                [
                    Path(sys.executable).with_name("schemathesis"),
                    *("--config-file", config, "run", f"{base_url}/openapi.json"),
                    *("--checks", "all", "--phases", phases, "--exclude-path-regex", left_out),
                    *("--header", f"Authorization: Bearer {key}"),
                    # One worker: CPython 3.11 counts the depth of its parser over all threads.
                    *("--max-examples", "10", "--workers", "1", "--request-timeout", "60"),
                    *("--no-color", "--report-ndjson-path", report),
                ],
                cwd=folder,
                env={**os.environ, "FUZZ_MODELS": models, "FUZZ_RULES": rules},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            print(ran.stdout)
            failed |= ran.returncode != 0
            look(report, seen)
    with urllib.request.urlopen(f"{base_url}/openapi.json") as reply:
        document = json.load(reply)
    sys.exit(failed | unseen(document, seen))


def unseen(document: dict, seen: dict) -> bool:
    """Whether a status of the document was not seen, though none of the exceptions names it; or
    was, though one does."""
    wrong = []
    for path, item in document["paths"].items():
        if path.startswith(ELSEWHERE_ALL):
            continue
        for method, operation in item.items():
            name = f"{method.upper()} {path}"
            print(name, dict(sorted(seen[name].items())))
            for status in map(int, operation["responses"]):
                if (name, status) in BY_CHANCE:
                    continue
                excused = ELSEWHERE.get((name, status)) or ELSEWHERE.get(("*", status))
                if bool(excused) == (status in seen[name]):
                    wrong.append(f"{name}: {status}, " + ("excused" if excused else "not seen"))
    print("\n".join(["Statuses:", *(wrong or ["all seen"])]))
    return bool(wrong)


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
