"""The steps of a preparation, in order, and what it notes on the way."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from higgstune.codec.base import Codec
from higgstune.data.check import Candidate, Checker
from higgstune.data.clips import Limits
from higgstune.data.encode import Encoder, journal_path
from higgstune.data.entry import Entry, fallback_ids, new_entry, source_key, stored_entries
from higgstune.data.journal import CodeJournal
from higgstune.data.merge import Merger
from higgstune.data.references import Pairing, resolve_references
from higgstune.data.rejection import Rejection, RowError, count_reasons
from higgstune.data.schema import INDEX_NAME, PARTIAL_NAME, REJECTED_NAME, StoreInfo
from higgstune.data.shards import write_store
from higgstune.data.source import SourceRow, rejections_of
from higgstune.data.splits import RecordingGroups
from higgstune.data.store import CodeStore
from higgstune.data.summary import (
    PrepareOptions,
    PrepareSummary,
    find_warnings,
    hours_by_split,
    rows_by_split,
)
from higgstune.data.text import TEXT_NORMALIZATION
from higgstune.data.whisper_features import Listener, store_features
from higgstune.errors import DataError
from higgstune.files import write_file
from higgstune.prompt.rows import heard_clips

Progress = Callable[[str, int, int], None]  # what is being done, rows done, rows in all
Item = TypeVar("Item")
Result = TypeVar("Result")
Refused = dict[int, RowError]  # by the row's number


class Preparation:
    """One preparation, with everything it notes on the way."""

    def __init__(
        self,
        out: Path,
        codec: Codec,
        codec_name: str,
        options: PrepareOptions,
        progress: Progress,
        listener: Listener | None = None,
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

    def _listen(self, listener: Listener, summary: PrepareSummary, candidates: Iterable[Candidate]) -> PrepareSummary:
        """Store what Whisper hears in every reference and in what conversations listen to."""
        clips = {clip.sha256: clip for candidate in candidates for clip in candidate.clips}
        needed = {sha256 for row in CodeStore.open(self._out).contexts() for sha256 in heard_clips(row, "scene")}
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
