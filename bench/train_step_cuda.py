"""The GPU side of `train_step.py --size full`: everything in one process, in under 10 minutes, without a download.

Tokens/s of the baseline with each batch size and of ours with each token budget, plain and compiled; peak memory; the
share of the card's measured bf16 matrix rate; the places in a step where the host waits for the device; and a 4-bit
base within 16 GB, where bitsandbytes is installed.
"""

import argparse
import gc
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
from padded import collate
from peft import LoraConfig, PeftModel, get_peft_model
from report import Found, Row, finish, say
from workload import Shape, clip_seconds, make_examples, random_model

from higgstune.batch.packed import Packed, pack, positions, tensors_to, without_waiting
from higgstune.batch.packing import PackSampler, PackSize
from higgstune.model.forward import with_training_forward
from higgstune.model.loss import LossWeights, combine, label_counts
from higgstune.prompt.example import Example
from higgstune.training.finite import FiniteSteps

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
BATCH_TOKENS = (4096, 8192, 16384, 32768)
_STEPS = 6  # measured for each setting, after two that are not
_SMALL_CARD = 16e9


def main(arguments: argparse.Namespace) -> None:
    """Measure and print. Raises SystemExit where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("--size full needs a CUDA device; without one: --size mini")
    bench = _Bench(arguments)
    peak = matrix_rate()
    say(f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in a bf16 product of 8192 x 8192 x 8192")
    found: Found = {"device": torch.cuda.get_device_name(), "matrix_flops_per_second": peak}
    parts: dict[str, Callable[[], Any]] = {
        "baseline, random": lambda: bench.sweep("random, batch", BATCH_SIZES, partial(bench.baseline, "random")),
        "baseline, grouped": lambda: bench.sweep("grouped, batch", BATCH_SIZES, partial(bench.baseline, "grouped")),
        "ours": lambda: bench.sweep("ours, tokens", BATCH_TOKENS, bench.ours),
        "waits": bench.waits,
        "4-bit base within 16 GB": bench.small_card,
        "ours, compiled": lambda: bench.sweep("compiled, tokens", BATCH_TOKENS, partial(bench.ours, compiled=True)),
    }
    for name, part in parts.items():
        # What fails is a result, too, and must not take the others with it.
        try:
            found[name] = part()
        except Exception as error:  # noqa: BLE001
            found[name] = None
            found[f"{name}: failed"] = f"{type(error).__name__}: {error}"
            say(f"{name}: failed: {found[f'{name}: failed']}")
        gc.collect()
        torch.cuda.empty_cache()
    finish("train_step_cuda", _rows(found), arguments, found=found)
    if failed := [name for name in parts if f"{name}: failed" in found]:
        sys.exit(f"failed: {', '.join(failed)}")


def _rows(found: Found) -> list[Row]:
    best = max(
        [*(found["ours"] or []), *(found["ours, compiled"] or [])],
        key=lambda one: one["tokens_per_second"],
        default=None,
    )
    rows = []
    for order in ("random", "grouped"):
        side = found[f"baseline, {order}"]
        if side and best:
            fastest = max(one["tokens_per_second"] for one in side)
            rows.append(Row(f"{order}, best batch", [fastest], [best["tokens_per_second"]], "tokens/s"))
    if best:
        share = 100 * best["flops_per_second"] / found["matrix_flops_per_second"]
        rows.append(Row("share of the matrix rate", None, [share], "%"))
    if found["waits"] is not None:
        rows.append(Row("the host waits for the device, in a step", None, [found["waits"]], "times"))
    small = found["4-bit base within 16 GB"]
    if small:
        rows.append(Row("4-bit base, r 16, clips of 15 s: peak memory", None, [small["peak_bytes"] / 1e9], "GB"))
    return rows


def matrix_rate() -> float:
    """FLOP/s of a bf16 product of random matrices, the median of ten."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / statistics.median(_seconds(lambda: a @ b) for _ in range(10))


