"""The configuration of a run: all its flags, and the rules between them."""

import dataclasses
from typing import TYPE_CHECKING, Any

from lib.cli.flags.data import DataFlags
from lib.cli.flags.declaration import checked, flags_of
from lib.cli.flags.model import ModelFlags
from lib.cli.flags.output import EvaluationFlags, OutputFlags
from lib.cli.flags.tracking import HubFlags, TrackingFlags
from lib.cli.flags.training import TrainingFlags
from lib.cli.rules import check_rules
from lib.data.files.paths import expand

if TYPE_CHECKING:
    from lib.data.rows.holdout import Holdout


# Python lists the fields of the last base class first.
@dataclasses.dataclass(frozen=True, init=False)
class TrainConfig(
    HubFlags, TrackingFlags, OutputFlags, EvaluationFlags, TrainingFlags, ModelFlags, DataFlags
):
    """The configuration of a run; keyword arguments replace defaults.

    With `demo=True` the defaults are those of the built-in corpus and model.

    Raises:
        InputError: a value breaks a rule of its flag, or two flags contradict each other.
    """

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - FLAGS.keys()
        if unknown:
            raise TypeError(f"TrainConfig has no field {', '.join(sorted(unknown))}")
        if given.get("demo"):
            from lib.demo.corpus import DEFAULTS

            given = {**DEFAULTS, **given}
        for name, declared in FLAGS.items():
            value = checked(name, given.get(name, declared.default), declared)
            object.__setattr__(self, name, value)
        if self.prefetch:
            object.__setattr__(self, "dry_run", True)
        check_rules(self)

    def files(self) -> dict[str, list[str]]:
        """The files that were given, by split: train, validation, test."""
        patterns = {name: getattr(self, f"{name}_file") for name in ("train", "validation", "test")}
        return {
            name: [str(path) for path in expand(f"--{name}_file", given)]
            for name, given in patterns.items()
            if given is not None
        }

    @property
    def holdout(self) -> "Holdout | None":
        """Which training rows validate instead; None if validation rows are given."""
        from lib.data.rows.holdout import Holdout  # imports slow libraries

        if self.validation_share is None and self.folds is None:
            return None
        return Holdout(self.seed, self.validation_share, self.folds, self.fold)

    def values(self, *names: str) -> dict[str, Any]:
        """The values of these flags by name, as keyword arguments of the same names."""
        return {name: getattr(self, name) for name in names}

    def push_options(self) -> dict[str, Any] | None:
        """How to push the finished run to the hub; None if it is not to be pushed."""
        if not self.push_to_hub or self.dry_run:
            return None
        return self.values("hub_model_id", "hub_private", "hub_revision", "hub_create_pr")

    def to_dict(self) -> dict[str, Any]:
        """The flags that config.yaml keeps, as YAML takes them; no secrets."""
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if FLAGS[name].saved
        }


FLAGS = flags_of(TrainConfig)
