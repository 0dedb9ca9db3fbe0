"""Resolves models and datasets of the Hugging Face hub to commits."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Literal

from radlads.tasks.contracts.errors import UserError, first_line

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def hub_commit(
    repo: str, revision: str | None, kind: Literal["model", "dataset"], *, key: str = "`revision: <commit>`"
) -> str:
    """Resolve a revision (None: `main`) to a commit: from the hub, or from the local cache if the hub is unreachable.

    key: the setting that pins a commit, for messages. Raises UserError.
    """
    if revision is not None and is_commit(revision):
        return revision
    from huggingface_hub import HfApi, errors

    unreachable: Any = (errors.HTTPError, OSError)  # type: ignore[attr-defined]  # of its HTTP library
    api = HfApi()
    try:
        commit = (api.model_info if kind == "model" else api.dataset_info)(repo, revision=revision).sha
    except errors.HFValidationError as error:
        raise UserError(f"'{repo}' is neither a local folder nor a hub id: {first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise UserError(f"'{repo}' is not a local folder, and the hub rejects it: {first_line(error)}") from error
        return _cached_commit(repo, revision, kind, key, error)
    except unreachable as error:
        return _cached_commit(repo, revision, kind, key, error)
    if commit is None:
        raise UserError(f"the hub returns no commit for '{repo}'; pin one with {key}")
    return commit


def _cached_commit(
    repo: str, revision: str | None, kind: Literal["model", "dataset"], key: str, error: Exception
) -> str:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    snapshots = [path.name for path in folder.glob("snapshots/*")]
    if revision is None and not commit and len(snapshots) == 1:
        commit = snapshots[0]  # `datasets` downloads by commit and writes no reference
    if not is_commit(commit):
        raise UserError(
            f"'{repo}' is not a local folder, the hub cannot be reached ({first_line(error)}), and the local cache has "
            f"no commit for '{revision or 'main'}'; pin one with {key}"
        ) from error
    _log.warning("the hub cannot be reached; using %s at commit %s from the local cache", repo, commit)
    return commit
