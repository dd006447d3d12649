"""Comparison of this installation with golden values: what reference code computed with a checkpoint beside them."""

from collections.abc import Iterator
from pathlib import Path

from higgstune.batch.collate import PaddedCollator, pack
from higgstune.diagnostics.report import Finding
from higgstune.errors import CheckpointError, ConfigError, HiggstuneError
from higgstune.families import load_family, read_layout
from higgstune.families.base import Batching, GoldenCheck
from higgstune.model.load import load_tokenizer

CHECK = "golden"
CHECKPOINT = "checkpoint"  # the sub-folder
_ADVICE = "do not train or speak with this installation: use the tested versions of torch and transformers"


def checks_in(folder: Path) -> Iterator[GoldenCheck]:
    """The comparisons for a folder. Raises CheckpointError for one without a checkpoint or values."""
    if not (folder / CHECKPOINT).is_dir():
        raise CheckpointError(f"{folder} has no folder {CHECKPOINT}: name a folder of golden values")
    layout = read_layout(folder / CHECKPOINT)
    family = load_family(layout.family)
    config = family.read_config(layout.folder)
    tokenizer = load_tokenizer(layout.folder, family, config)
    checks = list(
        family.checks.golden(folder, layout, tokenizer, Batching(PaddedCollator.of(family.spec(config)), pack))
    )
    if not checks:
        raise ConfigError(f"{family.info.title} has no golden values that a folder could hold")
    return iter(checks)


def compare(check: GoldenCheck) -> list[Finding]:
    """One finding, with the largest difference."""
    try:
        difference = check.difference()
    except HiggstuneError as error:
        return [Finding(CHECK, "failed", f"{check.name}: {error}", _ADVICE)]
    text = f"{check.name}: largest difference {difference:.2g}, allowed {check.tolerance:g}"
    if difference <= check.tolerance:  # false for NaN
        return [Finding(CHECK, "ok", text)]
    return [Finding(CHECK, "failed", text, _ADVICE)]
