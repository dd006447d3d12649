"""The model card, README.md of an exported folder: content, origin, use, licence."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

import higgstune
from higgstune.checkpoint_files import MERGED, folder_card, write_checksums
from higgstune.codec import CODEC_FOLDER
from higgstune.data.origin import Origin, in_words, origin_from_json
from higgstune.exporting.layouts import LayoutName, licence_files
from higgstune.exporting.source import Source
from higgstune.exporting.verify import ExportCheck, HeldOut, Logits
from higgstune.families import load_family
from higgstune.families.base import Family
from higgstune.model.base_identity import base_identity

Kind = Literal["native", "extended", "original", "peft"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONSENT = (
    "A voice belongs to a person. The speakers of the recordings must have consented to this use; whoever passes this "
    "folder on answers for that, and writes here who consented, to what and when. Do not pass the model's speech off "
    "as a person's own words, and say that it is synthetic where people could take it for real."
)
_TO_FILL_IN = " *(to be filled in)*"
_IN_PYTHON = """In Python:

```python
import higgstune as hg

voice = hg.load("THIS_FOLDER")
voice.speak("Good morning.").save("morning.wav")
```"""
_TRAINED_IN_4_BITS = (
    "It was trained on a base in 4 bits (QLoRA: nf4, double quantisation). The comparison below is of the same adapter "
    "on the unquantised base, which speaks slightly differently."
)


@dataclass(frozen=True)
class AudioLoss:
    """Audio loss on the compared clips, in nats, with and without the modules that were left out."""

    with_modules: float
    without_modules: float


@dataclass(frozen=True)
class CardFacts:
    """Facts of the card about the folder itself."""

    kind: Kind
    title: str
    dtype: str
    codec: str
    has_codec: bool
    licences: tuple[str, ...]  # files, from the folder
    base_fingerprint: str
    check: ExportCheck
    conditioning: tuple[str, ...] = ()  # its extensions, in words
    dropped: tuple[str, ...] = ()
    loss: AudioLoss | None = None  # with and without the dropped modules
    base_bits: int | None = None


def public_name(name: str) -> str:
    """A hub id as it is, a folder by its last name: a card is read by strangers."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).is_dir() else Path(name).name


def model_card(source: Source, facts: CardFacts) -> str:
    """The whole README.md."""
    sections = [
        f"# {_plain(facts.title)}",
        f"{_family(source).export.descriptions[facts.kind]}. Made with Higgstune {higgstune.__version__} from "
        f"`{_code(public_name(source.checkpoint))}`.",
        *_notes(source, facts),
        "## Speaking",
        _speaking(source, facts),
        "## Base model",
        _base(source, facts),
        "## Data",
        _data(source.card),
        "## Training",
        _training(source.card),
        "## Check",
        _check(facts),
        "## Licence",
        _licence(source, facts),
        "## Consent",
        _consent(source.card),
    ]
    return _front_matter(source, facts) + "\n\n".join(sections) + "\n"


def _front_matter(source: Source, facts: CardFacts) -> str:
    matter: dict[str, Any] = {
        "base_model": public_name(source.checkpoint),
        "base_model_relation": "adapter" if facts.kind == "peft" else "finetune",
        "library_name": _family(source).export.libraries[facts.kind],
        "pipeline_tag": "text-to-speech",
        "license": "other",
        "license_name": _family(source).export.licence_name,
        "tags": ["text-to-speech", source.layout.family.title.lower().replace(" ", "-"), "higgstune", "lora"],
    }
    if facts.licences:
        matter["license_link"] = facts.licences[0]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---\n\n"


def _notes(source: Source, facts: CardFacts) -> list[str]:
    notes = []
    if source.faults:
        notes.append(f"**The run that trained it ended as not usable**: {_plain('; '.join(source.faults))}.")
    if facts.conditioning:
        notes.append(f"It carries {' and '.join(facts.conditioning)} beside the native class.")
    if facts.dropped:
        assert facts.loss is not None
        notes.append(
            f"**It is not all that was trained**: {', '.join(f'`{name}`' for name in facts.dropped)} were left out, "
            f"for which this layout has no place. Audio loss on the compared clips: {facts.loss.with_modules:.3f} nats "
            f"with them, {facts.loss.without_modules:.3f} without."
        )
    return notes


