"""FSDP2 for real on two gloo processes: each has a part of the weights and moments (DTensors)."""

import pytest
from runs import assert_same_course, run


@pytest.mark.processes
def test_sharded_runs_take_the_same_course_and_share_checkpoints(flags, once, run_on, tmp_path):
    """Sharded; from shards to one process; and from one process to shards."""
    epoch, three = "--checkpointing_steps=epoch", "--checkpointing_steps=3"
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    run(flags, plain, three)
    run_on(
        2,
        [*flags, epoch, f"--output_dir={tmp_path / 'whole'}"],
        [*flags, three, f"--output_dir={sharded}"],
        [*flags, epoch, f"--output_dir={tmp_path / 'from plain'}",
         f"--resume_from_checkpoint={plain / 'step_3'}"],
        worker="sharded_worker.py",
    )  # fmt: skip
    run(flags, tmp_path / "from shards", epoch, f"--resume_from_checkpoint={sharded / 'step_3'}")
    for name in ("whole", "from plain", "from shards"):
        assert_same_course(tmp_path / name, once)
