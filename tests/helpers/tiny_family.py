"""A second model family, for tests alone: what nothing outside of `families/` may know is different in it.

One pathway; one audio table for embeddings and head; no text loss; a prompt of three tokens; a delay pattern without
start and stop rows, in which the prompt's last token predicts the first row and codebook 0 alone ends a clip.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tiny_checkpoint import tiny_tokenizer
from tiny_runs import DEMO_CODEC
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from higgstune.checkpoint_files import read_json, read_weights
from higgstune.data.messages import Message, content_parts
from higgstune.errors import DataError
from higgstune.families.base import (
    Conditioning,
    Example,
    FamilyInfo,
    Layout,
    LoraTargets,
    NoExtensions,
    Spec,
    TextTargets,
    base_of,
)
from higgstune.families.padded import left_padded
from higgstune.families.rows import RowSampler
from higgstune.kernels.attention import Segments, attend
from higgstune.kernels.fused import Order, feed_forward, gather, linear, linears, rms_norm, scatter
from higgstune.kernels.loss import IGNORE, Sums, head_sums

CODEBOOKS, CODES = 8, 1024
BOS, EOS, CLASSES = CODES, CODES + 1, CODES + 2
TEXT, SPEECH, SLOT = "<|begin_of_text|>", "<|audio_out_bos|>", "<|AUDIO_OUT|>"

INFO = FamilyInfo(
    name="tiny_speech",
    title="Tiny Speech",
    model_types={"tiny_speech": "native"},
    stage_kinds={"voice": "LoRA on all layers"},
    text_targets=("none",),
    extensions=(),
    check_recipe=lambda recipe: iter(()),
    code="tiny_family",
    stage_defaults={"kind": "voice", "text_targets": "none", "text_weight": 0.0},
)


class TinyConfig(LlamaConfig):
    """Llama's."""

    model_type = "tiny_speech"


