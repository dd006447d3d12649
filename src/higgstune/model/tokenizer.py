"""A checkpoint's tokenizer and prompter, without its weights: what a prompt looks like is shown without torch."""

from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json
from higgstune.errors import CheckpointError
from higgstune.families import family_in, load_family, read_prompter
from higgstune.families.base import Prompter
from higgstune.hub import fetch

# Names of classes that read tokenizer.json as it is.
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def load_prompter(checkpoint: str | Path) -> Prompter:
    """The prompter of a checkpoint, without its weights. Raises CheckpointError."""
    folder = fetch(checkpoint, what="checkpoint", weights=False)
    info, _, written = family_in(folder)
    tokenizer = read_tokenizer(folder)
    found = read_prompter(info, tokenizer, written, folder)
    if found is not None:
        return found
    family = load_family(info)
    config = family.read_config(folder)
    family.check_tokenizer(tokenizer, config, folder)
    return family.prompter(tokenizer, config)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder, as transformers reads it. Raises CheckpointError."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing: the tokenizer belongs to the checkpoint")
    settings = read_json(folder / "tokenizer_config.json", "") if (folder / "tokenizer_config.json").exists() else {}
    # transformers would read a file named here instead of the folder's own. It never reads special_tokens_map_file.
    files = [key for key in settings if key.endswith("_file") and key != "special_tokens_map_file"]
    if named := [key for key in files if settings[key] is not None]:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} names a file by {named[0]}: remove the key")
    try:
        return _class_of(settings).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers has nothing narrower
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _class_of(settings: dict[str, Any]) -> Any:
    """The class that AutoTokenizer of transformers 5.23 takes for a model type that has none of its own."""
    if settings.get("tokenizer_class") in _GENERIC and "auto_map" not in settings:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer  # imports torch

    return AutoTokenizer
