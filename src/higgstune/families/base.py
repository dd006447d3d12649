"""The interface of a model family: the protocols that its code implements, and the types that they share.

Nothing outside `families/` names a model class, a special token, a module path or a number of codebooks. Other code
calls the family, which is looked up once, by the `model_type` of a checkpoint: see `families`. dev/new_family.md
explains how to add one.

Letters in shapes: S tokens, A audio frames after the delay pattern, K codebooks, V classes of a codebook with its
stream BOS and EOS, B clips, T frames, W Whisper features.
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
from higgstune.data.rules import NORMALIZED, TextRules
from higgstune.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from higgstune.codec.whisper_encoder import WhisperTower
    from higgstune.families.rows import RowSampler

TRAINS_TABLE = "+audio_embedding"  # after the kind of a stage
TextTargets = Literal["transcript", "assistant", "none"]
Codes = NDArray[Any]
Audio = Codes | WhisperFeatures  # replaces the placeholder of an audio part


@dataclass(frozen=True)
class Example:
    """One conversation as tokens, audio frames and labels. Labels are not shifted."""

    prompt: str  # as rendered, with one placeholder for each audio
    input_ids: NDArray[np.int64]  # [S]
    audio_mask: NDArray[np.bool_]  # [S] True for an audio frame
    audio_input_ids: NDArray[np.int64]  # [A, K]
    text_labels: NDArray[np.int64]  # [S]
    audio_labels: NDArray[np.int64]  # [A, K]
    whisper_features: NDArray[np.float16] | None = None  # [W, d_model]; None without Whisper
    feature_positions: NDArray[np.int64] | None = None  # [W] indices of the features in `input_ids`

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Spec:
    """The numbers of a checkpoint that code outside the family needs."""

    num_codebooks: int  # K
    codes: int  # of a codebook, without stream BOS and EOS
    classes: int  # V
    stream_bos: int
    stream_eos: int
    extra_rows: int  # a clip of T frames has T + extra_rows audio frames after the delay pattern
    pad_id: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int

    def card(self) -> dict[str, int]:
        """The part that an adapter's card records, so that a wrong base is recognised before peft fails on a tensor."""
        return {
            "hidden_size": self.hidden_size, "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate_size, "vocab_size": self.vocab_size,
            "num_codebooks": self.num_codebooks, "codebook_size": self.classes,
        }  # fmt: skip


class WhisperSpec(BaseModel):
    """The Whisper encoder whose features a model's projector reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str  # as named by the user
    revision: str  # of the encoder's weights: equal revisions give equal features
    d_model: int
    chunk_frames: int  # features of a whole chunk, one token each: 750 for 30 s
    token_id: int  # of the placeholder that the features replace


class Conditioning(BaseModel):
    """The extensions of a model beyond its plain class; false if there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    audio_attention: bool = False
    whisper: WhisperSpec | None = None

    def __bool__(self) -> bool:
        return self.audio_attention or self.whisper is not None


@dataclass(frozen=True)
class Batching:
    """How examples become batches (see `batch.collate`, which knows no family)."""

    pad: "Callable[[Sequence[Example]], Mapping[str, Tensor]]"
    pack: Callable[[Sequence[Example]], Mapping[str, Any]]


@dataclass(frozen=True)
class GoldenCheck:
    """One comparison with what a reference implementation computed."""

    name: str
    tolerance: float  # 0: everything must be equal
    difference: Callable[[], float]  # computes the largest one; raises HiggstuneError where values do not compare


@dataclass(frozen=True)
class LoraTargets:
    """The layers that an adapter trains."""

    pattern: str  # a regular expression over full module paths
    in_full: tuple[str, ...] = ()  # names of modules that are trained in full (peft's `modules_to_save`)


def check_vocabulary(tokenizer: Any, config: Any, folder: Path) -> None:
    """Raise CheckpointError for a tokenizer with more tokens than the model."""
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            "tokenizer and weights are not of the same checkpoint"
        )


