"""Pushes a built data set to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srde.data.packed import CARD_FILE, OUTPUT, TRAIN_FILE, VALIDATION_FILE
from srde.data.sources.hub import limit_waiting
from srde.data.tokenizers import first_line
from srde.errors import ConfigError, UsageError

ALLOWED = (CARD_FILE, TRAIN_FILE, VALIDATION_FILE, f"{OUTPUT}/*")
"""What is uploaded. A list of what may go, so that nothing goes by accident."""


def require_name(repo: str) -> None:
    """Refuses what the hub would refuse after hours of work.

    Raises:
        ConfigError: The name is not owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError.of(
            "upload_repo", repo, rule=f"it must be a name on the hub ({error})", fix="use owner/name"
        ) from error
    if repo.count("/") != 1:
        raise ConfigError.of("upload_repo", repo, rule="it must name its owner", fix=f"use your-name/{repo}")


def upload(work_dir: str | Path, repo: str, *, private: bool = False) -> str:
    """Uploads rows, packed shards and card, in one commit.

    Returns:
        Where the data set is.

    Raises:
        UsageError: The hub refuses it or does not answer. The build itself is complete and stays.
    """
    return push_folder(
        work_dir, repo, repo_type="dataset", private=private, message="Add the data set", allowed=ALLOWED
    )


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    repo_type: str,
    private: bool,
    message: str,
    allowed: Sequence[str] | None = None,
) -> str:
    """Uploads a folder, less its hidden files, in one commit.

    Args:
        folder: What to upload.
        repo: Its name on the hub, owner/name.
        repo_type: "dataset" or "model".
        private: Whether a new repository is private.
        message: Of the commit.
        allowed: Patterns of the files that may go; all, if left out.

    Returns:
        Where it is.

    Raises:
        UsageError: The hub refuses it or does not answer; what lies on disk stays.
    """
    from huggingface_hub import HfApi

    try:
        limit_waiting()
        api = HfApi()
        url = api.create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, repo_type=repo_type, folder_path=str(folder), allow_patterns=None if allowed is None else list(allowed),
            ignore_patterns=[".*", ".*/**"], commit_message=message,
        )  # fmt: skip
    except Exception as error:  # the clients' errors have no common base
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError.of(
            "upload_repo", repo, rule=f"the hub did not take it ({reason})",
            fix="what was written is complete on disk; check HF_TOKEN and the name and run the same command again to upload",
        ) from error  # fmt: skip
    return str(url)
