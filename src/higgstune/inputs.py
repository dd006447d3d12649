"""What a user names: sources, stores, runs, adapters, files of speech.

It can be refused from its name, or from a small file, so none of this imports torch or pyarrow.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from higgstune.checkpoint_files import read_json
from higgstune.errors import CheckpointError, ConfigError, DataError, InputError
from higgstune.files import check_folder

if TYPE_CHECKING:
    import torch

Quantize = Literal["4bit"]

INDEX_NAME = "store.json"  # of a code store
ADAPTER_CONFIG = "adapter_config.json"
RUN_STATE = "run.json"
CLIPS_FILE = "clips.jsonl"  # of a folder of clips
BASE, ADAPTER, CLIPS = "base", "adapter", "clips"  # kinds of what is evaluated
HUB_PREFIX = "hf:"  # of a data set at the hub
_SHOWN = 10  # of several folders
_SOURCE_FILES = (".jsonl", ".ndjson", ".csv", ".tsv", ".list", ".txt", ".json", ".parquet")
_UNDERSTOOD = """What is understood:
- a folder of recordings (wav, flac, mp3, ogg, opus), each with a .txt, .lab or .json of the same name
- LibriSpeech, LibriTTS, VCTK and Kaldi folders
- an LJSpeech folder, or another table of clips (.csv, .tsv, .list, .txt): id|text, or with a header: file_name,text
- a manifest (.jsonl, .json), one JSON object a line or a list of them, or a folder with manifest.jsonl
- a data set at the hub: hf:owner/name or hf:owner/name:split; Parquet files of one
- a ChatML list, or a metadata.json with {"samples": [...]}, or its folder"""


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
    if str(path).startswith(HUB_PREFIX):
        return
    if not path.exists():
        raise DataError(f"{path} does not exist. {_UNDERSTOOD}")
    if path.is_dir() and not any(path.iterdir()):
        raise unknown_kind(path)
    if not path.is_dir() and path.suffix.lower() not in _SOURCE_FILES:
        raise unknown_kind(path)


def check_store_place(source: str | Path, out: Path) -> None:
    """Raise ConfigError for a folder that cannot become the code store of a source."""
    if Path(source).resolve() == out.resolve():
        raise ConfigError(f"{out} is also the source: give the code store its own folder")
    check_folder(out)
    if found := [name for name in ("config.json", ADAPTER_CONFIG, RUN_STATE) if (out / name).exists()]:
        raise ConfigError(f"{out} has a {found[0]}: give the code store its own folder")


def unknown_kind(path: Path, seen: str = "") -> DataError:
    """The error for a source without recordings or a manifest; `seen` is what it holds instead."""
    what = "holds no recording and no manifest" if path.is_dir() else "is of an unknown kind"
    return DataError(f"{path} {what}{f' ({seen})' if seen else ''}. {_UNDERSTOOD}")


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


def find_run(path: str | Path) -> Path:
    """The run's or adapter's folder that a user means: the given one, or the only one in a direct sub-folder of it.

    What holds neither is returned as it is. Raises CheckpointError for a folder with several.
    """
    folder = Path(path).expanduser()
    if any((folder / name).exists() for name in (ADAPTER_CONFIG, RUN_STATE, "config.json", CLIPS_FILE)):
        return folder
    inside = sorted({found.parent for name in (ADAPTER_CONFIG, RUN_STATE) for found in folder.glob(f"*/{name}")})
    if len(inside) > 1:
        raise CheckpointError(
            f"{folder} holds several runs or adapters: name one of {', '.join(map(str, inside[:_SHOWN]))}"
            + (f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else "")
        )
    return inside[0] if inside else folder


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that a user means (see `find_run`): of a run, the adapter of its last finished stage.

    Raises CheckpointError when there is none, or several.
    """
    folder = find_run(path)
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
    if (folder / "adapters.safetensors").exists():
        hint = "; it is an adapter of MLX, which is not read: convert it to peft's layout"
    raise CheckpointError(f"{folder} is neither an adapter ({ADAPTER_CONFIG}) nor a run ({RUN_STATE}){hint}")


def is_unusable_run(path: Path) -> bool:
    """Whether a path names a run that ended with an adapter that is not usable."""
    path = find_run(path)
    return (path / RUN_STATE).exists() and read_json(path / RUN_STATE, "").get("status") == "not usable"


def kind_of(target: Path) -> str:
    """Whether something to evaluate is an adapter (or its run), a base, or a folder of clips.

    What is not a folder is a base at the hub. Raises CheckpointError for a folder with several runs.
    """
    target = find_run(target)
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
