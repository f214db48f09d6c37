"""When a run evaluates and saves: pure functions of the update."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The evaluations and checkpoints of a run.

    Attributes:
        num_updates: updates in all.
        updates_per_epoch: updates of one pass over the training rows.
        eval_every: updates between evaluations; None evaluates after each epoch.
        checkpointing_steps: updates between checkpoints, or "epoch" or None for one an epoch.
    """

    num_updates: int
    updates_per_epoch: int
    eval_every: int | None
    checkpointing_steps: str | None

    def epochs(self, update: int) -> float:
        """How many epochs are done after this update."""
        return update / self.updates_per_epoch

    def evaluation_due(self, update: int) -> bool:
        """True if the model is evaluated after this update, as it is after the last."""
        every = self.eval_every or self.updates_per_epoch
        return update > 0 and (update % every == 0 or update == self.num_updates)

    def checkpoint_due(self, update: int) -> str | None:
        """The name of the checkpoint that is saved after this update; None if none is.

        `epoch_{i}` after each epoch and at the end, or `step_{n}`.
        """
        if update == 0:
            return None
        if self.checkpointing_steps in (None, "epoch"):
            due = update % self.updates_per_epoch == 0 or update == self.num_updates
            return f"epoch_{(update - 1) // self.updates_per_epoch}" if due else None
        return f"step_{update}" if update % int(self.checkpointing_steps) == 0 else None

    def most_checkpoints(self, keep: int | None) -> int:
        """How many checkpoints are on the disk at once; while one is written, one more is there.

        Args:
            keep: how many of the newest are kept; None keeps all.
        """
        if self.checkpointing_steps in (None, "epoch"):
            made = -(-self.num_updates // self.updates_per_epoch)
        else:
            made = self.num_updates // int(self.checkpointing_steps)
        return made if keep is None else min(made, keep + 1)
