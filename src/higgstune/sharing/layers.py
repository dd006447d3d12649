"""The arithmetic of a merge: an adapter into the weights of its base, layer by layer, in float32."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.errors import CheckpointError, VerificationError
from higgstune.sharing.source import Progress

_PROBES = 4  # random inputs on which a layer is compared before and after its merge
_SAME = 1e-4  # of the largest output: a thousand times what float32 rounds, a thousandth of what a lost update does


def merge_layers(model: PeftModel, dtype: torch.dtype, show: Progress) -> HiggsAudioV2ForConditionalGeneration:
    """The base with the adapter in its weights, in place, in `dtype`.

    Each layer is merged in float32, whatever the base's dtype, and rounded once; one layer at a time, so that the model
    is never in memory in float32. Modules that were trained in full take the place of the base's. Raises
    VerificationError when a merged layer computes something else than layer and adapter did, CheckpointError when
    the adapter holds numbers that are not finite.
    """
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, (name, layer) in enumerate(layers):
            _merge_layer(name.removeprefix("base_model.model."), layer, generator)
            layer.get_base_layer().to(dtype)
            show("merging layers", index + 1, len(layers))
    base = model.unload()  # not `merge_and_unload`: the layers are merged already
    assert isinstance(base, HiggsAudioV2ForConditionalGeneration)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    return base


def _merge_layer(name: str, layer: Any, generator: torch.Generator) -> None:
    layer.float()
    weight: Tensor = layer.get_base_layer().weight
    inputs = torch.randn(_PROBES, weight.shape[1], generator=generator).to(weight.device)
    before = layer(inputs)
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"the adapter cannot be merged into {name}: {error}") from error
    _check_same(before, layer(inputs), name)


def _check_same(before: Tensor, after: Tensor, name: str) -> None:
    gap, size = (after - before).abs().max().item(), before.abs().max().item()
    if not gap <= _SAME * size:  # nor where a number is not finite
        raise VerificationError(
            f"merging {name} changed what it computes: by {gap:.2e} where its outputs reach {size:.2e}"
        )
