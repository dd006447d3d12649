"""Speaking: chunks of long texts, references, caps, files."""

import base64
import hashlib
import io
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec
from foreign_adapters import save_foreign
from full_disk import largest_file
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import RATE, speech, write
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint, tiny_prompter
from tiny_runs import DEMO_CODEC

from higgstune.data.audio import WavStream, origin_of, write_wav
from higgstune.errors import CheckpointError, ConfigError, DataError, InputError, WorkError
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.prompt import render
from higgstune.families.sampling import Sampling
from higgstune.generate.chunks import Pace, expected_seconds, frame_cap, join, split_text
from higgstune.generate.engine import Engine, Generated
from higgstune.generate.speaker import Speaker, load
from higgstune.generate.speech import Request, Speech, Voice
from higgstune.inputs import BaseSpec
from higgstune.model.load import ModelAndTokenizers

LONG = "The sun rises in the east. It was the night before my birthday! Hello there, good morning. " * 6


def make_speaker(codec: FakeCodec | None = None) -> Speaker:
    model, prompter = tiny_prompter()
    return Speaker(
        ModelAndTokenizers(
            model=model,
            tokenizer=prompter.tokenizer,
            audio_tokenizer=codec or FakeCodec(),
            config=model.config,
            checkpoint="tiny",
            revision=None,
            codec="fake",
            family=FAMILY,
        )
    )


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=400), st.floats(0.5, 20))
@settings(deadline=None)
def test_splitting_loses_nothing_but_white_space(text: str, seconds: float) -> None:
    chunks = split_text(text, seconds)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert all(chunk.strip() == chunk and chunk for chunk in chunks)


def test_long_texts_are_split_at_sentences_and_short_ones_not() -> None:
    assert split_text("Hello there. Good morning.") == ["Hello there. Good morning."]
    chunks = split_text(LONG, 8)
    assert len(chunks) > 3
    assert all(chunk[-1] in ".!" and expected_seconds(chunk) <= 8 for chunk in chunks)
    assert max(map(expected_seconds, split_text("word " * 300, 8))) <= 8
    assert all(" " not in chunk[:1] and "wor d" not in chunk for chunk in split_text("word " * 300, 8))
    assert split_text("今天天气很好。我们去公园吧!", 2.5) == ["今天天气很好。", "我们去公园吧!"]
    assert split_text("今天天气很好.我们去公园吧!", 2.5) == ["今天天气很好.", "我们去公园吧!"]  # as normalised
    assert split_text("नमस्ते दोस्तों। आप कैसे हैं।", 1.2) == ["नमस्ते दोस्तों।", "आप कैसे हैं।"]
    assert split_text("He paid 3.5 dollars.", 20) == ["He paid 3.5 dollars."]


def test_a_text_that_fits_is_spoken_as_training_writes_it() -> None:
    dialogue = "[SPEAKER0] Hello there.\n[SPEAKER1] Hi, how are you?"
    assert split_text(dialogue) == [dialogue]


def test_the_frame_cap_grows_with_the_text_and_knows_dense_scripts() -> None:
    assert frame_cap("Hi.", 25) < frame_cap(LONG, 25)
    assert frame_cap("今天天气很好我们去公园", 25) > frame_cap("abcdefghijk", 25)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0), (" \n", 0), ("Hi.", 1), ("a" * 28, 2), ("一二三四五六七八九十", 2), ("2025", 20 / 14),
        ("٢٠٢٥", 20 / 14), ("２０２５", 20 / 14), ("1, 2, 3, 4, 5, 6, 7", 47 / 14), ("½" * 7, 2.5),
    ],
)  # fmt: skip
def test_the_expected_duration_spells_digits_and_has_a_floor(text: str, seconds: float) -> None:
    assert expected_seconds(text) == pytest.approx(seconds)


def test_pieces_are_joined_without_a_click() -> None:
    loud = [np.full(4800, 0.9, dtype=np.float32), np.full(4800, -0.9, dtype=np.float32)]
    joined = join(loud, 24_000)
    assert len(joined) == 2 * 4800 + 0.15 * 24_000
    assert np.abs(np.diff(joined)).max() < 0.01
    assert joined[0] == 0
    assert joined[-1] == 0


