"""What both miniatures share: tables that training sees as maps, words as tokens, and what a family has to offer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from higgstune.families.base import Prompter, TextTargets

BASE_VOICE = "hibari"
SHIFTED_VOICE = "other"  # of `fit_codec.py encode --shift`: each clip has a voice of its own
MAX_VOCABULARY = 4096


class Miniature(Protocol):
    """A module `tools/demo/FAMILY.py`: what the training of a base needs to know of a family."""

    TEXT_TARGETS: TextTargets
    ROWS_BEFORE: int  # delayed rows of an audio part before code 0

    def build_tokenizer(self, texts: Sequence[str]) -> Any: ...

    def build_model(self, tokenizer: Any) -> Any: ...

    def start_from(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Give a fresh model what fits of another family's miniature."""

    def open_base(self, folder: Path) -> tuple[Any, Any]:
        """Tokenizer and model that `save` wrote, the model in float32."""

    def save(self, model: Any, tokenizer: Any, out: Path) -> None:
        """Write the checkpoint in bfloat16, with plain tables."""

    def prompter(self, tokenizer: Any, model: Any) -> Prompter: ...

    def scene(self, voice: str, index: int, in_context: bool) -> tuple[str, bool]:
        """The scene of a clip, and whether its first frames have no loss."""

    def context_share(self, voice: str) -> float:
        """The share of a voice's batches whose clips have an earlier one of the voice before them."""

    def tables(self, model: Any) -> list[nn.Module]:
        """The modules whose weight has a row for each class of each codebook."""

    def audio_weight(self, model: Any) -> Tensor:
        """Of the audio head [K, V, D]; of the V classes the last two begin and end a codebook."""

    def text_logits(self, model: Any, hidden: Tensor) -> Tensor: ...

    def embed(self, model: Any, text_ids: Tensor, audio_ids: Tensor) -> Tensor:
        """Ids [T] and delayed rows [A, K] -> [T + A, D]"""

    def queries_keys_values(self, layer: Any, hidden: Tensor, text: int) -> list[Tensor]:
        """[N, D], of which the first `text` are text -> three of [N, heads, d], before rotation"""

    def feed_forward(self, layer: Any, hidden: Tensor, text: int) -> Tensor: ...


def words_as_tokens(texts: Sequence[str], prompts: str, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE with a token for each word of `texts` and of `prompts`."""
    words = {word.strip(".,?") for text in [*texts, prompts] for word in text.split()}
    # Each word equally often, inside a sentence and capitalised at its beginning: merging ends when each is one token.
    forms = [f" {word}" for word in words] + [word[0].upper() + word[1:] for word in words if word[0].isalpha()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sorted(forms) * 2, prompts, prompts, "\n\n"], trainer)
    return tokenizer


class CodeGeometry(nn.Module):
    """A parametrization: maps [K, features, D] -> rows [K * (codes + 2), D], one for each code, BOS and EOS."""

    def __init__(self, codebooks: Tensor) -> None:
        """codebooks: the code vectors [K, codes, components]."""
        super().__init__()
        scaled = codebooks / codebooks.std(dim=1, keepdim=True)
        squares = scaled.pow(2).mean(dim=-1, keepdim=True) - 1
        vectors = torch.cat([scaled, squares, torch.ones_like(squares)], dim=-1)
        features = torch.zeros(len(codebooks), codebooks.shape[1] + 2, vectors.shape[-1] + 2)
        features[:, :-2, :-2] = vectors
        features[:, -2, -2] = features[:, -1, -1] = 1.0
        self.register_buffer("features", features, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.features @ maps).flatten(0, 1)

    def right_inverse(self, rows: Tensor) -> Tensor:
        return torch.linalg.pinv(self.features) @ rows.unflatten(0, self.features.shape[:2])


class Sounds(nn.Module):
    """A parametrization of the text embeddings: [V, D] -> [V, D] with a linear map of each token's phonemes added."""

    PLACES = 10

    def __init__(self, sounds: Sequence[str], width: int) -> None:
        """sounds: the phonemes of each token, empty where it is not a word."""
        super().__init__()
        alphabet = {c: i for i, c in enumerate(sorted({c for word in sounds for c in word}))}
        features = torch.zeros(len(sounds), 2 * self.PLACES + 1, len(alphabet))
        for token, word in enumerate(sounds):
            for place, c in enumerate(word[: self.PLACES]):
                features[token, place, alphabet[c]] = 1  # from the beginning
            for place, c in enumerate(word[::-1][: self.PLACES]):
                features[token, self.PLACES + place, alphabet[c]] = 1  # from the end
            for c in word:
                features[token, -1, alphabet[c]] = 1
        self.register_buffer("features", features.flatten(1), persistent=False)
        self.map = nn.Parameter(torch.randn(self.features.shape[1], width) * 0.01)

    def forward(self, own: Tensor) -> Tensor:
        return own + self.features @ self.map

    def right_inverse(self, rows: Tensor) -> Tensor:
        return rows - self.features @ self.map
