"""What every model family has in common: the page of protocol behind which a family's own code stands.

Nothing outside `families/` names a model class, a special token, a module path or a number of codebooks. It asks the
family, which is looked up once, by the `model_type` of a checkpoint: see `families`. docs/new_family.md says how to add
one.

Letters in shapes: S tokens, A audio frames after the delay pattern, K codebooks, V classes of a codebook with its
stream BOS and EOS, B clips, T frames.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from higgstune.codec.base import WhisperFeatures
from higgstune.data.messages import Message

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from higgstune.codec.whisper_encoder import WhisperTower
    from higgstune.families.sampling import Sampling

TextTargets = Literal["transcript", "assistant", "none"]
Codes = NDArray[Any]
Audio = Codes | WhisperFeatures  # what fills the place of an audio part


@dataclass(frozen=True)
class Example:
    """One conversation, expanded. Labels are not shifted."""

    prompt: str  # as rendered: each audio is one placeholder
    input_ids: NDArray[np.int64]  # [S]
    audio_mask: NDArray[np.bool_]  # [S] True where an audio frame stands
    audio_input_ids: NDArray[np.int64]  # [A, K]
    text_labels: NDArray[np.int64]  # [S]
    audio_labels: NDArray[np.int64]  # [A, K]
    whisper_features: NDArray[np.float16] | None = None  # [W, d_model]; None without Whisper
    feature_positions: NDArray[np.int64] | None = None  # [W] where the features stand in `input_ids`

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Spec:
    """The numbers of a checkpoint that everything else needs."""

    num_codebooks: int  # K
    codes: int  # of a codebook, stream BOS and EOS apart
    classes: int  # V
    stream_bos: int
    stream_eos: int
    extra_rows: int  # a clip of T frames has T + extra_rows rows
    pad_id: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int

    def card(self) -> dict[str, int]:
        """What an adapter's card keeps of its base, to recognise a wrong one before peft fails on a tensor."""
        return {
            "hidden_size": self.hidden_size, "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate_size, "vocab_size": self.vocab_size,
            "num_codebooks": self.num_codebooks, "codebook_size": self.classes,
        }  # fmt: skip


class WhisperSpec(BaseModel):
    """The Whisper encoder whose features a model's projector takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str  # as named by the user
    revision: str  # of the encoder's weights: equal revisions give equal features
    d_model: int
    chunk_frames: int  # tokens that a whole chunk expands to: 750 for 30 s
    token_id: int  # of the placeholder that the features replace


class Conditioning(BaseModel):
    """The extensions that a model carries beyond its plain class; false where there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    audio_attention: bool = False
    whisper: WhisperSpec | None = None

    def __bool__(self) -> bool:
        return self.audio_attention or self.whisper is not None


@dataclass(frozen=True)
class LoraTargets:
    """Which layers an adapter is put on."""

    pattern: str  # a regular expression over full module paths
    in_full: tuple[str, ...] = ()  # names of modules that are trained in full (peft's `modules_to_save`)


class Prompter(Protocol):
    """Turns conversations into examples: the same tokens in training and, up to the target, in generation."""

    tokenizer: Any
    whisper_token_id: int | None  # of the placeholder that Whisper features replace; None where there is none

    def example(
        self,
        messages: Sequence[Message],
        audio: Sequence[Audio],
        *,
        text_targets: TextTargets = "none",
        target_from: int | None = None,
    ) -> Example:
        """A training example. `audio` fills the audio parts in order; the assistant messages from `target_from` on are
        the targets (without it, the last message).

        Raises DataError when placeholders and audio do not match or no target is left.
        """
        ...

    def prompt(self, messages: Sequence[Message], audio: Sequence[Audio]) -> Example:
        """The prompt that asks for the next speech, without labels."""
        ...

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Audio]]]) -> list[int]:
        """The number of tokens of each conversation's example. Only the shape of codes matters."""
        ...


class RowSampler(Protocol):
    """Draws the rows of one clip, one after the other: delay pattern, start and stop."""

    rows: list[list[int]]  # so far; the first of them are given, where a family has such
    hit_cap: bool  # the frame cap ended it, not the model

    @property
    def finished(self) -> bool:
        """Whether the clip has ended."""
        ...

    def step(self, logits: "Tensor") -> list[int]:
        """Draw the next row [K] from logits [K, V] (float32, on the CPU) and append it to `rows`."""
        ...

    def codes(self) -> NDArray[np.int64]:
        """The clip [T, K]."""
        ...


