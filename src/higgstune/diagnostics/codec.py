"""Checks of the codec: in eval mode, separate from the model, deterministic, and the one that encoded the data."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from higgstune.codec import Codec
from higgstune.diagnostics.report import Finding, naming
from higgstune.errors import DataError
from higgstune.families.base import Spec

CHECK = "codec"
_SECONDS = 1.0  # of audio that is encoded and decoded
_FRAME_RATE = 25.0  # frames per second of the model


def check_modes(codec: Codec, model: nn.Module | None = None) -> list[Finding]:
    """Check that all modules of the codec are in eval mode, and none is part of the model."""
    modules = list(_modules(codec))
    training = [type(module).__name__ for module in modules if module.training]
    findings = []
    if training:
        text = f"{len(training)} modules of the codec are in train mode ({naming(sorted(set(training)))}): dropout"
        findings.append(
            Finding(CHECK, "failed", f"{text} changes codes", "load it with load_codec, and never call .train() on it")
        )
    inside = {id(module) for module in model.modules()} if model is not None else set()
    if any(id(module) in inside for module in modules):
        text = "the codec is part of the model's module tree: training would switch it to train mode and adapt it"
        findings.append(Finding(CHECK, "failed", text, "keep it beside the model, as load_model_and_tokenizers does"))
    return findings or [Finding(CHECK, "ok", "in eval mode, and not part of the model")]


def check_codes(codec: Codec) -> list[Finding]:
    """Check that encoding is repeatable, codes are in range, and decoding gives the right length."""
    audio = _test_signal(codec)
    first, second = _encode(codec, audio, seed=1), _encode(codec, audio, seed=2)
    problems = _shape_problems(codec, first, audio)
    if first.shape != second.shape or (first != second).any():
        share = float((first != second).mean()) if first.shape == second.shape else 1.0
        problems.append(f"encoding the same audio twice gives different codes ({100 * share:.0f} % differ)")
    if first.size and int(first.max()) >= codec.codebook_size:
        problems.append(f"it returned the code {first.max()}, outside of 0 to {codec.codebook_size - 1}")
    if not problems:
        problems = _decoding_problems(codec, first, audio)
    if problems:
        advice = "use the checkpoint's own codec, and prepare the data again: codes that change cannot be learnt"
        return [Finding(CHECK, "failed", "; ".join(problems), advice)]
    text = f"{_SECONDS:g} s of audio always gives the same {len(first)} frames, which decode to {_SECONDS:g} s"
    return [Finding(CHECK, "ok", text)]


def check_fit(codec: Codec, spec: Spec) -> list[Finding]:
    """Check that codec and model have the same codebooks."""
    found = (codec.num_codebooks, codec.codebook_size)
    expected = (spec.num_codebooks, spec.codes)
    if found == expected:
        return [Finding(CHECK, "ok", f"{found[0]} codebooks of {found[1]}, as the checkpoint expects")]
    text = f"it has {found[0]} codebooks of {found[1]}, the checkpoint expects {expected[0]} of {expected[1]}"
    return [Finding(CHECK, "failed", text, "name the checkpoint's own codec with --codec")]


def check_revision(codec: Codec, made_with: str | None, what: str, advice: str) -> list[Finding]:
    """Check that `what` (the store, the adapter) was made with this codec."""
    if made_with is None:
        return [Finding(CHECK, "warning", f"{what} does not name its codec", advice)]
    if made_with == codec.revision:
        return [Finding(CHECK, "ok", f"{what} was made with this codec (revision {made_with})")]
    text = f"{what} was made with a codec of revision {made_with}, this one has {codec.revision}: the codes differ"
    return [Finding(CHECK, "failed", text, advice)]


def _modules(codec: Codec) -> Iterable[nn.Module]:
    """All torch modules of the codec, if it has any."""
    held = [codec] if isinstance(codec, nn.Module) else list(getattr(codec, "__dict__", {}).values())
    for value in held:
        if isinstance(value, nn.Module):
            yield from value.modules()


def _test_signal(codec: Codec) -> np.ndarray:
    """[samples] float32: a fixed gliding tone with a little noise."""
    time = np.arange(round(_SECONDS * codec.sample_rate)) / codec.sample_rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * (180 + 120 * time) * time) + 0.02 * noise).astype(np.float32)


def _encode(codec: Codec, audio: np.ndarray, *, seed: int) -> np.ndarray:
    """Encode with a random seed, which the codes must not depend on. The caller's random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return np.asarray(codec.encode(audio))


def _shape_problems(codec: Codec, codes: np.ndarray, audio: np.ndarray) -> list[str]:
    frames = round(len(audio) / codec.sample_rate * codec.frame_rate)
    problems = []
    if codec.frame_rate != _FRAME_RATE:
        problems.append(f"it has {codec.frame_rate:g} frames per second, not {_FRAME_RATE:g}")
    if codes.shape != (frames, codec.num_codebooks):
        problems.append(f"{_SECONDS:g} s gave codes of {codes.shape}, not {(frames, codec.num_codebooks)}")
    return problems


def _decoding_problems(codec: Codec, codes: np.ndarray, audio: np.ndarray) -> list[str]:
    try:
        waveform = codec.decode(codes)
    except (DataError, RuntimeError) as error:
        return [f"it cannot decode its own codes: {error}"]
    if waveform.shape != audio.shape:
        return [f"{len(audio)} samples decode to {waveform.shape}"]
    return [] if np.isfinite(waveform).all() else ["decoded audio has NaN or infinity"]
