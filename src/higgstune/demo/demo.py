"""The demo: a miniature base learns a second voice, by the same functions as a real run.

The package has everything: the sample recordings, the fitted codec, the miniature base. No network, no GPU.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from higgstune.codec import CODEC_FOLDER
from higgstune.config.recipe import Recipe, load_recipe
from higgstune.data.audio import write_wav
from higgstune.data.manifest import Utterance, read_manifest, write_manifest
from higgstune.data.prepare import prepare
from higgstune.data.store import CodeStore
from higgstune.data.store import Row as StoreRow
from higgstune.demo.measure import Clips, Measurement, measure
from higgstune.demo.page import write_page
from higgstune.errors import ConfigError
from higgstune.evaluation.judges import load_judges
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.verdict import Verdict
from higgstune.families.sampling import Sampling
from higgstune.files import write_file
from higgstune.generate.speaker import Request, Speaker, load
from higgstune.progress import Progress, silent
from higgstune.training.run import train
from higgstune.training.run_dir import RunResult

TARGET_VOICE = "rms"
CLIPS = 30  # of its recordings, for training and validation: as many as the base learns in a few minutes
SPOKEN_SENTENCES = 24  # training sentences that are spoken and, if there are judges, measured
SAMPLING = Sampling(temperature=0)  # greedy: a miniature's probabilities are too flat to sample from


@dataclass(frozen=True)
class DemoResult:
    """The demo's files and measurements."""

    folder: Path
    adapter: Path
    report: Path
    seconds: float
    measurement: Measurement | None  # None without judges
    verdict: Verdict | None  # of the run


@dataclass
class _Clock:
    """How long each step took, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run_demo(
    out: str | Path, *, asr: str | None = None, speaker_judge: str | None = None, progress: Progress | None = None
) -> DemoResult:
    """Prepare, train two stages, speak before and after, report; all under `out`, which must be empty or missing.

    `asr` and `speaker_judge` (specs as for `load_judges`) add measurements to the report. Raises ConfigError, and the
    errors of the steps.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists: remove it, or give another --out")
    judges = load_judges(asr, speaker_judge)
    with _one_thread():
        return _run(out, judges, progress or silent)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: for such small models a second one costs more than it gains, tenfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(out: Path, judges: Judges, show: Progress) -> DemoResult:
    clock, started = _Clock(), time.monotonic()
    with clock.step("unpack the sample recordings and the base"):
        manifest = _unpack(out)
    with clock.step("prepare"):
        prepare(
            manifest, out / "data", codec=out / "base" / CODEC_FOLDER, model=str(out / "base"),
            validation_fraction=0.12, progress=show,
        )  # fmt: skip
    store = CodeStore.open(out / "data")
    trained = list(store.split("train"))[:SPOKEN_SENTENCES]
    with clock.step("train, two stages"):
        run = train(_recipe(out, trained), out / "run")
    unseen = list(store.split("validation"))
    with clock.step("speak before and after"):
        spoken = _speak(out, run, trained, unseen, show)
    texts = [row.text for row in [*trained, *unseen]]
    clock.seconds["all"] = time.monotonic() - started
    report = write_page(out, run, store, spoken, texts, len(trained), None, clock.seconds)
    measurement = None
    if judges.asr is not None or judges.speaker is not None:
        with clock.step("judge"):
            spoken |= _speak_controls(out, run, trained, show)
            sets = _clip_sets(spoken, trained, unseen)
            measurement = measure(sets, spoken["original"][:10], judges.asr, judges.speaker)
        write_page(out, run, store, spoken, texts, len(trained), measurement, clock.seconds)
    return DemoResult(out, run.adapter, report, clock.seconds["all"], measurement, run.verdict)


