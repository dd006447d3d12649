"""Each metric against what is known by construction, by hand, or by another formulation."""

import io
import json
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
from scipy import stats
from speech_defects import RATE, ColourJudge, KnowingTranscriber, Take, real_takes, real_world, speech_folder

from higgstune.data.audio import read_audio, resample
from higgstune.errors import DataError, WorkError
from higgstune.evaluation.asr_errors import count_errors, find_leak, normalize_spoken, word_error_rate, words_of
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.prosody import fundamental, prosody
from higgstune.evaluation.score import compare, score
from higgstune.evaluation.statistics import difference_interval, holm, permutation_p, ratio, ratio_interval
from higgstune.evaluation.waveform_checks import examine, find_loop, silences
from higgstune.generate.chunks import frame_cap
from higgstune.metrics import METRICS, Evaluation

NOISE = np.random.default_rng(0).normal(0, 0.1, 20 * RATE).astype(np.float32)


def tone(hertz: np.ndarray | float, seconds: float, *, level: float = 0.3) -> np.ndarray:
    """A voice-like sum of harmonics at 16 kHz; `hertz` may change in time."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, round(seconds * RATE))) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 12))
    return (level * np.asarray(wave)).astype(np.float32)


# ---- words


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("en", "Mr. Smith's twenty-one cats, they're (really) gone!", "mister smith's 21 cats they are really gone"),
        ("en", "<SE>[Laughter]</SE> Hello — [SPEAKER0] there…", "hello there"),
        ("en-US", "It cost $3,250.", "it cost three thousand two hundred and fifty dollars"),
        ("de", "Im Jahr 1998: »Über 1.250.000 Straßen«, sagte er.", "im jahr 1998 über 1250000 straßen sagte er"),
        ("es", "¿Qué tal, señor?", "qué tal señor"),
        ("vi", "Tiếng Việt, có dấu!", "tiếng việt có dấu"),
        ("ar", "الكِتَابُ عَلَى الطَّاوِلَةِ، ١٢٣", "الكتاب على الطاولة 123"),
        ("hi", "हिन्दी में, लिखा।", "हिन्दी में लिखा"),
        ("tr", "İstanbul'da", "istanbul da"),
        ("zh", "我用 iPhone 手机，打了１２个电话。", "我用iphone手机打了12个电话"),
    ],
)
def test_what_sounds_alike_is_alike(language: str, one: str, other: str) -> None:
    counts = count_errors(one, other, language)
    assert (counts.word_errors, counts.char_errors) == (0, 0)
    assert counts.words > 0


def test_vietnamese_tones_and_hindi_vowels_count() -> None:
    assert count_errors("má", "ma", "vi").word_errors == 1
    assert count_errors("की", "का", "hi").word_errors == 1
    assert words_of(normalize_spoken("हिन्दी में", "hi")) == ["हिन्दी", "में"]


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("zh", "今天天气很好。", 6),
        ("zh", "用 iPhone", 2),
        ("ja", "東京タワーへ", 6),
        ("th", "สวัสดี", 4),
        ("ko", "안녕하세요 여러분", 2),
    ],
)
def test_characters_are_words_without_spaces(language: str, text: str, words: int) -> None:
    assert count_errors(text, "", language).words == words


def test_counts_are_those_of_jiwer_over_the_corpus() -> None:
    texts = ["the quick brown fox", "jumps over", "a lazy dog sleeps here"]
    transcripts = ["the quick crown fox jumps", "over", "lazy dog sleeps hare"]
    counts = [count_errors(*pair, "en") for pair in zip(texts, transcripts, strict=True)]
    words, chars = sum(count.words for count in counts), sum(count.chars for count in counts)
    assert sum(count.word_errors for count in counts) / words == pytest.approx(jiwer.wer(texts, transcripts))
    assert sum(count.char_errors for count in counts) / chars == pytest.approx(jiwer.cer(texts, transcripts))
    assert word_error_rate(texts, transcripts) == pytest.approx(jiwer.wer(texts, transcripts))


def test_an_empty_reference_counts_what_was_invented() -> None:
    assert count_errors("...", "thank you", "en").word_errors == 2
    assert count_errors("...", "thank you", "en").words == 0
    assert count_errors("", "", "en").word_errors == 0
    assert word_error_rate(["", "we walk home now"], ["you", "we walk home now"]) == 0.25
    assert word_error_rate([""], ["you"]) == float("inf")


REFERENCE = "the morning train was late again because of the heavy snow"


@pytest.mark.parametrize(
    ("transcript", "text", "leaks"),
    [
        ("the morning train was late we walk along the river", "We walk along the river.", True),
        ("of the heavy snow we walk along", "We walk along the river.", True),
        ("late again because we walk along the", "We walk along the river.", True),
        ("late again becomes of the we walk", "We walk along the river.", True),
        ("of a heavy snow the train we walk", "We walk along the river.", False),
        ("the mourning train is late again we walk along", "We walk along the river.", True),
        ("we walk along the river", "We walk along the river.", False),
        ("we talk a long of the", "We walk along the river.", False),
        ("the morning train was early", "The morning train was early today.", False),
        ("late again", "We walk along the river.", False),
        ("", "We walk along the river.", False),
        ("a different sentence that no one wanted", "We walk along the river.", False),
    ],
)
def test_leaks(transcript: str, text: str, leaks: bool) -> None:
    assert find_leak(transcript, REFERENCE, text, "en").leaks == leaks


def test_leaks_in_a_script_without_spaces() -> None:
    assert find_leak("火车又晚点了我们走", "早上的火车又晚点了", "我们走吧", "zh").leaks
    assert not find_leak("火车又", "早上的火车又晚点了", "我们走吧", "zh").leaks
    assert find_leak("we walk", REFERENCE, "we walk", "en").errors == 2


# ---- health


def test_silences_are_measured_where_they_are() -> None:
    parts = [np.zeros(8000), NOISE[:RATE], NOISE[:19200] * 1e-3, NOISE[:RATE], np.zeros(4800)]
    inner, leading, trailing = silences(np.concatenate(parts).astype(np.float32), RATE)
    assert (inner, leading, trailing) == pytest.approx((1.2, 0.5, 0.3), abs=0.021)


def test_a_click_does_not_end_a_silence() -> None:
    waveform = np.concatenate([NOISE[:RATE], np.zeros(2 * RATE), NOISE[:RATE]]).astype(np.float32)
    waveform[2 * RATE : 2 * RATE + 80] = 0.9
    assert silences(waveform, RATE)[0] == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("scale", [0.01, 1.0, 9.0])
@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_silence_is_relative_to_the_clip(scale: float, rate: int) -> None:
    waveform = np.concatenate([NOISE[:rate], np.zeros(rate, np.float32), NOISE[:rate]]) * scale
    assert silences(waveform, rate)[0] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("waveform", [np.zeros(RATE, np.float32), NOISE[:RATE] * 1e-4])
def test_a_clip_without_sound_is_all_silence(waveform: np.ndarray) -> None:
    assert silences(waveform, RATE) == (1, 1, 1)
    assert find_loop(waveform, RATE) is None
    assert prosody(waveform, RATE) is None


def test_the_cap_is_known_or_judged_by_the_duration() -> None:
    text = "A short sentence."
    cap = frame_cap(text, 25) / 25
    at_cap, below = (examine(NOISE[: round(seconds * RATE)], RATE, text) for seconds in (cap, cap - 0.04))
    assert at_cap.hit_cap
    assert not below.hit_cap
    assert examine(NOISE[:RATE], RATE, text, hit_cap=True).hit_cap
    assert not examine(NOISE[: round(cap * RATE)], RATE, text, hit_cap=False).hit_cap


def test_short_and_empty_clips() -> None:
    for seconds, text, expected, short in (
        (0.33, "Yes.", None, True), (0.34, "Yes.", None, False),  # a third of a second
        (0.99, "a" * 42, None, True), (1.01, "a" * 42, None, False),
        (0.29, "Yes.", 0.6, True), (0.31, "Yes.", 0.6, False),  # a recording of 0.6 s
    ):  # fmt: skip
        assert examine(NOISE[: round(seconds * RATE)], RATE, text, expected=expected).short == short
    empty = examine(NOISE[:0], RATE, "")
    assert (empty.seconds, empty.short, empty.silence, empty.duration_ratio) == (0, True, 0, None)


# ---- loops


def test_real_speech_has_no_loop() -> None:
    folder = speech_folder("librispeech")
    files = sorted((folder / "wavs").iterdir())[::6] + sorted((folder.parent / "ljspeech" / "wavs").iterdir())[::4]
    assert [file.name for file in files if find_loop(*read_audio(file)) is not None] == []


def _as_is(waveform: np.ndarray) -> np.ndarray:
    return waveform


def _noisy(waveform: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 1, len(waveform))
    return (waveform + noise * np.sqrt(np.square(waveform).mean()) * 10 ** (-30 / 20)).astype(np.float32)


def _mp3(waveform: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="MP3")
    buffer.seek(0)
    return soundfile.read(buffer, dtype="float32")[0]


def _planted(take: Take, period: float, times: int) -> np.ndarray:
    """The loudest of ten pieces of such a length, so many times in a row."""
    starts = np.linspace(0.3, take.seconds - period - 0.3, 10)
    start = max(starts, key=lambda at: float(np.square(take.part(at, at + period).waveform).sum()))
    piece = take.part(start, start + period).waveform
    after = take.part(start + period, 99).waveform
    return np.concatenate([take.part(0, start).waveform, *[piece] * times, after])


@pytest.mark.parametrize("change", [_as_is, _noisy, _mp3])
@pytest.mark.parametrize("period", [0.08, 0.1137, 0.2503, 0.6171, 1.5])
def test_planted_loops_are_found(period: float, change: type) -> None:
    takes = real_takes("ljspeech")[:3] + real_takes("librispeech", "2033")[:2]
    found = [find_loop(change(_planted(take, period, 3 if period > 0.1 else 4)), RATE) for take in takes]
    assert None not in found
    multiples = [loop.period / period for loop in found if loop is not None]
    assert multiples == pytest.approx(np.round(multiples), abs=0.04)


def test_a_repeated_word_does_not_make_a_loop() -> None:
    for take in real_takes("ljspeech")[:4]:
        assert find_loop(_planted(take, 0.5, 2), RATE) is None


def test_held_and_moving_tones_do_not_make_a_loop() -> None:
    jitter = np.cumsum(np.random.default_rng(2).normal(0, 0.02, 3 * RATE))
    for waveform in (tone(140, 3), tone(140 + jitter, 3), tone(np.linspace(90, 300, 3 * RATE), 3), NOISE[: 3 * RATE]):
        assert find_loop(waveform, RATE) is None
    assert find_loop(NOISE[:100], RATE) is None


# ---- prosody


@pytest.mark.parametrize("hertz", [70, 110, 163.7, 220, 331, 450])
def test_the_pitch_of_a_tone(hertz: float) -> None:
    found = fundamental(tone(hertz, 1), RATE)
    assert (found[5:-5] > 0).all()
    assert 12 * np.log2(found[found > 0] / hertz) == pytest.approx(0, abs=0.1)
    assert fundamental(resample(tone(hertz, 1), RATE, 24_000), 24_000)[50] == pytest.approx(hertz, rel=0.003)


def test_pitch_follows_a_glide_and_noise_has_none() -> None:
    hertz = np.geomspace(110, 220, 2 * RATE)
    found = fundamental(tone(hertz, 2), RATE)[10:-10]
    wanted = hertz[80::160][10:-10]
    assert 12 * np.log2(found / wanted) == pytest.approx(0, abs=0.3)
    assert np.mean(fundamental(NOISE[:RATE], RATE) > 0) < 0.05


def test_prosody_of_real_voices() -> None:
    """Read faster by 3 semitones, a voice is higher by 3 semitones and as lively as before."""
    for take in real_takes("ljspeech")[:3]:
        usual, raised = prosody(take.waveform, RATE), prosody(resample(take.waveform, 19_027, RATE), RATE)
        assert usual is not None
        assert raised is not None
        assert 180 < 2 ** (usual.pitch / 12) < 270  # a woman's voice
        assert raised.pitch - usual.pitch == pytest.approx(3, abs=0.5)
        assert raised.pitch_spread == pytest.approx(usual.pitch_spread, rel=0.25)
        assert raised.energy_spread == pytest.approx(usual.energy_spread, rel=0.1)


# ---- statistics


def test_the_interval_covers_the_truth() -> None:
    """Errors among words of clips of unequal length: about 95 of 100 intervals hold the true rate."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        words = rng.integers(5, 25, 60)
        errors = rng.binomial(words, rng.beta(1, 9, 60))  # rates differ by clip; their mean is 0.1
        low, high = ratio_interval(errors.astype(float), words.astype(float), seed=0)
        held += low <= 0.1 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(4)
    words = rng.integers(5, 25, 50).astype(float)
    errors = rng.binomial(words.astype(int), 0.2).astype(float)
    other = stats.bootstrap(
        (errors, words), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, method="percentile",
        n_resamples=4000, random_state=0,
    ).confidence_interval  # fmt: skip
    assert ratio_interval(errors, words, seed=0) == pytest.approx((other.low, other.high), abs=0.006)


