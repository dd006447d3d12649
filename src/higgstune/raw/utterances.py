"""One recording -> its utterances: found, separated by speaker, cut, measured, recognised. All that needs its sound.

    decode -> speech -> edges -> cues -> speakers -> pack -> measures, prints -> words

The result depends on the recording, the text beside it, the settings that cut, and the models: it is kept whole, and
what each stage computed is kept in a journal, so that an interrupted recording resumes where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.data.duplicates import print_of
from higgstune.data.importers.subtitles import Cue, TextBeside, read_cues
from higgstune.data.importers.transcripts import read_transcript
from higgstune.data.rejection import RowError
from higgstune.evaluation.judges.base import ClipTranscriber, Embedder
from higgstune.raw.journal import Journal, key_of, packed, unpacked
from higgstune.raw.measure import HumMeter, UtteranceMeasures, measure
from higgstune.raw.pack import Cut, is_suspicious, pack
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.recording import LOSSLESS, Decoded, decode
from higgstune.raw.speech import Region, SpeechDetector, find_regions, levels_of, refine
from higgstune.raw.texts import Placed, align_text, find_offset, join_words, keeps_border, place_cues
from higgstune.raw.voices import assign

_CONTEXT = 0.3  # seconds on both sides of an utterance, in which its noise is measured
_STRETCH = 28.0  # seconds that are recognised at once, with the gaps between clips
_GAP = 1.0
_VERSION = 2  # of what is done here: another one does it anew
_SHOWN = 80  # characters

Report = Callable[[float], None]  # the share of a recording that is done
Recognised = tuple[str | None, float | None]  # the recognised words, and the mean log-probability of their tokens


@dataclass(frozen=True)
class Models:
    """The models; all but the detector may be missing."""

    detector: SpeechDetector
    embedder: Embedder | None = None
    asr: ClipTranscriber | None = None

    @property
    def names(self) -> dict[str, str | None]:
        """Each with its version and a hash of its weights."""
        return {
            "vad": self.detector.name,
            "speakers": None if self.embedder is None else self.embedder.name,
            "asr": None if self.asr is None else self.asr.name,
        }


@dataclass(frozen=True)
class Utterance:
    """One utterance of a recording, before anything is refused. Times are seconds of the recording."""

    start: float
    end: float
    speech: list[list[float]]  # start and end of each region
    speaker: int | None  # within the recording; None where two speakers are in one region
    name: str | None  # of the speaker, where the text beside the recording names it
    given: str | None  # its text, from the text beside the recording
    recognised: str | None
    logprob: float | None  # of the recognised text, mean over tokens
    measures: UtteranceMeasures
    print: str

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


@dataclass(frozen=True)
class Part:
    """All that is known of one recording."""

    path: str  # relative to the raw folder
    sha256: str
    seconds: float
    rate: int
    channels: int
    damage: str | None
    lossless: bool
    text: str | None  # name of the file beside it that was used
    language: str | None
    voices: list[list[float]]  # the centre of each speaker
    hum: float | None  # dB that the mains' hum stands out
    utterances: list[Utterance] = field(default_factory=list)
    unspoken: list[str] = field(default_factory=list)  # of the given text, what nobody says
    notes: list[str] = field(default_factory=list)
    offset: float = 0.0  # seconds that all times of the text were late: its cues are moved
    models: dict[str, str | None] = field(default_factory=dict)  # that found all of it

    @property
    def has_text(self) -> bool:
        """Whether a text beside it was used."""
        return self.text is not None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Part":
        """The inverse of `dataclasses.asdict`."""
        found = [{**one, "measures": UtteranceMeasures(**one["measures"])} for one in data["utterances"]]
        return cls(**{**data, "utterances": [Utterance(**one) for one in found]})


def collect_recording(
    path: Path,
    name: str,
    recipe: CollectRecipe,
    models: Models,
    cache: Path,
    folder: Path,
    *,
    language: str | None = None,
    speakers: int | None = None,
    beside: TextBeside,
    report: Report,
) -> Part:
    """The utterances of one recording; `beside` is its text, and `folder` an empty one that the caller removes.

    Raises RowError where nothing of it can be used.
    """
    decoded = decode(path, folder)
    report(0.05)
    with Journal(cache / f"{decoded.sha256[:32]}.jsonl") as journal:
        return _Recording(path, name, decoded, recipe, models, journal, report).collect(language, speakers, beside)


def complete(path: Path, part: Part, recipe: CollectRecipe, models: Models, cache: Path, folder: Path) -> Part:
    """A part with the measures, prints and words of the utterances that have none: a person cut or joined them."""
    decoded = decode(path, folder)
    with Journal(cache / f"{part.sha256[:32]}.jsonl") as journal:
        return _Recording(path, part.path, decoded, recipe, models, journal, lambda _: None).complete(part)


class _Recording:
    def __init__(
        self,
        path: Path,
        name: str,
        decoded: Decoded,
        recipe: CollectRecipe,
        models: Models,
        journal: Journal,
        report: Report,
    ) -> None:
        self._path, self._name, self._decoded = path, name, decoded
        self._recipe, self._models, self._journal, self._report = recipe, models, journal, report

    def collect(self, language: str | None, speakers: int | None, beside: TextBeside) -> Part:
        decoded, recipe = self._decoded, self._recipe
        probabilities = self._probabilities()
        self._report(0.15)
        levels = levels_of(decoded.speech)
        found = find_regions(probabilities, recipe.speech_threshold, recipe.min_pause, recipe.min_speech)
        regions = refine(found, levels)
        cues, text, notes = _text_of(beside)
        if offset := find_offset(cues, regions):
            cues = [replace(cue, start=cue.start - offset, end=cue.end - offset) for cue in cues]
            notes.append(f"the times of its text are {late(offset)} throughout, and are moved")
        placed = place_cues(join_words(cues, regions), regions) if cues else _nothing_placed(regions)
        labels, voices = self._speakers(regions, placed, speakers)
        self._report(0.35)
        cuts = pack(regions, labels, placed.joined, levels, decoded.seconds, recipe.shortest, recipe.longest)
        self._report(0.4)
        language = language or self._language(cuts)
        cuts, recognised = self._verified(cuts, self._transcribe(cuts, language), levels, language)
        given, unspoken = _given_texts(cuts, regions, placed)
        if text is not None and self._models.asr is not None:
            given, unspoken = align_text(text, [words or "" for words, _ in recognised])
        names = dict(zip((region.start for region in regions), placed.speakers, strict=True))
        utterances = [
            Utterance(
                start=cut.start,
                end=cut.end,
                speech=[[round(region.start, 3), round(region.end, 3)] for region in cut.speech],
                speaker=cut.speaker,
                name=names[cut.speech[0].start],
                given=own or None,
                recognised=words,
                logprob=logprob,
                **self._sound(cut),
            )
            for cut, own, (words, logprob) in zip(cuts, given, recognised, strict=True)
        ]
        self._report(1.0)
        return Part(
            path=self._name,
            sha256=decoded.sha256,
            seconds=round(decoded.seconds, 3),
            rate=decoded.full.rate,
            channels=decoded.channels,
            damage=decoded.damage,
            lossless=self._lossless,
            text=beside.path.name if beside.path is not None and (cues or text) else None,
            language=language,
            voices=[[round(float(x), 5) for x in voice] for voice in voices],
            models=self._models.names,
            hum=self._hum(),
            utterances=utterances,
            unspoken=unspoken,
            offset=offset,
            notes=[*notes, *_notes(decoded, regions, text, unspoken, self._models.asr is not None)],
        )

    def complete(self, part: Part) -> Part:
        new = [index for index, one in enumerate(part.utterances) if not one.print]
        cuts = [
            Cut(one.start, one.end, tuple(Region(*span) for span in one.speech), one.speaker)
            for one in (part.utterances[index] for index in new)
        ]
        utterances = list(part.utterances)
        for index, cut, (words, logprob) in zip(new, cuts, self._transcribe(cuts, part.language), strict=True):
            found = {"recognised": words, "logprob": logprob, **self._sound(cut)}
            utterances[index] = replace(utterances[index], **found)
        return replace(part, utterances=utterances)

    def _probabilities(self) -> np.ndarray:
        detector = self._models.detector
        text = self._journal.get(
            lambda: packed((detector.probabilities(self._decoded.speech) * 255).round().astype(np.uint8)),
            "speech",
            detector.name,
        )
        return unpacked(text, np.uint8).astype(np.float32) / 255

    def _speakers(
        self, regions: Sequence[Region], placed: Placed, speakers: int | None
    ) -> tuple[list[int | None], np.ndarray]:
        """The speaker of each region: by the model, else as the text beside the recording names them, else one."""
        named = list(dict.fromkeys(name for name in placed.speakers if name is not None))
        embedder = self._models.embedder
        if embedder is None:
            if len(named) > 1:
                return [named.index(name) if name in named else len(named) for name in placed.speakers], np.empty(
                    (0, 0)
                )
            return [0] * len(regions), np.empty((0, 0))

        def embed(start: float, end: float) -> np.ndarray:
            start, end = round(start, 3), round(end, 3)
            text = self._journal.get(
                lambda: packed(embedder.embed(self._decoded.speech.read(start, end)).astype(np.float32)),
                "voice",
                *(embedder.name, start, end),
            )
            return unpacked(text, np.float32)

        return assign(regions, embed, self._recipe.speaker_distance, speakers)

    def _language(self, cuts: Sequence[Cut]) -> str | None:
        asr = self._models.asr
        if asr is None or not cuts:
            return None
        longest = sorted(cuts, key=lambda cut: -cut.seconds)[:5]
        spans = [(cut.start, cut.end) for cut in longest]
        return self._journal.get(
            lambda: asr.detect_language([self._decoded.speech.read(*span) for span in spans]),
            "language",
            *(asr.name, spans),
        )

    def _transcribe(self, cuts: Sequence[Cut], language: str | None) -> list[Recognised]:
        """Of each utterance, the recognised words and their mean log-probability."""
        asr = self._models.asr
        if asr is None:
            return [(None, None)] * len(cuts)
        keys = [("words", asr.name, language, cut.start, cut.end) for cut in cuts]
        found = [self._journal.find(*key) for key in keys]
        missing = [index for index, one in enumerate(found) if one is None]
        done = len(cuts) - len(missing)
        for stretch in _stretches(cuts, missing):
            sounds = [self._decoded.speech.read(cuts[index].start, cuts[index].end) for index in stretch]
            for index, one in zip(stretch, asr.transcribe_clips(sounds, language), strict=True):
                found[index] = self._journal.keep([one.text, one.logprob], *keys[index])
            done += len(stretch)
            if len(cuts) > 1:  # not two that are recognised again
                self._report(0.4 + 0.55 * done / len(cuts))
        return [(one[0], one[1]) for one in found if one is not None]

    def _verified(
        self, cuts: Sequence[Cut], recognised: Sequence[Recognised], levels: np.ndarray, language: str | None
    ) -> tuple[list[Cut], list[Recognised]]:
        """Join neighbours between which a word was cut: where the cut is loud, both are recognised at once, too."""
        kept: list[Cut] = []
        words: list[Recognised] = []
        for cut, own in zip(cuts, recognised, strict=True):
            before = kept[-1] if kept else None
            joint = None
            if before is not None and before.speaker == cut.speaker is not None and is_suspicious(before, cut, levels):
                joint = Cut(before.start, cut.end, (*before.speech, *cut.speech), cut.speaker)
            if joint is None or joint.seconds > _STRETCH or self._models.asr is None:
                kept.append(cut)
                words.append(own)
                continue
            [both] = self._transcribe([joint], language)
            if keeps_border(words[-1][0] or "", own[0] or "", both[0] or ""):
                kept.append(cut)
                words.append(own)
            else:
                kept[-1], words[-1] = joint, both
        return kept, words

    def _sound(self, cut: Cut) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            before, full = max(cut.start - _CONTEXT, 0.0), self._decoded.full
            samples = full.read(before, cut.end + _CONTEXT)
            speech = [(region.start - before, region.end - before) for region in cut.speech]
            return {
                "measures": asdict(measure(samples, full.rate, speech, lossless=self._lossless)),
                "print": packed(np.frombuffer(print_of(self._decoded.speech.read(cut.start, cut.end)), np.uint8)),
            }

        found = self._journal.get(make, "sound", *(cut.start, cut.end, [[r.start, r.end] for r in cut.speech]))
        return {"measures": UtteranceMeasures(**found["measures"]), "print": found["print"]}

    def _hum(self) -> float | None:
        def make() -> list[float]:
            meter = HumMeter(self._decoded.full.rate)
            for block in self._decoded.full.blocks(1 << 20):
                meter.add(block)
            found = meter.hum()
            return [] if found is None else [found.prominence]

        return next(iter(self._journal.get(make, "hum")), None)

    @property
    def _lossless(self) -> bool:
        return self._path.suffix.lower() in LOSSLESS


def _text_of(beside: TextBeside) -> tuple[Sequence[Cue], str | None, list[str]]:
    """The cues of a file with times, or a plain text; and what of it is not used, as a file that is broken."""
    notes = [f"not used: {other}" for other in beside.passed_over]
    if beside.path is None:
        return [], None, notes
    try:
        if not beside.has_times:
            return [], read_transcript(beside.path), notes
        cues = read_cues(beside.path)
    except RowError as error:
        return [], None, [*notes, f"{beside.path.name} is not used: {error}"]
    return cues.cues, None, [*notes, f"{beside.path.name} is read as {cues.read_as}", *cues.notes()]


def late(offset: float) -> str:
    """An offset in words."""
    return f"{abs(offset):.2f} s {'late' if offset > 0 else 'early'}"


def _notes(
    decoded: Decoded, regions: Sequence[Region], text: str | None, unspoken: Sequence[str], has_asr: bool
) -> Iterator[str]:
    if not regions:
        yield "no speech is found in it"
    if decoded.broken:
        yield f"samples that are not finite, and silence here: {decoded.broken}"
    if decoded.damage is not None:
        yield f"only its first {decoded.seconds:.0f} s are used: {decoded.damage}"
    if text is not None and not has_asr:
        yield "its text has no times, and there is no ASR to place it with: give --asr"
    for words in unspoken:
        yield f"not spoken: {words if len(words) <= _SHOWN else words[:_SHOWN] + ' ...'}"


def _nothing_placed(regions: Sequence[Region]) -> Placed:
    empty: list[str | None] = [None] * len(regions)
    return Placed([False] * len(regions), empty, empty, [])


def _given_texts(cuts: Sequence[Cut], regions: Sequence[Region], placed: Placed) -> tuple[list[str], list[str]]:
    texts = dict(zip((region.start for region in regions), placed.texts, strict=True))
    return [" ".join(filter(None, (texts[region.start] for region in cut.speech))) for cut in cuts], placed.unspoken


def _stretches(cuts: Sequence[Cut], indices: Sequence[int]) -> list[list[int]]:
    """Utterances that are recognised at once, in order: as many as fit into one window."""
    stretches: list[list[int]] = []
    seconds = 0.0
    for index in indices:
        seconds += cuts[index].seconds + _GAP
        if not stretches or seconds > _STRETCH:
            stretches.append([])
            seconds = cuts[index].seconds + _GAP
        stretches[-1].append(index)
    return stretches


def part_key(
    path: Path,
    name: str,
    beside: Path | None,
    recipe: CollectRecipe,
    *more: Any,
) -> str:
    """What a part depends on, without decoding anything: the files by size and time, settings, and `more`."""

    def state(file: Path | None) -> list[Any] | None:
        return None if file is None else [file.name, file.stat().st_size, file.stat().st_mtime_ns]

    return key_of(_VERSION, name, state(path), state(beside), recipe.cutting, *more)
