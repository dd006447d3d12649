"""Whether two servers' own code reads an exported folder of Higgs TTS 3, without the servers.

    pip download --no-deps sglang-omni==0.1.9 vllm-omni==0.30.0
    for wheel in *.whl; do python -m zipfile -e $wheel servers; done
    python tools/servers/read_native.py FOLDER servers

The wheels need other versions of PyTorch and a GPU. What runs here unchanged is their reading: configuration, the map
of names, the check of required keys, loading into their audio table and head, the codec's tensors. sglang and vllm
themselves are stubs; transformers' `Qwen3Model` takes the place of their backbone, under the names that they map to.
Prints one line a check; exits with 1 where a server would read something else than Higgstune does.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Qwen3Model

from higgstune.codec.bundled import codec_tensors
from higgstune.families import read_layout
from higgstune.families.higgs_tts_3.checkpoint import load, read_config

# Packages that stand in for what they would import; of the servers' own only the modules that read a checkpoint run.
_STUBS = (
    "sglang",
    "vllm",
    "torchaudio",
    "sglang_omni.platforms",
    "sglang_omni.preprocessing",
    "sglang_omni.sampling",
    "vllm_omni.platforms",
    "vllm_omni.model_executor.models.output_templates",
)


class _Stub(ModuleType):
    """A package whose names are classes that can be inherited from and called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (MagicMock,), {}) if name[0].isupper() else MagicMock()


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubs, and the servers' packages without running their `__init__`."""

    def __init__(self, servers: Path) -> None:
        self.servers = servers

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == stub or name.startswith(f"{stub}.") for stub in _STUBS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        folder = self.servers.joinpath(*name.split("."))
        if name.split(".")[0] in ("sglang_omni", "vllm_omni") and folder.is_dir():
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _Backbone(nn.Module):
    """transformers' Qwen3 under the names of the servers' own, which must all come, once each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Qwen3Model(config)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        found = {name: value.float() for name, value in weights if not name.startswith("lm_head.")}
        self.load_state_dict(found)  # strict
        return set(found)


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's weight files, as servers go through them."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                yield key, weights.get_tensor(key)


def sglang(folder: Path) -> tuple[Qwen3Model, Any]:
    """Its model's own part, loaded by its `load_weights`."""
    module = importlib.import_module("sglang_omni.models.higgs_tts.model")
    settings = importlib.import_module("sglang_omni.models.higgs_tts.hf_config").HiggsMultimodalQwen3Config
    config = settings.from_pretrained(folder)
    encoder = config.audio_encoder_config
    shape = encoder["num_codebooks"], encoder["vocab_size"], encoder["out_dim"]
    model = nn.Module()
    model.tie_modality = encoder["tie_word_embeddings"]
    model.backbone = _Backbone(config.get_text_config())
    model.multimodal_embedding = module.HiggsMultimodalEmbedding(*shape)
    model.modality_head = module.HiggsFusedMultiTextHead(*shape)
    model.modality_head.weight = model.multimodal_embedding.modality_embedding_0.weight
    model.own_param_names = lambda: module.HiggsTTSModel.own_param_names(model)
    loaded = module.HiggsTTSModel.load_weights(model, tensors(folder))
    assert loaded == {"multimodal_embedding.modality_embedding_0.weight"}, loaded
    return model.backbone.model, model.modality_head


def vllm(folder: Path) -> tuple[Qwen3Model, Any]:
    """The same of its talker, which refuses unknown keys and looks for missing ones."""
    module = importlib.import_module("vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_talker")
    config = module.HiggsAudioV3Config.from_pretrained(folder)
    talker = module.HiggsAudioV3TalkerForConditionalGeneration
    backbone = _Backbone(config.text_config)
    module._BackboneWrapper = lambda *_: backbone
    model = nn.Module()
    model.config, model._backbone_config = config, config.text_config
    model.model, model.lm_head = backbone.model, None
    model.tie_modality = config.tie_modality_embeddings
    shape = config.num_codebooks, config.codebook_size, config.audio_hidden_size
    model.multimodal_embedding = module.HiggsFusedMultiTextEmbedding(*shape)
    model.modality_head = module.HiggsFusedMultiTextHead(*shape)
    model.modality_head.weight = model.multimodal_embedding.weight
    model.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
    model._map_weight_name = lambda name: talker._map_weight_name(model, name)
    model._build_required_keys = talker._build_required_keys
    model._resolve_token_ids = lambda: None
    talker.load_weights(model, tensors(folder))
    return backbone.model, model.modality_head


@torch.no_grad()
def main(folder: Path, servers: Path) -> None:
    """Read, compare and print."""
    sys.meta_path.insert(0, _Stubs(servers))
    ours = load(read_layout(folder), read_config(folder), torch.float32)[0].eval()
    config = ours.config
    ids = torch.arange(24)[None] % config.vocab_size
    rows = torch.arange(5 * config.num_codebooks).view(5, -1) % config.codebook_size
    inputs = torch.cat((ours.model.embed_tokens(ids)[0], ours.embed_rows(rows)))[None]
    expected = ours.audio_logits(ours.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0])
    wrong = 0
    for name, read in (("sglang-omni", sglang), ("vllm-omni", vllm)):
        backbone, head = read(folder)
        hidden = backbone.eval()(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
        gap = float((head.generate(hidden).flatten(1) - expected).abs().max())
        theta = backbone.config.rope_parameters["rope_theta"]
        same = torch.equal(head.weight.float(), ours.audio_table.weight)
        print(f"{name}: logits differ by {gap:.1e}, theta {theta:g}, audio table {'equal' if same else 'DIFFERS'}")
        wrong += gap > 1e-5 or not same
    codec = importlib.import_module("sglang_omni.models.higgs_tts.audio_codec").load_codec_state_dict(str(folder))
    own = codec_tensors(folder)
    same = codec.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in codec.items())
    print(f"sglang-omni: {len(codec)} tensors of the codec, {'equal' if same else 'DIFFERENT'}")
    sys.exit(bool(wrong) or not same)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
