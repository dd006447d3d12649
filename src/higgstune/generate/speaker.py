"""A loaded checkpoint that speaks, with its requests and results."""

import logging
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from higgstune.codec.base import PieceDecoder, encode_reference
from higgstune.codec.whisper_encoder import WhisperTower, load_whisper
from higgstune.data.audio import MAX_SECONDS, resample
from higgstune.data.clips import read_reference, spoken_text
from higgstune.data.messages import DEFAULT_SCENE, ReferencePlace, speech_messages
from higgstune.data.rejection import shown
from higgstune.data.rules import TextRules
from higgstune.errors import CheckpointError, InputError
from higgstune.families.base import Audio, Example, FamilyInfo, WhisperSpec
from higgstune.families.sampling import Sampling
from higgstune.generate.added import AddedAdapter, check_codec, read_added, trained_place, trained_sampling
from higgstune.generate.chunks import FAR_OFF, Pace, expected_seconds, faded, frame_cap, join, pause, split_text
from higgstune.generate.engine import SLOTS, Engine, Generated, Job
from higgstune.generate.speech import Request, Speech, Voice
from higgstune.inputs import BaseSpec, base_and_adapter, find_adapter
from higgstune.model.adapter_folder import (
    adapter_conditioning,
    check_merged_once,
    check_tokenizer,
)
from higgstune.model.load import ModelAndTokenizers, load_base

