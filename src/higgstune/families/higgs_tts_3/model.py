"""The model: `Qwen3Model` of transformers and one table that embeds rows of codes and predicts them.

Letters in shapes: B clips, S tokens, K codebooks, V classes of a codebook with BOC and EOC, D hidden size.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, Qwen3Config, Qwen3Model

# transformers 5.24 has another name for the cache that a call extends.
CACHE = "cache" if "cache" in signature(Qwen3Model.forward).parameters else "past_key_values"


class HiggsTTS3Config(Qwen3Config):
    """Qwen3's, with the numbers of the audio table."""

    model_type = "higgs_multimodal_qwen3"
    num_codebooks: int = 8
    codebook_size: int = 1026  # V

    @property
    def boc_id(self) -> int:
        """Of a row before a codebook begins; EOC is the next one. config.json has neither."""
        return self.codebook_size - 2


class HiggsTTS3(PreTrainedModel):
    """Reads text and rows of codes, and predicts rows. The codec of its checkpoint is not a part of it."""

    config_class = HiggsTTS3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Qwen3DecoderLayer"]  # noqa: RUF012 (as in transformers)

    def __init__(self, config: HiggsTTS3Config) -> None:
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.audio_table = nn.Embedding(config.num_codebooks * config.codebook_size, config.hidden_size)
        self.post_init()

    def forward(self, *, attention_mask: Tensor, position_ids: Tensor, cache: Cache, **batch: Any) -> Tensor:
        """Logits [B, K, V] of the row that follows a left-padded batch, or one row [B, 1, K] of `audio_input_ids` each.

        Decoders call it, not its parts: where weights are spread over processes, calls of the whole gather them.
        """
        embedded = self.embed_padded(batch) if "input_ids" in batch else self.embed_rows(batch["audio_input_ids"])
        hidden = self.model(
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state
        config: Any = self.config
        return self.audio_logits(hidden[:, -1]).unflatten(-1, (config.num_codebooks, config.codebook_size))

    def embed_rows(self, rows: Tensor) -> Tensor:
        """Rows [..., K] -> embeddings [..., D]: the plain sum over codebooks, in the dtype of the text's."""
        config: Any = self.config
        first = torch.arange(config.num_codebooks, device=rows.device) * config.codebook_size
        return self.audio_table(rows + first).sum(-2).to(self.model.embed_tokens.weight.dtype)

    def embed(self, input_ids: Tensor, audio_mask: Tensor, rows: Tensor) -> Tensor:
        """Ids [..., S], whose places in `audio_mask` take the rows [A, K] in their order -> [..., S, D]."""
        embedded = self.model.embed_tokens(input_ids.masked_fill(audio_mask, 0))
        return embedded.masked_scatter(audio_mask[..., None], self.embed_rows(rows)) if len(rows) else embedded

    def embed_padded(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A padded batch (`left_padded`, or of `PaddedCollator`) -> its embeddings [B, S, D]."""
        input_ids: Tensor = batch["input_ids"]
        config: Any = self.config
        rows = input_ids.new_zeros((0, config.num_codebooks))
        if "audio_input_ids" in batch:
            rows = batch["audio_input_ids"][batch["audio_input_ids_mask"]]
        return self.embed(input_ids, input_ids < 0, rows)  # ids below 0 are slots: no token has one

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., D] -> [..., K * V]."""
        weight = self.audio_table.weight
        return F.linear(hidden.to(weight.dtype), weight)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocabulary], by the text embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight)
