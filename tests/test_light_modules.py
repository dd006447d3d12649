"""Files, the hub, data preparation and codecs can be imported without the heavy libraries."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "huggingface_hub", "sklearn", "scipy.signal", "scipy.spatial", "scipy.fft")


@pytest.mark.parametrize(
    "module",
    ["checkpoint_files", "hub", "data.prepare", "data.whisper_features", "codec", "config.recipe", "batch.packing"],
)
def test_a_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, higgstune.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
