"""Where a model lies: a directory, a GGUF file, or a hub id with the commit it is pinned to."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qklens.errors import QklensError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@/\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = ["*.json", "model*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]


def locate_model(name: str) -> Path:
    """The directory or GGUF file that a name means.

    Args:
        name: a path, or `owner/name@<40-hex commit>` on the hub. A hub model comes from the local cache if it is there;
            with `HF_HUB_OFFLINE=1` nothing else is tried. Without a commit the newest one is taken, with a warning:
            a branch can change under a study.

    Raises:
        QklensError: neither a path nor a hub id, a revision that is no commit, or a model that cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise QklensError(
            f"{name}: no such model directory but a file; expected a directory with config.json and *.safetensors, or "
            "a .gguf file"
        )
    found = _HUB_ID.fullmatch(name)
    if found is None or name.startswith((".", "/", "~")):
        raise QklensError(
            f"{name}: no such model directory; expected a directory with config.json and *.safetensors, a .gguf file, "
            "a hub id owner/name@<40-hex commit>, or 'organism'"
        )
    revision = found["revision"]
    if revision is not None and _COMMIT.fullmatch(revision) is None:
        raise QklensError(
            f"{name}: revision {revision!r} is not a commit; expected 40 hexadecimal digits, because a branch or tag "
            "can change"
        )
    folder = _snapshot(name, found["repo"], revision)
    if revision is None:
        warnings.warn(
            f"{name} is not pinned and can change; this is commit {folder.name}: write {name}@{folder.name}",
            stacklevel=2,
        )
    return folder


def _snapshot(name: str, repo: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    except LocalEntryNotFoundError as error:
        raise QklensError(
            f"{name}: no such directory, and not in the local cache; the hub cannot be asked (no network, or "
            "HF_HUB_OFFLINE is set): give a directory, or fetch the model first"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise QklensError(f"{name}: no such directory, and the hub does not give it ({reason})") from error
