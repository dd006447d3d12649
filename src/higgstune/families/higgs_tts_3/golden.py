"""What public implementations of Higgs TTS 3 computed, in a folder, against what is installed here.

The folder has a checkpoint in the released layout, of any size, and values: prompts.json, sampler.json,
export_keys.json, and delay_and_labels, forward, generation, lora and codec as safetensors. All in float32 on a CPU.
"""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from higgstune.checkpoint_files import SAFETENSORS, read_json
from higgstune.codec import load_codec
from higgstune.codec.base import encode_reference
from higgstune.errors import CheckpointError, DataError
from higgstune.families import read_layout
from higgstune.families.base import Batching, Example, GoldenCheck, Layout, Spec
from higgstune.families.higgs_tts_3.checkpoint import (
    HEADS,
    PROJECTIONS,
    build,
    load,
    plain_name,
    read_config,
    spec_of,
    stored_name,
)
from higgstune.families.higgs_tts_3.decoder import Decoder
from higgstune.families.higgs_tts_3.delay import Labelled, delay, labels_of, undelay
from higgstune.families.higgs_tts_3.model import HiggsTTS3, HiggsTTS3Config
from higgstune.families.higgs_tts_3.packed import with_training_forward
from higgstune.families.higgs_tts_3.prompter import Prompter, Turn
from higgstune.families.higgs_tts_3.sampler import RowSampler
from higgstune.families.sampling import Sampling
from higgstune.kernels import IGNORE
from higgstune.peft_compat import (
    LoraConfig,
    LoraLayer,
    PeftModel,
    get_peft_model,
    plain_layers,
    set_peft_model_state_dict,
)

_LOGITS, _LOSS = 1e-5, 1e-4
_LABELLED: tuple[Labelled, ...] = ("codes", "codes_and_stop", "codes_and_eoc")
_GREEDY, _ENDLESS = Sampling(temperature=0), 4096  # frames


