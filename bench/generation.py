"""Generation: frames a second of Higgstune's engine against the native `generate`, on the same model and prompts."""

import numpy as np
import torch
from miniature import small_config
from report import Case, Found, Meter, Row, alternate, finish, parser, rates, same_work
from stores import demo_prompter
from transformers import HiggsAudioV2ForConditionalGeneration
from workload import random_model

from higgstune.data.messages import DEFAULT_SCENE, speech_messages
from higgstune.families.base import Example
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.families.padded import left_padded
from higgstune.families.sampling import Sampling
from higgstune.generate.engine import generate

EXAMPLE = "python bench/generation.py --batch 1 8 --frames 125 --json generation.json"
TEXTS = ("The farmer carried a heavy basket to the market.", "My sister painted the old door bright yellow.")
SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.95, repeat_window=7, max_repeats=2)


def endless_model(scale: int, layers: int, device: str) -> HiggsAudioV2ForConditionalGeneration:
    """Random weights, and an EOS that is never among the likeliest 50: its logit is 0, in the middle of 1026."""
    model = random_model(
        small_config(scale=scale, layers=layers), dtype=torch.float32, device=torch.device(device), seed=0
    )
    config = model.config
    with torch.no_grad():
        heads = model.audio_lm_head.weight.view(config.num_codebooks, config.codebook_size, -1)
        heads[:, config.audio_stream_eos_id] = 0
    return model


def prompts_for(model: HiggsAudioV2ForConditionalGeneration, batch: int) -> list[Example]:
    """Prompts of two texts in turn, so that a batch has unequal lengths."""
    prompter = Prompter(demo_prompter().tokenizer, SpecialIds.from_config(model.config))
    return [prompter.prompt(speech_messages(TEXTS[i % len(TEXTS)], scene=DEFAULT_SCENE), []) for i in range(batch)]


def ours(batch: int, frames: int, scale: int, layers: int, device: str = "cpu") -> Found:
    """The engine behind `Speaker.speak_all`."""
    model = endless_model(scale, layers, device)
    prompts = prompts_for(model, batch)
    generate(model, prompts, max_frames=[2] * batch, seeds=range(batch), sampling=SAMPLING)
    with Meter() as meter:
        spoken = generate(model, prompts, max_frames=[frames] * batch, seeds=range(batch), sampling=SAMPLING)
    return meter.found(frames=sum(len(clip.codes) for clip in spoken), kinds=len(np.unique(spoken[0].codes)))


def native(batch: int, frames: int, scale: int, layers: int, device: str = "cpu") -> Found:
    """`generate` of the model's own class, with the same sampling and as many steps."""
    model = endless_model(scale, layers, device)
    config = model.config
    inputs = {
        key: value.to(device)
        for key, value in left_padded(prompts_for(model, batch), pad_id=config.pad_token_id).items()
    }
    settings = model.generation_config
    settings.ras_win_len, settings.ras_win_max_num_repeat = SAMPLING.repeat_window, SAMPLING.max_repeats
    drawn = {
        "do_sample": True,
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "top_p": SAMPLING.top_p,
    }
    more = config.num_codebooks + 1  # row 0, and the delay of the last codebook with its EOS
    steps = frames + more
    model.generate(**inputs, **drawn, max_new_tokens=2 + more)
    torch.manual_seed(0)
    with Meter() as meter:
        rows = model.generate(**inputs, **drawn, max_new_tokens=steps)
    if rows.shape[1] != steps or (rows == config.audio_stream_eos_id).any():
        raise RuntimeError(f"the native model ended by itself after {rows.shape[1]} of {steps} rows")
    return meter.found(frames=batch * (rows.shape[1] - more), kinds=len(rows.unique()))


def measure(
    batches: list[int],
    frames: int,
    *,
    scale: int,
    layers: int,
    device: str = "cpu",
    repeats: int,
    threads: int,
    fresh: bool = True,
) -> list[Row]:
    """One row for each size of batch."""
    rows = []
    per, unit = ("cpu_seconds", "frames/CPU-s") if device == "cpu" else ("wall_seconds", "frames/s")
    for batch in batches:
        settings = {"batch": batch, "frames": frames, "scale": scale, "layers": layers, "device": device}
        cases = {"native": Case(native, settings), "ours": Case(ours, settings)}
        found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
        same_work(*found.values(), counted="frames")
        sides = [rates(found[name], "frames", per=per) for name in cases]
        rows.append(Row(f"{frames} frames of each of {batch} clips", *sides, unit))
    return rows


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="clips (default: 1 8)")
    options.add_argument("--frames", type=int, metavar="N", help="of each clip, 25 a second (default: 125)")
    options.add_argument("--scale", type=int, metavar="N", help="narrower by, against the released model (default: 8)")
    options.add_argument("--layers", type=int, default=4, metavar="N", help="of the model (default: 4)")
    options.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    given = options.parse_args()
    rows = measure(
        given.batch,
        given.frames or (10 if given.quick else 125),
        scale=given.scale or (16 if given.quick else 8),
        layers=given.layers,
        device=given.device,
        repeats=given.repeats,
        threads=given.threads,
    )
    finish("generation", rows, given)


if __name__ == "__main__":
    main()
