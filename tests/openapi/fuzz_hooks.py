"""Keeps what schemathesis makes up answerable: the model that there is, and short answers."""

import collections
import json
import os

import schemathesis

MOST = {"n": 2, "max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2}
# Where a request without a limit gets what is left of the context, and the field that limits it.
UNLIMITED = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/invocations": "max_tokens",
    "/v1/responses": "max_output_tokens",
}

MODELS = json.loads(os.environ["FUZZ_MODELS"])

CALLS = collections.Counter()
# Ids of responses that are kept.
KEPT = collections.deque(maxlen=16)


@schemathesis.hook
def before_load_schema(context, schema):
    if os.environ["FUZZ_RULES"] == "with":
        return
    schemas = schema["components"]["schemas"]
    # The generator draws from at most four rules between fields.
    for described in schemas.values():
        described.pop("dependentSchemas", None)
    # Chains of operations do not begin where a field is named as if something else's id belonged
    # there.
    for field in ("previous_response_id", "request_id", "stop_token_ids", "allowed_token_ids"):
        del schemas["ResponsesRequest"]["properties"][field]


@schemathesis.hook
def before_call(context, case, kwargs):
    meta = case.meta
    positive = meta is not None and meta.generation.mode.is_positive
    # Chains of operations have names of their own.
    if positive and meta.phase.name.value != "stateful" and case.path_parameters:
        name_what_there_is(case)
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = MODELS.get(case.path, MODELS[""])
    if positive:
        # Whether it is taken is the gateway's to say, by a flag.
        body.pop("chat_template", None)
        vary(case.path, body)
    limit = UNLIMITED.get(case.path)
    if limit and body.get(limit) is None:
        body[limit] = 2
    for field, most in MOST.items():
        value = body.get(field)
        if type(value) is int and most < value <= 128:
            body[field] = most


@schemathesis.hook
def after_call(context, case, response):
    if case.path == "/v1/responses" and response.status_code == 200:
        if response.headers["content-type"] == ["application/json"]:
            reply = response.json()
            if reply["store"]:
                KEPT.append(reply["id"])


def name_what_there_is(case):
    """Every other time, a path leads to something."""
    CALLS[case.operation.label] += 1
    if CALLS[case.operation.label] % 2 == 0:
        return
    if case.path == "/v1/models/{name}":
        case.path_parameters["name"] = MODELS[""]
    if case.path.startswith("/v1/responses/") and KEPT:
        case.path_parameters["id"] = KEPT.pop() if case.method == "DELETE" else KEPT[-1]
        # Ids of its items are in no reply that a generator has seen.
        if case.query:
            case.query.pop("after", None)


def vary(path, body):
    """Now and then asks for a model that there is not, and for a response that can be cancelled."""
    CALLS[path] += 1
    if CALLS[path] % 32 == 3 and "model" in body:
        body["model"] = "no-such-model"
    if path == "/v1/responses" and CALLS[path] % 2 == 0 and body.get("store") is not False:
        body.update(background=True, max_output_tokens=48, ignore_eos=True)
