"""Drives a Baton gateway with LangChain's `ChatOpenAI`. Fails at the first surprise.

Usage: drive.py BASE_URL KEY MODEL
"""

import sys

from langchain_openai import ChatOpenAI

SCHEMA = {
    "title": "Place",
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}


def main() -> None:
    base_url, key, model = sys.argv[1:]
    chat = ChatOpenAI(
        base_url=base_url, api_key=key, model=model, temperature=0, max_tokens=24, max_retries=0
    )
    whole = chat.invoke("Say hello in one short sentence.")
    assert whole.content and whole.usage_metadata["output_tokens"] > 0, whole
    streamed = "".join(piece.content for piece in chat.stream("Say hello in one short sentence."))
    assert streamed == whole.content, (streamed, whole)
    for method in ("json_schema", "function_calling"):
        place = chat.with_structured_output(SCHEMA, method=method).invoke("Where is the Louvre?")
        assert place.keys() == {"city", "capital"}, (method, place)
        assert place["city"] in ("Paris", "Rome"), (method, place)
    print("langchain-openai: invoke, stream, structured output")


if __name__ == "__main__":
    main()
