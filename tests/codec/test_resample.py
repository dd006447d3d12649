"""The torchaudio stand-in: its one function against torchaudio 2.11, and its effect on other libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from higgstune.torchaudio_compat import resample

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "resample.safetensors")
RATES = sorted(name.removeprefix("in_") for name in GOLDEN if name.startswith("in_"))
STAND_IN = "from higgstune import torchaudio_compat; torchaudio_compat.install(); import sys, torchaudio\n"
BROKEN = "raise OSError('libc10_cuda.so: cannot open shared object file')"
CODEC = "from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import *\n"


def run_python(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter, with folders before everything else on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchaudio(folder: Path, code: str) -> Path:
    (folder / "torchaudio").mkdir()
    (folder / "torchaudio" / "__init__.py").write_text(code)
    return folder


@pytest.fixture
def broken_torchaudio(tmp_path: Path) -> Path:
    """What a wheel for another build of torch does."""
    return fake_torchaudio(tmp_path, BROKEN)


@pytest.mark.parametrize("rates", RATES)
def test_equals_torchaudio(rates: str) -> None:
    old, new = map(int, rates.split("_"))
    torch.testing.assert_close(resample(GOLDEN[f"in_{rates}"], old, new), GOLDEN[f"out_{rates}"], atol=1e-6, rtol=0)


def test_leading_dimensions_and_dtype_are_kept() -> None:
    waveform = torch.randn(2, 3, 100, dtype=torch.float64)
    resampled = resample(waveform, 24_000, 16_000)
    assert resampled.shape == (2, 3, 67)
    assert resampled.dtype == torch.float64
    torch.testing.assert_close(resampled[1, 2], resample(waveform[1, 2], 24_000, 16_000))


def test_equal_rates_change_nothing() -> None:
    waveform = torch.randn(1, 10)
    assert resample(waveform, 16_000, 16_000) is waveform


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="positive whole"):
        resample(torch.zeros(4), 0, 16_000)
    with pytest.raises(TypeError, match="int64"):
        resample(torch.zeros(4, dtype=torch.int64), 24_000, 16_000)


@pytest.mark.processes
@pytest.mark.parametrize("before", ["", "import transformers; transformers.AutoModel\n"])
def test_codec_class_imports_with_the_stand_in(broken_torchaudio: Path, before: str) -> None:
    code = before + STAND_IN + CODEC + "print(HiggsAudioV2TokenizerModel.main_input_name, torchaudio.__doc__)"
    assert run_python(code, broken_torchaudio) == "input_values Higgstune's stand-in for torchaudio."


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one fresh interpreter prints of the stand-in: its attributes, and what other libraries make of it."""
    folder = fake_torchaudio(tmp_path_factory.mktemp("broken"), BROKEN)
    attributes = "".join(
        f"try: {name}\nexcept AttributeError as error: print(error)\n"
        for name in ("torchaudio.load", "torchaudio.functional.rnnt_loss", "torchaudio.__version__")
    )
    libraries = (
        "import importlib.util; print(importlib.util.find_spec('torchaudio').name)\n"
        "from transformers.utils import is_speech_available, is_torchaudio_available\n"
        "print(is_torchaudio_available(), is_speech_available())\n"
        # This one imports torchaudio.compliance.kaldi if it believes in torchaudio.
        "import numpy; from transformers import ASTFeatureExtractor as Extractor\n"
        "features = Extractor()(numpy.zeros(16000), sampling_rate=16000, return_tensors='np')\n"
        "print(features['input_values'].shape)"
    )
    return run_python(STAND_IN + attributes + libraries, folder).splitlines()


@pytest.mark.processes
def test_every_other_attribute_raises(seen: list[str]) -> None:
    lines = seen[:3]
    assert [line.split(" ")[0] for line in lines] == [
        "torchaudio.load",
        "torchaudio.functional.rnnt_loss",
        "torchaudio.__version__",
    ]
    assert all("Install a torchaudio for" in line for line in lines)


@pytest.mark.processes
def test_other_libraries_do_not_take_it_for_the_real_one(seen: list[str]) -> None:
    assert seen[3:] == ["torchaudio", "False False", "(1, 1024, 128)"]


@pytest.mark.processes
def test_real_torchaudio_is_preferred(tmp_path: Path) -> None:
    folder = fake_torchaudio(tmp_path, "class functional: resample = 'the real one'")
    code = STAND_IN + CODEC + "torchaudio_compat.install(); print(sys.modules['torchaudio'].functional.resample)"
    assert run_python(code, folder) == "the real one"
