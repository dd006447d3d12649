"""What a recipe names, read as far as a plan needs it: no weight, no codec, no encoder is loaded."""

import json
import math
import os
import struct
from collections.abc import Sequence
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
from higgstune.codec import CODEC_FOLDER
from higgstune.config.recipe import Recipe, Stage
from higgstune.environment import choose_device
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import family_in, load_family
from higgstune.families.base import Conditioning, Family, Prompter, Spec, WhisperSpec
from higgstune.hub import fetch
from higgstune.kernels.attention import SHORT_SEGMENT
from higgstune.model.load import load_tokenizer
from higgstune.planning.training_data import TrainingData, check_families

_CLIPS = 200_000  # of all epochs together whose packs are made, the first epoch apart


@dataclass(frozen=True)
class Survey:
    """A recipe's checkpoint and data, from their small files."""

    folder: Path
    family: Family
    is_plain: bool  # transformers itself reads the folder, and takes its file as it lies
    config: Any
    own: Conditioning  # what the checkpoint brings
    trained: Conditioning  # with what the recipe adds
    data: TrainingData
    prompter: Prompter
    rendering: Rendering

    @cached_property
    def spec(self) -> Spec:
        """The numbers of the checkpoint."""
        return self.family.spec(self.config)

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of the checkpoint's tensors by their stored dtype, as far as its files are here."""
        return stored_bytes(self.folder)

    @property
    def codec_bytes(self) -> int:
        """Of a codec that lies in the checkpoint's folder; computed in float32."""
        widths = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
        return sum(4 * size // widths.get(dtype, 4) for dtype, size in stored_bytes(self.folder / CODEC_FOLDER).items())


@dataclass(frozen=True)
class Packs:
    """The packs of a stage's first epoch, and those of its epochs of which one takes the most memory."""

    lengths: NDArray[np.int64]  # positions of each example
    packs: list[Pack]
    heaviest: list[Packed]

    @property
    def positions(self) -> list[int]:
        """Of each pack."""
        return [int(self.lengths[pack].sum()) for pack in self.packs]


def survey(recipe: Recipe) -> Survey:
    """Raises CheckpointError, DataError or ConfigError for what is missing or does not fit."""
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
        index, token_id = features.index, prompter.whisper_token_id
        if token_id is None:
            raise CheckpointError(
                f"the tokenizer in {folder} has no token for Whisper features: leave out model.whisper"
            )
        shape = WhisperSpec(
            checkpoint=index.checkpoint, revision=index.revision, d_model=index.d_model,
            chunk_frames=index.chunk_frames, token_id=token_id,
        )  # fmt: skip
    own = family.extensions.written(folder)
    attention = bool(recipe.model.audio_attention) or own.audio_attention
    trained = Conditioning(audio_attention=attention, whisper=shape)
    is_plain = kind == family.export.layouts[0]
    return Survey(
        folder, family, is_plain, config, own, trained, data, prompter, Rendering(recipe.data.reference, features)
    )


def packs_of(
    seen: Survey, recipe: Recipe, stage: Stage, *, split: str = "train", keeps_probabilities: bool
) -> Packs | None:
    """The packs that the trainer will make, of the first epochs; None for a split without rows.

    `keeps_probabilities`: whether attention does so in runs that are short, as in float32.
    """
    rows = row_examples(seen, stage, split)
    if not len(rows):
        return None
    lengths = rows.lengths()
    sampler = PackSampler(lengths, stage.pack_size, seed=recipe.seed if split == "train" else None)
    first = sampler.packs(0)
    epochs = stage.epochs or math.ceil((stage.max_steps or 1) / steps_of(stage, len(first)))
    every = [made for epoch in range(min(math.ceil(epochs), 1 + _CLIPS // len(rows))) for made in sampler.packs(epoch)]

    def packed(indices: Pack) -> Packed:
        return pack([rows[i] for i in indices], share_prefix=recipe.lora.dropout == 0)

    shared = packed(max(every, key=len))["shared_at"].shape[1]
    pair = _weight_of_a_pair(seen.spec) if keeps_probabilities else 0.0
    heaviest = _heaviest(every, lengths, shared, pair)
    return Packs(lengths, first, [packed(indices) for indices in heaviest])


def steps_of(stage: Stage, packs: int) -> int:
    """Optimizer steps of an epoch of so many packs."""
    return math.ceil(math.ceil(packs / processes()) / stage.gradient_accumulation)


def processes() -> int:
    """Of the run that this process belongs to."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _heaviest(packs: Sequence[Pack], lengths: NDArray[np.int64], shared: int, pair: float) -> list[Pack]:
    """The pack that seems to keep the most, and others only where they have clearly more of what may weigh.

    `shared` positions of all clips but one have no hidden state. `pair`: what a pair of positions in a short run weighs
    against a hidden state.
    """
    positions = np.array([lengths[made].sum() for made in packs])
    rows = positions - shared * (np.array([len(made) for made in packs]) - 1)
    of_clips = np.where(lengths <= SHORT_SEGMENT, lengths, 0) ** 2
    pairs = pair * np.array([of_clips[made].sum() for made in packs])
    found: list[int] = []
    for measure, clearly in ((rows + pairs, 0.0), (rows, 1.02), (positions, 1.02), (pairs, 1.1)):
        most = int(measure.argmax())
        if all(measure[most] > clearly * measure[other] for other in found):
            found.append(most)
    return [packs[index] for index in found]


def _weight_of_a_pair(base: Spec) -> float:
    """Of what a layer keeps in float32, roughly: a probability of half of all pairs by head, against one position's."""
    heads = base.heads + 2 * base.key_value_heads
    of_a_position = 4 * base.hidden_size + 3 * base.intermediate_size + 2 * heads * base.head_dim
    return base.heads / 2 / of_a_position


def row_examples(seen: Survey, stage: Stage, split: str) -> RowExamples:
    """The examples of a split, as the stage labels them."""
    return RowExamples(seen.data.rows(split), seen.prompter, stage.text_targets, seen.rendering)


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors in a folder's safetensors files by dtype, from their headers."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[entry["dtype"]] = found.get(entry["dtype"], 0) + end - start
    return found


def dtype_of(recipe: Recipe, device: str) -> torch.dtype:
    """The dtype that the base will have on a device that may not be here: `auto` is bfloat16 on a GPU."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(recipe.model.dtype, torch.bfloat16 if device == "cuda" else torch.float32)


DeviceKind = Literal["cpu", "cuda"]
MARGIN = 0.05  # of the memory: a plan that `auto` makes leaves it free


@dataclass(frozen=True)
class Machine:
    """The device that is planned for."""

    kind: DeviceKind
    memory: int | None  # bytes that training may take; None: the device is not here, and nobody said
    at_hand: bool

    def usable(self) -> int | None:
        """Bytes that a plan may fill."""
        return None if self.memory is None else int((1 - MARGIN) * self.memory)


def machine_for(recipe: Recipe, *, memory: int | None = None, device: str | None = None) -> Machine:
    """The device of the recipe, or another kind that is planned for; its memory is the given one, or what is free.

    Raises ConfigError for a device that cannot be.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device}: a plan is for cpu or cuda")
    here = device is None or device == "cpu" or torch.cuda.is_available()
    kind = choose_device(device or recipe.model.device).type if here else "cuda"
    assert kind in ("cpu", "cuda")
    if memory is None and here:
        memory = free_memory(torch.device(kind)) + (psutil.Process().memory_info().rss if kind == "cpu" else 0)
    return Machine("cuda" if kind == "cuda" else "cpu", memory, here)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with what this process holds and does not use, or in RAM."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def parse_memory(text: str) -> int:
    """`16GB`, `15.5 GiB`, `800MB`. Raises ConfigError, also without a unit: 16 is meant as gigabytes by some."""
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiMmTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--memory {text}: write a number with MB, GB, MiB or GiB, such as 16GB") from None
    if not 0 < size < math.inf:
        raise ConfigError(f"--memory {text}: it must be more than nothing")
    return int(size)