class Prompter(Protocol):
    """Turns conversations into examples: the same tokens in training and, up to the target, in generation."""

    tokenizer: Any
    whisper_token_id: int | None  # of the placeholder that Whisper features replace; None without one

    def example(
        self,
        messages: Sequence[Message],
        audio: Sequence[Audio],
        *,
        text_targets: TextTargets = "none",
        target_from: int | None = None,
    ) -> Example:
        """A training example. `audio` has the audio parts in order; the assistant messages from `target_from` on are
        the targets (None: the last message).

        Raises DataError if placeholders and audio do not match or no target is left.
        """
        ...

    def prompt(self, messages: Sequence[Message], audio: Sequence[Audio]) -> Example:
        """The prompt for the next speech, without labels."""
        ...

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Audio]]]) -> list[int]:
        """The number of tokens of each conversation's example. Only the shape of codes matters."""
        ...


@dataclass(frozen=True)
class Pathway:
    """What rows of one kind, text or audio, pass in a layer beside the attention that all share."""

    norm: "nn.Module"  # before attention
    mlp_norm: "nn.Module"
    mlp: "nn.Module"  # gated by silu: gate_proj, up_proj, down_proj


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer."""

    attention: "nn.Module"  # q_proj, k_proj, v_proj, o_proj; and q_norm and k_norm, where heads are normed
    text: Pathway
    audio: Pathway  # the same object in a model with one pathway


@dataclass(frozen=True)
class DecoderParts:
    """The modules with which a model speaks, for an engine with a forward of its own (see `generate.stack`)."""

    layers: Sequence[LayerParts]
    norm: "nn.Module"
    rotary: "nn.Module"  # of transformers
    embed_text: "Callable[[Tensor], Tensor]"  # ids [...] -> [..., D]
    embed_rows: "Callable[[Tensor], Tensor]"  # rows [..., K] -> [..., D]
    head: "nn.Module"  # a linear layer or a table with a `weight` [K * V, D], and nothing else


class Decoder(Protocol):
    """The model's own forward as a side of generation, for models without `DecoderParts`, and for several processes:
    the KV cache of a batch of prompts, extended row by row.
    """

    logits: "Tensor | None"  # [B, K, V] of the first row; None if the sampler gives that row

    def step(self, rows: "Tensor") -> "Tensor":
        """Feed one row [B, K]; the logits [B, K, V] of the next one."""
        ...


@dataclass(frozen=True)
class FamilyInfo:
    """What is known about a family without its code, which imports torch and transformers."""

    name: str  # as artefacts keep it: transformers' model_type
    title: str  # for people
    model_types: Mapping[str, str]  # model_type of a config.json -> the layout of such a folder
    stage_kinds: Mapping[str, str]  # kinds of a stage -> what they train
    text_targets: tuple[TextTargets, ...]  # supported by its prompts; the first labels the most
    extensions: tuple[str, ...]  # supported settings of `model` in a recipe
    check_recipe: Callable[[Any], Iterator[tuple[str, str]]]  # recipe -> (path of a field, problem)
    code: str  # the module with the family's `FAMILY`
    prompts: str | None = None  # a module with a `read_prompter` that imports no torch (see `families.read_prompter`)
    stage_defaults: Mapping[str, Any] = field(default_factory=dict)  # override defaults of a stage in a recipe
    speech_licence: str | None = None  # that binds generated speech, which then carries its origin
    texts: TextRules = NORMALIZED
    audio_embedding: bool = False  # whether a stage may train the table of audio codes, which is also the head
    wordless_reference: bool = False  # a reference in a turn of its own needs no transcript
    continues_speech: bool = True  # a piece of a long text may follow a reference and the piece before it


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder: its family, its layout (one of the family's), its config as written, its weight files."""

    folder: Path
    family: FamilyInfo
    kind: str  # a value of `FamilyInfo.model_types`
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    keys: frozenset[str]

    @property
    def bytes(self) -> int:
        """The size of its weight files."""
        return sum(path.stat().st_size for path in self.weights)


