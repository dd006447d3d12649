"""The items of an evaluation: texts to speak, with the voices and recordings that their clips are compared with."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.batch.dataset import Features
from higgstune.codec import Codec
from higgstune.data.audio import read_audio, write_wav
from higgstune.data.messages import DEFAULT_SCENE
from higgstune.data.store import CodeStore, Row, SplitView
from higgstune.errors import DataError
from higgstune.evaluation.clips import VOICES_FOLDER, Clip
from higgstune.evaluation.test_sets import Sentence
from higgstune.families.sampling import Sampling
from higgstune.files import remove_left, write_file
from higgstune.generate.speaker import Speaker
from higgstune.generate.speech import Request, Voice
from higgstune.progress import Progress

UNNAMED = "unnamed"  # the speaker of rows that name none
MAX_ROWS = 100  # of a store, if no limit is given
_VOICE_CLIPS = 8  # recordings per speaker that voices are compared with
_MAX_VOICES = 20  # speakers in all: those of the items, and others as a contrast
_SPEECH = "speech"  # folder
_RECORDINGS = "recordings"


@dataclass(frozen=True)
class EvalItem:
    """One text to be spoken: the model's input, and what is known about the clip that should result."""

    id: str
    request: Request
    clip: Clip  # not spoken yet: `file` is empty


def items_from_rows(
    rows: Iterable[Row],
    speaker: Speaker,
    folder: Path,
    *,
    seed: int,
    features: Features | None = None,
) -> list[EvalItem]:
    """The texts of a store's rows, in their voices and scenes, with their recordings through the codec.

    Recordings and references are written below `folder`. `features` are the Whisper features of the store's clips, for
    a model that uses Whisper. Conversations are skipped: they are not texts to be read aloud.
    """
    return [_item_from_row(row, speaker, folder, seed, features) for row in rows if row.messages is None]


def items_from_sentences(
    sentences: Sequence[Sentence],
    speaker: Speaker,
    *,
    seed: int,
    known: Sequence[str] = (),
    language: str | None = None,
) -> list[EvalItem]:
    """The sentences of a test set. `known` are the speakers of the training data (see `speaker_of`); `language` applies
    to sentences that name none.

    Raises DataError for a reference that cannot be read.
    """
    voices: dict[tuple[Path, str], Voice] = {}
    items = []
    for sentence in sentences:
        voice = None
        if sentence.reference is not None:
            key = sentence.reference, sentence.reference_text or ""
            voice = voices[key] = voices.get(key) or speaker.reference(*key)
        own = _seed(seed, sentence.text)
        clip = Clip(
            sentence.id,
            Path(),
            sentence.text,
            language=sentence.language or language,
            speaker=speaker_of(sentence, known),
            reference=sentence.reference,
            reference_text=sentence.reference_text,
            recording=sentence.recording,
            seed=own,
        )
        items.append(EvalItem(sentence.id, Request(sentence.text, voice, DEFAULT_SCENE, own), clip))
    return items


def speaker_of(text: Row | Sentence, known: Sequence[str]) -> str | None:
    """The speaker whose voice a text should have: the one that it names; None if it has a reference instead, which is
    an unknown voice; else the only speaker of the training data, if there is only one. A row without either is
    `UNNAMED`.
    """
    reference = text.reference_codes if isinstance(text, Row) else text.reference
    if text.speaker or reference is not None:
        return text.speaker
    return UNNAMED if isinstance(text, Row) else known[0] if len(known) == 1 else None


def round_robin_rows(rows: SplitView, limit: int) -> list[Row]:
    """At most `limit` utterances, taking the speakers in turn."""
    turns = sorted((turn, index) for found in _utterances(rows).values() for turn, index in enumerate(found))
    return [rows[index] for _, index in turns[:limit]]


def speakers_of(store: CodeStore) -> list[str]:
    """Names of the speakers of all training rows that are not conversations, sorted."""
    return sorted(_utterances(store.split("train")))


def only_language(store: CodeStore) -> str | None:
    """The language of the training rows, if all have the same one."""
    named = set(store.metadata["language"].slice(0, len(store.split("train"))).to_pylist())
    return named.pop() if len(named) == 1 else None


def write_voices(store: CodeStore, codec: Codec, folder: Path, speakers: Iterable[str | None]) -> dict[str, list[Path]]:
    """Write recordings of training rows, decoded by the codec, below `folder`; return them by speaker.

    They are of `speakers`, and of some others as a contrast.
    """
    voices: dict[str, list[Path]] = {}
    train = store.split("train")
    found = _utterances(train)
    wanted = [name for name in dict.fromkeys(speakers) if name in found]
    others = sorted(found.keys() - set(wanted))[: max(0, _MAX_VOICES - len(wanted))]
    for name in (*wanted, *others):
        indices = found[name]
        spread = np.unique(np.linspace(0, len(indices) - 1, _VOICE_CLIPS).round().astype(int))
        place = folder / VOICES_FOLDER / file_name(name)
        for row in (train[indices[i]] for i in spread):
            voices.setdefault(name, []).append(_decoded(row.codes, codec, place, row.audio_sha256))
    return voices


