"""Rows from a Kaldi data folder: wav.scp, text, and where they are there segments, utt2spk and utt2lang."""

from pathlib import Path

from higgstune.data.importers.recordings import Recordings
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import Source, SourceRow, decode_lines, read_whole

FILES = ("wav.scp", "text")


def read_kaldi(folder: Path, *, allow_outside: bool = False) -> Source:
    """One row for each line of `text`. A command in wav.scp (it ends with `|`) is refused, and never run."""
    files = {name: _table(folder / name) for name in ("wav.scp", "text", "segments", "utt2spk", "utt2lang")}
    recordings = Recordings(folder, allow_outside)
    rows = []
    for number, (utterance, text) in enumerate(files["text"].items(), 1):
        place = f"text:{number}"
        try:
            row = _utterance(utterance, text, files, recordings)
        except RowError as error:
            rows.append(SourceRow(place, folder, error, utterance))
        else:
            rows.append(SourceRow(place, folder, row, utterance, row.audio, allow_outside))
    found = ", ".join(name for name, lines in files.items() if lines)
    return Source(rows, f"a Kaldi folder: {found}", recordings.notes)


def _utterance(name: str, text: str, files: dict[str, dict[str, str]], recordings: Recordings) -> Utterance:
    recording: str = name
    start = end = None
    if files["segments"]:
        fields = files["segments"].get(name, "").split()
        try:
            recording, start, end = fields[0], float(fields[1]), float(fields[2])
        except (IndexError, ValueError) as error:
            raise RowError("bad_row", f"segments has no recording, start and end for {shown(name)}") from error
    path = files["wav.scp"].get(recording)
    if path is None:
        raise RowError("missing_audio", f"wav.scp has no {shown(recording)}")
    if path.endswith("|"):
        raise RowError("missing_audio", f"wav.scp has a command for {shown(recording)}, which is not run: write files")
    speaker, language = (files[file].get(name) for file in ("utt2spk", "utt2lang"))
    return Utterance(
        audio=recordings.find(path),
        text=text,
        id=name,
        speaker=speaker or None,
        language=language or None,
        start=start,
        end=end,
    )


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in decode_lines(read_whole(path)) if line.strip())
    return {key: rest[0].strip() if rest else "" for key, *rest in lines}
