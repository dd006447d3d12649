"""What the untouched base makes of the user's codes: the loss, and the same data spoiled on purpose beside it.

A number alone says little: a base that does not know a voice scores no better than chance on its first codebook. But
whatever it knows, it must like the data better than the same data with the codebooks in another order.
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
HIGH = 6.0  # nats a code: more than a released base needs for speech that it knows something of
MARGIN = 1.0  # above chance; a base on a strange voice stays below, codes of another codec do not
CLEAR = 0.1  # nats: a smaller difference is noise
_BATCH = 4

PerCodebook = tuple[float, ...]


@dataclass(frozen=True)
class DataLoss:
    """Nats per code for each codebook: of the data, and of the same rows spoiled."""

    real: PerCodebook
    rolled: PerCodebook  # each codebook's codes in the place of the next one's
    undelayed: PerCodebook  # codebook k moved k frames ahead
    swapped: PerCodebook | None  # each row with another one's transcript; None where there are no two


def check_loss(model: Any, prompter: Prompter, rows: Sequence[Row], rendering: Rendering = PLAIN) -> list[Finding]:
    """The base's audio loss on some rows, judged."""
    loss = measure_loss(model, prompter, rows, rendering)
    return judge_loss(loss, math.log(_spec(model).classes), untrained=never_trained(model), rows=len(rows))


def measure_loss(model: Any, prompter: Prompter, rows: Sequence[Row], rendering: Rendering = PLAIN) -> DataLoss:
    """Teacher-forced losses of a base without adapter, in eval mode; stream ends are not counted."""
    cut = [shortened(row) for row in rows]
    swapped = _with_other_transcripts(cut)

    def spoil(change: Callable[[np.ndarray], np.ndarray]) -> list[Row]:
        return [replace(row, codes=change(row.codes)) for row in cut]

    def measure(spoiled: Sequence[Row]) -> PerCodebook:
        return _loss(model, prompter, spoiled, rendering)

    return DataLoss(
        real=measure(cut),
        rolled=measure(spoil(lambda codes: np.roll(codes, 1, axis=1))),
        undelayed=measure(spoil(_undelayed)),
        swapped=measure(swapped) if swapped else None,
    )


def judge_loss(loss: DataLoss, chance: float, *, untrained: bool, rows: int) -> list[Finding]:
    """What the losses say; `untrained`: the weights look as if they had never been trained."""
    real, rolled = _mean(loss.real), _mean(loss.rolled)
    text = (
        f"{real:.2f} nats per code on {rows} rows (by codebook {' '.join(f'{value:.1f}' for value in loss.real)}; "
        f"chance {chance:.2f}); with the codebooks in another order {rolled:.2f}"
    )
    if not math.isfinite(real):
        return [Finding(CHECK, "failed", f"the loss is {real}", "see the findings on the checkpoint's weights")]
    if untrained or (rolled - real < CLEAR and real <= chance + MARGIN):
        return [Finding(CHECK, "warning", f"{text}: the model knows nothing of these codes", _RANDOM_WEIGHTS)]
    if real < IMPOSSIBLE_CODE_LOSS:
        return [Finding(CHECK, "failed", f"{text}: unseen audio cannot be predicted this well", _TOO_GOOD)]
    # The number alone proves nothing: a base without much learning scores above chance on a voice, or on prompts with a
    # reference, that it never met. That the order of the codebooks matters shows that the codes are its own.
    if rolled - real < CLEAR or (real > chance + MARGIN and rolled - real < MARGIN):
        return [Finding(CHECK, "failed", f"{text}: the codes are not those that the model speaks in", _WRONG_CODES)]
    return _judge_structure(loss, chance, text)


def never_trained(model: Any) -> bool:
    """Whether every norm is still exactly 1, as it is initialised: training moves them all."""
    norms = [weight for name, weight in base_of(model).named_parameters() if name.rpartition(".")[0].endswith("norm")]
    return bool(norms) and all(bool((weight == 1).all()) for weight in norms)


def _judge_structure(loss: DataLoss, chance: float, text: str) -> list[Finding]:
    real = _mean(loss.real)
    if real - _mean(loss.undelayed) > CLEAR:
        text += f", with codebook k moved k frames ahead {_mean(loss.undelayed):.2f}"
        return [Finding(CHECK, "failed", f"{text}: the stored codes carry a delay already", _DELAYED)]
    odd = [
        k
        for k, (here, moved) in enumerate(zip(loss.real, loss.rolled, strict=True))
        if here > chance + MARGIN and here > moved - CLEAR
    ]
    if odd:
        named = ", ".join(map(str, odd))
        return [Finding(CHECK, "failed", f"{text}: codebooks {named} do not belong where they are", _WRONG_CODES)]
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
    "these look like random weights: a miniature for tests, or a checkpoint that was never filled; with the released "
    "checkpoint suspect the codes: another codec, or codebooks in another order"
)
_TOO_GOOD = (
    "suspect that the base was trained on these very clips, that the codes are constant (silence), or that the model "
    "sees what it should predict"
)
_WRONG_CODES = (
    "suspect that the store was encoded by another codec, that codebooks were put in another order, or another base: "
    "prepare the data again with the checkpoint's own codec"
)
_DELAYED = "codes are stored without the delay pattern, training adds it: prepare the data again"
_HIGH_ADVICE = (
    "a base that knows nothing of such speech (a new language, a far-off voice, a poor codec) scores so; with a voice "
    "and a language that it knows, suspect noise, a wrong sample rate or shifted codes: listen to decoded rows"
)
_WORDS_ADVICE = (
    "a base that does not know the language scores so; else suspect that texts and recordings do not belong together: "
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
    """[frames, K] with codebook k moved k frames ahead: what is left of codes that carried the delay pattern."""
    return np.stack([np.roll(codes[:, k], -k) for k in range(codes.shape[1])], axis=1)


def _with_other_transcripts(rows: Sequence[Row]) -> list[Row]:
    """Rows with the transcript of the next one; none where that would change nothing."""
    spoken = [row for row in rows if row.messages is None]
    if len(spoken) < len(rows) or len({row.text for row in spoken}) < 2:
        return []
    return [replace(row, text=other.text) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