logger = logging.getLogger(__name__)
Check = Callable[[str, np.ndarray], float]
WRONG_WORDS = 0.2  # a share of a piece's words beyond which it is spoken again; an ASR itself errs in 2 to 5 %
_TRIES = 3
_OTHER_SEED = 1_000_003  # added for another try: no list of texts gets as far by counting
_WINDOW = 8  # times the clips at once: texts among which the first may wait for longer ones
_ADVICE = "try another seed or a lower temperature; if many texts are spoken so, see the verdict in the run's report"


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
        """`model` is `loaded.model` with its adapter already loaded, as in training; it speaks with its weights as they
        are at each call. `reference_place` is the place of
        a reference in the prompt (None: as the adapter was trained). `whisper` names the Whisper checkpoint of a model
        that uses Whisper, if it has moved.

        Raises CheckpointError if the adapter does not fit the checkpoint or was trained with another codec, InputError
        for an unknown `reference_place` or a `whisper` without effect.
        """
        if reference_place not in (None, *get_args(ReferencePlace)):
            raise InputError(f"reference_place {reference_place!r}: one of {', '.join(get_args(ReferencePlace))}")
        self.loaded = loaded
        self._live = model is not None
        self._engine: Engine | None = None
        self.codec = loaded.audio_tokenizer
        self.prompter = loaded.prompter
        if adapter is not None:
            from higgstune.model.adapters import doubts_of, load_adapter  # imports peft

            if loaded.folder is not None:
                check_merged_once(adapter, loaded.folder)
                check_tokenizer(adapter, loaded.folder)
            model = load_adapter(loaded.model, adapter)
            for doubt in doubts_of(adapter, model, loaded.folder):
                logger.warning("%s", doubt)
        self.model = loaded.model if model is None else model
        self.sampling = trained_sampling(adapter, loaded.folder)
        self.reference_place: ReferencePlace = reference_place or trained_place(adapter, loaded.folder)
        self._whisper_spec = loaded.family.extensions.of(self.model).whisper
        if adapter is not None:  # a base may use Whisper although the adapter was trained on codes
            self._whisper_spec = adapter_conditioning(adapter).whisper
        if whisper is not None and self._whisper_spec is None:
            raise InputError("--whisper has no effect: this model was not trained with Whisper")
        self._whisper_name = whisper
        self._loaded_tower: WhisperTower | None = None
        if adapter is not None:
            check_codec(adapter, loaded)
        self._adapter = adapter
        self._added: dict[str, AddedAdapter] = {}

    def add_adapter(self, name: str, adapter: str | Path) -> None:
        """An adapter, of a run or a folder, that requests may name: clips of the base and of many adapters are spoken
        in one batch, each with its own.

        Raises InputError for a name in use, and where this speaker has an adapter of its own; CheckpointError for an
        adapter of another base, family or codec, and for one that cannot stand beside others (DoRA, modules trained in
        full, audio attention, Whisper): export those merged.
        """
        if self._adapter is not None or self._live:
            raise InputError(f"{name}: load the base alone to add adapters; this speaker has one of its own")
        if not name or name in self._added:
            raise InputError(f"an adapter cannot be named {name!r}: " + ("it is in use" if name else "it is empty"))
        added = read_added(find_adapter(adapter), self.loaded)
        if self._engine is not None:
            self._engine.add_adapter(name, added.lora)
        self._added[name] = added

    def remove_adapter(self, name: str) -> None:
        """Forget an added adapter. Raises InputError for an unknown one, and while it speaks."""
        self._find_added(name)
        if self._engine is not None:
            self._engine.remove_adapter(name)
        del self._added[name]

    def _find_added(self, name: str) -> AddedAdapter:
        if name not in self._added:
            raise InputError(f"no adapter {name!r} was added: there are {', '.join(sorted(self._added)) or 'none'}")
        return self._added[name]

    def _sampling_of(self, request: Request) -> Sampling:
        return self._find_added(request.adapter).sampling if request.adapter else self.sampling

    def _place_of(self, request: Request) -> ReferencePlace:
        return self._find_added(request.adapter).reference_place if request.adapter else self.reference_place

    @property
    def whisper_spec(self) -> WhisperSpec | None:
        """The Whisper encoder for references; None if references are read by their codes."""
        return self._whisper_spec if self.uses_whisper else None

    @property
    def generated_by(self) -> dict[str, str] | None:
        """What the speech of this model carries about its origin."""
        info = self.loaded.family.info
        return None if info.speech_licence is None else {"family": info.name, "licence": info.speech_licence}

    @property
    def texts(self) -> TextRules:
        """The rules for the texts of the model."""
        return self.loaded.family.info.texts

    @property
    def uses_whisper(self) -> bool:
        """Whether Whisper encodes references; otherwise they are read by their codes."""
        return self._whisper_spec is not None and self.reference_place == "scene"

    def reference(self, path: str | Path, text: str = "") -> Voice:
        """A recording and its transcript, as a voice to imitate; a reference in the scene needs no transcript.

        Raises DataError for a recording or transcript that `prepare` would refuse as well, CheckpointError as `voice`.
        """
        if text:
            spoken_text(text, "the transcript of the reference", self.texts)
        return self.voice(*read_reference(path, self.codec.frame_rate, text, self.texts), text)

    def voice(self, waveform: np.ndarray, rate: int, text: str = "") -> Voice:
        """A voice from a waveform [samples] float32 at `rate` Hz, which is not checked, and its transcript.

        Raises CheckpointError if the model's Whisper checkpoint is missing or not the one of training.
        """
        features = None
        if self._whisper_spec is not None and self.uses_whisper:
            tower = self._tower(self._whisper_spec)
            features = tower.encode(resample(waveform, rate, tower.sample_rate))
        codes = encode_reference(self.codec, resample(waveform, rate, self.codec.sample_rate))
        return Voice(self.texts.normalized(text), codes, features)

    def _tower(self, shape: WhisperSpec) -> WhisperTower:
        if self._loaded_tower is not None:
            return self._loaded_tower
        tower = self.loaded.whisper
        if tower is None or self._whisper_name is not None:
            try:
                tower = load_whisper(self._whisper_name or shape.checkpoint, device=self.loaded.model.device)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}\n(the model needs this Whisper checkpoint: if it has moved, name it with --whisper)"
                ) from error
        if tower.revision != shape.revision:
            raise CheckpointError(
                f"the model was trained with the Whisper checkpoint {shape.checkpoint} (revision {shape.revision}); "
                f"{tower.checkpoint} has the revision {tower.revision}: name the right one with --whisper"
            )
        self._loaded_tower = tower
        return tower

    def speak(
        self,
        text: str,
        *,
        reference: Voice | str | Path | None = None,
        reference_text: str = "",
        scene: str | None = DEFAULT_SCENE,
        sampling: Sampling | None = None,
        seed: int = 0,
        max_seconds: float | None = None,
        adapter: str = "",
    ) -> Speech:
        """Speak one text; the same seed repeats the same speech.

        `reference` is a recording to imitate, which needs its transcript in `reference_text` unless the model was
        trained with references in the scene, or a voice that was read before (see `reference`). The rest as
        `speak_all`. Raises InputError for a missing transcript, DataError as `reference` and `speak_all`,
        CheckpointError as `reference`.
        """
        request = Request(text, self._voice(reference, reference_text), scene, seed, adapter)
        [speech] = self.speak_all([request], sampling=sampling, max_seconds=max_seconds)
        warn_of_duration(speech)
        return speech

    def stream(
        self,
        text: str,
        *,
        reference: Voice | str | Path | None = None,
        reference_text: str = "",
        scene: str | None = DEFAULT_SCENE,
        sampling: Sampling | None = None,
        seed: int = 0,
        max_seconds: float | None = None,
        adapter: str = "",
    ) -> Iterator[np.ndarray]:
        """Speak one text and yield it while it is made: waveforms [samples] float32 at `codec.sample_rate`.

        Joined, they are the waveform of `speak`, but for rounding: the codec decodes parts together with the frames
        around them (see `PieceDecoder`; a codec without such a context gives a sentence or more at a time). By the
        speed so far, whoever plays the first one at once need not wait for the next (see `Pace`).
        Raises as `speak`.
        """
        request = Request(text, self._voice(reference, reference_text), scene, seed, adapter)
        clip = _Clip(request, max_seconds, self.texts)
        return self._stream(clip, sampling)

    def _stream(self, clip: "_Clip", sampling: Sampling | None) -> Iterator[np.ndarray]:
        engine, rate = self._engine_for(1, None), self.codec.sample_rate
        pace, made = Pace(clip.left()), 0.0
        while not clip.done:
            job = self._job(clip, sampling)
            decoder, given = PieceDecoder(self.codec), 0
            engine.insert([job])
            try:
                while not (ended := engine.step()):
                    sure = engine.frames(job) - (decoder.context or 0)
                    if decoder.context is not None and pace.is_due(made + sure / self.codec.frame_rate):
                        codes = engine.codes(job)
                        yield faded(decoder.push(codes[given:]), rate, start=not given, end=False)
                        given = len(codes)
                        pace.give(made + sure / self.codec.frame_rate)
            finally:
                if engine.speaking:
                    engine.remove(job)
            [(_, piece)] = ended
            clip.spoken.append(piece)
            yield faded(decoder.push(piece.codes[given:], last=True), rate, start=not given)
            made += len(piece.codes) / self.codec.frame_rate
            pace.give(made)
            if not clip.done:
                yield pause(rate)
        self._warn_of_cap(clip)

    def _voice(self, reference: Voice | str | Path | None, text: str) -> Voice | None:
        if text and (reference is None or isinstance(reference, Voice)):
            raise InputError("reference_text has no effect: it goes with the path of a recording in `reference`")
        if reference is None or isinstance(reference, Voice):
            return reference
        check_transcript(self.loaded.family.info, self.reference_place, text)
        return self.reference(reference, text)

    def speak_all(
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        max_seconds: float | None = None,
        batch_size: int = SLOTS,
        sync_logits: Callable[[Tensor], Tensor] | None = None,
        check: Check | None = None,
        warn: bool = True,
    ) -> Iterator[Speech]:
        """As `speak_ready`, in the order of the requests; those that are not spoken yet wait within windows of eight
        times `batch_size`.
        """
        self._clips(requests, max_seconds)  # raises for any of them, before the first is spoken
        for first in range(0, len(requests), _WINDOW * batch_size):
            window = requests[first : first + _WINDOW * batch_size]
            ready: dict[int, Speech] = {}
            due = 0
            for place, speech in self.speak_ready(
                window, sampling=sampling, max_seconds=max_seconds, batch_size=batch_size, sync_logits=sync_logits,
                check=check, warn=warn,
            ):  # fmt: skip
                ready[place] = speech
                while due in ready:
                    yield ready.pop(due)
                    due += 1

    def speak_ready(
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling | None = None,
        max_seconds: float | None = None,
        batch_size: int = SLOTS,
        sync_logits: Callable[[Tensor], Tensor] | None = None,
        check: Check | None = None,
        warn: bool = True,
    ) -> Iterator[tuple[int, Speech]]:
        """Speak texts, each in its own voice, at most `batch_size` at a time and those with the most to say first; each
        is yielded when it is spoken, with its place among the requests.

        Long texts are split into pieces; the prompt of each piece has the one before as context. `sampling` takes the
        place of what adapter and base recommend (`Speaker.sampling`). `max_seconds` caps every piece, instead of the
        cap from the text's length. `sync_logits`: see `Engine`. `check` gives the share of words that are wrong in a
        piece, from its text and waveform [samples]: a bad one, also one that the cap ends, is spoken again with another
        seed, at most twice, and the best is kept. `warn` logs a warning for each piece that the cap ends. Raises
        DataError for a text without a letter and a digit, or with control tokens, before any is spoken.
        """
        clips = self._clips(requests, max_seconds)
        engine = self._engine_for(min(batch_size, len(clips)), sync_logits)
        places = {id(clip): place for place, clip in enumerate(clips)}
        for clip in self._spoken(clips, engine, sampling, batch_size, check):
            yield places[id(clip)], self._speech(clip, warn)

    def _clips(self, requests: Sequence[Request], max_seconds: float | None) -> list["_Clip"]:
        if max_seconds is not None and not 0 < max_seconds <= MAX_SECONDS:
            raise InputError(f"max_seconds is {max_seconds}: it must be above 0 and at most {MAX_SECONDS:g}")
        for name in {request.adapter for request in requests} - {""}:
            self._find_added(name)
        return [_Clip(request, max_seconds, self.texts) for request in requests]

    def _engine_for(self, slots: int, sync_logits: Callable[[Tensor], Tensor] | None) -> Engine:
        """The engine of the last call, which keeps its copies of the weights, unless it is too small, at work, or
        the model has changed.
        """
        last = self._engine
        if last is None or last.slots < slots or last.speaking or last.outdated or sync_logits is not None:
            self._engine = last = Engine(self.model, slots=slots, live=self._live, sync_logits=sync_logits)
            for name, added in self._added.items():
                last.add_adapter(name, added.lora)
        return last

    def _spoken(
        self, clips: Sequence["_Clip"], engine: Engine, sampling: Sampling | None, batch_size: int, check: Check | None
    ) -> Iterator["_Clip"]:
        """Speak the pieces of clips, those with the most to say first, so that few slots are idle at the end."""
        waiting = sorted(clips, key=_Clip.left, reverse=True)[::-1]  # the last one is the next
        spoken: dict[Job, _Clip] = {}

        def more(free: int) -> list[Job]:
            taken = [waiting.pop() for _ in range(min(free, batch_size - engine.speaking, len(waiting)))]
            jobs = [self._job(clip, sampling) for clip in taken]
            spoken.update(zip(jobs, taken, strict=True))
            return jobs

        try:
            for job, piece in engine.run(more):
                clip = spoken.pop(job)
                wrong = 0.0 if check is None else check(clip.next_text, self.codec.decode(piece.codes))
                clip.take(piece, 1.0 if check is not None and piece.hit_cap else wrong)
                if clip.done:
                    yield clip
                else:
                    insort(waiting, clip, key=_Clip.left)
        finally:  # the caller may have enough before all are spoken
            for job in spoken:
                engine.remove(job)

    def _job(self, clip: "_Clip", sampling: Sampling | None) -> Job:
        request, cap = clip.request, self._cap(clip.next_text, clip.max_seconds)
        seed = request.seed + _OTHER_SEED * len(clip.tries)
        return Job(self._prompt(clip), cap, seed, sampling or self._sampling_of(request), request.adapter)

    def _prompt(self, clip: "_Clip") -> Example:
        reference, scene = clip.request.voice, clip.request.scene
        in_scene = reference is not None and self._place_of(clip.request) == "scene"
        context = [reference] if reference is not None and not in_scene else []
        if clip.spoken and (self.loaded.family.info.continues_speech or not context):
            # Without a voice of its own, the first piece is the reference of those that follow.
            piece = len(clip.spoken) - 1 if self.loaded.family.info.continues_speech else 0
            context.append(Voice(clip.pieces[piece], clip.spoken[piece].codes))
        messages = speech_messages(
            clip.next_text,
            scene=scene,
            context=[(voice.text, "context") for voice in context],
            voice="reference" if in_scene else None,
        )
        audio: list[Audio] = [voice.codes for voice in context]
        if reference is not None and in_scene:
            audio.insert(0, reference.codes if reference.whisper_features is None else reference.whisper_features)
        return self.prompter.prompt(messages, audio)

    def _cap(self, text: str, max_seconds: float | None) -> int:
        rate = self.codec.frame_rate
        return frame_cap(text, rate) if max_seconds is None else max(1, round(max_seconds * rate))

    def _speech(self, clip: "_Clip", warn: bool) -> Speech:
        hit_cap = any(piece.hit_cap for piece in clip.spoken)
        if warn:
            self._warn_of_cap(clip)
        waveform = join([self.codec.decode(piece.codes) for piece in clip.spoken], self.codec.sample_rate)
        return Speech(clip.text, waveform, self.codec.sample_rate, hit_cap, clip.again, self.generated_by)

    def _warn_of_cap(self, clip: "_Clip") -> None:
        for text in (text for text, piece in zip(clip.pieces, clip.spoken, strict=True) if piece.hit_cap):
            logger.warning(
                "speech did not stop by itself and was cut at the frame cap, %.1f s: %r (%s)",
                self._cap(text, clip.max_seconds) / self.codec.frame_rate, text, _ADVICE,
            )  # fmt: skip


