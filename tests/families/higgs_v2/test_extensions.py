"""Audio attention and Whisper conditioning: the reference's logits, identity at the start, cache and packing."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_values import Golden
from tiny_checkpoint import random_codes, tiny_prompter
from torch import Tensor
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2Model

from higgstune.batch.collate import PaddedCollator, pack
from higgstune.batch.dataset import TARGET
from higgstune.codec.base import WhisperFeatures
from higgstune.config.recipe import Lora
from higgstune.data.messages import speech_messages
from higgstune.errors import ConfigError, DataError
from higgstune.families import read_layout
from higgstune.families.base import Conditioning, Example, WhisperSpec
from higgstune.families.higgs_v2.audio_attention import find_audio_frames
from higgstune.families.higgs_v2.decoder import Decoder
from higgstune.families.higgs_v2.delay import build_frames
from higgstune.families.higgs_v2.extensions import (
    add_conditioning,
    check_features,
    conditioning_modules,
    conditioning_of,
    remove_conditioning,
)
from higgstune.families.higgs_v2.original import read_original
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.families.padded import feature_tensors
from higgstune.kernels.loss import IGNORE, head_sums
from higgstune.model.adapter_folder import base_fingerprint
from higgstune.model.adapters import add_lora
from higgstune.model.load import load_model

CODES = 64
D_MODEL = 12
GOLDEN = [("base", 1e-5), ("audio_attention", 1e-5), ("whisper", 1e-4), ("whisper_audio_attention", 1e-4)]


def shape(prompter: Prompter) -> WhisperSpec:
    return WhisperSpec(
        checkpoint="tiny", revision="0", d_model=D_MODEL, chunk_frames=50, token_id=prompter.whisper_token_id
    )


def both(prompter: Prompter) -> Conditioning:
    return Conditioning(audio_attention=True, whisper=shape(prompter))


def encoded(tokens: int, seed: int, *chunks: int) -> WhisperFeatures:
    features = np.random.default_rng(seed).normal(size=(tokens, D_MODEL)).astype(np.float16)
    return WhisperFeatures(features, chunks or (tokens,))


def golden_outputs(folder: Path, golden: Golden) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """model, its inputs, text logits [B, S, V] and audio logits [B, S, K, C]."""
    model = load_model(folder, dtype="float32", device="cpu")
    inputs = golden.native_inputs()
    if "audio_features" in golden.values:
        tower = read_original(read_layout(folder)).whisper
        assert tower is not None
        mel, mask = (golden.values[key] for key in ("audio_features", "audio_feature_attention_mask"))
        inputs["whisper_features"] = torch.cat(tower.hidden(mel, mask))
        at = (inputs["input_ids"] == golden.config["audio_in_token_idx"]) & inputs["attention_mask"].bool()
        assert torch.equal(at, golden.values["audio_in_mask"].bool())
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        audio = model.audio_lm_head(hidden).unflatten(-1, (model.config.num_codebooks, -1))
        return model, inputs, model.text_lm_head(hidden), audio


@pytest.mark.parametrize(("name", "tolerance"), GOLDEN)
def test_logits_are_the_references(name: str, tolerance: float, tmp_path: Path) -> None:
    golden = Golden(name)
    _, inputs, text, audio = golden_outputs(golden.save_original_checkpoint(tmp_path), golden)
    real, rows = inputs["attention_mask"].bool(), golden.values["audio_out_mask"].bool()
    assert (text - golden.values["text_logits"])[real].abs().max() < tolerance
    assert (audio[rows] - golden.values["audio_logits"]).abs().max() < tolerance


@pytest.mark.parametrize("name", ["base", "audio_attention"])
def test_losses_are_the_references(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    _, _, _, audio = golden_outputs(golden.save_original_checkpoint(tmp_path), golden)
    rows = audio[golden.values["audio_out_mask"].bool()]
    labels = golden.values["expected_audio_labels"]
    starts = [*golden.values["audio_out_ids_start"].tolist(), len(labels)]
    pairs = [(rows[a : b - 1], labels[a + 1 : b]) for a, b in pairwise(starts)]
    logits, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
    logits = logits.flatten(1)
    sums = head_sums(logits, torch.eye(logits.shape[1]), targets, eos_id=golden.config["audio_stream_eos_id"])
    expected = golden.values["expected_codebook_loss_sum"]
    count = golden.values["expected_codebook_label_count"]
    assert torch.equal((targets != IGNORE).sum(0), count)
    assert ((sums["loss"].double() - expected) / count).abs().max() < 1e-5


@pytest.mark.parametrize("part", ["audio_attn.o_proj", "audio_post_audio_attn_layer_norm", "audio_encoder_proj.linear"])
def test_the_references_logits_need_every_part(part: str, tmp_path: Path) -> None:
    golden = Golden("whisper_audio_attention")
    folder = golden.save_original_checkpoint(tmp_path)
    model, inputs, _, audio = golden_outputs(folder, golden)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1.5)
        moved = model.audio_lm_head(model.model(**inputs).last_hidden_state).unflatten(-1, audio.shape[-2:])
    rows = golden.values["audio_out_mask"].bool()
    assert (moved - audio)[rows].abs().max() > 1e-3


def examples(prompter: Prompter, *, whisper: bool) -> list[Example]:
    """Unequal lengths: with a reference as an earlier turn, without any, with a voice in the scene."""
    made = []
    for index, (text, frames, place) in enumerate(
        [("Hello.", 9, "turn"), ("Good morning.", 5, None), ("Sun.", 7, "scene")]
    ):
        target, reference = (random_codes(n, seed=index + n, codes=CODES) for n in (frames, 4))
        audio: list[Any] = [] if place is None else [encoded(6, index) if place == "scene" and whisper else reference]
        request = speech_messages(
            text, context=[("Hi.", "r")] if place == "turn" else [], voice="r" if place == "scene" else None
        )
        made.append(prompter.example([*request, TARGET], [*audio, target], text_targets="transcript"))
    return made


def collate(made: list[Example]) -> dict[str, Tensor]:
    return PaddedCollator(pad_id=1, stream_eos=CODES + 1)(made)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if not key.endswith(("_positions", "_targets"))}


def test_extensions_start_as_an_exact_identity_and_follow_from_the_base() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    batch = inputs_of(collate(examples(prompter, whisper=True)))
    features = batch.pop("whisper_features")
    fingerprint = base_fingerprint(model)
    with torch.no_grad():
        before = model(**batch).logits
        other = copy.deepcopy(model)
        for one in (model, other):
            torch.manual_seed(one is other)  # no random number takes part
            add_conditioning(one, both(prompter))
        after = model(**batch, whisper_features=features).logits
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert base_fingerprint(model) == fingerprint
    assert conditioning_of(model) == both(prompter)
    assert len(conditioning_modules(model)) == 2 * 2 + 1
    remove_conditioning(model)
    assert type(model.model) is HiggsAudioV2Model
    assert not conditioning_of(model)
    with torch.no_grad():
        assert torch.equal(before, model(**batch).logits)


def test_what_a_checkpoint_brings_stays_its_own(tmp_path: Path) -> None:
    golden = Golden("whisper")
    model = load_model(golden.save_original_checkpoint(tmp_path), dtype="float32", device="cpu")
    fingerprint = base_fingerprint(model)
    add_conditioning(model, Conditioning(audio_attention=True))
    assert base_fingerprint(model) == fingerprint  # what was added follows from the base
    with torch.no_grad():
        model.model.audio_encoder_proj.linear.weight.mul_(2)
    assert base_fingerprint(model) != fingerprint  # what it brought is part of it


def test_dora_has_no_direction_in_a_zero_weight() -> None:
    model, _ = tiny_prompter(codes=CODES)
    add_conditioning(model, Conditioning(audio_attention=True))
    with pytest.raises(ConfigError, match=r"lora\.dora cannot start from"):
        add_lora(model, Lora(r=2, dora=True), "full")
    add_lora(model, Lora(r=2, dora=True), "full", attention="full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_of_generation_is_the_bases_too(dtype: torch.dtype) -> None:
    model, prompter = tiny_prompter(codes=CODES)
    model = model.to(dtype)
    reference = random_codes(3, seed=1, codes=CODES)
    prompts = [
        prompter.prompt(speech_messages("Hello."), []),
        prompter.prompt(speech_messages("Good morning, everyone.", context=[("Hi.", "r")]), [reference]),
    ]
    rows = torch.full((2, 8), CODES)
    with torch.inference_mode():
        plain = [decoder.step(rows) for decoder in [Decoder(model, prompts)] for _ in range(3)]
        add_conditioning(model, Conditioning(audio_attention=True))
        extended = [decoder.step(rows) for decoder in [Decoder(model, prompts)] for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(plain, extended, strict=True))


def trained_like(model: Any, prompter: Prompter) -> Any:
    """Extensions with weights that matter."""
    add_conditioning(model, both(prompter))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_attn" in name or "audio_encoder_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_every_gradient_of_the_extensions_flows() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    with_training_forward(trained_like(model, prompter))
    sums = model(**pack(examples(prompter, whisper=True)))
    (sums["audio_loss"].sum() + sums["text_loss"]).backward()
    added = [p for name, p in model.named_parameters() if "audio_attn" in name or "audio_encoder_proj" in name]
    assert added
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in added)


def test_a_batch_without_whisper_features_still_reaches_the_projector() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    with_training_forward(trained_like(model, prompter))
    model(**pack(examples(prompter, whisper=False)))["audio_loss"].sum().backward()
    assert torch.equal(model.model.audio_encoder_proj.linear.weight.grad, torch.zeros(64, D_MODEL))


def test_attentions_and_hidden_states_can_be_looked_at() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    trained_like(model, prompter).set_attn_implementation("eager")
    batch = inputs_of(collate(examples(prompter, whisper=True)))
    with torch.no_grad():
        seen = model.model(**batch, output_attentions=True, output_hidden_states=True)
    rows, positions = batch["audio_input_ids"].shape[1], batch["input_ids"].shape[1]
    assert [tuple(weights.shape[-2:]) for weights in seen.attentions] == [(rows, rows), (positions, positions)] * 2
    assert len(seen.hidden_states) == 3


def test_a_cache_that_went_another_way_is_refused() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    trained_like(model, prompter)
    decoder = Decoder(model, [prompter.prompt(speech_messages("Hello."), [])])
    rows = torch.full((1, 8), CODES)
    with torch.inference_mode():
        decoder.step(rows)
        decoder.cache.crop(-1)
        with pytest.raises(ValueError, match="start a new one"):
            decoder.step(rows)


def test_autocast_over_a_float32_base_works_as_in_the_native_class() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    add_conditioning(model, Conditioning(audio_attention=True))
    batch = inputs_of(collate(examples(prompter, whisper=False)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(**batch).logits).all()


def test_flash_attention_is_refused() -> None:
    model, _ = tiny_prompter(codes=CODES)
    add_conditioning(model, Conditioning(audio_attention=True))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot separate examples"):
        find_audio_frames(model.config, torch.zeros(1, 1, 64), None, 1, torch.zeros(1, 1), (torch.zeros(1),) * 2, None)


def test_feature_counts_match_their_tokens() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    request = speech_messages("Sun.", voice="r")
    with pytest.raises(ValueError, match="a projector"):
        Decoder(model, [prompter.prompt(request, [encoded(6, 1)])])
    add_conditioning(model, both(prompter))
    with pytest.raises(DataError, match="6 Whisper features"):
        encoded(6, 1, 5)
    batch = inputs_of(collate(examples(prompter, whisper=True)))
    check_features(model, batch)
    with pytest.raises(ValueError, match="12 Whisper features for 6"):
        check_features(model, batch | {"whisper_features": batch["whisper_features"].repeat(2, 1)})


def test_features_without_a_projector_are_refused() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    with pytest.raises(ValueError, match="a projector"):
        with_training_forward(model)(**pack(examples(prompter, whisper=True)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_equal_padded_ones_and_single_ones(attention: str) -> None:
    model, prompter = tiny_prompter(codes=CODES)
    trained_like(model, prompter).set_attn_implementation(attention)
    made = examples(prompter, whisper=True)
    with torch.no_grad():
        padded = model(**inputs_of(collate(made))).logits
        single = [model(**inputs_of(collate([example]))).logits[0] for example in made]
        packed = model(**in_one_sequence(made)).logits[0]
    start = 0
    for b, (example, alone) in enumerate(zip(made, single, strict=True)):
        assert (padded[b, : len(example)] - alone).abs().max() < 1e-5
        assert (packed[start : start + len(example)] - alone).abs().max() < 1e-5
        start += len(example)


def in_one_sequence(made: list[Example]) -> dict[str, Tensor]:
    """One sequence: positions begin anew with each example."""
    return {
        "input_ids": torch.from_numpy(np.concatenate([e.input_ids for e in made]))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(len(e)) for e in made]))[None],
        "audio_input_ids": torch.from_numpy(np.concatenate([e.audio_input_ids for e in made]))[None],
        "audio_input_ids_mask": torch.ones((1, sum(len(e.audio_input_ids) for e in made)), dtype=torch.bool),
        **feature_tensors(made),
    }


def test_audio_sees_earlier_audio_of_its_own_example_only() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    trained_like(model, prompter)
    # All that is left is audio attention: the shared one gives nothing on.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    made = examples(prompter, whisper=False)[:2]
    batch = in_one_sequence([*made[:1], *made[:1]])
    changed = {**batch, "audio_input_ids": batch["audio_input_ids"].clone()}
    row = 3
    changed["audio_input_ids"][0, row] = 7
    with torch.no_grad():
        moved = (model(**batch).logits - model(**changed).logits)[0].abs().amax(-1) > 0
    places = np.flatnonzero(made[0].audio_mask)
    seen = np.zeros(2 * len(made[0]), dtype=bool)
    seen[places[row:]] = True
    np.testing.assert_array_equal(moved.numpy(), seen)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_teacher_forced_logits_equal_step_by_step_generation(dtype: torch.dtype, tolerance: float) -> None:
    model, prompter = tiny_prompter(codes=CODES)
    trained_like(model, prompter).to(dtype)
    made, prompts, targets = [], [], []
    for i, (text, frames) in enumerate([("Hello.", 6), ("Good morning.", 11), ("Sun.", 3)]):
        target = random_codes(frames, seed=i, codes=CODES)
        # One has a voice in two Whisper chunks, one a reference by its codes, one no audio in its prompt.
        request = speech_messages(text, context=[("Hi.", "r")] if i == 1 else [], voice="r" if i == 0 else None)
        audio: list[Any] = [[encoded(7, 3, 5, 2)], [random_codes(5, 9, codes=CODES)], []][i]
        made.append(prompter.example([*request, TARGET], [*audio, target]))
        prompts.append(prompter.prompt(request, audio))
        targets.append(build_frames(target, bos_id=CODES, eos_id=CODES + 1)[0])
    assert prompts[0].prompt.count("<|audio_bos|><|AUDIO|><|audio_eos|>") == 2
    with torch.inference_mode():
        forced = model(**inputs_of(collate(made))).logits.float().unflatten(-1, (8, CODES + 2))
        decoder = Decoder(model, prompts)
        for r in range(max(map(len, targets)) - 1):
            logits = decoder.step(torch.tensor(np.stack([rows[min(r, len(rows) - 1)] for rows in targets]))).float()
            for b, rows in enumerate(targets):
                if r < len(rows) - 1:
                    at = np.flatnonzero(made[b].audio_mask)[-len(rows) + r]
                    assert (logits[b] - forced[b, at]).abs().max() < tolerance
