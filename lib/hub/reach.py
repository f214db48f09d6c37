"""Find out whether the hub answers, before its libraries retry for minutes."""

import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

from lib.errors import InputError

# Seconds to wait for the hub: longer than any round trip, short for a node without network.
TIMEOUT = 3.0

REMEDY = (
    "run the same command with --prefetch on a machine with network, which fills the cache "
    "(HF_HOME), or give a local folder, or --demo"
)


def go_offline_if_unreachable(model: str, revision: str | None, dataset: str | None) -> None:
    """Set HF_HUB_OFFLINE if the hub does not answer; call this before its libraries are imported.

    Args:
        model: name on the hub, or a folder.
        revision: branch, tag or commit of the model; None for the main branch.
        dataset: name on the hub, or a folder; None if the rows come from files.

    Raises:
        InputError: the hub does not answer, and the model or the data set is not cached.
    """
    wanted = [("--model_name_or_path", model), ("--dataset_name", dataset or "demo")]
    wanted = [item for item in wanted if not Path(item[1]).exists() and item[1] != "demo"]
    if not wanted:
        return
    for flag, name in wanted:
        if name.startswith((".", "/", "~")):
            raise InputError(f"{flag} {name}: no such folder")
    if not _offline():
        if _answers():
            return
        os.environ["HF_HUB_OFFLINE"] = "1"
        if int(os.environ.get("RANK", "0")) == 0:
            print("the hub does not answer: using what is cached", file=sys.stderr, flush=True)
    for flag, name in wanted:
        cached = _dataset_cached(name) if flag == "--dataset_name" else _cached(name, revision)
        if not cached:
            raise InputError(
                f"{flag} {name} is neither a folder nor cached, and the hub does not answer: "
                f"{REMEDY}"
            )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _answers() -> bool:
    address = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if address.scheme in urllib.request.getproxies():
        return True  # the proxy has to connect
    answered = threading.Event()

    def connect() -> None:
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), TIMEOUT).close()
        except OSError:
            return
        answered.set()

    # In a thread, as the timeout does not cover the DNS lookup, which may take a minute.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return answered.is_set()


def _cached(model: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)


def _dataset_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    prepared = Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets"))
    downloaded = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    return (prepared / name.replace("/", "___")).is_dir() or downloaded.is_dir()


def cached_dataset(name: str, configuration: str | None, revision: str | None) -> Path | None:
    """Return where the hub's cache holds a data set, complete as far as the cache can tell.

    Args:
        configuration: the folder of a data set with several, of which others may be missing.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        InputError: the download was not finished.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    find = partial(
        snapshot_download, name, repo_type="dataset", revision=revision, local_files_only=True
    )
    try:
        folder = Path(find(allow_patterns=f"{configuration}/*"))
        return folder if (folder / str(configuration)).is_dir() else Path(find())
    except IncompleteSnapshotError as error:
        raise InputError(
            f"--dataset_name {name} is cached incompletely, and the hub does not answer: {REMEDY}"
        ) from error
    except LocalEntryNotFoundError:
        return None
