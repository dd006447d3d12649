"""What to do next with a data set, in words: sentences by rules, each with the numbers and the threshold behind it.

What is enough is what the documentation says. Where it gives no number, a sentence states what was measured, no more.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

import numpy as np

from higgstune.data.origin import ORIGIN
from higgstune.data.splits import VALIDATION
from higgstune.data.text import is_wide
from higgstune.evaluation.test_sets import LANGUAGES, read_sentences
from higgstune.progress import duration
from higgstune.raw.choose import Check, Chosen
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.utterances import Part

VOICE_MINUTES = 30  # docs/howto/record.md
BEST_SECONDS = (3.0, 15.0)  # docs/howto/record.md
_COMMON = 3  # test sentences that have a letter pair, for it to be one that a voice needs
_NEXT = 5  # sentences to record
_UNKNOWN = "the only speaker assumed"


def advise(chosen: Sequence[Chosen], parts: Sequence[Part], recipe: CollectRecipe) -> list[str]:
    """Sentences about a data set, each with what it is based on in brackets."""
    kept = [one for one in chosen if one.refused is None]
    found = list(_amount(chosen, kept, parts))
    if kept:
        found += [*_texts(kept, recipe), *_sound(kept, recipe), *_enough(kept), *_validation(kept, recipe)]
        found += [*_origin(recipe), *_next_sentences(kept)]
    return [f"{sentence} ({basis})" for sentence, basis in found]


Advice = Iterator[tuple[str, str]]  # a sentence, and what it is based on


def _amount(chosen: Sequence[Chosen], kept: Sequence[Chosen], parts: Sequence[Part]) -> Advice:
    seconds, whole = sum(one.utterance.seconds for one in kept), sum(part.seconds for part in parts)
    basis = f"{len(kept)} of {len(chosen)} utterances; the rest is refused, or pauses"
    yield f"{duration(seconds)} kept of {duration(whole)}, {_percent(seconds, whole)}", basis
    reasons = Counter(one.refused.what for one in chosen if one.refused)
    if reasons:
        [(what, count)] = reasons.most_common(1)
        first = next(one.refused for one in chosen if one.refused and one.refused.what == what)
        number = f"{first.threshold:g}" if isinstance(first.threshold, int | float) else first.threshold
        limit = "" if number is None else f"; the threshold is {number}"
        basis = f"{count} of {reasons.total()} refused utterances{limit}"
        yield f"Most often refused for: {what}", basis


def _texts(kept: Sequence[Chosen], recipe: CollectRecipe) -> Advice:
    compared = [one for one in kept if check_of(one, "text") is not None]
    recognised = sum(one.utterance.given is None for one in kept)
    if compared:
        odd = sum("text" in one.flags for one in compared)
        words = ": look at these first, a wrong text becomes mumbling" if odd else ""
        basis = f"{odd} of {len(compared)}; by more than {100 * recipe.high_difference:g} % of their characters"
        yield f"{_percent(odd, len(compared))} of the given texts differ from what is recognised{words}", basis
    if recognised:
        yield "Proof-read the texts that are recognised only", f"{recognised} of {len(kept)} have no given text"
    if len(compared) + recognised < len(kept):
        basis = f"{len(kept) - len(compared) - recognised} of {len(kept)} were compared with nothing"
        yield "Name an ASR to find given texts that are wrong: --asr", basis


def _sound(kept: Sequence[Chosen], recipe: CollectRecipe) -> Advice:
    loud = [(one.utterance.measures.loudness, one.gain) for one in kept]
    before = [loudness for loudness, _ in loud if loudness is not None]
    after = [loudness + gain for loudness, gain in loud if loudness is not None]
    if len(before) > 1:
        basis = f"5th to 95th percentile of {len(before)} utterances; the aim is {recipe.loudness:g} LUFS"
        yield f"The level varies by {_spread(before):.0f} dB, and by {_spread(after):.0f} dB after the gain", basis
    snrs = [snr for one in kept if (snr := one.utterance.measures.snr) is not None]
    if quiet := sum(snr < recipe.low_snr for snr in snrs):
        basis = f"{quiet} of {len(snrs)} are below {recipe.low_snr:g} dB, the median is {median(snrs):.0f} dB"
        yield f"Noise or music stands out in {_percent(quiet, len(snrs))}: record in a quieter place", basis
    low, high = BEST_SECONDS
    if outside := sum(not low <= round(one.utterance.seconds, 3) <= high for one in kept):
        basis = f"{outside} of {len(kept)}; docs/howto/record.md"
        yield f"{_percent(outside, len(kept))} are shorter than {low:g} s or longer than {high:g} s", basis


def _enough(kept: Sequence[Chosen]) -> Advice:
    """By the only amounts that the documentation names: those of the recipes."""
    seconds: dict[str, float] = defaultdict(float)
    for one in kept:
        seconds[one.speaker or _UNKNOWN] += one.utterance.seconds
    name = max(seconds, key=seconds.__getitem__)
    enough = sum(found >= 60 * VOICE_MINUTES for found in seconds.values())
    has = f"{name} has {duration(seconds[name])}"
    basis = f"designed for {VOICE_MINUTES} minutes: docs/howto/record.md; how quality grows with them was not measured"
    if enough:
        more = f", and {enough - 1} more speakers have as much" if enough > 1 else ""
        yield f"Enough for a voice, recipe voice: {has}{more}", basis
    else:
        missing = duration(60 * VOICE_MINUTES - seconds[name])
        yield f"Less than the recipe voice is designed for: {has}; record {missing} more", basis


def _validation(kept: Sequence[Chosen], recipe: CollectRecipe) -> Advice:
    if not any(one.split == VALIDATION for one in kept):
        basis = f"0 of {len(kept)} utterances; the recipe's share is {100 * recipe.validation:g} %"
        yield "Nothing is kept for validation: training cannot choose its best step", basis
    if found := across_splits(kept):
        basis = f"pairs of utterances: {len(found)}; any is too many"
        yield "The same speech is in training and validation: drop one of each pair", basis


def _origin(recipe: CollectRecipe) -> Advice:
    missing = [name for name in ORIGIN if name not in recipe.origin]
    if missing:
        basis = "keys of the file for --recipe; a voice belongs to a person, who must consent"
        yield f"State before you publish it: {', '.join(missing)}", basis


def _next_sentences(kept: Sequence[Chosen]) -> Advice:
    for language, texts in texts_by_language(kept).items():
        if language not in LANGUAGES:
            continue
        common = common_pairs(language)
        missing = common - units_of(texts)
        sentences = next_sentences(language, missing)
        if sentences:
            unit = _unit(common)
            covered = len(missing & units_of(sentences))
            basis = f"{len(missing)} of {len(common)} {unit} of {language} are missing, these have {covered} of them"
            quoted = " ".join(f"“{text}”" for text in sentences)
            yield f"Record next, and then do not evaluate with the built-in set {language}: {quoted}", basis


def next_sentences(language: str, missing: set[str]) -> list[str]:
    """Built-in sentences, each with the most letter pairs of those that are still missing; at most five."""
    left = set(missing)
    found: list[str] = []
    options = {sentence.text: units_of([sentence.text]) for sentence in read_sentences(language)}
    while left and len(found) < _NEXT:
        text = max(options, key=lambda text: len(options[text] & left))
        if not options[text] & left:
            break
        left -= options[text]
        found.append(text)
    return found


def across_splits(kept: Sequence[Chosen]) -> list[tuple[Chosen, Chosen, Check]]:
    """Pairs of kept utterances that share speech, but not the split."""
    by_id = {one.id: one for one in kept}
    pairs = []
    for one in kept:
        for check in one.checks:
            other = by_id.get(check.message.partition(" are also in ")[2]) if check.what == "duplicate" else None
            if other is not None and other.split != one.split:
                pairs.append((other, one, check))
    return pairs


def check_of(one: Chosen, what: str) -> Check | None:
    """An utterance's check of this name, if it was made."""
    return next((check for check in one.checks if check.what == what), None)


def texts_by_language(kept: Sequence[Chosen]) -> dict[str | None, list[str]]:
    """The texts of each language."""
    found: dict[str | None, list[str]] = defaultdict(list)
    for one in kept:
        found[one.part.language].append(one.text)
    return found


def words_of(text: str) -> list[str]:
    """Runs of letters in lower case: digits and punctuation say nothing about what is pronounced."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in folded).split()


def units_of(texts: Sequence[str]) -> set[str]:
    """Pairs of letters that follow each other within a word; of scripts like Chinese, single characters."""
    words = {word for text in texts for word in words_of(text)}
    wide = {character for word in words if is_wide(word) for character in word}
    return wide | {a + b for word in words if not is_wide(word) for a, b in pairwise(word)}


def common_pairs(language: str) -> set[str]:
    """The letter pairs, or characters, that several of a language's built-in sentences have."""
    counts = Counter(unit for sentence in read_sentences(language) for unit in units_of([sentence.text]))
    return {unit for unit, count in counts.items() if count >= _COMMON}


def _unit(units: set[str]) -> str:
    return "characters" if any(len(unit) == 1 for unit in units) else "common letter pairs"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _spread(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [5, 95])
    return float(high - low)
