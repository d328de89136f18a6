"""Training: the trainer and its loop, optimizer settings, evaluation, selection, checkpoints, divergence."""
