"""Check order of `doctor`; a check is skipped when its prerequisite failed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from higgstune.batch.dataset import PLAIN, Rendering
from higgstune.codec import Codec, brings_codec, checkpoint_codec, load_codec
from higgstune.config.recipe import Recipe, load_recipe
from higgstune.config.trackers import ADVICE, missing_trackers
from higgstune.data.store import CodeStore, Row
from higgstune.diagnostics import adapter as adapters
from higgstune.diagnostics import checkpoint as checkpoints
from higgstune.diagnostics import codec as codecs
from higgstune.diagnostics import data as stores
from higgstune.diagnostics import generation, golden, loss, prompt
from higgstune.diagnostics import machine as memory
from higgstune.diagnostics.machine import check_environment
from higgstune.diagnostics.report import Finding, Report, sorted_report
from higgstune.environment import INSTALL, choose_device, choose_dtype
from higgstune.errors import CheckpointError, ConfigError, HiggstuneError
from higgstune.families import check_store_family, family_in, load_family, read_layout
from higgstune.families.base import Family, GoldenCheck, Layout, Prompter, Spec
from higgstune.hub import fetch
from higgstune.inputs import BaseSpec, find_adapter
from higgstune.model.adapter_folder import (
    ADAPTER_WEIGHTS,
    adapter_card,
    adapter_conditioning,
    check_adapter_family,
    recorded_base,
)
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model, load_tokenizer
from higgstune.peft_compat import PeftModel


@dataclass
class Names:
    """Folders and hub ids to examine; None if unknown so far."""

    base: BaseSpec
    adapter: str | None
    data: str | None
    recipe: str | None

    @property
    def any(self) -> bool:
        """Whether there is more to examine than the machine."""
        named = (self.base.checkpoint, self.adapter, self.data, self.base.codec, self.recipe)
        return any(name is not None for name in named)

    def take_from_recipe(self, recipe: Recipe) -> None:
        """Fill in the recipe's base, codec, store and initial adapter, and the base's dtype.

        Also its quantization: memory is checked with it, and on a small GPU the base may not fit otherwise.
        """
        model = recipe.model
        filled = self.base.filled(model.checkpoint, model.revision, model.codec)
        self.base = replace(filled, dtype=filled.dtype or model.dtype, quantize=filled.quantize or model.quantize)
        self.data = self.data or recipe.data.store
        self.adapter = self.adapter or recipe.init_adapter

    def take_from_store(self, store: CodeStore) -> None:
        """Fill in the checkpoint that a store was prepared for or, if unknown, the store's codec."""
        self.base = self.base.filled(store.info.settings.get("model"))
        if self.base.checkpoint is None:
            self.base = self.base.filled(codec=store.info.codec)


Progress = Callable[[str], None]
# Damaged files and incompatible libraries raise these within a check. They become findings, not tracebacks.
_CHECK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(ImportError, SafetensorError, TemplateError),
)
_ADVICE = {
    "recipe": "correct it; `higgstune recipe` writes an example",
    "checkpoint": "name a folder or a hub id with --model; if it is damaged, copy or download it again",
    "codec": "name the checkpoint's codec with --codec; if it is damaged, copy or download it again",
    "data": "name a store of `higgstune prepare` with --data; if it is damaged, prepare it again",
    "adapter": "name the folder of an adapter or a run; if it is damaged, copy it again",
}
_REPORT_IT = "read the message; if installation and files are intact, report it as a bug of Higgstune"


