"""Short clips in stretches: every word goes to its clip, whatever recognises it."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recordings import speech
from tiny_judges import save_tiny_asr
from transformers import GenerationConfig

from higgstune.errors import ConfigError, DataError
from higgstune.evaluation.judges import load_clip_transcriber
from higgstune.evaluation.judges.asr import FasterWhisper, TransformersWhisper
from higgstune.evaluation.judges.base import RATE, Transcript
from higgstune.evaluation.judges.stretches import Word, transcribe_packed, vote_on_language

SILENCE = Transcript("", None)


def tone(seconds: float, number: int) -> np.ndarray:
    """A clip that `Ear` knows by its level."""
    return np.full(round(seconds * RATE), number / 100, np.float32)


class Ear:
    """Recognises three words a second in each clip, 0.15 s too early, and says whose they are; counts its windows."""

    def __init__(self, early: float = 0.15) -> None:
        self.early = early
        self.windows: list[float] = []

    def __call__(self, waveform: np.ndarray) -> list[Word]:
        self.windows.append(len(waveform) / RATE)
        words = []
        for number in np.unique(waveform[waveform > 0]):
            places = np.flatnonzero(waveform == number) / RATE
            first, last = places[0], places[-1]
            for start in np.arange(first, last - 0.1, 1 / 3):
                end = min(start + 1 / 3, last)
                words.append(
                    Word(f" {round(number * 100)}:{_noise(start)}", start - self.early, end - self.early, -0.1 * number)
                )
        return words


def _noise(place: float) -> str:
    """Text without a loop."""
    return hashlib.sha256(f"{place:.3f}".encode()).hexdigest()[:6]


@pytest.mark.parametrize("early", [-0.1, 0.0, 0.15, 0.4])
def test_each_word_goes_to_its_clip_and_the_clips_share_windows(early: float) -> None:
    lengths = [3.0, 0.4, 12.0, 0.05, 5.5, 9.0, 30.0, 2.0, 1.0]
    clips = [tone(seconds, number) for number, seconds in enumerate(lengths, start=1)]
    ear = Ear(early)
    found = transcribe_packed(clips, ear)
    assert ear.windows == pytest.approx([23.9, 9.0, 30.0, 4.0]), "3 + 1 + 0.4 + 1 + 12 + 1 + 5.5 s are one window"
    for number, (seconds, transcript) in enumerate(zip(lengths, found, strict=True), start=1):
        if seconds < 0.1:
            assert transcript == SILENCE
        else:
            assert {word.split(":")[0] for word in transcript.text.split()} == {str(number)}
            assert transcript.logprob == pytest.approx(-number / 1000)
    alone = Ear(early)
    counts = [len(clip.text.split()) for clip in transcribe_packed(clips, alone, pack=False)]
    assert counts == [len(clip.text.split()) for clip in found]
    assert len(alone.windows) == 8
    assert transcribe_packed([], ear) == []


def test_a_word_across_the_silence_goes_where_most_of_it_is() -> None:
    clips = [tone(2.0, 1), tone(2.0, 2)]
    for start, end, owner in ((1.7, 2.9, 0), (1.8, 3.4, 1), (2.1, 2.2, 0), (2.6, 2.7, 1), (4.9, 5.4, 1)):
        word = Word(" word", start, end)
        found = transcribe_packed(clips, lambda wave, word=word: [word] if len(wave) > 2 * RATE else [])  # type: ignore[misc]
        assert [clip.text for clip in found] == ["word" if index == owner else "" for index in range(2)], (start, end)
        assert found[owner].logprob is None


def test_clips_of_a_stretch_that_looks_wrong_are_recognised_one_by_one() -> None:
    clips = [tone(2.0, 1), tone(2.0, 2), tone(2.0, 3)]

    def mixed_up(words: list[Word]) -> list[str]:
        """The texts, if the stretch is transcribed with these words, and each clip alone with its number."""
        ear = Ear()
        return [
            clip.text for clip in transcribe_packed(clips, lambda wave: words if len(wave) > 2 * RATE else ear(wave))
        ]

    alone = [clip.text for clip in transcribe_packed(clips, Ear(), pack=False)]
    crowded = [Word(f" w{n}", 3 + n / 8, 3 + n / 8 + 0.1) for n in range(13)]
    assert mixed_up(crowded) == alone, "6.5 words a second beside a clip without words"
    calm = crowded[:12]
    passed_over = [alone[0], " ".join(word.text.strip() for word in calm), alone[2]]
    assert mixed_up(calm) == passed_over, "6 words a second may be the clip's own"
    loop = [Word(" and so on", n / 10, n / 10 + 0.1) for n in range(80)]
    assert mixed_up(loop) == alone


def test_the_language_is_voted_on_by_stretches_from_everywhere() -> None:
    clips = [tone(20.0, number) for number in range(1, 31)]
    given = []

    def probabilities(waveform: np.ndarray) -> dict[str, float]:
        given.append(round(float(waveform.max()) * 100))
        return {"vi": 0.9, "en": 0.1} if given[-1] == 1 else {"vi": 0.3, "en": 0.7}

    assert vote_on_language(clips, probabilities) == "en"
    assert (len(given), given[0], given[-1]) == (5, 1, 30)
    with pytest.raises(DataError, match=r"no clip of 0\.1 s or more to detect the language from"):
        vote_on_language([tone(0.05, 1)], probabilities)


def test_faster_whisper_takes_one_window_a_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, dict[str, Any]]] = []
    (tmp_path / "model.bin").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "faster_whisper", fake_faster_whisper(calls))
    monkeypatch.setattr("higgstune.evaluation.judges.base.version", lambda name: "1.2.1")
    asr = load_clip_transcriber(str(tmp_path))
    assert isinstance(asr, FasterWhisper)
    clips = [tone(2.0, 1), tone(0.01, 1), tone(3.0, 1), tone(31.0, 1)]
    found = asr.transcribe_clips(clips, "zh-CN")
    assert [clip.text for clip in found] == ["so viel", "", "mehr", "so viel mehr"], "a segment without speech is none"
    assert found[0].logprob == pytest.approx((np.log(0.5) + np.log(1e-10)) / 2)
    assert [(name, length) for name, length, _ in calls] == [("window", 6 * RATE), ("file", 31 * RATE)]
    assert all(options["language"] == "zh" for _, _, options in calls)
    assert calls[0][2]["without_timestamps"] is True
    assert all(options["word_timestamps"] and options["temperature"] == 0 for _, _, options in calls)
    assert asr.detect_language(clips) == "en"
    calls.clear()
    assert asr.transcribe_clips(clips[1:2], None) == [SILENCE]
    assert asr.transcribe_clips(clips[:1], None)[0].text == "so viel mehr"
    assert [options["language"] for _, _, options in calls] == ["en"]
    with pytest.raises(ConfigError, match="does not support the language 'tlh'"):
        asr.transcribe_clips(clips, "tlh")


def fake_faster_whisper(calls: list[tuple[str, int, dict[str, Any]]]) -> ModuleType:
    """The part of the library that is used; records its calls."""

    def segments() -> list[SimpleNamespace]:
        def segment(no_speech: float, logprob: float, *words: tuple[str, float, float, float]) -> SimpleNamespace:
            keys = "word", "start", "end", "probability"
            found = [SimpleNamespace(**dict(zip(keys, word, strict=True))) for word in words]
            return SimpleNamespace(no_speech_prob=no_speech, avg_logprob=logprob, words=found)

        return [
            segment(0.9, -0.5, (" so", 0.0, 0.5, 0.5), (" viel", 0.5, 1.0, 0.0)),
            segment(0.1, -2.0, (" mehr", 4.0, 5.0, 1.0)),
            segment(0.7, -1.1, (" Danke", 4.0, 5.0, 1.0)),
        ]

    class WhisperModel:
        supported_languages = ("en", "zh")

        def __init__(self, folder: str, **options: Any) -> None: ...

        def transcribe(self, waveform: np.ndarray, **options: Any) -> tuple[list[SimpleNamespace], None]:
            calls.append(("file", len(waveform), options))
            return segments(), None

        def detect_language(self, waveform: np.ndarray) -> tuple[str, float, list[tuple[str, float]]]:
            return "en", 0.8, [("en", 0.8), ("zh", 0.2)]

    class BatchedInferencePipeline:
        def __init__(self, model: WhisperModel) -> None: ...

        def transcribe(self, waveform: np.ndarray, **options: Any) -> tuple[list[SimpleNamespace], None]:
            assert options.pop("vad_filter") is False
            calls.append(("window", len(waveform), options))
            return segments(), None

    library = ModuleType("faster_whisper")
    library.WhisperModel = WhisperModel  # type: ignore[attr-defined]
    library.BatchedInferencePipeline = BatchedInferencePipeline  # type: ignore[attr-defined]
    return library


def test_transformers_whisper_packs_where_it_knows_when_tokens_are_spoken(tmp_path: Path) -> None:
    folder = save_tiny_asr(tmp_path / "asr")
    clips = [speech(2.0, 0), speech(1.0, 1), speech(31.0, 2), speech(1)[:100]]
    plain = TransformersWhisper(str(folder))
    windows = counted(plain)
    alone = plain.transcribe_clips(clips, "en")
    assert (len(windows), alone[3]) == (3, SILENCE), "without alignment_heads, a clip a window"
    for clip, found in zip(clips[:2], alone[:2], strict=True):
        assert found.text == plain._transcript(clip, "en")
        assert found.logprob is not None
        assert found.logprob < 0
    settings = GenerationConfig.from_pretrained(folder)
    settings.alignment_heads = [[0, 0], [0, 1]]
    settings.save_pretrained(folder)
    aligned = TransformersWhisper(str(folder))
    windows = counted(aligned)
    found = aligned.transcribe_clips(clips, None)
    assert (windows[0], windows[-1]) == (4 * RATE, 31 * RATE), "two clips with a second between them share a window"
    assert [clip.text for clip in found[2:]] == [alone[2].text, ""]
    assert aligned.detect_language(clips) in ("en", "de")
    words = aligned._words(clips[0], "en")
    assert "".join(word.text for word in words).strip() == plain._transcript(clips[0], "en")
    assert all(0 <= word.start <= word.end <= 2.02 for word in words)
    with pytest.raises(ConfigError, match="does not support the language 'vi'"):
        aligned.transcribe_clips(clips, "vi")


def counted(asr: TransformersWhisper) -> list[int]:
    lengths: list[int] = []
    recognise = asr._words

    def recognised(waveform: np.ndarray, language: str | None) -> list[Word]:
        lengths.append(len(waveform))
        return recognise(waveform, language)

    asr._words = recognised  # type: ignore[method-assign]
    return lengths


def test_tokens_become_words_and_whole_characters(tmp_path: Path) -> None:
    asr = TransformersWhisper(str(save_tiny_asr(tmp_path / "asr")))
    tokens = asr._processor.tokenizer(" Ho é ", add_special_tokens=False)["input_ids"]  # a token a byte
    assert len(tokens) == 7
    times, logprobs = [n / 10 for n in range(9)], [-1.0] * 8
    end = asr._model.generation_config.eos_token_id
    words = asr._merged([*tokens, end], times, logprobs, "en")
    assert [(word.text, word.start, word.end) for word in words] == [(" Ho", 0, 0.3), (" é", 0.3, 0.6), (" ", 0.6, 0.7)]
    assert [word.text for word in asr._merged([*tokens, end], times, logprobs, "ja")] == [" ", "H", "o", " ", "é", " "]


def test_a_command_gets_a_file_per_clip(tmp_path: Path) -> None:
    script = tmp_path / "asr.py"
    script.write_text(
        "import json, sys, soundfile\n"
        "for file in sys.argv[1:]:\n"
        "    print(json.dumps({'file': file, 'text': f'{soundfile.info(file).duration:.1f} s'}))\n"
    )
    asr = load_clip_transcriber(f"{sys.executable} {script}")
    found = asr.transcribe_clips([tone(1.0, 1), tone(0.05, 1), tone(2.5, 2)], None)
    assert found == [Transcript("1.0 s", None), SILENCE, Transcript("2.5 s", None)]
    with pytest.raises(ConfigError, match="is a command, which does not say the language: name it"):
        asr.detect_language([tone(1.0, 1)])
