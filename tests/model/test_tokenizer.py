"""The prompter without weights: by config.json alone where that is enough, with the same ids as by the whole family."""

import json
from pathlib import Path
from typing import Any

import pytest
from golden_values import Golden
from tiny_checkpoint import save_tiny_checkpoint
from transformers import AutoTokenizer

from higgstune.errors import CheckpointError
from higgstune.families import family_in, load_family, read_prompter
from higgstune.families.higgs_v2.prompter import Prompter
from higgstune.model.tokenizer import load_prompter, read_tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def whole(folder: Path) -> Any:
    """The prompter by the family's code."""
    family = load_family(family_in(folder)[0])
    return family.prompter(read_tokenizer(folder), family.read_config(folder))


def by_file(folder: Path) -> Any:
    """The prompter by config.json alone, or None."""
    info, _, written = family_in(folder)
    return read_prompter(info, read_tokenizer(folder), written, folder)


def test_config_json_alone_gives_the_same_ids(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    found = by_file(folder)
    assert isinstance(found, Prompter)
    assert found.ids == whole(folder).ids
    assert found.whisper_token_id == whole(folder).whisper_token_id


def test_the_rest_is_read_by_the_familys_code(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    edit(folder / "config.json", num_codebooks=None)  # its default is transformers' own
    assert by_file(folder) is None
    found: Any = load_prompter(folder)
    assert found.ids == whole(folder).ids
    original = Golden("base").save_original_checkpoint(tmp_path / "original")
    info, _, written = family_in(original)
    assert read_prompter(info, read_tokenizer(folder), written, original) is None


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    edit(folder / "config.json", audio_token_id=3)
    with pytest.raises(CheckpointError, match="not of the same checkpoint"):
        load_prompter(folder)


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_the_tokenizer_is_the_one_that_transformers_reads(tmp_path: Path, name: str | None) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    found, expected = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
