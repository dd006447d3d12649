"""What training and evaluation report, from sums and counts."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from higgstune.errors import TrainingError
from higgstune.model.loss import LossWeights, combine

# No model predicts the codes of audio it has never seen this well: real codes carry several nats each.
IMPOSSIBLE_CODE_LOSS = 0.5


def loss_metrics(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: LossWeights) -> dict[str, float]:
    """Sums and counts (see `model.loss`) -> losses in nats per cell and accuracies.

    `audio_loss` is over all labelled cells, `code_loss` over codes alone and `eos_loss` over the EOS cells.
    """
    audio, eos = counts["audio"].double(), counts["audio_eos"].double()
    loss, eos_loss = sums["audio_loss"].double(), sums["audio_eos_loss"].double()
    per_codebook = loss / audio.clamp(min=1)
    metrics = {
        "loss": combine(sums, counts, weights).item(),
        "audio_loss": per_codebook.mean().item(),
        "code_loss": ((loss - eos_loss).sum() / (audio - eos).sum().clamp(min=1)).item(),
        "eos_loss": (eos_loss.sum() / eos.sum().clamp(min=1)).item(),
        "audio_accuracy": (sums["audio_hits"].double().sum() / audio.sum().clamp(min=1)).item(),
    }
    for k, value in enumerate(per_codebook.tolist()):
        metrics[f"audio_loss_{k}"] = value
        metrics[f"audio_accuracy_{k}"] = (sums["audio_hits"][k] / counts["audio"][k].clamp(min=1)).item()
    if counts["text"].item():
        metrics["text_loss"] = (sums["text_loss"] / counts["text"]).item()
        metrics["text_accuracy"] = (sums["text_hits"] / counts["text"]).item()
    return metrics


def check_possible(code_loss: float, *, step: int) -> None:
    """Raises TrainingError when the loss on clips that were never trained on is lower than it can be."""
    if not math.isnan(code_loss) and code_loss < IMPOSSIBLE_CODE_LOSS:
        raise TrainingError(
            f"step {step}: the audio loss on the validation split is {code_loss:.3f} nats per code, below what unseen "
            f"audio allows ({IMPOSSIBLE_CODE_LOSS}). Suspect that the validation clips are in the training data "
            "(copies under other names, another cut of the same recording), that init_adapter was trained on them, "
            "or that the model sees what it should predict (a changed collator, shift or attention mask)"
        )


def last_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last losses of a stage's log: of the validation split, or, without one, of training."""
    for key in ("eval_audio_loss", "audio_loss"):
        for entry in reversed(history):
            if key in entry:
                wanted = ("audio_loss", "code_loss", "eos_loss", "text_loss", "audio_accuracy", "text_accuracy")
                prefix = key.removesuffix("audio_loss")
                return {prefix + name: entry[prefix + name] for name in wanted if prefix + name in entry}
    return {}
