"""Triton kernels of class moments, their gradient, and hits: samples whose own class's centroid is nearest.

Moments: the samples are ordered by class (`_by_class`), chunks of one class are summed in registers and
merged in float64. Hits: for every centroid the exact interval in which it is nearest, then one read of the
features.
Floor: N D elements once, the gradient twice. N = 1M, D = 512, float32 is 2.05 GB, 0.68 ms on an H100 at
3.0 TB/s. Predicted and measured: bench/results/class_separability.md.
"""

from __future__ import annotations

from ._class_order import _order_configurations
from ._class_separability_hits import _hits_configurations, class_intervals, dimension_hits
from ._class_separability_moments import _moments_configurations, class_moments_bwd, class_moments_fwd

__all__ = [
    "class_intervals",
    "class_moments_bwd",
    "class_moments_fwd",
    "compile_configurations",
    "dimension_hits",
]


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    return [*_moments_configurations(), *_hits_configurations(), *_order_configurations("*i64")]
