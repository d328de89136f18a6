"""Utilities of coalitions of modalities, and Shapley values of modalities whose logits add up."""

from __future__ import annotations

from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._additive_shapley_launch import UTILITIES, bwd_op, fwd_op, utilities_bwd_op, utilities_fwd_op
from mmfast.ops._autograd import Op, differentiable, is_constant
from mmfast.ops._checks import (
    check_choice,
    check_float,
    check_labels,
    check_same_device,
    check_shape,
    shape_text,
)
from mmfast.ops.shapley_values import MAX_PLAYERS
from mmfast.reference import additive_shapley as _reference

SMOOTH_UTILITIES = ("probability", "log_probability", "margin")


def coalition_utilities(
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    *,
    utility: str = "cardinality",
    backend: str = "auto",
) -> Tensor:  # [N, S]
    """Return what the logits of every coalition of modalities are worth for the true class.

    Equivalent to, for the default:

        sizes = torch.tensor([s.bit_count() for s in range(S)])
        values = sizes * (logits.argmax(-1) == labels[:, None])

    Args:
        logits: [N, S, C] float32, float64, bfloat16 or float16, any strides; S = 2^M, and bit m of the index
            is set when modality m is present.
        labels: [N] of an integer dtype, in [0, C).
        utility: "cardinality", the number of modalities present where the largest logit is the label's, else
            0; "correct", 1 or 0 alike; "probability", the label's softmax; "log_probability", its logarithm;
            "margin", the label's logit less the largest of the others. Of equal logits the lowest class
            counts as largest, and a NaN as larger than all numbers.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [N, S] in the dtype of `logits`; half precision is computed in float32. Differentiable with
        respect to `logits` for the last three utilities; the first two carry no gradient.

    Raises:
        TypeError: `logits` is no tensor of a floating dtype, or `labels` none of an integer dtype.
        ValueError: a shape is wrong, S is no power of two or below 2, a label on the CPU lies outside [0, C),
            "margin" is asked of a single class, or `utility` is unknown.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024.
    """
    check_choice("utility", utility, UTILITIES)
    check_float("logits", logits)
    check_shape("logits", logits, "N, S, C", (None, None, None))
    check_labels("labels", labels, logits.shape[0])
    check_same_device(logits=logits, labels=labels)
    num_coalitions = logits.shape[1]
    if num_coalitions < 2 or num_coalitions & (num_coalitions - 1):
        raise ValueError(
            f"logits must hold S = 2^M coalitions, a power of two from 2 on, got {num_coalitions} "
            f"in {shape_text(logits.shape)}"
        )
    _check_classes("logits", logits, utility)
    _backend.check_name(backend)
    if is_constant(logits):
        return utilities_fwd_op(logits, labels, utility, backend)
    if utility in SMOOTH_UTILITIES:
        return _utilities((utility, backend), logits, labels)
    return utilities_fwd_op(logits.detach(), labels, utility, backend)


def additive_shapley(
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [C]
    *,
    utility: str = "cardinality",
    backend: str = "auto",
) -> Tensor:  # [N, M]
    """Return each modality's Shapley value where a coalition's logits are the sum of its modalities' parts.

    Equivalent to, without the [N, S, C] table:

        present = (torch.arange(2**M)[:, None] >> torch.arange(M)) & 1
        logits = torch.einsum("sm,mnc->nsc", present.to(partial_logits), partial_logits) + bias
        phi = shapley_values(coalition_utilities(logits, labels, utility=utility))

    Args:
        partial_logits: [M, N, C] float32, float64, bfloat16 or float16, any strides; M from 1 to 20.
        labels: [N] of an integer dtype, in [0, C).
        bias: [C] of any of these dtypes, the logits of the empty coalition; zeros if None.
        utility: as for `coalition_utilities`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [N, M] in the dtype of `partial_logits`; half precision is computed in float32. Differentiable
        with respect to `partial_logits` and `bias` for the smooth utilities "probability", "log_probability",
        "margin".

    Raises:
        TypeError: `partial_logits` or `bias` is no tensor of a floating dtype, or `labels` none of an integer
            dtype.
        ValueError: a shape is wrong, M is 0 or above 20, a label on the CPU lies outside [0, C), "margin" is
            asked of a single class, or `utility` is unknown.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024.
    """
    check_choice("utility", utility, UTILITIES)
    check_float("partial_logits", partial_logits)
    check_shape("partial_logits", partial_logits, "M, N, C", (None, None, None))
    num_modalities, num_samples, num_classes = partial_logits.shape
    if not 1 <= num_modalities <= MAX_PLAYERS:
        raise ValueError(
            f"partial_logits must hold M modalities, from 1 to {MAX_PLAYERS}, got {num_modalities} "
            f"in {shape_text(partial_logits.shape)}"
        )
    _check_classes("partial_logits", partial_logits, utility)
    check_labels("labels", labels, num_samples)
    check_same_device(partial_logits=partial_logits, labels=labels)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, "C", (num_classes,))
        check_same_device(partial_logits=partial_logits, bias=bias)
    _backend.check_name(backend)
    if is_constant(partial_logits, bias):
        return fwd_op(partial_logits, labels, bias, utility, backend)
    if utility in SMOOTH_UTILITIES:
        return _additive((utility, backend), partial_logits, labels, bias)
    if bias is not None:
        bias = bias.detach()
    return fwd_op(partial_logits.detach(), labels, bias, utility, backend)


def _check_classes(name: str, logits: Tensor, utility: str) -> None:
    least = 2 if utility == "margin" else 1
    if logits.shape[-1] < least:
        raise ValueError(
            f"{name} must have C >= {least} classes for utility {utility!r}, got {shape_text(logits.shape)}"
        )


class _CoalitionUtilities(Op):
    @staticmethod
    def forward(options, logits, labels):
        return utilities_fwd_op(logits, labels, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return utilities_bwd_op(*gradients, *tensors, *options), None

    @staticmethod
    def formula(options, gradients, tensors):
        return _reference.coalition_utilities_bwd(*gradients, *tensors, utility=options[0]), None


class _AdditiveShapley(Op):
    @staticmethod
    def forward(options, partial_logits, labels, bias):
        return fwd_op(partial_logits, labels, bias, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        dpartial_logits, dbias = bwd_op(*gradients, *tensors, *options)
        return dpartial_logits, None, None if tensors[2] is None else dbias

    @staticmethod
    def formula(options, gradients, tensors):
        partial_logits, _, bias = tensors
        dpartial, dbias = _reference.additive_shapley_bwd(*gradients, *tensors, utility=options[0])
        return dpartial.to(partial_logits.dtype), None, None if bias is None else dbias.to(bias.dtype)


_utilities, _additive = differentiable(_CoalitionUtilities), differentiable(_AdditiveShapley)
