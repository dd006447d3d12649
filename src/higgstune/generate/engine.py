"""Speaks many clips at once: each has a slot, joins while others speak, and leaves when it ends.

The engine knows tokens, rows of codes and slots; nothing of text, files or adapters' names. A clip depends on its own
prompt, settings and seed alone, up to the rounding of batched arithmetic. Two ways compute the logits:

- `Stack`, a forward of our own with a cache of fixed size, for every model that the family takes apart into
  `DecoderParts`: from copies of its weights, merged and laid out for speed, or from the modules themselves (a model in
  training, 4 bits, DoRA).
- The family's `Decoder`, the model's own forward: for other architectures, and for several processes that run one model
  together. Its clips begin together, and a new one waits until all have ended.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from higgstune.environment import free_memory
from higgstune.errors import CheckpointError, InputError
from higgstune.families import family_of
from higgstune.families.base import Decoder, Example, base_of
from higgstune.families.sampling import Sampling
from higgstune.generate.stack import Stack

SLOTS = 8
_REFILL = 4  # a quarter of the slots must be free before prompts are read


@dataclass(frozen=True)
class Generated:
    """One generated clip."""

    codes: NDArray[np.int64]  # [frames, K]
    hit_cap: bool  # the frame cap ended it, not the model


@dataclass(frozen=True, eq=False)
class Job:
    """A clip to speak: its prompt (see `Prompter.prompt`), at most `max_frames` long."""

    prompt: Example
    max_frames: int
    seed: int
    sampling: Sampling
    adapter: str = ""  # of those added to the engine; "": the model as it is


class Engine:
    """A model that speaks. `model` is a loaded model or a peft model around one, in eval mode."""

    def __init__(
        self,
        model: Any,
        *,
        slots: int = SLOTS,
        live: bool = False,
        sync_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`slots` is the most clips at once. A `live` engine makes no copies and speaks with the weights as they are at
        each step, as training needs; others copy what fits into memory, once.

        If several processes run one model together, `sync_logits` gives all of them the logits of one. Otherwise a
        rounding difference would make them draw different codes, and one would stop while the others wait for it.
        """
        self._model, self._sync = model, sync_logits
        self._family, self._device = family_of(model), next(model.parameters()).device
        self._spec = self._family.spec(base_of(model).config)
        self._jobs: list[Job | None] = []  # of slots 0, 1, ...; None: given up, but its neighbours still need its place
        self._rows = torch.empty(0)  # [n, K] the last row of each
        self._adapters = {""}
        self._state = _state_of(model)
        self.slots = slots
        with torch.inference_mode():
            self._sampler = self._family.sampler(self._spec, slots, self._device)
            parts = None if sync_logits is not None else self._family.decoder_parts(model)
            self._stack = None
            if parts is not None:
                self._stack = Stack(parts, self._spec, slots, copy=not live and _fits(model))
        self._decoder: Decoder | None = None  # of the model's own forward

    @property
    def speaking(self) -> int:
        """Clips in work."""
        return len(self._jobs)

    @property
    def free(self) -> int:
        """Clips that `insert` takes now."""
        return 0 if self._jobs and self._stack is None else self.slots - len(self._jobs)

    @property
    def outdated(self) -> bool:
        """Whether the model has changed since its weights were copied: in place, or which of its adapters count."""
        return self._state != _state_of(self._model)

    def add_adapter(self, name: str, lora: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """LoRA that clips may name: A [r, in] and B [out, r], scaled, of linear layers of the model.

        Raises CheckpointError for a model that speaks by its own forward, and for layers outside the decoder layers.
        """
        if self._stack is None:
            raise CheckpointError("this model speaks by its own forward, which takes one adapter for all clips")
        self._stack.add_adapter(name, lora)
        self._adapters.add(name)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InputError while a clip is spoken with it."""
        if any(job is not None and job.adapter == name for job in self._jobs):
            raise InputError(f"the adapter {name} is speaking: wait until its clips have ended")
        self._adapters.discard(name)
        if self._stack is not None:
            self._stack.remove_adapter(name)

    @torch.inference_mode()
    def insert(self, jobs: Sequence[Job]) -> None:
        """Read the prompts of clips, at most `free`, and draw their first rows.

        Raises InputError for an adapter that was not added.
        """
        assert 0 < len(jobs) <= self.free
        if unknown := {job.adapter for job in jobs} - self._adapters:
            raise InputError(f"no adapter {unknown.pop()!r} was added")
        jobs = sorted(jobs, key=lambda job: job.adapter)
        first = len(self._jobs)
        for slot, job in enumerate(jobs, first):
            self._sampler.admit(slot, job.sampling, max_frames=job.max_frames, seed=job.seed)
        if self._stack is not None:
            logits = self._read(jobs, first, self._stack)
        else:
            self._decoder = decoder = self._family.decoder(self._model, [job.prompt for job in jobs])
            logits = decoder.step(self._sampler.rows[: len(jobs), 0]) if decoder.logits is None else decoder.logits
        self._jobs += jobs
        self._draw(logits, first)

    @torch.inference_mode()
    def step(self) -> list[tuple[Job, Generated]]:
        """Draw the next row of every clip in work; the clips that have ended, which leave their slots."""
        ended = [slot for slot, done in enumerate(self._sampler.finished[: len(self._jobs)].tolist()) if done]
        if self._stack is None and len(ended) < len(self._jobs):
            ended = []  # clips that began together leave together
        found = [
            (job, Generated(self._sampler.codes(slot), bool(self._sampler.hit_cap[slot])))
            for slot in ended
            if (job := self._jobs[slot]) is not None
        ]
        for slot in reversed(ended):
            self._leave(slot)
        if self._jobs:
            self.advance()
        return found

    def frames(self, job: Job) -> int:
        """How many frames `codes` has at least."""
        return int(self._sampler.count[self._jobs.index(job)]) - self._spec.extra_rows

    def codes(self, job: Job) -> NDArray[np.int64]:
        """The frames so far [T, K] of a clip in work."""
        return self._sampler.codes(self._jobs.index(job))

    def remove(self, job: Job) -> None:
        """Give up a clip, unless it has ended."""
        if job not in self._jobs:
            return
        slot = self._jobs.index(job)
        with torch.inference_mode():
            if self._stack is not None:
                self._leave(slot)
            else:
                self._jobs[slot], self._sampler.finished[slot] = None, True
                if not any(self._jobs):
                    self._jobs = []

    @torch.inference_mode()
    def advance(self) -> None:
        """Draw the next row of every clip in work, without a look at it."""
        if self._stack is not None:
            self._stack.select([job.adapter for job in self._jobs if job is not None])
        decoder = self._decoder if self._stack is None else self._stack
        assert decoder is not None
        self._draw(decoder.step(self._rows), 0)

    def run(
        self, more: Callable[[int], Sequence[Job]], on_row: Callable[[], None] | None = None
    ) -> Iterator[tuple[Job, Generated]]:
        """Speak the clips that `more(n)` gives, at most n, whenever slots are free, until there are none left; each is
        yielded when it has ended. `on_row` is called after each row.
        """
        while True:
            # Several prompts are read together for little more than the time of one.
            if self.free >= self.slots // _REFILL or not self._jobs:
                if jobs := more(self.free):
                    self.insert(jobs)
                elif not self._jobs:
                    return
            yield from self.step()
            if on_row is not None:
                on_row()

    def generate(self, jobs: Sequence[Job], on_row: Callable[[], None] | None = None) -> list[Generated]:
        """Speak clips, as many at once as there are slots; in their order."""
        waiting = list(reversed(jobs))
        found = dict(self.run(lambda free: [waiting.pop() for _ in range(min(free, len(waiting)))], on_row))
        return [found[job] for job in jobs]

    def _read(self, jobs: Sequence[Job], slot: int, stack: Stack) -> Tensor:
        stack.reserve(max(len(job.prompt) for job in jobs) + self._sampler.rows.shape[1])
        logits = []
        for adapter, group in groupby(jobs, key=lambda job: job.adapter):
            prompts = [job.prompt for job in group]
            stack.select([adapter])
            # The first one alone: the others may begin as it does.
            for part in (prompts[:1], prompts[1:]):
                if part:
                    logits.append(stack.prefill(part, self._sampler.start, slot, adapter))
                    slot += len(part)
        return torch.cat(logits)

    def _draw(self, logits: Tensor, first: int) -> None:
        if self._sync is not None:
            logits = self._sync(logits.float().cpu()).to(self._device)
        rows = self._sampler.step(logits, first)
        self._rows = torch.cat((self._rows[:first], rows)) if first else rows

    def _leave(self, slot: int) -> None:
        last = len(self._jobs) - 1
        if slot < last and self._stack is not None:
            self._sampler.move(last, to=slot)
            self._stack.move(last, to=slot)
            self._jobs[slot], self._rows[slot] = self._jobs[last], self._rows[last]
        self._jobs.pop()
        self._rows = self._rows[:last]


def generate(
    model: Any,
    prompts: Sequence[Example],
    *,
    max_frames: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_row: Callable[[], None] | None = None,
    sync_logits: Callable[[Tensor], Tensor] | None = None,
) -> list[Generated]:
    """Speak prompts all at once, with an engine for this call alone: see `Engine`."""
    jobs = [
        Job(prompt, cap, seed, sampling or Sampling())
        for prompt, cap, seed in zip(prompts, max_frames, seeds, strict=True)
    ]
    return Engine(model, slots=len(jobs), sync_logits=sync_logits).generate(jobs, on_row)


@torch.inference_mode()
def forced_logits(model: Any, prompts: Sequence[Example], rows: Sequence[NDArray[np.int64]]) -> list[Tensor]:
    """The logits [R - 1, K, V], or [R, K, V] where the family draws the first row, with which generation would draw
    rows [R, K] of clips that are all fed to it, on the CPU in float32.
    """
    family = family_of(model)
    spec, device = family.spec(base_of(model).config), next(model.parameters()).device
    start, parts = family.sampler(spec, 0, device).start, family.decoder_parts(model)
    if parts is None:
        decoder: Any = family.decoder(model, prompts)
        found = [] if decoder.logits is None else [decoder.logits]
    else:
        decoder = Stack(parts, spec, len(prompts), copy=_fits(model))
        decoder.reserve(max(map(len, prompts)) + max(map(len, rows)))
        found = [decoder.prefill(prompts, start, 0)]
    fed = len(found) if start is not None else len(found) - 1
    longest = max(map(len, rows))
    padded = torch.stack([torch.from_numpy(np.pad(clip, ((0, longest - len(clip)), (0, 0)))) for clip in rows])
    for row in range(fed, longest - 1):
        found.append(decoder.step(padded[:, row].to(device)))
    drawn = [len(clip) - (start is not None) for clip in rows]
    return [torch.stack([logits[b] for logits in found[:count]]).float().cpu() for b, count in enumerate(drawn)]


def _state_of(model: Any) -> list[Any]:
    weights = [(id(part), None if part.is_inference() else part._version) for part in model.parameters()]
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    return [*weights, *((layer.disable_adapters, layer.merged, tuple(layer.active_adapters)) for layer in layers)]


def _fits(model: Any) -> bool:
    """Whether memory has room for copies of a model's weights, and as much again for the caches."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return 2 * needed < free_memory(next(model.parameters()).device)
