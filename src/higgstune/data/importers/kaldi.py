"""Rows from a Kaldi data folder: wav.scp, text, and where they are there segments, utt2spk and utt2lang."""

from collections.abc import Iterator
from pathlib import Path

from higgstune.data.importers.recordings import Recordings
from higgstune.data.manifest import Utterance, parse_utterance
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import Source, SourceRow, decode_lines, path_within, read_whole

FILES = ("wav.scp", "text")
_TO_THE_END = -1.0  # of a segment, as Kaldi writes it


def read_kaldi(folder: Path, *, allow_outside: bool = False) -> Source:
    """One row for each line of `text`. A command in wav.scp (it ends with `|`) is refused, and never run.

    Raises DataError for a file that cannot be read, or that leads out of the folder.
    """
    names = ("wav.scp", "text", "segments", "utt2spk", "utt2lang")
    lines = {name: _lines(folder, name, allow_outside) for name in names}
    files = {name: {key: value for _, key, value in found} for name, found in lines.items()}
    recordings = Recordings(folder, allow_outside)
    recordings.expect(path for path in files["wav.scp"].values() if not path.endswith("|"))
    seen: set[str] = set()
    rows = []
    for number, utterance, text in lines["text"]:
        try:
            if utterance in seen:
                raise RowError("duplicate_id", f"{shown(utterance)} stands in text twice")
            seen.add(utterance)
            row = _utterance(utterance, text, files, recordings)
        except RowError as error:
            rows.append(SourceRow(f"text:{number}", folder, error, utterance))
        else:
            rows.append(SourceRow(f"text:{number}", folder, row, utterance, row.audio, allow_outside))

    def notes() -> Iterator[str]:
        for name in ("segments", "utt2spk") if files["segments"] else ("utt2spk",):
            if unused := len(files[name].keys() - seen):
                yield f"lines of {name} without a text: {unused}"
        yield from recordings.notes()

    return Source(rows, f"a Kaldi folder: {', '.join(name for name in names if files[name])}", notes)


def _utterance(name: str, text: str, files: dict[str, dict[str, str]], recordings: Recordings) -> Utterance:
    recording: str = name
    start = end = None
    if files["segments"]:
        fields = files["segments"].get(name, "").split()
        try:
            recording, start, end = fields[0], float(fields[1]), float(fields[2])
        except (IndexError, ValueError) as error:
            raise RowError("bad_row", f"segments has no recording, start and end for {shown(name)}") from error
        end = None if end == _TO_THE_END else end
    path = files["wav.scp"].get(recording)
    if path is None:
        raise RowError("missing_audio", f"wav.scp has no {shown(recording)}")
    if path.endswith("|"):
        raise RowError("missing_audio", f"wav.scp has a command for {shown(recording)}, which is not run: write files")
    values = {"audio": recordings.find(path), "text": text, "id": name, "start": start, "end": end}
    for key, file in (("speaker", "utt2spk"), ("language", "utt2lang")):
        values[key] = files[file].get(name) or None
    return parse_utterance(values)


def _lines(folder: Path, name: str, allow_outside: bool) -> list[tuple[int, str, str]]:
    """Number, key and value of each line that is not empty."""
    if not (path := path_within(folder, name, allow_outside)).is_file():
        return []
    found = []
    for number, line in enumerate(decode_lines(read_whole(path)), 1):
        if line.strip():
            key, *rest = line.split(maxsplit=1)
            found.append((number, key, rest[0].strip() if rest else ""))
    return found
