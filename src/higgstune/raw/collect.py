"""`collect`: from raw recordings to a data set of utterances.

scan -> each recording (see `utterances`) -> choose among all utterances -> clips and lists
"""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import soundfile

from higgstune.data.importers.subtitles import TextBeside, text_beside, text_in
from higgstune.data.rejection import RowError
from higgstune.data.source import path_within
from higgstune.errors import ConfigError, DataError, WorkError
from higgstune.files import alone_in, check_folder, write_file
from higgstune.progress import Progress, silent
from higgstune.raw.advice import advise
from higgstune.raw.card import COST, write_card
from higgstune.raw.choose import Chosen, choose, find_baseline
from higgstune.raw.dataset import write_clips, write_lists
from higgstune.raw.edits import Decision, DecisionLog, recut
from higgstune.raw.engines import Engine, Job, finish, remove_work, work_folder
from higgstune.raw.names import CACHE, CLIPS, EDITS, SUMMARY
from higgstune.raw.recipe import CollectRecipe, load_collect_recipe
from higgstune.raw.recording import find_recordings
from higgstune.raw.review_table import apply_table
from higgstune.raw.speech import SpeechDetector
from higgstune.raw.utterances import Models, Part, collect_recording, complete, part_key

_MANY = 3
PART = ".part.json"  # all that is known of a recording
_LIBRARIES = ("silero-vad", "faster-whisper", "kaldi-native-fbank")
_STAGE = "collecting, seconds"  # of the recordings
_BYTES_A_SECOND = 16_000  # of a recording whose header lacks its length


@dataclass(frozen=True)
class CollectSummary:
    """What a data set holds, and what was left out."""

    out: str
    recordings: int
    hours: float  # of the recordings
    utterances: int  # kept
    kept_hours: float
    refused: dict[str, int]  # utterances by reason
    refused_hours: float
    flagged: dict[str, int]
    speakers: dict[str, float]  # hours
    languages: dict[str, float]
    splits: dict[str, int]
    unreadable: dict[str, str]  # recordings that cannot be used, with reasons
    moved_texts: int = 0  # recordings whose text was late or early by a constant time
    notes: list[str] = field(default_factory=list)
    models: dict[str, str | None] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)  # in words, each with what it is based on


def collect(
    raw: str | Path,
    out: str | Path,
    *,
    recipe: CollectRecipe | str | Path | None = None,
    language: str | None = None,
    speakers: int | None = None,
    transcripts: str | Path | None = None,
    asr: Any = None,
    speaker_model: Any = None,
    apply: str | Path | None = None,
    copy: bool = True,
    shard: tuple[int, int] | None = None,
    engine: Engine = "local",
    workers: int | None = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> CollectSummary:
    """Cut the recordings in `raw`, a folder or one file, into utterances with their texts: a data set in `out`.

        collect("interviews/", "data/anna", asr="large-v3").kept_hours

    `asr` is a Whisper (as for `load_judges`) or a `ClipTranscriber`, `speaker_model` a model of voices or an
    `Embedder`; without one, one speaker is assumed. A text beside a recording (subtitles, labels, TextGrid, plain text)
    is found by itself, or is the file `transcripts`, or lies in that folder. `language` is the ISO 639-1 code of what
    is spoken, recognised where it is not given. `speakers` says how many speak in each recording. `apply` is a changed
    `review.csv`: what it changes joins the decisions made in `review`, which every call applies. Without `copy` the
    manifest names stretches of the originals. `shard` (i, n) does the i-th of n parts of the recordings and chooses
    nothing. `workers` processes share the recordings, None: as many as pay here; more than one need models by name, and
    in a script `if __name__ == "__main__":`. The engine "ray" has them on all nodes of a cluster, which share `out`.

    What was computed is kept in `out`: the same call resumes, and a changed threshold only chooses anew. Raises
    DataError for recordings that cannot be used, ConfigError for an option, CheckpointError for a model, WorkError
    where the disk refuses.
    """
    raw, out, progress = Path(raw).expanduser(), Path(out).expanduser(), progress or silent
    if not isinstance(recipe, CollectRecipe):
        recipe = load_collect_recipe(None if recipe is None else Path(recipe))
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: at least one works")
    if not raw.exists():
        raise DataError(f"{raw} does not exist: name a recording, or a folder of recordings")
    check_folder(out)
    if out.resolve() == raw.resolve() or raw.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the recordings: give the data set its own folder")
    if speakers is not None and speakers < 1:
        raise ConfigError(f"--speakers {speakers}: at least one speaks")
    if speakers is not None and speaker_model is None:
        raise ConfigError(f"--speakers {speakers} needs a --speaker-model")
    recordings, left = find_recordings(raw)
    recordings = [path for path in recordings if not path.resolve().is_relative_to(out.resolve())]
    if transcripts is not None:
        _check_texts(Path(transcripts).expanduser(), len(recordings))
    if not recordings:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in left[:_MANY])
        raise DataError(f"{raw} holds no recording{f' ({reasons})' if reasons else ''}: wav, flac, mp3, ogg or opus")
    what = "collection" if shard is None else "part {} of {}".format(*shard)  # parts are done at the same time
    with alone_in(out, what, "nothing was collected"):
        cache = out / CACHE
        cache.mkdir(exist_ok=True)
        remove_work(cache)
        mine = recordings if shard is None else recordings[shard[0] - 1 :: shard[1]]
        worker = _Worker(
            raw,
            recipe,
            _Wanted(_anywhere(asr), _anywhere(speaker_model), device),
            cache,
            language,
            speakers,
            transcripts,
        )
        if apply is not None:
            apply_table(out, Path(apply))
        parts, unreadable = worker.run(mine, progress, engine, workers)
        unreadable |= {_name(path, raw): why for path, why in left}
        baseline = find_baseline(parts, recipe, copied=copy)
        parts, edits, unused = recut(parts, DecisionLog(out).active)
        parts = [worker.completed(part) for part in parts]
        chosen = choose(parts, recipe, edits, baseline)
        if shard is None:
            kept = [one for one in chosen if one.refused is None]
            if copy or (out / CLIPS).is_dir():
                write_clips(
                    kept if copy else [], raw, out, recipe, lambda done, total: progress("writing clips", done, total)
                )
            write_lists(chosen, out, raw, copied=copy, origin=recipe.origin)
        summary = _summary(out, parts, chosen, unreadable, unused)
        if shard is None:
            summary = replace(summary, advice=advise(chosen, parts, recipe))
            content = asdict(summary) | {
                "raw": os.path.relpath(raw, out),
                "recipe": recipe.model_dump(),
                "higgstune": version("higgstune"),
            }
            write_file(out / SUMMARY, json.dumps(content, indent=2, ensure_ascii=False))
            write_card(out, chosen, parts, content)
        return summary


