"""The GPU side of `train_step.py --size full`: everything in one process, in under 10 minutes, without a download.

Tokens/s of the baseline with each batch size and of ours with each token budget; peak memory, measured and planned; the
share of the card's measured bf16 matrix rate; the places in a step where the host waits for the device; and a 4-bit
base within 16 GB, where bitsandbytes is installed. Layers are compiled where Triton and a C compiler are.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from report import Found, Row, say, table, write_json
from subjects import SUBJECTS, Subject
from workload import clip_seconds

from higgstune.batch.collate import Packed, count_tokens, pack, tensors_to
from higgstune.batch.packing import PackSampler, PackSize
from higgstune.config.recipe import Lora
from higgstune.environment import to_device_async
from higgstune.families.base import Conditioning, base_of
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.kernels.memory import checkpoint_first
from higgstune.model.adapters import lora_config
from higgstune.model.compiled import compile_layers
from higgstune.planning.dry_run import StepSpec
from higgstune.planning.plan import Footprint
from higgstune.training.metrics import FiniteSteps

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
BATCH_TOKENS = (2048, 8192, 24576)
PLAIN_BATCH_TOKENS = (2048, 8192)
_SETTINGS = ("family", "layers", "low", "high", "median", "sigma", "rank", "seed", "repeats")  # of the arguments
_STEPS = 5  # measured for each setting
_CLIPS = 16  # of the baseline's, at the least: a few batches of one clip would be a matter of chance
_SMALL_CARD = 16e9
_SMALL = "4-bit base within 16 GB"
_FAILED = ": failed"


def main(arguments: argparse.Namespace) -> None:
    """Measure and print. Raises SystemExit where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("--size full needs a CUDA device; without one: --size mini")
    peak = matrix_rate()
    say(f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in a bf16 product of 8192 x 8192 x 8192")
    bench = Bench(arguments, SUBJECTS[arguments.family](1, arguments.layers), torch.device("cuda"))
    found: Found = {"device": torch.cuda.get_device_name(), "matrix_flops_per_second": peak}
    settings = {name: getattr(arguments, name) for name in _SETTINGS} | {"clips": len(bench.examples)}
    for part in measure(bench):
        found |= part
        if arguments.json:  # a run that is cut off has written what it had
            write_json(arguments.json, "train_step_cuda", rows(found), settings=settings, found=found)
    sys.stdout.write(table(rows(found)) + "\n")
    if failed := [name.removesuffix(_FAILED) for name in found if name.endswith(_FAILED)]:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(
    bench: "Bench",
    budgets: Sequence[int] = BATCH_TOKENS,
    plain_budgets: Sequence[int] = PLAIN_BATCH_TOKENS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Iterator[Found]:
    """All parts, by name. What fails is a result, too (None, and why), and does not take the others with it."""
    parts: dict[str, Callable[[], Any]] = {
        "ours": partial(bench.ours, budgets),
        "waits": bench.waits,
        _SMALL: bench.small_card,
        "ours, plain layers": partial(bench.ours, plain_budgets, compiled=False),
        "baseline": partial(bench.baseline, batch_sizes),
    }
    if importlib.util.find_spec("bitsandbytes") is None:
        say(f"{_SMALL}: left out, bitsandbytes is not installed")
        del parts[_SMALL]
    for name, part in parts.items():
        started = time.perf_counter()
        found: Found = {name: None}
        try:
            found[name] = part()
        except Exception as error:  # noqa: BLE001
            found[name + _FAILED] = f"{type(error).__name__}: {error}"
            say(f"{name}: failed: {found[name + _FAILED]}")
        bench.model = None
        _empty()
        say(f"{name}: {time.perf_counter() - started:.0f} s")
        yield found


def rows(found: Found) -> list[Row]:
    """The table of what `measure` found."""
    made = []
    best = max(found.get("ours") or [], key=_speed, default=None)
    if best:
        for order in ("random", "grouped"):
            side = [one for one in found.get("baseline") or [] if one["order"] == order]
            if side:
                fastest = max(side, key=_speed)
                name = f"{order}, batch {fastest['batch_size']}"
                made.append(Row(name, rates(fastest), rates(best), "tokens/s"))
        # The common prefix of all clips is computed once: there are fewer rows than tokens.
        for key, counted in (("flops", "tokens"), ("flops_of_rows", "rows that are computed")):
            shares = [100 * rate / found["matrix_flops_per_second"] for rate in rates(best, key)]
            made.append(Row(f"share of the matrix rate, by {counted}", None, shares, "%"))
        plain = {one["batch_tokens"]: rates(one) for one in found.get("ours, plain layers") or []}
        for one in found["ours"]:
            tokens = one["batch_tokens"]
            kind = "compiled" if one["compiled"] else "plain again"
            name = f"packs of {tokens}, plain layers and {kind}"
            made.append(Row(name, plain.get(tokens), rates(one), "tokens/s"))
        for one in found["ours"]:
            made.append(_peak(f"packs of {one['batch_tokens']}", one))
    for kind, times in (found.get("waits") or {}).items():
        made.append(Row(f"calls that wait for the device, in a step, {kind} layers", None, [times], "times"))
    if found.get(_SMALL):
        made.append(_peak("a step with a 4-bit base, clips of 15 s", found[_SMALL]))
    return made


def rates(one: Found, counted: str = "tokens") -> list[float]:
    """How much of what was counted a second took, in each repeat."""
    return [one[counted] / seconds for seconds in one["seconds"]]


def _peak(name: str, one: Found) -> Row:
    return Row(f"{name}: peak, measured and planned", [one["peak_bytes"] / 1e9], [one["planned_bytes"] / 1e9], "GB")


def _speed(one: Found) -> float:
    return statistics.median(rates(one))


def matrix_rate() -> float:
    """FLOP/s of a bf16 product of random matrices, the median of ten."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / statistics.median(_seconds(lambda: a @ b) for _ in range(10))


def _seconds(run: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - started


class Bench:
    """Clips, and a model on the device."""

    def __init__(self, arguments: argparse.Namespace, subject: Subject, device: torch.device) -> None:
        self.device = device
        self.subject, self.family, self.config = subject, subject.family, subject.config
        self.lora = Lora(r=arguments.rank, alpha=2 * arguments.rank)
        seconds = clip_seconds(
            arguments.clips or 2048, low=arguments.low, high=arguments.high, median=arguments.median,
            sigma=arguments.sigma, seed=arguments.seed,
        )  # fmt: skip
        self.examples = subject.examples(seconds, seed=arguments.seed)
        self.repeats, self.seed = arguments.repeats, arguments.seed
        self.lengths = np.array([len(example) for example in self.examples])
        self.order = np.random.default_rng(arguments.seed).permutation(len(self.examples))
        self.model: PeftModel | None = None

    def ours(self, budgets: Sequence[int], *, compiled: bool = True) -> list[Found]:
        """Packed training with each token budget, until one does not fit."""
        model, step = self._packed_step()
        if compiled:
            started = time.perf_counter()
            first = tensors_to(pack(self.examples[:3]), self.device)
            difference = compile_layers(model, first)
            outcome = "layers are not compiled" if difference is None else f"gradients are off by {difference:.3f}"
            say(f"{outcome}, after {time.perf_counter() - started:.0f} s")
        found = []
        for tokens in budgets:
            packs = self._packs(tokens, _STEPS)
            made = [self._pinned(pack([self.examples[i] for i in chosen])) for chosen in packs]
            measured = self._measured(f"packs of {tokens}", step, made, [count_tokens(batch) for batch in made])
            if measured is None:
                break
            of_tokens = 4 * sum(matrix_products(model, batch, count_tokens(batch)) for batch in made)
            of_rows = 4 * sum(matrix_products(model, batch, len(batch["from_sequence"])) for batch in made)
            measured |= {"flops": of_tokens, "flops_of_rows": of_rows, "planned_bytes": self._planned(made)}
            compiles = base_of(model).compiler_stance is not None
            found.append({"batch_tokens": tokens, "compiled": compiles, **measured})
        return _not_empty(found)

    def baseline(self, batch_sizes: Sequence[int]) -> list[Found]:
        """transformers' class and the baseline's loss on padded batches, in two orders, until a batch does not fit.

        Adapters are in bfloat16, as the base: with peft's float32 ones it computes more, and under autocast the native
        class fails on a GPU (it cannot put float32 embeddings of audio among those of text).
        """
        model, optimizer = self._adapted(float32=False)

        def step(batch: dict[str, torch.Tensor]) -> None:
            on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            self.subject.loss(model, on_device).backward()
            optimizer.step()
            optimizer.zero_grad()

        found = []
        for order in ("random", "grouped"):
            for size in batch_sizes if order == "random" else [size for size in batch_sizes if size > 1]:
                batches = self._padded(order, size)
                made = [self._pinned(self.subject.padded([self.examples[i] for i in batch])) for batch in batches]
                tokens = [int(self.lengths[batch].sum()) for batch in batches]
                measured = self._measured(f"baseline, {order}, batch {size}", step, made, tokens)
                if measured is None:
                    optimizer.zero_grad()
                    break
                found.append({"order": order, "batch_size": size, **measured})
        return _not_empty(found)

    def waits(self) -> dict[str, int]:
        """How often a step makes the host wait for the device, by PyTorch's debug mode, with plain and compiled layers.

        That mode does not see waiting for an event, which a step does for the flag of the step before.
        """
        model, step = self._packed_step()
        made = [self._pinned(pack([self.examples[i] for i in chosen])) for chosen in self._packs(BATCH_TOKENS[0], 3)]
        found = {"plain": self._waits(step, made)}
        if compile_layers(model, tensors_to(pack(self.examples[:3]), self.device)) is not None:
            found["compiled"] = self._waits(step, made)
        return found

    def _waits(self, step: Callable[[Packed], None], batches: Sequence[Packed]) -> int:
        *others, last = batches
        for batch in others:
            step(batch)
        torch.cuda.set_sync_debug_mode("warn")  # it warns of itself, once
        try:
            with counted_waits() as seen:
                torch.ones((), device=self.device).item()
            if not seen:
                raise RuntimeError("PyTorch's debug mode did not report an .item()")
            with counted_waits() as seen:
                step(last)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for message in seen:
            say(f"waits: {message}")
        return len(seen)

    def small_card(self) -> Found:
        """A 4-bit base on clips of 15 s, with the memory of a card of 16 GB, computing every layer again.

        Raises torch.OutOfMemoryError where that does not fit.
        """
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, _SMALL_CARD / total))
        try:
            examples = self.subject.examples(np.full(8, 15.0), seed=1)
            _, step = self._packed_step(quantized=True)
            checkpoint_first(self._layers(), self.config.num_hidden_layers)
            made = [self._pinned(pack(examples[i : i + 4])) for i in (0, 4)] * 3
            found = self._measured("4 bits", step, made, [count_tokens(batch) for batch in made])
            if found is None:
                raise torch.OutOfMemoryError(f"a 4-bit base does not fit {_SMALL_CARD / 1e9:.0f} GB")
            return found | {"planned_bytes": self._planned(made, quantized=True)}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def _measured(
        self, name: str, step: Callable[[Any], None], batches: Sequence[Any], tokens: Sequence[int]
    ) -> Found | None:
        """None where it does not fit."""
        try:
            for batch in batches:  # what libraries find out about each new shape is not measured
                step(batch)
            _reset_peak()

            def run() -> None:
                for batch in batches:
                    step(batch)

            seconds = [_seconds(run) for _ in range(self.repeats)]
        except torch.OutOfMemoryError:
            say(f"{name}: out of memory")
            return None
        finally:
            _empty()
        found = {
            "seconds": seconds,
            "tokens": sum(tokens),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        }
        say(f"{name}: {_speed(found):.0f} tokens/s, {found['peak_bytes'] / 1e9:.1f} GB")
        return found

    def _packs(self, tokens: int, count: int) -> list[list[int]]:
        sampler = PackSampler(self.lengths, PackSize(tokens=tokens), seed=self.seed)
        packs = sampler.packs(0)[:-1]  # the last may be half empty
        if len(packs) < count:
            raise ValueError(f"--clips {len(self.examples)} are too few for packs of {tokens} tokens: raise it")
        return packs[:count]

    def _padded(self, order: str, size: int) -> list[np.ndarray]:
        """Batches evenly spaced over those of a whole epoch, from the largest to the smallest, padding included.

        They include the largest, so a batch size that fits here fits an epoch.
        """
        indices = np.argsort(self.lengths, kind="stable") if order == "grouped" else self.order
        batches = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
        batches.sort(key=lambda batch: -size * int(self.lengths[batch].max()))
        count = min(len(batches), max(_STEPS, _CLIPS // size))
        return [batches[i] for i in np.linspace(0, len(batches) - 1, count).round().astype(int)]

    def _adapted(self, *, quantized: bool = False, float32: bool = True) -> tuple[PeftModel, torch.optim.Optimizer]:
        base = self.subject.model(dtype=torch.bfloat16, device=self.device, seed=0)
        if quantized:
            from higgstune.kernels.quantize import quantize_layers

            quantize_layers(base, self.family.four_bits, self.device)
            _empty()
        config = lora_config(self.lora, self.family, "full", Conditioning(), "lora")
        self.model = get_peft_model(base, config, autocast_adapter_dtype=float32).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.model, torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def _layers(self) -> Any:
        assert self.model is not None
        return self.model.get_base_model().model.layers

    def _packed_step(self, *, quantized: bool = False) -> tuple[PeftModel, Callable[[Packed], None]]:
        """What the trainer does with a pack."""
        model, optimizer = self._adapted(quantized=quantized)
        self.family.pack_forward(model.get_base_model())
        finite = FiniteSteps(lambda _: say("a step with gradients that are not finite"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        eos_id = self.family.spec(self.config).stream_eos

        def step(batch: Packed) -> None:
            counts = label_counts(batch, eos_id=eos_id)
            on_device = tensors_to(batch, self.device)
            counts = {key: to_device_async(value, self.device) for key, value in counts.items()}
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                sums = model(**on_device)
            combine(sums, counts, LossWeights()).backward()
            finite.note(torch.nn.utils.clip_grad_norm_(trained, 1.0), optimizer, step=0)
            optimizer.step()
            optimizer.zero_grad()

        return model, step

    def _planned(self, packs: Sequence[Packed], *, quantized: bool = False) -> int:
        """What `--plan` says of the pack with the most hidden states: bytes of tensors."""
        spec = StepSpec(
            family=self.family,
            config=self.config,
            base=self.family.spec(self.config),
            dtype=torch.bfloat16,
            lora=self.lora,
            kind="full",
            builtin_extensions=Conditioning(),
            trained=Conditioning(),
            attention="lora",
            quantize="4bit" if quantized else None,
            on_cuda=True,
            accumulation=False,
        )
        again = self.config.num_hidden_layers if quantized else 0
        largest = max(packs, key=lambda batch: len(batch["from_sequence"]))
        return Footprint(spec, largest).peak(again).total()

    def _pinned(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.device.type != "cuda":
            return batch
        return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def matrix_products(model: PeftModel, batch: Packed, rows: int) -> int:
    """Matrix parameters x tokens of one pass: attention and one FFN for each of `rows`, heads for each label."""
    config = model.get_base_model().config
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * hidden * inner) * rows
    audio = hidden * config.num_codebooks * config.codebook_size * len(batch["audio_targets"])
    return layers + audio + hidden * config.vocab_size * len(batch["text_targets"])


def _not_empty(found: list[Found]) -> list[Found]:
    if not found:
        raise RuntimeError("the smallest size does not fit the device's memory")
    return found


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _empty() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """What PyTorch's debug mode says of calls inside that wait for the device."""
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    seen += [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
