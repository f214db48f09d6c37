"""The flags of the services that a run reports to."""

import dataclasses
import functools

from lib.cli.flags.declaration import flag

# The trackers that Accelerate supports.
TRACKERS = (
    "wandb",
    "tensorboard",
    "trackio",
    "comet_ml",
    "clearml",
    "mlflow",
    "aim",
    "dvclive",
    "swanlab",
)

_tracking = functools.partial(flag, "tracking")

_hub = functools.partial(flag, "hub")


@dataclasses.dataclass(frozen=True, init=False)
class TrackingFlags:
    """Where the run is logged."""

    with_tracking: bool = _tracking(False, "Log to all trackers that are installed.", resume="free")
    report_to: tuple[str, ...] = _tracking(
        (),
        f"Trackers to log to: all, none, or some of {', '.join(TRACKERS)}.",
        choices=(*TRACKERS, "all", "none"),
        metavar="TRACKER",
        resume="free",
    )
    wandb_project: str | None = _tracking(
        None,
        "Project on wandb and in the other trackers. Default: WANDB_PROJECT, else train_mrpc.",
        resume="free",
    )
    wandb_entity: str | None = _tracking(
        None,
        "User or team on wandb. Default: WANDB_ENTITY, else the owner of the API key.",
        resume="free",
    )
    wandb_mode: str | None = _tracking(
        None,
        "Default: WANDB_MODE, else online where there are a key and a server.",
        choices=("online", "offline", "disabled"),
        resume="free",
    )
    run_name: str | None = _tracking(
        None,
        "Name of the run. Default: WANDB_NAME, else the name of --output_dir.",
        resume="free",
    )
    run_group: str | None = _tracking(
        None,
        "Group of the run on wandb, such as the seeds of one recipe. Default: WANDB_RUN_GROUP.",
        resume="free",
    )
    tags: tuple[str, ...] = _tracking(
        (), "Tags of the run on wandb. Default: WANDB_TAGS.", metavar="TAG", resume="free"
    )
    wandb_alerts: bool = _tracking(
        False,
        "Alert on wandb, once each: loss not finite, collapsed classifier, preemption.",
        resume="free",
    )
    wandb_shared: bool = _tracking(
        False,
        "System metrics of every machine in the one run, by wandb's shared mode.",
        resume="free",
    )
    log_model: str = _tracking(
        "reference",
        "The best model as a wandb artifact: its path, its files, or not at all.",
        choices=("reference", "file", "none"),
        metavar="reference|file|none",
        resume="free",
    )


@dataclasses.dataclass(frozen=True, init=False)
class HubFlags:
    """What comes from the hub before a run, and where the finished model goes."""

    prefetch: bool = _hub(
        False,
        "Fill the caches for a run without network, check it as --dry_run does, and stop.",
        saved=False,
    )
    push_to_hub: bool = _hub(
        False,
        "Push the finished model, its card and its report to the hub; needs HF_TOKEN or a login.",
        resume="free",
    )
    hub_model_id: str | None = _hub(
        None,
        "Repository on the hub. Default: the name of --output_dir.",
        metavar="USER/NAME",
        resume="free",
    )
    hub_private: bool = _hub(False, "Make a repository that is new private.", resume="free")
    hub_revision: str | None = _hub(
        None, "Branch to push to. Default: the main one.", metavar="BRANCH", resume="free"
    )
    hub_create_pr: bool = _hub(
        False, "Open a pull request instead of committing to the branch.", resume="free"
    )
    hub_token: str | None = _hub(
        None,
        "Token for the hub; better set HF_TOKEN. Stored nowhere.",
        metavar="TOKEN",
        resume="free",
        saved=False,
    )
