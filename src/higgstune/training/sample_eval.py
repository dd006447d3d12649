"""What a stage says while it is trained: a few texts at each validation, written down and measured.

A loss does not tell how a model sounds. The texts, voices and seeds are the same each time, so that what changes is the
adapter.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch.utils.tensorboard import SummaryWriter

from higgstune.batch.dataset import Features
from higgstune.codec.mel import Spectrum
from higgstune.config.expression import STEP
from higgstune.config.recipe import EvaluationSettings
from higgstune.data.audio import write_wav
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
from higgstune.families.sampling import Sampling
from higgstune.files import write_file
from higgstune.generate.speaker import Speaker, Speech
from higgstune.model.load import ModelAndTokenizers
from higgstune.training.distributed import Processes

_DECIBELS = 80.0  # below the loudest that is drawn


def mel_image(clips: Sequence[tuple[str, np.ndarray, int]]) -> np.ndarray:
    """Mel spectrograms one below the other, of (text, waveform [samples], sample rate in Hz): [height, width, 3] uint8.

    Without texts at the axes' ticks, which take longer to draw than all else.
    """
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
    """Steps after which a stage was listened to, in order, and what was measured then."""

    def __init__(self, rule: Rule, patience: int | None) -> None:
        self.rule = rule
        self.patience = patience
        self.entries: list[dict[str, Any]] = []

    def add(self, step: int, measures: Mapping[str, float]) -> bool:
        """Note a step; whether it is the best one now. A stage's start is no candidate: nothing is trained there."""
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
        """Whether as many steps as `patience` says brought nothing better."""
        return bool(self.patience and self.entries) and len(self.entries) - 1 - self.choice.best >= (self.patience or 0)

    def told(self) -> dict[str, Any]:
        """The choice, for a run's result."""
        choice = self.choice
        return {
            "step": self.entries[choice.best][STEP],
            "rule": str(self.rule),
            "healthy": choice.healthy,
            "candidates": [
                entry | {"broken": broken, "rank": rank}
                for entry, broken, rank in zip(self.entries, choice.broken, choice.ranks, strict=True)
            ],
        }


_LOG = logging.getLogger(__name__)
_ALWAYS = ("cap_rate", "short_rate", "silence", "trailing_silence", "duration_ratio", "loop_rate")
_OF_VOICES = ("f0_shift", "f0_spread", "energy_spread")


def texts_to_speak(settings: EvaluationSettings, store: CodeStore) -> list[Row] | list[Sentence]:
    """Sentences where the recipe names some; else rows for validation, or for training where there are none.

    Raises DataError or ConfigError where there is nothing to be read.
    """
    if settings.texts is not None:
        return read_sentences(settings.texts)[: settings.clips]
    rows = round_robin_rows(store.split("validation"), settings.clips)
    rows = rows or round_robin_rows(store.split("train"), settings.clips)
    if not rows:
        raise ConfigError(
            f"{store.folder} has conversations alone, which are not spoken: name evaluation.texts, or set "
            "evaluation.clips: 0"
        )
    return rows


def rule_of(settings: EvaluationSettings, texts: Sequence[Row | Sentence], store: CodeStore, judges: Judges) -> Rule:
    """How the best step is chosen. Raises ConfigError for a rule that needs what is not measured of these texts."""
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
    """Speaks and measures for one stage."""

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
        writer: SummaryWriter | None = None,
    ) -> None:
        """`folder` is where it is all written. `judges` are those of the first process, which writes and measures.
        `together`: all processes speak all texts, because each has but a share of the weights; else they share the
        texts. `features` are what Whisper hears in the store's clips.

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
        if not processes.is_main:  # the first one has decoded the recordings then, and written them down for all
            processes.wait()
        self.asked = self._ask(texts, store, features)
        spoken = [item.clip.speaker for item in self.asked]
        self.voices = write_voices(store, loaded.audio_tokenizer, folder, spoken)
        if processes.is_main:
            processes.wait()
        self.judges = cached(judges, folder / "judged")
        chosen_by = processes.broadcast(rule)
        assert chosen_by is not None
        self.candidates = Candidates(chosen_by, settings.patience)

    def _ask(self, texts: Sequence[Row | Sentence], store: CodeStore, features: Features | None) -> list[EvalItem]:
        speaker, seed = Speaker(self.loaded, reference_place=self.reference_place), self.settings.seed
        rows = [text for text in texts if isinstance(text, Row)]
        sentences = [text for text in texts if isinstance(text, Sentence)]
        known, language = speakers_of(store), only_language(store)
        return [
            *items_from_rows(rows, speaker, self.folder, seed=seed, features=features),
            *items_from_sentences(sentences, speaker, seed=seed, known=known, language=language),
        ]

    def listen(self, model: Any, step: int) -> dict[str, float]:
        """Speak with the model as it is now; what was measured, in all processes."""
        speaker = Speaker(self.loaded, model=model, reference_place=self.reference_place)
        every = range(len(self.asked))
        mine = every if self.together else every[self.processes.rank :: self.processes.count]
        spoken = speaker.say_each(
            [self.asked[index].request for index in mine],
            sampling=Sampling(temperature=self.settings.temperature),
            sync_logits=self.processes.broadcast if self.together else None,
        )
        found: dict[int, Speech] = {}
        for share in self.processes.all_gather(dict(zip(mine, spoken, strict=True))):
            found |= share
        measured = self._write_and_measure([found[index] for index in every], step) if self.processes.is_main else {}
        return self.processes.broadcast(measured)

    def _write_and_measure(self, spoken: Sequence[Speech], step: int) -> dict[str, float]:
        place = self.folder / f"step-{step:06d}"
        clips: list[Clip] = []
        for number, (item, speech) in enumerate(zip(self.asked, spoken, strict=True), 1):
            file = place / f"{number:02d}.wav"
            write_wav(file, speech.waveform, speech.sample_rate)
            clips.append(replace(item.clip, file=file, hit_cap=speech.hit_cap))
        write_clips(place, [replace(clip, reference=None, recording=None) for clip in clips])  # those lie elsewhere
        image = mel_image([(speech.text, speech.waveform, speech.sample_rate) for speech in spoken])
        imsave(place / "mel.png", image)
        if self.writer is not None:
            for number, speech in enumerate(spoken, 1):
                self.writer.add_audio(f"speech/{number}", speech.waveform, step, sample_rate=speech.sample_rate)
            self.writer.add_image("speech/mel", image, step, dataformats="HWC")
        try:
            evaluation = score(clips, self.judges, self.voices)
        except (HiggstuneError, RuntimeError) as error:  # also a judge's device that is out of memory
            _LOG.warning("step %d: what was spoken is not measured: %s", step, error)
            return {}
        write_file(place / "evaluation.json", evaluation.to_json())
        return {name: estimate.value for name, estimate in evaluation.summary.items()}
