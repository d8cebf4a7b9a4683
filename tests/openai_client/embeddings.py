"""Asks a Baton gateway for embeddings with the official `openai` client. Fails at the first
surprise.

Usage: embeddings.py BASE_URL KEY EMBEDDER CHAT_MODEL
"""

import math
import sys

import openai
from openai import OpenAI

TEXTS = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]


def cosine(one: list[float], two: list[float]) -> float:
    return sum(a * b for a, b in zip(one, two)) / math.hypot(*one) / math.hypot(*two)


def embeddings(client: OpenAI, model: str) -> None:
    # Without a format the client asks for base64 and decodes it.
    reply = client.embeddings.create(model=model, input=TEXTS)
    assert reply.model == model and reply.object == "list", reply
    assert [item.index for item in reply.data] == [0, 1, 2]
    vectors = [item.embedding for item in reply.data]
    assert all(len(vector) == 384 for vector in vectors)
    assert all(abs(math.hypot(*vector) - 1) < 1e-4 for vector in vectors)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.2
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 15, reply.usage

    numbers = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
    for vector, item in zip(vectors, numbers.data):
        assert max(abs(a - b) for a, b in zip(vector, item.embedding)) < 1e-6
    one = client.embeddings.create(model=model, input=TEXTS[1], user="someone")
    assert max(abs(a - b) for a, b in zip(vectors[1], one.data[0].embedding)) < 1e-4


def errors(client: OpenAI, embedder: str, chat: str) -> None:
    for wrong in [
        {"model": chat, "input": "a"},
        {"model": embedder, "input": ""},
        {"model": embedder, "input": []},
        {"model": embedder, "input": "a", "dimensions": 7},
    ]:
        try:
            reply = client.embeddings.create(**wrong)
        except openai.BadRequestError as error:
            assert error.status_code == 400 and error.body["message"], error
        else:
            raise AssertionError(f"{wrong}: {reply!r}")
    try:
        client.embeddings.create(model="nobody", input="a")
    except openai.NotFoundError as error:
        assert error.body["param"] == "model", error.body
    else:
        raise AssertionError("no error")


def main() -> None:
    url, key, embedder, chat = sys.argv[1:]
    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    assert {card.id for card in client.models.list().data} == {embedder, chat}
    embeddings(client, embedder)
    errors(client, embedder, chat)
    print("embeddings: as the client expects them")


main()
