"""The texts of `speak`: one, or the lines of a file."""

import re
from pathlib import Path
from typing import NamedTuple

from higgstune.errors import ConfigError, DataError
from higgstune.files import check_folder
from higgstune.inputs import check_wav_name


class ClipToSpeak(NamedTuple):
    """A text and its file."""

    place: int  # among the lines, from 0: its seed and its file's name follow from it
    text: str
    out: Path


def one_clip(text: str, out: Path, *, piped: bool) -> tuple[list[ClipToSpeak], list[str]]:
    """As `clips_of_lines`, for one text. Raises InputError for a text or a file name that cannot be."""
    from higgstune.data.clips import spoken_text  # imports pydantic and soundfile, in 0.1 s
    from higgstune.data.rules import TAGGED

    if not piped:
        check_wav_name(out)
    if not text.strip():
        raise ConfigError("the text to speak is empty")
    spoken_text(text, "the text to speak", TAGGED)  # allows most: the speaker knows the rules of its model
    return [ClipToSpeak(0, text, out)], []


def clips_of_lines(file: Path, out: Path) -> tuple[list[ClipToSpeak], list[str]]:
    """The lines of a file that can be spoken into the folder `out`, and why others cannot; blank ones are skipped.

    Raises ConfigError for a file that cannot be read or has none, and for an `out` that is not a folder.
    """
    from higgstune.data.clips import spoken_text
    from higgstune.data.rules import TAGGED

    if out.suffix.lower() == ".wav" and not out.is_dir():
        raise ConfigError(f"--out {out}: with --file it is a folder, of a clip for each line: name it without .wav")
    check_folder(out)
    clips, refused = [], []
    for place, (number, line) in enumerate(_lines(file)):
        try:
            spoken_text(line, f"line {number} of {file}", TAGGED)
            clips.append(ClipToSpeak(place, line, out / f"{place + 1:04d}.wav"))
        except DataError as error:
            refused.append(str(error))
    if not clips:
        raise ConfigError(f"--file {file} has no line that can be spoken" + (f": {refused[0]}" if refused else ""))
    return clips, refused


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1 as in an editor."""
    from higgstune.data.source import decode

    try:
        text = decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file {file} is neither UTF-8 nor UTF-16 (byte {error.start}): convert it") from error
    return [(n, line.strip()) for n, line in enumerate(re.split("\r\n|\r|\n", text), 1) if line.strip()]
