"""A data set to be proof-read, as `collect` writes it: one recording of tones, an utterance every two seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16_000
WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet")


def utterance(number: int, **changes: Any) -> dict[str, Any]:
    """A row: speech from 0.15 to 0.75 and from 0.95 to 1.55 s of its 1.8 s."""
    start = 2.0 * number + 0.1
    speech = [[round(start + a, 3), round(start + b, 3)] for a, b in ((0.15, 0.75), (0.95, 1.55))]
    text = f"{WORDS[number % 10]} one, {WORDS[number % 10]} two."
    row = {
        "id": f"talk.wav-{round(start * 1000):08d}",
        "audio": f"clips/{number}.flac",
        "text": text,
        "speaker": "speaker01" if number % 2 else "speaker02",
        "language": "en",
        "split": "train",
        "segment": {"recording": "talk.wav", "start": start, "end": round(start + 1.8, 3), "speech": speech},
        "recognised": text.lower().replace(",", ""),
        "measures": {"snr": 30.0 - number % 10, "gain": 0.0},
        "history": [],
    }
    return row | changes


def check(what: str, value: float, verdict: str = "flagged") -> dict[str, Any]:
    """A line of an utterance's history."""
    return {"what": what, "value": value, "threshold": 0.1, "verdict": verdict, "message": f"{what} is {value}"}


def refusal(number: int, reason: str, value: float) -> dict[str, Any]:
    """A row that is refused."""
    row = utterance(number, reason=reason, message=f"{reason} is {value}", history=[check(reason, value, "refused")])
    return {key: value for key, value in row.items() if key not in ("audio", "language", "split")}


def write_recording(folder: Path, seconds: float) -> None:
    """`raw/talk.wav`: a tone where there is speech."""
    (folder / "raw").mkdir()
    time = np.arange(round(seconds * RATE)) / RATE
    inside = (time - 0.1) % 2.0
    speaks = ((inside > 0.15) & (inside < 0.75)) | ((inside > 0.95) & (inside < 1.55))
    soundfile.write(folder / "raw" / "talk.wav", 0.3 * np.sin(2 * np.pi * 220 * time) * speaks, RATE)


def write_data_set(folder: Path, kept: list[dict[str, Any]], refused: list[dict[str, Any]]) -> Path:
    """The lists, and the clips of what is kept, as far as they are missing."""
    out = folder / "data"
    (out / "clips").mkdir(parents=True, exist_ok=True)
    for name, rows in (("manifest.jsonl", kept), ("refused.jsonl", refused)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in kept[:10]:
        soundfile.write(out / row["audio"], np.zeros(round(1.8 * RATE)), RATE)
    (out / "collect.json").write_text(json.dumps({"raw": "../raw"}))
    return out


def small_data_set(folder: Path) -> Path:
    """Five utterances that are kept, of which the third is the worst, and one that is refused."""
    write_recording(folder, 14.0)
    kept = [utterance(number) for number in range(5)]
    kept[2] |= {"recognised": "charlie one charlie too", "history": [check("text", 0.3)]}
    kept[3] |= {"history": [check("noise", 15.0)]}
    return write_data_set(folder, kept, [refusal(5, "noise", 4.0)])


def decisions(out: Path) -> list[dict[str, Any]]:
    """What is in `review.jsonl`."""
    path = out / "review.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
