"""Write a model as a checkpoint's folder in one of three layouts: weights, config, tokenizer, licences."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, HiggsAudioV2ForConditionalGeneration

from higgstune.checkpoint_files import MODEL_TYPES, Layout, read_json
from higgstune.codec import CODEC_FOLDER
from higgstune.codec.whisper_encoder import WhisperTower, load_whisper
from higgstune.errors import CheckpointError, WorkError
from higgstune.families.higgs_v2.checkpoint import original_config, original_state
from higgstune.families.higgs_v2.extensions import CONDITIONING_KEY, conditioning_of
from higgstune.families.higgs_v2.prompt import AUDIO_EOS, AUDIO_IN, native_chat_template
from higgstune.files import new_folder

LayoutName = Literal["native", "extended", "original"]
SHARD_SIZE = "4GB"

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# The other files of a checkpoint, which are copied from its base; any other file is not.
_COMPANIONS = (
    "tokenizer.json", _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", _CHAT_TEMPLATE, "chat_template.json", "preprocessor_config.json", "processor_config.json",
    _GENERATION_CONFIG,
)  # fmt: skip
_NOT_FOR_OTHERS = "load this folder with higgstune.load_model: the native class has no place for all its modules"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """`new_folder` for a checkpoint. Raises WorkError, too, where a device's memory is too small for the model."""
    try:
        with new_folder(out) as folder:
            yield folder
    except torch.OutOfMemoryError as error:
        raise WorkError(f"the model does not fit into the device's memory: use --device cpu [{error}]") from error


def write_checkpoint(
    folder: Path,
    model: HiggsAudioV2ForConditionalGeneration,
    layout: LayoutName,
    *,
    base: Layout,
    tokenizer: Any,
    tower: WhisperTower | None = None,
) -> None:
    """Write config and weights of `model` in a layout, with tokenizer, template and licences of `base`.

    `tower` is the Whisper encoder that the original layout includes, where it is loaded already.
    Raises CheckpointError for a model that a layout cannot express.
    """
    if layout == "original":
        _write_original(folder, model, base, tokenizer, tower)
    else:
        _write_native(folder, model)
    if layout == "extended":
        _mark_extended(folder / _CONFIG, model)
    _copy_companions(base.folder, folder)


def licence_files(folder: Path) -> list[Path]:
    """The licence files at the top of a checkpoint's or a codec's folder."""
    return sorted({path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()})


def copy_codec(codec: Path, folder: Path) -> None:
    """Include a codec, with its licence, in the sub-folder where loading a checkpoint looks for one."""
    shutil.copytree(codec, folder / CODEC_FOLDER, ignore=shutil.ignore_patterns(".*"))


def _write_native(folder: Path, model: HiggsAudioV2ForConditionalGeneration) -> None:
    # The base's own generation config is copied afterwards: saving refuses some that loading accepts.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _mark_extended(path: Path, model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Keep other software from loading this folder without its extensions, which it would hardly report."""
    [model_type] = [name for name, kind in MODEL_TYPES.items() if kind == "extended"]
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
        config["encode_audio_in_tokens"] = False  # the original adds codes to Whisper features, which was not trained
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


def _copy_companions(base: Path, folder: Path) -> None:
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for path in licence_files(base):
        shutil.copyfile(path, folder / path.name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    written = [folder / _CHAT_TEMPLATE, folder / "chat_template.json"]
    tokenizer = folder / _TOKENIZER_CONFIG
    has_one = any(path.exists() for path in written) or (
        tokenizer.exists() and "chat_template" in read_json(tokenizer, "")
    )
    if not has_one:
        (folder / _CHAT_TEMPLATE).write_text(native_chat_template(), encoding="utf-8")
