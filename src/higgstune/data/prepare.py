"""`prepare`: from recordings to a code store."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar, get_args

from higgstune.codec.base import Codec
from higgstune.data.clips import Candidate, Checker, Limits
from higgstune.data.encode import CodeJournal, Encoder, journal_path
from higgstune.data.entry import Entry, fallback_ids, new_entry, source_key, stored_entries
from higgstune.data.importers import read_source
from higgstune.data.merge import Merger, Pairing, resolve_references
from higgstune.data.messages import whisper_clips
from higgstune.data.rejection import Rejection, RowError, count_reasons
from higgstune.data.shard_reader import PARTIAL_NAME, REJECTED_NAME, SPLITS, StoreInfo
from higgstune.data.shard_writer import write_store
from higgstune.data.source import SourceRow, rejections_of
from higgstune.data.splits import RecordingGroups
from higgstune.data.store import CodeStore
from higgstune.data.text import TEXT_NORMALIZATION
from higgstune.data.whisper_features import WhisperEncoder, store_features
from higgstune.errors import ConfigError, DataError
from higgstune.files import alone_in, write_file
from higgstune.inputs import INDEX_NAME

Progress = Callable[[str, int, int], None]  # what is being done, rows done, rows in all
Item = TypeVar("Item")
Result = TypeVar("Result")
Refused = dict[int, RowError]  # by the row's number
References = Literal["none", "same_speaker"]


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation did; `dataclasses.asdict` gives JSON."""

    out: str
    accepted: dict[str, int]  # rows of this source, by split
    rows: dict[str, int]  # rows of the whole store, by split
    hours: dict[str, float]  # of the whole store, by split
    refused: dict[str, int]  # by reason; the rows are in rejected.jsonl
    added: int
    updated: int
    encoded: int  # clips that the codec was asked for
    reused: int  # clips that had codes already
    references: Pairing
    whisper: int | None = None  # clips with Whisper features, where they were asked for
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PrepareOptions:
    """What a store is put together by; recorded in it."""

    validation_fraction: float
    references: str
    max_seconds: float
    allow_long: bool
    seed: int
    model: str | None = None  # the checkpoint that it is prepared for
    whisper: str | None = None  # the Whisper checkpoint whose features are stored
    allow_outside: bool = False  # whether paths may leave the folder of the source

    def check(self) -> None:
        """Raise ConfigError for an option that cannot be."""
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}: it must be from 0 to below 1")
        if self.references not in get_args(References):
            raise ConfigError(f"references is {self.references!r}: one of {', '.join(get_args(References))}")
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds is {self.max_seconds}: it must be above 0")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    codec: Codec | str | Path | None = None,
    codec_name: str | None = None,
    model: str | Path | None = None,
    whisper: WhisperEncoder | str | Path | None = None,
    device: str = "cpu",
    validation_fraction: float = 0.05,
    references: References = "none",
    max_seconds: float = 30.0,
    allow_long: bool = False,
    allow_outside: bool = False,
    seed: int = 0,
    speaker: str | None = None,
    language: str | None = None,
    scene: str | None = None,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Make the recordings of `source` rows of the code store in `out`; what the store has already stays.

    `source` is anything that `read_source` understands. `codec` is one, or what `load_codec` loads on
    `device`; without it, it is that of `model`, the checkpoint that will be trained. `codec_name` is what the
    store calls it. `speaker`, `language` and `scene` are set for every row (a conversation says its own
    scene). `references="same_speaker"` gives each row another clip of its speaker to hear, drawn by `seed`;
    splits follow the recordings' hashes. `whisper` is a Whisper checkpoint (or encoder) whose features of every
    reference, and of audio in user and system turns, are stored for a recipe's `model.whisper`. `max_seconds` bounds a
    clip unless `allow_long`. A row of which a path leaves the source's folder (`..`, a link, an absolute path) is
    refused unless `allow_outside`: a source from a stranger could name any file here. `progress` is called with what is
    being done, the rows done and the rows in all.

    A row that cannot be used is refused into `rejected.jsonl` and counted. A run that is interrupted keeps
    the codes it has and goes on from there when it is started again; until then the old store stays.

    Raises DataError for a source or store that cannot be used, or when no row is left; ConfigError for an
    option; CheckpointError for a codec; WorkError where the disk refuses.
    """
    for_model = None if model is None else str(model)
    whisper = str(whisper) if isinstance(whisper, Path) else whisper
    heard_by = whisper if whisper is None or isinstance(whisper, str) else whisper.checkpoint
    options = PrepareOptions(
        validation_fraction, references, max_seconds, allow_long, seed, for_model, heard_by, allow_outside
    )
    options.check()
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise ConfigError(f"{out} is the source, too: give the code store a folder of its own")
    rows = [_with_labels(row, speaker, language, scene) for row in read_source(source, allow_outside=allow_outside)]
    name, codec = _loaded(codec, model, device)
    listener = _listener(whisper, device)
    with alone_in(out, "preparation", "nothing was encoded"):
        return Preparation(out, codec, codec_name or name, options, progress or _silent, listener).run(rows)


def _with_labels(row: SourceRow, speaker: str | None, language: str | None, scene: str | None) -> SourceRow:
    """The row with what was said for all rows."""
    if isinstance(row.content, RowError):
        return row
    labels = {"speaker": speaker, "language": language}
    if row.content.messages is None:
        labels["scene"] = scene
    said = {name: value for name, value in labels.items() if value is not None}
    return replace(row, content=row.content.model_copy(update=said))


def _loaded(codec: Codec | str | Path | None, model: str | Path | None, device: str) -> tuple[str, Codec]:
    """A codec and its name."""
    if codec is not None and not isinstance(codec, str | Path):
        return type(codec).__name__, codec
    # These bring torch, which is not for those who hand a codec in.
    from higgstune.codec import checkpoint_codec, load_codec

    name = checkpoint_codec(model, codec)
    return name, load_codec(name, device=device)


def _listener(whisper: WhisperEncoder | str | None, device: str) -> WhisperEncoder | None:
    if not isinstance(whisper, str):
        return whisper
    from higgstune.codec.whisper_encoder import load_whisper  # brings torch

    return load_whisper(whisper, device=device)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress to show."""


