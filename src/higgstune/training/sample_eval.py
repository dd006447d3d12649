"""Samples of a stage while it is trained: a few texts that are spoken at each validation, saved and measured.

A loss does not show how a model sounds. Texts, voices and seeds are the same each time, so that only the adapter
changes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from higgstune.batch.dataset import Features
from higgstune.codec.mel import Spectrum
from higgstune.config.expression import STEP
from higgstune.config.recipe import EvaluationSettings
from higgstune.data.messages import ReferencePlace
from higgstune.data.store import CodeStore, Row
from higgstune.errors import ConfigError, HiggstuneError
from higgstune.evaluation.choice import Choice, Rule, choose
from higgstune.evaluation.clips import Clip, write_clips
from higgstune.evaluation.items import (
    EvalItem,
    items_from_rows,
    items_from_sentences,
    only_language,
    round_robin_rows,
    speaker_of,
    speakers_of,
    write_voices,
)
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.judges.cache import cached
from higgstune.evaluation.score import score
from higgstune.evaluation.test_sets import Sentence, read_sentences
from higgstune.files import remove_left, write_file
from higgstune.generate.speaker import Speaker
from higgstune.generate.speech import Speech
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.distributed import Processes
from higgstune.training.run_dir import Candidate, ChosenStep

if TYPE_CHECKING:  # imported by those who draw and write: both take long
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)
_DECIBELS = 80.0  # that are drawn, below the loudest


def mel_image(clips: Sequence[tuple[str, np.ndarray, int]]) -> np.ndarray:
    """Mel spectrograms one below the other, of (text, waveform [samples], sample rate in Hz): [height, width, 3] uint8.

    Without texts at the axes' ticks, which take longer to draw than all else.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 * len(clips)), dpi=80)
    canvas = FigureCanvasAgg(figure)
    for number, (text, waveform, rate) in enumerate(clips):
        height = 1 / len(clips)
        axis = figure.add_axes((0.01, 1 - (number + 0.97) * height, 0.98, 0.8 * height))
        mel = _decibels(waveform, rate)
        axis.imshow(mel.T, origin="lower", aspect="auto")
        axis.set_axis_off()
        shown = text if len(text) <= 90 else f"{text[:87]}..."
        axis.set_title(f"{shown} ({len(waveform) / rate:.1f} s)", fontsize=8, loc="left", parse_math=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _decibels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """[samples] -> [T, bands], the loudest at 0."""
    hop = rate // 100
    mel = Spectrum(rate, 4 * hop, hop, 80, min(8000.0, rate / 2)).mel(waveform[: len(waveform) // hop * hop])
    decibels = 20 * np.log10(np.maximum(mel, 1e-8))
    return np.clip(decibels - decibels.max(initial=-160.0), -_DECIBELS, 0.0)


class Candidates:
    """The steps of a stage whose samples were measured, in order."""

    def __init__(self, rule: Rule, patience: int | None) -> None:
        self.rule = rule
        self.patience = patience
        self.entries: list[dict[str, Any]] = []

    def add(self, step: int, measures: Mapping[str, float]) -> bool:
        """Add a step; whether it is the best one now. Step 0, where nothing is trained yet, is not a candidate."""
        if step == 0:
            return False
        self.entries = [entry for entry in self.entries if entry[STEP] != step]
        self.entries.append({**measures, STEP: step})
        return self.choice.best == len(self.entries) - 1

    @property
    def choice(self) -> Choice:
        """Of all steps so far, of which there is one at least."""
        return choose(self.entries, self.rule)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` steps brought nothing better."""
        return bool(self.patience and self.entries) and len(self.entries) - 1 - self.choice.best >= (self.patience or 0)

    def summary(self) -> ChosenStep:
        """The best step, for a run's result."""
        choice = self.choice
        candidates = [
            Candidate(entry[STEP], {key: value for key, value in entry.items() if key != STEP}, broken, rank)
            for entry, broken, rank in zip(self.entries, choice.broken, choice.ranks, strict=True)
        ]
        return ChosenStep(candidates[choice.best].step, str(self.rule), choice.healthy, candidates)


_ALWAYS = ("cap_rate", "short_rate", "silence", "trailing_silence", "duration_ratio", "loop_rate")
_OF_VOICES = ("f0_shift", "f0_spread", "energy_spread")


def texts_to_speak(settings: EvaluationSettings, store: CodeStore) -> list[Row] | list[Sentence]:
    """Sentences where the recipe names some; else rows of the validation split, or else of the training split.

    Raises DataError or ConfigError where there is nothing to speak.
    """
    if settings.texts is not None:
        return read_sentences(settings.texts)[: settings.clips]
    rows = round_robin_rows(store.split("validation"), settings.clips)
    rows = rows or round_robin_rows(store.split("train"), settings.clips)
    if not rows:
        raise ConfigError(
            f"{store.folder} has only conversations, which are not spoken: set evaluation.texts, or evaluation.clips: 0"
        )
    return rows


def rule_of(settings: EvaluationSettings, texts: Sequence[Row | Sentence], store: CodeStore, judges: Judges) -> Rule:
    """The rule that chooses the best step. Raises ConfigError where it needs what these texts do not measure."""
    known = speakers_of(store)
    voiced = any(speaker_of(text, known) in known for text in texts)
    names = [*_ALWAYS, *(_OF_VOICES if voiced else ())]
    if judges.asr is not None:
        names += ["wer", "cer", "babble_rate"]
        names += ["recording_wer", "recording_cer"] if any(_is_recorded(text) for text in texts) else []
        names += ["leak_rate", "leak_wer"] if any(text.reference_text for text in texts) else []
    if judges.speaker is not None:
        names += ["similarity", *(["speaker_accuracy"] if len(known) > 1 else [])] if voiced else []
        names += ["similarity_reference"] if any(_has_reference(text) for text in texts) else []
    if judges.quality is not None:
        names.append("naturalness")
    return Rule.of(settings.gates, settings.rank, names, clips=len(texts))


def _is_recorded(text: Row | Sentence) -> bool:
    return isinstance(text, Row) or text.recording is not None


def _has_reference(text: Row | Sentence) -> bool:
    return (text.reference_codes if isinstance(text, Row) else text.reference) is not None


class SampleEvaluation:
    """Speaks and measures the samples of one stage."""

    def __init__(
        self,
        loaded: ModelAndTokenizers,
        store: CodeStore,
        settings: EvaluationSettings,
        folder: Path,
        *,
        reference_place: ReferencePlace,
        judges: Judges,
        processes: Processes,
        together: bool,
        features: Features | None = None,
        writer: "SummaryWriter | None" = None,
    ) -> None:
        """Samples are saved into `folder`. `judges` are those of the first process, which saves and measures.
        `together`: all processes speak all texts, because each has only a share of the weights; otherwise they divide
        the texts. `features` are the Whisper features of the store's clips.

        Raises as `texts_to_speak` and `rule_of`.
        """
        self.loaded = loaded
        self.settings = settings
        self.folder = folder
        self.reference_place = reference_place
        self.processes = processes
        self.together = together
        self.writer = writer
        texts = texts_to_speak(settings, store)
        rule = rule_of(settings, texts, store, judges) if processes.is_main else None
        if processes.is_main:
            remove_left(folder.rglob("*.tmp"))
        if not processes.is_main:  # until the first one has decoded and saved the recordings, for all
            processes.wait()
        self.items = self._items(texts, store, features)
        spoken = [item.clip.speaker for item in self.items]
        self.voices = write_voices(store, loaded.audio_tokenizer, folder, spoken)
        if processes.is_main:
            processes.wait()
        self.judges = cached(judges, folder / "judged")
        chosen_by = processes.broadcast(rule)
        assert chosen_by is not None
        self.candidates = Candidates(chosen_by, settings.patience)

    def _items(self, texts: Sequence[Row | Sentence], store: CodeStore, features: Features | None) -> list[EvalItem]:
        speaker, seed = Speaker(self.loaded, reference_place=self.reference_place), self.settings.seed
        rows = [text for text in texts if isinstance(text, Row)]
        sentences = [text for text in texts if isinstance(text, Sentence)]
        known, language = speakers_of(store), only_language(store)
        return [
            *items_from_rows(rows, speaker, self.folder, seed=seed, features=features),
            *items_from_sentences(sentences, speaker, seed=seed, known=known, language=language),
        ]

    def evaluate(self, model: Any, step: int) -> dict[str, float]:
        """Speak with the model as it is now; the measures, in all processes."""
        speaker = Speaker(self.loaded, model=model, reference_place=self.reference_place)
        every = range(len(self.items))
        mine = every if self.together else every[self.processes.rank :: self.processes.count]
        spoken = speaker.speak_all(
            [self.items[index].request for index in mine],
            sampling=speaker.sampling.with_(temperature=self.settings.temperature),
            sync_logits=self.processes.broadcast if self.together else None,
            warn=False,  # the same clips each time; their share is logged, and the verdict counts them
        )
        found: dict[int, Speech] = {}
        for share in self.processes.all_gather(dict(zip(mine, spoken, strict=True))):
            found |= share
        measured = self._write_and_measure([found[index] for index in every], step) if self.processes.is_main else {}
        return self.processes.broadcast(measured)

    def _write_and_measure(self, spoken: Sequence[Speech], step: int) -> dict[str, float]:
        place = self.folder / f"step-{step:06d}"
        clips: list[Clip] = []
        for number, (item, speech) in enumerate(zip(self.items, spoken, strict=True), 1):
            file = place / f"{number:02d}.wav"
            speech.save(file)
            clips.append(replace(item.clip, file=file, hit_cap=speech.hit_cap, generated_by=speech.generated_by))
        write_clips(
            place, [replace(clip, reference=None, recording=None) for clip in clips]
        )  # those are outside of this folder
        image = mel_image([(speech.text, speech.waveform, speech.sample_rate) for speech in spoken])
        from matplotlib.image import imsave

        imsave(place / "mel.png", image)
        if self.writer is not None:
            for number, speech in enumerate(spoken, 1):
                self.writer.add_audio(f"speech/{number}", speech.waveform, step, sample_rate=speech.sample_rate)
            self.writer.add_image("speech/mel", image, step, dataformats="HWC")
        try:
            evaluation = score(clips, self.judges, self.voices)
        except (HiggstuneError, RuntimeError) as error:  # also a judge's device that is out of memory
            _LOG.warning("step %d: the samples were not measured: %s", step, error)
            return {}
        write_file(place / "evaluation.json", evaluation.to_json())
        return {name: estimate.value for name, estimate in evaluation.summary.items()}
