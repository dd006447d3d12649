"""The verb `evaluate`: speak the texts of a set with an adapter and with its base, and measure both."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json, sha256_of
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.environment import choose_device
from higgstune.errors import ConfigError, DataError
from higgstune.evaluation.clips import CLIPS_FILE, Clip, read_clips, read_voices
from higgstune.evaluation.items import (
    MOST_ROWS,
    EvalItem,
    file_name,
    items_from_rows,
    items_from_sentences,
    only_language,
    some_rows,
    speakers_of,
    synthesize_items,
    write_voices,
)
from higgstune.evaluation.judges import AUTO, check_languages, load_judges
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.judges.cache import cached
from higgstune.evaluation.score import compare as differences_of
from higgstune.evaluation.score import score
from higgstune.evaluation.statistics import smallest_p
from higgstune.evaluation.test_sets import VALIDATION, Sentence, read_sentences
from higgstune.families.sampling import Sampling
from higgstune.files import alone_in, write_file
from higgstune.generate.speak import load_base
from higgstune.generate.speaker import Speaker
from higgstune.kernels.quantize import Quantize
from higgstune.metrics import METRICS, SIGNIFICANT, Difference, Evaluation, verdict
from higgstune.model.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN_STATE,
    adapter_card,
    base_fingerprint,
    find_adapter,
)

_LOG = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
RECORDINGS, BASE, ADAPTER, CLIPS = "recordings", "base", "adapter", "clips"
FOLDER = "evaluation"  # in a run's folder, or beside an adapter


@dataclass(frozen=True)
class SetResult:
    """What was measured on one set of texts."""

    name: str  # as it was asked for
    systems: dict[str, Evaluation]  # of recordings (where there are any), base (unless left out), adapter
    clips: dict[str, list[Clip]]  # by system, in the order of the texts
    differences: dict[str, Difference]  # adapter minus base, by metric

    @property
    def worse(self) -> list[str]:
        """Metrics that are worse with the adapter, where chance does not explain it."""
        if not self.differences:
            return []
        before, after = self.systems[BASE].summary, self.systems[ADAPTER].summary
        return [
            metric.name
            for metric in METRICS
            if verdict(metric, before.get(metric.name), after.get(metric.name), self.differences.get(metric.name))
            == "worse"
        ]

    @property
    def told(self) -> str:
        """What got worse with the adapter, in words, or that so few clips could not show it."""
        if self.worse:
            return f"worse: {', '.join(self.worse)}"
        asked = [found for found in self.differences.values() if (found.low, found.high) != (0, 0)]
        if asked and all(len(asked) * smallest_p(found.clips) >= SIGNIFICANT for found in asked):
            clips = max(found.clips for found in asked)
            return f"{clips} clips are too few to show that anything is worse (or better)"
        return "nothing is clearly worse"

    def as_json(self) -> dict[str, Any]:
        """Everything but the clips' rows, which are in the set's own file."""
        return {
            "set": self.name,
            "worse": self.worse,
            "told": self.told,
            "systems": {
                name: {key: value for key, value in asdict(found).items() if key != "clips"}
                for name, found in self.systems.items()
            },
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` found."""

    folder: Path  # where speech, answers of judges and `NAME.json` for each set lie
    adapter: Path | None  # None: a base, or clips from elsewhere
    texts: SetResult
    guard: list[SetResult]  # texts and voices that must not get worse
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Everything but the clips' rows, which are in the sets' own files."""
        return {
            "folder": str(self.folder),
            "settings": self.settings,
            **self.texts.as_json(),
            "guard": {guarded.name: guarded.as_json() for guarded in self.guard},
        }


@dataclass(frozen=True)
class _Subject:
    """Who speaks: a base with its adapter, and what the adapter was trained on."""

    speaker: Speaker
    name: str  # BASE or ADAPTER
    identity: str  # names base, adapter and codec by their content


@dataclass(frozen=True)
class _Material:
    """What clips are held against."""

    store: CodeStore | None
    voices: dict[str, list[Path]]
    judges: Judges
    folder: Path
    seed: int
    limit: int | None
    language: str | None = None


def evaluate(
    target: str | Path,
    *,
    texts: str = VALIDATION,
    guard: Sequence[str] = (),
    out: str | Path | None = None,
    data: str | Path | None = None,
    model: str | Path | None = None,
    codec: str | Path | None = None,
    whisper: str | Path | None = None,
    quantize: Quantize | None = None,
    base: bool = True,
    asr: str | None = None,
    speaker_judge: str | None = AUTO,
    quality_judge: str | None = None,
    judges: Judges | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    limit: int | None = None,
    language: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Speak `texts` and what is to be guarded with an adapter (its folder or its run's) and its base, and measure.

    `texts` and each of `guard` is `validation` (rows of the store that the adapter was trained on, or of `data`),
    built-in languages, a file of sentences or a `meta.lst` (see `read_sentences`); at the most `limit` of each, of rows
    100 where it is not given. `language` is that of sentences that name none; the store's, where it has only one. What
    is spoken is kept in `out`, and spoken once for each adapter, text, voice and seed; what judges said is kept, too.

    `whisper` names the Whisper checkpoint of an adapter, or of a base alone, that listens, where it has moved;
    `quantize` ("4bit") puts the base into 4 bits. `judges` that are loaded already take the place of
    the specs of three (see `load_judges`).

    `target` may also be a base, or a folder of clips from elsewhere (see `read_clips`), which are measured as they are.

    Raises ConfigError, DataError, CheckpointError for wrong input, WorkError where a judge fails or the disk refuses.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: it must be at least 1")
    if guard and not base:
        raise ConfigError("guard needs the base, which tells what was there before: leave out --no-base")
    target = Path(target)
    show = progress or (lambda *_: None)
    kind = kind_of(target)
    adapter = find_adapter(target) if kind == ADAPTER else None
    folder = Path(out) if out is not None else target if kind == CLIPS else _folder_of(target, adapter)
    if judges is None:
        judges = load_judges(asr, speaker_judge, quality_judge, device=str(choose_device(device)))
    names = [texts, *dict.fromkeys(name for name in guard if name != texts)]
    drawn = sampling or Sampling()
    for name in names if kind != CLIPS else ():
        if name != VALIDATION:
            # What is wrong with it is told before a model is loaded.
            check_languages(judges, [sentence.language or language for sentence in read_sentences(name)])
    if kind == CLIPS:
        return _evaluate_clips(target, judges, folder, seed, show)
    loaded = load_base(
        target if adapter is None else model, adapter, codec=codec, dtype=dtype, device=device, quantize=quantize
    )
    store = _store(data, adapter, needed=VALIDATION in names, codec_revision=loaded.audio_tokenizer.revision)
    as_trained = _is_as_trained(store, adapter)
    if store is not None and as_trained is False:
        _LOG.warning(
            "the store %s is not the one that the adapter was trained on, or has other rows since: rows that are held "
            "out now may have been trained on", store.folder,
        )  # fmt: skip
    with alone_in(folder, "evaluation", "nothing was spoken"):
        material = _Material(store, {}, cached(judges, folder / "judged"), folder, seed, limit, language)
        spoken: dict[str, dict[str, list[Clip]]] = {name: {} for name in names}
        dtype = str(loaded.model.dtype).removeprefix("torch.") + (f"-{quantize}" if quantize else "")
        identity = f"{base_fingerprint(loaded.model)} {dtype} {loaded.audio_tokenizer.revision}"
        subjects: list[Callable[[], _Subject]] = []
        if base or adapter is None:
            own = whisper if adapter is None else None
            subjects.append(lambda: _Subject(Speaker(loaded, whisper=own), BASE, identity))
        if adapter is not None:
            files = " ".join(sha256_of(adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
            subjects.append(lambda: _Subject(Speaker(loaded, adapter, whisper=whisper), ADAPTER, f"{identity} {files}"))
        for make in subjects:  # one after the other: an adapter stays on the base
            subject = make()
            for name in names:
                asked = _ask(name, subject.speaker, material)
                spoken[name][subject.name] = synthesize_items(
                    asked, subject.speaker, folder, system=subject.identity, sampling=drawn, batch_size=batch_size,
                    progress=show, what=f"speaking {name}, {subject.name}",
                )  # fmt: skip
        settings = {
            "sampling": asdict(drawn), "seed": seed, "limit": limit,
            "dtype": dtype,
            "device": str(loaded.model.device), "adapter": None if adapter is None else str(adapter),
            "checkpoint": loaded.checkpoint, "codec": loaded.codec,
            "store": None if store is None else str(store.folder), "store_as_trained_on": as_trained,
        }  # fmt: skip
        if store is not None:
            heard = [clip.speaker for found in spoken.values() for clips in found.values() for clip in clips]
            material = replace(material, voices=write_voices(store, loaded.audio_tokenizer, folder, heard))
        results = [_measure(name, spoken[name], material, settings, show) for name in names]
        return EvaluationResult(folder, adapter, results[0], results[1:] if guard else [], settings)


def _measure(
    name: str, spoken: dict[str, list[Clip]], material: _Material, settings: dict[str, Any], show: Progress
) -> SetResult:
    """Score every system's clips of a set, and write `NAME.json`."""
    first = next(iter(spoken.values()))
    recorded = [
        replace(clip, file=clip.recording, recording=None, hit_cap=False, seed=None)
        for clip in first
        if clip.recording is not None
    ]
    clips = ({RECORDINGS: recorded} if recorded else {}) | spoken
    systems = {}
    for system, some in clips.items():
        tell = partial(_tell, show, f"{name}, {system}")
        found = score(some, material.judges, material.voices, seed=material.seed, progress=tell)
        systems[system] = replace(found, settings=settings if system != RECORDINGS else {})
    differences = (
        differences_of(systems[BASE], systems[ADAPTER], seed=material.seed)
        if BASE in spoken and ADAPTER in spoken
        else {}
    )
    result = SetResult(name, systems, clips, differences)
    rows = {system: found.clips for system, found in systems.items()}
    content = {**result.as_json(), "clips": rows}
    write_file(material.folder / f"{set_file(name)}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return result


def _tell(show: Progress, of: str, what: str, done: int, total: int) -> None:
    show(f"{what}, {of}", done, total)


def set_file(name: str) -> str:
    """The name of a set's file, without its ending."""
    return name if name.replace(",", "").isalnum() else file_name(name)


def _evaluate_clips(folder: Path, judges: Judges, out: Path, seed: int, show: Progress) -> EvaluationResult:
    """Clips from elsewhere, as one system."""
    if not (folder / CLIPS_FILE).exists():
        for inside in (RUN_STATE, ADAPTER_CONFIG):
            if found := sorted(folder.glob(f"*/{inside}")):
                raise ConfigError(f"{folder} is no run and no adapter, but has one in it: evaluate {found[0].parent}")
    clips = read_clips(folder)
    material = _Material(None, read_voices(folder), cached(judges, out / "judged"), out, seed, None)
    with alone_in(out, "evaluation", "nothing was judged"):
        result = _measure(CLIPS, {CLIPS: clips}, material, {}, show)
    return EvaluationResult(out, None, result, [], {})


def _ask(name: str, speaker: Speaker, material: _Material) -> list[EvalItem]:
    if name == VALIDATION:
        assert material.store is not None
        rows = some_rows(material.store.split(VALIDATION), material.limit or MOST_ROWS)
        asked = items_from_rows(
            rows, speaker, material.folder, seed=material.seed, features=_features(material.store, speaker)
        )
        if not asked:
            raise DataError(
                f"{material.store.folder} has no validation rows to be read: prepare it with a --validation-fraction, "
                "or name other texts with --set"
            )
        return asked
    store = material.store
    return items_from_sentences(
        _some(read_sentences(name), material.limit),
        speaker,
        seed=material.seed,
        known=[] if store is None else speakers_of(store),
        language=material.language or (None if store is None else only_language(store)),
    )


def _some(sentences: Sequence[Sentence], limit: int | None) -> list[Sentence]:
    """The first of each language in turn."""
    turns: dict[str | None, int] = {}
    ranked = []
    for index, sentence in enumerate(sentences):
        ranked.append((turns.setdefault(sentence.language, 0), index))
        turns[sentence.language] += 1
    chosen = sorted(ranked)[:limit] if limit is not None else ranked
    return [sentences[index] for _, index in sorted(chosen, key=lambda pair: pair[1])]


def _features(store: CodeStore, speaker: Speaker) -> FeatureStore | None:
    """What Whisper hears in a store's clips, where the model listens and the store was prepared for it."""
    if speaker.whisper_spec is None:
        return None
    try:
        return FeatureStore.open(store.folder, speaker.whisper_spec.checkpoint, speaker.whisper_spec.revision)
    except DataError:
        return None  # references are heard anew, by the encoder itself


def _store(data: str | Path | None, adapter: Path | None, *, needed: bool, codec_revision: str) -> CodeStore | None:
    """The store whose rows and voices are used: `data`, or the one that the adapter was trained on."""
    card = {} if adapter is None else adapter_card(adapter)
    place = data or card.get("recipe", {}).get("data", {}).get("store")
    if place is None or (data is None and not needed and not Path(place).exists()):
        if needed:
            raise DataError("validation rows are those of a store: name it with --data, or other texts with --set")
        return None
    if data is None and not Path(place).exists():
        raise DataError(
            f"the store {place} that the adapter was trained on is not there as seen from {Path.cwd()}: name it with "
            "--data"
        )
    store = CodeStore.open(place)
    if store.info.codec_revision != codec_revision:
        raise DataError(
            f"{store.folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}), the "
            f"model speaks through another one (revision {codec_revision}): name a store of that codec with --data"
        )
    return store


def _is_as_trained(store: CodeStore | None, adapter: Path | None) -> bool | None:
    """Whether a store has the rows that an adapter was trained on; None where its run does not say."""
    if store is None or adapter is None or not (adapter.parent.parent / RUN_STATE).is_file():
        return None
    before = read_json(adapter.parent.parent / RUN_STATE, "").get("trained_on", {}).get("store")
    return None if before is None else before == [shard.sha256 for shard in store.shards]


def kind_of(target: Path) -> str:
    """What is to be evaluated; what is no folder is the name of a base at the hub."""
    if (target / ADAPTER_CONFIG).exists() or (target / RUN_STATE).exists():
        return ADAPTER
    return BASE if not target.is_dir() or (target / "config.json").exists() else CLIPS


def _folder_of(target: Path, adapter: Path | None) -> Path:
    """Of a run in its folder; of a single adapter beside it; of a base in the working directory."""
    if (target / RUN_STATE).exists():
        return target / FOLDER
    return Path(f"{target.name}-{FOLDER}") if adapter is None else adapter.with_name(f"{adapter.name}-{FOLDER}")