class Golden:
    """A folder of golden values, and what is loaded of it; each check returns the largest difference."""

    def __init__(self, folder: Path, layout: Layout, tokenizer: Any, batching: Batching) -> None:
        self.folder = folder
        self.layout = layout
        self.config = read_config(layout.folder)
        self.spec: Spec = spec_of(self.config)
        self.prompter = Prompter(tokenizer, self.config.num_codebooks, self.config.boc_id)
        self.batching = batching

    def checks(self) -> Iterator[GoldenCheck]:
        """The checks, in the order of what they build upon."""
        yield self._check("prompts", 0, self.prompts)
        yield self._check("delay and labels", 0, self.delays)
        yield self._check("loading", 0, self.loading)
        yield self._check("refusals", 0, self.refusals)
        yield self._check("embeddings", 0, self.embeddings)
        yield self._check("hidden states", _LOGITS, self.hidden_states)
        yield self._check("logits", _LOGITS, self.logits)
        yield self._check("log-probabilities", _LOSS, self.log_probabilities)
        yield self._check("losses by codebook", _LOSS, self.losses)
        yield self._check("text loss", _LOSS, self.text_loss)
        yield self._check("padded as single", _LOGITS, self.padded)
        yield self._check("packed as single", _LOSS, self.packed)
        yield self._check("greedy generation", 0, self.generation)
        yield self._check("sampler", 0, self.sampler)
        yield self._check("all turns in one sequence", _LOSS, self.all_turns)
        yield self._check("adapter", _LOGITS, self.adapter)
        yield self._check("merged adapter", _LOGITS, self.merged_adapter)
        yield self._check("merged tensors", 0, self.merged_tensors)
        yield self._check("names of the release", 0, self.released_names)
        yield self._check("codes of the codec", 0, self.codes)
        yield self._check("sound of the codec", _LOGITS, self.sound)

    def _check(self, name: str, tolerance: float, work: Callable[[], float]) -> GoldenCheck:
        return GoldenCheck(name, tolerance, work)

    # Files

    def values(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises CheckpointError where it is missing."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the folder needs it")
        return load_file(path)

    @cached_property
    def forward(self) -> dict[str, Tensor]:
        """Of forward.safetensors."""
        return self.values("forward")

    @cached_property
    def cases(self) -> dict[str, Any]:
        """Texts and frames of the cases, by name."""
        with safe_open(self.folder / "forward.safetensors", "pt") as file:
            return cast(dict[str, Any], json.loads((file.metadata() or {})["cases"]))

    @cached_property
    def model(self) -> HiggsTTS3:
        """The checkpoint in float32; its forward takes packs."""
        model: HiggsTTS3 = with_training_forward(load(self.layout, self.config, torch.float32)[0].eval())
        return model

    def turns(self, name: str) -> tuple[list[Turn], Turn | None]:
        """The turns of a case, the last of them with its codes, and its reference."""
        case, rows = self.cases[name], self.forward[f"{name}.slot_rows"].numpy()
        frames = [case["reference_frames"] or None, *(part["frames"] for part in case["history"])]
        clips, start = [], 0
        for count in (count for count in frames if count is not None):
            end = start + count + self.spec.extra_rows
            clips.append(undelay(rows[start:end]))
            start = end
        reference = Turn(case["reference_text"] or "", clips.pop(0)) if case["reference_frames"] else None
        turns = [Turn(part["text"], codes) for part, codes in zip(case["history"], clips, strict=True)]
        return [*turns, Turn(case["text"], self.forward[f"{name}.codes"].numpy(), is_target=True)], reference

    def example(self, name: str, entries: Labelled = "codes_and_eoc", *, text: bool = False) -> Example:
        """A case as a training example."""
        turns, reference = self.turns(name)
        example = self.prompter.build(turns, reference, text_targets="transcript" if text else "none")
        labels = example.audio_labels.copy()
        rows = len(turns[-1].codes) + self.spec.extra_rows  # type: ignore[arg-type]
        labels[-rows:] = labels_of(example.audio_input_ids[-rows:], entries)
        return replace(example, audio_labels=labels)

    def prompt(self, name: str) -> Example:
        """The prompt of a case."""
        turns, reference = self.turns(name)
        return self.prompter.build([*turns[:-1], Turn(turns[-1].text)], reference)

    @torch.no_grad()
    def embedded(self, name: str) -> Tensor:
        """Prompt and rows of a case but the last one, [P + T + 6, D]."""
        batch = self.batching.pad([self.example(name)])
        return self.model.embed_padded(batch)[0, :-1]

    @torch.no_grad()
    def hidden(self, name: str, model: Any = None) -> Tensor:
        """Hidden states that predict the rows of a case, [T + 7, D]."""
        inputs = self.embedded(name)
        states: Tensor = (model or self.model).model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state
        return states[0, len(self.forward[f"{name}.prompt_ids"]) - 1 :]

    def row_logits(self, name: str) -> Tensor:
        """[T + 7, K, V]."""
        return self.model.audio_logits(self.hidden(name)).detach().unflatten(-1, (-1, self.spec.classes))

    @torch.no_grad()
    def sums(self, examples: list[Example]) -> dict[str, Tensor]:
        """Sums of losses of a pack."""
        return cast(dict[str, Tensor], self.model(**self.batching.pack(examples)))

    # Checks

    def prompts(self) -> float:
        """Item 1: the number of prompts with another id."""
        wrong = 0
        for case in read_json(self.folder / "prompts.json", "the folder needs it")["cases"]:
            turns = [Turn(part["text"], self._blank(part["rows"])) for part in case["history"]]
            blank = case["reference_rows"]
            reference = Turn(case["reference_text"] or "", self._blank(blank)) if blank else None
            found = self.prompter.build([*turns, Turn(case["text"])], reference)
            wrong += found.input_ids.tolist() != case["ids"]
        return wrong

    def _blank(self, rows: int) -> np.ndarray:
        return np.zeros((rows - self.spec.extra_rows, self.spec.num_codebooks), dtype=np.int64)

    def delays(self) -> float:
        """Item 2: rows, codes and labels of three masks; the number of entries that differ."""
        values, wrong = self.values("delay_and_labels"), 0
        for name in {key.partition(".")[0] for key in values}:
            codes, rows = values[f"{name}.codes"].numpy(), values[f"{name}.rows"].numpy()
            wrong += _unequal(delay(codes, boc_id=self.config.boc_id), rows) + _unequal(undelay(rows), codes)
            wrong += sum(
                _unequal(labels_of(rows, entries), values[f"{name}.labels.{entries}"].numpy()) for entries in _LABELLED
            )
        return wrong

    def loading(self) -> float:
        """Item 3: the model's tensors are those of the files, and a head is a copy of its embedding."""
        found = {stored_name(key): value for key, value in self.model.state_dict().items()}
        gap = 0.0
        for file in self.layout.weights:
            for key, value in load_file(file).items():
                ours = found.get(HEADS.get(key, key))
                if ours is not None:
                    gap = max(gap, _gap(ours, value.float()))
        return gap

    def refusals(self) -> float:
        """Item 3: the number of broken copies of the checkpoint that load all the same."""
        state = {key: value for file in self.layout.weights for key, value in load_file(file).items()}
        [embedding, table] = HEADS.values()
        head = dict(zip(HEADS.values(), HEADS, strict=True))
        broken: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
            (state | {head[table]: state[table] + 1}, {}),
            (state | {head[embedding]: state[embedding] + 1}, {}),
            (state | {"body.layers.0.extra.weight": state[table]}, {}),
            ({key: value for key, value in state.items() if key != "body.norm.weight"}, {}),
            (state, {"text_config": {"rope_parameters": {"rope_theta": 10_000, "rope_type": "default"}}}),
            (state, {"audio_encoder_config": {"tie_word_embeddings": False}}),
            (state, {"audio_encoder_config": {"encoder_type": "whisper"}}),
        ]
        return sum(self._loads(weights, changes) for weights, changes in broken)

    def _loads(self, weights: dict[str, Tensor], changes: dict[str, Any]) -> bool:
        written = {**self.layout.config}
        for section, values in changes.items():
            written[section] = {**written[section], **values}
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "config.json").write_text(json.dumps(written), encoding="utf-8")
            save_file({key: value.clone() for key, value in weights.items()}, Path(place) / SAFETENSORS)
            try:
                load(read_layout(Path(place)), read_config(Path(place)), torch.float32)
            except CheckpointError:
                return False
        return True

    def embeddings(self) -> float:
        """Item 4: of all inputs, after ids, rows and labels, which must be equal."""
        for name in self.cases:
            example, prompt = self.example(name), self.prompt(name)
            pairs = (
                (prompt.input_ids, "prompt_ids"), (prompt.audio_input_ids, "slot_rows"),
                (example.audio_input_ids[len(prompt.audio_input_ids) :], "rows"),
                (example.audio_labels[len(prompt.audio_labels) :], "labels"),
            )  # fmt: skip
            for ours, theirs in pairs:
                if _unequal(ours, self.forward[f"{name}.{theirs}"].numpy()):
                    raise DataError(f"{theirs} of the case {name} are others")
        return max(_gap(self.embedded(name), self.forward[f"{name}.inputs_embeds"]) for name in self.cases)

    def hidden_states(self) -> float:
        """Item 4: after the final norm."""
        return max(_gap(self.hidden(name), self.forward[f"{name}.hidden"]) for name in self.cases)

    def logits(self) -> float:
        """Item 4: of audio, and of text where the folder has any."""
        stored = [name for name in self.cases if f"{name}.logits" in self.forward]
        return max((_gap(self.row_logits(name), self.forward[f"{name}.logits"]) for name in stored), default=0.0)

    def log_probabilities(self) -> float:
        """Item 4: of each row's own entries."""
        gaps = []
        for name in self.cases:
            scores = self.row_logits(name).double().log_softmax(-1)
            rows = self.forward[f"{name}.rows"]
            gaps.append(_gap(scores.gather(-1, rows[..., None])[..., 0], self.forward[f"{name}.logprobs"]))
        return max(gaps)

    def losses(self) -> float:
        """Item 4: sums by codebook for three masks, per label; counts must be equal."""
        return max(
            self._loss_gap([self.example(name, entries)], f"{name}.", f".{entries}")
            for name in self.cases
            for entries in _LABELLED
        )

    def _loss_gap(self, examples: list[Example], before: str, after: str) -> float:
        counts = sum((example.audio_labels != IGNORE).sum(0) for example in examples)
        expected = self.forward[f"{before}label_count{after}"]
        if _unequal(np.asarray(counts), expected.numpy()):
            raise DataError(f"the labels of {before}{after.removeprefix('.')} are others than in the folder")
        gap = (self.sums(examples)["audio_loss"].double() - self.forward[f"{before}loss_sum{after}"]).abs()
        return float((gap / expected.clamp(min=1)).max())

    def text_loss(self) -> float:
        """Item 4: of the text and the closing `<|audio|>`, per label."""
        gaps = [0.0]
        for name in (name for name in self.cases if f"{name}.text_loss_sum" in self.forward):
            example, count = self.example(name, text=True), self.forward[f"{name}.text_label_count"]
            if int((example.text_labels != IGNORE).sum()) != int(count):
                raise DataError(f"the text of the case {name} has another number of labels")
            found = self.sums([example])["text_loss"].double()
            gaps.append(float((found - self.forward[f"{name}.text_loss_sum"]).abs() / count))
        return max(gaps)

    @torch.no_grad()
    def padded(self) -> float:
        """Item 4: logits of all cases in one padded batch against those of each alone."""
        examples = [self.example(name) for name in self.cases]
        batch = self.batching.pad(examples)
        states = self.model.model(
            inputs_embeds=self.model.embed_padded(batch), attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        found = self.model.audio_logits(states.flatten(0, 1)[batch["audio_positions"]])
        return _gap(found, torch.cat([self.row_logits(name).flatten(1) for name in self.cases]))

    def packed(self) -> float:
        """Item 4: losses of all cases in one pack."""
        return max(
            self._loss_gap([self.example(name, entries) for name in self.cases], "batch.", f".{entries}")
            for entries in _LABELLED
        )

    @torch.no_grad()
    def generation(self) -> float:
        """Item 5: greedy rows, countdown and codes, of each case alone and of all in a batch."""
        values, wrong = self.values("generation"), 0
        for names in (*([name] for name in self.cases), list(self.cases)):
            sampler = self._sampler(len(names))
            countdowns: list[list[int]] = [[] for _ in names]
            decoder = Decoder(self.model, [self.prompt(name) for name in names])
            logits, steps = decoder.logits, max(len(values[f"{name}.rows"]) for name in names)
            for _ in range(steps):
                assert logits is not None
                ended = sampler.finished.tolist()
                rows = sampler.step(logits)
                for slot, countdown in enumerate(countdowns):
                    if not ended[slot]:
                        countdown.append(int(sampler.countdown[slot]))
                logits = decoder.step(rows)
            for slot, name in enumerate(names):
                wrong += _unequal(sampler.rows_of(slot), values[f"{name}.rows"].numpy())
                wrong += _unequal(np.array(countdowns[slot]), values[f"{name}.countdown"].numpy())
                wrong += _unequal(sampler.codes(slot), values[f"{name}.codes"].numpy())
        return wrong

    def sampler(self) -> float:
        """Item 6: scripts of logits under the rule of sglang-omni."""
        wrong = 0
        for script in read_json(self.folder / "sampler.json", "the folder needs it")["scripts"]:
            expected = script["sglang"]
            sampler, countdown = self._sampler(1), []
            for first, second in zip(script["first_choice"], script["second_choice"], strict=True):
                if sampler.finished[0]:
                    break
                logits = torch.zeros(self.spec.num_codebooks, self.spec.classes)
                logits.scatter_(1, torch.tensor(second)[:, None], 5.0).scatter_(1, torch.tensor(first)[:, None], 10.0)
                sampler.step(logits[None])
                countdown.append(int(sampler.countdown[0]))
            rows = sampler.rows_of(0)
            wrong += rows.tolist() != expected["rows"] or countdown != expected["countdown"]
            wrong += bool(sampler.finished[0]) != expected["stopped"]
            wrong += undelay(rows).tolist() != expected["codes"]
        return wrong

    def _sampler(self, clips: int) -> RowSampler:
        sampler = RowSampler(self.spec, clips)
        for slot in range(clips):
            sampler.admit(slot, _GREEDY, max_frames=_ENDLESS, seed=0)
        return sampler

    def all_turns(self) -> float:
        """Item 7: every piece of a case with earlier pieces supervised in one sequence."""
        if "all_turns.ids" not in self.forward:
            return 0.0
        names = [name for name, case in self.cases.items() if case["history"]]
        name = "multi_turn" if "multi_turn" in names else names[0]
        turns, reference = self.turns(name)
        example = self.prompter.build([replace(turn, is_target=True) for turn in turns], reference)
        labels = np.full((len(example), self.spec.num_codebooks), IGNORE)
        labels[np.flatnonzero(example.audio_mask) - 1] = example.audio_labels
        expected = (example.input_ids, "ids"), (example.audio_input_ids, "slot_rows"), (labels, "labels")
        if any(_unequal(ours, self.forward[f"all_turns.{key}"].numpy()) for ours, key in expected):
            raise DataError("ids, rows or labels of all_turns are others")
        return self._loss_gap([example], "all_turns.", "")

    # Adapter

    @cached_property
    def lora(self) -> dict[str, Tensor]:
        """Of lora.safetensors."""
        return self.values("lora")

    @cached_property
    def _lora_settings(self) -> dict[str, str]:
        with safe_open(self.folder / "lora.safetensors", "pt") as file:
            return dict(file.metadata() or {})

    @cached_property
    def adapted(self) -> PeftModel:
        """A copy of the model with the folder's adapter. Raises CheckpointError where a tensor finds no place."""
        settings = LoraConfig(
            r=int(self._lora_settings["r"]),
            lora_alpha=int(self._lora_settings["lora_alpha"]),
            target_modules=PROJECTIONS,
        )
        weights = {k.removeprefix("adapter."): v for k, v in self.lora.items() if k.startswith("adapter.")}
        with warnings.catch_warnings(), plain_layers():
            # peft 0.21 reads a deprecated attribute of transformers 5.23
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(load(self.layout, self.config, torch.float32)[0], settings)
        assert isinstance(model, PeftModel)
        odd: Any = set_peft_model_state_dict(model, weights)
        adapted = sum(isinstance(part, LoraLayer) for part in model.modules())
        if odd.unexpected_keys or 2 * adapted != len(weights):
            raise CheckpointError(f"{len(weights)} tensors of the adapter do not fit {adapted} layers with LoRA")
        return model.eval()

    def adapter(self) -> float:
        """Item 8: hidden states with the adapter."""
        name = self._lora_settings["case"]
        return _gap(self.hidden(name, self.adapted.get_base_model()), self.lora["expected.hidden_adapter"])

    @cached_property
    def merged(self) -> HiggsTTS3:
        """The adapter merged in float32, each layer rounded once to bfloat16."""
        return cast(HiggsTTS3, _merged(self.adapted))

    def merged_adapter(self) -> float:
        """Item 8: hidden states of the merged model."""
        self.adapter()  # before the layers are merged
        return _gap(self.hidden(self._lora_settings["case"], self.merged), self.lora["expected.hidden_merged_bf16"])

    def merged_tensors(self) -> float:
        """Item 8: tensors under their names on disk."""
        found = {stored_name(key): value for key, value in self.merged.state_dict().items()}
        expected = {k.removeprefix("expected.merged."): v for k, v in self.lora.items() if ".merged." in k}
        return max(_gap(found[key], value.float()) for key, value in expected.items())

    # Export and codec

    def released_names(self) -> float:
        """Item 9: names and shapes of the released size, and the sums of bytes that follow; how many differ."""
        keys = read_json(self.folder / "export_keys.json", "the folder needs it")
        with torch.device("meta"):
            built = build(_released_config(keys)).state_dict()
        ours = {stored_name(key): list(value.shape) for key, value in built.items()}
        theirs = {
            f"{keys['layer_prefix'].format(i=layer)}{key}": shape
            for layer in range(keys["layers"])
            for key, shape in keys["layer_tensors"].items()
        } | keys["other"]
        ours |= {f"{keys['codec_prefix']}{key}": shape for key, shape in keys["codec_tensors"].items()}
        wrong = sum(ours.get(key) != shape for key, shape in theirs.items()) + (len(ours) != keys["counts"]["index"])
        wrong += 2 * sum(math.prod(shape) for shape in ours.values()) != keys["total_size"]
        return wrong + (plain_name("body.layers.0.x") != "model.layers.0.x")

    def codes(self) -> float:
        """Item 10: the number of codes that differ, of the exact samples and of a short reference."""
        values = self.values("codec")
        wrong = _unequal(self._codec.encode(values["waveform"].numpy()), values["codes"].numpy())
        short = encode_reference(self._codec, values["short_waveform"].numpy())
        return wrong + _unequal(short, values["short_codes"].numpy())

    def sound(self) -> float:
        """Item 10: of the decoded waveform."""
        values = self.values("codec")
        return _gap(torch.from_numpy(self._codec.decode(values["codes"].numpy())), values["decoded"])

    @cached_property
    def _codec(self) -> Any:
        return load_codec(self.layout.folder)


def _merged(model: PeftModel) -> Any:
    """The base with its adapter merged in float32 and rounded to bfloat16, in place, computing in float32."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                cast(Any, layer).merge(safe_merge=True)
                weight = cast(Any, layer).get_base_layer().weight
                weight.copy_(weight.bfloat16())
    return cast(Any, model).unload()


def _released_config(keys: dict[str, Any]) -> HiggsTTS3Config:
    layer, other = keys["layer_tensors"], keys["other"]
    vocabulary, hidden = other["tied.embedding.text_embedding.weight"]
    head = layer["self_attn.q_norm.weight"][0]
    return HiggsTTS3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=layer["mlp.gate_proj.weight"][0],
        num_hidden_layers=keys["layers"], num_attention_heads=layer["self_attn.q_proj.weight"][0] // head,
        num_key_value_heads=layer["self_attn.k_proj.weight"][0] // head, head_dim=head,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def _gap(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise DataError(f"{tuple(ours.shape)} values, where the folder has {tuple(theirs.shape)}")
    return (ours.detach().double() - theirs.double()).abs().max().item()


def _unequal(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many entries differ; all of them where the shapes do."""
    return int((ours != theirs).sum()) if ours.shape == theirs.shape else max(ours.size, theirs.size, 1)
