"""A family with another prompt, one pathway, a tied table and no text loss goes through the same verbs."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from on_cpu import CPU
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_family import CODEBOOKS, EOS, FAMILY, INFO, save_tiny_family
from tiny_runs import DEMO_CODEC, make_recordings

import higgstune
from higgstune import families
from higgstune.batch.collate import PaddedCollator, pack
from higgstune.batch.dataset import RowExamples
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families.sampling import Sampling
from higgstune.generate.engine import generate
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.model.load import load_model_and_tokenizers
from higgstune.training import verify
from higgstune.training.run import train

pytestmark = pytest.mark.processes


def prove(request: Path, environment: dict[str, str]) -> None:
    """The proof of an adapter in a process that knows the family."""
    families.register(INFO)
    processes._prove(request, environment)


def forked_proof(request: Path, environment: Mapping[str, str]) -> Any:
    process = processes._CONTEXT.Process(target=prove, args=(request, dict(environment)))
    process.start()
    process.join()
    output, errors = (request.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err"))
    return processes.subprocess.CompletedProcess([], process.exitcode or 0, output, errors)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families._KNOWN, INFO.name, INFO)
        patch.setattr(verify, "_run", forked_proof)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_family")
    save_tiny_family(folder / "base")
    recordings = make_recordings(folder / "recordings")
    higgstune.prepare(
        recordings, folder / "data", model=folder / "base", references="same_speaker", speaker="anna",
        validation_fraction=0.2,
    )  # fmt: skip
    return folder


def recipe(world: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "model": {"family": "tiny_speech", "checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"store": str(world / "data")},
        "lora": {"r": 4, "alpha": 8},
        "stages": [{"name": "voice", "max_steps": 2, "learning_rate": 1e-2, "batch_size": 4}],
        "evaluation": {"clips": 1},
        "log_steps": 1, "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    return parse_recipe(tree | changes, where="test")


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    train(recipe(world), world / "run")
    return world / "run"


def test_a_store_and_an_adapter_carry_the_name_of_the_family(world: Path, run: Path) -> None:
    assert CodeStore.open(world / "data").info.model_type == "tiny_speech"
    card = json.loads((run / "voice" / "adapter" / "higgstune.json").read_text())
    assert card["family"] == card["recipe"]["model"]["family"] == "tiny_speech"
    assert card["stages"][0]["steps"] == 2
    weights = load_file(run / "voice" / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    assert all(weights[key].any() for key in weights if ".lora_B" in key)


def test_a_packed_step_is_the_loss_of_each_clip_alone(world: Path) -> None:
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    rows = CodeStore.open(world / "data").split("train")
    examples = [RowExamples(rows, loaded.prompter, "none")[index] for index in range(3)]
    clips = PaddedCollator.of(loaded.spec)(examples)
    with torch.no_grad():
        logits = FAMILY.label_logits(loaded.model, clips, 10_000, nullcontext())["audio_logits"]
        FAMILY.pack_forward(loaded.model)
        batch = pack(examples)
        found = combine(loaded.model(**batch), label_counts(batch, eos_id=EOS), LossWeights(text=0))
    targets = clips["audio_targets"]
    each = F.cross_entropy(logits.view(targets.numel(), -1), targets.flatten(), reduction="none").view(targets.shape)
    expected = torch.stack([each[:, k][targets[:, k] >= 0].mean() for k in range(CODEBOOKS)]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_generation_ends_by_codebook_0_alone_and_by_the_cap(world: Path) -> None:
    loaded = load_model_and_tokenizers(world / "base", device="cpu")
    messages = [{"role": "user", "content": "Hello there."}]
    prompts = [loaded.prompter.prompt(messages, [])] * 2
    spoken = generate(loaded.model, prompts, max_frames=[12, 9], seeds=[0, 0], sampling=Sampling(temperature=0))
    assert [clip.codes.shape for clip in spoken] == [(12, CODEBOOKS), (9, CODEBOOKS)]
    assert all(clip.hit_cap for clip in spoken)
    np.testing.assert_array_equal(spoken[0].codes[:9, 0], spoken[1].codes[:, 0])


def test_it_speaks_is_merged_and_is_examined(world: Path, run: Path) -> None:
    assert higgstune.load(run, device="cpu").speak("Hello.", max_seconds=0.5).seconds > 0.02
    exported = higgstune.export(run, world / "merged", format="native", base=CPU)
    assert json.loads((exported.folder / "config.json").read_text())["model_type"] == "tiny_speech"
    with pytest.raises(ConfigError, match="--format boson: Tiny Speech has native"):
        higgstune.export(run, world / "boson", format="boson", base=CPU)
    report = higgstune.doctor(CPU, adapter=run, data=world / "data")
    assert report.passed, report.table()
    assert report.of("generation", "ok")


def test_what_the_family_cannot_do_is_an_error_that_names_it(world: Path) -> None:
    with pytest.raises(ConfigError, match="Tiny Speech has no 'full': one of voice"):
        recipe(world, stages=[{"name": "a", "kind": "full", "max_steps": 1}])
    with pytest.raises(ConfigError, match=r"model.audio_attention: Tiny Speech has no such extension"):
        recipe(world, model={"family": "tiny_speech", "audio_attention": True})
    with pytest.raises(ConfigError, match="text_targets: Tiny Speech has no 'transcript'"):
        recipe(world, stages=[{"name": "a", "text_targets": "transcript", "text_weight": 1, "max_steps": 1}])
    with pytest.raises(ConfigError, match="unknown model family 'other'"):
        recipe(world, model={"family": "other"})
    with pytest.raises(ConfigError, match=r"model\.family"):
        recipe(world, model={"family": ["tiny_speech"]})


def test_one_familys_artefacts_are_refused_on_anothers_base_before_weights_are_read(
    world: Path, run: Path, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "v2")
    (tmp_path / "v2" / "codec").symlink_to(DEMO_CODEC)
    for file in (tmp_path / "v2").glob("*.safetensors"):
        file.write_bytes(b"")  # whoever reads them fails in another way
    other = "belongs to the model family tiny_speech, the base to Higgs Audio v2"
    with pytest.raises(CheckpointError, match=other):
        higgstune.load(run, base=higgstune.BaseSpec(tmp_path / "v2"))
    on_v2 = {"family": "higgs_audio_v2", "checkpoint": str(tmp_path / "v2"), "device": "cpu"}
    stages = [{"name": "a", "kind": "full", "max_steps": 1}]
    with pytest.raises(CheckpointError, match=rf"the store .*{other}"):
        train(recipe(world, model=on_v2, stages=stages), tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"the recipe .*{other}"):
        train(
            recipe(world, model={**recipe(world).model.model_dump(), "checkpoint": str(tmp_path / "v2")}),
            tmp_path / "b",
        )
    with pytest.raises(CheckpointError, match=rf"the store .*{other}"):
        higgstune.inspect_row(world / "data", 0, model=tmp_path / "v2")
    with pytest.raises(ConfigError, match="text_targets is 'words': use one of transcript, assistant, none"):
        higgstune.inspect_row(world / "data", 0, text_targets="words")
    assert not (tmp_path / "run").exists()
    [refused] = higgstune.doctor(higgstune.BaseSpec(tmp_path / "v2"), adapter=run).of("checkpoint", "failed")
    assert other in refused.message
    with pytest.raises(ValueError, match="tiny_speech is registered already"):
        families.register(INFO)
