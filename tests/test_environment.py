"""Devices that are named, and versions that are installed."""

import pytest
import torch

from higgstune.environment import choose_device, find_wrong_versions
from higgstune.errors import ConfigError


@pytest.mark.parametrize("device", ["mps", "xpu:3", "cuda:99", torch.device("mps")])
def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, device: str | torch.device) -> None:
    for kind in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"is not available: PyTorch .* sees no (MPS|XPU|CUDA) device here"):
        choose_device(device)


@pytest.mark.parametrize("device", ["meta", "toaster", "hpu"])
def test_a_device_that_cannot_compute_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        choose_device(device)


def test_a_number_of_the_cpu_means_nothing() -> None:
    assert choose_device("cpu:9").type == "cpu"


def test_all_versions_fit_here() -> None:
    assert find_wrong_versions() == []
