"""The verb `evaluate`: speak a set of texts with an adapter and with its base, and measure both."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json, sha256_of
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.environment import choose_device
from higgstune.errors import ConfigError, DataError
from higgstune.evaluation.clips import Clip, read_clips, read_voices
from higgstune.evaluation.items import (
    MAX_ROWS,
    EvalItem,
    file_name,
    items_from_rows,
    items_from_sentences,
    only_language,
    round_robin_rows,
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
from higgstune.generate.added import trained_sampling
from higgstune.generate.speaker import Speaker
from higgstune.inputs import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASE,
    CLIPS,
    RUN_STATE,
    BaseSpec,
    base_and_adapter,
    find_run,
    kind_of,
)
from higgstune.metrics import METRICS, SIGNIFICANT, Difference, Evaluation, verdict
from higgstune.model.adapter_folder import ADAPTER_WEIGHTS, adapter_card, base_fingerprint, stores_of_card
from higgstune.model.load import ModelAndTokenizers, load_base
from higgstune.progress import Progress, silent

_LOG = logging.getLogger(__name__)
RECORDINGS = "recordings"
FOLDER = "evaluation"  # inside a run's folder, or the suffix of a folder beside an adapter


@dataclass(frozen=True)
class SpeechSettings:
    """How the clips of an evaluation were spoken."""

    sampling: Sampling
    seed: int
    limit: int | None  # texts of each set; None: all, or `MAX_ROWS` rows
    dtype: str  # of the base, such as "bfloat16" or "float32-4bit"
    device: str
    adapter: str | None
    checkpoint: str
    codec: str
    store: str | None
    store_as_trained_on: bool | None  # None: unknown, or there is no store or no adapter


@dataclass(frozen=True)
class SetResult:
    """The measurements of one set of texts."""

    name: str  # the set as it was requested
    systems: dict[str, Evaluation]  # recordings (if there are any), base (unless left out), adapter
    clips: dict[str, list[Clip]]  # by system, in the order of the texts
    differences: dict[str, Difference]  # adapter minus base, by metric

    @property
    def worse(self) -> list[str]:
        """Metrics that are significantly worse with the adapter."""
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
    def conclusion(self) -> str:
        """What got worse with the adapter, in words, or that there are too few clips to show it."""
        if self.worse:
            return f"worse: {', '.join(self.worse)}"
        varying = [found for found in self.differences.values() if (found.low, found.high) != (0, 0)]
        if varying and all(len(varying) * smallest_p(found.clips) >= SIGNIFICANT for found in varying):
            clips = max(found.clips for found in varying)
            return f"{clips} clips are too few to show that anything is worse (or better)"
        return "nothing is clearly worse"

    def as_json(self) -> dict[str, Any]:
        """Everything except the rows of the clips, which are in the set's own file."""
        return {
            "set": self.name,
            "worse": self.worse,
            "conclusion": self.conclusion,
            "systems": {name: found.without_clips() for name, found in self.systems.items()},
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }


@dataclass(frozen=True)
class EvaluationResult:
    """The result of `evaluate`."""

    folder: Path  # holds the speech, the judges' answers and `NAME.json` for each set
    adapter: Path | None  # None: a base, or an external folder of clips
    texts: SetResult
    guard: list[SetResult]  # texts and voices that must not get worse
    settings: SpeechSettings | None  # None: an external folder of clips

    def as_json(self) -> dict[str, Any]:
        """Everything except the rows of the clips, which are in the sets' own files."""
        return {
            "folder": str(self.folder),
            "settings": None if self.settings is None else asdict(self.settings),
            **self.texts.as_json(),
            "guard": {guarded.name: guarded.as_json() for guarded in self.guard},
        }


@dataclass(frozen=True)
class _System:
    """A base, alone or with an adapter, that speaks the texts."""

    speaker: Speaker
    name: str  # BASE or ADAPTER
    identity: str  # identifies base, adapter and codec by their content


@dataclass(frozen=True)
class _Context:
    """What the texts of all sets are taken from, and what their clips are measured against."""

    store: CodeStore | None
    voices: dict[str, list[Path]]
    judges: Judges
    folder: Path
    seed: int
    limit: int | None
    language: str | None
    settings: SpeechSettings | None


