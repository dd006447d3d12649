"""A loaded checkpoint that speaks, and what it is given and gives."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from higgstune.checkpoint_files import folder_card
from higgstune.codec.base import WhisperFeatures
from higgstune.codec.whisper_encoder import WhisperTower, load_whisper
from higgstune.data.audio import read_audio, resample
from higgstune.data.messages import DEFAULT_SCENE, ReferencePlace, speech_messages
from higgstune.data.text import normalize_text
from higgstune.errors import CheckpointError, InputError
from higgstune.families.base import Audio, Example, WhisperSpec
from higgstune.families.sampling import Sampling
from higgstune.generate.chunks import frame_cap, join, split_text
from higgstune.generate.engine import Generated, generate
from higgstune.model.adapter_folder import adapter_card, adapter_conditioning
from higgstune.model.load import ModelAndTokenizers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A reference: somebody's words and their codes [frames, K], and what Whisper hears, where the model listens."""

    text: str
    codes: np.ndarray
    heard: WhisperFeatures | None = None


@dataclass(frozen=True)
class Request:
    """A text to be spoken, in which voice and scene, drawn with which seed."""

    text: str
    voice: Voice | None = None
    scene: str | None = DEFAULT_SCENE
    seed: int = 0


@dataclass(frozen=True)
class Speech:
    """One spoken text."""

    text: str  # as it was given to the model, normalised
    waveform: np.ndarray  # [samples] float32
    sample_rate: int
    hit_cap: bool  # some piece was ended by its frame cap, not by the model

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.waveform) / self.sample_rate


