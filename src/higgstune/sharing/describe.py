"""What a merged checkpoint says of itself: README.md and higgstune.json."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import higgstune
from higgstune.model.checksums import folder_card, write_checksums
from higgstune.model.load import CODEC_FOLDER
from higgstune.sharing.card import Made, model_card, public_name
from higgstune.sharing.check import Logits, MergeCheck
from higgstune.sharing.held_out import HeldOut
from higgstune.sharing.layouts import LayoutName, licence_files
from higgstune.sharing.source import MERGED, Source


@dataclass(frozen=True)
class Written:
    """What is known once the checkpoint is written and the models are gone from memory."""

    layout: LayoutName
    dtype: str
    held_out: HeldOut
    base: Logits
    adapted: Logits
    base_fingerprint: str
    codec: str
    codec_comes_along: bool
    conditioning: tuple[str, ...]
    dropped: tuple[str, ...]
    loss: dict[str, float] | None


def describe(
    source: Source,
    folder: Path,
    name: str,
    written: Written,
    check: MergeCheck,
    fingerprint: str,
    base_bits: int | None,
) -> None:
    """README.md and higgstune.json: what was merged, and the checksum of each weight file.

    `name` is the folder's at last; `fingerprint` that of the merged weights.
    """
    licences = [*licence_files(folder), *licence_files(folder / CODEC_FOLDER)]
    made = Made(
        kind=written.layout,
        title=name,
        dtype=written.dtype,
        codec=written.codec,
        codec_comes_along=written.codec_comes_along,
        licences=tuple(path.relative_to(folder).as_posix() for path in licences),
        base_fingerprint=written.base_fingerprint,
        check=check,
        conditioning=written.conditioning,
        dropped=written.dropped,
        loss=written.loss,
        base_bits=base_bits,
    )
    (folder / "README.md").write_text(model_card(source, made), encoding="utf-8")
    merged = {
        "adapter_sha256": source.weights_sha256,
        "base": public_name(source.checkpoint),
        "revision": source.revision,
        "base_fingerprint": written.base_fingerprint,
        "fingerprint": fingerprint,
        "layout": written.layout,
        "dtype": written.dtype,
        "dropped": list(written.dropped),
        "check": asdict(check),
        "base_merged": folder_card(source.base).get(MERGED),  # where a run was begun on a merged checkpoint
    }
    write_checksums(
        folder, higgstune=higgstune.__version__, merged=merged, codec=public_name(written.codec),
        adapter=_without_folders(source.card),
    )  # fmt: skip


def _without_folders(value: Any) -> Any:
    """An adapter's card with the last names of folders only: a merged checkpoint is passed on to strangers."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
