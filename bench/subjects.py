"""What a training step is measured on, by family: the model, clips, and the padded step that the baseline takes."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import workload
from padded import collate
from torch import Tensor

from higgstune.batch.collate import PaddedCollator
from higgstune.families.base import Example, Family, base_of
from higgstune.families.higgs_tts_3.checkpoint import THETA
from higgstune.families.higgs_tts_3.delay import delay, labels_of
from higgstune.families.higgs_tts_3.family import FAMILY as TTS_3
from higgstune.families.higgs_tts_3.model import HiggsTTS3Config
from higgstune.families.higgs_tts_3.prompter import SLOT
from higgstune.families.higgs_v2.family import FAMILY as V2
from higgstune.kernels import IGNORE
from higgstune.kernels.loss import LossWeights, Sums, combine


class Subject(Protocol):
    """One family. `scale` divides width, vocabulary and codebooks of the released model alike."""

    family: Family
    config: Any
    LAYERS: int  # of the released model

    def __init__(self, scale: int, layers: int) -> None: ...

    def model(self, *, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        """With random weights, in evaluation mode."""
        ...

    def examples(self, seconds: np.ndarray, *, seed: int) -> list[Example]:
        """Training examples of utterances of these lengths, with random text and codes."""
        ...

    def padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of the baseline, with `attention_mask`, `labels` and `audio_labels`."""
        ...

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The baseline's loss of such a batch."""
        ...

    def reduced(self, sums: Sums, counts: Sums) -> Tensor:
        """The same loss from what the training forward returns."""
        ...


class HiggsV2:
    """The native class and its own loss, which computes logits for all tokens."""

    family: Family = V2
    LAYERS = 28

    def __init__(self, scale: int, layers: int) -> None:
        self.config = workload.Shape(scale, layers).config()

    def model(self, *, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        """See `Subject`."""
        return workload.random_model(self.config, dtype=dtype, device=device, seed=seed)

    def examples(self, seconds: np.ndarray, *, seed: int) -> list[Example]:
        """Labelled as with `transcript`."""
        return workload.make_examples(self.config, seconds, seed=seed)

    def padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """See `Subject`."""
        return collate(examples, self.config)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """See `Subject`."""
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def reduced(self, sums: Sums, counts: Sums) -> Tensor:
        """The native loss sums the means of codebooks."""
        return combine(sums, counts, LossWeights(audio=self.config.num_codebooks))


class HiggsTTS3:
    """`Qwen3Model`, logits of all codebooks for all tokens, and a masked loss: what public trainers compute."""

    family: Family = TTS_3
    LAYERS = 36

    def __init__(self, scale: int, layers: int) -> None:
        """Heads keep the ratio 4 : 1 of queries to keys, and their width beside the model's."""
        heads = 32 if scale == 1 else max(4, 4096 // scale // 64 // 4 * 4)
        self.config = HiggsTTS3Config(
            vocab_size=151936 // scale,
            hidden_size=2560 // scale,
            intermediate_size=9728 // scale,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            head_dim=4096 // scale // heads,
            codebook_size=max(8, 1024 // scale) + 2,
            rope_parameters={"rope_type": "default", "rope_theta": float(THETA)},
            tie_word_embeddings=True,
        )

    def model(self, *, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        """See `Subject`."""
        torch.manual_seed(seed)
        with torch.device(device):
            return TTS_3.build(self.config, dtype=dtype).eval()

    def examples(self, seconds: np.ndarray, *, seed: int) -> list[Example]:
        """Without reference, as the recipe for one voice trains; no label of text."""
        generator = np.random.default_rng(seed)
        return [self._example(round(float(length) * workload.FRAME_RATE), generator) for length in seconds]

    def _example(self, frames: int, generator: np.random.Generator) -> Example:
        config = self.config
        codes = generator.integers(0, config.boc_id, size=(frames, config.num_codebooks))
        rows = delay(codes, boc_id=config.boc_id)
        words = max(2, round(frames / workload.FRAME_RATE * workload.TOKENS_PER_SECOND))
        before, text, audio = config.vocab_size - np.arange(1, 4)  # of special tokens
        spoken = generator.integers(0, config.vocab_size - workload.SPECIAL, size=words)
        ids = np.array([before, text, *spoken, audio, *[SLOT] * len(rows)])
        return Example(
            prompt="",
            input_ids=ids,
            audio_mask=ids == SLOT,
            audio_input_ids=rows,
            text_labels=np.full(len(ids), IGNORE),
            audio_labels=labels_of(rows),
        )

    def padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """See `Subject`; `audio_labels` [B, S, K] are shifted."""
        batch = PaddedCollator.of(TTS_3.spec(self.config))(examples)
        labels = torch.full((batch["input_ids"].numel(), self.config.num_codebooks), IGNORE)
        labels[batch.pop("audio_positions")] = batch.pop("audio_targets")
        batch["labels"] = batch.pop("text_targets")
        del batch["text_positions"]
        return batch | {"audio_labels": labels.view(*batch["input_ids"].shape, -1)}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """See `Subject`."""
        base, labels = base_of(model), batch["audio_labels"]
        hidden = base.model(
            inputs_embeds=base.embed_padded(batch), attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = base.audio_logits(hidden).float().view(labels.numel(), -1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)

    def reduced(self, sums: Sums, counts: Sums) -> Tensor:
        """The mean over all labels."""
        return sums["audio_loss"].sum() / counts["audio"].sum()


SUBJECTS: dict[str, type[Subject]] = {"higgs_audio_v2": HiggsV2, "higgs_tts_3": HiggsTTS3}
