"""The layers that adapters of Higgs Audio v2 train."""

from higgstune.families.base import Conditioning, LoraTargets
from higgstune.families.higgs_v2.audio_attention import ATTENTION, NORM
from higgstune.families.higgs_v2.extensions import PROJECTOR

_SHARED = r"self_attn\.[qkvo]_proj"
_FFN = r"\.(?:gate|up|down)_proj"
# Full paths from the model's root: a suffix such as `self_attn.q_proj` would also match the codec's HuBERT or Whisper.
_LAYER = r"model\.layers\.\d+\."
_TEXT_TARGETS = rf"{_LAYER}(?:{_SHARED}|mlp{_FFN})"
_FULL_TARGETS = rf"{_LAYER}(?:{_SHARED}|(?:audio_)?mlp{_FFN})"
_FULL_AND_AUDIO_ATTENTION = rf"{_LAYER}(?:(?:self|audio)_attn\.[qkvo]_proj|(?:audio_)?mlp{_FFN})"
LORA_PATTERNS = (_TEXT_TARGETS, _FULL_TARGETS, _FULL_AND_AUDIO_ATTENTION)
FOUR_BITS = r"model\.layers\.\d+\.(self_attn|mlp|audio_mlp|audio_attn)\.\w+_proj"


def lora_targets(kind: str, conditioning: Conditioning, attention: str) -> LoraTargets:
    """The layers that a stage (text or full) trains on a model with these extensions.

    Audio attention is trained by LoRA or in full, never both: peft silently drops the LoRA of a module that is trained
    in full. The projector of Whisper features is trained in both kinds of stages, since its tokens take the text
    pathway.
    """
    in_full = [PROJECTOR] if conditioning.whisper is not None else []
    pattern = {"text": _TEXT_TARGETS, "full": _FULL_TARGETS}[kind]
    if conditioning.audio_attention and kind == "full":
        if attention == "full":
            in_full += [ATTENTION, NORM]
        else:
            pattern = _FULL_AND_AUDIO_ATTENTION
    return LoraTargets(pattern, tuple(in_full))