def test_one_clip_has_its_value_as_interval() -> None:
    assert ratio_interval(np.array([2.0]), np.array([8.0]), seed=0) == (0.25, 0.25)


def test_clips_without_words_leave_an_interval() -> None:
    low, high = ratio_interval(np.array([1.0, 0.0]), np.array([4.0, 0.0]), seed=0)
    assert (low, high) == (0.25, 0.25)


def test_the_p_value_is_exact_for_few_pairs_and_that_of_scipy() -> None:
    rng = np.random.default_rng(5)
    for count in (6, 40):
        a, b, ones = rng.normal(0, 1, count), rng.normal(0.4, 1, count), np.ones(count)
        other = stats.permutation_test(
            (a, b), lambda x, y, axis: y.mean(axis) - x.mean(axis), permutation_type="samples", n_resamples=9999,
            random_state=0,
        ).pvalue  # fmt: skip
        assert permutation_p((a, ones), (b, ones), seed=0) == pytest.approx(other, abs=1e-9 if count == 6 else 0.012)


def test_equal_systems_do_not_differ() -> None:
    values, words = np.array([1.0, 0.0, 2.0, 3.0]), np.array([9.0, 8.0, 7.0, 9.0])
    assert permutation_p((values, words), (values, words), seed=0) == 1
    assert difference_interval((values, words), (values, words), seed=0) == (0, 0)
    assert ratio(values, words) == pytest.approx(6 / 33)