def test_pieces_of_a_long_text_get_the_previous_one_and_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speaker = make_speaker()
    prompts: list[str] = []
    plain = speaker.prompter.prompt

    def remember(messages, codes):  # type: ignore[no-untyped-def]
        prompts.append(render(messages, generation=True))
        return plain(messages, codes)

    monkeypatch.setattr(speaker.prompter, "prompt", remember)
    voice = Voice("Good morning.", np.zeros((5, 8), dtype=np.uint16))
    text = LONG[:300]
    pieces = split_text(text)
    assert len(pieces) == 2
    spoken = speaker.speak(text, reference=voice, max_seconds=0.2)
    assert [prompt.count("<|AUDIO_OUT|>") for prompt in prompts] == [1, 2]
    assert "Good morning." in prompts[0]
    assert pieces[0] in prompts[1]
    assert spoken.seconds <= 2 * 0.2 + 0.15 + 1e-6


def test_a_cap_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    speaker = make_speaker()
    with caplog.at_level(logging.WARNING):
        speech = speaker.speak("The sun rises in the east.", max_seconds=0.2)
    assert speech.hit_cap
    assert "frame cap" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # as validations speak: the same clips each time
        [speech] = speaker.speak_all([Request("The sun rises in the east.")], max_seconds=0.2, warn=False)
    assert speech.hit_cap
    assert not caplog.records


@pytest.mark.parametrize(("frames", "warned"), [(8, True), (9, False), (75, False), (76, True)])
def test_a_clip_of_another_length_than_its_text_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, frames: int, warned: bool
) -> None:
    said = Generated(np.zeros((frames, 8), dtype=np.int64), hit_cap=False)
    monkeypatch.setattr(Engine, "run", lambda _, more: ((job, said) for job in more(1)))
    with caplog.at_level(logging.WARNING):
        make_speaker().speak("Hello.")
    assert ("where about 1.0 s were expected: 'Hello.' (try another seed" in caplog.text) == warned


def test_seeds_repeat_and_differ() -> None:
    speaker = make_speaker()
    a, b, c = (speaker.speak("Hello.", seed=seed, max_seconds=0.3).waveform for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or (a != c).any()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        *(("", DataError), ("  \n ", DataError), ("... !!!", DataError), ("\U0001f389", DataError)),
        *(("[SPEAKER0]", DataError), ("say <|eot_id|> now", DataError)),
    ],
)
def test_what_cannot_be_said_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        make_speaker().speak(text, max_seconds=0.2)


def test_a_cap_must_be_finite() -> None:
    for seconds in (0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="max_seconds"):
            make_speaker().speak("Hello.", max_seconds=seconds)


def test_a_reference_needs_its_transcript(tmp_path: Path) -> None:
    for words in ({}, {"reference_text": " "}):
        with pytest.raises(InputError, match="reference-text"):
            make_speaker().speak("Hello.", reference="x.wav", **words)
    with pytest.raises(InputError, match="no effect"):
        make_speaker().speak("Hello.", reference_text="Good morning.")


def test_many_texts_are_spoken_in_batches_as_each_alone() -> None:
    speaker, seeds = make_speaker(), (1, 2, 3)
    spoken = speaker.speak_all([Request("Hello.", seed=seed) for seed in seeds], max_seconds=0.2, batch_size=2)
    assert [speech.waveform.shape for speech in spoken] == [
        speaker.speak("Hello.", seed=seed, max_seconds=0.2).waveform.shape for seed in seeds
    ]


def test_a_notebook_plays_a_clip() -> None:
    clip = Speech("Hi.", np.array([0, 0.5, -0.5], dtype=np.float32), 24_000, hit_cap=False)
    shown = re.fullmatch('<audio controls src="data:audio/wav;base64,(.+)"></audio>', clip._repr_html_())
    assert shown is not None
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(shown[1])))
    assert rate == 24_000
    assert waveform == pytest.approx(clip.waveform, abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_repeats": 0},
    ],
)
def test_impossible_sampling_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Sampling(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("silent", "the clip is silent"),
        ("antiphase", "channels cancel each other"),
        ("DC", "a constant offset of .* and no sound"),
        ("short", "a clip needs 8"),
        ("long", "45.0 s are over 30 s: cut it; five to ten"),
        ("cut off", "is cut off"),
        ("text", "not a wav"),
        ("missing", "there is no file"),
    ],
)
def test_a_reference_that_prepare_would_refuse_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    path, voice = tmp_path / "a.wav", speech(3.0)
    made = {
        "silent": 0 * voice,
        "antiphase": np.stack([voice, -voice], axis=1),
        "DC": 0 * voice + 0.4,
        "short": voice[: RATE // 5],
        "long": np.tile(voice, 15),
        "cut off": voice,
    }
    if kind in made:
        write(path, made[kind], subtype="FLOAT")
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:50_000])
    if kind == "text":
        path.write_text("Hello.")
    with pytest.raises(DataError, match=message) as refused:
        make_speaker().reference(path, "What is said.")
    assert str(path) in str(refused.value)


