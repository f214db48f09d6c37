"""FSDP2 for real on two gloo processes: each has a part of the weights and moments (DTensors)."""

from test_training import assert_same_course, once, run  # noqa: F401


def test_shards_take_the_same_course_and_checkpoints_fit_any_way(
    flags, once, run_on, tmp_path  # noqa: F811
):  # fmt: skip
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
