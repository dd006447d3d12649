"""`export`: a run as other software takes it: transformers and vLLM-Omni, the original engine, peft."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from higgstune.errors import ConfigError, VerificationError
from higgstune.exporting.card import Made, model_card
from higgstune.exporting.layouts import LayoutName, licence_files, output_folder
from higgstune.exporting.merge import check_base_bits, load_source, logits_of, merge, summary_of
from higgstune.exporting.source import Source, open_source, stored_dtype
from higgstune.exporting.verify import MOVES, MergeCheck, difference, held_out
from higgstune.files import check_new
from higgstune.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_fingerprint, write_card
from higgstune.model.adapters import load_adapter
from higgstune.progress import Progress

Format = Literal["native", "boson", "peft"]
_LAYOUT: dict[str, LayoutName] = {"native": "native", "boson": "original"}


@dataclass(frozen=True)
class ExportResult:
    """An exported folder."""

    folder: Path
    format: str
    check: MergeCheck
    dropped: tuple[str, ...]  # modules that were left out
    loss: dict[str, float] | None  # where some were: audio loss on the compared clips, with and without them


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: str,
    model: str | Path | None = None,
    revision: str | None = None,
    codec: str | Path | None = None,
    data: str | Path | None = None,
    dtype: str | None = None,
    drop_modules: bool = False,
    base_bits: int | None = None,
    whisper: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the adapter of a run's or an adapter's folder into `out` as other software loads it.

    `format` is native (merged, the layout of transformers, which vLLM-Omni reads), boson (merged, the layout of
    boson_multimodal) or peft (the adapter alone, for plain peft on the native class). The other arguments are those of
    `merge`. `base_bits` (4, 8) notes in the card how to load the base so, in native and peft.

    Raises as `merge`; ConfigError, too, for an adapter whose modules plain peft would leave out.
    """
    if format not in get_args(Format):
        raise ConfigError(f"--format {format}: one of {', '.join(get_args(Format))}")
    check_base_bits(base_bits)
    if format == "boson" and base_bits is not None:
        raise ConfigError("--base-bits has no effect with --format boson: the original engine loads no such base")
    if format != "peft":
        merged = merge(
            run, out, model=model, revision=revision, codec=codec, data=data, dtype=dtype, layout=_LAYOUT[format],
            drop_modules=drop_modules, base_bits=base_bits, whisper=whisper, device=device, progress=progress,
        )  # fmt: skip
        return ExportResult(merged.folder, format, merged.check, merged.dropped, merged.loss)
    if dtype is not None or drop_modules or whisper is not None:
        option = "--dtype" if dtype is not None else "--drop-modules" if drop_modules else "--whisper"
        raise ConfigError(f"{option} has no effect with --format peft: the adapter is passed on as it was trained")
    out = Path(out)
    check_new(out)
    source = open_source(run, model=model, revision=revision, codec=codec)
    check_new(out, source.base, source.adapter)
    with output_folder(out) as folder:
        check = _write_adapter(source, folder, out.name, data, base_bits, device)
    if progress is not None:
        progress("comparing", 1, 1)
    return ExportResult(out, format, check, (), None)


def _write_adapter(
    source: Source, folder: Path, name: str, data: str | Path | None, base_bits: int | None, device: str | None
) -> MergeCheck:
    for part in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source.adapter / part, folder / part)
    write_card(folder, source.card)
    for path in licence_files(source.base):
        shutil.copyfile(path, folder / path.name)
    dtype = stored_dtype(source.layout, wanted="float32")
    loaded = load_source(source, dtype, device)
    clips = held_out(source, loaded, data)
    fingerprint, base = base_fingerprint(loaded.model), logits_of(loaded.model, clips.batch)
    adapted = load_adapter(loaded.model, folder)
    if modules := summary_of(loaded.family.extensions.modules(adapted)):
        raise ConfigError(
            f"plain peft would load this adapter without {', '.join(modules)}, which its native base does not have: "
            "`higgstune merge` keeps them, in the extended or the original layout"
        )
    moved = difference(logits_of(adapted, clips.batch), base, dtype)
    if not moved > MOVES[dtype]:
        raise VerificationError(
            f"the adapter {source.adapter} hardly changes the base: its logits by {moved:.2e} ({dtype}), which is not "
            f"more than {MOVES[dtype]:.0e}"
        )
    check = MergeCheck(dtype, 0.0, 0.0, moved, clips.clips, clips.origin)
    made = Made(
        kind="peft",
        title=name,
        dtype=dtype,
        codec=loaded.codec,
        codec_comes_along=False,
        licences=tuple(path.name for path in licence_files(folder)),
        base_fingerprint=fingerprint,
        check=check,
        base_bits=base_bits,
    )
    (folder / "README.md").write_text(model_card(source, made), encoding="utf-8")
    return check
