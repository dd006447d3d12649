"""A folder of clips to be judged: `clips.jsonl`, its audio, and recordings of the voices that the clips should have.

FOLDER/
  clips.jsonl              one clip per line: the fields of `Clip`, paths relative to the folder
  0001.wav ...
  voices/SPEAKER/*.wav     recordings of the speakers, to compare voices with
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from higgstune.data.audio import AUDIO_SUFFIXES
from higgstune.data.importers.folder import read_folder
from higgstune.data.rejection import RowError
from higgstune.data.source import is_within
from higgstune.errors import DataError
from higgstune.families import check_checkpoint
from higgstune.files import write_file
from higgstune.inputs import ADAPTER, BASE, CLIPS_FILE, BaseSpec, find_adapter, kind_of
from higgstune.model.adapter_folder import adapter_card, recorded_base

VOICES_FOLDER = "voices"
SAMPLES = "samples"  # folder of a stage, with the clips that were spoken during training
_PATHS = ("file", "reference", "recording")


@dataclass(frozen=True)
class Clip:
    """One generated clip, and what is known about it. Only `id`, `file` and `text` are required."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    file: Path
    text: str  # what it should say
    language: str | None = None  # ISO 639-1
    speaker: str | None = None  # whose voice it should have: a folder of `voices/`
    reference: Path | None = None  # the recording whose voice it imitates
    reference_text: str | None = None  # the words of the reference
    recording: Path | None = None  # a person's recording of the same text
    seed: int | None = None
    hit_cap: bool | None = None  # whether the frame cap ended it; None: judged by its duration
    generated_by: dict[str, str] | None = None  # family and licence, of speech that a licence binds


_CLIP = TypeAdapter(Clip)


def read_clips(folder: str | Path) -> list[Clip]:
    """The clips of a folder: from its `clips.jsonl` or, without one, from audio files with a .txt beside each.

    Raises DataError for a wrong row, for a file that is missing or outside the folder, and if there is no clip.
    """
    folder = Path(folder)
    index = folder / CLIPS_FILE
    if index.is_file():
        try:
            lines = index.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{index} is not UTF-8 (byte {error.start}): convert it") from error
        clips = [_parsed(folder, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        clips = _of_recordings(folder)
    if not clips:
        raise DataError(f"{folder} has no clips: neither {CLIPS_FILE} nor audio files with a .txt beside each")
    name, times = Counter(clip.id for clip in clips).most_common(1)[0]
    if times > 1:
        raise DataError(f"{folder}: {times} clips have the id {name}: give each its own")
    return clips


def check_target(target: Path, base: BaseSpec) -> None:
    """Refuse, from small files, what cannot be evaluated: an unfinished run, a base that does not exist, no clips.

    Raises CheckpointError, DataError.
    """
    kind = kind_of(target)
    if kind == ADAPTER:
        adapter = find_adapter(target)
        recorded_base(base, adapter, adapter_card(adapter))
    elif kind == BASE:
        check_checkpoint(target)
    else:
        read_clips(target)


def read_voices(folder: str | Path) -> dict[str, list[Path]]:
    """The recordings of each speaker below `voices/`, by name."""
    voices = Path(folder) / VOICES_FOLDER
    found = {
        speaker.name: sorted(path for path in speaker.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
        for speaker in sorted(voices.iterdir() if voices.is_dir() else ())
        if speaker.is_dir()
    }
    return {name: files for name, files in found.items() if files}


def write_clips(folder: Path, clips: Sequence[Clip]) -> None:
    """Write `clips.jsonl` for clips whose files lie below the folder. Raises WorkError if the disk refuses."""
    rows = [asdict(clip) for clip in clips]
    for row in rows:
        row |= {key: row[key].relative_to(folder).as_posix() for key in _PATHS if row[key] is not None}
    text = "".join(
        json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False) + "\n"
        for row in rows
    )
    write_file(folder / CLIPS_FILE, text)


def _parsed(folder: Path, number: int, line: str) -> Clip:
    where = f"{folder / CLIPS_FILE}, line {number}"
    try:
        values: Any = json.loads(line)
        clip = _CLIP.validate_python(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"])) or "the line"
        raise DataError(
            f"{where}: {field}: {problem['msg']}; a clip has {', '.join(field.name for field in fields(Clip))}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error
    places = {key: folder / getattr(clip, key) for key in _PATHS if getattr(clip, key) is not None}
    for key, path in places.items():
        try:
            if not is_within(path, folder):
                raise DataError(f"{where}: {key} is outside the folder: {path}")
            if not path.is_file():
                raise DataError(f"{where}: {key} is missing: {path}")
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: {key} is not a valid file name: {error}") from error
    return replace(clip, **places)


def _of_recordings(folder: Path) -> list[Clip]:
    clips = []
    for row in read_folder(folder):
        name = Path(row.location)
        if name.is_relative_to(VOICES_FOLDER):
            continue
        if isinstance(row.content, RowError):
            raise DataError(f"{folder / name}: {row.content}")
        text = (row.content.text or "").strip()
        if not text:
            raise DataError(f"{folder / name}: the text beside it is empty: write the words that the clip should say")
        clips.append(Clip(name.with_suffix("").as_posix(), folder / name, text))
    return clips