class Family(Protocol):
    """One model family. `model` is always a loaded model of the family, or a peft model around one."""

    info: FamilyInfo
    extensions: "Extensions"
    export: "Export"
    checks: "Checks"
    lora_patterns: tuple[str, ...]  # every `LoraTargets.pattern` that `lora_targets` returns
    trainable: tuple[str, ...]  # modules of the plain class that a stage may train in full; they compute in float32
    four_bits: str  # a regular expression over full module paths: the linear layers that a 4-bit base quantizes

    def read_config(self, folder: Path) -> Any:
        """The configuration of a checkpoint folder, from config.json alone. Raises CheckpointError."""
        ...

    def spec(self, config: Any) -> Spec:
        """The numbers of a configuration."""
        ...

    def architecture(self, config: Any) -> dict[str, Any]:
        """What of a configuration decides ids and logits, as JSON: the same in every layout and dtype."""
        ...

    def plain_name(self, name: str) -> str:
        """A parameter's name in any layout, without a leading `model.` -> its name in the plain model."""
        ...

    def check_tokenizer(self, tokenizer: Any, config: Any, folder: Path) -> None:
        """Raises CheckpointError if tokenizer and configuration are not of the same checkpoint."""
        ...

    def build(self, config: Any, *, layers: int | None = None, dtype: "torch.dtype | None" = None) -> Any:
        """A model without loaded weights, on the current device (`torch.device("meta")`: names and shapes alone), with
        its first `layers` layers (None: all).
        """
        ...

    def load(self, layout: Layout, config: Any, dtype: "torch.dtype") -> "tuple[Any, WhisperTower | None]":
        """The model on the CPU, and the Whisper encoder of its folder, if any. Raises CheckpointError."""
        ...

    def prompter(self, tokenizer: Any, config: Any) -> Prompter:
        """Raises CheckpointError for a tokenizer that cannot give character offsets."""
        ...

    def decoder(self, model: Any, prompts: Sequence[Example]) -> Decoder:
        """Run prompts of unequal lengths through the model, as the start of generation."""
        ...

    def decoder_parts(self, model: Any) -> DecoderParts | None:
        """The model's modules for the engine; None for an architecture that only its own forward computes."""
        ...

    def sampler(self, spec: Spec, slots: int, device: "torch.device") -> "RowSampler":
        """The rows of as many clips."""
        ...

    def pack_forward(self, model: Any) -> Any:
        """Make the model's forward take packed batches (see `batch.collate.pack`) and return sums of losses, in place.

        Raises CheckpointError for an architecture that the packed layers do not support.
        """
        ...

    def layers(self, model: Any) -> "nn.ModuleList":
        """The decoder layers, in order."""
        ...

    def final_norm(self, model: Any) -> "nn.Module":
        """The norm between the layers and the heads."""
        ...

    def lora_targets(self, kind: str, conditioning: Conditioning, attention: str) -> LoraTargets:
        """The layers that a stage of this kind trains; `attention` says how audio attention is trained (lora, full).
        With `TRAINS_TABLE` after the kind, also the table of audio codes, in full.
        """
        ...

    def label_logits(
        self, model: Any, batch: "Mapping[str, Tensor]", limit: int, gathered: "AbstractContextManager[None]"
    ) -> "dict[str, Tensor]":
        """Logits for the first `limit` labels of each kind of a padded batch: `audio_logits` [M, K * V] and
        `text_logits` [N, vocab]. Weights outside the layers are used only within `gathered`.
        """
        ...