class Preparation:
    """One preparation, with everything it notes on the way."""

    def __init__(
        self,
        out: Path,
        codec: Codec,
        codec_name: str,
        options: PrepareOptions,
        progress: Progress,
        listener: WhisperEncoder | None = None,
    ) -> None:
        """Raises DataError where `out` holds a store that another codec or another Higgstune made."""
        self._out = out
        self._codec = codec
        self._codec_name = codec_name
        self._options = options
        self._progress = progress
        self._listener = listener
        self._store = _existing_store(out, codec)
        self._stored = [] if self._store is None else stored_entries(self._store)

    def run(self, rows: list[SourceRow]) -> PrepareSummary:
        """Take the rows of a source into the store. Raises as `prepare`."""
        options = self._options
        checker = Checker(Limits(self._codec.frame_rate, options.max_seconds, options.allow_long))
        candidates, refused = self._each("reading", dict(enumerate(rows)), checker.check)
        with CodeJournal(journal_path(self._out, self._codec), self._codec.num_codebooks) as journal:
            encoder = Encoder(self._codec, journal, self._store)
            merger, later = self._merge_and_encode(rows, candidates, encoder)
            rejections = rejections_of(rows, refused | later)
            text = "".join(rejection.to_json() + "\n" for rejection in rejections)
            write_file(self._out / REJECTED_NAME, text)
            if not merger.entries:
                raise DataError(_nothing_usable(rejections, self._out / REJECTED_NAME))
            pairing = self._write(merger.entries, encoder)
        shutil.rmtree(self._out / PARTIAL_NAME, ignore_errors=True)
        summary = self._summary(merger, encoder, pairing, rejections)
        return summary if self._listener is None else self._listen(self._listener, summary, candidates.values())

    def _listen(
        self, listener: WhisperEncoder, summary: PrepareSummary, candidates: Iterable[Candidate]
    ) -> PrepareSummary:
        """Store what Whisper hears in every reference and in what conversations listen to."""
        clips = {clip.sha256: clip for candidate in candidates for clip in candidate.clips}
        needed = {sha256 for row in CodeStore.open(self._out).contexts() for sha256 in whisper_clips(row, "scene")}
        encoded, missing = store_features(
            self._out, needed, clips, listener, lambda done: self._progress("listening", done, len(needed))
        )
        warnings = list(summary.warnings)
        if not needed:
            warnings.append("no row has a reference, or audio in a user or system turn: there is nothing to hear")
        if missing:
            warnings.append(
                "clips of earlier runs without Whisper features, because their recordings are not in this source: "
                f"{len(missing)} (prepare their source again with --whisper)"
            )
        return replace(summary, whisper=encoded, warnings=warnings)

    def _each(
        self, stage: str, items: dict[int, Item], work: Callable[[Item], Result]
    ) -> tuple[dict[int, Result], Refused]:
        """Do a step for every row, by number -> (its results, the rows that it refuses)."""
        results: dict[int, Result] = {}
        refused: Refused = {}
        for done, (index, item) in enumerate(items.items()):
            self._progress(stage, done, len(items))
            try:
                results[index] = work(item)
            except RowError as error:
                refused[index] = error
        self._progress(stage, len(items), len(items))
        return results, refused

    def _merge_and_encode(
        self, rows: list[SourceRow], candidates: dict[int, Candidate], encoder: Encoder
    ) -> tuple[Merger, Refused]:
        """Merge first, so that nothing is encoded for rows that the store refuses; what cannot be encoded is
        left out of another merge.
        """
        not_encoded: Refused = {}
        while True:
            left = {index: item for index, item in candidates.items() if index not in not_encoded}
            merger, refused = self._merge(rows, left)
            accepted = {index: item for index, item in left.items() if index not in refused}
            _, failed = self._each("encoding", accepted, encoder.encode)
            if not failed:
                return merger, refused | not_encoded
            not_encoded |= failed

    def _merge(self, rows: list[SourceRow], candidates: dict[int, Candidate]) -> tuple[Merger, Refused]:
        texts = {entry.audio_sha256: entry.text for entry in self._stored}
        texts |= {candidate.target.sha256: candidate.text for candidate in candidates.values()}
        entries: dict[int, Entry] = {}
        refused: Refused = {}
        seen: Counter[str] = Counter()
        for index, candidate in candidates.items():
            try:
                entries[index] = new_entry(
                    _with_reference_text(candidate, texts), source_key(rows[index], candidate.utterance, seen)
                )
            except RowError as error:
                refused[index] = error
        heard = [clip.recording for candidate in candidates.values() for clip in candidate.clips[1:]]
        groups = RecordingGroups(self._stored, list(entries.values()), heard)
        merger = Merger(self._stored, groups)
        # Rows that have not changed first: another row must not be taken for them by its place.
        for index in sorted(entries, key=lambda index: not merger.has_content(entries[index])):
            candidate = candidates[index]
            try:
                merger.add(entries[index], fallback_ids(candidate.utterance, candidate.location))
            except RowError as error:
                refused[index] = error
        groups.decide(merger.entries, self._options.validation_fraction)
        return merger, refused

    def _write(self, entries: list[Entry], encoder: Encoder) -> Pairing:
        pairing = resolve_references(entries, self._options.references, self._options.seed)
        frames = {}
        for entry in entries:
            entry.frames = frames[entry.id] = encoder.frames(entry.audio_sha256)
        for entry in entries:
            entry.context_frames = sum(encoder.frames(sha256) for sha256 in entry.context_sha256)
            if entry.reference_sha256 is not None:
                entry.context_frames += encoder.frames(entry.reference_sha256)
            elif entry.reference_id is not None:
                entry.context_frames += frames[entry.reference_id]
        self._progress("writing", 0, 1)
        write_store(self._out, entries, encoder.codes, self._info(entries))
        self._progress("writing", 1, 1)
        return pairing

    def _info(self, entries: list[Entry]) -> StoreInfo:
        codec = self._codec
        earlier = {} if self._store is None else self._store.info.settings
        return StoreInfo(
            codec=self._codec_name,
            codec_revision=codec.revision,
            sample_rate=codec.sample_rate,
            frame_rate=codec.frame_rate,
            num_codebooks=codec.num_codebooks,
            codebook_size=codec.codebook_size,
            text_normalization=TEXT_NORMALIZATION,
            higgstune_version=version("higgstune"),
            rows=rows_by_split(entries),
            hours=hours_by_split(entries),
            settings=earlier | {name: value for name, value in asdict(self._options).items() if value is not None},
        )

    def _summary(
        self, merger: Merger, encoder: Encoder, pairing: Pairing, rejections: list[Rejection]
    ) -> PrepareSummary:
        return PrepareSummary(
            out=str(self._out),
            accepted=rows_by_split(merger.accepted),
            rows=rows_by_split(merger.entries),
            hours=hours_by_split(merger.entries),
            refused=count_reasons(rejections),
            added=merger.added,
            updated=merger.updated,
            encoded=encoder.encoded,
            reused=encoder.reused,
            references=pairing,
            warnings=find_warnings(merger.entries, pairing, self._options),
        )


