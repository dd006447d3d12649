"""What a recipe's conditioning requires of the model and of the store, checked before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgstune.batch.dataset import Rendering, RowExamples
from higgstune.config.recipe import AttentionTraining, Recipe
from higgstune.data.messages import requests_whisper, whisper_clips
from higgstune.data.origin import Origin, join_origins, not_stated, origin_from_json
from higgstune.data.shard_reader import SPLITS
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import JoinedFeatureStore
from higgstune.errors import CheckpointError, ConfigError, DataError
from higgstune.families.base import Conditioning
from higgstune.inputs import find_adapter
from higgstune.kernels.quantize import is_quantized
from higgstune.model.adapter_folder import adapter_card, base_fingerprint
from higgstune.model.load import ModelAndTokenizers
from higgstune.planning.survey import whisper_spec
from higgstune.planning.training_data import TrainingData


@dataclass(frozen=True)
class RunSetup:
    """What all stages of a run have in common, beside recipe, model and store."""

    conditioning: Conditioning  # what is trained beyond the native class
    attention: AttentionTraining  # how audio attention is trained, where the model has it
    rendering: Rendering
    base_fingerprint: str
    base_identity: dict[str, Any]  # configuration and tokenizer
    origin: Origin  # of the recordings, also of replayed ones and of those of `init_adapter`


def resolve_setup(recipe: Recipe, data: TrainingData, loaded: ModelAndTokenizers) -> RunSetup:
    """Raises ConfigError, DataError or CheckpointError when the recipe's conditioning cannot be."""
    builtin = loaded.family.extensions.of(loaded.model)
    in_full = recipe.model.whisper is not None or recipe.model.audio_attention == "full"
    for stage in recipe.stages:
        if stage.full_learning_rate is not None and not in_full and stage.audio_embedding == "frozen":
            raise ConfigError(
                f"full_learning_rate of stage {stage.name} has no effect: nothing is trained in full without "
                "model.whisper, model.audio_attention: full or audio_embedding: full"
            )
    if is_quantized(loaded.model) and builtin.audio_attention and recipe.model.audio_attention == "full":
        raise ConfigError(
            f"{loaded.checkpoint} brings audio attention, which model.quantize: {recipe.model.quantize} puts into "
            "4 bits with the rest, and 4 bits cannot be trained in full: set model.audio_attention: lora, or leave "
            "out model.quantize"
        )
    features = shape = None
    if recipe.model.whisper is not None:
        features = data.features(recipe.model.whisper)
        for store in data.stores:
            _check_features(recipe, store, features)
        shape = whisper_spec(features.index, loaded.prompter, loaded.checkpoint)
        if builtin.whisper is not None and builtin.whisper.revision != shape.revision:
            raise CheckpointError(
                f"{loaded.checkpoint} was trained with a Whisper encoder of the revision {builtin.whisper.revision}, "
                f"{recipe.model.whisper} has {shape.revision}: prepare with --whisper {loaded.checkpoint}"
            )
    else:
        for store in data.stores:
            if any(requests_whisper(row) for row in store.contexts()):
                raise DataError(
                    f'{store.folder} has audio parts with "as": "whisper", but no Whisper is configured: set '
                    "model.whisper"
                )
    return RunSetup(
        Conditioning(audio_attention=bool(recipe.model.audio_attention) or builtin.audio_attention, whisper=shape),
        recipe.model.audio_attention or "lora",
        Rendering(recipe.data.reference, features),
        base_fingerprint(loaded.model),
        loaded.identity,
        join_origins([*(store.origin() for store in data.stores), *_origin_before(recipe)]),
    )


def _origin_before(recipe: Recipe) -> list[Origin]:
    """Of the recordings that the adapter from which training continues was trained on."""
    if recipe.init_adapter is None:
        return []
    data = adapter_card(find_adapter(recipe.init_adapter)).get("data", {})
    rows = sum(n for split in SPLITS if isinstance(n := data.get(f"{split}_rows"), int))
    return [origin_from_json(data["origin"]) if "origin" in data else not_stated(rows)]


def check_packs(recipe: Recipe, splits: Sequence[RowExamples]) -> None:
    """Raises ConfigError for a stage whose packs cannot hold the longest row of all splits, and names that row."""
    filled = [examples for examples in splits if len(examples)]
    longest = max(filled, key=lambda examples: int(examples.lengths().max()))
    tokens_needed = int(longest.lengths().max())
    row = longest.rows[int(longest.lengths().argmax())]
    for index, stage in enumerate(recipe.stages):
        tokens = stage.pack_size.tokens
        if tokens is not None and tokens < tokens_needed:
            raise ConfigError(
                f"stages.{index}.batch_tokens is {tokens}, but row {row.id} of the {row.split} split alone has "
                f"{tokens_needed} tokens (text, and 25 per second of audio): raise it to {tokens_needed} or more, or "
                "prepare with a smaller --max-seconds"
            )


def _check_features(recipe: Recipe, store: CodeStore, features: JoinedFeatureStore) -> None:
    needed = {sha256 for row in store.contexts() for sha256 in whisper_clips(row, recipe.data.reference)}
    if not needed and store.folder == Path(recipe.data.store):
        raise ConfigError(
            f"model.whisper has no effect: no row of {store.folder} has audio in a user or system turn, nor a "
            "reference in the scene (`prepare --references same_speaker` and data.reference: scene give each row one)"
        )
    missing = sum(sha256 not in features for sha256 in needed)
    if missing:
        raise DataError(
            f"{missing} of the {len(needed)} clips for Whisper in {store.folder} have no features: run "
            f"`higgstune prepare` again with --whisper {recipe.model.whisper}, on the recordings that they come from"
        )
