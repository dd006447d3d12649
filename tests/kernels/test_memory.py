"""What the allocator keeps unused is given back where layers leave holes, and nowhere else."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import adapted, examples
from torch import nn

from higgstune.batch.collate import pack
from higgstune.config.recipe import Lora
from higgstune.families.base import base_of
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels import memory as heap
from higgstune.kernels.memory import checkpoint_first
from higgstune.model.compiled import packed_loss


def test_a_training_step_trims_what_layers_that_are_not_plain_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: given.append)
    monkeypatch.setattr(heap, "MIN_BYTES_TO_TRIM", 1000)
    for lora, times in ((Lora(r=4, dropout=0.1), 1), (Lora(r=4, dora=True), 1), (Lora(r=4), 0)):
        model, prompter = adapted("full", torch.float32, lora=lora)
        with_training_forward(base_of(model))
        batch = pack(examples(prompter))
        packed_loss(model, batch).backward()
        assert len(given) == times
        with torch.no_grad():
            packed_loss(model, batch)
        monkeypatch.setattr(heap, "MIN_BYTES_TO_TRIM", 10**9)
        packed_loss(model, batch)
        monkeypatch.setattr(heap, "MIN_BYTES_TO_TRIM", 1000)
        assert len(given) == times
        given.clear()


def test_a_gpu_has_another_allocator() -> None:
    model, _ = adapted("full", torch.float32, lora=Lora(r=4, dropout=0.1))
    hidden = torch.ones(1000, 1000)
    assert heap.leaves_holes(hidden, base_of(model).model.layers)
    assert not heap.leaves_holes(hidden.to("meta"), base_of(model).model.layers)


@pytest.mark.parametrize(("again", "after"), [(0, [8, 16, 18]), (18, [4, 8, 12, 16, 18]), (6, [4, 8, 16, 18])])
def test_some_layers_and_the_last_trim_the_heap(again: int, after: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    layers = nn.ModuleList([nn.Module() for _ in range(18)])
    checkpoint_first(layers, again)
    monkeypatch.setattr(heap, "_malloc_trim", lambda: lambda _: given.append(done))
    for done in range(1, 19):
        heap.trim_heap(layers, done)
    assert given == after
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.trim_heap(layers, 18)  # another library than glibc's


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone")
def test_free_pages_return_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(100_000) for _ in range(2000)]  # small enough for the heap itself
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces[::2]:
        libc.free(piece)
    before = _resident()
    layers = nn.ModuleList([nn.Module()])
    checkpoint_first(layers, 0)
    heap.trim_heap(layers, 1)
    assert before - _resident() > 80_000_000
    for piece in pieces[1::2]:
        libc.free(piece)


def _resident() -> int:
    status: Any = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024
