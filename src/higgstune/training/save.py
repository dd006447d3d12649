"""The adapter's folder: the files that peft loads, and a card with what else it needs and what it came from."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import higgstune
from higgstune.config.recipe import Recipe
from higgstune.data.origin import origin_as_json
from higgstune.data.shard_reader import SPLITS
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import portable_name
from higgstune.families.sampling import base_sampling
from higgstune.files import sync_files, sync_folder
from higgstune.model.adapter_folder import write_card
from higgstune.model.base_identity import IDENTITY
from higgstune.model.load import ModelAndTokenizers
from higgstune.peft_compat import PeftModel
from higgstune.training.metrics import last_metrics
from higgstune.training.run_dir import TrainedStage
from higgstune.training.setup import RunSetup


def save_adapter(folder: Path, model: PeftModel, card: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write the adapter folder under a temporary name, then rename it. `weights`: see `trained_state`."""
    temporary = folder.with_name("adapter.tmp")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = card["checkpoint"]
    config.revision = card["revision"]
    model.save_pretrained(str(temporary), state_dict=weights, save_embedding_layers=False)
    write_card(temporary, card)
    sync_files(temporary)
    os.replace(temporary, folder)
    sync_folder(folder.parent)


def adapter_card_of(
    recipe: Recipe, loaded: ModelAndTokenizers, store: CodeStore, setup: RunSetup, stages: Mapping[str, TrainedStage]
) -> dict[str, Any]:
    """The card of an adapter: its base and codec, how it was made, and from what.

    `stages` are all stages so far, by name; the last one's adapter is saved.
    """
    return {
        "higgstune": higgstune.__version__,
        "checkpoint": portable_name(loaded.checkpoint),
        "revision": loaded.revision,
        "codec": portable_name(loaded.codec),
        "codec_revision": loaded.audio_tokenizer.revision,
        "family": loaded.family.info.name,
        "base_shape": loaded.spec.card(),
        "base_fingerprint": setup.base_fingerprint,
        IDENTITY: setup.base_identity,
        "base_quantized": recipe.model.quantize,  # while it was trained; it belongs on the whole base as well
        "conditioning": setup.conditioning.model_dump(),
        "stage": list(stages)[-1],
        "stages": [
            {"name": name, "kind": done.kind, "steps": done.steps, "metrics": last_metrics(done.history)}
            for name, done in stages.items()
        ],
        "data": {
            "store": portable_name(str(store.folder)),
            **{f"{split}_rows": store.info.rows[split] for split in SPLITS},
            **{f"{split}_hours": store.info.hours[split] for split in SPLITS},
            "origin": origin_as_json(setup.origin),
        },
        "sampling": base_sampling(loaded.folder).with_(temperature=recipe.evaluation.temperature).generation_config(),
        "recipe": recipe.model_dump(mode="json"),
    }
