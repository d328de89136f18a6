"""Means and differences over seeds and test samples, with 95% intervals; Holm's correction.

All runs of a comparison answer the same test samples, and runs of one seed begin with the same weights. So a
figure is a table [S, N], seeds by samples, and both are drawn by chance: other seeds, and other samples of
the same kind, would have given another one. What is asked is whether the mean of the table is 0. Its variance
has an addend for each of the two, as in a two-way analysis of variance of crossed random effects without
replication; degrees of freedom are Satterthwaite's (Biometrics Bulletin 1946). Of fewer than five seeds they
are one less than the seeds at most: so few may agree by chance, and then the small p-values that a correction
for many methods asks for come too often.

McNemar's test with the answers of all seeds pooled takes S answers to one sample for answers to S samples,
and knows nothing of what a seed changes for all of them: where seeds do well and badly, it finds a difference
between methods that do not differ in more than a fifth of the comparisons, in place of a twentieth. Of one
seed no test can say anything about others. `tests/test_differences.py` counts how often methods are told
apart that do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of intervals, and what tests are held to.
LEVEL = 0.95
# Fewer seeds tell too little of their own spread.
_FEW = 5


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and samples.

    Attributes:
        mean: of the table.
        half_width: of its 95% interval.
        p: of the two-sided test that the mean is 0.
        num_seeds: S; of one seed the interval is that over samples alone.
    """

    mean: float
    half_width: float
    p: float
    num_seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Return "mean ± half width"."""
        return f"{scale * self.mean:.{digits}f} ± {scale * self.half_width:.{digits}f}"

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "p": self.p}


def mean_of(
    table: np.ndarray,  # [S, N]
    *,
    unit: float = 0.0,
) -> Estimate | None:
    """Return the mean of a table; None of an empty one.

    Args:
        table: values; samples with a NaN, such as those that lack a modality, are left out.
        unit: what one answer that is another changes a sample's value by. Half an answer more each way is
            added to the variance, that few that differ, or none, are no proof (Agresti and Min, Statistics in
            Medicine 2005).
    """
    table = np.asarray(table, dtype=np.float64)
    table = table[:, ~np.isnan(table).any(0)] if table.size else table
    num_seeds, num_samples = table.shape
    if not table.size:
        return None
    mean = float(table.mean())
    variance, freedom = _variance(table)
    variance += (unit / num_samples) ** 2
    if not variance > 0:
        return Estimate(mean, 0.0, 1.0 if mean == 0 else 0.0, num_seeds)
    # Only here: importing it takes as long as the rest.
    from scipy.stats import t

    deviation = math.sqrt(variance)
    half_width = float(t.ppf(0.5 + LEVEL / 2, freedom)) * deviation
    return Estimate(mean, half_width, float(2 * t.sf(abs(mean) / deviation, freedom)), num_seeds)


def difference(
    one: np.ndarray,  # [S, N]
    other: np.ndarray,  # [S, N]
) -> Estimate | None:
    """Return how far the share of right answers lies above another's, paired by seed and sample.

    NaN stands for no answer.
    """
    return mean_of(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64), unit=1.0)


def _variance(
    table: np.ndarray,  # [S, N]
) -> tuple[float, float]:
    """Return the variance of the mean of a table, and its degrees of freedom."""
    num_seeds, num_samples = table.shape
    centred = table - table.mean()
    of_samples = centred.mean(0)
    if num_seeds == 1:
        if num_samples == 1:
            return math.inf, 1.0
        return float(of_samples @ of_samples) / (num_samples - 1) / num_samples, num_samples - 1
    of_seeds = centred.mean(1)
    by_seed = num_samples * float(of_seeds @ of_seeds) / (num_seeds - 1)
    if num_samples == 1:
        return by_seed / num_seeds, num_seeds - 1
    by_sample = num_seeds * float(of_samples @ of_samples) / (num_samples - 1)
    rest = centred - of_seeds[:, None] - of_samples
    free = (num_seeds - 1) * (num_samples - 1)
    residual = float((rest * rest).sum()) / free
    # Where an estimated addend is below 0, it is 0.
    parts = max(by_seed + by_sample - residual, by_seed, by_sample)
    if parts == 0:
        return 0.0, num_samples - 1
    spread = by_seed**2 / (num_seeds - 1) + by_sample**2 / (num_samples - 1) + residual**2 / free
    freedom = max(parts**2 / spread, num_seeds - 1)
    if num_seeds < _FEW:
        freedom = num_seeds - 1
    return parts / (num_seeds * num_samples), freedom


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down method (Scandinavian Journal of Statistics 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, least = [1.0] * len(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = least
    return corrected
