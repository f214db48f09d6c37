"""What each of Accelerate's backends needs besides `prepare`: devices, FSDP2, DeepSpeed, TPUs."""
