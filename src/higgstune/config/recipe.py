"""The recipe: one strict configuration tree from YAML, saved resolved beside what it made."""

import copy
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from higgstune.batch.packing import PackSize
from higgstune.config.expression import Expression, is_command
from higgstune.config.keys import suggest_key
from higgstune.config.shipped import recipe_file, shipped_recipes
from higgstune.config.trackers import read_trackers
from higgstune.config.yaml import MAX_BYTES, parse_yaml
from higgstune.data.messages import ReferencePlace
from higgstune.data.rejection import did_you_mean
from higgstune.errors import ConfigError
from higgstune.families import DEFAULT_FAMILY, family_info
from higgstune.families.base import TRAINS_TABLE, TextTargets
from higgstune.families.sampling import MAX_TEMPERATURE
from higgstune.files import write_file
from higgstune.inputs import Quantize

Compile = bool | Literal["auto"]
AttentionTraining = Literal["lora", "full"]

_BATCH_TOKENS = 4096  # about two minutes of speech with its text
_MAX_RANK = 1 << 13  # more than any layer of a base has
_FILES_OF_A_RUN = ("recipe.yaml", "run.json")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no names of files on Windows
_SHOWN_PROBLEMS = 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lora(_Strict):
    """The shape of the adapter; the same in all stages of a run."""

    r: int = Field(16, ge=1, le=_MAX_RANK, description="rank")
    alpha: float = Field(32.0, gt=0, description="scaling: alpha / r (alpha / sqrt(r) with rslora)")
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    dora: bool = False


