"""The public ops: checked, registered with torch.library, differentiable where the mathematics is."""

from mmfast.ops.additive_shapley import additive_shapley, coalition_utilities
from mmfast.ops.class_separability import (
    ClassMoments,
    class_moments,
    dimension_accuracy,
    effective_dimensions,
)
from mmfast.ops.duc_loss import DucDims, duc_loss, unidirectional_info_nce
from mmfast.ops.gradient_projection import project_gradient, update_and_project_, update_projector_
from mmfast.ops.kmeans import KMeans, cluster_purity, kmeans
from mmfast.ops.logit_fusion import certainty_fusion, entropy_fusion
from mmfast.ops.partial_reinit import ReinitPlan, partial_reinit_
from mmfast.ops.shapley_values import shapley_values
from mmfast.ops.sigmoid_loss import unidirectional_sigmoid_loss

__all__ = [
    "ClassMoments",
    "DucDims",
    "KMeans",
    "ReinitPlan",
    "additive_shapley",
    "certainty_fusion",
    "class_moments",
    "cluster_purity",
    "coalition_utilities",
    "dimension_accuracy",
    "duc_loss",
    "effective_dimensions",
    "entropy_fusion",
    "kmeans",
    "partial_reinit_",
    "project_gradient",
    "shapley_values",
    "unidirectional_info_nce",
    "unidirectional_sigmoid_loss",
    "update_and_project_",
    "update_projector_",
]
