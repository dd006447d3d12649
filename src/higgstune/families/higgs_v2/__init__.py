"""Higgs Audio v2: Llama 3.2 3B with a second feed-forward network for audio in every layer, native in transformers.

`INFO` is all that recipes and lookups need; `family` has the code, which imports torch and transformers.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from higgstune.families.base import FamilyInfo


def _check_recipe(recipe: Any) -> Iterator[tuple[str, str]]:
    kinds = [stage.kind for stage in recipe.stages]
    if ("full", "text") in pairwise(kinds):
        yield "stages", "a text stage cannot follow a full one: its adapter has no audio layers to keep them in"
    if recipe.model.audio_attention and "full" not in kinds:
        yield (
            "model.audio_attention",
            "it is on, but no stage has the kind full, so nothing would train it: add a full stage, or leave it out",
        )


INFO = FamilyInfo(
    name="higgs_audio_v2",
    title="Higgs Audio v2",
    model_types={"higgs_audio_v2": "native", "higgs_audio": "original", "higgs_audio_v2_extended": "extended"},
    stage_kinds={"text": "LoRA on the text pathway, audio frozen", "full": "LoRA on both pathways"},
    text_targets=("transcript", "assistant", "none"),
    extensions=("audio_attention", "whisper"),
    check_recipe=_check_recipe,
    code="higgstune.families.higgs_v2.family",
    prompts="higgstune.families.higgs_v2.prompter",
)