def test_many_questions_at_once_take_smaller_p_values() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; no less than that
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    drawn = np.random.default_rng(0).uniform(size=(2000, 12))
    assert np.mean([min(found) < 0.05 for found in drawn]) > 0.4
    assert np.mean([min(holm(found)) < 0.05 for found in drawn]) == pytest.approx(0.05, abs=0.015)


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng, ones = np.random.default_rng(6), np.ones(10)
    values = rng.normal(size=(200, 2, 10))
    alarms = [permutation_p((a, ones), (b, ones), seed=0) < 0.05 for a, b in values]
    assert np.mean(alarms) < 0.1


# ---- the whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    speakers = {"lj": real_takes("ljspeech")[:4], "2033": real_takes("librispeech", "2033")[:4]}
    return real_world(tmp_path_factory.mktemp("world"), speakers, clips_each=2)


class Rater:
    name = "rater 1"

    def rate(self, files: list[Path]) -> dict[str, list[float]]:
        return {"rater": [3.5] * len(files)}


def test_the_same_folder_scores_the_same(world) -> None:
    judges = Judges(world.asr, ColourJudge(), Rater())
    first, second = (score(world.clips, judges, world.voices) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.not_measured == {}
    assert first.summary.keys() == {metric.name for metric in METRICS}
    values = json.loads(first.to_json(), parse_constant=pytest.fail)
    assert Evaluation.of(values) == first
    assert first.judges.keys() == {"asr", "speaker", "naturalness", "pitch"}
    assert first.clips[0]["similarity half"] == pytest.approx(first.clips[0]["similarity"] / 2, abs=1e-5)
    differences = compare(first, second)
    assert differences.keys() == first.summary.keys()
    assert all(difference.value == 0 and difference.p == 1 for difference in differences.values())


def test_judges_are_called_once_for_each_set_of_references(world) -> None:
    asr, speaker = KnowingTranscriber(), ColourJudge()
    asr.known = world.asr.known
    score(world.clips, Judges(asr, speaker), world.voices)
    assert asr.calls == [(4, "en", None), (4, "en", None), (4, "en", 3.0)]
    assert sorted(speaker.calls) == [(1, 2), (1, 2), (2, 4), (2, 4)]


def test_without_judges_each_metric_says_why(world) -> None:
    found = score(world.clips, Judges(), None)
    assert found.summary.keys() | found.not_measured.keys() == {metric.name for metric in METRICS}
    alone = {"cap_rate", "short_rate", "silence", "trailing_silence", "duration_ratio", "loop_rate"}
    assert found.summary.keys() == alone
    assert "--asr" in found.not_measured["wer"]
    assert "--speaker-judge" in found.not_measured["similarity"]
    assert "--quality-judge" in found.not_measured["naturalness"]
    assert "voices" in found.not_measured["f0_shift"]


def test_what_a_clip_lacks_is_said(world) -> None:
    bare = [Clip(clip.id, clip.file, clip.text) for clip in world.clips]
    only = {"lj": world.voices["lj"]}
    found = score(bare, Judges(world.asr, ColourJudge()), only)
    assert found.summary["similarity"].clips == 4  # no speaker is named, and there is one voice
    assert "one voice" in found.not_measured["speaker_accuracy"]
    assert "recording" in found.not_measured["recording_wer"]
    assert "reference" in found.not_measured["similarity_reference"]
    assert "reference" in found.not_measured["leak_rate"]


def test_one_clip_is_valid_json(world) -> None:
    found = score(world.clips[:1], Judges(world.asr, ColourJudge()), world.voices)
    json.loads(found.to_json(), parse_constant=pytest.fail)
    assert found.summary["silence"].low == found.summary["silence"].high
    assert found.confusion is not None
    assert (found.confusion.speakers, found.confusion.nearest) == (["lj", "2033"], [[1, 0]])


def test_a_speaker_has_a_pace_of_their_own(world) -> None:
    """Without a recording of the text, the speaker's other recordings show how slowly they speak."""
    clips = [replace(clip, recording=None) for clip in world.clips]
    with_pace = score(clips, Judges()).clips
    without = score([replace(clip, reference=None, reference_text=None) for clip in clips], Judges()).clips
    take = world.leading["lj"]
    pace = take.seconds / (len(take.text) / 14)
    assert with_pace[0]["duration_ratio"] == pytest.approx(without[0]["duration_ratio"] / pace, rel=1e-3)


def test_broken_files_and_judges_are_errors(world, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(DataError, match="not finite"):
        score([Clip("a", tmp_path / "nan.wav", "Hello.")], Judges())

    class Lost(Rater):
        def rate(self, files: list[Path]) -> dict[str, list[float]]:
            return {"rater": [float("nan")] * len(files)}

    with pytest.raises(WorkError, match="rater"):
        score(world.clips, Judges(quality=Lost()))


def test_only_what_is_comparable_is_compared(world) -> None:
    one = score(world.clips, Judges(quality=Rater()))
    with pytest.raises(DataError, match="no clip is in both"):
        compare(one, replace(one, clips=[]))
    with pytest.raises(DataError, match="rater 1 and rater 2"):
        compare(one, replace(one, judges=one.judges | {"naturalness": "rater 2"}))
    fewer = compare(one, replace(one, clips=one.clips[:3]))
    assert fewer["silence"].clips == 3


def test_only_metrics_that_differ_count_as_questions(world) -> None:
    found = score(world.clips, Judges(world.asr), world.voices)
    found = replace(found, clips=[row | {"id": f"{row['id']} {i}"} for row in found.clips for i in range(3)])
    worse = replace(found, clips=[row | {"hit_cap": 1} for row in found.clips])
    differences = compare(found, worse)
    assert differences["cap_rate"].p < 0.05
    assert differences["cap_rate"].p_holm == differences["cap_rate"].p  # nothing else differs
    assert differences["wer"].p_holm == 1
    longer = replace(worse, clips=[row | {"silence": row["silence"] + 1} for row in worse.clips])
    differences = compare(found, longer)
    assert differences["cap_rate"].p_holm == pytest.approx(2 * differences["cap_rate"].p)


def test_progress_is_reported(world) -> None:
    reported = []
    score(world.clips, Judges(quality=Rater()), progress=lambda *step: reported.append(step))
    assert reported[0] == ("measuring waveforms", 0, 4)
    assert reported[-1] == ("rating", 4, 4)
