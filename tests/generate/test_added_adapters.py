"""Many adapters on one base, each chosen by a request, and those that cannot stand beside others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_folders import copy_of
from export_world import make_adapter, make_world

from higgstune.errors import CheckpointError, InputError
from higgstune.families.base import Conditioning
from higgstune.families.sampling import Sampling
from higgstune.generate.speaker import load
from higgstune.generate.speech import Request

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_adapter(folder, folder / "anna", strength=0.2)
    make_adapter(folder, folder / "ben", strength=0.3, r=4, rslora=True)
    return folder


def test_each_request_is_spoken_with_its_adapter(world: Path) -> None:
    voice = load(world / "base", device="cpu")
    voice.add_adapter("anna", world / "anna")
    requests = [Request(text, adapter=name) for text in ("Hello.", "Good morning.") for name in ("", "anna", "ben")]
    with pytest.raises(InputError, match="no adapter 'ben' was added: there are anna"):
        next(voice.speak_all(requests))
    stream = voice.stream("Hello.", adapter="anna", max_seconds=1.0)  # while it speaks
    first = next(stream)
    voice.add_adapter("ben", world / "ben")
    spoken = list(voice.speak_all(requests, sampling=GREEDY, max_seconds=1.0))
    assert len(np.concatenate([first, *stream])) > 0
    alone = {
        "": load(world / "base", device="cpu"),
        **{name: load(world / name, device="cpu") for name in ("anna", "ben")},
    }
    for request, clip in zip(requests, spoken, strict=True):
        own = alone[request.adapter].speak(request.text, sampling=GREEDY, max_seconds=1.0)
        np.testing.assert_allclose(clip.waveform, own.waveform, atol=1e-6)
    assert len({clip.waveform.tobytes() for clip in spoken}) == 6
    voice.remove_adapter("anna")
    voice.add_adapter("anna", world / "ben")  # the name is free again
    again = voice.speak("Hello.", adapter="anna", sampling=GREEDY, max_seconds=1.0)
    np.testing.assert_allclose(again.waveform, spoken[2].waveform, atol=1e-6)
    # The base has nothing of them.
    np.testing.assert_allclose(
        voice.speak("Hello.", sampling=GREEDY, max_seconds=1.0).waveform, spoken[0].waveform, atol=1e-6
    )


def test_what_cannot_stand_beside_others_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    voice = load(world / "base", device="cpu")
    voice.add_adapter("anna", world / "anna")
    for name, problem in (("anna", "it is in use"), ("", "it is empty")):
        with pytest.raises(InputError, match=problem):
            voice.add_adapter(name, world / "ben")
    with pytest.raises(InputError, match="has one of its own"):
        load(world / "anna", device="cpu").add_adapter("ben", world / "ben")
    with pytest.raises(CheckpointError, match=r"dora .*DoRA"):
        voice.add_adapter("dora", make_adapter(world, tmp_path / "dora", dora=True))
    attends = make_adapter(world, tmp_path / "attends", conditioning=Conditioning(audio_attention=True))
    with pytest.raises(CheckpointError, match="audio attention"):
        voice.add_adapter("attends", attends)
    other = copy_of(world / "ben", tmp_path / "other", codec_revision="0123456789abcdef")
    with pytest.raises(CheckpointError, match="another codec"):
        voice.add_adapter("other", other)
    before = voice.speak("Hello.", adapter="anna", sampling=GREEDY, max_seconds=0.5).waveform
    voice.add_adapter("other", world / "ben")
    after = voice.speak("Hello.", adapter="anna", sampling=GREEDY, max_seconds=0.5).waveform
    np.testing.assert_array_equal(before, after)


def test_a_model_that_has_changed_is_copied_anew(world: Path) -> None:
    voice = load(world / "anna", device="cpu")
    before = voice.speak("Hello.", sampling=GREEDY, max_seconds=0.5).waveform
    base = load(world / "base", device="cpu").speak("Hello.", sampling=GREEDY, max_seconds=0.5).waveform
    assert (before[: len(base)] != base[: len(before)]).any()
    with voice.model.disable_adapter():
        np.testing.assert_allclose(voice.speak("Hello.", sampling=GREEDY, max_seconds=0.5).waveform, base, atol=1e-6)
    np.testing.assert_array_equal(voice.speak("Hello.", sampling=GREEDY, max_seconds=0.5).waveform, before)
    with torch.no_grad():
        for name, parameter in voice.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    np.testing.assert_allclose(voice.speak("Hello.", sampling=GREEDY, max_seconds=0.5).waveform, base, atol=1e-6)
