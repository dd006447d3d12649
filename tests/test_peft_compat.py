"""peft without bitsandbytes, in a process of its own: plain bases stay without it, and bases in 4 bits get its LoRA."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.processes

PROGRAM = """
import json, sys
import torch
from higgstune.config.recipe import Lora
from higgstune.model.adapters import add_lora
from higgstune.model.load import load_model

def kinds(quantize):
    model = load_model(sys.argv[1], dtype="float32", device="cpu", quantize=quantize)
    adapted = add_lora(model, Lora(r=2), "full")
    layers = {name: part for name, part in adapted.named_modules() if hasattr(part, "lora_A") and hasattr(part, "r")}
    adapted(input_ids=torch.arange(6)[None]).logits.square().sum().backward()
    moved = [part.lora_B["default"].weight.grad for name, part in layers.items() if ".audio_" not in name]
    assert moved and all(grad is not None and grad.abs().sum() > 0 for grad in moved)
    names = {f"{type(part).__module__}.{type(part).__name__}" for part in layers.values()}
    return {"bitsandbytes": "bitsandbytes" in sys.modules, "layers": sorted(names)}

print(json.dumps([kinds(None if kind == "plain" else kind) for kind in sys.argv[2:]]))
"""
PLAIN, QUANTIZED = "peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit"


def run(program: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_base_in_4_bits_gets_the_lora_of_bitsandbytes_in_whatever_order(tmp_path: Path) -> None:
    folder = str(save_tiny_checkpoint(tmp_path / "base"))
    plain, quantized, second = run(PROGRAM, folder, "plain", "4bit", "plain")
    assert plain == {"bitsandbytes": False, "layers": [PLAIN]}
    assert quantized == {"bitsandbytes": True, "layers": [QUANTIZED]}
    assert second["layers"] == [PLAIN]
    assert [kind["layers"] for kind in run(PROGRAM, folder, "4bit", "plain")] == [[QUANTIZED], [PLAIN]]


def test_peft_itself_is_as_before(tmp_path: Path) -> None:
    """A later import of bitsandbytes, or a check whether it is installed, has the same result as without Higgstune."""
    found = run(
        "import json, sys\n"
        "import higgstune.peft_compat\n"
        "import peft.helpers, peft.tuners.lora.model as model, transformers.utils, accelerate.utils\n"
        "with higgstune.peft_compat.plain_layers():\n"
        "    hidden = model.is_bnb_available()\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "answers = [model.is_bnb_available(), transformers.utils.is_bitsandbytes_available(),\n"
        "           accelerate.utils.is_bnb_available(), 'bitsandbytes' in sys.modules]\n"
        "used = peft.helpers.bnb.functional\n"
        "import bitsandbytes\n"
        "print(json.dumps([hidden, *answers, used is bitsandbytes.functional]))\n"
    )
    assert found == [False, True, True, True, False, True]


def test_transformers_assigns_with_scipy_that_is_imported_when_it_does() -> None:
    found = run(
        "import json, sys\n"
        "from higgstune.families import family_info, load_family\n"
        "load_family(family_info(None))\n"
        "before = 'scipy.optimize' in sys.modules\n"
        "from transformers.loss.loss_for_object_detection import linear_sum_assignment\n"
        "rows, columns = linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])\n"
        "import scipy.optimize\n"
        "print(json.dumps([before, columns.tolist(), scipy.optimize.linear_sum_assignment([[1.0]])[0].tolist()]))\n"
    )
    assert found == [False, [1, 0], [0]]
