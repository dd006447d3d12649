"""Checks of an adapter: intact files, the base that it was trained on, and an effect in each of its modules."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higgstune.batch.collate import Batch
from higgstune.checkpoint_files import safetensors_keys
from higgstune.diagnostics.report import Finding, naming
from higgstune.errors import CheckpointError
from higgstune.families import family_of
from higgstune.families.base import base_of
from higgstune.model.adapter_folder import (
    ADAPTER_CARD,
    ADAPTER_WEIGHTS,
    adapter_card,
    check_adapter_files,
    check_base,
    check_merged_once,
    check_tokenizer,
    no_card,
    other_adapter_in,
)
from higgstune.model.adapter_tensors import module_of, read_adapter
from higgstune.model.adapters import claimed_and_idle, was_untaught
from higgstune.model.base_identity import IDENTITY
from higgstune.peft_compat import PeftModel, get_peft_model_state_dict
from higgstune.training.verify import MARGIN, TOLERANCE, probe_logits

CHECK = "adapter"
_COPY = "copy the adapter's whole folder again from where it was trained"
_OWN_BASE = "name the adapter's own base with --model; on another one it does not speak as trained"
UNFIT = "use the base that it was trained on; docs/sharing.md says which adapters of other software can be used"
_RETRAIN = "train it again, or use an earlier checkpoint: this one has not learnt what it claims"


def check_card(folder: Path) -> list[Finding]:
    """Check for Higgstune's card. Raises CheckpointError if it is damaged."""
    card = adapter_card(folder)
    if not card:
        advice = "make sure that base and codec are those that it was trained with: nothing can be compared"
        return [Finding(CHECK, "warning", no_card(folder), advice)]
    lacking = [
        key for key in ("base_fingerprint", IDENTITY, "weights_sha256", "codec_revision") if card.get(key) is None
    ]
    if lacking:
        text = f"{folder / ADAPTER_CARD} lacks {naming(lacking)}, which this version writes"
        return [Finding(CHECK, "warning", text, "values that are missing cannot be compared")]
    return [Finding(CHECK, "ok", f"{folder}: stage {card.get('stage')}, trained on {card.get('checkpoint')}")]


def check_files(folder: Path) -> list[Finding]:
    """Check that the files are complete and unchanged, every tensor is finite, and no LoRA is zero."""
    findings = []
    try:
        check_adapter_files(folder)
    except CheckpointError as error:
        findings.append(Finding(CHECK, "failed", str(error), _COPY))
    weights = read_adapter(folder)
    broken = sorted(key for key, value in weights.items() if not torch.isfinite(value).all())
    if broken:
        text = f"{len(broken)} tensors of the adapter have NaN or infinity: {naming(broken)}"
        findings.append(Finding(CHECK, "failed", text, _RETRAIN))
    card = adapter_card(folder)
    findings += _check_zero(weights, card)
    unchanged = ", unchanged since they were saved" if "weights_sha256" in card else ""
    return findings or [Finding(CHECK, "ok", f"{len(weights)} tensors, all finite{unchanged}")]


def check_trained_on(model: Any, folder: Path, base: Path | None = None) -> list[Finding]:
    """Check that the base is the one that the adapter was trained on, with its tokenizer in the folder `base`."""
    try:
        check_base(folder, model)
        if base is not None:
            check_tokenizer(folder, base)
    except CheckpointError as error:
        return [Finding(CHECK, "failed", str(error), _OWN_BASE)]
    if adapter_card(folder).get("base_fingerprint") is None:
        return []
    return [Finding(CHECK, "ok", "the base has the fingerprint in the adapter's card")]


def check_merged(folder: Path, base: Path) -> list[Finding]:
    """Check that the base in this folder does not contain this adapter, nor another one."""
    try:
        check_merged_once(folder, base)
    except CheckpointError as error:
        return [Finding(CHECK, "failed", str(error), _OWN_BASE)]
    problem = other_adapter_in(base, adapter_card(folder))
    return [] if problem is None else [Finding(CHECK, "warning", problem, _OWN_BASE)]


def check_plain_peft(model: Any, folder: Path) -> list[Finding]:
    """Warn of tensors that `PeftModel.from_pretrained` alone would drop on this base."""
    dropped = dropped_by_plain_peft(model, folder)
    if not dropped:
        return []
    text = (
        f"`PeftModel.from_pretrained` would drop {len(dropped)} tensors on this base without warning, as it has "
        f"no modules of their names ({naming(dropped)})"
    )
    advice = "Higgstune itself loads them all; for other software, write the adapter with `higgstune export`"
    return [Finding(CHECK, "warning", text, advice)]


