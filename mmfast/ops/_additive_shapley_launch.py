"""Where coalition utilities and their Shapley values run: from logits to the kernels of each backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._checks import check_label_range
from mmfast.ops._launch import DTYPE_CODE, address, as_int64, cast, strided
from mmfast.ops._registration import define
from mmfast.reference import additive_shapley as _reference
from mmfast.reference._common import accumulation_dtype, row_chunks

UTILITIES = ("cardinality", "correct", "probability", "log_probability", "margin")


def _run(
    backend: str,  # "cpu" or "cuda"
    entry: str,  # "coalition_utilities_fwd" and the like
    gradients: tuple[Tensor, ...],  # of backward: that of the result
    logits: Tensor,  # [N, S, C] or [M, N, C]
    labels: Tensor,  # [N]
    addresses: tuple[int, ...],  # of the bias, of contiguous outputs, and how many parts of sums there are
    utility: str,
) -> None:
    gradients = tuple([cast(gradient, logits.dtype).contiguous() for gradient in gradients])
    labels = as_int64(labels)
    getattr(_backend.extension(backend), entry)(
        *[gradient.data_ptr() for gradient in gradients],
        *strided(logits),
        labels.data_ptr(),
        *addresses,
        UTILITIES.index(utility),
        DTYPE_CODE[logits.dtype],
        *_backend.where(backend, logits),
    )


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


def _triton_refuses(*args: Tensor | str | None) -> str | None:
    most = _backend.kernels("additive_shapley").MAX_CLASSES
    num_classes = next(x.shape[-1] for x in args if isinstance(x, Tensor) and x.dim() == 3)
    return f"its kernels take up to {most} classes, got {num_classes}" if num_classes > most else None


def _utilities_fwd_compiled(backend: str, logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    values = logits.new_empty(logits.shape[0], logits.shape[1])
    if values.numel() > 0:
        _run(backend, "coalition_utilities_fwd", (), logits, labels, (values.data_ptr(),), utility)
    return values


def _utilities_fwd_cpu(logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    return _utilities_fwd_compiled("cpu", logits, labels, utility)


def _utilities_fwd_cuda(logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    check_label_range("labels", labels, logits.shape[-1])
    return _utilities_fwd_compiled("cuda", logits, labels, utility)


def _utilities_fwd_triton(logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    check_label_range("labels", labels, logits.shape[-1])
    launch = _backend.kernels("additive_shapley").coalition_utilities_fwd
    return launch(logits, labels, UTILITIES.index(utility))


def _utilities_fwd_reference(logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    check_label_range("labels", labels, logits.shape[-1])
    values = logits.new_empty(logits.shape[0], logits.shape[1])
    for rows in row_chunks(logits, logits.shape[0], logits.shape[1] * logits.shape[2]):
        values[rows] = _reference.coalition_utilities(logits[rows], labels[rows], utility=utility)
    return values


def _utilities_bwd_compiled(backend: str) -> Callable:
    def run(dutilities: Tensor, logits: Tensor, labels: Tensor, utility: str) -> Tensor:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if dlogits.numel() > 0:
            _run(
                backend,
                "coalition_utilities_bwd",
                (dutilities,),
                logits,
                labels,
                (dlogits.data_ptr(),),
                utility,
            )
        return dlogits

    return run


def _utilities_bwd_triton(dutilities: Tensor, logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    launch = _backend.kernels("additive_shapley").coalition_utilities_bwd
    return launch(dutilities, logits, labels, UTILITIES.index(utility))


def _utilities_bwd_reference(dutilities: Tensor, logits: Tensor, labels: Tensor, utility: str) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in row_chunks(logits, logits.shape[0], logits.shape[1] * logits.shape[2]):
        dlogits[rows] = _reference.coalition_utilities_bwd(
            dutilities[rows], logits[rows], labels[rows], utility=utility
        )
    return dlogits


def _fwd_cpu(partial_logits: Tensor, labels: Tensor, bias: Tensor | None, utility: str) -> Tensor:
    operand, wide_bias = _wide_operands(partial_logits, bias)
    phi = operand.new_empty(operand.shape[1], operand.shape[0])
    if phi.numel() > 0:
        addresses = (address(wide_bias), phi.data_ptr(), 0, 1)
        _run("cpu", "additive_shapley_fwd", (), operand, labels, addresses, utility)
    return cast(phi, partial_logits.dtype)


def _fwd_cuda(partial_logits: Tensor, labels: Tensor, bias: Tensor | None, utility: str) -> Tensor:
    check_label_range("labels", labels, partial_logits.shape[-1])
    operand, wide_bias = _wide_operands(partial_logits, bias)
    phi = operand.new_empty(operand.shape[1], operand.shape[0])
    if phi.numel() == 0:
        return phi.to(partial_logits.dtype)
    plan = _backend.extension("cuda").additive_shapley_fwd_plan
    num_parts = plan(*operand.shape, DTYPE_CODE[operand.dtype])
    parts = None
    if num_parts > 1:
        # Sums over parts of the coalitions.
        parts = phi.new_empty(num_parts, *phi.shape, dtype=accumulation_dtype(phi.dtype))
    addresses = (address(wide_bias), phi.data_ptr(), address(parts), num_parts)
    _run("cuda", "additive_shapley_fwd", (), operand, labels, addresses, utility)
    return cast(phi if parts is None else parts.sum(0), partial_logits.dtype)


def _fwd_triton(partial_logits: Tensor, labels: Tensor, bias: Tensor | None, utility: str) -> Tensor:
    check_label_range("labels", labels, partial_logits.shape[-1])
    operand, wide_bias = _wide_operands(partial_logits, bias)
    launch = _backend.kernels("additive_shapley").additive_shapley_fwd
    return launch(operand, labels, wide_bias, UTILITIES.index(utility)).to(partial_logits.dtype)


def _fwd_reference(partial_logits: Tensor, labels: Tensor, bias: Tensor | None, utility: str) -> Tensor:
    num_modalities, num_samples, num_classes = partial_logits.shape
    check_label_range("labels", labels, num_classes)
    phi = partial_logits.new_empty(num_samples, num_modalities)
    # Samples go in chunks: the table of all coalitions' logits exists for a few at a time.
    for rows in row_chunks(partial_logits, num_samples, 2**num_modalities * num_classes):
        phi[rows] = _reference.additive_shapley(partial_logits[:, rows], labels[rows], bias, utility=utility)
    return phi


def _bwd_triton(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    utility: str,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    operand, wide_bias = _wide_operands(partial_logits, bias)
    launch = _backend.kernels("additive_shapley").additive_shapley_bwd
    dpartial, dbias = launch(dphi, operand, labels, wide_bias, UTILITIES.index(utility))
    like = partial_logits if bias is None else bias
    return dpartial.to(partial_logits.dtype), dbias.to(like.dtype)


def _bwd_reference(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    utility: str,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    num_modalities, num_samples, num_classes = partial_logits.shape
    dpartial_logits = torch.empty_like(partial_logits, memory_format=torch.contiguous_format)
    dbias = None
    for rows in row_chunks(partial_logits, num_samples, 2**num_modalities * num_classes):
        dpartial_logits[:, rows], dchunk = _reference.additive_shapley_bwd(
            dphi[rows], partial_logits[:, rows], labels[rows], bias, utility=utility
        )
        dbias = dchunk if dbias is None else dbias + dchunk
    if bias is None:
        return dpartial_logits, partial_logits.new_empty(0)
    return dpartial_logits, torch.zeros_like(bias) if dbias is None else dbias.to(bias.dtype)


def _bwd_compiled(backend: str) -> Callable:
    def run(
        dphi: Tensor,  # [N, M]
        partial_logits: Tensor,  # [M, N, C]
        labels: Tensor,  # [N]
        bias: Tensor | None,  # [C]
        utility: str,
    ) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
        operand, wide_bias = _wide_operands(partial_logits, bias)
        dtype = accumulation_dtype(operand.dtype)
        plan = _backend.extension(backend).additive_shapley_bwd_plan
        num_parts, is_wide = plan(*operand.shape, DTYPE_CODE[operand.dtype])
        gradient_dtype = dtype if is_wide else operand.dtype
        gradient = torch.empty(operand.shape, dtype=gradient_dtype, device=operand.device)
        # The kernel sums the bias's gradient over groups of samples, one row each.
        parts = None if bias is None else operand.new_empty(num_parts, operand.shape[2], dtype=dtype)
        if operand.numel() > 0:
            addresses = (address(wide_bias), gradient.data_ptr(), address(parts), num_parts)
            _run(backend, "additive_shapley_bwd", (dphi,), operand, labels, addresses, utility)
        gradient = cast(gradient, partial_logits.dtype)
        if bias is None or parts is None:
            return gradient, partial_logits.new_empty(0)
        return gradient, cast(parts.sum(0), bias.dtype)

    return run


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


_REFUSES = {"triton": _triton_refuses}

utilities_fwd_op = define(
    "additive_shapley",
    "coalition_utilities_fwd(Tensor logits, Tensor labels, str utility, str backend) -> Tensor",
    fake=_utilities_fwd_fake,
    reference=_utilities_fwd_reference,
    cpu=_utilities_fwd_cpu,
    cuda=_utilities_fwd_cuda,
    triton=_utilities_fwd_triton,
    refuses=_REFUSES,
)
utilities_bwd_op = define(
    "additive_shapley",
    "coalition_utilities_bwd(Tensor dutilities, Tensor logits, Tensor labels, str utility, str backend)"
    " -> Tensor",
    fake=_utilities_bwd_fake,
    reference=_utilities_bwd_reference,
    cpu=_utilities_bwd_compiled("cpu"),
    cuda=_utilities_bwd_compiled("cuda"),
    triton=_utilities_bwd_triton,
    refuses=_REFUSES,
    by="logits",
)
fwd_op = define(
    "additive_shapley",
    "additive_shapley_fwd(Tensor partial_logits, Tensor labels, Tensor? bias, str utility, str backend)"
    " -> Tensor",
    fake=_fwd_fake,
    reference=_fwd_reference,
    cpu=_fwd_cpu,
    cuda=_fwd_cuda,
    triton=_fwd_triton,
    refuses=_REFUSES,
)
bwd_op = define(
    "additive_shapley",
    "additive_shapley_bwd(Tensor dphi, Tensor partial_logits, Tensor labels, Tensor? bias, str utility,"
    " str backend) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    reference=_bwd_reference,
    cpu=_bwd_compiled("cpu"),
    cuda=_bwd_compiled("cuda"),
    triton=_bwd_triton,
    refuses=_REFUSES,
    by="partial_logits",
)