def _unpack(out: Path) -> Path:
    """Copy the package's assets to `out`; returns the manifest of the target voice."""
    with resources.as_file(resources.files("higgstune.demo") / "assets") as assets:
        shutil.copytree(assets / "voices", out / "dataset")
        shutil.copytree(assets / "base", out / "base")
        shutil.copytree(assets / "codec", out / "base" / CODEC_FOLDER)
    manifest = out / "dataset" / f"{TARGET_VOICE}.jsonl"
    rows = _utterances(out / "dataset" / "metadata.jsonl")
    write_manifest(manifest, [row for row in rows if row.speaker == TARGET_VOICE][:CLIPS])
    return manifest


def _utterances(manifest: Path) -> list[Utterance]:
    return [row for _, row in read_manifest(manifest) if isinstance(row, Utterance)]


def _recipe(out: Path, trained: Sequence[StoreRow]) -> Recipe:
    """It speaks sentences that it is trained on, as it hardly reads others."""
    sentences = out / "dataset" / "spoken.txt"
    write_file(sentences, "".join(f"{row.text}\n" for row in trained))
    with resources.as_file(resources.files("higgstune.demo") / "assets" / "recipe.yaml") as path:
        places = {"model.checkpoint": out / "base", "data.store": out / "data", "evaluation.texts": sentences}
        return load_recipe(path, [f"{key}={place}" for key, place in places.items()])


def _speak(
    out: Path, run: RunResult, trained: Sequence[StoreRow], unseen: Sequence[StoreRow], show: Progress
) -> dict[str, list[Path]]:
    """The originals, their codec round trip, and the same sentences by the base and with the adapter."""
    rows = [*trained, *unseen]
    recorded = {row.id: row for row in _utterances(out / "dataset" / f"{TARGET_VOICE}.jsonl")}
    base = load(out / "base", device="cpu")
    files = {"original": [out / "dataset" / str(recorded[row.id].audio) for row in rows]}
    files["round trip"] = _write(out, "round_trip", rows, base, [base.codec.decode(row.codes) for row in rows])
    files["base"] = _say(out, "before", rows, base, show)
    files["adapted"] = _say(out, "after", rows, load(run.adapter, device="cpu"), show)
    return files


def _speak_controls(out: Path, run: RunResult, trained: Sequence[StoreRow], show: Progress) -> dict[str, list[Path]]:
    """Controls that must fail the bars: each sentence spoken with the next one's text, and an adapter of zeros."""
    speaker = load(run.adapter, device="cpu")
    swapped = _say(out, "swapped", trained, speaker, show, texts=[row.text for row in [*trained[1:], trained[0]]])
    with torch.no_grad():
        for name, parameter in speaker.model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    return {"swapped": swapped, "zeroed": _say(out, "zeroed", trained, speaker, show)}


def _say(
    out: Path,
    name: str,
    rows: Sequence[StoreRow],
    speaker: Speaker,
    show: Progress,
    texts: Sequence[str] | None = None,
) -> list[Path]:
    texts = texts or [row.text for row in rows]
    requests = [Request(text, seed=seed) for seed, text in enumerate(texts)]
    waveforms = []
    for speech in speaker.speak_all(requests, sampling=SAMPLING):
        waveforms.append(speech.waveform)
        show(f"speaking, {name}", len(waveforms), len(texts))
    return _write(out, name, rows, speaker, waveforms)


def _write(
    out: Path, name: str, rows: Sequence[StoreRow], speaker: Speaker, waveforms: Sequence[np.ndarray]
) -> list[Path]:
    files = [out / "speech" / name / f"{row.id}.wav" for row in rows]
    for file, waveform in zip(files, waveforms, strict=True):
        write_wav(file, waveform, speaker.codec.sample_rate)
    return files


def _clip_sets(spoken: dict[str, list[Path]], trained: Sequence[StoreRow], unseen: Sequence[StoreRow]) -> list[Clips]:
    texts = [row.text for row in trained]
    sets = [Clips(name, files[: len(trained)], texts) for name, files in spoken.items()]
    unseen_texts = [row.text for row in unseen]
    for name in ("round trip", "adapted"):
        sets.append(Clips(f"{name}, unseen sentences", spoken[name][len(trained) :], unseen_texts))
    return [clips for clips in sets if clips.files]