class ModelSettings(_Strict):
    """Which checkpoint, and how it is loaded."""

    family: str = Field(DEFAULT_FAMILY, description="model family of the base, by transformers' name for it")
    checkpoint: str = Field("bosonai/higgs-tts-2-3b-base", description="folder or hub id of the base")
    revision: str | None = Field(None, description="commit, tag or branch at the hub")
    codec: str | None = Field(None, description="folder or hub id; the checkpoint's own where not given")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base weights: bfloat16 where the device computes in it, else float32"
    )
    quantize: Quantize | None = Field(
        None, description="4bit: the decoder layers' linear weights in nf4 while training, a third of the memory"
    )
    device: str = Field("auto", description="auto, cpu or cuda; under torchrun each process takes its own GPU")
    audio_attention: Literal[False, "lora", "full"] = Field(
        False, description="audio self-attention in every layer, trained in full stages by LoRA (true) or in full"
    )
    whisper: str | None = Field(
        None, description="Whisper checkpoint that encodes user and system audio; the store has its features"
    )

    @field_validator("family")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return family_info(value).name

    @field_validator("audio_attention", mode="before")
    @classmethod
    def _one_way(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise ValueError(
                "audio attention is trained by lora or in full, not both: peft would silently leave out the LoRA of "
                "modules that are trained in full"
            )
        return "lora" if value is True else value


class Replay(_Strict):
    """Rows of another store that are trained on as well, against forgetting."""

    store: str = Field(description="folder that `higgstune prepare` wrote, with the same codec")
    share: float = Field(0.1, gt=0, lt=1, description="of all rows of an epoch")


class DataSettings(_Strict):
    """What is trained on."""

    store: str = Field(description="folder that `higgstune prepare` wrote")
    reference: ReferencePlace = Field(
        "turn", description="a row's reference: an earlier turn with its words, or a voice in the scene"
    )
    replay: Replay | None = Field(None, description="rows of another store among them, against forgetting")


class EvaluationSettings(_Strict):
    """What is spoken and measured at each validation, and which checkpoint a stage ends with."""

    clips: int = Field(4, ge=0, description="texts that are spoken at each validation; 0: none")
    texts: str | None = Field(
        None, description="a file of sentences, meta.lst or a built-in language; validation rows where not given"
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="of what is spoken, the same at each validation")
    temperature: float | None = Field(
        None, ge=0, le=MAX_TEMPERATURE, description="of what is spoken; 0 is greedy; default: what the base recommends"
    )
    asr: str | None = Field(None, description="judge of what is said: a Whisper checkpoint, or a command")
    speaker_judge: str | None = Field(None, description="judge of whose voice it is: a WavLM or CAM++, or a command")
    quality_judge: str | None = Field(None, description="judge of naturalness: distillmos, or a command")
    gates: tuple[str, ...] | None = Field(None, description="conditions over metrics that a checkpoint must meet")
    rank: str | None = Field(None, description="expression over metrics; the highest is best")
    choose: Literal["best", "last"] | None = Field(
        None, description="the step that a stage ends with; best where a judge, gates or a rank are named, else last"
    )
    patience: int | None = Field(None, ge=1, description="evaluations without a better one after which a stage ends")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        for text in (*(self.gates or ()), *([] if self.rank is None else [self.rank])):
            Expression(text)
        if self.clips == 0:
            given = [name for name in ("texts", "gates", "rank", "patience") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{', '.join(given)} have no effect with clips: 0, where nothing is spoken")
        return self

    @property
    def which(self) -> Literal["best", "last"]:
        """The step that a stage ends with. Health of a few clips alone is too little to go back by itself."""
        if self.choose is not None:
            return self.choose
        named = (self.asr, self.speaker_judge, self.quality_judge, self.gates, self.rank)
        return "last" if self.clips == 0 or all(name is None for name in named) else "best"


class Stage(_Strict):
    """One stage of training: what is trained, with which losses, for how long."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64, description="folder of the stage in the run")
    kind: str = Field(description="for Higgs Audio v2: text (LoRA on the text pathway, audio frozen) or full (on both)")
    audio_embedding: Literal["frozen", "full"] = Field(
        "frozen", description="for Higgs TTS 3: full trains the table of audio codes, which is also the head"
    )
    epochs: float | None = Field(None, gt=0, description="passes over the data; or give max_steps")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    full_learning_rate: float | None = Field(
        None, gt=0, description="peak, of modules trained in full; a tenth of learning_rate where not given"
    )
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate goes down after the warm-up"
    )
    warmup_steps: float = Field(0, ge=0, description="optimizer steps; below 1: a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="of the LoRA weights, by AdamW")
    batch_tokens: int | None = Field(
        None, ge=1, description="tokens in a forward pass, for each process: clips are packed up to it; 4096"
    )
    batch_size: int | None = Field(None, ge=1, description="clips in a forward pass, instead of batch_tokens")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes in an optimizer step")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    text_weight: float = Field(1.0, ge=0, description="weight of the text loss")
    audio_weight: float = Field(1.0, ge=0, description="weight of the audio loss")
    codebook_weights: tuple[float, ...] | None = Field(None, description="one for each codebook; equal where not given")
    text_targets: TextTargets = Field("transcript", description="which text is a label: transcript, assistant, none")

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if value.casefold().startswith(_FILES_OF_A_RUN):
            raise ValueError(f"{value} is a file of the run's folder: name the stage otherwise")
        if _DEVICE.fullmatch(value) or value.endswith("."):
            raise ValueError(f"{value} cannot be a folder's name everywhere (Windows): name the stage otherwise")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs ({self.epochs:g}) and max_steps ({self.max_steps}) are both given: leave one out, "
                "or set it to null"
            )
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps: how long the stage trains")
        if self.batch_tokens is not None and self.batch_size is not None:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) and batch_size ({self.batch_size}) are both given: leave one out, "
                "or set it to null"
            )
        if self.text_targets == "none" and self.text_weight > 0:
            raise ValueError("text_weight has no effect with text_targets: none; set text_weight: 0")
        if self.text_weight == 0 and self.audio_weight == 0:
            raise ValueError("text_weight and audio_weight are both 0: nothing would be learned")
        weights = self.codebook_weights
        if weights is not None and (min(weights, default=-1) < 0 or sum(weights) == 0):
            raise ValueError("codebook_weights must be >= 0 and not all 0")
        return self

    @property
    def trains(self) -> str:
        """The kind, as `Family.lora_targets` takes it."""
        return self.kind + (TRAINS_TABLE if self.audio_embedding == "full" else "")

    @property
    def pack_size(self) -> PackSize:
        """How much goes into a forward pass."""
        if self.batch_size is not None:
            return PackSize(clips=self.batch_size)
        return PackSize(tokens=_BATCH_TOKENS if self.batch_tokens is None else self.batch_tokens)

    @property
    def rate_of_full_modules(self) -> float:
        """A step moves all weights of a module where it moves r directions of a LoRA: it must be smaller."""
        return self.learning_rate / 10 if self.full_learning_rate is None else self.full_learning_rate


class Recipe(_Strict):
    """A whole run.

    >>> recipe = Recipe(data={"store": "data"}, stages=[{"name": "voice", "kind": "full", "epochs": 3}])
    >>> recipe.with_({"stages.0.learning_rate": 5e-5}).stages[0].learning_rate
    5e-05
    """

    model: ModelSettings = ModelSettings()  # type: ignore[call-arg]
    data: DataSettings
    lora: Lora = Lora()  # type: ignore[call-arg]
    stages: tuple[Stage, ...]
    evaluation: EvaluationSettings = EvaluationSettings()  # type: ignore[call-arg]
    init_adapter: str | None = Field(None, description="adapter or run that the first stage continues")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of the adapter's start and of the order of the clips")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: ddp, each with the whole base; fsdp, each with a share of it (FSDP2)"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False, description="less memory for up to a third more time; auto: in as many layers as the memory requires"
    )
    compile: Compile = Field(
        "auto", description="on a GPU: layers compiled, which takes a minute; auto: in stages of 1000 steps or more"
    )
    log_steps: int = Field(10, ge=1, description="optimizer steps between logs")
    eval_steps: int = Field(200, ge=1, description="optimizer steps between validations")
    save_steps: int = Field(200, ge=1, description="optimizer steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept in each stage")
    report_to: tuple[str, ...] = Field(
        ("tensorboard",), description="as in transformers: tensorboard, wandb, ...; none, or all that are installed"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        return read_trackers(value)

    @field_validator("gradient_checkpointing", "compile", mode="before")
    @classmethod
    def _known_way(cls, value: Any) -> Any:
        if value not in (True, False, "auto"):
            raise ValueError(f"true, false or auto, not {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, tree: Any) -> Any:
        model = tree.get("model") if isinstance(tree, dict) else None
        named = model.get("family") if isinstance(model, dict) else getattr(model, "family", None)
        defaults = _stage_defaults(named)
        if not defaults or not isinstance(tree.get("stages"), list | tuple):
            return tree
        stages = [{**defaults, **stage} if isinstance(stage, dict) else stage for stage in tree["stages"]]
        return {**tree, "stages": stages}

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if not self.stages:
            raise ValueError("stages is empty: a recipe needs at least one")
        names = [stage.name.casefold() for stage in self.stages]  # one folder on disks that ignore case
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, got {', '.join(stage.name for stage in self.stages)}")
        if self.parallel == "fsdp" and self.model.quantize is not None:
            raise ValueError(
                f"parallel: fsdp and model.quantize: {self.model.quantize} are both set: weights in 4 bits are not "
                "sharded; leave one out"
            )
        if problems := [f"{path}: {problem}" for path, problem in _family_problems(self)]:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file, or a shipped one by its name, such as `voice` (see `load_recipe`).

        Raises ConfigError with the path of every wrong field.
        """
        return load_recipe(path)

    def with_(self, changes: Mapping[str, object]) -> "Recipe":
        """A recipe with other values, by their paths: `{"stages.0.max_steps": 50}`; this one does not change.

        Raises ConfigError with the path of every wrong field.
        """
        tree = self.model_dump(mode="json")
        for key, value in changes.items():
            _set(tree, key, value, what=key)
        return parse_recipe(tree, where="the changed recipe")


def _stage_defaults(family: Any) -> Mapping[str, Any]:
    """Of a family; none for a name that is refused later."""
    try:
        return family_info(family).stage_defaults if isinstance(family, str | None) else {}
    except ConfigError:
        return {}


def _family_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What the recipe's model family cannot do, by the path of the field."""
    family = family_info(recipe.model.family)
    for setting in ("audio_attention", "whisper"):
        if getattr(recipe.model, setting) and setting not in family.extensions:
            yield f"model.{setting}", f"{family.title} has no such extension; leave it out"
    for index, stage in enumerate(recipe.stages):
        if stage.audio_embedding == "full" and not family.audio_embedding:
            yield f"stages.{index}.audio_embedding", f"{family.title} trains no embedding: leave it out"
        for field, value, known in (
            ("kind", stage.kind, tuple(family.stage_kinds)),
            ("text_targets", stage.text_targets, family.text_targets),
        ):
            if value not in known:
                yield f"stages.{index}.{field}", f"{family.title} has no {value!r}: one of {', '.join(known)}"
    yield from family.check_recipe(recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, commands: bool = False) -> Recipe:
    """A recipe from YAML, with `key.path=value` overrides (list entries by number: `stages.0.max_steps=50`).

    `path` is a file, or the name of a recipe that ships with the package (see `recipe_file`).
    A recipe may come from anybody, so judges in the file itself may be commands to run only with `commands`; those of
    overrides may always.
    Paths in the recipe are as seen from the working directory; ${VARIABLES} are not expanded.
    Raises ConfigError with the path of every wrong field.
    """
    try:
        with open(recipe_file(path), "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a null byte in the path
        shipped = "" if Path(path).suffix else f"; {did_you_mean(str(path), shipped_recipes())}"
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"the recipe {path} cannot be read: {reason}{shipped}") from error
    tree = parse_yaml(content, where=f"the recipe {path}")
    if not isinstance(tree, dict):
        raise ConfigError(f"the recipe {path} must be a mapping with model, data, lora and stages")
    if not commands:
        _refuse_commands(tree, path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: write key=value, such as stages.0.learning_rate=1e-4")
        what = f"--set {override}"
        _set(tree, key, parse_yaml(value.encode(errors="surrogatepass"), where=f"{what}: the value"), what=what)
    return parse_recipe(tree, where=str(path))


def _refuse_commands(tree: dict[str, Any], path: str | Path) -> None:
    settings = tree.get("evaluation")
    for key in ("asr", "speaker_judge", "quality_judge"):
        spec = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(spec, str) and is_command(spec):
            raise ConfigError(
                f"{path}: evaluation.{key} is a command to run ({spec}). A recipe may come from anybody, so a command "
                f"is given beside it: --set {shlex.quote(f'evaluation.{key}={spec}')}, with null in the recipe"
            )


def parse_recipe(tree: Any, *, where: str) -> Recipe:
    """A recipe from plain data. Raises ConfigError that names `where` and the path of every wrong field."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()[:_SHOWN_PROBLEMS]]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML. Raises WorkError where the disk refuses."""
    write_file(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _set(tree: Any, key: str, value: object, *, what: str) -> None:
    """Set the value at a dotted path of a tree, in place; `what` names the change in errors."""
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if isinstance(node, list):
            _check_not_a_name(node, parent, key, what)
        place = _place(node, parent, what)
        # A copy: an alias makes one object stand in several places. Nothing: a section that was left empty (`lora:`).
        node[place] = {} if node[place] is None else copy.copy(node[place])
        node = node[place]
    node[_place(node, last, what)] = value


def _check_not_a_name(entries: list[Any], name: str, key: str, what: str) -> None:
    """Raise ConfigError where an entry of a list, a stage, is named instead of numbered."""
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == name and not name.isdecimal():
            right = key.replace(f".{name}", f".{number}", 1)
            raise ConfigError(f"{what}: entries of a list are named by their number, from 0: write {right}")


def _place(node: Any, key: str, what: str) -> str | int:
    """Where `key` stands in a mapping, which gets it when it is new, or in a list, which does not grow."""
    if isinstance(node, dict):
        node.setdefault(key)
        return key
    if not isinstance(node, list):
        raise ConfigError(f"{what}: {key!r} stands inside a plain value")
    if not (key.isdecimal() and len(key) < 10 and int(key) < len(node)):
        hint = f": write stages.0.{key}" if key in Stage.model_fields else ""
        raise ConfigError(f"{what}: {key!r} is not an index of a list of {len(node)} entries; they count from 0{hint}")
    return int(key)


def _explain(location: tuple[int | str, ...], kind: str, message: str) -> str:
    path = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{path or 'recipe'}: {message.removeprefix('Value error, ')}"
    return f"{path}: unknown key; {suggest_key(location, _KEYS)}"


_KEYS = {
    section: tuple(model.model_fields)
    for section, model in (
        *(("", Recipe), ("stages.{}", Stage), ("model", ModelSettings), ("data", DataSettings)),
        *(("data.replay", Replay), ("lora", Lora), ("evaluation", EvaluationSettings)),
    )
}
