"""The demo: a miniature base learns a second voice, by the same functions as a real run.

The package has everything: the sample recordings, the codec, the miniature base. No network, no GPU.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from higgstune.codec import CODEC_FOLDER
from higgstune.config.recipe import Recipe, load_recipe
from higgstune.data.audio import write_wav
from higgstune.data.manifest import Utterance, read_manifest, write_manifest
from higgstune.data.prepare import prepare
from higgstune.data.store import CodeStore
from higgstune.demo.measure import Clips, Measurement, measure
from higgstune.demo.page import Story, write_page
from higgstune.errors import ConfigError
from higgstune.evaluation.judges import load_judges
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.verdict import Verdict
from higgstune.generate.chunks import expected_seconds
from higgstune.generate.speaker import Speaker, load
from higgstune.generate.speech import Request, Speech
from higgstune.progress import Progress, duration, silent
from higgstune.training.run import train
from higgstune.training.run_dir import RunResult

TARGET_VOICE = "rms"
TRAINED = 60  # of its recordings, for training and validation; the others are of new sentences
SPOKEN = 12  # new sentences that are spoken; with judges all of them
CONTROLS = 16  # new sentences of the controls, which must fail
# Each step's share of the demo's time, measured without judges on one core, and what it does, in words.
STEPS = {
    "prepare": (0.05, "turning 2.8 minutes of recordings into codes"),
    "train": (0.80, "learning the voice"),
    "speak": (0.15, "speaking new sentences, before and after"),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """The demo's files and measurements."""

    folder: Path
    adapter: Path
    report: Path
    seconds: float
    lesson: str  # what was learned, in a sentence
    sentence: str  # a new one, to be tried first
    measurement: Measurement | None  # None without judges
    verdict: Verdict | None  # of the run


def run_demo(
    out: str | Path,
    *,
    asr: str | None = None,
    speaker_judge: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> DemoResult:
    """Prepare, train, speak before and after, report; all under `out`, which must be empty or missing.

    `asr` and `speaker_judge` (specs as for `load_judges`) add measurements to the report. `say` gets a line as each
    step begins. Raises ConfigError, and the errors of the steps.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists: remove it, or give another --out")
    judges = load_judges(asr, speaker_judge)
    with _one_thread():
        return _run(out, judges, progress or silent, _Steps(say or (lambda _: None)))


class _Recorded(NamedTuple):
    """A recording of a new sentence."""

    id: str
    file: Path
    text: str


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: for such small models a second one costs more than it gains, tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Steps:
    """Says what each step does and how long the rest takes, and keeps how long each took."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        left = sum(share for later, (share, _) in STEPS.items() if later not in self.seconds)
        elapsed, number = time.monotonic() - self.started, 1 + len(self.seconds)
        rest = f", about {duration(elapsed * left / (1 - left))} left" if left < 0.9 else ", about 3 minutes in all"
        self.say(f"[{number}/{len(STEPS)}] {STEPS[name][1]}{rest}")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def _run(out: Path, judges: Judges, show: Progress, steps: _Steps) -> DemoResult:
    judged = judges.asr is not None or judges.speaker is not None
    new = _unpack(out)
    new = new if judged else new[:SPOKEN]
    with steps.step("prepare"):
        prepare(
            out / "dataset" / f"{TARGET_VOICE}.jsonl", out / "data", codec=out / "base" / CODEC_FOLDER,
            model=str(out / "base"), validation_fraction=0.1, progress=show,
        )  # fmt: skip
    store = CodeStore.open(out / "data")
    with steps.step("train"):
        run = train(_recipe(out), out / "run")
    with steps.step("speak"):
        spoken = _speak(out, run, new, show)
    seconds = time.monotonic() - steps.started
    measurement = None
    if judged:
        spoken += _speak_controls(out, run, new[:CONTROLS], show)
        measurement = measure(spoken, [row.file for row in new[:10]], judges.asr, judges.speaker)
    story = Story(run, store, spoken, measurement, steps.seconds | {"all": seconds})
    report = write_page(out, story)
    return DemoResult(out, run.adapter, report, seconds, story.lesson, new[0].text, measurement, run.verdict)


def _unpack(out: Path) -> list[_Recorded]:
    """Copy the package's assets to `out`, and write a manifest of what is trained on; returns the other recordings."""
    with resources.as_file(resources.files("higgstune.demo") / "assets") as assets:
        shutil.copytree(assets / "voices", out / "dataset")
        shutil.copytree(assets / "base", out / "base")
        shutil.copytree(assets / "codec", out / "base" / CODEC_FOLDER)
    rows = [row for _, row in read_manifest(out / "dataset" / "metadata.jsonl") if isinstance(row, Utterance)]
    rows = [row for row in rows if row.speaker == TARGET_VOICE]
    write_manifest(out / "dataset" / f"{TARGET_VOICE}.jsonl", rows[:TRAINED])
    return [_Recorded(str(row.id), out / "dataset" / str(row.audio), row.text or "") for row in rows[TRAINED:]]


def _recipe(out: Path) -> Recipe:
    with resources.as_file(resources.files("higgstune.demo") / "assets" / "recipe.yaml") as path:
        return load_recipe(path, [f"model.checkpoint={out / 'base'}", f"data.store={out / 'data'}"])


def _speak(out: Path, run: RunResult, new: Sequence[_Recorded], show: Progress) -> list[Clips]:
    """The recordings of new sentences, their codec round trip, and the same sentences before and after training."""
    base, texts = load(out / "base", device="cpu"), [row.text for row in new]
    decoded = [base.codec.decode(base.reference(row.file).codes) for row in new]
    return [
        Clips("recording", [row.file for row in new], texts),
        Clips("round trip", _write(out, "round trip", new, base, decoded), texts),
        _say(out, "before", new, base, show),
        _say(out, "after", new, load(run.adapter, device="cpu"), show),
    ]


def _speak_controls(out: Path, run: RunResult, rows: Sequence[_Recorded], show: Progress) -> list[Clips]:
    """Controls that must fail the bars: each sentence spoken with the next one's text, and an adapter of zeros."""
    speaker = load(run.adapter, device="cpu")
    swapped = _say(out, "swapped", rows, speaker, show, texts=[row.text for row in [*rows[1:], rows[0]]])
    with torch.no_grad():
        for name, parameter in speaker.model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    return [swapped, _say(out, "zeroed", rows, speaker, show)]


def _say(
    out: Path,
    name: str,
    rows: Sequence[_Recorded],
    speaker: Speaker,
    show: Progress,
    texts: Sequence[str] | None = None,
) -> Clips:
    requests = [Request(text, seed=seed) for seed, text in enumerate(texts or [row.text for row in rows])]
    spoken: list[Speech] = []
    for speech in speaker.speak_all(requests):
        spoken.append(speech)
        show(f"speaking, {name}", len(spoken), len(requests))
    files = _write(out, name, rows, speaker, [speech.waveform for speech in spoken])
    return Clips(name, files, [row.text for row in rows], [stopped(speech) for speech in spoken])


def stopped(speech: Speech) -> bool:
    """Whether speech ended by itself, at half to twice its expected duration."""
    expected = expected_seconds(speech.text)
    return not speech.hit_cap and expected / 2 <= speech.seconds <= 2 * expected


def _write(
    out: Path, name: str, rows: Sequence[_Recorded], speaker: Speaker, waveforms: Sequence[np.ndarray]
) -> list[Path]:
    files = [out / "speech" / name.replace(" ", "_") / f"{row.id}.wav" for row in rows]
    for file, waveform in zip(files, waveforms, strict=True):
        write_wav(file, waveform, speaker.codec.sample_rate)
    return files