def doctor(
    base: BaseSpec = BaseSpec(),
    *,
    adapter: str | Path | None = None,
    data: str | Path | None = None,
    recipe: str | Path | None = None,
    golden_values: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Examine the machine and whatever is named, without changing anything.

        doctor(adapter="runs/voice", data="data/voice").passed

    A recipe and an adapter name their own base, codec and data, which these arguments override. `golden_values` is
    a folder of what reference code computed with a checkpoint in it, which is compared with this installation.
    `progress` is called with the name of each check before it starts. Faults are findings of the report. Raises
    ConfigError for an unknown device or dtype.
    """
    choose_dtype(base.dtype, choose_device(base.device))
    names = Names(base, *(None if name is None else str(name) for name in (adapter, data, recipe)))
    examination = _Examination(names, progress or (lambda _: None))
    examination.run()
    if golden_values is not None:
        examination.compare(Path(golden_values))
    return sorted_report(examination.findings)


@dataclass
class _Examination:
    """The state of one call of `doctor`: objects that were loaded, and in `unavailable` why others were not."""

    names: Names
    show: Progress
    findings: list[Finding] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    rendering: Rendering = PLAIN
    recipe: Recipe | None = None
    adapter: Path | None = None
    store: CodeStore | None = None
    rows: list[Row] = field(default_factory=list)
    peft_model: PeftModel | None = None

    # Set by the checks that load them. A check that requires one is skipped without it.
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
        """Run all checks, each after those that it depends on."""
        self._run("environment", (), check_environment)
        if not self.names.any:
            return
        self._resolve_names()
        self._run("checkpoint", ("model name",), self._read_config, provides="config")
        self._run("checkpoint", ("config",), self._check_files, provides="tensors")
        self._run("checkpoint", ("config", "ids"), self._read_tokenizer, provides="tokenizer")
        self._run("memory", ("config",), self._check_memory)
        self._run("checkpoint", ("tensors", "enough memory"), self._load_model, provides="model")
        self._run("rotary", ("model",), self._check_rotary, provides="rotary")
        self._run("codec", (), self._check_codec, provides="codec")
        self._run("codec", ("codec",), self._check_revisions, provides="the store's codec")
        self._run("data", ("data",), self._check_store, provides="rows")
        self._run("data", ("data", "rows"), self._open_features)
        self._run("prompt", ("tokenizer",), self._check_prompt, provides="prompt")
        sound = ("data", "model", "finite weights", "rotary", "tokenizer", "rows", "codec", "the store's codec")
        self._run("loss", sound, self._check_loss)
        self._run("adapter", ("adapter",), self._check_adapter_files, provides="adapter files")
        self._run("adapter", ("adapter", "model", "finite weights", "ids"), self._check_base, provides="adapter's base")
        needed = ("adapter", "adapter files", "adapter's base", "model", "finite weights")
        self._run("adapter", needed, self._apply_adapter)
        self._run("generation", ("model", "finite weights", "tokenizer", "prompt"), self._generate)

    def compare(self, folder: Path) -> None:
        """Compare this installation with golden values, one finding a check."""
        checks: list[GoldenCheck] = []

        def find() -> list[Finding]:
            checks.extend(golden.checks_in(folder))
            return []

        self._run("golden", (), find)
        for check in checks:
            self._run("golden", (), partial(golden.compare, check))

    def _run(
        self, check: str, requires: tuple[str, ...], work: Callable[[], list[Finding]], *, provides: str | None = None
    ) -> None:
        """Run one check. After an error, which becomes a finding, what it `provides` is unavailable to later checks."""
        lacking = [self.unavailable[name] for name in requires if name in self.unavailable]
        if lacking:
            self._skip(check, lacking[0], provides)
            return
        self.show(check if provides is None else f"{check}, {provides}")
        try:
            self.findings += work()
            return
        except HiggstuneError as error:
            self.findings.append(Finding(check, "failed", str(error), _ADVICE.get(check, _REPORT_IT)))
        except _CHECK_ERRORS as error:
            text = f"the check crashed: {type(error).__name__}: {error}"
            advice = INSTALL if isinstance(error, ImportError) else _REPORT_IT
            self.findings.append(Finding(check, "failed", text, advice))
        if provides is not None:
            self.unavailable[provides] = f"the check of the {check} failed"

    def _skip(self, check: str, reason: str, provides: str | None) -> None:
        if provides is not None:
            self.unavailable.setdefault(provides, reason)
        messages = [f.message for f in self.findings if f.check == check and f.status in ("failed", "skipped")]
        if not messages:
            self.findings.append(Finding(check, "skipped", reason))

    def _block_if_failed(self, found: list[Finding], thing: str, reason: str) -> list[Finding]:
        """Return the findings; if one of them failed, `thing` is unavailable to later checks."""
        if any(finding.status == "failed" for finding in found):
            self.unavailable[thing] = reason
        return found

    # Names

    def _read_recipe(self) -> list[Finding]:
        assert self.names.recipe is not None
        recipe = load_recipe(self.names.recipe)
        self.recipe = recipe
        self.names.take_from_recipe(recipe)
        self.rendering = Rendering(reference=recipe.data.reference)
        stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in recipe.stages)
        found = [Finding("recipe", "ok", f"{self.names.recipe}: {stages}")]
        found += [Finding("recipe", "failed", problem, ADVICE) for problem in missing_trackers(recipe.report_to)]
        if self.names.base.device is None:
            try:
                choose_device(recipe.model.device)
                self.names.base = replace(self.names.base, device=recipe.model.device)
            except ConfigError as error:
                advice = "train on a machine with this device; the other checks use the available one"
                found.append(Finding("recipe", "failed", f"model.device: {error}", advice))
        return found

    def _read_card(self) -> list[Finding]:
        assert self.names.adapter is not None
        folder = find_adapter(self.names.adapter)
        try:
            card = adapter_card(folder)
            adapter_conditioning(folder)
        except CheckpointError:
            self._take_base(folder, {})  # the rest can still be examined
            raise
        self._take_base(folder, card)
        self.adapter = folder
        if self.recipe is None:
            self.rendering = Rendering(reference=card.get("recipe", {}).get("data", {}).get("reference", "turn"))
        return adapters.check_card(folder)

    def _take_base(self, folder: Path, card: Mapping[str, Any]) -> None:
        try:
            self.names.base = recorded_base(self.names.base, folder, card)
        except CheckpointError as error:
            self.findings.append(Finding("adapter", "failed", str(error), _ADVICE["checkpoint"]))

    def _open_store(self) -> list[Finding]:
        assert self.names.data is not None
        self.store = CodeStore.open(self.names.data)
        self.rows = stores.first_rows(self.store)
        return []

    def _resolve_names(self) -> None:
        """Read recipe, adapter and store, and the names in them."""
        names = self.names
        if names.recipe is not None:
            self._run("recipe", (), self._read_recipe)
        self.device = choose_device(names.base.device)
        if names.adapter is None:
            self.unavailable["adapter"] = "no adapter was named with --adapter"
        else:
            self._run("adapter", (), self._read_card, provides="adapter")
        if names.data is None:
            self.unavailable["data"] = "no store was named with --data"
        else:
            self._run("data", (), self._open_store, provides="data")
        if self.store is not None:
            names.take_from_store(self.store)
        if names.base.checkpoint is None:
            self.unavailable["model name"] = "no checkpoint was named with --model, by an adapter, a recipe or a store"

    # The checkpoint

    def _read_config(self) -> list[Finding]:
        base = self.names.base
        assert base.checkpoint is not None
        self.folder = fetch(base.checkpoint, what="checkpoint", revision=base.revision)
        info = family_in(self.folder)[0]
        if self.adapter is not None:
            check_adapter_family(self.adapter, info)
        if self.store is not None:
            check_store_family(self.store.folder, self.store.info.model_type, info, self.folder)
        self.family = load_family(info)
        self.config = self.family.read_config(self.folder)
        self.spec = self.family.spec(self.config)
        return self._block_if_failed(
            checkpoints.check_config(self.family, self.config), "ids", "the ids in config.json are inconsistent"
        )

    def _check_files(self) -> list[Finding]:
        self.layout = read_layout(self.folder)
        found = checkpoints.check_tensors(self.layout, self.family, self.config)
        found += checkpoints.check_recorded_checksums(self.folder)
        return self._block_if_failed(found, "tensors", "the checkpoint's files are damaged or do not match its config")

    def _read_tokenizer(self) -> list[Finding]:
        tokenizer = load_tokenizer(self.folder, self.family, self.config)
        self.prompter = self.family.prompter(tokenizer, self.config)
        return [Finding("checkpoint", "ok", f"the tokenizer has {len(tokenizer)} tokens and matches the config")]

    def _load_model(self) -> list[Finding]:
        base = self.names.base
        self.model = load_model(self.folder, dtype=base.dtype, device=self.device, quantize=base.quantize)
        found = checkpoints.check_weights(self.model)
        return self._block_if_failed(found, "finite weights", "the checkpoint's weights are damaged")

    def _check_rotary(self) -> list[Finding]:
        found = checkpoints.check_stored_rotary(self.layout, self.family, self.config) + checkpoints.check_rotary(
            self.model
        )
        return self._block_if_failed(found, "rotary", "the rotary buffers are wrong")

    # Codec and data

    def _check_codec(self) -> list[Finding]:
        has_codec = hasattr(self, "folder") and brings_codec(self.folder)
        if self.names.base.codec is None and "config" in self.unavailable and not has_codec:
            self.unavailable["codec"] = "no codec was named with --codec, and there is no checkpoint with one"
            return [Finding("codec", "skipped", self.unavailable["codec"])]
        # by the checkpoint's folder, which has been fetched
        base = self.names.base
        name = base.codec if base.codec is not None else checkpoint_codec(self.folder)
        self.codec = load_codec(name, device=str(self.device))
        found = codecs.check_modes(self.codec, getattr(self, "model", None)) + codecs.check_codes(self.codec)
        return found if "config" in self.unavailable else found + codecs.check_fit(self.codec, self.spec)

    def _check_revisions(self) -> list[Finding]:
        found = []
        if self.store is not None:
            advice = "prepare the data again with this codec, or name the store's codec with --codec"
            what = f"the store {self.store.folder}"
            found += codecs.check_revision(self.codec, self.store.info.codec_revision, what, advice)
            self._block_if_failed(found, "the store's codec", "the store was made with another codec")
        if self.adapter is not None and (card := adapter_card(self.adapter)):
            advice = "name the codec that the adapter was trained with, using --codec"
            found += codecs.check_revision(
                self.codec, card.get("codec_revision"), f"the adapter {self.adapter}", advice
            )
        return found

    def _check_store(self) -> list[Finding]:
        assert self.store is not None
        spec = None if "config" in self.unavailable else self.spec
        found = stores.check_store(self.store, self.rows, spec)
        return self._block_if_failed(found, "rows", "the store's rows cannot be used")

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

    def _example_rows(self) -> list[Row]:
        """Rows of the store or, without any, built-in ones."""
        if self.rows and "rows" not in self.unavailable:
            return [self._without_features(row) for row in self.rows]
        return [prompt.built_in_row(self.spec.num_codebooks, self.spec.codes, seed=seed) for seed in (0, 1)]

    def _without_features(self, row: Row) -> Row:
        return row if self.rendering.features is not None else stores.read_by_codes(row)

    def _check_prompt(self) -> list[Finding]:
        row = self._example_rows()[0]
        if self.store is not None and "rows" not in self.unavailable:
            row = self._without_features(self.store[0])
        found = prompt.check_same_prompt(self.prompter, row, self.family.checks, self.rendering, self.family.info.texts)
        self._block_if_failed(found, "prompt", "prompts differ between training and speaking")
        found += prompt.check_tokens(self.prompter.tokenizer, self.family.checks)
        return found + prompt.check_chat_template(self.prompter.tokenizer, row, self.family.checks)

    def _check_loss(self) -> list[Finding]:
        rows = [stores.read_by_codes(row) for row in self.rows]
        plain = Rendering(reference=self.rendering.reference)  # the base alone does not use Whisper
        return loss.check_loss(self.model, self.prompter, rows, plain)

    def _check_adapter_files(self) -> list[Finding]:
        assert self.adapter is not None
        found = adapters.check_files(self.adapter)
        return self._block_if_failed(found, "adapter files", "the adapter's files are damaged")

    def _check_base(self) -> list[Finding]:
        assert self.adapter is not None
        readable = None if "tokenizer" in self.unavailable else self.folder
        found = adapters.check_trained_on(self.model, self.adapter, readable)
        found += adapters.check_merged(self.adapter, self.folder)
        return self._block_if_failed(found, "adapter's base", "the adapter was trained on another base")

    def _apply_adapter(self) -> list[Finding]:
        assert self.adapter is not None
        dropped = adapters.check_plain_peft(self.model, self.adapter)  # advice that helps where it can be loaded
        try:
            self.peft_model = load_adapter(self.model, self.adapter)
        except CheckpointError as error:
            return [Finding("adapter", "failed", str(error), adapters.UNFIT)]
        found = [adapters.check_applied(self.peft_model, self.adapter), *dropped]
        if "tokenizer" in self.unavailable:
            return found
        rows = prompt.two_unequal(self._example_rows())
        targets: Any = self.family.info.text_targets[0]
        batch = generation.collate(
            self.model, [prompt.as_trained(self.prompter, row, self.rendering, targets) for row in rows]
        )
        return found + adapters.check_effect(self.peft_model, batch, adapter_card(self.adapter))

    def _generate(self) -> list[Finding]:
        model, what = (self.model, "base") if self.peft_model is None else (self.peft_model, "base with adapter")
        return generation.check_generation(model, self.prompter, self._example_rows(), what, self.rendering)

    def _check_memory(self) -> list[Finding]:
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
                return [Finding("memory", "skipped", "planning needs data: name a store with --data")]
            changes = {"checkpoint": str(self.folder), "dtype": self.names.base.dtype}
            if self.names.base.quantize is not None:
                changes["quantize"] = self.names.base.quantize
            settings = self.recipe.model.model_copy(update=changes)
            data = self.recipe.data.model_copy(update={"store": str(self.store.folder)})
            changed = self.recipe.model_copy(update={"model": settings, "data": data})
            plan = memory.training_plan(changed, self.device)
        free = memory.free_memory(self.device)
        if plan.weights > free:
            self.unavailable["enough memory"] = "the weights do not fit in the free memory"
        return [memory.check_memory(plan, free, device=str(self.device))]
