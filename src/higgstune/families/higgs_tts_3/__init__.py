"""Higgs TTS 3: Qwen3 4B with one tied table of audio codes; transformers has no class for it.

`INFO` is all that recipes and lookups need; `family` has the code, which imports torch and transformers.
"""

from collections.abc import Iterator
from typing import Any

from higgstune.data.rules import TAGGED
from higgstune.families.base import FamilyInfo

LICENCE = "boson-higgs-tts-3-research-and-non-commercial-license"


def _check_recipe(recipe: Any) -> Iterator[tuple[str, str]]:
    if recipe.data.reference == "scene":
        yield "data.reference", "Higgs TTS 3 has no scenes: a reference stands before the text (turn)"


INFO = FamilyInfo(
    name="higgs_tts_3",
    title="Higgs TTS 3",
    model_types={"higgs_multimodal_qwen3": "native"},
    stage_kinds={"full": "LoRA on the seven projections of every layer"},
    text_targets=("transcript", "none"),
    extensions=(),
    check_recipe=_check_recipe,
    code="higgstune.families.higgs_tts_3.family",
    prompts="higgstune.families.higgs_tts_3.prompter",
    # No server reads the logits of text: its loss is there for experiments.
    stage_defaults={"kind": "full", "text_targets": "none", "text_weight": 0.0},
    speech_licence=LICENCE,
    texts=TAGGED,
    audio_embedding=True,
    wordless_reference=True,
    continues_speech=False,  # a prompt with earlier pieces was not shown to work on the released weights
)
