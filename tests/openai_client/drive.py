"""Drives a Baton gateway with the official `openai` client. Fails at the first surprise.

Usage: drive.py BASE_URL KEY MODEL
"""

import sys

import openai
import pydantic
from openai import OpenAI

MESSAGES = [{"role": "user", "content": "Say hello in one short sentence."}]


def fails(error: type[openai.APIStatusError], status: int, call) -> openai.APIStatusError:
    try:
        reply = call()
    except error as e:
        assert type(e) is error, f"{type(e)} is not exactly {error}"
        assert e.status_code == status, e
        assert isinstance(e.body, dict) and e.body["message"], e.body
        return e
    raise AssertionError(f"no {error.__name__}: {reply!r}")


def models(client: OpenAI, model: str) -> None:
    listed = client.models.list()
    assert [card.id for card in listed.data] == [model], listed
    assert listed.data[0].object == "model"


def chat(client: OpenAI, model: str) -> None:
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    answer = whole.choices[0]
    assert answer.message.role == "assistant" and answer.message.content, whole
    assert answer.finish_reason in ("stop", "length"), whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    options = {"include_usage": True}
    pieces, roles, reasons, usage = [], [], [], None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options=options):
        assert chunk.object == "chat.completion.chunk", chunk
        if not chunk.choices:
            usage = chunk.usage
            continue
        choice = chunk.choices[0]
        pieces.append(choice.delta.content or "")
        roles += [choice.delta.role] if choice.delta.role else []
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == answer.message.content, pieces
    assert roles == ["assistant"] and reasons == [answer.finish_reason], (roles, reasons)
    assert usage == whole.usage, (usage, whole.usage)

    several = client.chat.completions.create(**{**ask, "temperature": 1.0}, n=3, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2], several
    scored = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 3, scored

    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == answer.message.content, final


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)


def structure(client: OpenAI, model: str) -> None:
    question = [{"role": "user", "content": "Invent a person: name and age."}]
    ask = {"model": model, "messages": question, "max_tokens": 150, "temperature": 0}
    parsed = client.chat.completions.parse(**ask, response_format=Person)
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person), parsed
    with client.chat.completions.stream(**ask, response_format=Person) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == person, final
    either = client.chat.completions.create(
        **ask, extra_body={"structured_outputs": {"choice": ["left", "right"]}}
    )
    assert either.choices[0].message.content in ("left", "right"), either


def tools(client: OpenAI, model: str) -> None:
    function = openai.pydantic_function_tool(Person, name="remember")
    question = [{"role": "user", "content": "Remember a person."}]
    ask = {
        "model": model,
        "messages": question,
        "max_tokens": 150,
        "temperature": 0,
        "tools": [function],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    parsed = client.chat.completions.parse(**ask)
    [call] = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person), parsed
    with client.chat.completions.stream(**ask) as stream:
        deltas = [it for it in stream if it.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls
    assert streamed.function == call.function, (streamed, call)
    assert "".join(it.arguments_delta for it in deltas) == call.function.arguments, deltas
    # The call and its result go back to the model.
    again = client.chat.completions.create(
        model=model,
        max_tokens=8,
        messages=[
            *question,
            parsed.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ],
    )
    assert again.choices[0].message.content, again


def completions(client: OpenAI, model: str) -> None:
    ask = {"model": model, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    assert whole.object == "text_completion" and whole.choices[0].text, whole
    streamed = client.completions.create(**ask, stream=True)
    text = "".join(choice.text for chunk in streamed for choice in chunk.choices)
    assert text == whole.choices[0].text, text
    # A vLLM parameter that the client does not know goes in its extra body.
    forced = client.completions.create(
        **{**ask, "temperature": 1.5}, extra_body={"top_k": 1}, seed=1
    )
    assert forced.choices[0].text == whole.choices[0].text, forced


def errors(client: OpenAI, base_url: str, model: str) -> None:
    create = client.chat.completions.create
    e = fails(openai.NotFoundError, 404, lambda: create(model="gpt-17", messages=MESSAGES))
    assert "gpt-17" in e.message, e
    e = fails(
        openai.BadRequestError,
        400,
        lambda: create(model=model, messages=MESSAGES, temperature=-1),
    )
    assert "temperature" in e.message and e.param == "temperature", (e, e.param)
    fails(openai.BadRequestError, 400, lambda: create(model=model, messages=[]))
    fails(
        openai.BadRequestError,
        400,
        lambda: create(model=model, messages=MESSAGES, max_tokens=-1, stream=True),
    )
    stranger = OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    fails(openai.AuthenticationError, 401, lambda: stranger.models.list())


def main() -> None:
    base_url, key, model = sys.argv[1:]
    client = OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60)
    models(client, model)
    chat(client, model)
    completions(client, model)
    structure(client, model)
    tools(client, model)
    errors(client, base_url, model)
    # Still sound after the errors.
    chat(client, model)
    print(f"openai {openai.__version__}: chat, completions, structure, tools, streaming, models, errors")


if __name__ == "__main__":
    main()
