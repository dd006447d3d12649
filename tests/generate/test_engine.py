"""Training is generation: the same logits, and a clip that was learned is spoken back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import random_codes, tiny_config, tiny_model, tiny_prompter, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from higgstune.batch.collate import PaddedCollator, pack
from higgstune.batch.dataset import TARGET
from higgstune.config.recipe import Lora
from higgstune.data.messages import speech_messages
from higgstune.errors import CheckpointError, InputError
from higgstune.families.base import Example, base_of
from higgstune.families.higgs_v2.checkpoint import spec_of
from higgstune.families.higgs_v2.decoder import Decoder
from higgstune.families.higgs_v2.delay import build_frames, codes_from_frames
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.families.higgs_v2.sampler import RowSampler
from higgstune.families.sampling import Sampling
from higgstune.generate.added import lora_of
from higgstune.generate.engine import Engine, Job, generate
from higgstune.generate.prefixes import Prefixes
from higgstune.generate.stack import Stack
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.model.adapters import adapted_layers, add_lora, unload_adapter

CODES = 64
GREEDY = Sampling(temperature=0)


def clips(prompter: Prompter) -> list[tuple[Example, Example, np.ndarray]]:
    """(training example, generation prompt, target codes): unequal lengths, one with a reference in the prompt."""
    made = []
    for index, (text, frames, reference) in enumerate(
        [("The sun rises in the east.", 9, None), ("Hello.", 4, 6), ("It was the night before my birthday.", 14, None)]
    ):
        target = random_codes(frames, seed=index, codes=CODES)
        context = [] if reference is None else [random_codes(reference, seed=100 + index, codes=CODES)]
        turns = speech_messages(text, context=[("Good morning.", "reference.wav") for _ in context])
        made.append((prompter.example([*turns, TARGET], [*context, target]), prompter.prompt(turns, context), target))
    return made


def with_random_lora(model: Any, *, kind: str = "full", seed: int = 0, **lora: Any) -> Any:
    adapted = add_lora(model, Lora(**{"r": 4, "alpha": 8, **lora}), kind)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapted.eval()


def teacher_forced(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """For each example the audio logits [T + K, K, V] that predict rows 1, 2, ... of the target."""
    batch = PaddedCollator(pad_id=model.config.pad_token_id, stream_eos=model.config.audio_stream_eos_id)(examples)
    inputs = {k: v for k, v in batch.items() if not k.endswith(("_positions", "_targets"))}
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    shape = (model.config.num_codebooks, model.config.codebook_size)
    result = []
    for b, example in enumerate(examples):
        rows = np.flatnonzero((example.audio_labels != -100).any(-1))
        positions = np.flatnonzero(example.audio_mask)[rows] - 1
        result.append(logits[b, positions].unflatten(-1, shape))
    return result


def step_by_step(
    model: Any, made: list[tuple[Example, Example, np.ndarray]], *, copy: bool | None = None
) -> list[torch.Tensor]:
    """The same logits from generation, row after row through a cache: of the engine's forward, with copies of the
    weights or without, or of the model's own (None).
    """
    spec = spec_of(base_of(model).config)
    rows = [build_frames(target, bos_id=spec.stream_bos, eos_id=spec.stream_eos)[0] for _, _, target in made]
    prompts = [prompt for _, prompt, _ in made]
    with torch.inference_mode():
        if copy is None:
            decoder: Any = Decoder(model, prompts)
            steps = [decoder.step(torch.tensor(np.stack([x[0] for x in rows])))]
        else:
            decoder = stack_of(model, len(made), copy=copy)
            decoder.reserve(max(map(len, prompts)) + max(map(len, rows)))
            steps = [decoder.prefill(prompts, rows[0][0].tolist(), first=0)]
        for r in range(1, max(len(x) for x in rows) - 1):
            steps.append(decoder.step(torch.tensor(np.stack([x[min(r, len(x) - 1)] for x in rows]))))
    return [torch.stack([step[b] for step in steps[: len(x) - 1]]).float() for b, x in enumerate(rows)]


def stack_of(model: Any, slots: int, *, copy: bool) -> Stack:
    parts = FAMILY.decoder_parts(model)
    assert parts is not None
    return Stack(parts, spec_of(base_of(model).config), slots, copy=copy)


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("dora", [False, True])
def test_teacher_forced_logits_equal_step_by_step_generation(
    dtype: torch.dtype, tolerance: float, dora: bool, copy: bool | None
) -> None:
    model, prompter = tiny_prompter(codes=CODES)
    adapted = with_random_lora(model.to(dtype), dora=dora)
    assert len(adapted_layers(adapted)) == 2 * 10
    made = clips(prompter)
    forced = teacher_forced(adapted, [example for example, _, _ in made])
    stepped = step_by_step(adapted, made, copy=copy)
    for a, b in zip(forced, stepped, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < tolerance
    # The comparison can fail: the adapter matters, and so does the reference.
    with adapted.disable_adapter():
        assert (teacher_forced(adapted, [made[0][0]])[0] - forced[0]).abs().max() > 100 * 1e-4


def test_an_overfitted_clip_is_spoken_back_exactly_and_stops_by_itself() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    with_training_forward(model)
    made = clips(prompter)
    batch = pack([example for example, _, _ in made])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    counts = label_counts(batch, eos_id=CODES + 1)
    for _ in range(150):
        loss = combine(model(**batch), counts, LossWeights(text=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    spoken = generate(model, [prompt for _, prompt, _ in made], max_frames=[40] * 3, seeds=[0] * 3, sampling=GREEDY)
    for clip, (_, _, target) in zip(spoken, made, strict=True):
        np.testing.assert_array_equal(clip.codes, target)
        assert not clip.hit_cap
    alone = generate(model, [made[1][1]], max_frames=[40], seeds=[0], sampling=GREEDY)[0]
    np.testing.assert_array_equal(alone.codes, made[1][2])


def sampler(sampling: Sampling, *, max_frames: int = 5, seed: int = 3) -> RowSampler:
    made = RowSampler(spec_of(tiny_config(tiny_tokenizer(), codes=32)), 1)
    made.admit(0, sampling, max_frames=max_frames, seed=seed)
    return made


def test_rows_follow_the_delay_pattern_and_the_cap_ends_a_clip() -> None:
    drawn = sampler(Sampling())
    generator = torch.Generator().manual_seed(0)
    while not drawn.finished[0]:
        logits = torch.randn(1, 8, 34, generator=generator)
        logits[..., 33] = -20.0  # never ends by itself
        drawn.step(logits)
    assert drawn.hit_cap[0]
    rows = drawn.rows_of(0)
    codes = np.stack([rows[1 + k : 6 + k, k] for k in range(8)], axis=1)
    np.testing.assert_array_equal(rows, build_frames(codes, bos_id=32, eos_id=33)[0])


@pytest.mark.parametrize("codebook", [0, 3, 7])
def test_the_first_eos_of_any_codebook_fixes_the_end_as_training_has_it(codebook: int) -> None:
    drawn = sampler(GREEDY, max_frames=50)
    while not drawn.finished[0]:
        logits = torch.zeros(1, 8, 34)
        logits[..., 7] = 1.0
        if drawn.count[0] == 12:
            logits[0, codebook, 33] = 2.0
        drawn.step(logits)
    frames = 12 - 1 - codebook
    assert not drawn.hit_cap[0]
    rows = drawn.rows_of(0)
    assert len(rows) == frames + 9
    for k in range(8):
        first_eos = int((rows[:, k] == 33).argmax())
        # A codebook that was ahead of the one that ended has said a little more, which is trimmed.
        assert first_eos == max(frames + 1 + k, 12 if k < codebook else 0)
        assert (rows[first_eos:, k] == 33).all()
    assert drawn.codes(0).shape == codes_from_frames(rows, eos_id=33).shape == (frames, 8)


def test_repetition_aware_sampling_limits_repeats_but_not_greedy_nor_the_end() -> None:
    likely = torch.zeros(1, 8, 34)
    likely[..., 5] = 4.0  # two draws in three give code 5; top-p 0.5 leaves nothing else
    likely[..., 33] = -30.0

    def share_of_code_5(sampling: Sampling) -> float:
        drawn = sampler(sampling, max_frames=200)
        while not drawn.finished[0]:
            drawn.step(likely)
        return float((drawn.rows_of(0)[10:200, 0] == 5).mean())

    assert share_of_code_5(Sampling(top_p=0.5, repeat_window=0)) == 1.0
    assert share_of_code_5(Sampling(temperature=0)) == 1.0
    assert share_of_code_5(Sampling(temperature=5e-324)) == 1.0
    assert share_of_code_5(Sampling(top_p=5e-324, repeat_window=0)) == 1.0
    assert 0.4 < share_of_code_5(Sampling(top_p=0.5)) < 0.85  # drawn anew, from all codes


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities [V] of one draw, the plain way."""
    scores = scores.double() / sampling.temperature
    if sampling.top_k:
        scores[scores < scores.topk(min(sampling.top_k, len(scores))).values[-1]] = -torch.inf
    ordered, order = scores.softmax(-1).sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < sampling.top_p
    return torch.zeros_like(scores).scatter(0, order, ordered * kept) / ordered[kept].sum()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 1.0), Sampling(1.4, 0, 0.6), Sampling(1.0, 0, 1.0)])
