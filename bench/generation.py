"""Speaking: frames a second of Higgstune's engine against the native `generate`, on the same model and prompts.

First batches of clips of one length, then texts of unequal length (the native class speaks them in their order, a batch
after the other), then 16 adapters in one batch against one that is merged.
"""

import statistics
from typing import Any

import numpy as np
import torch
from miniature import small_config
from report import Case, Found, Meter, Row, alternate, finish, parser, rates, same_work
from stores import demo_prompter
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from workload import Shape, clip_seconds, random_model

from higgstune.config.recipe import Lora
from higgstune.data.messages import DEFAULT_SCENE, speech_messages
from higgstune.families.base import Example, base_of
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.families.padded import left_padded
from higgstune.families.sampling import Sampling
from higgstune.generate.added import lora_of
from higgstune.generate.engine import Engine, Job
from higgstune.model.adapters import add_lora, unload_adapter

EXAMPLE = "python bench/generation.py --size mini --batch 8 --json generation.json"
MEDIAN = 125  # frames of a clip of 5 s
TEXTS = ("The farmer carried a heavy basket to the market.", "My sister painted the old door bright yellow.")
SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.95, repeat_window=7, max_repeats=2)


def shaped(size: str) -> HiggsAudioV2Config:
    """`mini`: the demo's proportions, 5.3 M parameters a step. `mid`: 33 M. `full`: the released model's."""
    if size == "full":
        return Shape().config()
    config = small_config()
    numbers = {"mini": (256, 768, 5, 4, 2), "mid": (576, 1536, 8, 9, 3)}[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name, number in zip(names, numbers, strict=True):
        setattr(config, name, number)
    config.head_dim = 64
    return config


def endless_model(size: str, device: str, dtype: str) -> HiggsAudioV2ForConditionalGeneration:
    """Random weights, and an EOS that is never among the likeliest 50: its logit is 0, in the middle of 1026."""
    model = random_model(shaped(size), dtype=getattr(torch, dtype), device=torch.device(device), seed=0)
    config = model.config
    with torch.no_grad():
        heads = model.audio_lm_head.weight.view(config.num_codebooks, config.codebook_size, -1)
        heads[:, config.audio_stream_eos_id] = 0
    return model


def prompts_for(model: HiggsAudioV2ForConditionalGeneration, batch: int) -> list[Example]:
    """Prompts of two texts in turn, so that a batch has unequal lengths."""
    prompter = Prompter(demo_prompter().tokenizer, SpecialIds.from_config(model.config))
    return [prompter.prompt(speech_messages(TEXTS[i % len(TEXTS)], scene=DEFAULT_SCENE), []) for i in range(batch)]


def jobs_for(model: HiggsAudioV2ForConditionalGeneration, frames: list[int], adapters: list[str]) -> list[Job]:
    """Clips of so many frames, the longest first, as `Speaker.speak_ready` puts them in order."""
    prompts = prompts_for(model, len(frames))
    return [
        Job(prompt, cap, seed, SAMPLING, adapters[seed % len(adapters)])
        for seed, (prompt, cap) in enumerate(zip(prompts, sorted(frames, reverse=True), strict=True))
    ]


def ours(frames: list[int], batch: int, size: str, device: str, dtype: str, adapters: int = 0) -> Found:
    """The engine behind `Speaker.speak_ready`; with one adapter merged into its copies, or many in one batch."""
    model: Any = endless_model(size, device, dtype)
    names = [f"voice {index}" for index in range(adapters)] if adapters > 1 else [""]
    if adapters == 1:
        model = adapted(model, 0)
    engine = Engine(model, slots=batch)
    for index, name in enumerate(names):
        if name:
            with_adapter = adapted(model, index)
            engine.add_adapter(name, lora_of(with_adapter))
            unload_adapter(with_adapter)
    base = base_of(model)
    engine.generate(jobs_for(base, [2] * batch, names))
    with Meter() as meter:
        spoken = engine.generate(jobs_for(base, frames, names))
    return meter.found(frames=sum(len(clip.codes) for clip in spoken), kinds=len(np.unique(spoken[0].codes)))


def adapted(model: Any, seed: int) -> Any:
    """With random LoRA of rank 16 on both pathways."""
    found = add_lora(model, Lora(), "full")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return found.eval()


def native(frames: list[int], batch: int, size: str, device: str, dtype: str) -> Found:
    """`generate` of the model's own class, with the same sampling and as many steps as the longest of a batch needs."""
    model = endless_model(size, device, dtype)
    config, prompts = model.config, prompts_for(model, len(frames))
    settings = model.generation_config
    settings.ras_win_len, settings.ras_win_max_num_repeat = SAMPLING.repeat_window, SAMPLING.max_repeats
    drawn = {
        "do_sample": True,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "top_p": SAMPLING.top_p,
    }
    more = config.num_codebooks + 1  # row 0, and the delay of the last codebook with its EOS

    def speak(first: int, length: int) -> torch.Tensor:
        padded = left_padded(prompts[first : first + batch], pad_id=config.pad_token_id)
        inputs = {key: value.to(device) for key, value in padded.items()}
        rows: torch.Tensor = model.generate(**inputs, **drawn, max_new_tokens=length + more)
        if rows.shape[1] != length + more or (rows == config.audio_stream_eos_id).any():
            raise RuntimeError(f"the native model ended by itself after {rows.shape[1]} of {length + more} rows")
        return rows

    speak(0, 2)
    torch.manual_seed(0)
    with Meter() as meter:
        rows = [speak(first, max(frames[first : first + batch])) for first in range(0, len(frames), batch)]
    return meter.found(frames=sum(frames), kinds=len(rows[0].unique()))


def measure(
    batches: list[int],
    frames: int,
    *,
    size: str,
    texts: int = 32,
    adapters: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    repeats: int,
    threads: int,
    fresh: bool = True,
) -> list[Row]:
    """A row for each size of batch, one for texts of unequal length, and one for adapters by row; 0 leaves one out."""
    per, unit = ("cpu_seconds", "frames/CPU-s") if device == "cpu" else ("wall_seconds", "frames/s")

    def row(what: str, sides: dict[str, Case]) -> Row:
        found = alternate(sides, repeats=repeats, threads=threads, fresh=fresh)
        same_work(*found.values(), counted="frames")
        return Row(f"{size}, {dtype}: {what}", *(rates(side, "frames", per=per) for side in found.values()), unit)

    shared = {"size": size, "device": device, "dtype": dtype}
    rows = []
    for batch in batches:
        settings = {"frames": [frames] * batch, "batch": batch, **shared}
        rows.append(
            row(f"{frames} frames of {batch} clips", {"native": Case(native, settings), "ours": Case(ours, settings)})
        )
    if texts:
        seconds = clip_seconds(texts, low=1, high=15, median=5, sigma=0.6, seed=0) * frames / MEDIAN
        settings = {"frames": [max(2, round(25 * float(s))) for s in seconds], "batch": 8, **shared}
        rows.append(
            row(f"{texts} texts of unequal length", {"native": Case(native, settings), "ours": Case(ours, settings)})
        )
    if adapters:
        settings = {"frames": [frames] * adapters, "batch": adapters, **shared}
        sides = {name: Case(ours, {**settings, "adapters": n}) for name, n in (("merged", 1), ("by row", adapters))}
        rows.append(row(f"{adapters} adapters in one batch against one merged", sides))
    return rows


def main() -> None:
    """Measure, print, write; fail below --min-ratio."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="(default: 1 8 16)")
    options.add_argument("--frames", type=int, metavar="N", help="of each clip, 25 a second (default: 125)")
    options.add_argument("--size", nargs="+", default=["mini", "mid"], choices=["mini", "mid", "full"])
    options.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--min-ratio", type=float, metavar="X", help="exit with 1 where a batch of clips is below")
    given = options.parse_args()
    rows = []
    for size in given.size[:1] if given.quick else given.size:
        rows += measure(
            [8] if given.quick else given.batch, given.frames or (50 if given.quick else 125), size=size,
            texts=0 if given.quick else 32, adapters=0 if given.quick else 16, device=given.device, dtype=given.dtype,
            repeats=given.repeats, threads=given.threads,
        )  # fmt: skip
    finish("generation", rows, given)
    slow = [row.name for row in rows if given.min_ratio and "adapters" not in row.name]
    slow = [r.name for r in rows if r.name in slow and statistics.median(r.ratios) < given.min_ratio]
    if slow:
        raise SystemExit(f"below {given.min_ratio}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