def test_a_reference_and_its_transcript_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", speech(1.0))
    assert make_speaker().reference(path, "What is said").text == "What is said."
    with pytest.raises(DataError, match="the transcript of the reference has no letter and no digit"):
        make_speaker().reference(path, "!")
    with pytest.raises(DataError, match=r"a\.wav cannot be used: .* nobody speaks so fast"):
        make_speaker().reference(path, "This is the transcript of another recording, and a much longer one. " * 2)


def test_speech_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    waveform = np.zeros(24_000, np.float32)
    with pytest.raises(WorkError, match=r"x\.wav cannot be written: .*; nothing of it was kept"), largest_file(1000):
        write_wav(tmp_path / "x.wav", waveform, 24_000)
    assert list(tmp_path.iterdir()) == []


def test_wav_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_wav(tmp_path / "deep" / "x.wav", np.array([0.0, 2.0, -2.0], dtype=np.float32), 24_000)
    waveform, rate = soundfile.read(tmp_path / "deep" / "x.wav")
    assert rate == 24_000
    assert waveform == pytest.approx([0, 1, -1], abs=1e-4)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.wav"]
    with pytest.raises(InputError, match=r"\.wav"):
        write_wav(tmp_path / "x.mp3", waveform, rate)


def test_doubts_about_an_adapter_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    shutil.copytree(DEMO_CODEC, base / "codec")
    plain = save_foreign(base, tmp_path / "plain")

    def said(adapter: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(adapter, device="cpu", base=BaseSpec(codec=base / "codec")).speak("Hello.", max_seconds=0.2)
        return [record.message for record in caplog.records if "frame cap" not in record.message]

    [no_card] = said(plain)
    assert f"{plain} has no higgstune.json" in no_card
    zero = shutil.copytree(plain, tmp_path / "zero")
    weights = load_file(plain / "adapter_model.safetensors")
    save_file({k: v * 0 if "lora_B" in k else v for k, v in weights.items()}, zero / "adapter_model.safetensors")
    assert ["changes nothing" in text for text in said(zero)] == [False, True]
    head = save_foreign(base, tmp_path / "head", in_full=["audio_lm_head"])
    assert not any("changes nothing" in text for text in said(head))
    own = load_file(base / "model.safetensors")["audio_lm_head.weight"].float()
    weights = load_file(head / "adapter_model.safetensors")
    [trained] = [name for name in weights if "audio_lm_head" in name]
    as_base = shutil.copytree(head, tmp_path / "as_base")
    idle = {k: own if k == trained else v * 0 if "lora_B" in k else v for k, v in weights.items()}
    save_file(idle, as_base / "adapter_model.safetensors")
    assert any("what it trained in full equals the base" in text for text in said(as_base))
    (base / "higgstune.json").write_text(json.dumps({"merged": {"adapter_sha256": "0" * 64, "fingerprint": "x"}}))
    assert ["contain another adapter" in text for text in said(plain)] == [False, True]
    checksum = hashlib.sha256((plain / "adapter_model.safetensors").read_bytes()).hexdigest()
    (base / "higgstune.json").write_text(json.dumps({"merged": {"adapter_sha256": checksum}}))
    with pytest.raises(CheckpointError, match=r"was merged into .* already"):
        said(plain)


class Windowed(FakeCodec):
    """With a context that it does not need."""

    context = 2

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(codes, dtype=np.float32).mean(1) / self.codebook_size, 960)

    def decode_part(self, codes: np.ndarray, wanted: slice, **_: Any) -> tuple[np.ndarray, None]:
        return self.decode(codes)[960 * wanted.start : 960 * wanted.stop], None


