"""Synthesise the demo's speech: hibari (the miniature base's voice) and flite's rms (the voice to be learnt); others.

    python make_voices.py corpus hibari OUT --hours 5      sentences of the grammar, FLAC
    python make_voices.py corpus rms OUT --hours 0.25
    python make_voices.py sample OUT                       the shipped sample dataset, Ogg Opus
    python make_voices.py held-out hibari OUT              new sentences of the lexicon, for `measure.py`

metadata.jsonl also has where each word of the text is spoken, in seconds (`words`), by the synthesiser's own durations,
and hibari's phonemes for each word (`sounds`). They are absent where words and phonemes do not pair.

Needs hibari-tts 0.2.1, onnx, soundfile and soxr in the Python that runs it, and the program `flite`. See README.md.
"""

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from texts import DEMO_SENTENCES, HELD_OUT, sentences

Times = list[tuple[float, float]]  # seconds from the start, of each word


@dataclass(frozen=True)
class Spoken:
    """A synthesised sentence. `words` and `sounds` are empty where they do not pair with the words of the text."""

    waveform: np.ndarray  # [samples] float32
    rate: int  # Hz
    words: Times
    sounds: list[str]


Speak = Callable[[str], Spoken]

PEAK = 10 ** (-3 / 20)  # -3 dBFS
SILENCE_DB = -42.0  # below the loudest window of a clip
MARGIN_S = 0.08
OPUS_LEVEL = 0.85  # libsndfile: 0 is 256 kbit/s, 1 is 6 kbit/s
# What each voice says in the sample dataset. The last ones of rms are held out: the demo measures with them.
SAMPLE = {"rms": (*DEMO_SENTENCES, *HELD_OUT[60:]), "hibari": DEMO_SENTENCES[:16]}


def hibari() -> Speak:
    import onnx
    import onnxruntime
    from hibari import Hibari, dsp

    voice = Hibari(threads=1)
    model = onnx.load(voice.model_path)
    # The number of frames of each phoneme is inside the graph; a frame of it is two hops of the waveform.
    model.graph.output.append(onnx.helper.make_tensor_value_info("/Clip_output_0", onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def speak(text: str) -> Spoken:
        (phonemes,) = voice.phonemize(text)
        inputs = {"ids": np.asarray([voice.ids(phonemes)]), "speed": np.ones(1, np.float32)}
        *spectra, frames = session.run(None, inputs)
        waveform = dsp.synth(*(part[0] for part in spectra), np.random.default_rng(0))
        known = [c for c in phonemes if c in voice.vocab]
        ends = np.cumsum(frames.reshape(-1)) * 2 * dsp.HOP / dsp.SR
        assert abs(ends[-1] - len(waveform) / dsp.SR) < 0.1, "durations do not add up to the waveform"
        sounds = "".join(known).split(" ")
        words, at = [], 1  # the first phoneme is a pad
        for sound in sounds:
            words.append((float(ends[at - 1]), float(ends[at + len(sound) - 1])))
            at += len(sound) + 1
        pairs = len(sounds) == len(text.split())
        return Spoken(waveform, dsp.SR, words if pairs else [], sounds if pairs else [])

    return speak


@cache
def _phone_count(voice: str, word: str) -> int:
    done = subprocess.run(
        ["flite", "-voice", voice, "-ps", "-t", word, "-o", "none"], check=True, capture_output=True, text=True
    )
    return sum(phone != "pau" for phone in done.stdout.split())


def flite(voice: str, text: str) -> Spoken:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        done = subprocess.run(
            ["flite", "-voice", voice, "-psdur", "-t", text, "-o", file.name],
            check=True,
            capture_output=True,
            text=True,
        )
        waveform, rate = soundfile.read(file.name, dtype="float32")
    ends, starts, last = [], [], 0.0
    for phone, end in (part.split(":") for part in done.stdout.split()):
        if phone != "pau":
            starts.append(last)
            ends.append(float(end))
        last = float(end)
    counts = [_phone_count(voice, word.strip(".,?")) for word in text.split()]
    borders = np.cumsum([0, *counts])
    if borders[-1] != len(ends):
        return Spoken(waveform, rate, [], [])
    return Spoken(waveform, rate, [(starts[a], ends[b - 1]) for a, b in pairwise(borders)], [])


# The base also learns from awb, kal16 and slt, so that it can be taught another voice; rms it has never spoken.
VOICES: dict[str, Callable[[], Speak]] = {
    "hibari": hibari,
    **{voice: partial(partial, flite, voice) for voice in ("awb", "kal16", "rms", "slt")},
}


def trim(spoken: Spoken) -> Spoken:
    """Keep MARGIN_S around what is louder than SILENCE_DB, then fade both ends over 5 ms."""
    waveform, rate = spoken.waveform.astype(np.float32), spoken.rate
    window = rate // 100
    energy = np.convolve(waveform**2, np.ones(window) / window, mode="same")
    loud = np.flatnonzero(energy > energy.max() * 10 ** (SILENCE_DB / 10))
    margin, fade = int(MARGIN_S * rate), rate // 200
    start = max(0, loud[0] - margin)
    clip = waveform[start : loud[-1] + margin].copy()
    clip[:fade] *= np.linspace(0, 1, fade)
    clip[-fade:] *= np.linspace(1, 0, fade)
    words = [(round(max(0.0, a - start / rate), 3), round(b - start / rate, 3)) for a, b in spoken.words]
    return Spoken(clip * (PEAK / np.abs(clip).max()), rate, words, spoken.sounds)


def clips(speak: Speak, texts: Iterable[str]) -> Iterator[tuple[str, Spoken]]:
    for text in texts:
        yield text, trim(speak(text))


def write_corpus(voice: str, folder: Path, texts: Iterable[str], hours: float = math.inf) -> None:
    """FLAC clips and metadata.jsonl of all texts, or until `hours` of speech are written."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with (folder / "metadata.jsonl").open("w") as manifest:
        for number, (text, spoken) in enumerate(clips(VOICES[voice](), texts)):
            row = _row(voice, f"{voice}-{number:05d}", f"{voice}-{number:05d}.flac", text)
            soundfile.write(folder / row["audio"], spoken.waveform, spoken.rate)
            row |= {"words": spoken.words, "sounds": spoken.sounds}
            print(json.dumps(row), file=manifest, flush=True)
            seconds += len(spoken.waveform) / spoken.rate
            if seconds >= hours * 3600:
                break


def write_sample(folder: Path) -> None:
    """The sample dataset: the sentences of `SAMPLE`, Ogg Opus, and one metadata.jsonl."""
    rows = []
    for voice, texts in SAMPLE.items():
        (folder / voice).mkdir(parents=True, exist_ok=True)
        for number, (text, spoken) in enumerate(clips(VOICES[voice](), texts)):
            row = _row(voice, f"{voice}-{number:02d}", f"{voice}/{voice}-{number:02d}.opus", text)
            soundfile.write(
                folder / row["audio"],
                spoken.waveform,
                spoken.rate,
                format="OGG",
                subtype="OPUS",
                compression_level=OPUS_LEVEL,
            )
            rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(voice: str, name: str, audio: str, text: str) -> dict[str, Any]:
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
    held_out = commands.add_parser("held-out")
    held_out.add_argument("voice", choices=sorted(VOICES))
    held_out.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "corpus":
        write_corpus(options.voice, options.out, sentences(options.seed), options.hours)
    elif options.command == "held-out":
        write_corpus(options.voice, options.out, HELD_OUT[:60])
    else:
        write_sample(options.out)


if __name__ == "__main__":
    main()
