"""A checkpoint: its files, its config, its weights and its rotary buffers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.checkpoint_files import FILES, Layout, check_checksums, folder_card
from higgstune.diagnostics.report import Finding, naming
from higgstune.families.higgs_v2.checkpoint import _inverse_frequencies, empty_model, native_state
from higgstune.families.higgs_v2.extensions import base_of, is_conditioning_key
from higgstune.kernels.quantize import dequantized

CHECK = "checkpoint"
ROTARY = "rotary"
_AGAIN = "copy or download the checkpoint again"
_ENCODER = "audio_tower."  # Whisper's encoder in an original checkpoint; it is no part of the native model


def check_tensors(layout: Layout, config: HiggsAudioV2Config) -> list[Finding]:
    """Every tensor of the model is in the files, with the shape that the config asks for. Reads headers alone."""
    expected = {key: tuple(value.shape) for key, value in empty_model(config).state_dict().items()}
    found = _shapes(layout)
    missing = sorted(expected.keys() - found.keys())
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    extra = sorted(key for key in found.keys() - expected.keys() if not _is_known_extra(key))
    findings = []
    if missing:
        text = f"{len(missing)} of {len(expected)} tensors are missing: {naming(missing)}"
        if missing == ["text_lm_head.weight"]:
            text = "text_lm_head.weight is missing: the checkpoint was saved without its text head"
        findings.append(Finding(CHECK, "failed", f"{layout.folder}: {text}", _AGAIN))
    if wrong:
        key = wrong[0]
        text = f"{len(wrong)} tensors do not have the shape that config.json asks for, such as {key}"
        text += f": {found[key]}, not {expected[key]}"
        findings.append(Finding(CHECK, "failed", f"{layout.folder}: {text}", "use the config.json of these weights"))
    if extra:
        text = f"{len(extra)} tensors have no place in the model and are not used: {naming(extra)}"
        findings.append(Finding(CHECK, "warning", f"{layout.folder}: {text}", "is it a checkpoint of Higgs Audio v2?"))
    if not missing and not wrong:
        text = f"{layout.folder}: {layout.kind} layout, all {len(expected)} tensors are there"
        if extension := sum(map(is_conditioning_key, found)):
            text += f", and {extension} of its extensions"
        findings.append(Finding(CHECK, "ok", text))
    return findings


def check_config(config: HiggsAudioV2Config) -> list[Finding]:
    """The ids that the config gives to special tokens and codes fit together."""
    problems = []
    names = ("audio_token_id", "audio_bos_token_id", "audio_delay_token_id", "bos_token_id", "pad_token_id")
    ids = {name: getattr(config, name) for name in names if isinstance(getattr(config, name), int)}
    problems += [f"{name} {i} is outside the vocabulary of {config.vocab_size}" for name, i in ids.items()
                 if not 0 <= i < config.vocab_size]  # fmt: skip
    audio = [name for name in ids if name.startswith("audio_")]
    if len({ids[name] for name in audio}) < len(audio):
        problems.append("two of " + ", ".join(f"{name} {ids[name]}" for name in audio) + " are the same")
    bos, eos = config.audio_stream_bos_id, config.audio_stream_eos_id
    if sorted((bos, eos)) != [config.codebook_size - 2, config.codebook_size - 1]:
        problems.append(f"the stream ids {bos} and {eos} must be the last two of codebook_size {config.codebook_size}")
    if not problems:
        return [Finding(CHECK, "ok", "the special ids of config.json fit together")]
    return [Finding(CHECK, "failed", f"config.json: {'; '.join(problems)}", "use the config.json of these weights")]


def check_recorded_checksums(folder: Path) -> list[Finding]:
    """The weight files are those that were written, where Higgstune wrote them. Raises CheckpointError."""
    recorded = folder_card(folder).get(FILES)
    if not recorded:
        return []
    check_checksums(folder)
    return [Finding(CHECK, "ok", f"{len(recorded)} weight files have their recorded checksums")]


def check_weights(model: Any) -> list[Finding]:
    """Loaded weights are finite, none is all zero, and no pathway is a copy of the other."""
    broken, zero = [], []
    for name, weight in base_of(model).named_parameters():
        # NaN makes both NaN, and in 4 bits all of a weight, by the mean of its scales.
        low, high = (bound.item() for bound in torch.aminmax(dequantized(weight).detach()))
        if not (low > -torch.inf and high < torch.inf):
            broken.append(name)
        elif low == high == 0 and not _starts_at_zero(name):
            zero.append(name)
    findings = []
    if broken:
        text = f"{len(broken)} tensors hold NaN or infinity: {naming(broken)}"
        findings.append(Finding(CHECK, "failed", text, f"{_AGAIN}; a training run or a merge may have written it"))
    if zero:
        text = f"{len(zero)} tensors are zero throughout: {naming(zero)}"
        findings.append(Finding(CHECK, "failed", text, f"{_AGAIN}: the model cannot work with them"))
    if not broken:
        findings += _check_copies(base_of(model))
    return findings or [Finding(CHECK, "ok", "all weights are finite, none is zero throughout")]


def check_rotary(model: Any) -> list[Finding]:
    """The rotary buffers are what the config says, computed anew in float32 on the CPU."""
    inner = base_of(model).model
    expected, _ = _inverse_frequencies(inner.config)
    problems = []
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(inner.rotary_emb, name, None)
        if problem := _buffer_problem(buffer, expected):
            problems.append(f"{name} {problem}")
    if not problems:
        kind = inner.config.rope_parameters["rope_type"]
        return [Finding(ROTARY, "ok", f"{len(expected)} frequencies ({kind}) are those of the config, in float32")]
    return [
        Finding(
            ROTARY,
            "failed",
            f"rotary_emb: {'; '.join(problems)}: every position is read as another one",
            "cast weights with `dtype` when loading, not the loaded model with .to(); load it anew with load_model",
        )
    ]


def check_stored_rotary(layout: Layout, config: HiggsAudioV2Config) -> list[Finding]:
    """The config says how positions are rotated, and as the buffers do that some checkpoints keep."""
    written = layout.config | (layout.config.get("text_config") or {})
    if not any(written.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")):
        text = f"{layout.folder / 'config.json'} has no rope_parameters: default frequencies are used"
        return [Finding(ROTARY, "warning", text, "use the config.json that the weights were trained with")]
    stored = [(file, key) for file in layout.weights for key in _keys(file) if key.endswith("rotary_emb.inv_freq")]
    expected, _ = _inverse_frequencies(config)
    for file, key in stored:
        with safe_open(file, "pt") as weights:
            buffer = weights.get_tensor(key).float()
        if buffer.shape != expected.shape or not torch.allclose(buffer, expected, rtol=0.01):
            text = f"{file}: {key} holds other frequencies than rope_parameters in config.json give"
            return [Finding(ROTARY, "failed", text, "use the config.json that the weights were trained with")]
    return []


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names as in the native layout -> shapes, from the headers."""
    state: dict[str, Tensor] = {}
    for file in layout.weights:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                state[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
    if layout.kind == "original":
        state = native_state({key: value for key, value in state.items() if not key.startswith(_ENCODER)})
    return {key: tuple(value.shape) for key, value in state.items()}


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _is_known_extra(key: str) -> bool:
    return is_conditioning_key(key) or key.endswith(("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"))


def _starts_at_zero(name: str) -> bool:
    """Extensions that were added and not trained yet are an exact identity, biases may be zero."""
    return is_conditioning_key(name) or name.endswith(".bias")


def _check_copies(model: HiggsAudioV2ForConditionalGeneration) -> list[Finding]:
    """Tensors that are bit for bit another one where training would have made them differ."""
    copies = [name for name, a, b in _twins(model) if a.data_ptr() == b.data_ptr() or torch.equal(a, b)]
    if not copies:
        return []
    text = f"{len(copies)} tensors are copies of another part of the model: {naming(copies)}"
    advice = "untrained or copied parts speak badly: is it the released checkpoint, converted completely?"
    return [Finding(CHECK, "warning", text, advice)]


def _twins(model: HiggsAudioV2ForConditionalGeneration) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield (
        "audio_lm_head is embed_audio_tokens",
        model.audio_lm_head.weight,
        model.model.embed_audio_tokens.embed_audio_tokens.weight,
    )
    if model.text_lm_head is not None and not model.config.tie_word_embeddings:
        yield "text_lm_head is embed_tokens", model.text_lm_head.weight, model.model.embed_tokens.weight
    for index, layer in enumerate(model.model.layers):
        yield f"layers.{index}.audio_mlp is mlp", layer.audio_mlp.down_proj.weight, layer.mlp.down_proj.weight


def _buffer_problem(buffer: Tensor | None, expected: Tensor) -> str | None:
    if buffer is None:
        return "is missing"
    if buffer.dtype != torch.float32:
        return f"is {str(buffer.dtype).removeprefix('torch.')}, not float32"
    found = buffer.detach().cpu()
    if not torch.isfinite(found).all():
        return "holds NaN or infinity"
    if found.shape != expected.shape:
        return f"has {len(found)} frequencies, not {len(expected)}"
    gap = ((found - expected).abs() / expected).max().item()
    return f"differs from the config's frequencies by up to {100 * gap:.2g} %" if gap > 1e-5 else None
