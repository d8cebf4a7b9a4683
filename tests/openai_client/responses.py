"""Drives the Responses API with the official `openai` client. Fails at the first surprise.

Usage: responses.py BASE_URL KEY MODEL
"""

import json
import sys
import time
import warnings

import openai
from openai import OpenAI
from openai.types import responses as types
from pydantic import BaseModel

# The client warns of values that its types do not know: none is expected.
warnings.simplefilter("error")


class Place(BaseModel):
    city: str


def known(event) -> None:
    """An event must be one that the client has a type for, save vLLM's own of reasoning."""
    assert type(event).__module__.startswith("openai."), (type(event), event)
    assert type(event).model_fields["type"].annotation.__args__[0].startswith("response."), event


def create(client: OpenAI, model: str) -> types.Response:
    ask = {"model": model, "input": "Say hello.", "temperature": 0, "max_output_tokens": 24}
    whole = client.responses.create(
        **ask,
        instructions="Be brief.",
        metadata={"a": "b"},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert whole.output_text and whole.status in ("completed", "incomplete"), whole
    assert whole.metadata == {"a": "b"} and whole.error is None, whole
    [message] = whole.output
    assert isinstance(message, types.ResponseOutputMessage), message
    assert len(message.content[0].logprobs[0].top_logprobs) == 2, message
    usage = whole.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens, usage

    plain = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    for number, event in enumerate(events):
        known(event)
        assert event.sequence_number == number, event
    deltas = [it.delta for it in events if isinstance(it, types.ResponseTextDeltaEvent)]
    assert "".join(deltas) == plain.output_text, deltas
    assert isinstance(events[0], types.ResponseCreatedEvent), events[0]
    ends = (types.ResponseCompletedEvent, types.ResponseIncompleteEvent)
    assert isinstance(events[-1], ends), events[-1]
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response

    # The client follows the items by itself, and wants a response that is complete.
    short = {**ask, "input": "What is 1+1? Reply with one digit.", "max_output_tokens": 200}
    with client.responses.stream(**short) as stream:
        texts = [it.snapshot for it in stream if it.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts and texts[-1] == final.output_text and final.status == "completed", final
    return plain


def conversation(client: OpenAI, model: str, first: types.Response) -> None:
    ask = {"model": model, "temperature": 0, "max_output_tokens": 16}
    kept = client.responses.create(**ask, input="Why?", previous_response_id=first.id)
    assert kept.previous_response_id == first.id, kept
    own = client.responses.create(
        **ask,
        input=[
            {"role": "user", "content": "Say hello."},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"role": "user", "content": [{"type": "input_text", "text": "Why?"}]},
        ],
    )
    assert own.output_text == kept.output_text, (own, kept)
    items = client.responses.input_items.list(kept.id)
    assert [item.content[0].text for item in items] == ["Why?"], items
    said = [
        (item.role, item.content[0].type, item.content[0].text)
        for item in client.responses.input_items.list(own.id, order="asc")
    ]
    assert said == [
        ("user", "input_text", "Say hello."),
        ("assistant", "output_text", first.output_text),
        ("user", "input_text", "Why?"),
    ], said
    client.responses.delete(own.id)
    try:
        client.responses.retrieve(own.id)
        raise AssertionError("a deleted response is there")
    except openai.NotFoundError as error:
        assert error.type == "invalid_request_error", error.body


def functions(client: OpenAI, model: str) -> None:
    city = {"type": "string", "maxLength": 12}
    schema = {
        "type": "object",
        "properties": {"city": city},
        "required": ["city"],
        "additionalProperties": False,
    }
    ask = {
        "model": model,
        "temperature": 0,
        "max_output_tokens": 120,
        "tools": [{"type": "function", "name": "weather", "parameters": schema, "strict": True}],
        "tool_choice": {"type": "function", "name": "weather"},
    }
    question = {"role": "user", "content": "How is the weather in Paris?"}
    whole = client.responses.create(**ask, input=[question])
    [call] = [item for item in whole.output if item.type == "function_call"]
    assert isinstance(json.loads(call.arguments)["city"], str), call
    with client.responses.stream(**ask, input=[question]) as stream:
        snapshots = [
            it.snapshot for it in stream if it.type == "response.function_call_arguments.delta"
        ]
        final = stream.get_final_response()
    [streamed] = [item for item in final.output if item.type == "function_call"]
    assert streamed.arguments == call.arguments == snapshots[-1], (streamed, call, snapshots)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = client.responses.create(
        **{**ask, "tool_choice": "none"}, input=[result], previous_response_id=whole.id
    )
    assert again.output_text, again

    parsed = client.responses.parse(
        model=model, input="Name a city.", temperature=0, max_output_tokens=100, text_format=Place
    )
    if parsed.status == "completed":
        assert isinstance(parsed.output_parsed, Place), parsed


def background(client: OpenAI, model: str) -> None:
    ask = {"model": model, "temperature": 0, "background": True}
    queued = client.responses.create(**ask, input="Say hello.", max_output_tokens=16)
    assert queued.status == "queued", queued
    deadline = time.monotonic() + 60
    while queued.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, queued
        time.sleep(0.1)
        queued = client.responses.retrieve(queued.id)
    assert queued.output_text, queued

    # A stream that is left is taken up where it was.
    seen, response = [], None
    for event in client.responses.create(
        **ask, input="Tell me a story.", max_output_tokens=48, stream=True
    ):
        known(event)
        seen.append(event)
        response = response or event.response
        if len(seen) == 8:
            break
    rest = list(
        client.responses.retrieve(
            response.id, stream=True, starting_after=seen[-1].sequence_number
        )
    )
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers))), numbers
    text = "".join(it.delta for it in seen + rest if isinstance(it, types.ResponseTextDeltaEvent))
    assert text == rest[-1].response.output_text, (text, rest[-1])

    endless = client.responses.create(
        **ask, input="Count.", max_output_tokens=1500, extra_body={"ignore_eos": True}
    )
    for _ in range(2):
        assert client.responses.cancel(endless.id).status == "cancelled"


def errors(client: OpenAI, model: str) -> None:
    for ask, param in [
        ({"input": "x", "temperature": 9}, "temperature"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ]:
        try:
            client.responses.create(model=model, **ask)
            raise AssertionError(f"taken: {ask}")
        except openai.BadRequestError as error:
            assert error.param == param, (error.param, param)


def main() -> None:
    base_url, key, model = sys.argv[1:]
    client = OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60)
    conversation(client, model, create(client, model))
    functions(client, model)
    background(client, model)
    errors(client, model)
    print(f"openai {openai.__version__}: responses whole, streamed, continued, in the background")


if __name__ == "__main__":
    main()