@dataclass(frozen=True)
class _Wanted:
    """The models, by name or as they are: what another process needs to have them, too."""

    asr: Any
    speaker_model: Any
    device: str

    @property
    def state(self) -> list[Any]:
        """What parts depend on, without loading anything: names, and the files behind them by size and time."""
        return [f"{name} {version(name)}" for name in _LIBRARIES if find_spec(name.replace("-", "_"))] + [
            getattr(model, "name", None) or _state(model) for model in (self.asr, self.speaker_model)
        ]

    def load(self) -> Models:
        from higgstune.evaluation.judges import load_clip_transcriber, load_embedder

        asr, speaker_model = self.asr, self.speaker_model
        if isinstance(asr, str | Path):
            asr = load_clip_transcriber(str(asr), self.device)
        if isinstance(speaker_model, str | Path):
            speaker_model = load_embedder(str(speaker_model), self.device)
        return Models(SpeechDetector(), speaker_model, asr)


class _Worker:
    """Collects recordings, here or in other processes; what is kept of an earlier run is not done again.

    A process loads its own models when it first needs them.
    """

    def __init__(
        self,
        raw: Path,
        recipe: CollectRecipe,
        wanted: _Wanted,
        cache: Path,
        language: str | None,
        speakers: int | None,
        transcripts: str | Path | None,
    ) -> None:
        self._raw, self._recipe, self._cache = raw.absolute(), recipe, cache.absolute()  # others may work elsewhere
        self._language, self._speakers = language, speakers
        self._transcripts = None if transcripts is None else Path(transcripts).expanduser().absolute()
        self._wanted, self.device = wanted, wanted.device
        self._state = wanted.state
        self._models: Models | None = None

    def unload(self) -> None:
        """Let go of the models, which are loaded again when they are needed."""
        self._models = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_models": None}

    def _loaded(self) -> Models:
        if self._models is None:
            self._models = self._wanted.load()
            if self._models.asr is not None and self._language is not None:
                self._models.asr.transcribe_clips([], self._language)  # raises where it does not support the language
        return self._models

    def run(
        self, recordings: list[Path], progress: Progress, engine: Engine, workers: int | None
    ) -> tuple[list[Part], dict[str, str]]:
        """The parts in order, and why recordings have none."""
        recordings = [path.absolute() for path in recordings]
        kept: dict[Path, Path] = {}
        unreadable: dict[Path, str] = {}
        for path in recordings:
            try:
                kept[path] = self._kept(path)
            except RowError as error:
                unreadable[path] = str(error)
        jobs = [Job(path, _seconds(path)) for path, part in kept.items() if not part.is_file()]
        before = sum(_seconds(path) for path, part in kept.items() if part.is_file())
        total = before + sum(job.seconds for job in jobs)

        def report(seconds: float) -> None:
            progress(_STAGE, round(before + seconds), round(total))

        try:
            unreadable |= finish(self, jobs, engine, workers, report)
        finally:
            remove_work(self._cache)
        parts = [self._read(path, part) for path, part in kept.items() if path not in unreadable]
        if len(found := {json.dumps(part.models) for part in parts}) > 1:
            raise WorkError(f"workers have other models than others, {' and '.join(sorted(found))}: install the same")
        return parts, {_name(path, self._raw): unreadable[path] for path in recordings if path in unreadable}

    def do(self, path: Path, report: Callable[[float], None]) -> str | None:
        """Write the part of a recording, and report the share that is done. -> why there is none, if so."""
        try:
            beside = self._beside(path)
            kept = self._kept(path)
            with work_folder(kept) as folder:
                if kept.is_file():  # by a process that was taken for dead
                    return None
                started = time.process_time()
                part = collect_recording(
                    path,
                    _name(path, self._raw),
                    self._recipe,
                    self._loaded(),
                    self._cache,
                    folder,
                    language=self._language,
                    speakers=self._speakers,
                    beside=beside,
                    report=report,
                )
                write_file(kept, json.dumps(asdict(part), ensure_ascii=False))
                cost = kept.with_name(kept.name.removesuffix(PART) + COST)
                write_file(cost, json.dumps(round(time.process_time() - started, 1)))
        except RowError as error:
            return str(error)
        return None

    def completed(self, part: Part) -> Part:
        """The part with the sound and words of utterances that a person cut or joined."""
        if all(one.print for one in part.utterances):
            return part
        path = self._raw if self._raw.is_file() else self._raw / part.path
        with work_folder(self._cache / f"{part.sha256[:32]}-cuts.json") as folder:
            return complete(path, part, self._recipe, self._loaded(), self._cache, folder)

    def _beside(self, path: Path) -> TextBeside:
        if self._transcripts is not None and not self._transcripts.is_dir():
            return text_in(self._transcripts)
        where = path if self._transcripts is None else self._transcripts / path.name  # as if it lay there
        beside = text_beside(where, language=self._language)
        if beside.path is not None:
            path_within(where.parent, beside.path.name, allow_outside=False)  # it may be a link
        return beside

    def _kept(self, path: Path) -> Path:
        """Where the part of a recording is, or will be. Raises RowError."""
        beside = self._beside(path).path
        name = _name(path, self._raw)
        key = part_key(path, name, beside, self._recipe, self._state, self._language, self._speakers)
        return self._cache / f"{key}{PART}"

    def _read(self, path: Path, part: Path) -> Part:
        try:
            return Part.from_json(json.loads(part.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise WorkError(
                f"the part of {path} is not in {self._cache}: every worker must see the same folders and have the same "
                "versions of Higgstune and its models, and no recording may change meanwhile; run it again"
            ) from error


def _check_texts(transcripts: Path, recordings: int) -> None:
    if not transcripts.exists():
        raise ConfigError(f"--transcripts {transcripts} does not exist: name a text, or a folder of texts")
    if recordings > 1 and not transcripts.is_dir():
        raise ConfigError(
            f"--transcripts {transcripts} is one text for {recordings} recordings: name a folder, in which each has "
            "one of its name"
        )


def _state(model: str | Path | None) -> Any:
    if model is None or not (path := Path(model)).exists():
        return None if model is None else str(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [path.name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _anywhere(model: Any) -> Any:
    """A model that is named by a relative path, as other processes find it."""
    if isinstance(model, str | Path) and Path(model).expanduser().exists():
        return str(Path(model).expanduser().absolute())
    return model


def _seconds(path: Path) -> float:
    """About how long a recording is, for the progress."""
    try:
        return float(soundfile.info(str(path)).duration)
    except (soundfile.SoundFileError, OSError, TypeError):
        return path.stat().st_size / _BYTES_A_SECOND


def _name(path: Path, raw: Path) -> str:
    return path.name if raw.is_file() else path.relative_to(raw).as_posix()


def _summary(
    out: Path,
    parts: list[Part],
    chosen: list[Chosen],
    unreadable: dict[str, str],
    unused: Sequence[Decision] = (),
) -> CollectSummary:
    kept = [one for one in chosen if one.refused is None]
    refused = [one for one in chosen if one.refused is not None]
    speakers: dict[str, float] = defaultdict(float)
    languages: dict[str, float] = defaultdict(float)
    for one in kept:
        speakers[one.speaker or "unknown"] += one.utterance.seconds
        languages[one.part.language or "unknown"] += one.utterance.seconds

    def hours(seconds: float) -> float:
        return round(seconds / 3600, 4)

    return CollectSummary(
        out=str(out),
        recordings=len(parts),
        hours=hours(sum(part.seconds for part in parts)),
        utterances=len(kept),
        kept_hours=hours(sum(one.utterance.seconds for one in kept)),
        refused=dict(Counter(one.refused.what for one in refused if one.refused).most_common()),
        refused_hours=hours(sum(one.utterance.seconds for one in refused)),
        flagged=dict(Counter(flag for one in kept for flag in dict.fromkeys(one.flags)).most_common()),
        speakers={name: hours(seconds) for name, seconds in _longest_first(speakers)},
        languages={name: hours(seconds) for name, seconds in _longest_first(languages)},
        splits=dict(Counter(one.split for one in kept)),
        unreadable=unreadable,
        moved_texts=sum(part.offset != 0 for part in parts),
        notes=[f"{part.path}: {note}" for part in parts for note in part.notes]
        + [f"line {one.number} of {EDITS} fits no utterance any more" for one in unused],
        models=parts[0].models if parts else dict.fromkeys(("vad", "speakers", "asr")),
    )


def _longest_first(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])