class Speaker:
    """A loaded checkpoint, with or without an adapter, that speaks."""

    def __init__(
        self,
        loaded: ModelAndTokenizers,
        adapter: Path | None = None,
        *,
        model: Any = None,
        reference_place: ReferencePlace | None = None,
        whisper: str | Path | None = None,
    ) -> None:
        """`model` is `loaded.model` with an adapter that is on it already, as in training. `reference_place` is where a
        reference stands in the prompt: as the adapter was trained, where not given. `whisper` names the Whisper
        checkpoint of a model that listens, where it has moved.

        Raises CheckpointError when the adapter does not fit the checkpoint or was trained with another codec.
        """
        self.loaded = loaded
        self.codec = loaded.audio_tokenizer
        self.prompter = loaded.prompter
        if adapter is not None:
            from higgstune.model.adapters import load_adapter  # imports peft

            model = load_adapter(loaded.model, adapter)
        self.model = loaded.model if model is None else model
        self.reference_place: ReferencePlace = reference_place or _trained_place(adapter, loaded.folder)
        self._whisper_spec = loaded.family.extensions.of(self.model).whisper
        if adapter is not None:  # a base may listen, and the adapter have been trained to read codes
            self._whisper_spec = adapter_conditioning(adapter).whisper
        if whisper is not None and self._whisper_spec is None:
            raise InputError("--whisper has no effect: this model was not trained to hear through Whisper")
        self._whisper_name = whisper
        self._loaded_tower: WhisperTower | None = None
        trained_with = adapter_card(adapter).get("codec_revision") if adapter is not None else None
        if trained_with not in (None, self.codec.revision):
            raise CheckpointError(
                f"the adapter {adapter} was trained on codes of another codec (revision {trained_with}) than "
                f"{loaded.codec} (revision {self.codec.revision}): name its codec with --codec"
            )

    @property
    def whisper_spec(self) -> WhisperSpec | None:
        """What a reference is heard through, where it is heard."""
        return self._whisper_spec if self.uses_whisper else None

    @property
    def uses_whisper(self) -> bool:
        """Whether a reference is heard through Whisper, where it is not read by its codes."""
        return self._whisper_spec is not None and self.reference_place == "scene"

    def reference(self, path: str | Path, text: str = "") -> Voice:
        """A recording and what is said in it, as a voice to imitate; in the scene it stands without its words.

        Raises DataError when it cannot be read, CheckpointError when the model listens through a Whisper checkpoint
        that is not there or is another one than it was trained with.
        """
        waveform, rate = read_audio(path)
        heard = None
        if self._whisper_spec is not None and self.uses_whisper:
            tower = self._tower(self._whisper_spec)
            heard = tower.encode(resample(waveform, rate, tower.sample_rate))
        return Voice(normalize_text(text), self.codec.encode(resample(waveform, rate, self.codec.sample_rate)), heard)

    def _tower(self, shape: WhisperSpec) -> WhisperTower:
        if self._loaded_tower is not None:
            return self._loaded_tower
        tower = self.loaded.whisper
        if tower is None or self._whisper_name is not None:
            try:
                tower = load_whisper(self._whisper_name or shape.checkpoint, device=self.loaded.model.device)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}\n(the model hears through it; where it has moved, say so with --whisper)"
                ) from error
        if tower.revision != shape.revision:
            raise CheckpointError(
                f"the model was trained to hear through {shape.checkpoint} (revision {shape.revision}); "
                f"{tower.checkpoint} has the revision {tower.revision}: name the right one with --whisper"
            )
        self._loaded_tower = tower
        return tower

    def say(
        self,
        texts: Sequence[str],
        *,
        reference: Voice | None = None,
        scene: str | None = DEFAULT_SCENE,
        sampling: Sampling | None = None,
        seed: int = 0,
        max_seconds: float | None = None,
        batch_size: int = 8,
        on_spoken: Callable[[int], None] | None = None,
    ) -> list[Speech]:
        """Speak texts in one voice and scene. Text i is drawn with seed + i. The rest as `say_each`."""
        return self.say_each(
            [Request(text, reference, scene, seed + i) for i, text in enumerate(texts)],
            sampling=sampling,
            max_seconds=max_seconds,
            batch_size=batch_size,
            on_spoken=on_spoken,
        )

    def say_each(
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        max_seconds: float | None = None,
        batch_size: int = 8,
        on_spoken: Callable[[int], None] | None = None,
        sync_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Speech]:
        """Speak texts, `batch_size` at a time, each in its own voice.

        Each piece of a long text hears the one before.
        `max_seconds` caps every piece, in place of the cap from the text's length. Raises InputError on an empty
        text, DataError on control tokens in it. `on_spoken` is told how many texts are done. `sync_logits`: see
        `generate`.
        """
        if max_seconds is not None and not max_seconds > 0:
            raise InputError(f"max_seconds is {max_seconds}: it must be above 0")
        clips = [_Clip(request, max_seconds) for request in requests]
        for first in range(0, len(clips), batch_size):
            batch = clips[first : first + batch_size]
            while pending := [clip for clip in batch if not clip.done]:
                prompts = [self._prompt(clip) for clip in pending]
                caps = [self._cap(clip.next_text, clip.max_seconds) for clip in pending]
                spoken = generate(
                    self.model,
                    prompts,
                    max_frames=caps,
                    seeds=[clip.request.seed for clip in pending],
                    sampling=sampling,
                    sync_logits=sync_logits,
                )
                for clip, piece in zip(pending, spoken, strict=True):
                    clip.spoken.append(piece)
            if on_spoken is not None:
                on_spoken(min(first + batch_size, len(clips)))
        return [self._speech(clip) for clip in clips]

    def _prompt(self, clip: "_Clip") -> Example:
        reference, scene = clip.request.voice, clip.request.scene
        in_scene = reference is not None and self.reference_place == "scene"
        context = [reference] if reference is not None and not in_scene else []
        if clip.spoken:
            context.append(Voice(clip.pieces[len(clip.spoken) - 1], clip.spoken[-1].codes))
        messages = speech_messages(
            clip.next_text,
            scene=scene,
            context=[(voice.text, "context") for voice in context],
            voice="reference" if in_scene else None,
        )
        audio: list[Audio] = [voice.codes for voice in context]
        if reference is not None and in_scene:
            audio.insert(0, reference.codes if reference.heard is None else reference.heard)
        return self.prompter.prompt(messages, audio)

    def _cap(self, text: str, max_seconds: float | None) -> int:
        rate = self.codec.frame_rate
        return frame_cap(text, rate) if max_seconds is None else max(1, round(max_seconds * rate))

    def _speech(self, clip: "_Clip") -> Speech:
        hit_cap = any(piece.hit_cap for piece in clip.spoken)
        if hit_cap:
            for text in (text for text, piece in zip(clip.pieces, clip.spoken, strict=True) if piece.hit_cap):
                logger.warning(
                    "did not stop by itself and was cut at the frame cap, %.1f s: %r (train longer, lower the "
                    "temperature, or try another seed)",
                    self._cap(text, clip.max_seconds) / self.codec.frame_rate,
                    text,
                )
        waveform = join([self.codec.decode(piece.codes) for piece in clip.spoken], self.codec.sample_rate)
        return Speech(clip.text, waveform, self.codec.sample_rate, hit_cap)


class _Clip:
    """A text on its way: its pieces, and those already spoken."""

    def __init__(self, request: Request, max_seconds: float | None) -> None:
        self.request = request
        self.text = normalize_text(request.text)
        self.max_seconds = max_seconds
        self.pieces = split_text(self.text)
        self.spoken: list[Generated] = []
        if not self.pieces:
            raise InputError("there is no text to speak")

    @property
    def done(self) -> bool:
        return len(self.spoken) == len(self.pieces)

    @property
    def next_text(self) -> str:
        return self.pieces[len(self.spoken)]


def _trained_place(adapter: Path | None, checkpoint: Path | None) -> ReferencePlace:
    """Where the reference stands in the prompts that an adapter, or the one in a merged checkpoint, was trained on."""
    if adapter is not None:
        card = adapter_card(adapter)
    else:
        card = {} if checkpoint is None else folder_card(checkpoint).get("adapter", {})
    place: ReferencePlace = card.get("recipe", {}).get("data", {}).get("reference", "turn")
    return place
