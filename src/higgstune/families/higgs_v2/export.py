"""Writes models of Higgs Audio v2 in three layouts: native, original (boson_multimodal's) and extended (ours)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, HiggsAudioV2ForConditionalGeneration

from higgstune.checkpoint_files import read_json
from higgstune.codec.whisper_encoder import WhisperTower, load_whisper
from higgstune.errors import CheckpointError
from higgstune.families.base import Layout
from higgstune.families.higgs_v2 import INFO
from higgstune.families.higgs_v2.extensions import CONDITIONING_KEY, conditioning_of
from higgstune.families.higgs_v2.original import original_config, original_state
from higgstune.families.higgs_v2.prompt import AUDIO_EOS, AUDIO_IN, native_chat_template

SHARD_SIZE = "4GB"
_CONFIG = "config.json"
_NOT_FOR_OTHERS = "load this folder with higgstune.load_model: the native class lacks some of its modules"
LIBRARIES = {"native": "transformers", "extended": "higgstune", "original": "boson_multimodal", "peft": "peft"}
DESCRIPTIONS = {
    "native": "A checkpoint in the layout of transformers (`HiggsAudioV2ForConditionalGeneration`), which vLLM-Omni "
    "reads, too",
    "extended": "A checkpoint in Higgstune's extended layout: the native one with modules that the native class lacks, "
    "so that only Higgstune loads it",
    "original": "A checkpoint in the original layout (`higgs_audio`), as boson_multimodal loads it",
    "peft": "A LoRA adapter that peft loads on its base",
}
LICENCE_NOTE = (
    "The released Higgs Audio v2 model and its codec come under Boson AI's community licence, which is built on Meta's "
    "Llama 3 licence, and what is made from them does, too. Its duties are in the LICENSE file in your copy of the "
    "base and of the codec: read both before you use or pass on this folder. Higgstune's own Apache-2.0 licence is "
    "that of the software alone, not of these weights."
)


class HiggsV2Export:
    """See `families.base.Export`."""

    layouts = ("native", "original", "extended")
    formats: Mapping[str, str] = {"native": "native", "boson": "original", "extended": "extended"}
    libraries: Mapping[str, str] = LIBRARIES
    descriptions: Mapping[str, str] = DESCRIPTIONS
    licence_note = LICENCE_NOTE
    licence_name = "see-the-license-file"

    def check_base(self, base: Layout) -> None:
        """Any base will do: the card says where its licence is found."""

    def write(
        self,
        folder: Path,
        model: HiggsAudioV2ForConditionalGeneration,
        kind: str,
        *,
        base: Layout,
        tokenizer: Any,
        tower: WhisperTower | None,
    ) -> None:
        """Write config and weights in a layout. The original one includes the Whisper encoder: `tower`, if it is loaded
        already. Raises CheckpointError for what a layout cannot express.
        """
        if kind == "original":
            _write_original(folder, model, base, tokenizer, tower)
        else:
            _write_native(folder, model)
        if kind == "extended":
            _mark_extended(folder / _CONFIG, model)

    def chat_template(self) -> str:
        """The native template."""
        return native_chat_template()

    def usage(self, kind: str, *, base: str, dtype: str, bits: int | None) -> str | None:
        """How other software loads a folder, in Markdown for its card; None if none does."""
        if kind == "original":
            return (
                "With the original engine:\n\n```python\nfrom boson_multimodal.serve.serve_engine import "
                'HiggsAudioServeEngine\n\nengine = HiggsAudioServeEngine("THIS_FOLDER", "CODEC")\n```'
            )
        if kind == "extended":
            return None
        adapter = "THIS_FOLDER" if kind == "peft" else None
        code = _loading_code(base if adapter else "THIS_FOLDER", adapter, dtype, bits)
        library = "peft" if adapter else "transformers"
        return f"The model alone loads in {library}, without Higgstune:\n\n```python\n{code}\n```"


def _loading_code(base: str, adapter: str | None, dtype: str, bits: int | None) -> str:
    """Python code for transformers, and for peft if there is an adapter; `bits` of bitsandbytes."""
    imports, options = ["HiggsAudioV2ForConditionalGeneration"], ["use_text_head=True"]
    setup = []
    if bits is not None:
        imports.insert(0, "BitsAndBytesConfig")
        options += ["quantization_config=quantization", 'device_map="auto"']
        settings = ["load_in_8bit=True"]
        if bits == 4:
            settings = ["load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', "bnb_4bit_compute_dtype=torch.bfloat16"]
        skipped = 'llm_int8_skip_modules=["audio_lm_head", "text_lm_head"]'
        setup = ["quantization = BitsAndBytesConfig(", f"    {', '.join(settings)},", f"    {skipped},", ")"]
    else:
        options.append(f"dtype=torch.{dtype}")
    lines = ["import torch"] if bits != 8 else []
    if adapter is not None:
        lines.append("from peft import PeftModel")
    lines += [f"from transformers import {', '.join(imports)}", "", *setup]
    lines.append(f'model = HiggsAudioV2ForConditionalGeneration.from_pretrained("{base}", {", ".join(options)})')
    if adapter is not None:
        lines.append(f'model = PeftModel.from_pretrained(model, "{adapter}")')
    return "\n".join(lines)


def _write_native(folder: Path, model: HiggsAudioV2ForConditionalGeneration) -> None:
    # The base's own generation config is copied afterwards, unchanged: saving refuses some that loading accepts.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _mark_extended(path: Path, model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Keep other software from loading this folder without its extensions, which it would do almost silently."""
    [model_type] = [name for name, kind in INFO.model_types.items() if kind == "extended"]
    config = read_json(path, "") | {
        "model_type": model_type,  # unknown to transformers' automatic classes
        "transformers_weights": _NOT_FOR_OTHERS,  # the native class itself does not look at the model type
        CONDITIONING_KEY: conditioning_of(model).model_dump(mode="json"),
    }
    config.pop("architectures", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_original(
    folder: Path,
    model: HiggsAudioV2ForConditionalGeneration,
    base: Layout,
    tokenizer: Any,
    tower: WhisperTower | None,
) -> None:
    conditioning = conditioning_of(model)
    state = original_state(model.state_dict())
    if conditioning.whisper is not None:
        tower = tower or _tower(conditioning.whisper.checkpoint)
        if tower.revision != conditioning.whisper.revision:
            raise CheckpointError(
                f"the Whisper encoder {tower.checkpoint} (revision {tower.revision}) is not the one that the adapter "
                f"was trained with (revision {conditioning.whisper.revision})"
            )
        state |= {f"audio_tower.{key}": value.cpu() for key, value in tower.state().items()}
    config = original_config(
        model.config,
        tokens={token: tokenizer.convert_tokens_to_ids(token) for token in (AUDIO_IN, AUDIO_EOS)},
        conditioning=conditioning,
        encoder=tower.config if tower is not None and conditioning.whisper is not None else None,
        written=base.config if base.kind == "original" else None,
    )
    if conditioning.whisper is not None:
        config["encode_audio_in_tokens"] = False  # else the original adds codes beside Whisper features: untrained here
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE)
    GenerationConfig.from_model_config(model.config).save_pretrained(folder)


def _tower(checkpoint: str) -> WhisperTower:
    try:
        tower: WhisperTower = load_whisper(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n(--format boson includes the Whisper encoder; --format extended only names it)"
        ) from error
    return tower
