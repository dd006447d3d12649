"""Files, the hub, data preparation and codecs can be imported without the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
from preparing import recordings

HEAVY = ("torch", "transformers", "huggingface_hub", "sklearn", "scipy.signal", "scipy.spatial", "scipy.fft")


@pytest.mark.parametrize(
    "module",
    ["checkpoint_files", "hub", "data.prepare", "data.whisper_features", "codec", "config.recipe", "batch.packing"],
)
def test_a_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, higgstune.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.processes
def test_preparing_with_a_fitted_codec_needs_no_torch(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 2)
    codec = Path(__file__).parents[1] / "src" / "higgstune" / "demo" / "assets" / "codec"
    verb = ["-m", "higgstune", "prepare", str(source), "--out", str(tmp_path / "out"), "--codec", str(codec)]
    command = [sys.executable, "-X", "importtime", *verb]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "higgstune.codec.mel" in imported
    assert not {"torch", "transformers"} & imported