def _existing_store(out: Path, codec: Codec) -> CodeStore | None:
    """The store that is to grow. Raises DataError where its codes and texts would not fit the new ones."""
    if not (out / INDEX_NAME).exists():
        return None
    try:
        store = CodeStore.open(out)
    except DataError as error:
        raise DataError(f"{error}; {out} cannot be added to: move it away, or name another folder") from error
    made = (store.info.codec_revision, store.info.num_codebooks, store.info.frame_rate)
    if made != (codec.revision, codec.num_codebooks, codec.frame_rate):
        raise DataError(
            f"{out} was made with the codec revision {store.info.codec_revision}, this one has "
            f"{codec.revision}: prepare into a new folder, or name the codec that made it"
        )
    if store.info.text_normalization != TEXT_NORMALIZATION:
        raise DataError(
            f"{out} has texts normalised by version {store.info.text_normalization}, this Higgstune has "
            f"version {TEXT_NORMALIZATION}: prepare all its recordings into a new folder"
        )
    return store


def _with_reference_text(candidate: Candidate, texts: dict[str, str]) -> Candidate:
    """Where a reference came without its words, those of the row with the same audio."""
    if candidate.reference is None or candidate.reference_text is not None:
        return candidate
    if (text := texts.get(candidate.reference.sha256)) is None:
        raise RowError("reference_without_text", "reference_audio needs reference_text: what is said in it")
    return replace(candidate, reference_text=text)