class Decoder(Protocol):
    """The model's side of generation: the KV cache of a batch of prompts, fed row by row."""

    logits: "Tensor | None"  # [B, K, V] of the first row; None where the first row is given

    def step(self, rows: "Tensor") -> "Tensor":
        """Feed one row [B, K]; the logits [B, K, V] of the next one."""
        ...


@dataclass(frozen=True)
class FamilyInfo:
    """What is known of a family without its code, which brings torch and transformers."""

    name: str  # as artefacts keep it: transformers' model_type
    title: str  # for people
    model_types: Mapping[str, str]  # of a config.json -> the layout of such a folder
    stage_kinds: Mapping[str, str]  # kinds of a stage -> what they train
    text_targets: tuple[str, ...]  # that its prompts can label
    extensions: tuple[str, ...]  # settings of `model` in a recipe that it has
    check_recipe: Callable[[Any], Iterator[tuple[str, str]]]  # recipe -> (path of a field, what is wrong with it)
    code: str  # the module that has the family's `FAMILY`
    prompts: str  # the module of its `read_prompter` (see `families.read_prompter`), which brings neither
    stage_defaults: Mapping[str, Any] = field(default_factory=dict)  # of a stage in a recipe, where they are others


@dataclass(frozen=True)
class Layout:
    """A checkpoint's folder: whose it is, in which of the family's layouts, its config as written, its weight files."""

    folder: Path
    family: FamilyInfo
    kind: str  # a value of `FamilyInfo.model_types`
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    keys: frozenset[str]

    @property
    def bytes(self) -> int:
        """Of its weight files."""
        return sum(path.stat().st_size for path in self.weights)


class Family(Protocol):
    """One model family. `model` is always a loaded model of it, or a peft model around one."""

    info: FamilyInfo
    extensions: "Extensions"
    export: "Export"
    checks: "Checks"
    lora_patterns: tuple[str, ...]  # every `LoraTargets.pattern` that it gives
    four_bits: str  # a regular expression over full module paths: the linear layers that 4 bits replace

    def read_config(self, folder: Path) -> Any:
        """The configuration in a checkpoint's folder, from config.json alone. Raises CheckpointError."""
        ...

    def spec(self, config: Any) -> Spec:
        """The numbers of a configuration."""
        ...

    def check_tokenizer(self, tokenizer: Any, config: Any, folder: Path) -> None:
        """Raises CheckpointError when tokenizer and configuration are not of the same checkpoint."""
        ...

    def build(self, config: Any, *, layers: int | None = None, dtype: "torch.dtype | None" = None) -> Any:
        """A model without loaded weights, on the current device (`torch.device("meta")`: names and shapes alone), with
        as many of its layers as given.
        """
        ...

    def load(self, layout: Layout, config: Any, dtype: "torch.dtype") -> "tuple[Any, WhisperTower | None]":
        """The model on the CPU, and the Whisper encoder that its folder brings. Raises CheckpointError."""
        ...

    def prompter(self, tokenizer: Any, config: Any) -> Prompter:
        """Raises CheckpointError for a tokenizer that cannot give character offsets."""
        ...

    def decoder(self, model: Any, prompts: Sequence[Example]) -> Decoder:
        """Feed prompts of unequal lengths through the model, as the start of a generation."""
        ...

    def sampler(self, spec: Spec, sampling: "Sampling", *, max_frames: int, seed: int) -> RowSampler:
        """For one clip."""
        ...

    def pack_forward(self, model: Any) -> Any:
        """Make the model's forward take packed batches (see `batch.collate.pack`) and return sums of losses, in place.

        Raises CheckpointError for an architecture that the packed layers do not compute.
        """
        ...

    def layers(self, model: Any) -> "nn.ModuleList":
        """The decoder layers, in order."""
        ...

    def final_norm(self, model: Any) -> "nn.Module":
        """The norm between the layers and the heads."""
        ...

    def lora_targets(self, kind: str, conditioning: Conditioning, attention: str) -> LoraTargets:
        """The layers of a stage of this kind; `attention` says how audio attention is trained (lora, full)."""
        ...

    def label_logits(
        self, model: Any, batch: "Mapping[str, Tensor]", limit: int, gathered: "AbstractContextManager[None]"
    ) -> "dict[str, Tensor]":
        """Logits at the first `limit` labelled tokens of a padded batch, each kind apart: `audio_logits` [M, K * V] and
        `text_logits` [N, vocab]. Weights outside of the layers are used inside of `gathered` alone.
        """
        ...