def evaluate(
    target: str | Path,
    *,
    texts: str = VALIDATION,
    guard: Sequence[str] = (),
    out: str | Path | None = None,
    data: str | Path | None = None,
    base: BaseSpec = BaseSpec(),
    with_base: bool = True,
    whisper: str | Path | None = None,
    asr: str | None = None,
    speaker_judge: str | None = AUTO,
    quality_judge: str | None = None,
    judges: Judges | None = None,
    temperature: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    language: str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Speak `texts` and the `guard` sets with an adapter (its folder or its run's) and with its base, and measure them.

        evaluate("runs/voice", texts="en", asr="large-v3").texts.conclusion

    `texts` and each entry of `guard` is `validation` (rows of the store that the adapter was trained on, or of `data`),
    built-in languages, a file of sentences or a `meta.lst` (see `read_sentences`). `limit` caps the texts of each set;
    without it, at most 100 rows of a store are spoken. `language` applies to sentences that name none; the default is
    the store's language, if it has only one. `temperature` takes the place of the adapter's or the base's. Speech is
    kept in `out` and reused for the same adapter, text, voice and seed; the judges' answers are kept as well.

    `base` says how to load the base, and where it is if it has moved; the judges use its device, too. `with_base=False`
    leaves out its clips. `whisper` is the new place of the Whisper checkpoint that an adapter, or a base alone, was
    trained with. `judges` that are already loaded replace the three specs (see `load_judges`).

    `target` may also be a base, or an external folder of clips (see `read_clips`), which are measured as they are.

    Raises ConfigError, DataError or CheckpointError for wrong input, WorkError if a judge fails or the disk refuses.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: it must be at least 1")
    if guard and not with_base:
        raise ConfigError("guard needs the base to compare with: leave out --no-base")
    target = find_run(target)
    show = progress or silent
    kind = kind_of(target)
    base, adapter = (base, None) if kind == CLIPS else base_and_adapter(target, base)
    folder = Path(out) if out is not None else target if kind == CLIPS else _folder_of(target, adapter)
    if judges is None:
        judges = load_judges(asr, speaker_judge, quality_judge, device=str(choose_device(base.device)))
    if kind == CLIPS:
        return _evaluate_clips(target, judges, folder, seed, show)
    names = [texts, *dict.fromkeys(name for name in guard if name != texts)]
    _check_sets(names, judges, language)
    loaded = load_base(base, adapter)
    store = _open_store(data, adapter, needed=VALIDATION in names, codec_revision=loaded.audio_tokenizer.revision)
    sampling = trained_sampling(adapter, loaded.folder).with_(temperature=temperature)
    settings = SpeechSettings(
        sampling, seed, limit, _precision(loaded, base), str(loaded.model.device),
        None if adapter is None else str(adapter), loaded.checkpoint, loaded.codec,
        None if store is None else str(store.folder), _is_as_trained(store, adapter),
    )  # fmt: skip
    if store is not None and settings.store_as_trained_on is False:
        _LOG.warning(
            "the store %s is not the one that the adapter was trained on, or it has changed since: its held-out rows "
            "may have been trained on", store.folder,
        )  # fmt: skip
    with alone_in(folder, "evaluation", "nothing was spoken"):
        context = _Context(store, {}, cached(judges, folder / "judged"), folder, seed, limit, language, settings)
        spoken: dict[str, dict[str, list[Clip]]] = {name: {} for name in names}
        for system in _systems(loaded, adapter, settings, whisper, with_base=with_base):
            for name in names:
                spoken[name][system.name] = synthesize_items(
                    _items(name, system.speaker, context), system.speaker, folder, system=system.identity,
                    sampling=settings.sampling, batch_size=batch_size, progress=show,
                    what=f"speaking {name}, {system.name}",
                )  # fmt: skip
        if store is not None:
            speakers = [clip.speaker for found in spoken.values() for clips in found.values() for clip in clips]
            context = replace(context, voices=write_voices(store, loaded.audio_tokenizer, folder, speakers))
        results = [_measure(name, spoken[name], context, show) for name in names]
        return EvaluationResult(folder, adapter, results[0], results[1:] if guard else [], settings)


def set_file(name: str) -> str:
    """The name of a set's file, without its suffix."""
    return name if name.replace(",", "").isalnum() else file_name(name)


def _check_sets(names: Sequence[str], judges: Judges, language: str | None) -> None:
    """Find what is wrong with the sets before a model is loaded."""
    for name in names:
        if name != VALIDATION:
            check_languages(judges, [sentence.language or language for sentence in read_sentences(name)])


def _precision(loaded: ModelAndTokenizers, base: BaseSpec) -> str:
    return str(loaded.model.dtype).removeprefix("torch.") + (f"-{base.quantize}" if base.quantize else "")


def _systems(
    loaded: ModelAndTokenizers,
    adapter: Path | None,
    settings: SpeechSettings,
    whisper: str | Path | None,
    *,
    with_base: bool,
) -> Iterator[_System]:
    """The base, then the adapter, each made when the one before has spoken: an adapter stays on the base."""
    identity = f"{base_fingerprint(loaded.model)} {settings.dtype} {loaded.audio_tokenizer.revision}"
    if with_base or adapter is None:
        yield _System(Speaker(loaded, whisper=whisper if adapter is None else None), BASE, identity)
    if adapter is not None:
        files = " ".join(sha256_of(adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        yield _System(Speaker(loaded, adapter, whisper=whisper), ADAPTER, f"{identity} {files}")


def _measure(name: str, spoken: dict[str, list[Clip]], context: _Context, show: Progress) -> SetResult:
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
        report = partial(_show_system, show, f"{name}, {system}")
        systems[system] = score(some, context.judges, context.voices, seed=context.seed, progress=report)
    differences = (
        differences_of(systems[BASE], systems[ADAPTER], seed=context.seed)
        if BASE in spoken and ADAPTER in spoken
        else {}
    )
    result = SetResult(name, systems, clips, differences)
    content = {
        "settings": None if context.settings is None else asdict(context.settings),
        **result.as_json(),
        "clips": {system: found.clips for system, found in systems.items()},
    }
    write_file(context.folder / f"{set_file(name)}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return result


def _show_system(show: Progress, system: str, what: str, done: int, total: int) -> None:
    show(f"{what}, {system}", done, total)


def _evaluate_clips(folder: Path, judges: Judges, out: Path, seed: int, show: Progress) -> EvaluationResult:
    """Measure an external folder of clips as one system."""
    clips = read_clips(folder)
    context = _Context(None, read_voices(folder), cached(judges, out / "judged"), out, seed, None, None, None)
    with alone_in(out, "evaluation", "nothing was judged"):
        result = _measure(CLIPS, {CLIPS: clips}, context, show)
    return EvaluationResult(out, None, result, [], None)


def _items(name: str, speaker: Speaker, context: _Context) -> list[EvalItem]:
    """The items of a set, in their order."""
    store = context.store
    if name == VALIDATION:
        assert store is not None
        rows = round_robin_rows(store.split(VALIDATION), context.limit or MAX_ROWS)
        items = items_from_rows(rows, speaker, context.folder, seed=context.seed, features=_features(store, speaker))
        if not items:
            raise DataError(
                f"{store.folder} has no validation rows that can be spoken: prepare it with a --validation-fraction, "
                "or name other texts with --set"
            )
        return items
    return items_from_sentences(
        _limited(read_sentences(name), context.limit),
        speaker,
        seed=context.seed,
        known=[] if store is None else speakers_of(store),
        language=context.language or (None if store is None else only_language(store)),
    )


def _limited(sentences: Sequence[Sentence], limit: int | None) -> list[Sentence]:
    """The first `limit` sentences, taking the languages in turn."""
    turns: dict[str | None, int] = {}
    ranked = []
    for index, sentence in enumerate(sentences):
        ranked.append((turns.setdefault(sentence.language, 0), index))
        turns[sentence.language] += 1
    chosen = sorted(ranked)[:limit] if limit is not None else ranked
    return [sentences[index] for _, index in sorted(chosen, key=lambda pair: pair[1])]


def _features(store: CodeStore, speaker: Speaker) -> FeatureStore | None:
    """The Whisper features of a store's clips; None if the model does not use Whisper or the store lacks them."""
    if speaker.whisper_spec is None:
        return None
    try:
        return FeatureStore.open(store.folder, speaker.whisper_spec.checkpoint, speaker.whisper_spec.revision)
    except DataError:
        return None  # the encoder itself computes the features of the references


def _open_store(
    data: str | Path | None, adapter: Path | None, *, needed: bool, codec_revision: str
) -> CodeStore | None:
    """The store whose rows and voices are used: `data`, or the one that the adapter was trained on."""
    card = {} if adapter is None else adapter_card(adapter)
    places = [Path(data)] if data is not None else stores_of_card(card)
    place = next((place for place in places if data is not None or place.exists()), None)
    if place is None:
        if not needed:
            return None
        if not places:
            raise DataError("validation rows come from a store: name it with --data, or other texts with --set")
        raise DataError(
            f"the store {' or '.join(map(str, places))} that the adapter was trained on does not exist, seen from "
            f"{Path.cwd()}: name it with --data"
        )
    store = CodeStore.open(place)
    if store.info.codec_revision != codec_revision:
        raise DataError(
            f"{store.folder} was encoded by the codec {store.info.codec} (revision {store.info.codec_revision}), the "
            f"model speaks through another one (revision {codec_revision}): name a store of that codec with --data"
        )
    return store


def _is_as_trained(store: CodeStore | None, adapter: Path | None) -> bool | None:
    """Whether a store has the rows that an adapter was trained on; None if its run does not say."""
    if store is None or adapter is None or not (adapter.parent.parent / RUN_STATE).is_file():
        return None
    before = read_json(adapter.parent.parent / RUN_STATE, "").get("trained_on", {}).get("store")
    return None if before is None else before == [shard.sha256 for shard in store.shards]


def _folder_of(target: Path, adapter: Path | None) -> Path:
    """Inside a run's folder; beside a single adapter; for a base, in the working directory."""
    if (target / RUN_STATE).exists():
        return target / FOLDER
    return Path(f"{target.name}-{FOLDER}") if adapter is None else adapter.with_name(f"{adapter.name}-{FOLDER}")
