"""Drives the audio routes with the official `openai` client. Fails at the first surprise.

Usage: audio.py BASE_URL KEY MODEL CHAT_MODEL RECORDING WORD
"""

import sys
from pathlib import Path

import openai
from openai import OpenAI


def main() -> None:
    base_url, key, model, chat_model, recording, word = sys.argv[1:]
    client = OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
    create = client.audio.transcriptions.create
    ask = {"model": model, "file": Path(recording), "language": "en"}

    whole = create(**ask)
    assert word in whole.text.lower(), whole
    assert whole.usage.type == "duration" and whole.usage.seconds > 1, whole
    text = create(**ask, response_format="text")
    assert isinstance(text, str) and text.strip() == whole.text, text
    srt = create(**ask, response_format="srt")
    assert srt.startswith("1\n00:00:0") and word in srt.lower(), srt
    vtt = create(**ask, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n") and word in vtt.lower(), vtt

    both = ["word", "segment"]
    verbose = create(**ask, response_format="verbose_json", timestamp_granularities=both)
    assert verbose.text == whole.text and verbose.language == "english", verbose
    assert verbose.duration > 1, verbose
    assert verbose.segments[0].avg_logprob < 0, verbose
    assert any(word in it.word.lower() and it.start < it.end for it in verbose.words), verbose
    segments = create(**ask, response_format="verbose_json")
    assert segments.words is None and segments.segments == verbose.segments, segments

    pieces = []
    for chunk in create(**ask, stream=True):
        assert chunk.object == "transcription.chunk", chunk
        pieces += [choice["delta"]["content"] for choice in chunk.choices]
    assert "".join(pieces) == whole.text, pieces

    english = client.audio.translations.create(model=model, file=Path(recording))
    assert word in english.text.lower(), english
    english = client.audio.translations.create(
        model=model, file=Path(recording), response_format="verbose_json"
    )
    assert english.language == "english" and english.segments, english

    for wrong, field in [
        ({"file": ("a.txt", b"no sound")}, "file"),
        ({"language": "klingon"}, "language"),
        ({"temperature": 7}, "temperature"),
        ({"model": chat_model}, "model"),
    ]:
        try:
            reply = create(**{**ask, **wrong})
        except openai.BadRequestError as e:
            assert e.param == field and field in e.message, (field, e)
        else:
            raise AssertionError(f"{wrong}: {reply!r}")
    print(f"openai {openai.__version__}: transcriptions in every form, streams, translations, errors")


if __name__ == "__main__":
    main()
