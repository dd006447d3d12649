"""The order of an examination: what each check needs, and what is still examined when an earlier one failed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from higgstune.batch.dataset import PLAIN, Rendering
from higgstune.codec import CODEC_FOLDER, Codec, checkpoint_codec, load_codec
from higgstune.config.recipe import Recipe, load_recipe
from higgstune.data.store import CodeStore, Row
from higgstune.diagnostics import adapter as adapters
from higgstune.diagnostics import checkpoint as checkpoints
from higgstune.diagnostics import codec as codecs
from higgstune.diagnostics import data as stores
from higgstune.diagnostics import generation, loss, prompt
from higgstune.diagnostics import machine as memory
from higgstune.diagnostics.machine import check_environment
from higgstune.diagnostics.report import Finding, Report, in_order
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError, ConfigError, HiggstuneError
from higgstune.families import family_in, load_family, read_layout
from higgstune.families.base import Family, Layout, Prompter, Spec
from higgstune.hub import fetch
from higgstune.inputs import BaseSpec, find_adapter
from higgstune.model.adapter_folder import ADAPTER_WEIGHTS, adapter_card, adapter_conditioning
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model, load_tokenizer, recorded_base
from higgstune.peft_compat import PeftModel


@dataclass
class Names:
    """Folders and hub ids; None where nothing names one yet."""

    base: BaseSpec
    adapter: str | None
    data: str | None
    recipe: str | None

    @property
    def any(self) -> bool:
        """Whether there is anything but the machine to examine."""
        return any((self.base.checkpoint, self.adapter, self.data, self.base.codec, self.recipe))

    def take_from_recipe(self, recipe: Recipe) -> None:
        """A recipe names base, codec, store and the adapter that it continues from, and says how the base is loaded.

        In 4 bits, too: its memory is compared so, and on a small GPU it does not fit otherwise.
        """
        model = recipe.model
        filled = self.base.filled(model.checkpoint, model.revision, model.codec)
        self.base = replace(filled, dtype=filled.dtype or model.dtype, quantize=filled.quantize or model.quantize)
        self.data = self.data or recipe.data.store
        self.adapter = self.adapter or recipe.init_adapter

    def take_from_store(self, store: CodeStore) -> None:
        """A store may name the checkpoint that it was made for; without one, there is its codec to examine."""
        self.base = self.base.filled(store.info.settings.get("model"))
        if self.base.checkpoint is None:
            self.base = self.base.filled(codec=store.info.codec)


Progress = Callable[[str], None]
# What a broken file or a broken version of a library raises in the middle of a check: a finding, not a traceback.
_ACCIDENTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, TemplateError),
)
_ADVICE = {
    "recipe": "correct it; recipes/ has some to start from",
    "checkpoint": "name a folder or a hub id with --model; copy or download it again where it is damaged",
    "codec": "give the checkpoint's own codec with --codec; copy or download it again where it is damaged",
    "data": "name a store that `higgstune prepare` wrote with --data; prepare it again where it is damaged",
    "adapter": "name an adapter's or a run's folder; copy it again where it is damaged",
}
_REPORT_IT = "look at the message; with a sound installation and sound files this is a fault of Higgstune"


def doctor(
    base: BaseSpec = BaseSpec(),
    *,
    adapter: str | Path | None = None,
    data: str | Path | None = None,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Examine whatever is named, and the machine; without any, the machine alone. Nothing is changed.

        doctor(adapter="runs/voice", data="data/voice").passed

    An adapter and a recipe name their base, codec and data themselves; arguments override that. `progress` gets the
    name of the running check. Whatever is wrong is a finding of the report; ConfigError is raised for a device or
    dtype that does not exist.
    """
    choose_dtype(base.dtype, choose_device(base.device))
    names = Names(base, *(None if name is None else str(name) for name in (adapter, data, recipe)))
    examination = _Examination(names, progress or (lambda _: None))
    examination.run()
    return in_order(examination.findings)


