"""What `--prefetch` prints at its end: the lines with which a batch script needs no network."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

# Where the caches are, beside HF_HOME, if the user moved them.
CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")


def print_batch_lines(commits: Mapping[str, str | None]) -> dict[str, str | None]:
    """Print the lines for the batch script on the main process, and return the commits."""
    if os.environ.get("RANK", "0") == "0":
        print("prefetched; in the batch script:\n")
        print("\n".join(batch_lines(sys.argv[1:], commits)))
    return dict(commits)


def batch_lines(arguments: Sequence[str], commits: Mapping[str, str | None]) -> list[str]:
    """Return the environment and the command of a run that uses what was prefetched.

    Args:
        arguments: the flags of the command that prefetched.
        commits: of the model and the data set, by the names of their flags.
    """
    from huggingface_hub.constants import HF_HOME

    places = {"HF_HOME": HF_HOME} | {
        name: os.environ[name] for name in CACHES if name in os.environ
    }
    exports = [f"export {name}={shlex.quote(os.path.abspath(p))}" for name, p in places.items()]
    pins = [f"--{name}={commit}" for name, commit in commits.items() if commit is not None]
    command = ["accelerate", "launch", "train_mrpc.py", *_without_prefetch(arguments), *pins]
    return [*exports, "export HF_HUB_OFFLINE=1", shlex.join(command)]


def _without_prefetch(arguments: Sequence[str]) -> list[str]:
    """Drop --prefetch, the revisions, which become commits, and the token."""
    kept: list[str] = []
    dropping = False
    for word in arguments:
        name = word.partition("=")[0].replace("-", "_")
        if word.startswith("--"):
            dropping = name in (
                "__prefetch",
                "__model_revision",
                "__dataset_revision",
                "__hub_token",
            )
        if not dropping:
            kept.append(word)
    return kept
