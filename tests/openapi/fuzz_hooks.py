"""Keeps what schemathesis makes up answerable: the model that there is, and short answers."""

import os

import schemathesis

MOST = {"n": 2, "max_tokens": 2, "max_completion_tokens": 2}
# Where a request without a limit gets what is left of the context.
UNLIMITED = ("/v1/chat/completions", "/v1/completions", "/invocations")


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = os.environ["FUZZ_MODEL"]
    if case.path in UNLIMITED:
        body.setdefault("max_tokens", 2)
    for field, most in MOST.items():
        value = body.get(field)
        if type(value) is int and most < value <= 128:
            body[field] = most