def _seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class _Bench:
    """A model on the device, and clips."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.config = Shape(1, arguments.layers).config()
        seconds = clip_seconds(
            arguments.clips or 1024, low=arguments.low, high=arguments.high, median=arguments.median,
            sigma=arguments.sigma, seed=arguments.seed,
        )  # fmt: skip
        if seconds.sum() * 25 < 4 * max(BATCH_TOKENS):
            raise SystemExit(f"--clips {len(seconds)} are too few for packs of {max(BATCH_TOKENS)} positions: 1024")
        self.examples = make_examples(self.config, seconds, seed=arguments.seed)
        self.lengths = np.array([len(example) for example in self.examples])
        self.order = np.random.default_rng(arguments.seed).permutation(len(self.examples))

    def sweep(self, name: str, settings: Sequence[int], run: Callable[[int], Found]) -> list[Found]:
        """Every setting until one does not fit."""
        found = []
        for setting in settings:
            try:
                found.append({"setting": setting, **run(setting)})
            except torch.OutOfMemoryError:
                say(f"{name} {setting}: out of memory")
                break
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            one = found[-1]
            say(f"{name} {setting}: {one['tokens_per_second']:.0f} tokens/s, {one['peak_bytes'] / 1e9:.1f} GB")
        return found

    def model(self, quantized: bool = False) -> tuple[PeftModel, torch.optim.Optimizer]:
        base: Any = random_model(self.config, dtype=torch.bfloat16, device=torch.device("cuda"))
        if quantized:
            from higgstune.model.quantize import quantize_layers

            quantize_layers(base, torch.device("cuda"))
            gc.collect()
            torch.cuda.empty_cache()
        from train_step import TARGETS

        rank = self.arguments.rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, bias="none")
        adapted = get_peft_model(base, lora).train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        return adapted, torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def baseline(self, order: str, size: int) -> Found:
        """The native class and loss on padded batches."""
        model, optimizer = self.model()
        indices = np.argsort(self.lengths, kind="stable") if order == "grouped" else self.order
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        batches = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
        # As many clips for all sizes: a few batches of one clip would be a matter of chance.
        batches = batches[: max(_STEPS, 64 // size) + 2]
        made = [collate([self.examples[i] for i in batch], self.config) for batch in batches]
        tokens = [int(self.lengths[batch].sum()) for batch in batches]

        def step(batch: dict[str, torch.Tensor]) -> None:
            on_device = {key: value.cuda(non_blocking=True) for key, value in batch.items()}
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**on_device, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return _measure(step, made, tokens)

    def ours(self, tokens: int, *, compiled: bool = False) -> Found:
        """Packed training."""
        model, step = self._packed_step(compiled=compiled)
        packs = PackSampler(self.lengths, PackSize(tokens=tokens), seed=0).packs(0)[: _STEPS + 2]
        made = [_pinned(pack([self.examples[i] for i in chosen])) for chosen in packs]
        found = _measure(step, made, [positions(batch) for batch in made])
        flops = 4 * sum(_products(model, batch) for batch in made[2:])
        return found | {"flops_per_second": flops / found["seconds"]}

    def _packed_step(
        self, *, compiled: bool = False, quantized: bool = False
    ) -> tuple[PeftModel, Callable[[Packed], None]]:
        model, optimizer = self.model(quantized)
        base: Any = with_training_forward(model.get_base_model())
        if compiled:
            torch._dynamo.reset()
            for layer in base.model.layers:
                layer.compile(dynamic=True)

        finite = FiniteSteps()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def step(batch: Packed) -> None:
            """What the trainer does with a pack."""
            counts = label_counts(batch, eos_id=self.config.audio_stream_eos_id)
            device = torch.device("cuda")
            on_device = tensors_to(batch, device)
            counts = {key: without_waiting(value, device) for key, value in counts.items()}
            with torch.autocast("cuda", dtype=torch.bfloat16):
                sums = model(**on_device)
            combine(sums, counts, LossWeights()).backward()
            finite.note(torch.nn.utils.clip_grad_norm_(trained, 1.0), optimizer)
            optimizer.step()
            optimizer.zero_grad()

        return model, step

    def waits(self) -> int:
        """How often a step waits for the device, by PyTorch's own debug mode."""
        _, step = self._packed_step()
        packs = PackSampler(self.lengths, PackSize(tokens=BATCH_TOKENS[0]), seed=0).packs(0)[:3]
        made = [_pinned(pack([self.examples[i] for i in chosen])) for chosen in packs]
        for batch in made[:2]:
            step(batch)
        torch.cuda.set_sync_debug_mode("warn")  # it warns of itself, once
        torch.cuda.synchronize()
        with _counted_waits() as seen:
            step(made[2])
        torch.cuda.set_sync_debug_mode("default")
        for message in seen:
            say(f"waits: {message}")
        return len(seen)

    def small_card(self) -> Found:
        """A 4-bit base on clips of 15 s, with the memory of a card of 16 GB, checkpointing every layer."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, _SMALL_CARD / total))
        try:
            examples: list[Example] = make_examples(self.config, np.full(8, 15.0), seed=1)
            model, step = self._packed_step(quantized=True)
            model.gradient_checkpointing_enable({"use_reentrant": False})
            made = [_pinned(pack(examples[i : i + 4])) for i in (0, 4)] * 3
            return _measure(step, made, [positions(batch) for batch in made])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _measure(step: Callable[[Any], None], batches: Sequence[Any], tokens: Sequence[int]) -> Found:
    for batch in batches[:2]:
        step(batch)
    torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        for batch in batches[2:]:
            step(batch)

    seconds = _seconds(run)
    return {
        "seconds": seconds,
        "tokens": sum(tokens[2:]),
        "tokens_per_second": sum(tokens[2:]) / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _products(model: PeftModel, batch: Packed) -> int:
    """Matrix parameters x positions of one pass: attention and one FFN for each row, heads for labelled positions."""
    config = model.get_base_model().config
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * hidden * inner) * len(batch["from_sequence"])
    audio = hidden * config.num_codebooks * config.codebook_size * len(batch["audio_targets"])
    return layers + audio + hidden * config.vocab_size * len(batch["text_targets"])


def _pinned(batch: Packed) -> Packed:
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextmanager
def _counted_waits() -> Iterator[list[str]]:
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    seen += [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
