"""Push a finished run to the hub: an allow-list of its files, in one commit."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.errors import InputError, PublishError

# The model as `from_pretrained` loads it, and what describes it. No optimizer state, predictions,
# configuration, paths of the machine or files of trackers.
PUSHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",  # SentencePiece
    "*.py",  # of a model with code of its own, which the user trusted
    "README.md",
    "all_results.json",
    "report/index.html",
    "report/*.png",
    ".eval_results/*.yaml",
)


def pushed_files(folder: Path) -> list[Path]:
    """Return the files of a finished run that belong on the hub.

    Raises:
        InputError: the folder holds no finished model.
    """
    for name in ("model.safetensors", "config.json", "README.md", "all_results.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} is not the output folder of a finished run: it has no {name}; give one "
                "that train_mrpc.py finished"
            )
    found = {path for pattern in PUSHED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def check_name(name: str) -> None:
    """Check, before a run trains, what can be known of its push.

    Raises:
        InputError: no token, a name that the hub refuses, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if constants.is_offline_mode():
        raise InputError(
            "pushing needs the hub, which does not answer or HF_HUB_OFFLINE rules out: train "
            "without --push_to_hub, and run python -m lib.publish OUTPUT_DIR where it is in reach"
        )
    if get_token() is None:
        raise InputError("pushing to the hub needs a token: set HF_TOKEN, or run hf auth login")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--hub_model_id {name} is no name for the hub: {reason}") from error


def push(
    folder: Path,
    *,
    hub_model_id: str | None = None,
    hub_private: bool = False,
    hub_revision: str | None = None,
    hub_create_pr: bool = False,
) -> str:
    """Push a finished run, and return the address of its commit or pull request.

    Args:
        hub_model_id: `user/name`, or `name` for one's own; by default that of the folder.
        hub_private: whether a repository that is new is private.
        hub_revision: branch, created from the main one if it is new; the main one by default.
        hub_create_pr: whether to open a pull request instead of committing.

    Raises:
        InputError: the folder holds no finished run, or as `check_name`.
        PublishError: the hub did not take it.
    """
    files = pushed_files(folder)
    name = hub_model_id or folder.resolve().name
    check_name(name)
    # Slow to import, and most runs push nothing.
    from huggingface_hub import CommitOperationAdd

    from lib.hub.client import HUB_ERRORS, hub_api, reason_of

    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path_or_fileobj=path)
        for path in files
    ]
    api = hub_api()
    try:
        repository = api.create_repo(name, private=hub_private or None, exist_ok=True).repo_id
        if hub_revision and not hub_create_pr:
            api.create_branch(repository, branch=hub_revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations,
            commit_message="Upload a model fine-tuned by train_mrpc.py",
            revision=hub_revision,
            create_pr=hub_create_pr,
            num_threads=len(operations),  # all at once, so that a silent hub is waited for once
        )
    except HUB_ERRORS as error:
        raise PublishError(
            f"{name} was not pushed: {reason_of(error)}. The run is complete in {folder}; to push "
            f"it: {shlex.join(['python', '-m', 'lib.publish', str(folder)])}"
        ) from error
    return commit.pr_url or commit.commit_url


@contextmanager
def pushed_when_finished(folder: Path, options: Mapping[str, Any] | None) -> Iterator[None]:
    """Push what the work in this context leaves in `folder`, unless `options` is None.

    Raises:
        PublishError: the hub did not take it.
    """
    yield
    if options is None:
        return
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"pushed: {push(folder, **options)}", flush=True)
