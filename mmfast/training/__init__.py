"""Training: the trainer and its loop, settings, schedules, averages, evaluation, selection, checkpoints."""

from mmfast.training.callbacks import Callback

__all__ = ["Callback"]
