"""Word error rate of a running gateway, and of faster-whisper with the same weights, on speech by
espeak-ng whose text, or whose meaning in English, is known.

Usage: wer.py BASE_URL MODEL WEIGHTS OUT.md

MODEL is the served name, WEIGHTS the folder in CTranslate2's form that the worker has, OUT.md what
the table is written to. Needs espeak-ng, ffmpeg, and faster-whisper, jiwer and requests, which are
installed into this Python if they are missing.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDED = {"faster_whisper": "faster-whisper==1.2.1", "jiwer": "jiwer", "requests": "requests"}

# The first lists of Harvard sentences (IEEE 1969), by which telephones are tested.
SENTENCES = """The birch canoe slid on the smooth planks.
Glue the sheet to the dark blue background.
It is easy to tell the depth of a well.
These days a chicken leg is a rare dish.
Rice is often served in round bowls.
The juice of lemons makes fine punch.
The box was thrown beside the parked truck.
The hogs were fed chopped corn and garbage.
Four hours of steady work faced us.
A large size in stockings is hard to sell.
The boy was there when the sun rose.
A rod is used to catch pink salmon.
The source of the huge river is the clear spring.
Kick the ball straight and follow through.
Help the woman get back to her feet.
A pot of tea helps to pass the evening.
Smoky fires lack flame and heat.
The soft cushion broke the man's fall.
The salt breeze came across from the sea.
The girl at the booth sold fifty bonds.""".splitlines()

# Name, voice, speed in words a minute, the sentences of a recording, and what ffmpeg does to it.
SETS = [
    ("one sentence", "en-us", 140, [[i] for i in range(20)], []),
    ("five sentences", "en-us", 140, [range(i, i + 5) for i in range(0, 20, 5)], []),
    ("a minute: 20 sentences", "en-us", 140, [range(20)], []),
    ("British voice, faster", "en-gb", 170, [range(i, i + 5) for i in range(0, 20, 5)], []),
    ("telephone, 8 kHz", "en-us", 140, [range(i, i + 5) for i in range(0, 20, 5)], ["-ar", "8000"]),
    (
        "MP3 at 24 kbit/s",
        "en-us",
        140,
        [range(i, i + 5) for i in range(0, 20, 5)],
        ["-c:a", "libmp3lame", "-b:a", "24k"],
    ),
]

# Voice, the language's name, and what is said with what it means.
TRANSLATED = [
    (
        "de",
        "German",
        [
            ("Das Wetter ist heute sehr schön.", "The weather is very nice today."),
            ("Der Zug fährt um neun Uhr nach Berlin.", "The train goes to Berlin at nine o'clock."),
            ("Meine Schwester arbeitet in einem Krankenhaus.", "My sister works in a hospital."),
            ("Wir haben gestern einen neuen Tisch gekauft.", "We bought a new table yesterday."),
            ("Die Kinder spielen im Garten.", "The children are playing in the garden."),
            ("Ich möchte ein Glas Wasser trinken.", "I would like to drink a glass of water."),
            ("Das Buch liegt auf dem Tisch.", "The book is on the table."),
            ("Morgen gehen wir ins Museum.", "Tomorrow we are going to the museum."),
        ],
    ),
    (
        "es",
        "Spanish",
        [
            ("El tren sale a las nueve de la mañana.", "The train leaves at nine in the morning."),
            ("Mi hermano trabaja en un hospital.", "My brother works in a hospital."),
            ("La casa es grande y tiene un jardín.", "The house is big and has a garden."),
            ("Ayer compramos una mesa nueva.", "Yesterday we bought a new table."),
            ("Los niños juegan en el parque.", "The children play in the park."),
            ("Quiero beber un vaso de agua.", "I want to drink a glass of water."),
            ("El libro está encima de la mesa.", "The book is on the table."),
            ("Mañana vamos al museo.", "Tomorrow we are going to the museum."),
        ],
    ),
]


def jobs() -> Iterator[tuple[str, str, list[tuple[str, str, str, int, list[str]]]]]:
    """Name, language, and the recordings: what is said, what should be written, voice, speed, and
    what is done to it. English is written down, other languages are translated."""
    for name, voice, speed, groups, told in SETS:
        texts = [" ".join(SENTENCES[at] for at in group) for group in groups]
        yield name, "en", [(text, text, voice, speed, told) for text in texts]
    for voice, name, pairs in TRANSLATED:
        yield f"{name}, to English", voice, [(said, meant, voice, 140, []) for said, meant in pairs]


def record(folder: Path, name: str, text: str, voice: str, speed: int, told: list[str]) -> Path:
    said = folder / f"{name}-said.wav"
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", said, text], check=True)
    made = folder / f"{name}.{'mp3' if 'libmp3lame' in told else 'wav'}"
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-i", said, *told, made], check=True)
    return made


def main() -> None:
    base_url, served, weights, out = sys.argv[1:]
    missing = [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    import faster_whisper
    import jiwer
    import requests

    peer = faster_whisper.WhisperModel(weights, device="cpu", compute_type="float32", cpu_threads=2)
    # What both are told: greedy first, the reference's thresholds and temperatures.
    options: dict[str, Any] = {"beam_size": 1, "best_of": 1, "max_initial_timestamp": 1.0}
    options["temperature"] = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    plain = jiwer.Compose(
        [
            jiwer.ToLowerCase(),
            jiwer.RemovePunctuation(),
            jiwer.RemoveMultipleSpaces(),
            jiwer.Strip(),
            jiwer.ReduceToListOfListOfWords(),
        ]
    )

    def rate(said: list[str], heard: list[str]) -> float:
        return jiwer.wer(said, heard, reference_transform=plain, hypothesis_transform=plain)

    rows, said_all, ours_all, theirs_all, same, count = [], [], [], [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, language, recordings) in enumerate(jobs()):
            said, ours, theirs = [], [], []
            task = "transcribe" if language == "en" else "translate"
            route, form = "transcriptions", {"model": served, "language": language}
            if task == "translate":
                route = "translations"
            for i, (text, meant, voice, speed, told) in enumerate(recordings):
                made = record(Path(folder), f"{number}-{i}", text, voice, speed, told)
                with made.open("rb") as file:
                    reply = requests.post(
                        f"{base_url}/v1/audio/{route}", files={"file": file}, data=form, timeout=600
                    )
                reply.raise_for_status()
                segments, _ = peer.transcribe(str(made), language=language, task=task, **options)
                said.append(meant)
                ours.append(reply.json()["text"])
                theirs.append("".join(segment.text for segment in segments).strip())
                same += ours[-1] == theirs[-1]
                count += 1
            words = sum(len(text.split()) for text in said)
            rows.append((name, len(said), words, rate(said, ours), rate(said, theirs)))
            print(rows[-1], flush=True)
            said_all += said
            ours_all += ours
            theirs_all += theirs
    words = sum(len(text.split()) for text in said_all)
    rows.append(("all", count, words, rate(said_all, ours_all), rate(said_all, theirs_all)))
    lines = [
        "# Word error rate of speech to text",
        "",
        f"Share of words that would have to be changed, of speech by espeak-ng whose text is known "
        f"(Harvard sentences), and of translations from what was meant, with {Path(weights).name} in float32, greedy with the reference's "
        f"fallback. Beside Baton: faster-whisper {faster_whisper.__version__} with the same weights "
        f"on the same files. {same} of {count} texts are equal to the letter. "
        f"Written by `tests/bench/wer.py`, {time.strftime('%Y-%m-%d')}.",
        "",
        "| recordings | number | words | Baton | faster-whisper |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {n} | {w} | {a:.1%} | {b:.1%} |" for name, n, w, a, b in rows),
        "",
    ]
    Path(out).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