@dataclass
class _Examination:
    """One examination. What could be loaded is an attribute; why something could not is in `absent`."""

    names: Names
    show: Progress
    findings: list[Finding] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    rendering: Rendering = PLAIN
    recipe: Recipe | None = None
    adapter: Path | None = None
    store: CodeStore | None = None
    rows: list[Row] = field(default_factory=list)
    peft_model: PeftModel | None = None

    # Set by the checks that load them; a check that needs one says so and is skipped without.
    device: torch.device = field(init=False)
    folder: Path = field(init=False)
    family: Family = field(init=False)
    config: Any = field(init=False)
    spec: Spec = field(init=False)
    layout: Layout = field(init=False)
    prompter: Prompter = field(init=False)
    model: Any = field(init=False)
    codec: Codec = field(init=False)

    def run(self) -> None:
        """All checks, in an order in which each finds what it needs."""
        self._check("environment", (), check_environment)
        if not self.names.any:
            return
        self._find_what_is_named()
        self._check("checkpoint", ("model name",), self._read_config, gives="config")
        self._check("checkpoint", ("config",), self._read_files, gives="tensors")
        self._check("checkpoint", ("config", "ids"), self._read_tokenizer, gives="tokenizer")
        self._check("memory", ("config",), self._compare_memory)
        self._check("checkpoint", ("tensors", "enough memory"), self._load_model, gives="model")
        self._check("rotary", ("model",), self._look_at_rotary, gives="rotary")
        self._check("codec", (), self._look_at_codec, gives="codec")
        self._check("codec", ("codec",), self._compare_revisions, gives="the store's codec")
        self._check("data", ("data",), self._look_at_store, gives="rows")
        self._check("data", ("data", "rows"), self._open_features)
        self._check("prompt", ("tokenizer",), self._look_at_prompt, gives="prompt")
        sound = ("data", "model", "finite weights", "rotary", "tokenizer", "rows", "codec", "the store's codec")
        self._check("loss", sound, self._look_at_loss)
        self._check("adapter", ("adapter",), self._look_at_adapter_files, gives="adapter files")
        self._check("adapter", ("adapter", "model", "finite weights"), self._compare_base, gives="adapter's base")
        needed = ("adapter", "adapter files", "adapter's base", "model", "finite weights")
        self._check("adapter", needed, self._apply_adapter)
        self._check("generation", ("model", "finite weights", "tokenizer", "prompt"), self._generate)

    def _check(
        self, check: str, needs: tuple[str, ...], work: Callable[[], list[Finding]], *, gives: str | None = None
    ) -> None:
        """Do one piece of work. An error becomes a finding, and what the work `gives` is absent for later ones."""
        lacking = [self.absent[need] for need in needs if need in self.absent]
        if lacking:
            self._skip(check, lacking[0], gives)
            return
        self.show(check if gives is None else f"{check}, {gives}")
        try:
            self.findings += work()
            return
        except HiggstuneError as error:
            self.findings.append(Finding(check, "failed", str(error), _ADVICE.get(check, _REPORT_IT)))
        except _ACCIDENTS as error:
            text = f"the check broke off: {type(error).__name__}: {error}"
            self.findings.append(Finding(check, "failed", text, _REPORT_IT))
        if gives is not None:
            self.absent[gives] = f"the check of the {check} failed"

    def _skip(self, check: str, reason: str, gives: str | None) -> None:
        if gives is not None:
            self.absent.setdefault(gives, reason)
        messages = [f.message for f in self.findings if f.check == check and f.status in ("failed", "skipped")]
        if not messages:
            self.findings.append(Finding(check, "skipped", reason))

    def _if_failed(self, found: list[Finding], thing: str, reason: str) -> list[Finding]:
        """The findings, and `thing` is absent for later checks when one of them failed."""
        if any(finding.status == "failed" for finding in found):
            self.absent[thing] = reason
        return found

    # What is named

    def _read_recipe(self) -> list[Finding]:
        assert self.names.recipe is not None
        recipe = load_recipe(self.names.recipe)
        self.recipe = recipe
        self.names.take_from_recipe(recipe)
        self.rendering = Rendering(reference=recipe.data.reference)
        stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in recipe.stages)
        found = [Finding("recipe", "ok", f"{self.names.recipe}: {stages}")]
        if self.names.base.device is None:
            try:
                choose_device(recipe.model.device)
                self.names.base = replace(self.names.base, device=recipe.model.device)
            except ConfigError as error:
                advice = "train on a machine with such a device; what follows is examined on the one that is here"
                found.append(Finding("recipe", "failed", f"model.device: {error}", advice))
        return found

    def _read_card(self) -> list[Finding]:
        assert self.names.adapter is not None
        folder = find_adapter(self.names.adapter)
        try:
            card = adapter_card(folder)
            adapter_conditioning(folder)
        except CheckpointError:
            self.names.base = recorded_base(self.names.base, folder, {})  # what is not damaged is examined
            raise
        self.names.base = recorded_base(self.names.base, folder, card)
        self.adapter = folder
        if self.recipe is None:
            self.rendering = Rendering(reference=card.get("recipe", {}).get("data", {}).get("reference", "turn"))
        return adapters.check_card(folder)

    def _open_store(self) -> list[Finding]:
        assert self.names.data is not None
        self.store = CodeStore.open(self.names.data)
        self.rows = stores.first_rows(self.store)
        return []

    def _find_what_is_named(self) -> None:
        """A recipe and an adapter name the rest, a store its checkpoint."""
        names = self.names
        if names.recipe is not None:
            self._check("recipe", (), self._read_recipe)
        self.device = choose_device(names.base.device)
        if names.adapter is None:
            self.absent["adapter"] = "no adapter was named with --adapter"
        else:
            self._check("adapter", (), self._read_card, gives="adapter")
        if names.data is None:
            self.absent["data"] = "no store was named with --data"
        else:
            self._check("data", (), self._open_store, gives="data")
        if self.store is not None:
            names.take_from_store(self.store)
        if names.base.checkpoint is None:
            self.absent["model name"] = "no checkpoint was named with --model, and nothing else names one"

    # The checkpoint

    def _read_config(self) -> list[Finding]:
        base = self.names.base
        assert base.checkpoint is not None
        self.folder = fetch(base.checkpoint, what="checkpoint", revision=base.revision)
        self.family = load_family(family_in(self.folder)[0])
        self.config = self.family.read_config(self.folder)
        self.spec = self.family.spec(self.config)
        return self._if_failed(
            checkpoints.check_config(self.family, self.config), "ids", "the ids in config.json do not fit together"
        )

    def _read_files(self) -> list[Finding]:
        self.layout = read_layout(self.folder)
        found = checkpoints.check_tensors(self.layout, self.family, self.config)
        found += checkpoints.check_recorded_checksums(self.folder)
        return self._if_failed(found, "tensors", "the checkpoint's files are not those that they should be")

    def _read_tokenizer(self) -> list[Finding]:
        tokenizer = load_tokenizer(self.folder, self.family, self.config)
        self.prompter = self.family.prompter(tokenizer, self.config)
        return [Finding("checkpoint", "ok", f"the tokenizer has {len(tokenizer)} tokens and fits the config")]

    def _load_model(self) -> list[Finding]:
        base = self.names.base
        self.model = load_model(self.folder, dtype=base.dtype, device=self.device, quantize=base.quantize)
        found = checkpoints.check_weights(self.model)
        return self._if_failed(found, "finite weights", "the checkpoint's weights are broken")

    def _look_at_rotary(self) -> list[Finding]:
        found = checkpoints.check_stored_rotary(self.layout, self.family, self.config) + checkpoints.check_rotary(
            self.model
        )
        return self._if_failed(found, "rotary", "the rotary buffers are wrong")

    # Codec and data

    def _look_at_codec(self) -> list[Finding]:
        brought = hasattr(self, "folder") and (self.folder / CODEC_FOLDER).is_dir()
        if self.names.base.codec is None and "config" in self.absent and not brought:
            self.absent["codec"] = "there is no checkpoint to name its codec"
            return [Finding("codec", "skipped", self.absent["codec"])]
        # The checkpoint by its folder: it has been fetched.
        base = self.names.base
        name = base.codec if base.codec is not None else checkpoint_codec(self.folder)
        self.codec = load_codec(name, device=str(self.device))
        found = codecs.check_modes(self.codec, getattr(self, "model", None)) + codecs.check_codes(self.codec)
        return found if "config" in self.absent else found + codecs.check_fit(self.codec, self.spec)

    def _compare_revisions(self) -> list[Finding]:
        found = []
        if self.store is not None:
            advice = "prepare the data again with this codec, or name the store's codec with --codec"
            what = f"the store {self.store.folder}"
            found += codecs.check_revision(self.codec, self.store.info.codec_revision, what, advice)
            self._if_failed(found, "the store's codec", "the store was made with another codec")
        if self.adapter is not None and (card := adapter_card(self.adapter)):
            advice = "name the codec that the adapter was trained with, by --codec"
            found += codecs.check_revision(
                self.codec, card.get("codec_revision"), f"the adapter {self.adapter}", advice
            )
        return found

    def _look_at_store(self) -> list[Finding]:
        assert self.store is not None
        spec = None if "config" in self.absent else self.spec
        found = stores.check_store(self.store, self.rows, spec)
        return self._if_failed(found, "rows", "the store's rows cannot be used")

    def _open_features(self) -> list[Finding]:
        assert self.store is not None
        named = None if self.recipe is None else self.recipe.model.whisper
        shape = None
        if self.recipe is None:
            if self.adapter is not None:
                shape = adapter_conditioning(self.adapter).whisper
            elif hasattr(self, "model"):
                shape = self.family.extensions.of(self.model).whisper
        self.rendering, found = stores.find_features(self.store, self.rendering, named=named, shape=shape)
        return found

    # Prompt, loss, adapter, generation

    def _some_rows(self) -> list[Row]:
        """Rows of the store, or built-in ones where there are none."""
        if self.rows and "rows" not in self.absent:
            return [self._readable(row) for row in self.rows]
        return [prompt.built_in_row(self.spec.num_codebooks, self.spec.codes, seed=seed) for seed in (0, 1)]

    def _readable(self, row: Row) -> Row:
        return row if self.rendering.features is not None else stores.read_by_codes(row)

    def _look_at_prompt(self) -> list[Finding]:
        row = self._some_rows()[0]
        if self.store is not None and "rows" not in self.absent:
            row = self._readable(self.store[0])
        found = prompt.check_same_prompt(self.prompter, row, self.family.checks, self.rendering)
        self._if_failed(found, "prompt", "prompts differ between training and speaking")
        found += prompt.check_tokens(self.prompter.tokenizer, self.family.checks)
        return found + prompt.check_chat_template(self.prompter.tokenizer, row, self.family.checks)

    def _look_at_loss(self) -> list[Finding]:
        rows = [stores.read_by_codes(row) for row in self.rows]
        plain = Rendering(reference=self.rendering.reference)  # the base alone does not use Whisper
        return loss.check_loss(self.model, self.prompter, rows, plain)

    def _look_at_adapter_files(self) -> list[Finding]:
        assert self.adapter is not None
        found = adapters.check_files(self.adapter)
        return self._if_failed(found, "adapter files", "the adapter's files are broken")

    def _compare_base(self) -> list[Finding]:
        assert self.adapter is not None
        found = adapters.check_trained_on(self.model, self.adapter)
        self._if_failed(found, "adapter's base", "the adapter was trained on another base")
        return found + adapters.check_plain_peft(self.model, self.adapter)

    def _apply_adapter(self) -> list[Finding]:
        assert self.adapter is not None
        self.peft_model = load_adapter(self.model, self.adapter)
        found = [adapters.check_applied(self.peft_model, self.adapter)]
        if "tokenizer" in self.absent:
            return found
        rows = prompt.two_unequal(self._some_rows())
        targets: Any = self.family.info.text_targets[0]
        batch = generation.collate(
            self.model, [prompt.as_trained(self.prompter, row, self.rendering, targets) for row in rows]
        )
        return found + adapters.check_effect(self.peft_model, batch, adapter_card(self.adapter))

    def _generate(self) -> list[Finding]:
        model, what = (self.model, "base") if self.peft_model is None else (self.peft_model, "base with adapter")
        return generation.check_generation(model, self.prompter, self._some_rows(), what, self.rendering)

    def _compare_memory(self) -> list[Finding]:
        dtype = choose_dtype(self.names.base.dtype, self.device)
        attention = self.family.extensions.written(self.folder).audio_attention
        if self.adapter is not None:
            attention |= adapter_conditioning(self.adapter).audio_attention
        if self.recipe is None:
            file = None if self.adapter is None else self.adapter / ADAPTER_WEIGHTS
            size = file.stat().st_size if file is not None and file.exists() else 0
            plan = memory.speaking_plan(self.family, self.config, dtype, size, audio_attention=attention)
        else:
            if self.store is None:
                return [Finding("memory", "skipped", "without data there is no training to plan")]
            changes = {"checkpoint": str(self.folder), "dtype": self.names.base.dtype}
            settings = self.recipe.model.model_copy(update=changes)
            data = self.recipe.data.model_copy(update={"store": str(self.store.folder)})
            changed = self.recipe.model_copy(update={"model": settings, "data": data})
            plan = memory.training_plan(changed, self.device)
        free = memory.free_memory(self.device)
        if plan.weights > free:
            self.absent["enough memory"] = "the weights do not fit in the memory that is free"
        return [memory.check_memory(plan, free, device=str(self.device))]
