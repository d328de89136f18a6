"""Generated calls of every public op, and oracles written from the docstrings' mathematics.

A case is an op, a backend, and a sequence of choices (draw.py): from a seed in tools/fuzz, from hypothesis in
test_fuzz.py. judge.py says what counts as right. An oracle is NumPy in extended precision and knows neither
mmfast.reference nor a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fuzzing import classes, clusters, contrast, fusion, in_place, pairwise, shapley
from fuzzing.draw import Draw, HypothesisDraw, Recorded, Replay, shrunk
from fuzzing.invalid import invalid

# Takes the choices, the backend's name, and whether sizes are to be small; raises AssertionError.
Case = Callable[[Draw, str, bool], None]
CASES: dict[str, Case] = {
    "shapley_values": shapley.shapley_values,
    "coalition_utilities": shapley.coalition_utilities,
    "additive_shapley": shapley.additive_shapley,
    "duc_loss": contrast.duc_loss,
    "unidirectional_info_nce": contrast.unidirectional_info_nce,
    "unidirectional_sigmoid_loss": pairwise.unidirectional_sigmoid_loss,
    "class_moments": classes.class_moments,
    "dimension_accuracy": classes.dimension_accuracy,
    "effective_dimensions": classes.effective_dimensions,
    "entropy_fusion": fusion.entropy_fusion,
    "certainty_fusion": fusion.certainty_fusion,
    "update_projector_": in_place.update_projector,
    "project_gradient": in_place.project_gradient,
    "partial_reinit_": in_place.partial_reinit,
    "kmeans": clusters.kmeans,
    "cluster_purity": clusters.cluster_purity,
    "invalid": invalid,
}
# The stem of an op's files where it is not its name.
_STEMS = {
    "coalition_utilities": "additive_shapley",
    "unidirectional_info_nce": "duc_loss",
    "unidirectional_sigmoid_loss": "sigmoid_loss",
    "class_moments": "class_separability",
    "dimension_accuracy": "class_separability",
    "effective_dimensions": "class_separability",
    "entropy_fusion": "logit_fusion",
    "certainty_fusion": "logit_fusion",
    "update_projector_": "gradient_projection",
    "project_gradient": "gradient_projection",
    "partial_reinit_": "partial_reinit",
    "cluster_purity": "kmeans",
}


class Skip(Exception):
    """The backend does not take what was drawn, and says so."""


def stem(op: str) -> str:
    """Return the name of the op's files."""
    return _STEMS.get(op, op)


def runs_on(op: str, backend: str) -> bool:
    """Whether a backend, "cpu" and the like, has a kernel for an op; it must be available."""
    from mmfast import backend as _backend

    return op == "invalid" or _backend.implements(backend, stem(op))


def run(op: str, draw: Draw, backend: str, small: bool) -> None:
    """Run one case: AssertionError says what is wrong, Skip that the backend does not take it.

    An exception of another kind out of a valid call is a failure, too.
    """
    from mmfast.backend import BackendUnavailableError

    try:
        with np.errstate(all="ignore"):
            CASES[op](draw, backend, small)
    except BackendUnavailableError as error:
        raise Skip(str(error)) from None
    except (AssertionError, KeyboardInterrupt):
        raise
    except Exception as error:
        # hypothesis steers by exceptions of its own.
        if type(error).__module__.startswith("hypothesis"):
            raise
        raise AssertionError(f"raised {type(error).__name__}: {error}") from error


__all__ = [
    "CASES",
    "Draw",
    "HypothesisDraw",
    "Recorded",
    "Replay",
    "Skip",
    "run",
    "runs_on",
    "shrunk",
    "stem",
]