def _nothing_usable(rejections: list[Rejection], path: Path) -> str:
    first = rejections[0]
    return (
        f"no row can be used: {count_reasons(rejections)}; all are in {path}, first {first.location}: {first.message}"
    )


def rows_by_split(entries: Iterable[Entry]) -> dict[str, int]:
    """How many rows each split has."""
    counts = Counter(entry.split for entry in entries)
    return {split: counts[split] for split in SPLITS}


def hours_by_split(entries: list[Entry]) -> dict[str, float]:
    """Hours of speech in each split."""
    return {
        split: round(sum(entry.duration for entry in entries if entry.split == split) / 3600, 4) for split in SPLITS
    }


def find_warnings(entries: list[Entry], pairing: Pairing, options: PrepareOptions) -> list[str]:
    """What a person should know before training on these rows."""
    warnings = []
    if options.validation_fraction > 0 and not rows_by_split(entries)["validation"]:
        warnings.append("there is no validation row: the rows share a recording, or were stored before")
    if pairing.without_speaker:
        warnings.append(
            f"rows that name no speaker and stay without a reference: {pairing.without_speaker} (set speaker)"
        )
    if pairing.one_clip_speakers:
        warnings.append(f"speakers without a second clip to hear as a reference: {pairing.one_clip_speakers}")
    return warnings
