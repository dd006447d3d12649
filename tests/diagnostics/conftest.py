"""A healthy setup, and copies of it to plant faults in."""

import shutil
from pathlib import Path

import pytest
from doctor_world import ASSETS, prepare, save_adapter


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with its codec, a small store of a voice that it does not know, and an adapter."""
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(ASSETS / "base", folder / "base")
    shutil.copytree(ASSETS / "codec", folder / "base" / "codec")
    shutil.copytree(ASSETS / "voices", folder / "voices")
    prepare(folder, folder / "data", folder / "base" / "codec")
    save_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    """A copy of the base to plant faults in."""
    return shutil.copytree(world / "base", tmp_path / "base")


@pytest.fixture
def adapter(world: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to plant faults in."""
    return shutil.copytree(world / "adapter", tmp_path / "adapter")
