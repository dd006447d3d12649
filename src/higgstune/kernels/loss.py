"""The losses: sums over label entries, and how sums become one number.

A label entry is one label of one head: a text token, or one codebook of an audio frame. A forward returns sums, never
means, so that an optimizer step can divide by the number of label entries in all its micro-batches on all ranks: k
accumulated batches of b clips then equal one batch of k * b clips.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from higgstune.kernels import IGNORE

Sums = dict[str, Tensor]

_MAX_LOGITS = 2**26  # in memory at a time: 256 MiB in float32


@dataclass(frozen=True)
class LossWeights:
    """How the losses of one stage are combined."""

    text: float = 1.0
    audio: float = 1.0
    codebooks: Sequence[float] | None = None  # relative weight of each codebook; None: all equal


def head_sums(hidden: Tensor, weight: Tensor, targets: Tensor, *, eos_id: int | None = None) -> Sums:
    """Score the logits of hidden states [M, D] against targets [M, K], in float32 and one piece at a time.

    weight [K * V, D] has K heads with V classes each. Per head [K]: loss and hits over all label entries; with
    `eos_id`, also the loss over its entries. Logits are never kept: the backward pass recomputes those of a piece.
    """
    pieces = max(1, _MAX_LOGITS // len(weight))
    parts = [
        checkpoint(_piece_sums, *piece, weight, eos_id, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(hidden.split(pieces), targets.split(pieces), strict=True)
    ]
    return add_sums(parts)


def _piece_sums(hidden: Tensor, targets: Tensor, weight: Tensor, eos_id: int | None) -> Sums:
    logits = F.linear(hidden, weight).float().view(targets.numel(), len(weight) // targets.shape[1])
    flat = targets.flatten()
    loss = F.cross_entropy(logits, flat, reduction="none", ignore_index=IGNORE).view(targets.shape)
    hits = (logits.detach().argmax(dim=-1) == flat).view(targets.shape)
    sums = {"loss": loss.sum(0), "hits": hits.sum(0).float()}
    if eos_id is not None:
        sums["eos_loss"] = (loss.detach() * (targets == eos_id)).sum(0)
    return sums


def label_counts(batch: Mapping[str, Tensor], *, eos_id: int) -> Sums:
    """The number of label entries of a batch: `audio` [K], `audio_eos` [K] and `text` []; int64."""
    targets = batch["audio_targets"]
    return {
        "audio": (targets != IGNORE).sum(0),
        "audio_eos": (targets == eos_id).sum(0),
        "text": torch.full((), batch["text_targets"].numel(), device=targets.device),  # a fill: no copy to wait for
    }


def zero_sums(codebooks: int, device: torch.device) -> tuple[Sums, Sums]:
    """Sums and counts of zero, to add to."""
    sums = {key: torch.zeros(codebooks, device=device) for key in ("audio_loss", "audio_eos_loss", "audio_hits")}
    sums |= {key: torch.zeros((), device=device) for key in ("text_loss", "text_hits")}
    counts = {key: torch.zeros(codebooks, dtype=torch.long, device=device) for key in ("audio", "audio_eos")}
    return sums, counts | {"text": torch.zeros((), dtype=torch.long, device=device)}


def add_sums(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Sums or counts of equal shapes, added up by key."""
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}


def combine(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """Sums and counts -> the loss: text weight x token mean + audio weight x weighted mean over codebooks.

    Each codebook counts by its token mean, so that chance scores ln(codebook size), 6.93 for 1026.
    """
    per_codebook = sums["audio_loss"] / counts["audio"].clamp(min=1)
    if weights.codebooks is None:
        audio = per_codebook.mean()
    else:
        shares = zip(weights.codebooks, per_codebook.unbind(), strict=True)
        audio = torch.stack([share * value for share, value in shares]).sum() / sum(weights.codebooks)
    text = sums["text_loss"] / counts["text"].clamp(min=1)
    return weights.text * text + weights.audio * audio
