"""Drives a Baton gateway with the official `anthropic` client. Fails at the first surprise.

Usage: drive.py BASE_URL KEY MODEL
"""

import sys

import anthropic
from anthropic import Anthropic

MESSAGES = [{"role": "user", "content": "Say hello in one short sentence."}]
# Its models of today take none, so the client has no argument for it any more.
GREEDY = {"temperature": 0}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def fails(error: type[anthropic.APIStatusError], kind: str, call) -> anthropic.APIStatusError:
    try:
        reply = call()
    except error as e:
        assert type(e) is error, f"{type(e)} is not exactly {error}"
        assert e.body["type"] == "error", e.body
        assert e.body["error"]["type"] == kind and e.body["error"]["message"], e.body
        return e
    raise AssertionError(f"no {error.__name__}: {reply!r}")


def events_in_order(events: list) -> None:
    """Blocks come one after the other, each with its start, its deltas and its stop."""
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    open_block, count = None, 0
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert open_block is None and event.index == count, event
            open_block, count = count, count + 1
        elif event.type == "content_block_delta":
            assert event.index == open_block, event
        else:
            assert event.type == "content_block_stop" and event.index == open_block, event
            open_block = None
    assert open_block is None, kinds


def text(client: Anthropic, model: str) -> None:
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY}
    whole = client.messages.create(**ask)
    assert whole.type == "message" and whole.role == "assistant" and whole.model == model, whole
    assert [block.type for block in whole.content] == ["text"] and whole.content[0].text, whole
    assert whole.stop_reason in ("end_turn", "max_tokens"), whole
    assert whole.stop_sequence is None and whole.usage.output_tokens > 0, whole

    events = list(client.messages.create(**ask, stream=True))
    events_in_order(events)
    start, end = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None, start
    assert start.usage.input_tokens == whole.usage.input_tokens, start
    assert end.delta.stop_reason == whole.stop_reason, end
    assert end.usage.input_tokens == whole.usage.input_tokens, end
    assert end.usage.output_tokens == whole.usage.output_tokens, end

    with client.messages.stream(**ask) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == whole.content[0].text, (pieces, whole)
    assert final.content[0].text == pieces and final.stop_reason == whole.stop_reason, final

    cut = client.messages.create(**{**ask, "max_tokens": 2})
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2, cut
    # A word of the answer, so that it is met.
    word = whole.content[0].text.split()[2]
    stopped = client.messages.create(**ask, stop_sequences=[word])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word, stopped
    assert word not in "".join(block.text for block in stopped.content), stopped

    system = [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}]
    begun = MESSAGES + [{"role": "assistant", "content": "Hello and"}]
    goes_on = client.messages.create(**{**ask, "messages": begun}, system=system)
    assert not goes_on.content[0].text.startswith("Hello and"), goes_on


def tools(client: Anthropic, model: str) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    ask = {
        "model": model,
        "messages": question,
        "max_tokens": 64,
        "extra_body": GREEDY,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    whole = client.messages.create(**ask)
    assert whole.stop_reason == "tool_use", whole
    [call] = whole.content
    assert call.type == "tool_use" and call.name == "get_weather" and call.id, whole
    assert call.input.keys() == {"city"} and call.input["city"] in ("Paris", "Rome"), whole

    events = list(client.messages.create(**ask, stream=True))
    events_in_order(events)
    with client.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[0].input == call.input, final

    anyone = {**ask, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    chosen = client.messages.create(**anyone)
    assert [block.name for block in chosen.content] == ["get_weather"], chosen

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 25 degrees."}
    told = question + [
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(model=model, messages=told, max_tokens=24, extra_body=GREEDY)
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.content, answer

    form = {"format": {"type": "json_schema", "schema": TOOL["input_schema"]}}
    formed = client.messages.create(
        model=model, messages=question, max_tokens=64, output_config=form, extra_body=GREEDY
    )
    assert '"city"' in formed.content[0].text, formed


def count(client: Anthropic, model: str) -> None:
    few = client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens
    whole = client.messages.create(model=model, messages=MESSAGES, max_tokens=1)
    assert few == whole.usage.input_tokens, (few, whole)
    more = client.messages.count_tokens(model=model, messages=MESSAGES, system="Be brief. " * 9)
    assert more.input_tokens > few, (few, more)


def errors(client: Anthropic, base_url: str, model: str) -> None:
    create = client.messages.create
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 8}
    bad = (anthropic.BadRequestError, "invalid_request_error")
    e = fails(
        anthropic.NotFoundError, "not_found_error", lambda: create(**{**ask, "model": "opus-17"})
    )
    assert "opus-17" in str(e), e
    e = fails(*bad, lambda: create(**ask, extra_body={"temperature": -1}))
    assert "temperature" in str(e), e
    fails(*bad, lambda: create(**{**ask, "messages": []}))
    fails(*bad, lambda: create(**{**ask, "max_tokens": 0}, stream=True))
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    e = fails(*bad, lambda: create(**{**ask, "messages": [{"role": "user", "content": [image]}]}))
    assert "messages[0].content[0].type" in str(e), e
    fails(*bad, lambda: client.messages.count_tokens(model=model, messages=[]))
    fails(*bad, lambda: client.post("/v1/messages", body=[], cast_to=object))
    stranger = Anthropic(base_url=base_url, api_key="wrong", max_retries=0)
    fails(
        anthropic.AuthenticationError,
        "authentication_error",
        lambda: stranger.messages.create(**ask),
    )


def main() -> None:
    base_url, key, model = sys.argv[1:]
    # `x-api-key`, and then `Authorization: Bearer`.
    client = Anthropic(base_url=base_url, api_key=key, max_retries=0, timeout=60)
    bearer = Anthropic(base_url=base_url, auth_token=key, max_retries=0, timeout=60)
    text(client, model)
    tools(client, model)
    count(bearer, model)
    errors(client, base_url, model)
    # Still sound after the errors.
    text(bearer, model)
    print(f"anthropic {anthropic.__version__}: messages, streaming, tools, counting, errors")


if __name__ == "__main__":
    main()
