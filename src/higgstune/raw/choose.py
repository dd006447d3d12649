"""Which utterances of all recordings are kept: speakers linked, duplicates found, thresholds applied, levels, splits.

Everything here is arithmetic on what `utterances` found, so that a changed threshold takes seconds.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from statistics import median
from typing import Any, Literal

import numpy as np

from higgstune.data.messages import find_control_tokens
from higgstune.data.splits import TRAIN, VALIDATION
from higgstune.data.text import is_speakable, normalize_text, spoken_length
from higgstune.raw.duplicates import find_duplicates
from higgstune.raw.journal import unpacked
from higgstune.raw.measure import gain
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.texts import difference
from higgstune.raw.utterances import Part, Utterance
from higgstune.raw.voices import link

_MIN_RATES = 20  # utterances of a language, below which its speech rate is not known
_MIN_DEVIATION = 0.15  # of the median rate: less spread is that of few utterances
_NORMAL = 1.4826  # median deviation -> standard deviation of a normal distribution
_LINK_SHARE = 0.75  # of the distance that parts speakers, below which centres in two recordings are one speaker's
_MAX_STEM = 120  # bytes of the 255 that a file's name may have: a clip's temporary one also names host and process
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


def choose(
    parts: Sequence[Part], recipe: CollectRecipe, edits: Mapping[str, Mapping[str, Any]], *, copied: bool
) -> list[Chosen]:
    """All utterances in order, each with its speaker, text, checks, gain and split.

    A recording that is not `copied` into clips is in one split as a whole. `edits` are a person's decisions by id:
    `text`, `speaker`, and `keep`, which comes before every threshold.
    """
    found: list[Chosen] = []
    names = name_speakers(parts, recipe.speaker_distance)
    for part, stem, speakers in zip(parts, stems(parts), names, strict=True):
        for utterance in part.utterances:
            speaker = None if utterance.speaker is None else speakers[utterance.speaker]
            text = utterance.recognised if utterance.given is None else utterance.given
            found.append(Chosen(f"{stem}-{round(utterance.start * 1000):08d}", part, utterance, speaker, text or ""))
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
    kept = [one for one in found if one.refused is None]
    _set_gains(kept, recipe)
    _set_splits(kept, recipe.validation, copied=copied)
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
    utterance, measures = one.utterance, one.utterance.measures
    seconds = round(utterance.seconds, 3)
    if utterance.speaker is None:
        yield Check("two speakers", None, None, "refused", "it begins and ends with different voices")
    if seconds < recipe.min_seconds:
        yield Check("too short", seconds, recipe.min_seconds, "refused", f"{seconds} s")
    if seconds > recipe.max_seconds:
        yield Check("too long", seconds, recipe.max_seconds, "refused", f"{seconds} s without a pause")
    if one.part.damage is not None and utterance.speech[-1][1] >= one.part.seconds - _AT_END:
        yield Check("cut off", None, None, "refused", "the recording is cut off in its last word")
    snr = measures.snr
    if snr is not None:
        verdict: Verdict = "refused" if snr < recipe.min_snr else "flagged" if snr < recipe.low_snr else "kept"
        yield Check("noise", snr, recipe.min_snr, verdict, f"speech is {snr:.1f} dB above noise or music")
    clipped = measures.clipped
    if clipped is not None:
        verdict = "refused" if clipped > recipe.max_clipped else "kept"
        yield Check("clipped", clipped, recipe.max_clipped, verdict, f"{100 * clipped:.2f} % of its samples")
    if one.part.hum is not None:
        verdict = "flagged" if one.part.hum > recipe.high_hum else "kept"
        yield Check("hum", one.part.hum, recipe.high_hum, verdict, f"mains hum stands out by {one.part.hum:.1f} dB")
    yield from _check_text(one, recipe)


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
    """Refuse all but the first of utterances that are the same recording."""
    usable = [one for one in found if one.refused is None]
    prints = [bytes(unpacked(one.utterance.print, np.uint8)) for one in usable]
    for pair in find_duplicates(prints):
        first, second = usable[pair.first], usable[pair.second]
        if first.refused is not None or second.refused is not None:
            continue
        shorter = min(first.utterance.seconds, second.utterance.seconds)
        same = pair.overlap >= _SAME_SPEECH * shorter
        verdict: Verdict = "refused" if same else "flagged"
        message = f"{pair.overlap:.1f} s of it are also in {first.id}"
        second.checks.append(Check("duplicate", round(pair.cosine, 3), None, verdict, message))


def _set_gains(kept: Sequence[Chosen], recipe: CollectRecipe) -> None:
    groups: dict[Any, list[Chosen]] = defaultdict(list)
    for number, one in enumerate(kept):
        whole = (one.part.path, one.utterance.speaker)
        groups[whole if recipe.level == "recording" else number].append(one)
    for members in groups.values():
        loud = [(one.utterance.seconds, one.utterance.measures.loudness) for one in members]
        powers = [(seconds, 10 ** (found / 10)) for seconds, found in loud if found is not None]
        if not powers:
            continue
        power = sum(seconds * power for seconds, power in powers) / sum(seconds for seconds, _ in powers)
        peak = max(one.utterance.measures.true_peak for one in members)
        for one in members:
            one.gain = round(gain(10 * math.log10(power), peak, recipe.loudness, recipe.true_peak), 2)


def _set_splits(kept: Sequence[Chosen], share: float, *, copied: bool) -> None:
    """Whole recordings for validation, chosen by their hashes; of one long recording, its end."""
    by_recording: dict[str, list[Chosen]] = defaultdict(list)
    for one in kept:
        by_recording[one.part.sha256].append(one)
    total = sum(one.utterance.seconds for one in kept)
    wanted, held = share * total, 0.0
    if not kept or not share:
        return
    order = sorted(by_recording, key=lambda sha256: hashlib.sha256(sha256.encode()).hexdigest())
    for sha256 in order:
        seconds = sum(one.utterance.seconds for one in by_recording[sha256])
        if held < wanted and held + seconds <= 2 * wanted and len(by_recording) > 1:
            held += seconds
            for one in by_recording[sha256]:
                one.split = VALIDATION
    if held >= wanted / 2 or not copied:
        return
    longest = max(by_recording.values(), key=lambda members: sum(one.utterance.seconds for one in members))
    if len(longest) > 1:
        for one in longest[_border(longest, wanted - held) :]:
            one.split = VALIDATION


def _border(members: Sequence[Chosen], wanted: float) -> int:
    """The first utterance of a recording's end, of about `wanted` seconds: behind the longest pause thereabouts."""
    options, seconds = [], 0.0
    for index in range(len(members) - 1, 0, -1):
        seconds += members[index].utterance.seconds
        pause = members[index].utterance.start - members[index - 1].utterance.end
        options.append((abs(math.log(seconds / wanted)) - 0.2 * min(pause, 5.0), index))
    return min(options)[1]


def stems(parts: Sequence[Part]) -> list[str]:
    """Of each recording, what its utterances' ids begin with: its path without the suffix, where that is enough.

    Clips are named by ids, so one that is too long for a file's name, or still another's, ends with a hash of the path.
    """
    short = [str(PurePosixPath(part.path).with_suffix("")).replace("/", "_") for part in parts]
    count = Counter(short)
    found = [
        stem if count[stem] == 1 else part.path.replace("/", "_").replace(".", "_")
        for stem, part in zip(short, parts, strict=True)
    ]
    count = Counter(found)
    return [
        stem if count[stem] == 1 and len(stem.encode()) <= _MAX_STEM else _hashed(stem, part.path)
        for stem, part in zip(found, parts, strict=True)
    ]


def _hashed(stem: str, path: str) -> str:
    begin = stem.encode()[:_MAX_STEM].decode(errors="ignore")  # not half a character
    return f"{begin}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