@pytest.mark.parametrize("codec", [FakeCodec(), Windowed()])
def test_a_stream_is_the_speech_in_parts(codec: FakeCodec, tmp_path: Path) -> None:
    text = "The sun rises in the east, and it sets in the west again. " * 8
    speaker = make_speaker(codec)
    whole = speaker.speak(text, seed=3).waveform
    parts = list(speaker.stream(text, seed=3))
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    spoken = 2 * len(split_text(text)) - 1  # with a pause between two pieces
    assert len(parts) > spoken if isinstance(codec, Windowed) else len(parts) == spoken
    # A player that stops early leaves an engine that speaks on.
    stream = speaker.stream(text, seed=3)
    np.testing.assert_array_equal(next(stream), parts[0])
    stream.close()
    np.testing.assert_array_equal(speaker.speak(text, seed=3).waveform, whole)
    with (tmp_path / "growing.wav").open("wb") as file:
        growing = WavStream(file, 24_000, {"family": "x", "licence": "y"})
        for part in parts:
            growing.write(part)
            said, _ = soundfile.read(io.BytesIO((tmp_path / "growing.wav").read_bytes()))  # of unknown length
            assert len(said) > 0
        growing.close()
    write_wav(tmp_path / "whole.wav", np.concatenate(parts), 24_000, {"family": "x", "licence": "y"})
    assert (tmp_path / "growing.wav").stat().st_size == (tmp_path / "whole.wav").stat().st_size
    assert origin_of(tmp_path / "growing.wav") == {"family": "x", "licence": "y"}
    found, expected = (soundfile.read(tmp_path / name)[0] for name in ("growing.wav", "whole.wav"))
    np.testing.assert_allclose(found, expected, atol=1.01 / 32768)


@pytest.mark.parametrize("rate", [0.4, 0.9, 1.5, 8.0])
def test_whoever_plays_a_stream_at_once_need_not_wait(rate: float) -> None:
    """`rate`: seconds of speech that are made in a second."""
    clock = [0.0]
    pace = Pace(10.0, clock=lambda: clock[0])
    playing_until, given = None, 0.0
    for frame in range(1, 251):
        made = frame / 25
        clock[0] = made / rate
        if frame == 250 or pace.is_due(made):
            assert playing_until is None or clock[0] <= playing_until, f"nothing to play at {clock[0]} s"
            if playing_until is None:
                first, playing_until = clock[0], clock[0]
            playing_until += made - given
            pace.give(made)
            given = made
    assert first <= max(0.2, 10 * (1 / rate - 0.8)) + 0.3


def test_a_piece_with_wrong_words_is_spoken_again_and_the_best_is_kept() -> None:
    speaker, checked = make_speaker(), []
    share = {"Hello.": [0.5, 0.3, 0.4], "Good night.": [0.6, 0.1], "Fine.": [0.2]}  # of each try

    def check(text: str, waveform: np.ndarray) -> float:
        checked.append((text, len(waveform)))
        return share[text][sum(other == text for other, _ in checked) - 1]

    requests = [Request(text, seed=5) for text in share]
    found = list(speaker.speak_all(requests, check=check, max_seconds=60.0, warn=False))
    assert sorted(text for text, _ in checked) == [
        "Fine.",
        "Good night.",
        "Good night.",
        "Hello.",
        "Hello.",
        "Hello.",
    ]
    assert [clip.spoken_again for clip in found] == [1, 1, 0]
    seeds = {"Hello.": 5 + 1_000_003, "Good night.": 5 + 1_000_003, "Fine.": 5}  # of what was kept
    for clip in found:
        alone = speaker.speak(clip.text, seed=seeds[clip.text], max_seconds=60.0)
        np.testing.assert_array_equal(clip.waveform, alone.waveform)


def test_a_list_that_is_left_while_clips_end_leaves_the_engine_free() -> None:
    speaker = make_speaker()
    requests = [Request("Hello.", seed=1), Request("Hello.", seed=1), Request("Good night, and sleep well.", seed=2)]
    stream = speaker.speak_all(requests, max_seconds=60.0)
    first = next(stream)  # the second clip ends with it
    stream.close()
    [again] = speaker.speak_all(requests[:1], max_seconds=60.0)
    np.testing.assert_array_equal(again.waveform, first.waveform)
