"""`prepare`: from recordings to a code store."""

from dataclasses import replace
from pathlib import Path

from higgstune.codec.base import Codec
from higgstune.data.importers import read_source
from higgstune.data.preparation import Preparation, Progress
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.data.summary import PrepareOptions, PrepareSummary, References
from higgstune.data.whisper_features import Listener
from higgstune.errors import ConfigError
from higgstune.files import alone_in


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    codec: Codec | str | Path | None = None,
    codec_name: str | None = None,
    model: str | Path | None = None,
    whisper: Listener | str | Path | None = None,
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
    from higgstune.codec import load_codec
    from higgstune.model.load import checkpoint_codec

    name = checkpoint_codec(model, codec)
    return name, load_codec(name, device=device)


def _listener(whisper: Listener | str | None, device: str) -> Listener | None:
    if not isinstance(whisper, str):
        return whisper
    from higgstune.model.whisper import load_whisper  # brings torch

    return load_whisper(whisper, device=device)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress to show."""
