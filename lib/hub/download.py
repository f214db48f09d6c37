"""Download a model and data from the hub whole: pinned to a commit, and checked by content.

The libraries check the size of a file, not its checksum.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._verification import compute_file_hash
from yaml import YAMLError

from lib.errors import InputError
from lib.hub.client import HUB_ERRORS, HubError, hub_api, reason_of
from lib.hub.reach import REMEDY

WEIGHTS = "model.safetensors"

# What a classifier and its tokenizer are loaded from, beside the weights, and the model card.
MODEL_FILE = re.compile(r"[^/]+\.(json|txt|model|jinja)|README\.md")


def commits_of(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the commits of the model and the data set, as flags that name a revision.

    A run that resumes keeps to its own, wherever a branch is by now.

    Args:
        before: the configuration of the run that resumes; empty if none does.

    Raises:
        InputError: as `commit_of`.
    """
    commits = {}
    for source, name in (
        ("model_name_or_path", "model_revision"),
        ("dataset_name", "dataset_revision"),
    ):
        if source == "dataset_name" and config["train_file"] is not None:
            commits[name] = config[name]
        elif config[name] is None and before.get(source) == config[source]:
            commits[name] = before[name]
        else:
            commits[name] = commit_of(f"--{source}", config[source], config[name])
    return commits


def commit_of(flag: str, name: str, revision: str | None) -> str | None:
    """Return the commit that a branch or tag is at; None for a folder, or if nobody knows.

    Without the hub it is the one that is cached.

    Args:
        flag: `--model_name_or_path` or `--dataset_name`.

    Raises:
        InputError: the hub does not answer, or has no such repository or revision.
    """
    if name == "demo" or Path(name).exists():
        return None
    revision = revision or constants.DEFAULT_REVISION
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    kind, file = _kind(flag), "config.json" if flag == "--model_name_or_path" else "README.md"
    if not constants.is_offline_mode():
        api = hub_api()
        try:
            # This also notes the commit in the cache, for runs without the hub.
            api.hf_hub_download(name, file, repo_type=kind, revision=revision)
        except RemoteEntryNotFoundError:
            pass  # noted as well
        except HUB_ERRORS as error:
            raise _unavailable(flag, name, error) from error
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    noted = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return noted.read_text().strip() if noted.exists() else None


def download_model(name: str, revision: str | None) -> None:
    """Fill the hub's cache with a model and its tokenizer, unless they are there.

    Raises:
        InputError: the hub does not send them as it should, or has no safetensors.
    """
    flag = "--model_name_or_path"
    commit = commit_of(flag, name, revision)
    if commit is None or constants.is_offline_mode() or _is_cached(name, WEIGHTS, commit):
        return
    api = hub_api()
    try:
        files = {
            file.path: file
            for file in api.list_repo_tree(name, revision=commit)
            if isinstance(file, RepoFile)
        }
    except HUB_ERRORS as error:
        raise _unavailable(flag, name, error) from error
    weights = [path for path in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path)]
    if not weights:
        others = [path for path in files if path.endswith((".bin", ".h5", ".pt", ".msgpack"))]
        found = f" (found: {', '.join(others[:3])}, which may execute code)" if others else ""
        raise InputError(f"{flag} {name} has no model.safetensors{found}: choose another model")
    # The weights last: where they are cached, all is.
    wanted = [path for path in files if MODEL_FILE.fullmatch(path)] + sorted(weights)
    _download(api, flag, name, commit, (files[path] for path in wanted))


def card_metadata(name: str, revision: str | None) -> dict[str, Any]:
    """Return the license and the language that the card of a model states, if it is here."""
    path: Any = Path(name) / "README.md"
    if not Path(name).exists():
        path = try_to_load_from_cache(name, "README.md", revision=revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        card = ModelCard.load(path).data.to_dict()
    except (ValueError, TypeError, YAMLError):
        return {}  # not a card
    return {field: card[field] for field in ("license", "language") if card.get(field)}


def download_dataset_files(name: str, addresses: Iterable[str]) -> None:
    """Fill the hub's cache with files of a data set, unless they are there.

    Args:
        addresses: such as `hf://datasets/nyu-mll/glue@<commit>/mrpc/train.parquet`.

    Raises:
        InputError: the hub does not send them as it should.
    """
    flag, missing = "--dataset_name", dict[str, list[str]]()
    for address in addresses:
        found = re.fullmatch(r"hf://datasets/[^@]+@([0-9a-f]{40})/(.+)", address)
        if found and not constants.is_offline_mode():
            commit, path = found.groups()
            if not _is_cached(name, path, commit, kind="dataset"):
                missing.setdefault(commit, []).append(path)
    if not missing:
        return
    api = hub_api()
    for commit, paths in missing.items():
        try:
            entries = api.get_paths_info(name, paths, repo_type="dataset", revision=commit)
        except HUB_ERRORS as error:
            raise _unavailable(flag, name, error) from error
        files = (entry for entry in entries if isinstance(entry, RepoFile))
        _download(api, flag, name, commit, files)


def _download(api: HfApi, flag: str, name: str, commit: str, files: Iterable[RepoFile]) -> None:
    """Download files, and remove one whose content is not what the hub lists."""
    for file in files:
        if _is_cached(name, file.path, commit, kind=_kind(flag)):
            continue
        try:
            path = api.hf_hub_download(name, file.path, repo_type=_kind(flag), revision=commit)
            large = file.lfs is not None
            expected = file.lfs.sha256 if file.lfs is not None else file.blob_id
            if compute_file_hash(Path(path), "sha256" if large else "git-sha1") != expected:
                Path(path).resolve().unlink()
                Path(path).unlink(missing_ok=True)
                raise HubError(f"{file.path} came with a wrong checksum: try again")
        except HUB_ERRORS as error:
            raise _unavailable(flag, name, error) from error


def _kind(flag: str) -> str:
    return "model" if flag == "--model_name_or_path" else "dataset"


def _is_cached(name: str, path: str, commit: str, *, kind: str = "model") -> bool:
    return isinstance(try_to_load_from_cache(name, path, revision=commit, repo_type=kind), str)


def _unavailable(flag: str, name: str, error: BaseException) -> InputError:
    return InputError(f"{flag} {name} is not available from the hub: {reason_of(error)}; {REMEDY}")
