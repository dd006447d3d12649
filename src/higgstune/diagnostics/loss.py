"""Check of the untouched base's loss on the data, compared with that on data that was corrupted on purpose.

The loss alone says little: with an unknown voice a base may only reach chance on the first codebook. But its loss must
be lower than that of the same data with the codebooks in another order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from higgstune.batch.collate import pack, tensors_to
from higgstune.batch.dataset import PLAIN, Rendering, row_example
from higgstune.data.store import Row
from higgstune.diagnostics.data import shortened
from higgstune.diagnostics.report import Finding
from higgstune.families import family_of
from higgstune.families.base import Prompter, Spec, base_of
from higgstune.kernels.loss import add_sums, label_counts
from higgstune.training.metrics import IMPOSSIBLE_CODE_LOSS

CHECK = "loss"
HIGH = 6.0  # nats per code; released bases are lower on familiar speech
MARGIN = 1.0  # above chance; an unfamiliar voice stays below it, codes of another codec do not
CLEAR = 0.1  # nats: a smaller difference is noise
_BATCH = 4

PerCodebook = tuple[float, ...]


@dataclass(frozen=True)
class DataLoss:
    """Nats per code for each codebook: of the data, and of the same rows after corruption."""

    real: PerCodebook
    rolled: PerCodebook  # each codebook's codes in the next codebook
    undelayed: PerCodebook  # codebook k shifted k frames ahead
    swapped: PerCodebook | None  # each row with the transcript of another; None if there are not two


def check_loss(model: Any, prompter: Prompter, rows: Sequence[Row], rendering: Rendering = PLAIN) -> list[Finding]:
    """Measure and judge the base's audio loss on some rows."""
    loss = measure_loss(model, prompter, rows, rendering)
    return judge_loss(loss, math.log(_spec(model).classes), untrained=never_trained(model), rows=len(rows))


def measure_loss(model: Any, prompter: Prompter, rows: Sequence[Row], rendering: Rendering = PLAIN) -> DataLoss:
    """Teacher-forced losses of a base without adapter, in eval mode; stream EOS codes are not counted."""
    cut = [shortened(row) for row in rows]
    swapped = _with_other_transcripts(cut)

    def corrupt(change: Callable[[np.ndarray], np.ndarray]) -> list[Row]:
        return [replace(row, codes=change(row.codes)) for row in cut]

    def measure(corrupted: Sequence[Row]) -> PerCodebook:
        return _loss(model, prompter, corrupted, rendering)

    return DataLoss(
        real=measure(cut),
        rolled=measure(corrupt(lambda codes: np.roll(codes, 1, axis=1))),
        undelayed=measure(corrupt(_undelayed)),
        swapped=measure(swapped) if swapped else None,
    )


def judge_loss(loss: DataLoss, chance: float, *, untrained: bool, rows: int) -> list[Finding]:
    """Findings from the losses; `untrained`: the weights look untrained."""
    real, rolled = _mean(loss.real), _mean(loss.rolled)
    text = (
        f"{real:.2f} nats per code on {rows} rows (by codebook {' '.join(f'{value:.1f}' for value in loss.real)}; "
        f"chance {chance:.2f}); with the codebooks in another order {rolled:.2f}"
    )
    if not math.isfinite(real):
        return [Finding(CHECK, "failed", f"the loss is {real}", "see the findings on the checkpoint's weights")]
    if untrained or (rolled - real < CLEAR and real <= chance + MARGIN):
        return [Finding(CHECK, "warning", f"{text}: the model does not know these codes", _RANDOM_WEIGHTS)]
    if real < IMPOSSIBLE_CODE_LOSS:
        return [Finding(CHECK, "failed", f"{text}: unseen audio cannot be predicted this well", _TOO_GOOD)]
    # The loss alone is not enough: a small base can be above chance on a voice or on prompts with a reference that it
    # was not trained on. If the order of the codebooks matters, the codes are those of its codec.
    if rolled - real < CLEAR or (real > chance + MARGIN and rolled - real < MARGIN):
        return [Finding(CHECK, "failed", f"{text}: the codes are not those of the model's codec", _WRONG_CODES)]
    return _judge_structure(loss, chance, text)


