"""From a name to a folder: a local path as it is, a hub id through the hub's own cache."""

import re
from pathlib import Path

from higgstune.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as safetensors only: a pickle from a stranger runs code when it is loaded.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
_WEIGHTS = ["*.safetensors"]


def local_folder(name_or_path: str | Path, *, what: str) -> Path | None:
    """The folder of a checkpoint, an adapter or a codec on this disk; None for what can only be a hub id.

    Raises CheckpointError when it is a file, or neither a folder nor spelt like a hub id.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if not name:
        raise CheckpointError(f"the {what} has an empty name: give a folder or a hub id such as owner/name")
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"the {what} {name} is a file: name the folder that holds it")
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"the {what} {name} cannot be read: {error.strerror}") from error
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"the {what} {name} does not exist: give a folder or a hub id such as owner/name")
    return None


def fetch(
    name_or_path: str | Path,
    *,
    what: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint, an adapter or a codec (`what` names it in errors), with or without its weights.

    Raises CheckpointError, with what to do, when it is neither a local folder nor a repository that can be fetched.
    """
    folder, name = local_folder(name_or_path, what=what), str(name_or_path)
    if folder is not None:
        return folder
    # Imported here, not above: a wrong path is refused without the hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = _SMALL_FILES + (_WEIGHTS if weights else [])
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=files))
    except GatedRepoError as error:
        raise CheckpointError(
            f"the {what} {name} is gated: accept its licence on its page at the hub, then log in with "
            "`hf auth login` (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the {what} {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the {what} {name} is neither a local folder nor a repository at the hub that this login can see: "
            "check the spelling; a private one needs `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"the {what} {name} is neither a local folder nor a valid hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"the {what} {name} is neither a local folder nor in the hub's cache, and the hub could not be reached: "
            f"download it where there is a network (`hf download {name}`) and give its folder [{error}]"
        ) from error


def check_name(name_or_path: str | Path, *, what: str) -> None:
    """Raise CheckpointError for a name that is neither a folder nor spelt like a hub id; the hub is not contacted."""
    if not _HUB_ID.fullmatch(str(name_or_path)):
        fetch(name_or_path, what=what)
