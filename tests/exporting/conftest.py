"""A base and adapters that need no training: what is merged and exported."""

from pathlib import Path

import pytest
from export_world import make_adapter, make_world, whisper_spec_of
from on_cpu import CPU

from higgstune import export
from higgstune.families.base import Conditioning


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a store with Whisper features, a plain adapter and one with both extensions."""
    folder = make_world(tmp_path_factory.mktemp("merge"), whisper=True)
    make_adapter(folder, folder / "plain" / "adapter")
    both = Conditioning(audio_attention=True, whisper=whisper_spec_of(folder))
    make_adapter(folder, folder / "both" / "adapter", conditioning=both)
    return folder


@pytest.fixture(scope="session")
def merged(world: Path) -> Path:
    """The plain adapter, merged with all defaults."""
    return export(world / "plain" / "adapter", world / "merged", base=CPU).folder