def never_trained(model: Any) -> bool:
    """Whether every norm is still 1, its initial value."""
    norms = [weight for name, weight in base_of(model).named_parameters() if name.rpartition(".")[0].endswith("norm")]
    return bool(norms) and all(bool((weight == 1).all()) for weight in norms)


def _judge_structure(loss: DataLoss, chance: float, text: str) -> list[Finding]:
    real = _mean(loss.real)
    if real - _mean(loss.undelayed) > CLEAR:
        text += f", with codebook k shifted k frames ahead {_mean(loss.undelayed):.2f}"
        return [Finding(CHECK, "failed", f"{text}: the stored codes already have a delay", _DELAYED)]
    odd = [
        k
        for k, (here, moved) in enumerate(zip(loss.real, loss.rolled, strict=True))
        if here > chance + MARGIN and here > moved - CLEAR
    ]
    if odd:
        named = ", ".join(map(str, odd))
        return [Finding(CHECK, "failed", f"{text}: codebooks {named} are in the wrong place", _WRONG_CODES)]
    findings = []
    if real > HIGH:
        findings.append(Finding(CHECK, "warning", f"{text}: high", _HIGH_ADVICE))
    else:
        findings.append(Finding(CHECK, "ok", text))
    if loss.swapped is not None and real > _mean(loss.swapped):
        other = f"with the transcripts of other rows it is {_mean(loss.swapped):.3f}, with their own {real:.3f}"
        findings.append(Finding(CHECK, "warning", f"{other}: the words make no difference", _WORDS_ADVICE))
    return findings


_RANDOM_WEIGHTS = (
    "these look like random weights: a miniature for tests, or an empty checkpoint; with the released checkpoint "
    "suspect the codes: another codec, or codebooks in another order"
)
_TOO_GOOD = (
    "suspect that the base was trained on these very clips, that the codes are constant (silence), or that the model "
    "sees its labels"
)
_WRONG_CODES = (
    "suspect that the store was encoded by another codec, that codebooks were put in another order, or another base: "
    "prepare the data again with the checkpoint's own codec"
)
_DELAYED = "codes must be stored without the delay pattern, which training adds: prepare the data again"
_HIGH_ADVICE = (
    "normal for unfamiliar speech (a new language, an unusual voice, a poor codec); with a familiar voice and "
    "language, suspect noise, a wrong sample rate or shifted codes: listen to decoded rows"
)
_WORDS_ADVICE = (
    "normal for a language that the base does not know; otherwise suspect that texts and recordings do not match: "
    "look at some rows with `higgstune inspect`"
)


def _loss(model: Any, prompter: Prompter, rows: Sequence[Row], rendering: Rendering) -> PerCodebook:
    family_of(model).pack_forward(model)
    device = next(model.parameters()).device
    eos = _spec(model).stream_eos
    parts, counts = [], []
    for start in range(0, len(rows), _BATCH):
        batch = pack([row_example(prompter, row, "none", rendering) for row in rows[start : start + _BATCH]])
        counts.append(label_counts(batch, eos_id=eos))
        with torch.no_grad():
            sums = model(**tensors_to(batch, device))
        parts.append({key: sums[key].double().cpu() for key in ("audio_loss", "audio_eos_loss")})
    total, entries = add_sums(parts), add_sums(counts)
    codes: Tensor = (entries["audio"] - entries["audio_eos"]).clamp(min=1)
    return tuple(((total["audio_loss"] - total["audio_eos_loss"]) / codes).tolist())


def _spec(model: Any) -> Spec:
    return family_of(model).spec(base_of(model).config)


def _undelayed(codes: np.ndarray) -> np.ndarray:
    """[frames, K] with codebook k shifted k frames ahead, which removes a delay pattern."""
    return np.stack([np.roll(codes[:, k], -k) for k in range(codes.shape[1])], axis=1)


def _with_other_transcripts(rows: Sequence[Row]) -> list[Row]:
    """Rows with the transcript of the next one; empty if all are the same."""
    spoken = [row for row in rows if row.messages is None]
    if len(spoken) < len(rows) or len({row.text for row in spoken}) < 2:
        return []
    return [replace(row, text=other.text) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
