"""Which utterances of all recordings are kept: speakers linked, duplicates found, thresholds applied, levels, splits.

Everything here is arithmetic on what `utterances` found, so that a changed threshold takes seconds.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from higgstune.data.duplicates import find_duplicates
from higgstune.data.messages import find_control_tokens
from higgstune.data.splits import TRAIN, VALIDATION
from higgstune.data.text import is_speakable, normalize_text, spoken_length
from higgstune.raw.journal import unpacked
from higgstune.raw.measure import gain
from higgstune.raw.names import stem_for, utterance_id
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.texts import difference
from higgstune.raw.utterances import Part, Utterance, late
from higgstune.raw.voices import link

_MIN_RATES = 20  # utterances of a language, below which its speech rate is not known
_MIN_DEVIATION = 0.15  # of the median rate: less spread is that of few utterances
_NORMAL = 1.4826  # median deviation -> standard deviation of a normal distribution
_LINK_SHARE = 0.75  # of the distance that parts speakers, below which centres in two recordings are one speaker's
_AT_END = 0.05  # seconds: speech that ends nearer to the end of what is left of a damaged recording continues behind it
_SAME_SPEECH = 0.8  # of the shorter utterance, in a duplicate

Verdict = Literal["kept", "flagged", "refused"]


@dataclass(frozen=True)
class Check:
    """One threshold, and what an utterance has: a line of its history."""

    what: str
    value: Any
    threshold: Any
    verdict: Verdict
    message: str = ""


@dataclass
class Chosen:
    """An utterance of the data set, or one that is refused."""

    id: str
    part: Part
    utterance: Utterance
    speaker: str | None
    text: str
    checks: list[Check] = field(default_factory=list)
    gain: float = 0.0  # dB
    split: str = TRAIN

    @property
    def refused(self) -> Check | None:
        """The first check that refuses it."""
        return next((check for check in self.checks if check.verdict == "refused"), None)

    @property
    def flags(self) -> list[str]:
        """What is odd about it, without being refused for it."""
        return [check.what for check in self.checks if check.verdict == "flagged"]


@dataclass(frozen=True)
class Baseline:
    """What follows from the recordings alone, so that no decision of a person changes the other clips."""

    gains: Mapping[tuple[str, int | None], float]  # dB, of each speaker in each recording
    held_from: Mapping[str, float]  # of each recording, the second from which it is for validation


def find_baseline(parts: Sequence[Part], recipe: CollectRecipe, *, copied: bool) -> Baseline:
    """Gains and splits by the utterances as they were found, without noise and clipping where there are others.

    A recording that is not `copied` into clips is in one split as a whole.
    """
    groups: dict[tuple[str, int | None], list[Utterance]] = defaultdict(list)
    for part in parts:
        for one in part.utterances:
            groups[part.path, one.speaker].append(one)
    sound = {key: [one for one in members if _sounds_good(one, recipe)] or members for key, members in groups.items()}
    return Baseline(
        {key: _gain_of(members, recipe) for key, members in sound.items()},
        _held_from(parts, recipe.validation, copied=copied),
    )


def choose(
    parts: Sequence[Part], recipe: CollectRecipe, edits: Mapping[str, Mapping[str, Any]], baseline: Baseline
) -> list[Chosen]:
    """All utterances in order, each with its speaker, text, checks, gain and split.

    `edits` are a person's decisions by id: `text`, `speaker`, and `keep`, which comes before every threshold.
    """
    found: list[Chosen] = []
    names = name_speakers(parts, recipe.speaker_distance)
    for part, speakers in zip(parts, names, strict=True):
        stem = stem_for(part.path)
        for utterance in part.utterances:
            speaker = None if utterance.speaker is None else speakers[utterance.speaker]
            text = utterance.recognised if utterance.given is None else utterance.given
            found.append(Chosen(utterance_id(stem, utterance.start), part, utterance, speaker, text or ""))
    for one in found:
        edit = edits.get(one.id, {})
        one.text, one.speaker = edit.get("text", one.text), edit.get("speaker", one.speaker)
        one.checks = list(_checks(one, recipe))
    _check_rates(found, recipe)
    _check_duplicates(found)
    for one in found:
        keep = edits.get(one.id, {}).get("keep")
        if keep is False:
            one.checks.insert(0, Check("dropped", None, None, "refused", "dropped by a person"))
        elif keep and one.text:
            one.checks = [
                replace(check, verdict="flagged") if check.verdict == "refused" else check for check in one.checks
            ]
    for one in found:
        whole = baseline.gains.get((one.part.path, one.utterance.speaker))
        if whole is None or recipe.level == "utterance":
            whole = _gain_of([one.utterance], recipe)
        one.gain = whole
        one.split = VALIDATION if one.utterance.start >= baseline.held_from[one.part.path] else TRAIN
    return found


def name_speakers(parts: Sequence[Part], distance: float) -> list[list[str | None]]:
    """For each part, the name of each of its speakers: as a text names it, else numbered, the same across recordings.

    Without a model of voices, only a text names speakers.
    """
    found: list[dict[int, str | None]] = [{} for _ in parts]
    seconds: dict[int, float] = defaultdict(float)
    named: dict[int, Counter[str]] = defaultdict(Counter)
    voices = link([part.voices for part in parts], _LINK_SHARE * distance)
    for part, own in zip(parts, voices, strict=True):
        for one in part.utterances:
            if one.speaker is not None and own:
                seconds[own[one.speaker]] += one.seconds
                named[own[one.speaker]].update([one.name] if one.name else [])
    order = {voice: place for place, voice in enumerate(sorted(seconds, key=lambda voice: -seconds[voice]), 1)}
    for names, own in zip(found, voices, strict=True):
        for speaker, voice in enumerate(own):
            called = named[voice].most_common(1)
            names[speaker] = called[0][0] if called else f"speaker{order.get(voice, len(order) + 1):02d}"
    for number, part in enumerate(parts):
        for one in part.utterances:
            if one.speaker is not None and one.speaker not in found[number]:
                found[number][one.speaker] = one.name
    return [[names.get(speaker) for speaker in range(max(names, default=-1) + 1)] for names in found]


def _checks(one: Chosen, recipe: CollectRecipe) -> Iterable[Check]:
    utterance = one.utterance
    seconds = round(utterance.seconds, 3)
    if utterance.speaker is None:
        yield Check("two speakers", None, None, "refused", "it begins and ends with different voices")
    if seconds < recipe.min_seconds:
        yield Check("too short", seconds, recipe.min_seconds, "refused", f"{seconds} s")
    if seconds > recipe.max_seconds:
        yield Check("too long", seconds, recipe.max_seconds, "refused", f"{seconds} s without a pause")
    if one.part.damage is not None and utterance.speech[-1][1] >= one.part.seconds - _AT_END:
        yield Check("cut off", None, None, "refused", "the recording is cut off in its last word")
    yield from _check_sound(utterance, recipe)
    if one.part.hum is not None:
        verdict: Verdict = "flagged" if one.part.hum > recipe.high_hum else "kept"
        yield Check("hum", one.part.hum, recipe.high_hum, verdict, f"mains hum stands out by {one.part.hum:.1f} dB")
    yield from _check_text(one, recipe)


def _check_sound(one: Utterance, recipe: CollectRecipe) -> Iterable[Check]:
    snr, clipped = one.measures.snr, one.measures.clipped
    if snr is not None:
        verdict: Verdict = "refused" if snr < recipe.min_snr else "flagged" if snr < recipe.low_snr else "kept"
        yield Check("noise", snr, recipe.min_snr, verdict, f"speech is {snr:.1f} dB above noise or music")
    if clipped is not None:
        verdict = "refused" if clipped > recipe.max_clipped else "kept"
        yield Check("clipped", clipped, recipe.max_clipped, verdict, f"{100 * clipped:.2f} % of its samples")


def _sounds_good(one: Utterance, recipe: CollectRecipe) -> bool:
    return all(check.verdict != "refused" for check in _check_sound(one, recipe))


def _check_text(one: Chosen, recipe: CollectRecipe) -> Iterable[Check]:
    given, recognised = one.utterance.given, one.utterance.recognised
    if tokens := find_control_tokens(one.text):
        yield Check("control token", tokens[0], None, "refused", f"its text has {tokens[0]}")
    elif not one.text.strip():
        why = "nothing is recognised in it" if recognised is not None else "it has no text, and there is no ASR"
        yield Check("no text", None, None, "refused", why)
    elif not is_speakable(normalize_text(one.text)):
        yield Check("no text", one.text, None, "refused", "its text has no letter and no digit")
    elif given is None and one.part.has_text:
        yield Check("not in the text", None, None, "flagged", "its words are recognised: the text beside it lacks them")
    elif given is not None and recognised is not None:
        share = round(difference(one.text, recognised, one.part.language), 4)
        verdict: Verdict = (
            "refused" if share > recipe.max_difference else "flagged" if share > recipe.high_difference else "kept"
        )
        yield Check("text", share, recipe.max_difference, verdict, f"{100 * share:.0f} % of its characters differ")
    if given is not None and (offset := one.part.offset):
        yield Check("text times", offset, None, "kept", f"the times of its text are {late(offset)}, and are moved")
    if (logprob := one.utterance.logprob) is not None and given is None:
        verdict = "flagged" if logprob < recipe.low_logprob else "kept"
        message = f"the mean log-probability of its words is {logprob:.2f}: unclear, or several speak at once"
        yield Check("unsure", round(logprob, 2), recipe.low_logprob, verdict, message)


def _check_rates(found: Sequence[Chosen], recipe: CollectRecipe) -> None:
    """Refuse what is spoken far faster or slower than the rest of its language."""
    groups: dict[str | None, list[tuple[Chosen, float]]] = defaultdict(list)
    for one in found:
        spoken = sum(end - start for start, end in one.utterance.speech)
        if one.refused is None and spoken > 0:
            groups[one.part.language].append((one, spoken_length(one.text) / spoken))
    for members in groups.values():
        if len(members) < _MIN_RATES:
            continue
        middle = median(rate for _, rate in members)
        spread = _NORMAL * median(abs(rate - middle) for _, rate in members)
        limit = recipe.rate_deviations * max(spread, _MIN_DEVIATION * middle)
        for one, rate in members:
            verdict: Verdict = "refused" if abs(rate - middle) > limit else "kept"
            low, high = max(middle - limit, 0), middle + limit
            one.checks.append(
                Check("rate", round(rate, 2), [round(low, 2), round(high, 2)], verdict, f"{rate:.1f} letters a second")
            )


def _check_duplicates(found: Sequence[Chosen]) -> None:
    """Of utterances that are the same recording, refuse all but the first, or the first with a given text."""
    usable = [one for one in found if one.refused is None]
    prints = [bytes(unpacked(one.utterance.print, np.uint8)) for one in usable]
    for pair in find_duplicates(prints):
        pairs = (usable[pair.first], usable[pair.second])
        first, second = sorted(pairs, key=lambda one: one.utterance.given is None)
        if first.refused is not None or second.refused is not None:
            continue
        shorter = min(first.utterance.seconds, second.utterance.seconds)
        same = pair.overlap >= _SAME_SPEECH * shorter
        verdict: Verdict = "refused" if same else "flagged"
        message = f"{pair.overlap:.1f} s of it are also in {first.id}"
        second.checks.append(Check("duplicate", round(pair.cosine, 3), None, verdict, message))


def _gain_of(members: Sequence[Utterance], recipe: CollectRecipe) -> float:
    """The gain in dB for all of them; 0 for what is too short or too quiet to have a loudness."""
    loud = [(one.seconds, one.measures.loudness) for one in members]
    powers = [(seconds, 10 ** (found / 10)) for seconds, found in loud if found is not None]
    if not powers:
        return 0.0
    power = sum(seconds * power for seconds, power in powers) / sum(seconds for seconds, _ in powers)
    peak = max(one.measures.true_peak for one in members)
    return round(gain(10 * math.log10(power), peak, recipe.loudness, recipe.true_peak), 2)


def _held_from(parts: Sequence[Part], share: float, *, copied: bool) -> dict[str, float]:
    """Whole recordings for validation, chosen by their hashes; of one long recording, its end."""
    seconds = {part.path: sum(one.seconds for one in part.utterances) for part in parts}
    held_from = dict.fromkeys(seconds, math.inf)
    wanted, held = share * sum(seconds.values()), 0.0
    if not wanted:
        return held_from
    for part in sorted(parts, key=lambda part: hashlib.sha256(part.sha256.encode()).hexdigest()):
        if held < wanted and held + seconds[part.path] <= 2 * wanted and len(parts) > 1:
            held += seconds[part.path]
            held_from[part.path] = 0.0
    if held < wanted / 2 and copied:
        longest = max(parts, key=lambda part: seconds[part.path])
        if len(longest.utterances) > 1:
            held_from[longest.path] = _border(longest.utterances, wanted - held)
    return held_from


def _border(utterances: Sequence[Utterance], wanted: float) -> float:
    """Where a recording's end of about `wanted` seconds of speech begins: behind the longest pause thereabouts."""
    options, seconds = [], 0.0
    for index in range(len(utterances) - 1, 0, -1):
        seconds += utterances[index].seconds
        pause = utterances[index].start - utterances[index - 1].end
        options.append((abs(math.log(seconds / wanted)) - 0.2 * min(pause, 5.0), utterances[index].start))
    return min(options)[1]