class _Clip:
    """A text in progress: its pieces, and those already spoken."""

    def __init__(self, request: Request, max_seconds: float | None, texts: TextRules) -> None:
        self.request = request
        self.text = spoken_text(request.text, f"the text {shown(request.text)}", texts)
        self.max_seconds = max_seconds
        self.pieces = split_text(self.text)
        self.spoken: list[Generated] = []
        self.tries: list[tuple[float, Generated]] = []  # of the next piece, with the share of wrong words
        self.again = 0  # pieces that took more than one

    @property
    def done(self) -> bool:
        return len(self.spoken) == len(self.pieces)

    @property
    def next_text(self) -> str:
        return self.pieces[len(self.spoken)]

    def take(self, piece: Generated, wrong: float) -> None:
        """Keep a piece, or wait for a better one."""
        self.tries.append((wrong, piece))
        if wrong <= WRONG_WORDS or len(self.tries) == _TRIES:
            self.spoken.append(min(self.tries, key=lambda tried: tried[0])[1])
            self.again += len(self.tries) > 1
            self.tries = []

    def left(self) -> float:
        """The expected seconds of what is left to say."""
        return sum(map(expected_seconds, self.pieces[len(self.spoken) :]))


def load(
    path: str | Path,
    *,
    device: str | None = None,
    base: BaseSpec = BaseSpec(),
    reference_place: ReferencePlace | None = None,
    whisper: str | Path | None = None,
) -> Speaker:
    """A speaker from a run (the adapter of its last stage), an adapter's folder or a checkpoint, to be kept.

        voice = load("runs/voice", device="cuda")
        voice.speak("Good morning").save("morning.wav")

    An adapter records its base and codec; `base` names them if they have moved, and how to load them: `device` is
    short for `base.device`. `reference_place` and `whisper` as in `Speaker`.

    Raises CheckpointError, ConfigError, InputError for an option without effect.
    """
    base, adapter = base_and_adapter(path, base if device is None else replace(base, device=device))
    return Speaker(load_base(base, adapter), adapter, reference_place=reference_place, whisper=whisper)


def warn_of_duration(speech: Speech) -> None:
    """Warn of speech that ended by itself, but much too early or too late for its text."""
    expected = expected_seconds(speech.text)
    if not speech.hit_cap and not expected / FAR_OFF <= speech.seconds <= expected * FAR_OFF:
        logger.warning(
            "%.1f s of speech, where about %.1f s were expected: %r (%s)",
            speech.seconds, expected, speech.text, _ADVICE,
        )  # fmt: skip


def check_transcript(family: FamilyInfo, place: ReferencePlace, text: str) -> None:
    """Raises InputError where a reference stands in a turn of its own, which needs its words, and there are none."""
    if place == "turn" and not text.strip() and not family.wordless_reference:
        raise InputError(
            "a reference needs both the recording (--reference) and its transcript (--reference-text), unless the "
            "adapter was trained with references in the scene"
        )
