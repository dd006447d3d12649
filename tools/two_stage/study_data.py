"""The study's data: three settings, each with a store for training and a store for the test sentences."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from higgstune.codec import CODEC_FOLDER
from higgstune.data.manifest import Utterance, write_manifest
from higgstune.data.prepare import prepare

TRAINED, UNSEEN = "trained", "unseen"  # kinds of test sentences; ids of test rows begin with them
_NEARLY_ALL = 1 - 1e-9  # of the added rows: a split is a share of the recordings
_SHORT = 15  # clips of LJSpeech, up to 6.9 s


@dataclass(frozen=True)
class RunSetup:
    """Data and steps that all arms of a comparison share."""

    what: str
    steps: int  # over both stages
    batch_size: int  # clips


@dataclass(frozen=True)
class Recordings:
    """The recordings of a setting. `trained` are some of `train`; otherwise no recording is in two sets."""

    train: list[Utterance]
    trained: list[Utterance]  # of the training sentences, those that are tested
    unseen: list[Utterance]  # tested, and validation while training
    voice: list[Utterance]  # what clips are compared with for similarity


@dataclass(frozen=True)
class Stores:
    """The code stores of a setting."""

    train: Path  # its validation split is `Recordings.unseen`
    test: Path  # its validation split has the sentences to speak, its training split the voice


SETTINGS = {
    "few": RunSetup("12 clips of one synthetic voice: learned by heart", steps=150, batch_size=2),
    "many": RunSetup("300 clips of the same voice", steps=100, batch_size=4),
    "real": RunSetup("11 clips of a person (LJSpeech): learned by heart", steps=150, batch_size=2),
}


def stores_of(name: str, out: Path, base: Path, synthetic: Path, speech: Path) -> Stores:
    """The stores of a setting below `out`, created if they are missing.

    `synthetic` is the folder of a synthetic corpus of the voice rms, `speech` that of LJSpeech with its metadata.csv.
    """
    stores = Stores(out / "train", out / "test")
    found = recordings_of(name, synthetic, speech)
    tested = [*_named(TRAINED, found.trained), *_named(UNSEEN, found.unseen)]
    _fill(stores.train, base, found.train, found.unseen)
    _fill(stores.test, base, found.voice, tested)
    return stores


def recordings_of(name: str, synthetic: Path, speech: Path) -> Recordings:
    """The recordings of a setting; see `stores_of`."""
    return {"few": _few, "many": _many, "real": _real}[name](speech if name == "real" else synthetic)


def _few(synthetic: Path) -> Recordings:
    with resources.as_file(resources.files("higgstune.demo") / "assets") as assets:
        rows = [row for row in _rows(assets / "voices" / "metadata.jsonl") if row.speaker == "rms"][:12]
    unseen = _rows(synthetic / "metadata.jsonl")
    return Recordings(rows, rows[:10], unseen[-4:], unseen[300:308])


def _many(synthetic: Path) -> Recordings:
    rows = _rows(synthetic / "metadata.jsonl")
    return Recordings(rows[:300], rows[:300:100], rows[-10:], rows[300:308])


def _real(speech: Path) -> Recordings:
    """The shortest clips are trained on, the longest are the voice; every fourth of the former is unseen."""
    with (speech / "metadata.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))
    files = [speech / "wavs" / f"{name}.wav" for name, *_ in found]
    rows = [
        Utterance(id=file.stem, audio=str(file.resolve()), text=line[-1], speaker="ljspeech", language="en")
        for file, line in zip(files, found, strict=True)
    ]
    rows.sort(key=lambda row: Path(str(row.audio)).stat().st_size)
    short, voice = rows[:_SHORT], rows[-6:]
    unseen = short[2::4]
    train = [row for row in short if row not in unseen]
    return Recordings(train, train[-9:], unseen, voice)


def _rows(manifest: Path) -> list[Utterance]:
    """The utterances of a manifest, with absolute paths."""
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [Utterance(**line | {"audio": str((manifest.parent / line["audio"]).resolve())}) for line in lines]


def _named(kind: str, rows: Sequence[Utterance]) -> list[Utterance]:
    return [row.model_copy(update={"id": f"{kind}-{row.id}"}) for row in rows]


def _fill(store: Path, base: Path, train: Sequence[Utterance], validation: Sequence[Utterance]) -> None:
    """A store with these splits: rows keep their split when others are added."""
    for name, rows, share in (("train", train, 0.0), ("validation", validation, _NEARLY_ALL)):
        manifest = store.with_name(f"{store.name}-{name}.jsonl")
        if not manifest.exists():
            new = manifest.with_suffix(".new.jsonl")
            new.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(new, rows)
            prepare(
                new, store, codec=base / CODEC_FOLDER, model=str(base), validation_fraction=share, allow_outside=True
            )
            new.rename(manifest)  # now it is done
