"""K-means and the purity of its clusters: against scikit-learn from the same start, and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import kmeans as reference

from .harness import Case, Options, Work
from .peers import on_gpu, optional

SIZE = "Samples N"
# K: D; the features of one modality.
DIMS = {6: 512, 64: 512}
SAMPLES = (1_000, 10_000, 50_000)
# Every contestant makes as many iterations: none of them has settled by then.
ITERATIONS = 10


def cases(options: Options) -> Iterator[Case]:
    """Yield few and many clusters of features around as many centres."""
    for num_clusters, num_dims in DIMS.items():
        for num_samples in (1_000,) if options.quick else SAMPLES:
            labels = torch.randint(num_clusters, (num_samples,), device=options.device)
            centres = torch.randn(num_clusters, num_dims, device=options.device) / 4
            features = torch.randn(num_samples, num_dims, device=options.device) + centres[labels]
            start = features[:num_clusters].clone()
            once = reference.lloyd(features, start, ITERATIONS, 0.0)
            num_iter = int(once[3])
            given = (features, labels, start)
            yield Case(
                name=f"K={num_clusters} N={num_samples:,} D={num_dims}, {num_iter} iterations",
                size=num_samples,
                panel=f"K={num_clusters}, D={num_dims}",
                ours=partial(_ours, *given),
                peers={
                    "scikit-learn": optional("sklearn.cluster", "scikit-learn", partial(_sklearn, *given)),
                    "eager": partial(_eager, *given),
                    "flash-kmeans": on_gpu(
                        options.device, "flash_kmeans", "flash-kmeans", partial(_flash, *given)
                    ),
                },
                check=partial(_check, *given),
                work=Work(
                    num_iter * features.nbytes, 0, num_iter * 2 * num_samples * num_dims * num_clusters
                ),
            )


def _ours(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    start: Tensor,  # [K, D]
) -> tuple[ops.KMeans, float]:
    found = ops.kmeans(features, len(start), init=start, max_iter=ITERATIONS, tol=0.0)
    return found, ops.cluster_purity(found.assignments, labels)


def _eager(features: Tensor, labels: Tensor, start: Tensor) -> float:
    assignments = reference.lloyd(features, start, ITERATIONS, 0.0)[1]
    return reference.cluster_purity(assignments, labels)


def _sklearn(features: Tensor, labels: Tensor, start: Tensor, cluster: Any) -> Callable[[], float]:
    from sklearn.metrics.cluster import contingency_matrix

    x, y, init = (tensor.cpu().numpy() for tensor in (features, labels, start))
    model = cluster.KMeans(len(init), init=init, n_init=1, max_iter=ITERATIONS, tol=0.0, algorithm="lloyd")

    def fit() -> float:
        return contingency_matrix(y, model.fit(x).labels_).max(0).sum() / len(y)

    return fit


def _flash(features: Tensor, labels: Tensor, start: Tensor, package: Any) -> Callable[[], float]:
    def fit() -> float:
        assignments = package.batch_kmeans_Euclid(
            features[None], len(start), max_iters=ITERATIONS, tol=0.0, init_centroids=start[None]
        )[0][0]
        return reference.cluster_purity(assignments, labels)

    return fit


def _check(features: Tensor, labels: Tensor, start: Tensor, result: tuple[ops.KMeans, float]) -> None:
    found, purity = result
    inertia = float(reference.lloyd(features.double(), start.double(), ITERATIONS, 0.0)[2])
    error = abs(float(found.inertia) / inertia - 1)
    assert error <= 1e-5, f"inertia is {error:.1e} off that of float64, at most 1e-5 allowed"
    expected = reference.cluster_purity(found.assignments, labels)
    assert purity == expected, f"purity {purity}, expected {expected}"
