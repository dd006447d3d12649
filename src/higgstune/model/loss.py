"""The losses: sums over labelled cells, and how sums become one number.

A forward returns sums, never means, so that an optimizer step can divide by the number of labelled cells in all its
micro-batches on all ranks: accumulation k x b is then exactly one batch of k * b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from higgstune.prompt.delay import IGNORE

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class LossWeights:
    """How the losses of one stage are put together."""

    text: float = 1.0
    audio: float = 1.0
    codebooks: Sequence[float] | None = None  # relative weight of each codebook; None: all equal


def audio_sums(logits: Tensor, targets: Tensor, *, eos_id: int) -> Sums:
    """logits [M, K, V] and targets [M, K] -> per codebook [K]: loss and hits over all cells, and over EOS cells apart.

    Computed in float32. Source of the rules: boson_multimodal's per-codebook cross entropy (golden `base`).
    """
    loss = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORE)
    is_eos = targets == eos_id
    hits = (logits.argmax(dim=-1) == targets).float()
    return {
        "audio_loss": loss.sum(0),
        "audio_eos_loss": (loss * is_eos).sum(0).detach(),
        "audio_hits": hits.sum(0).detach(),
    }


def text_sums(logits: Tensor, targets: Tensor) -> Sums:
    """logits [N, vocab] and targets [N] -> scalars: loss and hits over the labelled text positions, in float32."""
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)
    return {"text_loss": loss, "text_hits": (logits.argmax(dim=-1) == targets).float().sum().detach()}


def label_counts(batch: Mapping[str, Tensor], *, eos_id: int) -> Sums:
    """How many cells of a batch are labelled: `audio` [K], `audio_eos` [K] and `text` []; int64."""
    targets = batch["audio_targets"]
    return {
        "audio": (targets != IGNORE).sum(0),
        "audio_eos": (targets == eos_id).sum(0),
        "text": torch.tensor(batch["text_targets"].numel(), device=targets.device),
    }


def zero_sums(codebooks: int, device: torch.device) -> tuple[Sums, Sums]:
    """Sums and counts of no label at all, to add to."""
    sums = {key: torch.zeros(codebooks, device=device) for key in ("audio_loss", "audio_eos_loss", "audio_hits")}
    sums |= {key: torch.zeros((), device=device) for key in ("text_loss", "text_hits")}
    counts = {key: torch.zeros(codebooks, dtype=torch.long, device=device) for key in ("audio", "audio_eos")}
    return sums, counts | {"text": torch.zeros((), dtype=torch.long, device=device)}


def add_sums(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Key by key sum of equal-shaped sums or counts."""
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}


def combine(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Sums and counts -> the loss: text weight x token mean + audio weight x weighted mean over codebooks.

    Each codebook counts by its token mean, so that chance scores ln(codebook size), 6.93 for 1026.
    """
    per_codebook = sums["audio_loss"] / counts["audio"].clamp(min=1)
    if weights.codebooks is None:
        audio = per_codebook.mean()
    else:
        shares = torch.tensor(weights.codebooks, dtype=per_codebook.dtype, device=per_codebook.device)
        audio = (per_codebook * shares).sum() / shares.sum()
    text = sums["text_loss"] / counts["text"].clamp(min=1)
    return weights.text * text + weights.audio * audio
