"""What a user names: sources, stores, runs, adapters, files of speech.

It can be refused from its name, or from a small file, so none of this imports torch or pyarrow.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from higgstune.checkpoint_files import read_json
from higgstune.errors import CheckpointError, DataError, InputError

if TYPE_CHECKING:
    import torch

Quantize = Literal["4bit"]

INDEX_NAME = "store.json"  # of a code store
ADAPTER_CONFIG = "adapter_config.json"
RUN_STATE = "run.json"
BASE, ADAPTER, CLIPS = "base", "adapter", "clips"  # kinds of what is evaluated
_SOURCE_FILES = (".jsonl", ".ndjson", ".csv", ".json")
_UNDERSTOOD = """What is understood:
- a folder of recordings (wav, flac, mp3, ogg, opus), each with a .txt or .lab of the same name
- a folder with an LJSpeech metadata.csv (id|text|normalised text) and wavs/, or such a table itself
- a manifest, one JSON object a line: a .jsonl file, or a folder with manifest.jsonl or metadata.jsonl
- a ChatML list: a .json file with [{"messages": [...]}, ...]
- a metadata.json with {"samples": [...]}, or its folder"""


@dataclass(frozen=True)
class BaseSpec:
    """Which base to load and how. What is None comes from the adapter, then from the checkpoint and the machine.

    >>> BaseSpec("models/base", quantize="4bit").checkpoint
    'models/base'
    """

    checkpoint: str | Path | None = None  # folder or hub id
    revision: str | None = None  # commit, tag or branch of the checkpoint at the hub
    codec: str | Path | None = None  # folder or hub id
    dtype: "str | torch.dtype | None" = None  # of the weights; None: bfloat16 where the device computes in it natively
    device: "str | torch.device | None" = None  # cpu, cuda, cuda:N; None: CUDA where it is available
    quantize: Quantize | None = None  # the linear weights of the decoder layers

    def filled(self, checkpoint: str | None = None, revision: str | None = None, codec: str | None = None) -> Self:
        """With this checkpoint, at its revision, and this codec, for those that are not named."""
        found = self
        if self.checkpoint is None and checkpoint is not None:
            found = replace(found, checkpoint=checkpoint, revision=self.revision or revision)
        return replace(found, codec=self.codec or codec)


def check_source(path: Path) -> None:
    """Raise DataError for a source that does not exist, or is a file of an unknown kind."""
    if not path.exists():
        raise DataError(f"{path} does not exist. {_UNDERSTOOD}")
    if path.is_dir() and not any(path.iterdir()):
        raise unknown_kind(path)
    if not path.is_dir() and path.suffix.lower() not in _SOURCE_FILES:
        raise unknown_kind(path)


def unknown_kind(path: Path) -> DataError:
    """The error for a source without recordings or a manifest."""
    what = "holds no recording and no manifest" if path.is_dir() else "is of an unknown kind"
    return DataError(f"{path} {what}. {_UNDERSTOOD}")


def check_store(folder: Path) -> None:
    """Raise DataError for a folder that is not a code store."""
    if not (folder / INDEX_NAME).exists():
        lacks = f"has no {INDEX_NAME}" if folder.exists() else "does not exist"
        raise DataError(f"{folder} is not a code store: it {lacks}; make one with `higgstune prepare`")


def check_wav_name(path: Path) -> None:
    """Raise InputError when speech cannot be written under this name."""
    if path.suffix.lower() != ".wav":
        raise InputError(f"{path}: speech is written as .wav")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    if path.parent.is_file():
        raise InputError(f"{path}: {path.parent} is a file, not a folder")


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that a user means: of a run's folder, the adapter of its last finished stage.

    Raises CheckpointError when there is none.
    """
    folder = Path(path).expanduser()
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if (folder / RUN_STATE).exists():
        last = read_json(folder / RUN_STATE, "").get("adapter")
        if last is not None:
            place = Path(str(last))
            if not isinstance(last, str) or "\0" in last or place.is_absolute() or ".." in place.parts:
                raise CheckpointError(f"{folder / RUN_STATE} names no adapter inside its run: {last!r}")
            return folder / place
        raise CheckpointError(f"the run {folder} has no finished stage yet: `higgstune train` it to its end")
    hint = "; it is a checkpoint: name it with --model" if (folder / "config.json").exists() else ""
    raise CheckpointError(f"{folder} is neither an adapter ({ADAPTER_CONFIG}) nor a run ({RUN_STATE}){hint}")


def is_unusable_run(path: Path) -> bool:
    """Whether a path is the folder of a run that ended with an adapter that is not usable."""
    return (path / RUN_STATE).exists() and read_json(path / RUN_STATE, "").get("status") == "not usable"


def kind_of(target: Path) -> str:
    """Whether something to evaluate is an adapter (or its run), a base, or a folder of clips.

    What is not a folder is a base at the hub.
    """
    if (target / ADAPTER_CONFIG).exists() or (target / RUN_STATE).exists():
        return ADAPTER
    return BASE if not target.is_dir() or (target / "config.json").exists() else CLIPS


def base_and_adapter(path: str | Path, base: BaseSpec) -> tuple[BaseSpec, Path | None]:
    """A checkpoint becomes the base; a run or an adapter gives the adapter's folder.

    Raises CheckpointError, and InputError for a checkpoint beside another one in `base`.
    """
    if kind_of(Path(path).expanduser()) == BASE:
        if base.checkpoint is not None and str(base.checkpoint) != str(path):
            raise InputError(f"{path} is a checkpoint, and {base.checkpoint} another: name one of them")
        return replace(base, checkpoint=path), None
    return base, find_adapter(path)
