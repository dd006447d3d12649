"""From text to speech: the verb `speak`, and the `Speaker` behind it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from higgstune.checkpoint_files import read_json
from higgstune.config.recipe import Quantize
from higgstune.data.audio import write_wav
from higgstune.data.messages import DEFAULT_SCENE, ReferencePlace
from higgstune.errors import CheckpointError, InputError
from higgstune.families import family_in
from higgstune.families.sampling import Sampling
from higgstune.generate.speaker import Speaker, _trained_place
from higgstune.hub import fetch
from higgstune.inputs import check_wav_name, find_adapter
from higgstune.model.adapter_folder import adapter_card, check_adapter_family
from higgstune.model.load import ModelAndTokenizers, load_model_and_tokenizers


def load_base(
    model: str | Path | None,
    adapter: Path | None,
    *,
    codec: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
) -> ModelAndTokenizers:
    """A base, without the adapter whose folder may name it and its codec. Raises CheckpointError, ConfigError."""
    if adapter is not None:
        card = adapter_card(adapter)
        if model is None:
            model = read_json(adapter / "adapter_config.json", "").get("base_model_name_or_path")
            revision = revision or card.get("revision")
        codec = codec or card.get("codec")
    if model is None:
        raise InputError("name a base (--model) or an adapter (--adapter)")
    try:
        if adapter is not None:
            folder = fetch(model, what="checkpoint", revision=revision, weights=False)
            check_adapter_family(adapter, family_in(folder)[0])
        return load_model_and_tokenizers(
            model, codec=codec, dtype=dtype, device=device, revision=revision, quantize=quantize
        )
    except CheckpointError as error:
        if adapter is None:
            raise
        raise CheckpointError(
            f"{error}\n(the adapter {adapter} names its base and codec; where they have moved, say so with --model and "
            "--codec)"
        ) from error


def load_speaker(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    codec: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    reference_place: ReferencePlace | None = None,
    whisper: str | Path | None = None,
    quantize: Quantize | None = None,
) -> Speaker:
    """A speaker from a base, an adapter (its folder or its run's), or both; the adapter knows its base and codec.

    `quantize` ("4bit") puts the base into 4 bits, whatever the adapter was trained on. Raises CheckpointError,
    ConfigError.
    """
    folder = find_adapter(adapter) if adapter is not None else None
    loaded = load_base(model, folder, codec=codec, dtype=dtype, device=device, revision=revision, quantize=quantize)
    return Speaker(loaded, folder, reference_place=reference_place, whisper=whisper)


def speak(
    text: str | Sequence[str],
    out: str | Path,
    *,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    codec: str | Path | None = None,
    reference: str | Path | None = None,
    reference_text: str | None = None,
    scene: str | None = DEFAULT_SCENE,
    sampling: Sampling | None = None,
    seed: int = 0,
    max_seconds: float | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    reference_place: ReferencePlace | None = None,
    whisper: str | Path | None = None,
    quantize: Quantize | None = None,
    on_spoken: Callable[[int], None] | None = None,
) -> list[Path]:
    """Speak one text into the file `out`, or several into the folder `out` (0001.wav, ...). Gives the files.

    Raises InputError, CheckpointError or DataError as `load_speaker`, `Speaker.reference` and `Speaker.say`.
    """
    words = (reference_text or "").strip()
    folders = find_adapter(adapter) if adapter is not None else None, Path(model) if model is not None else None
    needs_words = reference is not None and (reference_place or _trained_place(*folders)) == "turn"
    if needs_words != bool(words) and (needs_words or reference is None):
        raise InputError(
            "a reference needs both the recording (--reference) and its transcript (--reference-text), unless the "
            "adapter was trained with references in the scene"
        )
    texts = [text] if isinstance(text, str) else list(text)
    files = [Path(out)] if isinstance(text, str) else [Path(out) / f"{i:04d}.wav" for i in range(1, len(texts) + 1)]
    for file in files:
        check_wav_name(file)
    if reference_place not in (None, *get_args(ReferencePlace)):
        raise InputError(f"reference_place is {reference_place!r}: one of {', '.join(get_args(ReferencePlace))}")
    speaker = load_speaker(
        model,
        adapter,
        codec=codec,
        dtype=dtype,
        device=device,
        revision=revision,
        reference_place=reference_place,
        whisper=whisper,
        quantize=quantize,
    )
    voice = speaker.reference(reference, words) if reference is not None else None
    for first in range(0, len(texts), batch_size):  # written batch by batch: a long list that is stopped keeps them
        spoken = speaker.say(
            texts[first : first + batch_size],
            reference=voice,
            scene=scene,
            sampling=sampling,
            seed=seed + first,
            max_seconds=max_seconds,
            batch_size=batch_size,
        )
        for file, speech in zip(files[first:], spoken, strict=False):
            write_wav(file, speech.waveform, speech.sample_rate)
        if on_spoken is not None:
            on_spoken(first + len(spoken))
    return files