def dropped_by_plain_peft(model: Any, folder: Path) -> list[str]:
    """The adapter's tensors whose modules the base does not have. Raises CheckpointError for a broken file."""
    modules = {name for name, _ in base_of(model).named_modules()}
    keys = sorted(safetensors_keys(folder / ADAPTER_WEIGHTS))
    return [key for key in keys if module_of(key) not in modules]


def check_applied(model: PeftModel, folder: str | Path) -> Finding:
    """Check that a peft model has every tensor of an adapter's file.

    For models loaded by `PeftModel.from_pretrained` itself, which drops tensors without warning.
    Raises CheckpointError for a broken file.
    """
    saved, loaded = read_adapter(Path(folder)), _loaded(model)
    dropped = sorted(saved.keys() - loaded.keys())
    if dropped:
        text = f"{len(dropped)} of the adapter's {len(saved)} tensors are not in the model: {naming(dropped)}"
        advice = "the base lacks their modules: load the adapter with higgstune's load_adapter, which adds them first"
        if not any(map(family_of(model).extensions.owns, dropped)):
            advice = "use the base that the adapter was trained on, and load it with higgstune's load_adapter"
        return Finding(CHECK, "failed", text, advice)
    other = sorted(key for key, value in saved.items() if not _same(loaded[key], value))
    if other:
        text = f"{len(other)} of the adapter's tensors have different values in the model: {naming(other)}"
        advice = "another adapter is active, or this one was changed after loading: reload it"
        if safetensors_keys(Path(folder) / ADAPTER_WEIGHTS) - loaded.keys():
            advice = "plain peft does not read the names in this file: load it with higgstune's load_adapter, or write "
            advice += "it anew with `higgstune export --format peft`"
        return Finding(CHECK, "failed", text, advice)
    return Finding(CHECK, "ok", f"all {len(saved)} tensors of the adapter are in the model")


def check_effect(model: PeftModel, batch: Batch, card: dict[str, Any] | None = None) -> list[Finding]:
    """Check on a batch that each module of the adapter changes its output, and the logits change enough."""
    claimed, idle = claimed_and_idle(model, batch, card or {})
    findings = []
    if not claimed:
        findings.append(Finding(CHECK, "failed", "the adapter has no module on this base", _RETRAIN))
    if idle:
        text = f"{len(idle)} of {len(claimed)} modules of the adapter have no effect: {naming(idle)}"
        findings.append(Finding(CHECK, "failed", text, _RETRAIN))
    moved, needed = _logit_change(model, batch)
    text = f"the adapter changes the logits by {moved:.2g}"
    if not moved > needed:
        advice = "it was trained too little (use more steps or a higher learning rate), or is not applied"
        findings.append(Finding(CHECK, "failed", f"{text}, not more than {needed:.2g}", advice))
    if findings:
        return findings
    return [Finding(CHECK, "ok", f"all {len(claimed)} modules of the adapter have an effect; {text}")]


def _check_zero(weights: dict[str, Tensor], card: dict[str, Any]) -> list[Finding]:
    """Fail LoRA modules without effect, whose A or B is all zero."""
    keys = [key for key in sorted(weights) if ".lora_A" in key or ".lora_B" in key]
    modules, zero = ({module_of(key) for key in found} for found in (keys, (k for k in keys if not weights[k].any())))
    idle = sorted(name for name in zero if not was_untaught(name, card))
    if not idle:
        return []
    text = f"LoRA A or B is zero in {len(idle)} of {len(modules)} modules, which have no effect: {naming(idle)}"
    return [Finding(CHECK, "failed", text, _RETRAIN)]


def _logit_change(model: PeftModel, batch: Batch) -> tuple[float, float]:
    """The adapter's change of the logits (float32: the maximum; else the mean), and the minimum, as in training."""
    adapted = probe_logits(model, batch)
    with model.disable_adapter():
        plain = probe_logits(model, batch)
    gaps = [(adapted[key] - plain[key]).abs() for key in adapted if adapted[key].numel()]
    half = base_of(model).dtype in (torch.bfloat16, torch.float16)
    moved = max((gap.mean() if half else gap.max()).item() for gap in gaps)
    return moved, MARGIN * TOLERANCE["bfloat16" if half else "float32"]


def _loaded(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter's tensors under the names that peft saves them with."""
    return dict(get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu(), b.to(a.dtype))
