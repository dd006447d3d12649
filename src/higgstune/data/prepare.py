"""`prepare`: from recordings to a code store.

read rows -> check -> merge with stored rows, choose splits -> encode -> choose references -> write -> Whisper
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from higgstune.checkpoint_files import read_json
from higgstune.codec.base import Codec
from higgstune.data.clips import Candidate, Checker, Limits
from higgstune.data.decoders import check_rows
from higgstune.data.dropped import DroppedRows, StoredCodec, rows_not_in_source, warn_of_pairs, warn_of_stale
from higgstune.data.encode import CodeJournal, Encoder, journal_path
from higgstune.data.entry import Entry, SourceKeys, fallback_ids, new_entry, refused_key, stored_entries
from higgstune.data.importers import read_source
from higgstune.data.measures import parse_limits
from higgstune.data.merge import Merger, Pairing, resolve_references
from higgstune.data.messages import whisper_clips
from higgstune.data.outliers import Outlier, find_outliers, not_measured
from higgstune.data.readings import READINGS_NAME, Readings
from higgstune.data.rejection import Rejection, RowError, count_reasons
from higgstune.data.rules import TextRules, rules_of
from higgstune.data.shard_reader import PARTIAL_NAME, REJECTED_NAME, StoreInfo
from higgstune.data.shard_writer import write_store
from higgstune.data.source import Source, SourceRow, rejections_of
from higgstune.data.splits import RecordingGroups
from higgstune.data.store import CodeStore
from higgstune.data.summary import (
    PrepareOptions,
    PrepareSummary,
    References,
    example,
    find_warnings,
    hours_by_split,
    nothing_usable,
    rows_by_split,
)
from higgstune.data.whisper_features import WhisperEncoder, forget_features, store_features
from higgstune.environment import choose_device
from higgstune.errors import CheckpointError, ConfigError, DataError
from higgstune.files import alone_in, write_file, writing
from higgstune.inputs import INDEX_NAME, check_store, check_store_place
from higgstune.progress import Progress, silent

Item = TypeVar("Item")
Result = TypeVar("Result")
Refused = dict[int, RowError]  # by the row's number
_NO_SOURCE = Source((), "")
_USUAL = PrepareOptions(0.05, "none", 30.0, False, 0)  # the defaults of `prepare`


def prepare(
    source: str | Path | Source | None,
    out: str | Path,
    *,
    codec: Codec | str | Path | None = None,
    codec_name: str | None = None,
    model: str | Path | None = None,
    whisper: WhisperEncoder | str | Path | None = None,
    device: str | None = None,
    validation_fraction: float = 0.05,
    references: References = "none",
    max_seconds: float = 30.0,
    allow_long: bool = False,
    allow_outside: bool = False,
    columns: str | None = None,
    seed: int = 0,
    speaker: str | None = None,
    language: str | None = None,
    scene: str | None = None,
    limits: Sequence[str] = (),
    drop: Sequence[str] = (),
    restore: Sequence[str] = (),
    progress: Progress | None = None,
) -> PrepareSummary:
    """Add the recordings of `source` as rows to the code store in `out`; rows that the store already has stay.

        prepare("recordings/", "data/voice", speaker="anna").accepted      # {"train": 95, "validation": 5}

    `source` is any kind that `read_source` understands, or what it has read. `codec` is a codec, or the name of one
    that `load_codec` loads on `device` (None: CUDA where it is available); the default is the codec of `model`, the
    checkpoint that will be trained. `codec_name` is its name in the store. `speaker`, `language` and `scene` are set
    for every row (a conversation has its own scene). `references="same_speaker"` gives each row another clip of its
    speaker as a reference, drawn by `seed`; splits follow the recordings' hashes. `whisper` is a Whisper checkpoint (or
    encoder) whose features of every reference, and of audio in user, system and scene messages, are stored for a
    recipe's `model.whisper`. `max_seconds` bounds a clip unless `allow_long`. A row with a path that leaves the
    source's folder (`..`, a link, an absolute path) is refused unless `allow_outside`: a source from a stranger could
    name any file on this machine. `columns` says what the columns of a table or the keys of a manifest mean where they
    do not show it ("audio,speaker,text", "audio=path,text=words"). `progress` is called with the stage, the rows done
    and the rows in all.

    `limits` such as "leading_silence > 2" take the place of those of `outliers.LIMITS`, beyond which a row is listed.
    `drop` takes rows out of the store by their ids: they stay out, also when their source is prepared again, until
    `restore` names them. Either needs no source (None); everything else is then as it was prepared last.

    A row that cannot be used is recorded in `rejected.jsonl` and counted. An interrupted run keeps the codes it has,
    and the next run resumes from there; until then the old store stays.

    Raises DataError for a source or store that cannot be used, or when no row is left; ConfigError for an
    option; CheckpointError for a codec; WorkError where the disk refuses.
    """
    for_model = None if model is None else str(model)
    whisper = str(whisper) if isinstance(whisper, Path) else whisper
    whisper_name = whisper if whisper is None or isinstance(whisper, str) else whisper.checkpoint
    options = PrepareOptions(
        *(validation_fraction, references, max_seconds, allow_long, seed, for_model, whisper_name, allow_outside),
        columns=columns,
        limits=tuple(limits),
    )
    options.check()
    if source is None:
        others = {"codec": codec, "speaker": speaker, "language": language, "scene": scene}
        of_source = {**asdict(replace(options, limits=())), **others}
        usual = {**asdict(_USUAL), **dict.fromkeys(others)}
        if given := [name for name, value in of_source.items() if value != usual[name]]:
            raise ConfigError(f"{given[0]} has no effect without a source")
        return _change(Path(out), drop, restore, limits, progress or silent)
    out, read = Path(out), source
    if not isinstance(read, Source):
        check_store_place(read, out)
        read = read_source(read, allow_outside=allow_outside, columns=columns)
    if not list(read):
        raise DataError(f"the source has no row ({read.read_as})")
    read = replace(read, rows=[_with_labels(row, speaker, language, scene) for row in read])
    model_type = _model_type(model, at_hub=codec is None)
    name, codec = _load_codec(codec, model, device)
    whisper_encoder = _load_whisper(whisper, device)
    with alone_in(out, "preparation", "nothing was encoded"):
        return Preparation(
            out, codec, codec_name or name, model_type, options, progress or silent, whisper_encoder
        ).run(read, drop, restore)


def _change(
    out: Path, drop: Sequence[str], restore: Sequence[str], limits: Sequence[str], progress: Progress
) -> PrepareSummary:
    """Take rows out of a store, or let them come back, without a source. Raises as `prepare`."""
    if not drop and not restore:
        raise ConfigError("there is nothing to prepare: name a source, or rows of the store to drop or to restore")
    parse_limits(limits)
    check_store(out)
    with alone_in(out, "preparation", "nothing was dropped"):
        info = CodeStore.open(out).info
        options = _last_options(out, info)
        options = replace(options, limits=tuple(limits) or options.limits)
        return Preparation(out, StoredCodec(info), info.codec, None, options, progress).run(_NO_SOURCE, drop, restore)


def _last_options(out: Path, info: StoreInfo) -> PrepareOptions:
    """The options that a store was last prepared with. Raises DataError where they are damaged."""
    names = {field.name for field in fields(PrepareOptions)}
    settings = {name: value for name, value in info.settings.items() if name in names}
    try:
        return TypeAdapter(PrepareOptions).validate_json(json.dumps(settings))
    except ValidationError as error:
        raise DataError(f"{out / INDEX_NAME} has damaged settings ({error}): prepare its source again") from error


def _with_labels(row: SourceRow, speaker: str | None, language: str | None, scene: str | None) -> SourceRow:
    """The row with the labels that are set for all rows."""
    if isinstance(row.content, RowError):
        return row
    labels = {"speaker": speaker, "language": language}
    if row.content.messages is None:
        labels["scene"] = scene
    given = {name: value for name, value in labels.items() if value is not None}
    return replace(row, content=row.content.model_copy(update=given))


def _load_codec(codec: Codec | str | Path | None, model: str | Path | None, device: str | None) -> tuple[str, Codec]:
    """The codec and its name."""
    if codec is not None and not isinstance(codec, str | Path):
        return type(codec).__name__, codec
    # Imported here: a caller who passes a codec needs no torch.
    from higgstune.codec import checkpoint_codec, load_codec

    name = checkpoint_codec(model, codec)
    chosen = None if device in (None, "auto") else str(choose_device(device))  # else the codec, if it needs one
    return name, load_codec(name, device=chosen)


def _model_type(model: str | Path | None, *, at_hub: bool) -> str | None:
    """The family of a checkpoint, as its config.json names it; None where that is at the hub, but not `at_hub`."""
    if model is None:
        return None
    from higgstune.hub import fetch, local_folder

    folder = local_folder(model, what="checkpoint")
    if folder is None and not at_hub:
        return None
    config = (folder or fetch(model, what="checkpoint", weights=False)) / "config.json"
    found = read_json(config, "").get("model_type") if config.exists() else None
    if not isinstance(found, str | None):
        raise CheckpointError(f"{config} has the model_type {found!r}: it must be a string; copy the checkpoint again")
    return found


def _load_whisper(whisper: WhisperEncoder | str | None, device: str | None) -> WhisperEncoder | None:
    if not isinstance(whisper, str):
        return whisper
    from higgstune.codec.whisper_encoder import load_whisper  # imports torch

    return load_whisper(whisper, device=str(choose_device(device)))


class Preparation:
    """One preparation of a store."""

    def __init__(
        self,
        out: Path,
        codec: Codec,
        codec_name: str,
        model_type: str | None,
        options: PrepareOptions,
        progress: Progress,
        whisper_encoder: WhisperEncoder | None = None,
    ) -> None:
        """Raises DataError where `out` holds a store of another codec or of another text normalisation."""
        self._out = out
        self._codec = codec
        self._codec_name = codec_name
        self._model_type = model_type
        self._options = options
        self._progress = progress
        self._whisper_encoder = whisper_encoder
        self._store = _existing_store(out, codec)
        self._stored = [] if self._store is None else stored_entries(self._store)
        self._on_disk = ([] if self._store is None else self._store.shards, list(map(copy, self._stored)))  # unchanged
        self._rules = _rules(out, model_type, self._store)
        self._dropped = DroppedRows([] if self._store is None else self._store.info.dropped)

    def run(self, source: Source, drop: Sequence[str] = (), restore: Sequence[str] = ()) -> PrepareSummary:
        """Add the rows of a source to the store, without those to drop. Raises as `prepare`."""
        rows = list(source)
        before = len(self._stored)
        self._dropped.restore(restore)
        self._stored = self._dropped.take_out(self._stored, drop)
        if before and not self._stored:
            raise DataError(f"no row of {self._out} would be left: delete the folder instead")
        with CodeJournal(journal_path(self._out, self._codec), self._codec.num_codebooks) as journal:
            encoder = Encoder(self._codec, journal, self._store)
            candidates, refused = self._read(rows, encoder)
            merger, later = self._merge_and_encode(rows, candidates, encoder)
            rejections = rejections_of(rows, refused | later)
            if rows:
                text = "".join(rejection.to_json() + "\n" for rejection in rejections)
                write_file(self._out / REJECTED_NAME, text)
            if not merger.entries:
                raise DataError(nothing_usable(rejections, self._out / REJECTED_NAME, list(source.notes())))
            pairing = self._write(merger.entries, encoder, source.read_as)
            outliers = find_outliers(merger.entries, parse_limits(self._options.limits), encoder.print)
            unfinished = not rows and len(journal) > 0  # of an interrupted run, which resumes with its source
        if not unfinished:
            shutil.rmtree(self._out / PARTIAL_NAME, ignore_errors=True)
        forget_features(self._out, self._dropped.clips_without_use(merger.entries))
        stale = self._stale([rows[index] for index in refused | later], merger)
        dropped = before - len(self._stored)
        summary = self._summary(source, merger, encoder, pairing, outliers, rejections, stale)
        summary = replace(summary, dropped=dropped, restored=len(set(restore)))
        if not rows:
            return replace(summary, not_in_source=[], warnings=[*summary.warnings, *warn_of_pairs(pairing, self._out)])
        if self._whisper_encoder is None:
            return summary
        return self._store_whisper_features(self._whisper_encoder, summary, candidates.values())

    def _store_whisper_features(
        self, whisper_encoder: WhisperEncoder, summary: PrepareSummary, candidates: Iterable[Candidate]
    ) -> PrepareSummary:
        """Store the Whisper features of every reference, and of context audio in conversations."""
        clips = {clip.sha256: clip for candidate in candidates for clip in candidate.clips}
        needed = {sha256 for row in CodeStore.open(self._out).contexts() for sha256 in whisper_clips(row, "scene")}
        encoded, missing = store_features(
            self._out,
            needed,
            clips,
            whisper_encoder,
            lambda done: self._progress("encoding with Whisper", done, len(needed)),
        )
        warnings = list(summary.warnings)
        if not needed:
            warnings.append(
                "Whisper has nothing to encode: no row has a reference or audio in a user or system message"
            )
        if missing:
            warnings.append(
                f"clips of earlier runs without Whisper features: {len(missing)}; their recordings are not in this "
                "source (prepare theirs again with --whisper)"
            )
        return replace(summary, whisper=encoded, warnings=warnings)

    def _read(self, rows: list[SourceRow], encoder: Encoder) -> tuple[dict[int, Candidate], Refused]:
        """Check every row, and encode what is decoded for it at once, so that nothing is decoded twice.

        But for rows that a merge is likely to refuse, as it would any other with the id of an earlier row.
        """
        limits = Limits(self._codec.frame_rate, self._options.max_seconds, self._options.allow_long)
        candidates: dict[int, Candidate] = {}
        refused: Refused = {}
        seen: set[str | None] = set()
        with writing(self._out / READINGS_NAME, "nothing was encoded"):
            opened = Readings(self._out / READINGS_NAME)
        with opened as readings:
            checker = Checker(limits, readings, self._rules, self._codec.reference_seconds)
            for index, checked, decoded in check_rows(rows, checker, limits, readings, self._codec.sample_rate):
                self._progress("encoding", len(candidates) + len(refused), len(rows))
                if isinstance(checked, RowError):
                    refused[index] = checked
                    continue
                candidates[index] = checked
                row_id = checked.utterance.id
                if (row_id is None or row_id not in seen) and not self._dropped.has(checked.target.sha256):
                    encoder.encode_decoded(checked, decoded)
                seen.add(row_id)
        self._progress("encoding", len(rows), len(rows))
        return dict(sorted(candidates.items())), refused

    def _each(
        self, stage: str | None, items: dict[int, Item], work: Callable[[Item], Result]
    ) -> tuple[dict[int, Result], Refused]:
        """Apply one step to every row, by number -> (its results, the rows that it refuses); None reports nothing."""
        progress = silent if stage is None else self._progress
        results: dict[int, Result] = {}
        refused: Refused = {}
        for done, (index, item) in enumerate(items.items()):
            progress(stage or "", done, len(items))
            try:
                results[index] = work(item)
            except RowError as error:
                refused[index] = error
        progress(stage or "", len(items), len(items))
        return results, refused

    def _merge_and_encode(
        self, rows: list[SourceRow], candidates: dict[int, Candidate], encoder: Encoder
    ) -> tuple[Merger, Refused]:
        """Merge first, so that nothing is encoded for rows that the store refuses; a row that cannot be encoded is left
        out of a second merge.
        """
        not_encoded: Refused = {}
        while True:
            left = {index: item for index, item in candidates.items() if index not in not_encoded}
            merger, refused = self._merge(rows, left)
            accepted = {index: item for index, item in left.items() if index not in refused}
            is_done = all(encoder.has_codes(clip.sha256) for item in accepted.values() for clip in item.clips)
            _, failed = self._each(None if is_done else "encoding", accepted, encoder.encode)
            if not failed:
                return merger, refused | not_encoded
            not_encoded |= failed

    def _merge(self, rows: list[SourceRow], candidates: dict[int, Candidate]) -> tuple[Merger, Refused]:
        texts = {entry.audio_sha256: entry.text for entry in self._stored}
        texts |= {candidate.target.sha256: candidate.text for candidate in candidates.values()}
        entries: dict[int, Entry] = {}
        refused: Refused = {}
        keys = SourceKeys()
        stored_audio = {entry.audio_sha256 for entry in self._stored}
        for index, candidate in candidates.items():
            try:
                candidate = _with_reference_text(candidate, texts)
                entry = new_entry(candidate, keys.of(rows[index], candidate.utterance))
                self._dropped.check(entry, stored_audio)
                entries[index] = entry
            except RowError as error:
                refused[index] = error
        context = [clip.recording for candidate in candidates.values() for clip in candidate.clips[1:]]
        groups = RecordingGroups(self._stored, list(entries.values()), context)
        merger = Merger(self._stored, groups)
        # Unchanged rows first: no other row may replace them because it has their place in the source.
        for index in sorted(entries, key=lambda index: not merger.has_content(entries[index])):
            candidate = candidates[index]
            try:
                merger.add(entries[index], fallback_ids(candidate.utterance, candidate.location))
            except RowError as error:
                refused[index] = error
        groups.decide(merger.entries, self._options.validation_fraction)
        return merger, refused

    def _write(self, entries: list[Entry], encoder: Encoder, read_as: str) -> Pairing:
        pairing = resolve_references(
            entries, self._options.references, self._options.seed, self._codec.reference_seconds
        )
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
        write_store(self._out, entries, encoder.codes, encoder.print, self._info(entries, read_as), *self._on_disk)
        self._progress("writing", 1, 1)
        return pairing

    def _info(self, entries: list[Entry], read_as: str) -> StoreInfo:
        codec = self._codec
        earlier = {} if self._store is None else self._store.info.settings
        return StoreInfo(
            codec=self._codec_name,
            codec_revision=codec.revision,
            sample_rate=codec.sample_rate,
            frame_rate=codec.frame_rate,
            num_codebooks=codec.num_codebooks,
            codebook_size=codec.codebook_size,
            text_normalization=self._rules.version,
            higgstune_version=version("higgstune"),
            rows=rows_by_split(entries),
            hours=hours_by_split(entries),
            model_type=self._model_type or (None if self._store is None else self._store.info.model_type),
            dropped=self._dropped.rows,
            settings=earlier
            | {name: value for name, value in asdict(self._options).items() if value is not None}
            | ({"read_as": read_as} if read_as else {}),
        )

    def _stale(self, refused: list[SourceRow], merger: Merger) -> list[str]:
        """The ids of stored rows whose row in the source is refused now: they stay as they were."""
        accepted = {entry.id for entry in merger.accepted}
        keys = {refused_key(row) for row in refused}
        return [entry.id for entry in self._stored if entry.source_key in keys and entry.id not in accepted]

    def _summary(
        self,
        source: Source,
        merger: Merger,
        encoder: Encoder,
        pairing: Pairing,
        outliers: list[Outlier],
        rejections: list[Rejection],
        stale: list[str],
    ) -> PrepareSummary:
        usable = (row.content for row in source if not isinstance(row.content, RowError))
        return PrepareSummary(
            out=str(self._out),
            read_as=source.read_as,
            example=example(next(usable, None)),
            passed_over=list(source.notes()),
            accepted=rows_by_split(merger.accepted),
            rows=rows_by_split(merger.entries),
            hours=hours_by_split(merger.entries),
            refused=count_reasons(rejections),
            added=merger.added,
            updated=merger.updated,
            encoded=encoder.encoded,
            reused=encoder.reused,
            references=pairing,
            outliers=outliers,
            not_measured=not_measured(merger.entries),
            stale=stale,
            not_in_source=rows_not_in_source(merger, stale),
            warnings=[*find_warnings(merger.entries, pairing, self._options), *warn_of_stale(stale, self._out)],
        )


def _existing_store(out: Path, codec: Codec) -> CodeStore | None:
    """The store that will grow. Raises DataError where its codes or texts do not match the new ones."""
    if not (out / INDEX_NAME).exists():
        return None
    try:
        store = CodeStore.open(out)
    except DataError as error:
        raise DataError(f"{error}; no rows can be added to {out}: move it away, or name another folder") from error
    made = (store.info.codec_revision, store.info.num_codebooks, store.info.frame_rate)
    if made != (codec.revision, codec.num_codebooks, codec.frame_rate):
        raise DataError(
            f"{out} was made with the codec revision {store.info.codec_revision}, but this codec has "
            f"{codec.revision}: prepare into a new folder, or name the codec that made the store"
        )
    return store


def _rules(out: Path, model_type: str | None, store: CodeStore | None) -> TextRules:
    """The rules of the model's texts. Raises DataError where a store has others."""
    rules = rules_of(model_type if store is None or model_type is not None else store.info.model_type)
    if store is not None and store.info.text_normalization != rules.version:
        raise DataError(
            f"{out} has texts normalised by version {store.info.text_normalization}, but this Higgstune has "
            f"version {rules.version}: prepare all its recordings into a new folder"
        )
    return rules


def _with_reference_text(candidate: Candidate, texts: dict[str, str]) -> Candidate:
    """A reference without a text gets the text of the row with the same audio."""
    if candidate.reference is None or candidate.reference_text is not None:
        return candidate
    if (text := texts.get(candidate.reference.sha256)) is None:
        raise RowError("reference_without_text", "reference_audio needs reference_text, its transcript")
    return replace(candidate, reference_text=text)
