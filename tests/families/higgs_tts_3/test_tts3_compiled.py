"""Compiled layers of Higgs TTS 3, by a compiler that a CPU has, give the gradients of the plain ones."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from tts3 import BASE, NEEDED

from higgstune.batch.collate import pack
from higgstune.config.recipe import Lora
from higgstune.families.base import base_of
from higgstune.families.higgs_tts_3 import packed
from higgstune.families.higgs_tts_3.prompter import Turn
from higgstune.model import compiled
from higgstune.model.adapters import add_lora
from higgstune.model.compiled import compile_layers, packed_loss
from higgstune.model.load import load_model_and_tokenizers

pytestmark = [NEEDED, pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # the compiler's own


@pytest.mark.parametrize("kind", ["full", "full+audio_embedding"])
def test_gradients_are_those_of_the_plain_layers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(compiled, "_possible", lambda base: compiled.is_plain(base.model.layers))
    monkeypatch.setattr(compiled, "_has_compiler", lambda: True)
    function = torch.compile(packed._packed_layer, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(packed, "_compiled", lambda: function)
    torch.compiler.reset()
    counters.clear()
    loaded = load_model_and_tokenizers(BASE, device="cpu")
    model = add_lora(loaded.model, Lora(r=4, alpha=8), kind)
    loaded.family.pack_forward(base_of(model))
    draw = np.random.default_rng(0)
    batch = pack(
        [
            loaded.prompter.build([Turn(f"Text {frames}", draw.integers(0, 1024, (frames, 8)), is_target=True)])
            for frames in (9, 14, 20)
        ]
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = torch.autograd.grad(packed_loss(model, batch), trained)
    assert counters["stats"]["unique_graphs"] == 0
    assert compile_layers(model, batch) == pytest.approx(0, abs=1e-5)
    found = torch.autograd.grad(packed_loss(model, batch), trained)
    assert counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