def _utterances(rows: SplitView) -> dict[str, list[int]]:
    """Indices of the rows that are not conversations, by speaker. Reads no codes."""
    metadata = rows.store.metadata.slice(rows.indices.start, len(rows))
    found: dict[str, list[int]] = {}
    columns = metadata["speaker"].to_pylist(), metadata["messages"].is_null().to_pylist()
    for index, (speaker, is_utterance) in enumerate(zip(*columns, strict=True)):
        if is_utterance:
            found.setdefault(speaker or UNNAMED, []).append(index)
    return found


def synthesize_items(
    items: Sequence[EvalItem],
    speaker: Speaker,
    folder: Path,
    *,
    system: str,
    sampling: Sampling,
    batch_size: int = 8,
    progress: Progress | None = None,
    what: str = "speaking",
) -> list[Clip]:
    """Speak the items into `folder`; return their clips. Clips that the same system spoke earlier are reused.

    `system` identifies model, adapter and codec by their content. It is part of a clip's key, as are text, scene, seed,
    voice and sampling.
    """
    places = [folder / _SPEECH / f"{_key(item.request, system, sampling)}.json" for item in items]
    remove_left((folder / _SPEECH).glob("*.tmp"))
    missing = [index for index, place in enumerate(places) if _read_note(place) is None]
    spoken = speaker.speak_ready([items[index].request for index in missing], sampling=sampling, batch_size=batch_size)
    for done, (place, speech) in enumerate(spoken, 1):
        index = missing[place]
        speech.save(places[index].with_suffix(".wav"))
        note = {
            "text": speech.text,
            "seed": items[index].request.seed,
            "hit_cap": speech.hit_cap,
            "system": system,
            **({"generated_by": speech.generated_by} if speech.generated_by else {}),
        }
        write_file(places[index], json.dumps(note, ensure_ascii=False))
        if progress is not None:
            progress(what, done, len(missing))
    return [_spoken(item, place) for item, place in zip(items, places, strict=True)]


def file_name(name: str) -> str:
    """A file name for an id or a speaker, whatever characters it has."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _item_from_row(row: Row, speaker: Speaker, folder: Path, seed: int, features: Features | None) -> EvalItem:
    place = folder / _RECORDINGS
    recording = _decoded(row.codes, speaker.codec, place, row.audio_sha256)
    voice = reference = None
    if row.reference_codes is not None:
        name = row.reference_sha256 or row.reference_id or row.id
        reference = _decoded(row.reference_codes, speaker.codec, place, name)
        voice = Voice(row.reference_text or "", row.reference_codes)
        if speaker.uses_whisper and features is not None and row.reference_sha256 is not None:
            voice = replace(voice, whisper_features=features.read(row.reference_sha256))
        elif speaker.uses_whisper:
            voice = speaker.voice(*read_audio(reference), voice.text)
    own = _seed(seed, row.text)
    scene = DEFAULT_SCENE if row.scene is None else row.scene
    clip = Clip(
        row.id,
        Path(),
        row.text,
        language=row.language,
        speaker=speaker_of(row, ()),
        reference=reference,
        reference_text=row.reference_text,
        recording=recording,
        seed=own,
    )
    return EvalItem(row.id, Request(row.text, voice, scene, own), clip)


def _seed(seed: int, text: str) -> int:
    """A seed of its own for each text, whatever its place: with a shared seed, draws would not be independent."""
    return seed + int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big")


def _decoded(codes: np.ndarray, codec: Codec, folder: Path, name: str) -> Path:
    """The file of decoded codes, written once for each codec; `name` identifies the codes by their content."""
    path = folder / f"{hashlib.sha256(f'{name} {codec.revision}'.encode()).hexdigest()[:24]}.wav"
    if not path.exists():
        write_wav(path, codec.decode(codes), codec.sample_rate)
    return path


def _key(request: Request, system: str, sampling: Sampling) -> str:
    voice = None
    if request.voice is not None:
        encoded = request.voice.whisper_features
        parts = [request.voice.codes] if encoded is None else [encoded.features]
        voice = [request.voice.text, *(hashlib.sha256(part.tobytes()).hexdigest() for part in parts)]
    said = [system, request.text, request.scene, request.seed, voice, asdict(sampling)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]


def _read_note(place: Path) -> dict[str, Any] | None:
    if not (place.is_file() and place.with_suffix(".wav").is_file()):
        return None
    try:
        note = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(note, dict) or not isinstance(note.get("hit_cap"), bool):
            raise ValueError("it lacks hit_cap")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is damaged ({error}): remove it to have its text spoken again") from error
    return note


def _spoken(item: EvalItem, place: Path) -> Clip:
    note = _read_note(place)
    assert note is not None
    values = {
        **vars(item.clip),
        "file": place.with_suffix(".wav"),
        "hit_cap": note["hit_cap"],
        "generated_by": note.get("generated_by"),
    }
    return Clip(**values)