def _speaking(source: Source, facts: CardFacts) -> str:
    own = "--adapter" if facts.kind == "peft" else "--model"
    lines = [f'```sh\nhiggstune speak "Good morning." {own} THIS_FOLDER --out morning.wav\n```', _IN_PYTHON]
    if _recipe_of(source)["data"].get("reference") == "scene":
        lines.append(
            "It was trained with references in the scene"
            + (
                ", which are encoded by a module that was left out: without it the model reads their codes, untrained."
                if facts.dropped and _recipe_of(source)["model"].get("whisper")
                else ": a reference needs no words. `higgstune speak` knows that."
            )
        )
    usage = _family(source).export.usage(
        facts.kind, base=public_name(source.checkpoint), dtype=facts.dtype, bits=facts.base_bits
    )
    if usage is not None:
        lines.append(usage)
    if facts.base_bits is not None:
        lines.append(
            "The weights are stored unquantised. With these settings bitsandbytes quantises the linear layers, "
            f"but not the heads, to {facts.base_bits} bits as it loads them. The loss of quality was not measured."
        )
    return "\n\n".join(lines)


def _family(source: Source) -> Family:
    return load_family(source.layout.family)


def _recipe_of(source: Source) -> dict[str, dict[str, Any]]:
    """The parts of the adapter's recipe, empty where its card has none."""
    recipe = source.card.get("recipe") or {}
    return {key: recipe.get(key) or {} for key in ("model", "data")}


def _base(source: Source, facts: CardFacts) -> str:
    rows = {
        "name": public_name(source.checkpoint),
        "model family": source.layout.family.title,
        "revision": source.base.revision or source.card.get("revision") or "not recorded",
        "fingerprint of its weights": facts.base_fingerprint,
        "codec": public_name(facts.codec) + (", in the sub-folder `codec`" if facts.has_codec else ""),
        "revision of the codec": source.card.get("codec_revision") or "not recorded",
        "adapter (sha256 of its weights)": source.weights_sha256,
        "stored as": facts.dtype,
    }
    if facts.kind == "peft":
        rows["stored as"] = "adapter alone; the base is loaded beside it"
    return _table(("base", ""), [(key, str(value)) for key, value in rows.items()])


def _data(card: Mapping[str, Any]) -> str:
    data = card.get("data") or {}
    rows = [
        (split, _number(data.get(f"{split}_rows"), "{:d}"), _number(data.get(f"{split}_hours"), "{:.4g}"))
        for split in ("train", "validation")
    ]
    origin = _origin(card)
    stated = [f"- {name} of the recordings: {_plain(in_words(origin[name]))}" for name in ("source", "licence")]
    return "\n".join([_table(("split", "rows", "hours of audio"), rows), "", *stated])


def _origin(card: Mapping[str, Any]) -> Origin:
    return origin_from_json(_without_folders((card.get("data") or {}).get("origin")))


def _consent(card: Mapping[str, Any]) -> str:
    stated = _origin(card)["consent"]
    missing = None in stated or not stated
    return f"{_CONSENT}\n\nConsent: {_plain(in_words(stated))}{_TO_FILL_IN if missing else ''}."


def _training(card: Mapping[str, Any]) -> str:
    stages = card.get("stages") or []
    if not stages:
        return "Stages: not recorded in the adapter."
    rows = [
        (str(stage.get("name")), str(stage.get("kind")), str(stage.get("steps")), _metrics(stage.get("metrics") or {}))
        for stage in stages
    ]
    recipe = card.get("recipe") or {}
    notes = [_table(("stage", "kind", "steps", "last losses"), rows)]
    if recipe.get("lora"):
        notes.append("LoRA: " + ", ".join(f"{key} {value}" for key, value in recipe["lora"].items()) + ".")
    if card.get("base_quantized"):
        notes.append(_TRAINED_IN_4_BITS)
    if recipe.get("init_adapter"):
        notes.append(f"It continues from another adapter, `{_code(Path(recipe['init_adapter']).name)}`.")
    return "\n\n".join(notes)


