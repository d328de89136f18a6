"""Utilities of coalitions of modalities, and Shapley values of modalities whose logits add up."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant
from mmfast.ops._common import (
    DTYPE_CODE,
    cast,
    check_choice,
    check_float,
    check_label_range,
    check_labels,
    check_same_device,
    check_shape,
    register,
    shape_text,
    whole_labels,
)
from mmfast.ops.shapley_values import MAX_PLAYERS
from mmfast.reference import additive_shapley as _reference
from mmfast.reference._common import accumulation_dtype, row_chunks

UTILITIES = ("cardinality", "correct", "probability", "log_probability", "margin")
SMOOTH_UTILITIES = ("probability", "log_probability", "margin")
# As in csrc/cpu/additive_shapley.cpp, which knows the utilities by their places, too.
_SAMPLES_PER_CHUNK = 256


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
        return _utilities_fwd_op(logits, labels, utility, backend)
    if utility in SMOOTH_UTILITIES:
        return _utilities((utility, backend), logits, labels)
    return _utilities_fwd_op(logits.detach(), labels, utility, backend)


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
        return _fwd_op(partial_logits, labels, bias, utility, backend)
    if utility in SMOOTH_UTILITIES:
        return _additive((utility, backend), partial_logits, labels, bias)
    if bias is not None:
        bias = bias.detach()
    return _fwd_op(partial_logits.detach(), labels, bias, utility, backend)


def _check_classes(name: str, logits: Tensor, utility: str) -> None:
    least = 2 if utility == "margin" else 1
    if logits.shape[-1] < least:
        raise ValueError(
            f"{name} must have C >= {least} classes for utility {utility!r}, got {shape_text(logits.shape)}"
        )


class _CoalitionUtilities(Op):
    @staticmethod
    def forward(options, logits, labels):
        return _utilities_fwd_op(logits, labels, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return _utilities_bwd_op(*gradients, *tensors, *options), None

    @staticmethod
    def formula(options, gradients, tensors):
        return _reference.coalition_utilities_bwd(*gradients, *tensors, utility=options[0]), None


class _AdditiveShapley(Op):
    @staticmethod
    def forward(options, partial_logits, labels, bias):
        return _fwd_op(partial_logits, labels, bias, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        dpartial_logits, dbias = _bwd_op(*gradients, *tensors, *options)
        return dpartial_logits, None, None if tensors[2] is None else dbias

    @staticmethod
    def formula(options, gradients, tensors):
        partial_logits, _, bias = tensors
        dpartial, dbias = _reference.additive_shapley_bwd(*gradients, *tensors, utility=options[0])
        return dpartial.to(partial_logits.dtype), None, None if bias is None else dbias.to(bias.dtype)


_utilities, _additive = differentiable(_CoalitionUtilities), differentiable(_AdditiveShapley)


def _resolve(tensor: Tensor, backend: str) -> str:
    chosen = _backend.choose("additive_shapley", backend, tensor)
    if chosen == "triton":
        most = _backend.kernels("additive_shapley").MAX_CLASSES
        if tensor.shape[-1] > most:
            if backend == "triton":
                raise _backend.BackendUnavailableError(
                    f"backend 'triton' cannot run additive_shapley: its kernels take up to {most} classes, "
                    f"got {tensor.shape[-1]}"
                )
            found = _backend.candidates("additive_shapley", tensor.device.type, tensor.dtype)
            return next(name for name in found if name != "triton")
    return chosen


def _run(
    chosen: str,  # "cpu" or "cuda"
    entry: str,  # "coalition_utilities_fwd" and the like
    gradients: tuple[Tensor, ...],  # of backward: that of the result
    logits: Tensor,  # [N, S, C] or [M, N, C]
    labels: Tensor,  # [N]
    others: tuple[Tensor | None, ...],  # the bias in the dtype of accumulation, contiguous outputs
    utility: str,
    *parts: int,  # of additive_shapley in CUDA: the first size of the last output
) -> None:
    if gradients:
        gradients = tuple([cast(gradient, logits.dtype).contiguous() for gradient in gradients])
    tensors = (*gradients, logits, whole_labels(labels), *others)
    getattr(_backend.extension(chosen), entry)(
        *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        *logits.shape,
        *logits.stride(),
        UTILITIES.index(utility),
        DTYPE_CODE[logits.dtype],
        *parts,
        *_backend.where(chosen, logits),
    )


# Rows of sums over samples that the bias's gradient is added up from.
_CUDA_ROWS = 1024
# Threads that fill the largest GPU; with fewer, blocks share the coalitions of a sample.
_CUDA_ENOUGH_THREADS = 2**17


def _wide_operands(
    partial_logits: Tensor,  # [M, N, C]
    bias: Tensor | None,  # [C]
) -> tuple[Tensor, Tensor | None]:
    """Return both as the kernels take them: a float64 bias widens all, otherwise it follows."""
    if bias is None:
        return partial_logits, None
    dtype = accumulation_dtype(partial_logits.dtype)
    if torch.promote_types(dtype, bias.dtype) != dtype:
        partial_logits, dtype = partial_logits.double(), torch.float64
    return partial_logits, cast(bias, dtype).contiguous()


def _utilities_fwd(logits: Tensor, labels: Tensor, utility: str, backend: str) -> Tensor:
    chosen = _resolve(logits, backend)
    if chosen != "cpu":
        check_label_range("labels", labels, logits.shape[-1])
    if chosen == "triton":
        launch = _backend.kernels("additive_shapley").coalition_utilities_fwd
        return launch(logits, labels, UTILITIES.index(utility))
    values = logits.new_empty(logits.shape[0], logits.shape[1])
    if chosen != "reference":
        if values.numel() > 0:
            _run(chosen, "coalition_utilities_fwd", (), logits, labels, (values,), utility)
        return values
    for rows in row_chunks(logits, logits.shape[0], logits.shape[1] * logits.shape[2]):
        values[rows] = _reference.coalition_utilities(logits[rows], labels[rows], utility=utility)
    return values


def _utilities_bwd(dutilities: Tensor, logits: Tensor, labels: Tensor, utility: str, backend: str) -> Tensor:
    chosen = _resolve(logits, backend)
    if chosen == "triton":
        launch = _backend.kernels("additive_shapley").coalition_utilities_bwd
        return launch(dutilities, logits, labels, UTILITIES.index(utility))
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if chosen != "reference":
        if dlogits.numel() > 0:
            _run(chosen, "coalition_utilities_bwd", (dutilities,), logits, labels, (dlogits,), utility)
        return dlogits
    for rows in row_chunks(logits, logits.shape[0], logits.shape[1] * logits.shape[2]):
        dlogits[rows] = _reference.coalition_utilities_bwd(
            dutilities[rows], logits[rows], labels[rows], utility=utility
        )
    return dlogits


def _fwd(partial_logits: Tensor, labels: Tensor, bias: Tensor | None, utility: str, backend: str) -> Tensor:
    num_modalities, num_samples, num_classes = partial_logits.shape
    chosen = _resolve(partial_logits, backend)
    if chosen != "cpu":
        check_label_range("labels", labels, num_classes)
    if chosen == "triton":
        operand, wide_bias = _wide_operands(partial_logits, bias)
        launch = _backend.kernels("additive_shapley").additive_shapley_fwd
        return launch(operand, labels, wide_bias, UTILITIES.index(utility)).to(partial_logits.dtype)
    if chosen == "cuda":
        return _fwd_cuda(partial_logits, labels, bias, utility)
    phi = partial_logits.new_empty(num_samples, num_modalities)
    if chosen == "cpu":
        operand, wide_bias = _wide_operands(partial_logits, bias)
        wide_phi = cast(phi, operand.dtype)
        if phi.numel() > 0:
            _run("cpu", "additive_shapley_fwd", (), operand, labels, (wide_bias, wide_phi), utility)
        return cast(wide_phi, phi.dtype)
    # Samples go in chunks: the table of all coalitions' logits exists for a few at a time.
    for rows in row_chunks(partial_logits, num_samples, 2**num_modalities * num_classes):
        phi[rows] = _reference.additive_shapley(partial_logits[:, rows], labels[rows], bias, utility=utility)
    return phi


def _bwd(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    utility: str,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    num_modalities, num_samples, num_classes = partial_logits.shape
    chosen = _resolve(partial_logits, backend)
    if chosen == "triton":
        operand, wide_bias = _wide_operands(partial_logits, bias)
        launch = _backend.kernels("additive_shapley").additive_shapley_bwd
        dpartial, dbias = launch(dphi, operand, labels, wide_bias, UTILITIES.index(utility))
        like = partial_logits if bias is None else bias
        return dpartial.to(partial_logits.dtype), dbias.to(like.dtype)
    if chosen == "cuda":
        return _bwd_cuda(dphi, partial_logits, labels, bias, utility)
    dpartial_logits = torch.empty(
        partial_logits.shape, dtype=partial_logits.dtype, device=partial_logits.device
    )
    if chosen == "cpu":
        return _bwd_cpu(dphi, partial_logits, labels, bias, dpartial_logits, utility)
    dbias = None
    for rows in row_chunks(partial_logits, num_samples, 2**num_modalities * num_classes):
        dpartial_logits[:, rows], dchunk = _reference.additive_shapley_bwd(
            dphi[rows], partial_logits[:, rows], labels[rows], bias, utility=utility
        )
        dbias = dchunk if dbias is None else dbias + dchunk
    if bias is None:
        return dpartial_logits, partial_logits.new_empty(0)
    return dpartial_logits, torch.zeros_like(bias) if dbias is None else dbias.to(bias.dtype)


def _bwd_cpu(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    dpartial_logits: Tensor,  # [M, N, C] to be filled
    utility: str,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    operand, wide_bias = _wide_operands(partial_logits, bias)
    wide_gradient = cast(dpartial_logits, operand.dtype)
    # The kernel sums the bias's gradient within chunks of samples, one row each.
    num_chunks = -(-operand.shape[1] // _SAMPLES_PER_CHUNK)
    chunks = operand.new_empty(num_chunks, operand.shape[2], dtype=accumulation_dtype(operand.dtype))
    if operand.numel() > 0:
        others = (wide_bias, wide_gradient, chunks)
        _run("cpu", "additive_shapley_bwd", (dphi,), operand, labels, others, utility)
    dbias = partial_logits.new_empty(0) if bias is None else cast(chunks.sum(0), bias.dtype)
    return cast(wide_gradient, dpartial_logits.dtype), dbias


def _fwd_cuda(
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    utility: str,
) -> Tensor:  # [N, M]
    operand, wide_bias = _wide_operands(partial_logits, bias)
    num_modalities, num_samples, num_classes = operand.shape
    threads = num_samples * min(128, -(-num_classes // 4))
    splits = 1
    while 64 * splits < 2**num_modalities and splits * threads < _CUDA_ENOUGH_THREADS:
        splits *= 2
    phi = operand.new_empty(num_samples, num_modalities)
    parts = None
    if splits > 1:
        parts = phi.new_empty(splits, *phi.shape, dtype=accumulation_dtype(phi.dtype))
    if phi.numel() > 0:
        others = (wide_bias, phi, parts)
        _run("cuda", "additive_shapley_fwd", (), operand, labels, others, utility, splits)
    return (phi if parts is None else parts.sum(0)).to(partial_logits.dtype)


def _bwd_cuda(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    utility: str,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    operand, wide_bias = _wide_operands(partial_logits, bias)
    _, num_samples, num_classes = operand.shape
    dtype = accumulation_dtype(operand.dtype)
    # Of more classes than the lanes of a warp hold, the kernel adds up the gradients in memory.
    is_held = num_classes <= (256 if operand.element_size() == 2 else 128)
    gradient = torch.empty(operand.shape, dtype=operand.dtype if is_held else dtype, device=operand.device)
    rows = min(num_samples, _CUDA_ROWS)
    sums = None if bias is None else operand.new_empty(rows, num_classes, dtype=dtype)
    if operand.numel() > 0:
        others = (wide_bias, gradient, sums)
        _run("cuda", "additive_shapley_bwd", (dphi,), operand, labels, others, utility, rows)
    gradient = gradient.to(partial_logits.dtype)
    if bias is None or sums is None:
        return gradient, partial_logits.new_empty(0)
    return gradient, sums.sum(0).to(bias.dtype)


def _utilities_fwd_fake(logits, labels, utility, backend):
    return logits.new_empty(logits.shape[:2])


def _utilities_bwd_fake(dutilities, logits, labels, utility, backend):
    return logits.new_empty(logits.shape)


def _fwd_fake(partial_logits, labels, bias, utility, backend):
    return partial_logits.new_empty(partial_logits.shape[1], partial_logits.shape[0])


def _bwd_fake(dphi, partial_logits, labels, bias, utility, backend):
    return partial_logits.new_empty(partial_logits.shape), (
        partial_logits.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    )


_utilities_fwd_op = register(
    "coalition_utilities_fwd(Tensor logits, Tensor labels, str utility, str backend) -> Tensor",
    _utilities_fwd,
    _utilities_fwd_fake,
)
_utilities_bwd_op = register(
    "coalition_utilities_bwd(Tensor dutilities, Tensor logits, Tensor labels, str utility, str backend)"
    " -> Tensor",
    _utilities_bwd,
    _utilities_bwd_fake,
)
_fwd_op = register(
    "additive_shapley_fwd(Tensor partial_logits, Tensor labels, Tensor? bias, str utility, str backend)"
    " -> Tensor",
    _fwd,
    _fwd_fake,
)
_bwd_op = register(
    "additive_shapley_bwd(Tensor dphi, Tensor partial_logits, Tensor labels, Tensor? bias, str utility,"
    " str backend) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
