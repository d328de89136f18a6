"""Training: the trainer and its loop, optimizer settings, evaluation, selection, checkpoints, divergence."""

from mmfast.training.divergence import DivergedError
from mmfast.training.evaluation import Metrics
from mmfast.training.optimization import Optimization
from mmfast.training.trainer import Trainer

__all__ = ["DivergedError", "Metrics", "Optimization", "Trainer"]