class Extensions(Protocol):
    """What a family's models can carry beyond their plain class. `NoExtensions` is for the others."""

    def written(self, folder: Path) -> Conditioning:
        """Those that a checkpoint brings, by its config.json. Raises CheckpointError."""
        ...

    def of(self, model: Any) -> Conditioning:
        """Those that a model carries."""
        ...

    def builtin(self, model: Any) -> Conditioning:
        """Those that came with the checkpoint, trained; the weights of others follow from the base."""
        ...

    def add(self, model: Any, wanted: Conditioning) -> None:
        """Add those that the model lacks, in place; they change no logit yet."""
        ...

    def remove(self, model: Any) -> None:
        """Take all out, in place."""
        ...

    def owns(self, key: str, of: Conditioning | None = None) -> bool:
        """Whether a parameter's name is one of an extension; with `of`, of one of these."""
        ...

    def modules(self, model: Any) -> list[str]:
        """Full names of the modules that the plain class has no place for, in order."""
        ...


class NoExtensions:
    """Of a family that has none."""

    def written(self, folder: Path) -> Conditioning:
        """None."""
        return Conditioning()

    def of(self, model: Any) -> Conditioning:
        """None."""
        return Conditioning()

    builtin = of

    def add(self, model: Any, wanted: Conditioning) -> None:
        """Raises ValueError: a recipe that wants one was refused long before."""
        if wanted:
            raise ValueError(f"{type(model).__name__} takes no extension")

    def remove(self, model: Any) -> None:
        """Nothing to take out."""

    def owns(self, key: str, of: Conditioning | None = None) -> bool:
        """No parameter is one of an extension."""
        return False

    def modules(self, model: Any) -> list[str]:
        """None."""
        return []


class Export(Protocol):
    """How a family's models are written for others."""

    layouts: tuple[str, ...]  # the first is what the plain class reads, the last keeps every extension
    formats: Mapping[str, str]  # as a user names them -> layouts
    descriptions: Mapping[str, str]  # layout, or "peft" -> what such a folder is, in a sentence of its card
    libraries: Mapping[str, str]  # layout, or "peft" -> the library that loads it
    licence_note: str  # a paragraph of the card

    def write(
        self, folder: Path, model: Any, kind: str, *, base: Layout, tokenizer: Any, tower: "WhisperTower | None"
    ) -> None:
        """Config and weights of a model in a layout. Raises CheckpointError for what the layout cannot say."""
        ...

    def chat_template(self) -> str | None:
        """The template that a written folder gets where its base has none."""
        ...

    def usage(self, kind: str, *, base: str, dtype: str, bits: int | None) -> str | None:
        """How other software loads a folder (a layout, or "peft" on `base`), in Markdown; `bits` as it loads them."""
        ...


class Checks(Protocol):
    """The doctor's part of a family."""

    control_tokens: tuple[str, ...]  # of the prompt: each must be one token
    prompt_end: str  # the token that a prompt to speak ends with

    def tensor_shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Names as in the model -> shapes, from the headers of the weight files."""
        ...

    def is_optional(self, key: str) -> bool:
        """Whether a tensor that the plain model has no place for may be in its files."""
        ...

    def missing_text(self, missing: Sequence[str]) -> str | None:
        """What a set of missing tensors means, where that is known."""
        ...

    def config_problems(self, config: Any) -> list[str]:
        """What does not fit together in a configuration."""
        ...

    def frequencies(self, config: Any) -> "Tensor":
        """The inverse rotary frequencies [head_dim / 2], float32. Raises CheckpointError for an unknown kind."""
        ...

    def rotary(self, model: Any) -> "nn.Module":
        """The module that keeps them."""
        ...

    def could_be_copies(self, model: Any) -> "Iterator[tuple[str, Tensor, Tensor]]":
        """Pairs of tensors that training makes different, each with its name in a sentence."""
        ...

    def untaught(self, module: str, layers: int) -> str | None:
        """The loss weight without which nothing teaches a module: a stage's field, or None."""
        ...

    def render(self, messages: Sequence[Message], *, generation: bool) -> str | None:
        """The prompt of a conversation as text, as the checkpoint's chat template should write it; None without one."""
        ...


def base_of(model: Any) -> Any:
    """The model itself, or the one inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