class TinySpeech(PreTrainedModel):
    """A Llama that reads and predicts rows of codes through one table."""

    config_class = TinyConfig
    compiler_stance = None

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.audio_table = nn.Embedding(CODEBOOKS * CLASSES, config.hidden_size)
        self.post_init()

    def embed_rows(self, rows: Tensor) -> Tensor:
        """[..., K] -> [..., D]."""
        return self.audio_table(rows + CLASSES * torch.arange(CODEBOOKS, device=rows.device)).sum(-2)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K * V]."""
        return hidden @ self.audio_table.weight.T


class PackedLayer(LlamaDecoderLayer):
    """Llama's layer, which also takes a packed sequence [P, D]."""

    def forward(self, hidden_states: Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if segments is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention: Any = self.self_attn
        parts = linears(
            rms_norm(hidden_states, self.input_layernorm), [attention.q_proj, attention.k_proj, attention.v_proj]
        )
        q, k, v = [part.unflatten(-1, (-1, attention.head_dim)) for part in parts]
        hidden_states = hidden_states + linear(
            attend(q, k, v, segments, attention.scaling).flatten(1), attention.o_proj
        )
        return hidden_states + feed_forward(rms_norm(hidden_states, self.post_attention_layernorm), self.mlp)


class PackedTinySpeech(TinySpeech):
    """Whose forward takes packs."""

    def forward(
        self, *, text_ids: Tensor, audio_ids: Tensor, position_ids: Tensor, to_sequence: Tensor, from_sequence: Tensor,
        shared_at: Tensor, lengths: tuple[int, ...], audio_lengths: tuple[int, ...], audio_positions: Tensor,
        audio_targets: Tensor, text_positions: Tensor, text_targets: Tensor,
    ) -> Sums:  # fmt: skip
        order = Order(to_sequence, from_sequence, shared_at)
        embedded = torch.cat((self.model.embed_tokens(text_ids), self.embed_rows(audio_ids)))
        hidden = scatter(embedded, order)
        cos, sin = (part[0] for part in self.model.rotary_emb(hidden, position_ids[None]))
        segments = Segments.of(lengths, (cos, sin))
        for layer in self.model.layers:
            hidden = layer(hidden, segments=segments)
        hidden = self.model.norm(gather(hidden, order))
        audio = head_sums(hidden.index_select(0, audio_positions), self.audio_table.weight, audio_targets, eos_id=EOS)
        none = hidden.new_zeros(())
        return {**{f"audio_{key}": value for key, value in audio.items()}, "text_loss": none, "text_hits": none}


def delay(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, K] -> rows and their labels, [T + K - 1, K]."""
    frames = len(codes)
    row, codebook = np.indices((frames + CODEBOOKS - 1, CODEBOOKS))
    frame = row - codebook
    rows = np.where(frame < 0, BOS, EOS)
    inside = (frame >= 0) & (frame < frames)
    rows[inside] = codes[frame[inside], codebook[inside]]
    return rows, np.where(frame < 0, IGNORE, rows)


class TinyPrompter:
    """Text, speech, text, speech: nothing between them, and no system or scene."""

    whisper_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text, self.speech, self.slot = tokenizer.convert_tokens_to_ids([TEXT, SPEECH, SLOT])

    def example(
        self, messages: Sequence[Message], audio: Sequence[Any], *, text_targets: TextTargets = "none",
        target_from: int | None = None,
    ) -> Example:  # fmt: skip
        return self._expand(messages, audio, len(messages) - 1 if target_from is None else target_from)

    def prompt(self, messages: Sequence[Message], audio: Sequence[Any]) -> Example:
        return self._expand(messages, audio, len(messages))

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Any]]]) -> list[int]:
        zeros = [(messages, [np.zeros_like(codes) for codes in audio]) for messages, audio in conversations]
        return [len(self.example(*conversation)) for conversation in zeros]

    def _expand(self, messages: Sequence[Message], audio: Sequence[Any], target_from: int) -> Example:
        ids, rows, labels, parts = [], [], [], iter(audio)
        for turn, message in enumerate(messages):
            for part in content_parts(message) if message["role"] in ("user", "assistant") else ():
                if part["type"] == "text":
                    ids += [self.text, *self.tokenizer.encode(part["text"], add_special_tokens=False), self.speech]
                    continue
                codes = next(parts, None)
                if codes is None:
                    raise DataError("a conversation has more audio parts than codes")
                row, label = delay(np.asarray(codes, dtype=np.int64))
                ids += [self.slot] * len(row)
                rows.append(row)
                labels.append(label if turn >= target_from else np.full_like(label, IGNORE))
        input_ids = np.array(ids, dtype=np.int64)
        empty = np.empty((0, CODEBOOKS), dtype=np.int64)
        return Example(
            prompt=self.tokenizer.decode(ids), input_ids=input_ids, audio_mask=input_ids == self.slot,
            audio_input_ids=np.concatenate([empty, *rows]), text_labels=np.full(len(ids), IGNORE, dtype=np.int64),
            audio_labels=np.concatenate([empty, *labels]),
        )  # fmt: skip


class TinyDecoder:
    """Embeds for Llama."""

    def __init__(self, model: Any, prompts: Sequence[Example]) -> None:
        self.model = base_of(model)
        self.cache = DynamicCache(config=self.model.config)
        batch = left_padded(prompts, pad_id=0)
        self.mask = batch["attention_mask"]
        self.lengths = self.mask.sum(-1, keepdim=True)
        self.logits = self._logits(_embedded(self.model, batch), (self.mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, rows: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.lengths)], dim=-1)
        logits = self._logits(self.model.embed_rows(rows[:, None]), self.lengths)
        self.lengths = self.lengths + 1
        return logits

    def _logits(self, embedded: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.model(
            inputs_embeds=embedded, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
        return self.model.logits(hidden[:, -1]).unflatten(-1, (CODEBOOKS, CLASSES))


def _embedded(model: TinySpeech, batch: Mapping[str, Tensor]) -> Tensor:
    """A padded batch as embeddings [B, S, D]."""
    ids = batch["input_ids"]
    embedded = model.model.embed_tokens(ids)
    if "audio_input_ids" not in batch:
        return embedded
    slot = tiny_tokenizer().convert_tokens_to_ids(SLOT)
    rows = model.embed_rows(batch["audio_input_ids"])[batch["audio_input_ids_mask"]]
    return embedded.masked_scatter((ids == slot)[..., None], rows)


class TinySampler(RowSampler):
    """Codebook 0 ends a clip, once every codebook has begun."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.frames = torch.zeros_like(self.count)

    def codes(self, slot: int) -> np.ndarray:
        frame, codebook = np.indices((int(self.frames[slot]), CODEBOOKS))
        codes = self.rows[slot].numpy()[frame + codebook, codebook]
        return np.where(codes < CODES, codes, 0)

    def _state(self) -> tuple[Tensor, ...]:
        return *super()._state(), self.frames

    def _scores(self, logits: Tensor, slots: slice) -> Tensor:
        return logits

    def _row(self, drawn: Tensor, slots: slice) -> Tensor:
        index, frames = self.count[slots], self.frames[slots]
        ends = (frames == 0) & (index >= CODEBOOKS) & ((drawn[:, 0] == EOS) | (index >= self.max_frames[slots]))
        frames = torch.where(ends, index, frames)
        self.frames[slots] = frames
        self.hit_cap[slots] |= ends & (drawn[:, 0] != EOS)
        self.finished[slots] = (frames > 0) & (index + 1 >= frames + CODEBOOKS - 1)
        return torch.where(torch.arange(CODEBOOKS) > index[:, None], BOS, drawn)


class TinyExport:
    layouts = ("native",)
    formats: Mapping[str, str] = {"native": "native"}
    descriptions: Mapping[str, str] = {"native": "A Tiny Speech checkpoint", "peft": "A LoRA adapter"}
    libraries: Mapping[str, str] = {"native": "transformers", "peft": "peft"}
    licence_note = "None."
    licence_name = "none"

    def check_base(self, base: Layout) -> None: ...

    def write(self, folder: Path, model: Any, kind: str, *, base: Layout, tokenizer: Any, tower: Any) -> None:
        model.save_pretrained(folder)

    def chat_template(self) -> None:
        return None

    def usage(self, kind: str, *, base: str, dtype: str, bits: int | None) -> None:
        return None


class TinyChecks:
    control_tokens: tuple[str, ...] = (TEXT, SPEECH, SLOT)
    prompt_end = SPEECH

    def tensor_shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for file in layout.weights:
            with safe_open(file, "pt") as weights:
                shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        return shapes

    def is_optional(self, key: str) -> bool:
        return False

    def missing_text(self, missing: Sequence[str]) -> None:
        return None

    def config_problems(self, config: Any) -> list[str]:
        return []

    def frequencies(self, config: Any) -> Tensor:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents

    def rotary(self, model: Any) -> nn.Module:
        return base_of(model).model.rotary_emb

    def could_be_copies(self, model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
        return iter(())

    def untaught(self, module: str, layers: int) -> None:
        return None

    def golden(self, folder: Path, layout: Layout, tokenizer: Any, batching: Any) -> Iterator[Any]:
        return iter(())

    def render(self, messages: Sequence[Message], *, generation: bool) -> None:
        return None


class TinyFamily:
    info = INFO
    extensions = NoExtensions()
    export = TinyExport()
    checks = TinyChecks()
    trainable = ()
    lora_patterns = (r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)",)
    four_bits = lora_patterns[0]
    decoder = TinyDecoder
    sampler = TinySampler

    def decoder_parts(self, model: Any) -> None:
        return None

    def read_config(self, folder: Path) -> TinyConfig:
        written = read_json(folder / "config.json", "a checkpoint folder needs it")
        return TinyConfig(**{key: value for key, value in written.items() if key != "model_type"})

    def spec(self, config: TinyConfig) -> Spec:
        return Spec(
            num_codebooks=CODEBOOKS, codes=CODES, classes=CLASSES, stream_bos=BOS, stream_eos=EOS,
            extra_rows=CODEBOOKS - 1, pad_id=0, layers=config.num_hidden_layers, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        )  # fmt: skip

    def architecture(self, config: TinyConfig) -> dict[str, Any]:
        return {"hidden_size": config.hidden_size, "rope_theta": config.rope_parameters["rope_theta"]}

    def plain_name(self, name: str) -> str:
        return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name

    def check_tokenizer(self, tokenizer: Any, config: Any, folder: Path) -> None: ...

    def build(self, config: TinyConfig, *, layers: int | None = None, dtype: torch.dtype | None = None) -> TinySpeech:
        if layers is not None:
            config = TinyConfig(**{**config.to_dict(), "num_hidden_layers": layers})
        return TinySpeech(config).to(dtype or torch.float32)

    def load(self, layout: Layout, config: TinyConfig, dtype: torch.dtype) -> tuple[TinySpeech, None]:
        model = TinySpeech(config)
        model.load_state_dict(read_weights(layout.weights))
        return model.to(dtype), None

    def prompter(self, tokenizer: Any, config: Any) -> TinyPrompter:
        return TinyPrompter(tokenizer)

    def pack_forward(self, model: Any) -> Any:
        base = base_of(model)
        base.__class__ = PackedTinySpeech
        for layer in base.model.layers:
            layer.__class__ = PackedLayer
        return model

    def layers(self, model: Any) -> nn.ModuleList:
        return base_of(model).model.layers

    def final_norm(self, model: Any) -> nn.Module:
        return base_of(model).model.norm

    def lora_targets(self, kind: str, conditioning: Conditioning, attention: str) -> LoraTargets:
        return LoraTargets(self.lora_patterns[0])

    def label_logits(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, gathered: AbstractContextManager[None]
    ) -> dict[str, Tensor]:
        base = base_of(model)
        with gathered:
            hidden = base.model(
                inputs_embeds=_embedded(base, batch), attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
            audio = base.logits(hidden.flatten(0, 1)[batch["audio_positions"][:limit]])
        return {"audio_logits": audio, "text_logits": audio.new_zeros((0, base.config.vocab_size))}


FAMILY = TinyFamily()


def save_tiny_family(folder: Path, seed: int = 0) -> Path:
    """A checkpoint with random weights, its tokenizer and the demo's codec."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    config = TinyConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = TinySpeech(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(DEMO_CODEC, folder / "codec")
    return folder
