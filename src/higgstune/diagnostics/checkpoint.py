"""Checks of a checkpoint: files, config, weights and rotary buffers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from higgstune.checkpoint_files import FILES, check_checksums, folder_card
from higgstune.diagnostics.report import Finding, naming
from higgstune.families import family_of
from higgstune.families.base import Family, Layout, base_of
from higgstune.kernels.quantize import dequantized

CHECK = "checkpoint"
ROTARY = "rotary"
_COPY = "copy or download the checkpoint again"


def check_tensors(layout: Layout, family: Family, config: Any) -> list[Finding]:
    """Check that the files have all tensors of the model, with the config's shapes. Reads only headers."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in family.build(config).state_dict().items()}
    found = family.checks.tensor_shapes(layout)
    missing = sorted(expected.keys() - found.keys())
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    extra = sorted(key for key in found.keys() - expected.keys() if not family.checks.is_optional(key))
    findings = []
    if missing:
        text = family.checks.missing_text(missing)
        text = text or f"{len(missing)} of {len(expected)} tensors are missing: {naming(missing)}"
        findings.append(Finding(CHECK, "failed", f"{layout.folder}: {text}", _COPY))
    if wrong:
        key = wrong[0]
        text = f"{len(wrong)} tensors do not have the shape that config.json requires, such as {key}"
        text += f": {found[key]}, not {expected[key]}"
        findings.append(Finding(CHECK, "failed", f"{layout.folder}: {text}", "use the config.json of these weights"))
    if extra:
        text = f"{len(extra)} tensors do not belong to the model and are ignored: {naming(extra)}"
        advice = f"is it a checkpoint of {family.info.title}?"
        findings.append(Finding(CHECK, "warning", f"{layout.folder}: {text}", advice))
    if not missing and not wrong:
        text = f"{layout.folder}: {layout.kind} layout, all {len(expected)} tensors are present"
        if extension := sum(map(family.extensions.owns, found)):
            text += f", and {extension} of its extensions"
        findings.append(Finding(CHECK, "ok", text))
    return findings


def check_config(family: Family, config: Any) -> list[Finding]:
    """Check that the config's ids of special tokens and codes are consistent."""
    problems = family.checks.config_problems(config)
    if not problems:
        return [Finding(CHECK, "ok", "the special ids of config.json are consistent")]
    return [Finding(CHECK, "failed", f"config.json: {'; '.join(problems)}", "use the config.json of these weights")]


def check_recorded_checksums(folder: Path) -> list[Finding]:
    """Check the checksums of weight files that Higgstune wrote. Raises CheckpointError if one differs."""
    recorded = folder_card(folder).get(FILES)
    if not recorded:
        return []
    check_checksums(folder)
    return [Finding(CHECK, "ok", f"{len(recorded)} weight files have their recorded checksums")]


def check_weights(model: Any) -> list[Finding]:
    """Check that weights are finite, none is all zero, and no pathway is a copy of the other."""
    owns = family_of(model).extensions.owns
    broken, zero = [], []
    for name, weight in base_of(model).named_parameters():
        # NaN makes both bounds NaN; in 4 bits it makes all of a weight NaN, through the mean of its scales.
        low, high = (bound.item() for bound in torch.aminmax(dequantized(weight).detach()))
        if not (low > -torch.inf and high < torch.inf):
            broken.append(name)
        elif low == high == 0 and not (owns(name) or name.endswith(".bias")):  # an extension begins as an identity
            zero.append(name)
    findings = []
    if broken:
        text = f"{len(broken)} tensors have NaN or infinity: {naming(broken)}"
        findings.append(Finding(CHECK, "failed", text, f"{_COPY}; a training run or a merge may have written it"))
    if zero:
        text = f"{len(zero)} tensors are zero throughout: {naming(zero)}"
        findings.append(Finding(CHECK, "failed", text, f"{_COPY}: the model cannot work with them"))
    if not broken:
        findings += _check_copies(base_of(model))
    return findings or [Finding(CHECK, "ok", "all weights are finite, none is zero throughout")]


def check_rotary(model: Any) -> list[Finding]:
    """Check the rotary buffers against the config's frequencies, computed in float32 on the CPU."""
    config, checks = base_of(model).config, family_of(model).checks
    expected, rotary = checks.frequencies(config), checks.rotary(model)
    problems = []
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(rotary, name, None)
        if problem := _buffer_problem(buffer, expected):
            problems.append(f"{name} {problem}")
    if not problems:
        return [Finding(ROTARY, "ok", f"{len(expected)} frequencies ({rotary.rope_type}) match the config, in float32")]
    return [
        Finding(
            ROTARY,
            "failed",
            f"rotary_emb: {'; '.join(problems)}: the model sees wrong positions",
            "cast with `dtype` when loading, not the loaded model with .to(); reload it with load_model",
        )
    ]


def check_stored_rotary(layout: Layout, family: Family, config: Any) -> list[Finding]:
    """Check that the config has rotary parameters, which match any stored rotary buffers."""
    written = {**layout.config, **(layout.config.get("text_config") or {})}
    if not any(written.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")):
        text = f"{layout.folder / 'config.json'} has no rope_parameters: default frequencies are used"
        return [Finding(ROTARY, "warning", text, "use the config.json that the weights were trained with")]
    stored = [(file, key) for file in layout.weights for key in _keys(file) if key.endswith("rotary_emb.inv_freq")]
    expected = family.checks.frequencies(config)
    for file, key in stored:
        with safe_open(file, "pt") as weights:
            buffer = weights.get_tensor(key).float()
        if buffer.shape != expected.shape or not torch.allclose(buffer, expected, rtol=0.01):
            text = f"{file}: {key} has other frequencies than rope_parameters in config.json"
            return [Finding(ROTARY, "failed", text, "use the config.json that the weights were trained with")]
    return []


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _check_copies(model: Any) -> list[Finding]:
    """Warn of tensors that are copies of others, although training would have made them differ."""
    pairs = family_of(model).checks.could_be_copies(model)
    copies = [name for name, a, b in pairs if a.data_ptr() == b.data_ptr() or torch.equal(a, b)]
    if not copies:
        return []
    text = f"{len(copies)} tensors are copies of another part of the model: {naming(copies)}"
    advice = "untrained or copied parts speak badly: is it the released checkpoint, converted completely?"
    return [Finding(CHECK, "warning", text, advice)]


def _buffer_problem(buffer: Tensor | None, expected: Tensor) -> str | None:
    if buffer is None:
        return "is missing"
    if buffer.dtype != torch.float32:
        return f"is {str(buffer.dtype).removeprefix('torch.')}, not float32"
    found = buffer.detach().cpu()
    if not torch.isfinite(found).all():
        return "has NaN or infinity"
    if found.shape != expected.shape:
        return f"has {len(found)} frequencies, not {len(expected)}"
    gap = ((found - expected).abs() / expected).max().item()
    return f"differs from the config's frequencies by up to {100 * gap:.2g} %" if gap > 1e-5 else None
