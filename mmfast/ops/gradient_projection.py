"""Projection of a shared head's gradient off the directions of features it has already learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.errors import dtype_name
from mmfast.ops._autograd import Op, differentiable, is_constant, is_direct
from mmfast.ops._checks import (
    check_apart,
    check_float,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    shape_text,
)
from mmfast.ops._launch import DTYPE_CODE, cast, outside_autocast, strided, with_contiguous_rows
from mmfast.ops._registration import RUN, define
from mmfast.reference import gradient_projection as _reference
from mmfast.reference._common import accumulation_dtype


def update_projector_(
    projector: Tensor,  # [D, D] changed in place
    mean_feature: Tensor,  # [D]
    *,
    alpha: float,
    backend: str = "auto",
) -> None:
    """Remove the direction of a mean feature from the projector, in place.

    Equivalent to, with P the projector, h the mean feature, and eps that of the projector's dtype:

        kept = h @ P @ h
        divisor = max(alpha, 16 * eps * h @ h) + abs(kept)
        P -= torch.outer(P @ h, P @ h) / divisor * (1 if kept >= 0 else -1)

    which is P - P h (P h)^T / (alpha + h^T P h) but for rounding. P is known to about eps, so what is left of
    a direction is, below some `eps |h|^2`: an alpha below `16 eps |h|^2` (`2e-6 |h|^2` in float32,
    `4e-15 |h|^2` in float64) counts as that. Dividing by less would make rounding into directions, until P
    overflows. Where `kept` comes out below 0, by rounding, the sign takes P back towards what has no negative
    eigenvalue.

    Args:
        projector: [D, D] float32 or float64, any strides that keep its elements apart; symmetric to the last
            bit with eigenvalues in [0, 1], begun as the identity. It stays symmetric to the last bit.
        mean_feature: [D] float32, float64, bfloat16 or float16, the mean of a batch's features; it may be a
            part of the projector, whose values before the call count.
        alpha: positive, within what float32 holds and divides by: 2.938737e-39 to 3.4028235e+38. The smaller
            against the squared length of `mean_feature`, the more of the direction goes, down to the bound
            above.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: `projector` has another dtype than float32 or float64, `mean_feature` is no floating
            tensor, or `alpha` no number.
        ValueError: a shape is wrong, elements of `projector` share memory, or `alpha` is not positive, finite
            and within range. Nothing is changed then.

    Source: Zhang et al., "Multimodal representation learning by alternating unimodal adaptation", CVPR 2024,
    after Zeng et al., "Continual learning of context-dependent processing in neural
    networks", 2019.
    """
    _check_update(projector, mean_feature, alpha)
    check_same_device(projector=projector, mean_feature=mean_feature)
    _backend.check_name(backend)
    if is_direct(projector, mean_feature):
        _run_update(projector, mean_feature, float(alpha), backend)
    elif is_constant(projector, mean_feature):
        _update_op(projector, mean_feature, float(alpha), backend)
    else:
        with torch.no_grad():
            _update_op(projector, mean_feature, float(alpha), backend)


def project_gradient(
    grad: Tensor,  # [C, D]
    projector: Tensor,  # [D, D]
    *,
    backend: str = "auto",
) -> Tensor:  # [C, D]
    """Return the gradient of a linear head's weight with the directions removed from the projector taken out.

    Equivalent to:

        grad @ projector

    Args:
        grad: [C, D] float32, float64, bfloat16 or float16, any strides.
        projector: [D, D] float32 or float64, as `update_projector_` leaves it; taken as a constant.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [C, D] in the dtype of `grad`, computed in at least float32; differentiable with respect to `grad`.

    Raises:
        TypeError: `grad` is no tensor of a floating dtype, or `projector` has another than float32 or
            float64.
        ValueError: a shape is wrong.

    Source: Zhang et al., "Multimodal representation learning by alternating unimodal adaptation", CVPR 2024.
    """
    check_float("grad", grad)
    _check_projector(projector)
    _check_grad(grad, projector)
    check_same_device(grad=grad, projector=projector)
    _backend.check_name(backend)
    is_same = backend == "auto" and grad.dtype == projector.dtype
    if is_same and _backend.is_plain_faster("gradient_projection", grad):
        return grad @ (projector.detach() if projector.requires_grad else projector)
    if is_direct(grad, projector):
        return _run_project(grad, projector, backend)
    if is_constant(grad, projector):
        return _project_op(grad, projector, backend)
    return _project((backend,), grad, projector.detach())


def update_and_project_(
    projector: Tensor,  # [D, D] changed in place
    mean_feature: Tensor,  # [D]
    grad: Tensor,  # [C, D]
    *,
    alpha: float,
    backend: str = "auto",
) -> Tensor:  # [C, D]
    """Remove a mean feature's direction from the projector, in place, and return the gradient times the rest.

    Equivalent to, in about half the time where D is small:

        update_projector_(projector, mean_feature, alpha=alpha)
        project_gradient(grad, projector)

    Args:
        projector: [D, D] float32 or float64, any strides that keep its elements apart; symmetric to the last
            bit with eigenvalues in [0, 1], begun as the identity. It stays symmetric to the last bit.
        mean_feature: [D] float32, float64, bfloat16 or float16, the mean of a batch's features.
        grad: [C, D] float32, float64, bfloat16 or float16, any strides. It and `mean_feature` may be parts of
            the projector, whose values before the call count.
        alpha: as in `update_projector_`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [C, D] in the dtype of `grad`, computed in at least float32; differentiable with respect to `grad`.

    Raises:
        TypeError: `projector` has another dtype than float32 or float64, `mean_feature` or `grad` is no
            floating tensor, or `alpha` no number.
        ValueError: a shape is wrong, elements of `projector` share memory, or `alpha` is not positive, finite
            and within range. Nothing is changed then.

    Source: Zhang et al., "Multimodal representation learning by alternating unimodal adaptation", CVPR 2024.
    """
    _check_update(projector, mean_feature, alpha)
    check_float("grad", grad)
    _check_grad(grad, projector)
    device = projector.device
    if mean_feature.device != device or grad.device != device:
        check_same_device(projector=projector, mean_feature=mean_feature, grad=grad)
    _backend.check_name(backend)
    if is_direct(projector, mean_feature, grad):
        return _run_step(projector, mean_feature, grad, float(alpha), backend)
    if is_constant(projector, mean_feature, grad):
        return _step_op(projector, mean_feature, grad, float(alpha), backend)
    # The gradient may be a part of what changes.
    grad = grad.clone()
    with torch.no_grad():
        _update_op(projector, mean_feature, float(alpha), backend)
    return _project((backend,), grad, projector.detach())


def _check_update(projector: Tensor, mean_feature: Tensor, alpha: float) -> None:
    _check_projector(projector)
    check_float("mean_feature", mean_feature)
    if mean_feature.shape != projector.shape[:1]:
        check_shape("mean_feature", mean_feature, "D", (projector.shape[0],))
    check_positive("alpha", alpha)
    check_apart("projector", projector)


def _check_grad(grad: Tensor, projector: Tensor) -> None:
    shape = grad.shape
    if len(shape) != 2 or shape[1] != projector.shape[0]:
        check_shape("grad", grad, "C, D", (None, projector.shape[0]))


def _check_projector(projector: Tensor) -> None:
    check_tensor("projector", projector)
    if projector.dtype not in (torch.float32, torch.float64):
        check_float("projector", projector)
        raise TypeError(f"projector must have dtype float32 or float64, got {dtype_name(projector.dtype)}")
    shape = projector.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"projector must have shape [D, D], got {shape_text(shape)}")


class _ProjectGradient(Op):
    is_linear = True

    @staticmethod
    def forward(options, grad, projector):
        return _project_op(grad, projector, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return _project_op(gradients[0], tensors[1].T, *options), None

    @staticmethod
    def formula(options, gradients, tensors):
        return _project(options, gradients[0], tensors[1].T), None


_project = differentiable(_ProjectGradient)


def _update_cpu(projector: Tensor, mean_feature: Tensor, alpha: float) -> None:
    if projector.shape[0] == 0:
        return
    dense = with_contiguous_rows(projector)
    h = cast(mean_feature, projector.dtype).contiguous()
    _backend.extension("cpu").gradient_projection_update(
        *strided(dense), h.data_ptr(), alpha, DTYPE_CODE[dense.dtype], torch.get_num_threads()
    )
    if dense is not projector:
        projector.copy_(dense)
    else:
        _note_change(projector)


def _note_change(projector: Tensor) -> None:
    # Kernels write behind autograd's back; a backward that saved the old values must notice.
    if not projector.is_inference():
        torch.autograd.graph.increment_version(projector)


def _project_cpu(grad: Tensor, projector: Tensor) -> Tensor:
    if grad.numel() == 0:
        return grad.new_empty(*grad.shape)
    if accumulation_dtype(grad.dtype) != projector.dtype:
        wide = torch.promote_types(grad.dtype, projector.dtype)
        return _project_cpu(grad.to(wide), projector.to(wide)).to(grad.dtype)
    projector = with_contiguous_rows(projector)
    projected = torch.empty_like(grad, memory_format=torch.contiguous_format)
    _backend.extension("cpu").gradient_projection_product(
        *strided(grad),
        *strided(projector),
        projected.data_ptr(),
        DTYPE_CODE[grad.dtype],
        torch.get_num_threads(),
    )
    return projected


def _step_cpu(projector: Tensor, mean_feature: Tensor, grad: Tensor, alpha: float) -> Tensor:
    is_one = projector.stride(1) == 1 and accumulation_dtype(grad.dtype) == projector.dtype
    if not is_one or projector.numel() == 0:
        grad = grad.clone()
        _update_cpu(projector, mean_feature, alpha)
        return _project_cpu(grad, projector)
    h = cast(mean_feature, projector.dtype).contiguous()
    # Half the time of new_empty.
    projected = torch.empty_like(grad, memory_format=torch.contiguous_format)
    _backend.extension("cpu").gradient_projection_step(
        *strided(projector),
        h.data_ptr(),
        *strided(grad),
        projected.data_ptr(),
        alpha,
        DTYPE_CODE[grad.dtype],
        torch.get_num_threads(),
    )
    _note_change(projector)
    return projected


def _update_triton(projector: Tensor, mean_feature: Tensor, alpha: float) -> None:
    _backend.kernels("gradient_projection").update_projector_(projector, mean_feature, alpha)
    _note_change(projector)


@outside_autocast
def _update_reference(projector: Tensor, mean_feature: Tensor, alpha: float) -> None:
    _reference.update_projector_(projector, mean_feature, alpha=alpha)


def _project_triton(grad: Tensor, projector: Tensor) -> Tensor:
    return _backend.kernels("gradient_projection").project_gradient(grad, projector)


def _step_triton(projector: Tensor, mean_feature: Tensor, grad: Tensor, alpha: float) -> Tensor:
    projected = _backend.kernels("gradient_projection").update_and_project_(
        projector, mean_feature, grad, alpha
    )
    _note_change(projector)
    return projected


def _update_fake(projector, mean_feature, alpha, backend):
    return None


def _project_fake(grad, projector, backend):
    return grad.new_empty(grad.shape)


def _step_fake(projector, mean_feature, grad, alpha, backend):
    return grad.new_empty(grad.shape)


_update_op = define(
    "gradient_projection",
    "update_projector_(Tensor(a!) projector, Tensor mean_feature, float alpha, str backend) -> ()",
    fake=_update_fake,
    reference=_update_reference,
    cpu=_update_cpu,
    triton=_update_triton,
)
_project_op = define(
    "gradient_projection",
    "project_gradient(Tensor grad, Tensor projector, str backend) -> Tensor",
    fake=_project_fake,
    reference=outside_autocast(_reference.project_gradient),
    cpu=_project_cpu,
    triton=_project_triton,
)
_step_op = define(
    "gradient_projection",
    "update_and_project_(Tensor(a!) projector, Tensor mean_feature, Tensor grad, float alpha, str backend)"
    " -> Tensor",
    fake=_step_fake,
    reference=outside_autocast(_reference.update_and_project_),
    cpu=_step_cpu,
    triton=_step_triton,
)
_run_update, _run_project, _run_step = map(
    RUN.__getitem__, ("update_projector_", "project_gradient", "update_and_project_")
)
