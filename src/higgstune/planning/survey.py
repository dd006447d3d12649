"""What a plan needs to know of a recipe's checkpoint, data and machine; no weight, codec or encoder is loaded."""

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from higgstune.batch.collate import Packed, pack
from higgstune.batch.dataset import Rendering, RowExamples
from higgstune.batch.packing import Pack, PackSampler
from higgstune.codec import CODEC_FOLDER, CODEC_PREFIX
from higgstune.config.recipe import Recipe, Stage
from higgstune.data.whisper_features import FeatureIndex
from higgstune.environment import choose_device, free_memory
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import family_in, load_family
from higgstune.families.base import Conditioning, Family, Prompter, Spec, WhisperSpec
from higgstune.hub import fetch
from higgstune.kernels.attention import SHORT_SEGMENT
from higgstune.model.load import load_tokenizer
from higgstune.planning.training_data import TrainingData, check_families

MARGIN = 0.05  # of the memory, which `gradient_checkpointing: auto` leaves free
_MAX_CLIPS = 200_000  # in the packs of all epochs after the first
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Survey:
    """A recipe's checkpoint and data, from their small files."""

    folder: Path
    family: Family
    is_plain: bool  # transformers reads the folder itself, and maps its weight file
    config: Any
    builtin_extensions: Conditioning  # of the checkpoint
    trained: Conditioning  # with those that the recipe adds
    data: TrainingData
    prompter: Prompter
    rendering: Rendering

    @cached_property
    def spec(self) -> Spec:
        """The numbers of the checkpoint."""
        return self.family.spec(self.config)

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of the checkpoint's tensors by stored dtype, of the files on this machine; without its codec."""
        return stored_bytes(self.folder, lambda name: not name.startswith(CODEC_PREFIX))

    @property
    def codec_bytes(self) -> int:
        """Bytes in float32 of a codec in the checkpoint's folder, or in its weight files."""
        widths = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
        found = stored_bytes(self.folder / CODEC_FOLDER)
        found = found or stored_bytes(self.folder, lambda name: name.startswith(CODEC_PREFIX))
        return sum(4 * size // widths.get(dtype, 4) for dtype, size in found.items())


def survey_recipe(recipe: Recipe) -> Survey:
    """Read the small files of a recipe's checkpoint and data.

    Raises CheckpointError, DataError or ConfigError for files that are missing or do not match.
    """
    folder = fetch(recipe.model.checkpoint, what="checkpoint", revision=recipe.model.revision, weights=False)
    info, kind, _ = family_in(folder)
    family = load_family(info)
    config = family.read_config(folder)
    data = TrainingData.open(recipe)
    check_families(recipe, data.stores)
    prompter = family.prompter(load_tokenizer(folder, family, config), config)
    features = shape = None
    if recipe.model.whisper is not None:
        features = data.features(recipe.model.whisper)
        shape = whisper_spec(features.index, prompter, folder)
    builtin_extensions = family.extensions.written(folder)
    attention = bool(recipe.model.audio_attention) or builtin_extensions.audio_attention
    trained = Conditioning(audio_attention=attention, whisper=shape)
    is_plain = kind == family.export.layouts[0]
    return Survey(
        folder,
        family,
        is_plain,
        config,
        builtin_extensions,
        trained,
        data,
        prompter,
        Rendering(recipe.data.reference, features),
    )


def whisper_spec(index: FeatureIndex, prompter: Prompter, checkpoint: str | Path) -> WhisperSpec:
    """The encoder of stored features, as a model of `checkpoint` reads them. Raises CheckpointError if it cannot."""
    token_id = prompter.whisper_token_id
    if token_id is None:
        raise CheckpointError(
            f"the tokenizer of {checkpoint} has no token for Whisper features: leave out model.whisper"
        )
    return WhisperSpec(
        checkpoint=index.checkpoint, revision=index.revision, d_model=index.d_model, chunk_frames=index.chunk_frames,
        token_id=token_id,
    )  # fmt: skip


def stored_bytes(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, int]:
    """Bytes of the tensors in a folder's safetensors files by dtype, from their headers; `wanted` by their names."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__" and wanted(name):
                start, end = entry["data_offsets"]
                found[entry["dtype"]] = found.get(entry["dtype"], 0) + end - start
    return found


def dtype_of(recipe: Recipe, device: str) -> torch.dtype:
    """The base's dtype on a device of this kind: `auto` is bfloat16 on a GPU. The device need not be available."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(recipe.model.dtype, torch.bfloat16 if device == "cuda" else torch.float32)


@dataclass(frozen=True)
class Packs:
    """The packs of a stage's first epoch, and the batches of any epoch that may take the most memory."""

    lengths: NDArray[np.int64]  # [examples], in tokens
    packs: list[Pack]
    candidates: list[Packed]

    @property
    def tokens(self) -> list[int]:
        """The number of tokens of each pack."""
        return [int(self.lengths[pack].sum()) for pack in self.packs]


def packs_of(
    survey: Survey, recipe: Recipe, stage: Stage, *, split: str = "train", saves_probabilities: bool
) -> Packs | None:
    """The packs that the trainer will make; None for a split without rows.

    `saves_probabilities`: attention in short segments saves its probabilities for the backward pass, as in float32.
    """
    rows = row_examples(survey, stage, split)
    if not len(rows):
        return None
    lengths = rows.lengths()
    sampler = PackSampler(lengths, stage.pack_size, seed=recipe.seed if split == "train" else None)
    first = sampler.packs(0)
    epochs = stage.epochs or math.ceil((stage.max_steps or 1) / steps_of(stage, len(first)))
    every = [
        made for epoch in range(min(math.ceil(epochs), 1 + _MAX_CLIPS // len(rows))) for made in sampler.packs(epoch)
    ]

    def packed(indices: Pack) -> Packed:
        return pack([rows[i] for i in indices], share_prefix=recipe.lora.dropout == 0)

    shared = packed(max(every, key=len))["shared_at"].shape[1]
    pair = _pair_cost(survey.spec) if saves_probabilities else 0.0
    candidates = _peak_candidates(every, lengths, shared, pair)
    return Packs(lengths, first, [packed(indices) for indices in candidates])


def _peak_candidates(packs: Sequence[Pack], lengths: NDArray[np.int64], shared: int, pair: float) -> list[Pack]:
    """The pack with the highest estimate of memory, and others that have clearly more of one of its parts.

    All clips but one share the hidden states of their first `shared` tokens. `pair`: the memory of a pair of tokens in
    a short segment, in hidden states.
    """
    tokens = np.array([lengths[made].sum() for made in packs])
    rows = tokens - shared * (np.array([len(made) for made in packs]) - 1)
    of_clips = np.where(lengths <= SHORT_SEGMENT, lengths, 0) ** 2
    pairs = pair * np.array([of_clips[made].sum() for made in packs])
    found: list[int] = []
    for measure, clearly in ((rows + pairs, 0.0), (rows, 1.02), (tokens, 1.02), (pairs, 1.1)):
        largest = int(measure.argmax())
        if all(measure[largest] > clearly * measure[other] for other in found):
            found.append(largest)
    return [packs[index] for index in found]


def _pair_cost(base: Spec) -> float:
    """Activations of a pair of tokens relative to those of a token in a float32 layer, roughly.

    A layer saves a probability for each head and half of the pairs.
    """
    heads = base.heads + 2 * base.key_value_heads
    of_a_token = 4 * base.hidden_size + 3 * base.intermediate_size + 2 * heads * base.head_dim
    return base.heads / 2 / of_a_token


def steps_of(stage: Stage, packs: int) -> int:
    """Optimizer steps of an epoch with this number of packs."""
    return math.ceil(math.ceil(packs / processes()) / stage.gradient_accumulation)


def processes() -> int:
    """The number of processes of the run that this process belongs to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def row_examples(survey: Survey, stage: Stage, split: str) -> RowExamples:
    """The examples of a split, with the stage's labels."""
    return RowExamples(survey.data.rows(split), survey.prompter, stage.text_targets, survey.rendering)


@dataclass(frozen=True)
class Machine:
    """The planned device."""

    kind: DeviceKind
    memory: int | None  # bytes for training; None: the device is not available, and --memory was not given
    available: bool

    def usable(self) -> int | None:
        """Bytes that `auto` may use."""
        return None if self.memory is None else int((1 - MARGIN) * self.memory)


def machine_for(recipe: Recipe, *, memory: int | None = None, device: str | None = None) -> Machine:
    """The recipe's device, or one of another kind; its memory is `memory` or, on this machine, what is free.

    Raises ConfigError for an unknown or unavailable device.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose cpu or cuda")
    here = device is None or device == "cpu" or torch.cuda.is_available()
    kind = choose_device(device or recipe.model.device).type if here else "cuda"
    assert kind in ("cpu", "cuda")
    if memory is None and here:
        memory = free_memory(torch.device(kind)) + (psutil.Process().memory_info().rss if kind == "cpu" else 0)
    return Machine("cuda" if kind == "cuda" else "cpu", memory, here)


def parse_memory(text: str) -> int:
    """Bytes of a size such as `16GB`, `15.5 GiB` or `800MB`.

    Raises ConfigError for anything else, also for a number without a unit, which some mean as gigabytes.
    """
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiMmTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--memory {text}: write a number with MB, GB, MiB or GiB, such as 16GB") from None
    if not 0 < size < math.inf:
        raise ConfigError(f"--memory {text}: write a size above zero")
    return int(size)
