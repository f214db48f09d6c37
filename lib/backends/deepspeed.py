"""DeepSpeed: the settings that it cannot read from the script."""

from accelerate import Accelerator


def configure(accelerator: Accelerator, max_grad_norm: float, micro_batch_size: int) -> None:
    """Tell DeepSpeed, where it is used, to clip, and the batch size that it cannot read.

    DeepSpeed clips gradients itself, and the loaders have batches of several sizes.
    """
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = max_grad_norm
        settings["train_micro_batch_size_per_gpu"] = micro_batch_size