def _metrics(metrics: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items()) or "not measured"


def _check(facts: CardFacts) -> str:
    check = facts.check
    what = "largest" if check.dtype == "float32" else "mean"
    clips = f"{check.origin} ({check.clips} of them; {what} difference of a logit, {check.dtype})"
    if facts.kind == "peft":
        return f"On its base the adapter changes the logits by {check.from_base:.2e}, on {clips}."
    less = " without the modules that were left out" if facts.dropped else ""
    return (
        f"Loaded from the written files, on {clips}: {check.from_adapter:.2e} from the base with its adapter{less} "
        f"(tolerance {check.tolerance:.0e}), {check.from_base:.2e} from the base alone."
    )


def _licence(source: Source, facts: CardFacts) -> str:
    note = _family(source).export.licence_note
    if facts.licences:
        files = ", ".join(f"[{name}]({name})" for name in facts.licences)
        return f"{note}\n\nCopied along: {files}."
    return f"{note}\n\nThe base's folder had no LICENSE file to copy along: get it from the base model's page."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _number(value: Any, shape: str) -> str:
    return shape.format(value) if isinstance(value, int | float) else "not recorded"


def _plain(text: str) -> str:
    """Text that breaks neither a table nor a heading."""
    return " ".join(text.split()).replace("|", r"\|")


def _code(text: str) -> str:
    return _plain(text).replace("`", "'")


@dataclass(frozen=True)
class Written:
    """A written checkpoint, once the models are freed: its facts, and the logits to compare with."""

    layout: LayoutName
    dtype: str
    held_out: HeldOut
    base: Logits
    adapted: Logits
    base_fingerprint: str
    codec: str
    has_codec: bool
    conditioning: tuple[str, ...]
    dropped: tuple[str, ...]
    loss: AudioLoss | None


def describe(
    source: Source,
    folder: Path,
    name: str,
    written: Written,
    check: ExportCheck,
    fingerprint: str,
    base_bits: int | None,
) -> None:
    """Write README.md and higgstune.json: adapter and base, and the checksum of each weight file.

    `name` is the folder's final name, `fingerprint` that of the merged weights.
    """
    licences = [*licence_files(folder), *licence_files(folder / CODEC_FOLDER)]
    facts = CardFacts(
        kind=written.layout,
        title=name,
        dtype=written.dtype,
        codec=written.codec,
        has_codec=written.has_codec,
        licences=tuple(path.relative_to(folder).as_posix() for path in licences),
        base_fingerprint=written.base_fingerprint,
        check=check,
        conditioning=written.conditioning,
        dropped=written.dropped,
        loss=written.loss,
        base_bits=base_bits,
    )
    (folder / "README.md").write_text(model_card(source, facts), encoding="utf-8")
    merged = {
        "family": source.layout.family.name,
        "adapter_sha256": source.weights_sha256,
        "base": public_name(source.checkpoint),
        "revision": source.base.revision,
        "base_fingerprint": written.base_fingerprint,
        "fingerprint": fingerprint,
        "layout": written.layout,
        "dtype": written.dtype,
        "dropped": list(written.dropped),
        "check": asdict(check),
        "base_merged": folder_card(source.layout.folder).get(MERGED),  # where the base is itself a merged checkpoint
    }
    family = load_family(source.layout.family)
    write_checksums(
        folder, higgstune=higgstune.__version__, merged=merged, codec=public_name(written.codec),
        adapter=_without_folders(source.card), **base_identity(family, family.read_config(folder), folder),
    )  # fmt: skip


def _without_folders(value: Any) -> Any:
    """An adapter's card with the last names of folders only: strangers will read it."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
