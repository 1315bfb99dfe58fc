"""Download a model from a Hugging Face hub, and upload an exported folder, through ``huggingface_hub``.

``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` apply, as in every program that uses this library.
Nothing is downloaded unless the user writes ``hf://ORG/NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mmscale.errors import CheckpointError, ConfigError
from mmscale.hf.read import COMPANION_FILES, CONFIG, INDEX

SCHEME = "hf://"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (CONFIG, INDEX, "model.safetensors", "model-*-of-*.safetensors", *COMPANION_FILES)
"""Files that an import reads. Other formats of the weights are not downloaded."""


def local_folder(source: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """Return the folder that the user named: a path, or the cached copy of ``hf://ORG/NAME``, downloaded if necessary.

    Args:
        source: A folder, or ``hf://ORG/NAME``.
        revision: Branch, tag or commit on the hub; None for the main branch.
        say: Called with a sentence before a download.

    Raises:
        CheckpointError: there is no such folder, or the hub does not give the model.
        ConfigError: ``huggingface_hub`` is not installed, the name is malformed, or ``revision`` is given for a folder.
    """
    if not source.startswith(SCHEME):
        if revision is not None:
            raise ConfigError(f"--revision {revision}: only for a model on a hub, {SCHEME}ORG/NAME")
        if not Path(source).exists():
            hint = f"; to download it from the hub, write {SCHEME}{source}" if _NAME.fullmatch(source) else ""
            raise CheckpointError(f"{source}: no such folder{hint}")
        return Path(source)
    name = _checked(source.removeprefix(SCHEME))
    hub = _library()
    where = f"{name}{'' if revision is None else f' ({revision})'}"
    if hub.constants.HF_HUB_OFFLINE:
        say(f"reading {where} from the cache {hub.constants.HF_HUB_CACHE}, since HF_HUB_OFFLINE is set")
    else:
        say(f"downloading {where} from {hub.constants.ENDPOINT} to {hub.constants.HF_HUB_CACHE}")
    with _errors(hub, name):
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))


def push_folder(folder: Path, name: str, say: Callable[[str], None]) -> str:
    """Upload a folder to a repository of the hub and return the URL of the commit. A new repository is private.

    Raises:
        CheckpointError: the hub does not accept the upload.
        ConfigError: ``huggingface_hub`` is not installed, or the name is malformed.
    """
    hub = _library()
    name = _checked(name.removeprefix(SCHEME))
    say(f"uploading {folder} to {hub.constants.ENDPOINT}/{name}")
    with _errors(hub, name):
        api = hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of mmscale").commit_url)


def check_name(name: str) -> None:
    """Raise before expensive work if an upload to ``name`` cannot begin.

    Raises:
        ConfigError: ``huggingface_hub`` is not installed, or the name is malformed.
    """
    _checked(name.removeprefix(SCHEME))
    _library()


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name}: not the name of a model on a hub; write ORG/NAME")
    return name


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise ConfigError("a hub needs huggingface_hub: pip install 'mmscale[hub]'") from error
    return huggingface_hub


@contextmanager
def _errors(hub: ModuleType, name: str) -> Iterator[None]:
    """Turn the errors of the library and of the network into one sentence with a remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: {hub.constants.ENDPOINT} cannot be reached, or HF_HUB_OFFLINE is set, and the cache "
            f"{hub.constants.HF_HUB_CACHE} has no complete copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no such revision on {hub.constants.ENDPOINT}; check --revision") from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise CheckpointError(
            f"{name}: no such model on {hub.constants.ENDPOINT}, or you have no access to it; check the name, accept "
            "the model's terms on its page, and log in with `hf auth login` or HF_TOKEN"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{name}: {hub.constants.ENDPOINT} answered with an error: {first:.300}") from error
