"""Writes models of Higgs TTS 3 in the released layout, which its servers read, and the family's part of a card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from higgstune.checkpoint_files import SAFETENSORS, SAFETENSORS_INDEX
from higgstune.codec import CODEC_PREFIX
from higgstune.codec.bundled import CODEC_CONFIG, codec_tensors
from higgstune.errors import CheckpointError
from higgstune.families.base import Layout
from higgstune.families.higgs_tts_3 import LICENCE
from higgstune.families.higgs_tts_3.checkpoint import stored_name
from higgstune.families.sampling import GENERATION_CONFIG

_LICENCE_FILES = ("LICENSE", "NOTICE")
# vllm-omni takes its sampling from the folder, and without this file draws from the whole tail; the release has none.
_GENERATION = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 50}
_NOTE = """Derived from Higgs TTS 3, licensed from Boson AI USA, Inc.

It comes under the Boson Higgs TTS 3 Research and Non-Commercial License in LICENSE, as do all models and adapters that
are made from it: **research and non-commercial use only**, and passing it on only under that same licence, with
LICENSE and NOTICE. Its speech may not train another generative model, it may not imitate a real person without
verifiable consent, and speech from it must not be passed off as recorded; the acceptable use policy in LICENSE binds
whoever uses it. Higgstune's own Apache-2.0 licence is that of the software alone, not of these weights."""


class HiggsTTS3Export:
    """See `families.base.Export`."""

    layouts = ("native",)
    formats: Mapping[str, str] = {"native": "native"}
    libraries: Mapping[str, str] = {"native": "higgstune", "peft": "peft"}
    descriptions: Mapping[str, str] = {
        "native": "A checkpoint in the released layout of Higgs TTS 3, as sglang-omni and vllm-omni load it",
        "peft": "A LoRA adapter for Higgs TTS 3; its servers load no adapters: merge it for them",
    }
    licence_note = _NOTE
    licence_name = LICENCE

    def check_base(self, base: Layout) -> None:
        """Raise CheckpointError for a base without the files that its licence makes every derivative carry."""
        missing = [name for name in _LICENCE_FILES if not any(base.folder.glob(f"{name}*"))]
        if missing:
            raise CheckpointError(
                f"{base.folder} has no {' and no '.join(missing)}: whoever makes a derivative of Higgs TTS 3 must "
                "enclose its licence and its notice; copy both from the page of the base model into that folder"
            )

    def write(self, folder: Path, model: Any, kind: str, *, base: Layout, tokenizer: Any, tower: Any) -> None:
        """Write config and weights: those of the model, and the base's codec byte by byte. No copies as heads."""
        state = {stored_name(key): value.cpu().contiguous() for key, value in model.state_dict().items()}
        state |= {f"{CODEC_PREFIX}{key}": value for key, value in codec_tensors(base.folder).items()}
        save_file(state, folder / SAFETENSORS)
        index = {
            "metadata": {"total_size": sum(value.nbytes for value in state.values())},
            "weight_map": dict.fromkeys(sorted(state), SAFETENSORS),
        }
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(base.folder / "config.json", folder / "config.json")
        for place in (base.folder.parent, base.folder):
            if (place / CODEC_CONFIG).exists():
                shutil.copyfile(place / CODEC_CONFIG, folder / CODEC_CONFIG)
        (folder / GENERATION_CONFIG).write_text(json.dumps(_GENERATION, indent=2) + "\n", encoding="utf-8")

    def chat_template(self) -> None:
        """Prompts of this family have none."""

    def usage(self, kind: str, *, base: str, dtype: str, bits: int | None) -> str | None:
        """How other software loads a folder, in Markdown for its card."""
        if kind == "peft":
            return None
        return "A server with an OpenAI-like `/v1/audio/speech`:\n\n```sh\nvllm-omni serve THIS_FOLDER\n```"