class Extensions(Protocol):
    """Extensions of a family's models beyond their plain class. A family without any uses `NoExtensions`."""

    def written(self, folder: Path) -> Conditioning:
        """The extensions in a checkpoint folder, by its config.json. Raises CheckpointError."""
        ...

    def of(self, model: Any) -> Conditioning:
        """The extensions of a model."""
        ...

    def builtin(self, model: Any) -> Conditioning:
        """The extensions that came with the checkpoint, trained; the weights of others follow from the base."""
        ...

    def add(self, model: Any, wanted: Conditioning) -> None:
        """Add the extensions that the model lacks, in place; they change no logit yet."""
        ...

    def remove(self, model: Any) -> None:
        """Remove all extensions, in place."""
        ...

    def owns(self, key: str, of: Conditioning | None = None) -> bool:
        """Whether a parameter belongs to an extension; with `of`, to one of these."""
        ...

    def modules(self, model: Any) -> list[str]:
        """Full names of the extensions' modules, in order."""
        ...


class NoExtensions:
    """The extensions of a family that has none."""

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
        """Nothing to remove."""

    def owns(self, key: str, of: Conditioning | None = None) -> bool:
        """No parameter belongs to an extension."""
        return False

    def modules(self, model: Any) -> list[str]:
        """None."""
        return []


class Export(Protocol):
    """How a family's models are written for others."""

    layouts: tuple[str, ...]  # the plain class reads the first; the last keeps every extension
    formats: Mapping[str, str]  # names for users -> layouts
    descriptions: Mapping[str, str]  # layout, or "peft" -> a description of such a folder for its card
    libraries: Mapping[str, str]  # layout, or "peft" -> the library that loads it
    licence_note: str  # a paragraph of the card
    licence_name: str  # of the card's `license_name`

    def check_base(self, base: Layout) -> None:
        """Raises CheckpointError for a base without files that its licence makes every derivative carry."""
        ...

    def write(
        self, folder: Path, model: Any, kind: str, *, base: Layout, tokenizer: Any, tower: "WhisperTower | None"
    ) -> None:
        """Write config and weights in a layout. Raises CheckpointError for what the layout cannot express."""
        ...

    def chat_template(self) -> str | None:
        """The chat template for a written folder whose base has none."""
        ...

    def usage(self, kind: str, *, base: str, dtype: str, bits: int | None) -> str | None:
        """How other software loads a folder (a layout, or "peft" on `base`), in Markdown; `bits` of bitsandbytes."""
        ...


class Checks(Protocol):
    """The doctor's part of a family."""

    control_tokens: tuple[str, ...]  # of the prompt: each must be one token
    prompt_end: str  # the last token of a prompt for generation

    def tensor_shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """The model's names of tensors -> their shapes, from the headers of the weight files."""
        ...

    def is_optional(self, key: str) -> bool:
        """Whether the weight files may hold this tensor although the plain model lacks it."""
        ...

    def missing_text(self, missing: Sequence[str]) -> str | None:
        """An explanation of a known set of missing tensors."""
        ...

    def config_problems(self, config: Any) -> list[str]:
        """Contradictions in a configuration."""
        ...

    def frequencies(self, config: Any) -> "Tensor":
        """The inverse rotary frequencies [head_dim / 2], float32. Raises CheckpointError for an unknown kind."""
        ...

    def rotary(self, model: Any) -> "nn.Module":
        """The module with those frequencies, one of transformers' rotary embeddings."""
        ...

    def could_be_copies(self, model: Any) -> "Iterator[tuple[str, Tensor, Tensor]]":
        """Pairs of tensors that differ in a trained checkpoint, each with a phrase that names the pair."""
        ...

    def untaught(self, module: str, layers: int) -> str | None:
        """The field of a stage (a loss weight) without which a module gets no gradient, or None."""
        ...

    def golden(self, folder: Path, layout: Layout, tokenizer: Any, batching: Batching) -> Iterator[GoldenCheck]:
        """The comparisons with golden values in a folder, whose checkpoint has this layout and tokenizer; none for a
        family without such folders. Raises CheckpointError.
        """
        ...

    def render(self, messages: Sequence[Message], *, generation: bool) -> str | None:
        """The prompt that the checkpoint's chat template should write for a conversation; None without a template."""
        ...


def base_of(model: Any) -> Any:
    """The model itself, or the one inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
