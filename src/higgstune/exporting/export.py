"""`export`: write a run as other software loads it: transformers and vLLM-Omni, the original engine, peft."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from higgstune.errors import ConfigError, VerificationError
from higgstune.exporting.card import AudioLoss, CardFacts, model_card
from higgstune.exporting.layouts import licence_files, output_folder
from higgstune.exporting.merge import MergeOptions, load_source, logits_of, merge_into, summary_of
from higgstune.exporting.options import Format, check_options
from higgstune.exporting.source import Source, open_source, stored_dtype
from higgstune.exporting.verify import MIN_CHANGE, ExportCheck, difference, held_out
from higgstune.families import load_family
from higgstune.files import NOTHING_KEPT, check_new, writing
from higgstune.inputs import BaseSpec
from higgstune.model.adapter_folder import base_fingerprint, write_card
from higgstune.model.adapter_tensors import copy_for_peft
from higgstune.model.adapters import load_adapter
from higgstune.progress import Progress, silent


@dataclass(frozen=True)
class ExportResult:
    """An exported folder."""

    folder: Path
    format: Format
    dtype: str | None  # of the merged weights; None for an adapter alone
    check: ExportCheck
    dropped: tuple[str, ...] = ()  # modules that were left out
    loss: AudioLoss | None = None  # with and without the modules that were left out
    faults: tuple[str, ...] = ()  # why the run ended as not usable; empty where nothing says so


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    drop_modules: bool = False,
    dtype: str | None = None,
    base_bits: int | None = None,
    whisper: str | Path | None = None,
    data: str | Path | None = None,
    base: BaseSpec = BaseSpec(),
    progress: Progress | None = None,
) -> ExportResult:
    """Write the adapter of a run's or an adapter's folder into the new folder `out`, as other software loads it.

        export("runs/voice", "models/voice", format="native").folder

    `format` is one of

        native    merged with its base, in the layout of transformers, which vLLM-Omni reads, too
        extended  merged, in Higgstune's layout: native with audio attention and Whisper, which only Higgstune loads
        boson     merged, in the layout of boson_multimodal
        peft      the adapter alone, for plain peft on the native class

    and, where not given, native, or extended when the native class has no place for modules of the adapter.
    `drop_modules` writes native without these modules. `dtype` (float32, bfloat16) is that of the merged weights; that
    of the base's files where not given. `base_bits` (4, 8) only adds to the card how to load the base that way.
    `whisper` names the encoder for boson and `base` base and codec, if they have moved, and the device; `data` is a
    store to compare on.

    Raises ConfigError, CheckpointError or DataError for wrong input, VerificationError when the exported model does
    not give the logits of base + adapter, WorkError when disk or memory is too small. `out` does not exist then.
    """
    out = Path(out)
    check_options(format, drop_modules=drop_modules, dtype=dtype, base_bits=base_bits, whisper=whisper)
    check_new(out)
    source = open_source(run, base)
    check_new(out, source.layout.folder, source.adapter)
    family = load_family(source.layout.family)
    if format not in (None, "peft", *family.export.formats):
        raise ConfigError(f"--format {format}: {family.info.title} has {', '.join((*family.export.formats, 'peft'))}")
    family.export.check_base(source.layout)
    show = progress or silent
    with output_folder(out) as folder:
        if format == "peft":
            check = _write_adapter(source, folder, out.name, data, base_bits)
            show("comparing", 1, 1)
            return ExportResult(out, "peft", None, check, faults=source.faults)
        options = MergeOptions(format, drop_modules, dtype, base_bits, whisper)
        merged = merge_into(folder, out.name, source, options, data, show)
    return ExportResult(out, merged.format, merged.dtype, merged.check, merged.dropped, merged.loss, source.faults)


def _write_adapter(
    source: Source, folder: Path, name: str, data: str | Path | None, base_bits: int | None
) -> ExportCheck:
    dtype = stored_dtype(source.layout, wanted="float32")
    loaded = load_source(source, dtype)
    with writing(folder, NOTHING_KEPT):
        copy_for_peft(source.adapter, folder, loaded.model)
        write_card(folder, source.card)
        for path in licence_files(source.layout.folder):
            shutil.copyfile(path, folder / path.name)
    clips = held_out(source, loaded, data)
    fingerprint, base = base_fingerprint(loaded.model), logits_of(loaded.model, clips.batch)
    adapted = load_adapter(loaded.model, folder)
    if modules := summary_of(loaded.family.extensions.modules(adapted)):
        raise ConfigError(
            f"plain peft would load this adapter without {', '.join(modules)}, which its native base does not have: "
            "--format extended and --format boson keep them"
        )
    moved = difference(logits_of(adapted, clips.batch), base, dtype)
    if not moved > MIN_CHANGE[dtype]:
        raise VerificationError(
            f"the adapter {source.adapter} hardly changes the base: its logits by {moved:.2e} ({dtype}), which is not "
            f"more than {MIN_CHANGE[dtype]:.0e}"
        )
    check = ExportCheck(dtype, 0.0, 0.0, moved, clips.clips, clips.origin)
    facts = CardFacts(
        kind="peft",
        title=name,
        dtype=dtype,
        codec=loaded.codec,
        has_codec=False,
        licences=tuple(path.name for path in licence_files(folder)),
        base_fingerprint=fingerprint,
        check=check,
        base_bits=base_bits,
    )
    (folder / "README.md").write_text(model_card(source, facts), encoding="utf-8")
    return check
