"""Synthesise the demo's speech: hibari (the miniature base's voice) and flite's rms (the voice to be learnt); others.

    python make_voices.py corpus hibari OUT --hours 5      sentences of the grammar, FLAC
    python make_voices.py corpus rms OUT --hours 0.25
    python make_voices.py sample OUT                       the shipped sample dataset, Ogg Opus

Needs hibari-tts 0.2.1, soundfile and soxr in the Python that runs it, and the program `flite`. See README.md.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from texts import DEMO_SENTENCES, sentences

Speak = Callable[[str], tuple[np.ndarray, int]]  # text -> [samples] float32 and Hz

PEAK = 10 ** (-3 / 20)  # -3 dBFS
SILENCE_DB = -42.0  # below the loudest window of a clip
MARGIN_S = 0.08
OPUS_LEVEL = 0.85  # libsndfile: 0 is 256 kbit/s, 1 is 6 kbit/s
SAMPLE_CLIPS = {"rms": 38, "hibari": 16}


def hibari() -> Speak:
    from hibari import Hibari

    voice = Hibari(threads=1)
    return lambda text: (voice(text, seed=0), 24_000)


def flite(voice: str, text: str) -> tuple[np.ndarray, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", file.name], check=True)
        return soundfile.read(file.name, dtype="float32")


# awb, kal16 and slt are for measurements with several voices; the demo has none of them.
VOICES: dict[str, Callable[[], Speak]] = {
    "hibari": hibari,
    **{voice: partial(partial, flite, voice) for voice in ("awb", "kal16", "rms", "slt")},
}


def trim(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Keep MARGIN_S around what is louder than SILENCE_DB, then fade both ends over 5 ms."""
    window = rate // 100
    energy = np.convolve(waveform**2, np.ones(window) / window, mode="same")
    loud = np.flatnonzero(energy > energy.max() * 10 ** (SILENCE_DB / 10))
    margin, fade = int(MARGIN_S * rate), rate // 200
    clip = waveform[max(0, loud[0] - margin) : loud[-1] + margin].copy()
    clip[:fade] *= np.linspace(0, 1, fade)
    clip[-fade:] *= np.linspace(1, 0, fade)
    return clip * (PEAK / np.abs(clip).max())


def clips(speak: Speak, texts: Iterable[str]) -> Iterator[tuple[str, np.ndarray, int]]:
    for text in texts:
        waveform, rate = speak(text)
        yield text, trim(waveform.astype(np.float32), rate), rate


def write_corpus(voice: str, folder: Path, hours: float, seed: int) -> None:
    """FLAC clips and metadata.jsonl, until `hours` of speech are written."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with (folder / "metadata.jsonl").open("w") as manifest:
        for number, (text, waveform, rate) in enumerate(clips(VOICES[voice](), sentences(seed))):
            row = _row(voice, f"{voice}-{number:05d}", f"{voice}-{number:05d}.flac", text)
            soundfile.write(folder / row["audio"], waveform, rate)
            print(json.dumps(row), file=manifest, flush=True)
            seconds += len(waveform) / rate
            if seconds >= hours * 3600:
                break


def write_sample(folder: Path) -> None:
    """The sample dataset: `SAMPLE_CLIPS` of the demo sentences a voice, Ogg Opus, and one metadata.jsonl."""
    rows = []
    for voice, count in SAMPLE_CLIPS.items():
        (folder / voice).mkdir(parents=True, exist_ok=True)
        for number, (text, waveform, rate) in enumerate(clips(VOICES[voice](), islice(DEMO_SENTENCES, count))):
            row = _row(voice, f"{voice}-{number:02d}", f"{voice}/{voice}-{number:02d}.opus", text)
            soundfile.write(
                folder / row["audio"],
                waveform,
                rate,
                format="OGG",
                subtype="OPUS",
                compression_level=OPUS_LEVEL,
            )
            rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(voice: str, name: str, audio: str, text: str) -> dict[str, str]:
    return {"id": name, "audio": audio, "text": text, "speaker": voice, "language": "en"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("voice", choices=sorted(VOICES))
    corpus.add_argument("out", type=Path)
    corpus.add_argument("--hours", type=float, default=5.0)
    corpus.add_argument("--seed", type=int, default=0)
    sample = commands.add_parser("sample")
    sample.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "corpus":
        write_corpus(options.voice, options.out, options.hours, options.seed)
    else:
        write_sample(options.out)


if __name__ == "__main__":
    main()