def test_codes_are_drawn_as_often_as_temperature_top_k_and_top_p_say(sampling: Sampling) -> None:
    sampling = dataclasses.replace(sampling, repeat_window=0)
    logits = 2 * torch.randn(34, generator=torch.Generator().manual_seed(1))
    logits[33] = -30.0
    drawn = RowSampler(spec_of(tiny_config(tiny_tokenizer(), codes=32)), 20)
    for slot in range(20):
        # Beside others, whose settings do not count.
        drawn.admit(slot, sampling if slot else Sampling(0.1, 1), max_frames=400, seed=slot)
    while not drawn.finished.all():
        drawn.step(logits.expand(20, 8, 34))
    codes = np.concatenate([drawn.codes(slot).ravel() for slot in range(1, 20)])
    found = torch.from_numpy(np.bincount(codes, minlength=34))
    logits[32] = -torch.inf
    expected = filtered(logits, sampling)
    assert (found[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / found.sum()).sqrt()
    assert ((found / found.sum() - expected).abs() < 4.5 * deviation + 1e-12).all()


def test_a_seed_repeats_a_clip_whatever_stands_beside_it_in_the_batch() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    prompts = [prompt for _, prompt, _ in clips(prompter)]
    together = generate(model, prompts, max_frames=[12] * 3, seeds=[1, 2, 3])
    alone = generate(model, prompts[2:], max_frames=[12], seeds=[3])
    np.testing.assert_array_equal(together[2].codes, alone[0].codes)
    other = generate(model, prompts[2:], max_frames=[12], seeds=[4])
    assert other[0].codes.shape != alone[0].codes.shape or (other[0].codes != alone[0].codes).any()


def jobs_of(prompts: list[Example], adapters: Sequence[str] = ("",), frames: int = 30) -> list[Job]:
    """Greedy clips of unequal length: each prompt with each adapter."""
    return [
        Job(prompt, frames - 7 * index, seed=0, sampling=GREEDY, adapter=adapter)
        for index, prompt in enumerate(prompts)
        for adapter in adapters
    ]


def own_forward(model: Any, job: Job) -> np.ndarray:
    """The clip alone, by the model's own forward."""
    alone = Engine(model, slots=1, sync_logits=lambda logits: logits)
    return alone.generate([dataclasses.replace(job, adapter="")])[0].codes


def test_clips_that_join_and_leave_say_what_each_says_alone_by_the_models_own_forward() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    prompts = [prompt for _, prompt, _ in clips(prompter)]
    waiting = jobs_of(prompts) * 2 + jobs_of(prompts, frames=300)  # so long that the cache must grow
    waiting = [dataclasses.replace(job) for job in waiting]
    for live in (False, True):
        engine = Engine(model, slots=4, live=live)
        given_up = dataclasses.replace(waiting[0])
        queue = list(waiting)
        engine.insert([given_up, queue.pop(), queue.pop()])
        for _ in range(3):
            assert engine.step() == []
        engine.remove(given_up)
        found = dict(engine.run(lambda free, queue=queue: [queue.pop() for _ in range(min(free, len(queue), 2))]))
        assert engine.speaking == 0
        assert found.keys() == set(waiting)
        for job in waiting:
            np.testing.assert_array_equal(found[job].codes, own_forward(model, job))


VOICES: dict[str, dict[str, Any]] = {
    **{f"rank {r}": {"r": r, "rslora": r > 2} for r in (1, 2, 3, 8)},
    **{f"seed {seed}": {"seed": seed} for seed in range(11)},
    "text alone": {"kind": "text"},
}


def test_each_row_of_a_batch_speaks_with_its_own_adapter() -> None:
    base, prompter = tiny_prompter(codes=CODES)
    prompts = [prompt for _, prompt, _ in clips(prompter)]
    engine = Engine(base, slots=24)
    for name, settings in VOICES.items():
        adapted = with_random_lora(base, **settings)
        engine.add_adapter(name, lora_of(adapted))
        unload_adapter(adapted)
    jobs = jobs_of(prompts, ("", *VOICES))
    found = engine.generate(jobs)
    said = set()
    for name in ("", *VOICES):
        model = tiny_prompter(codes=CODES)[0]
        model = with_random_lora(model, **VOICES[name]) if name else model
        for job, clip in zip(jobs, found, strict=True):
            if job.adapter == name:
                np.testing.assert_array_equal(clip.codes, own_forward(model, job))
                said |= {clip.codes.tobytes()}
    assert len(said) == len(jobs)  # another adapter says something else
    engine.insert(jobs[:2])
    with pytest.raises(InputError, match=f"adapter {jobs[1].adapter} is speaking"):
        engine.remove_adapter(jobs[1].adapter)
    engine.remove(jobs[1])
    engine.remove_adapter(jobs[1].adapter)
    with pytest.raises(InputError, match=f"no adapter '{jobs[1].adapter}' was added"):
        engine.insert(jobs[1:2])


@pytest.mark.parametrize("live", [False, True])
def test_what_rows_cannot_choose_is_refused_as_an_adapter_and_spoken_as_the_model(live: bool) -> None:
    base, prompter = tiny_prompter(codes=CODES)
    adapted = with_random_lora(base, dora=True)
    [job, *_] = jobs_of([clips(prompter)[0][1]])
    with pytest.raises(CheckpointError, match="DoRA"):
        lora_of(adapted)
    np.testing.assert_array_equal(Engine(adapted, live=live).generate([job])[0].codes, own_forward(adapted, job))


class Operators(TorchDispatchMode):
    """Counts operators, without those that only look at memory another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function.__name__ != "_unsafe_view.default":
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_value_and_computes_what_is_needed_once() -> None:
    config = tiny_config(tiny_tokenizer(), codes=CODES)
    config.num_hidden_layers = 28
    model = tiny_model(config)
    prompter = tiny_prompter(codes=CODES)[1]
    prompts = [clips(prompter)[index % 3][1] for index in range(8)]
    counted = {}
    for adapters in (("",), ("anna", "ben")):
        engine = Engine(model, slots=8)
        for seed, name in enumerate(adapters):
            if name:
                adapted = with_random_lora(model, seed=seed)
                engine.add_adapter(name, lora_of(adapted))
                unload_adapter(adapted)
        engine.insert([Job(prompt, 40, 0, Sampling(), adapters[i % len(adapters)]) for i, prompt in enumerate(prompts)])
        engine.advance()
        with Operators() as operators:
            engine.advance()
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "item", "_to_copy", "index.")

        assert [name for name in operators.names if name.startswith(waits)] == []
        counted[len(adapters)] = len(operators.names)
    assert counted[1] <= 550
    assert counted[2] <= 750


def test_what_prompts_begin_with_is_read_once() -> None:
    model, prompter = tiny_prompter(codes=CODES)
    reference = random_codes(40, seed=5, codes=CODES)
    texts = ("The sun rises.", "Good morning, everybody.", "It was the night before my birthday.", "Hello.")
    prompts = [
        prompter.prompt(speech_messages(text, context=[("Good day.", "reference.wav")]), [reference]) for text in texts
    ]
    other = random_codes(40, seed=6, codes=CODES)
    prompts.append(prompter.prompt(speech_messages(texts[0], context=[("Good day.", "reference.wav")]), [other]))
    jobs = jobs_of(prompts, ("", "anna")) + jobs_of(prompts[:1], ("anna", ""))  # twice, under another adapter first
    engine, fed = Engine(model, slots=3), []
    for seed in (1, 2):
        adapted = with_random_lora(model, seed=seed)
        engine.add_adapter("anna", lora_of(adapted))
        unload_adapter(adapted)
        watched = engine._stack._parts.embed_text
        engine._stack._parts = dataclasses.replace(
            engine._stack._parts, embed_text=lambda ids, watched=watched: (fed.append(len(ids)), watched(ids))[1]
        )
        for job, clip in zip(jobs, engine.generate(jobs), strict=True):
            own = with_random_lora(tiny_prompter(codes=CODES)[0], seed=seed) if job.adapter else model
            np.testing.assert_array_equal(clip.codes, own_forward(own, job))
        assert sum(fed) < 0.5 * sum(len(job.prompt) for job in jobs)
        fed.clear()
        engine.remove_adapter("anna")  # the next one of this name has other keys
    assert 0 < engine._stack._prefixes.bytes <= 1 << 28


def test_the_prefixes_not_used_for_the_longest_leave_first() -> None:
    _, prompter = tiny_prompter(codes=CODES)
    prompts = [
        prompter.prompt(
            speech_messages("Hello.", scene=None, context=[(str(i) * 40, "x")]), [random_codes(30, seed=i, codes=CODES)]
        )
        for i in range(4)
    ]
    cache = torch.randn(2, 400, 4, 8)
    size = cache[:, : len(prompts[0])].nbytes
    kept = Prefixes(2 * size + size // 2)
    for index, prompt in enumerate(prompts[:3]):
        kept.keep(prompt, 0, cache, "")
        if index < 2:
            assert kept.copy(prompts[0], cache.clone(), "") == len(prompts[0])
    assert kept.copy(prompts[1], cache.clone(), "") < len(prompts[1])  # used before the first one was
    into = torch.zeros_like(cache)
    assert kept.copy(prompts[2], into, "") == len(prompts[2])
    torch.testing.assert_close(into[:, : len(prompts[2])], cache[:, : len(prompts[2])])
    assert kept.copy(prompts[2], into, "anna") == 0
    assert kept.bytes <= 2 * size + size // 2
    kept.forget("")
    assert (kept.bytes, kept.copy(prompts[2], into, "")) == (0, 0)
