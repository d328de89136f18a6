"""Fusion of unimodal logits, sample by sample, with more weight to modalities that are surer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant, is_transformed
from mmfast.ops._checks import (
    check_bool,
    check_float,
    check_positive,
    check_same_device,
    check_scale_tensor,
    check_shape,
    shape_text,
)
from mmfast.ops._launch import DTYPE_CODE, address, cast, strided
from mmfast.ops._registration import define
from mmfast.reference import logit_fusion as _reference
from mmfast.reference._common import accumulation_dtype

# The kernels know the scores by their places here.
SCORES = ("entropy", "certainty")


def entropy_fusion(
    logits: Tensor,  # [M, N, C]
    *,
    present: Tensor | None = None,  # bool [M, N]
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return the sum of the modalities' logits weighted by the softmax of their negative entropies.

    Equivalent to:

        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        weights = (-entropy).softmax(0)
        fused = (weights[..., None] * logits).sum(0)

    Args:
        logits: [M, N, C] float32, float64, bfloat16 or float16, any strides. A logit of -inf excludes its
            class of that sample: the fused logit is -inf, however small the modality's weight is, and the
            weights get no gradient from it.
        present: bool [M, N], False where a sample lacks a modality: its weight is 0 and its logits, whatever
            they hold, have no influence. A sample without any modality has weights 0 and fused logits 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        fused [N, C] and weights [M, N] in the dtype of `logits`, computed in at least float32; the weights of
        a sample sum to 1. No sample depends on another. Both are differentiable.

    Raises:
        TypeError: `logits` is no tensor of a floating dtype, or `present` none of bool.
        ValueError: a shape is wrong, or M or C is 0.

    Source: Zhang et al., "Multimodal representation learning by alternating unimodal adaptation", CVPR 2024,
    with the entropy of each sample.
    """
    _check(logits, present)
    _backend.check_name(backend)
    if is_constant(logits):
        return _fwd_op(logits, present, "entropy", 1.0, backend)
    return _fusion(("entropy", 1.0, backend), logits, present)


def certainty_fusion(
    logits: Tensor,  # [M, N, C]
    *,
    temperature: float | Tensor = 1.0,  # or []
    present: Tensor | None = None,  # bool [M, N]
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return the sum of the modalities' logits weighted by the softmax of their largest probabilities.

    Equivalent to:

        certainty = logits.softmax(-1).amax(-1)
        weights = (certainty / temperature).softmax(0)
        fused = (weights[..., None] * logits).sum(0)

    Args:
        logits: [M, N, C] float32, float64, bfloat16 or float16, any strides. A logit of -inf excludes its
            class of that sample: the fused logit is -inf, however small the modality's weight is, and the
            weights get no gradient from it.
        temperature: positive, within what float32 holds and divides by: 2.938737e-39 to 3.4028235e+38. The
            smaller, the more the surest modality decides alone. A tensor of one element may be learnt; what
            is on a GPU is not read there, and plain torch computes.
        present: bool [M, N], False where a sample lacks a modality: its weight is 0 and its logits, whatever
            they hold, have no influence. A sample without any modality has weights 0 and fused logits 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        fused [N, C] and weights [M, N] in the dtype of `logits`, computed in at least float32; the weights of
        a sample sum to 1. Both are differentiable, also with
        respect to a temperature that is a tensor; of equal largest logits the lowest class gets the
        gradient.

    Raises:
        TypeError: `logits` is no tensor of a floating dtype, `present` none of bool, or `temperature` no
            number.
        ValueError: a shape is wrong, M or C is 0, or `temperature` is not positive, finite and within range.

    Source: Fan et al., "Detached and interactive multimodal learning", ACM MM 2024.
    """
    _check(logits, present)
    if isinstance(temperature, Tensor):
        check_scale_tensor("temperature", temperature)
        _backend.check_name(backend)
        return _tempered((backend,), logits, present, temperature.to(logits.device))
    check_positive("temperature", temperature)
    _backend.check_name(backend)
    if is_constant(logits):
        return _fwd_op(logits, present, "certainty", float(temperature), backend)
    return _fusion(("certainty", float(temperature), backend), logits, present)


def _check(logits: Tensor, present: Tensor | None) -> None:
    check_float("logits", logits)
    check_shape("logits", logits, "M, N, C", (None, None, None))
    num_modalities, num_samples, num_classes = logits.shape
    if num_modalities == 0 or num_classes == 0:
        raise ValueError(
            f"logits must have M >= 1 modalities and C >= 1 classes, got {shape_text(logits.shape)}"
        )
    if present is None:
        return
    check_bool("present", present)
    check_shape("present", present, "M, N", (num_modalities, num_samples))
    check_same_device(logits=logits, present=present)


class _LogitFusion(Op):
    @staticmethod
    def forward(options, logits, present):
        return _fwd_op(logits, present, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return _bwd_op(*_both(gradients, tensors[0]), *tensors, *options), None

    @staticmethod
    def formula(options, gradients, tensors):
        (logits, present), (score, temperature, _) = tensors, options
        dfused, dweights = _both(gradients, logits)
        dlogits, _ = _reference.logit_fusion_bwd(
            dfused, dweights, logits, present=present, score=score, temperature=temperature
        )
        return dlogits, None


class _Tempered(Op):
    """Certainty fusion with a temperature that is a tensor."""

    @staticmethod
    def _known(temperature: Tensor) -> bool:
        return temperature.is_cpu and not torch.compiler.is_compiling() and not is_transformed()

    @staticmethod
    def forward(options, logits, present, temperature):
        if _Tempered._known(temperature):
            return _fwd_op(logits, present, "certainty", float(temperature.detach()), *options)
        return _reference.logit_fusion(
            logits, present=present, score="certainty", temperature=_wide(temperature, logits)
        )

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        logits, present, temperature = tensors
        dlogits, _, dtemperature = _Tempered.formula(options, gradients, tensors)
        if _Tempered._known(temperature):
            both = _both(gradients, logits)
            dlogits = _bwd_op(*both, logits, present, "certainty", float(temperature.detach()), *options)
        return dlogits, None, dtemperature

    @staticmethod
    def formula(options, gradients, tensors):
        logits, present, temperature = tensors
        dlogits, dtemperature = _reference.logit_fusion_bwd(
            *_both(gradients, logits),
            logits,
            present=present,
            score="certainty",
            temperature=_wide(temperature, logits),
        )
        return dlogits, None, dtemperature.to(temperature.dtype).reshape(temperature.shape)


def _wide(
    temperature: Tensor,  # [] or [1]
    logits: Tensor,  # [M, N, C]
) -> Tensor:  # []
    return temperature.to(accumulation_dtype(logits.dtype)).reshape(())


def _both(
    gradients: Sequence[Tensor | None],  # [N, C], [M, N]; None where nothing depends on the result
    logits: Tensor,  # [M, N, C]
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    dfused, dweights = gradients
    # One number for all: nothing is written, and kernels take the strides of what they are given.
    dfused = logits.new_zeros(()).expand(logits.shape[1:]) if dfused is None else dfused
    dweights = logits.new_zeros(()).expand(logits.shape[:2]) if dweights is None else dweights
    return dfused, dweights


_fusion, _tempered = differentiable(_LogitFusion), differentiable(_Tempered)


def _run_cpu(
    entry: str,  # "logit_fusion_fwd" or "logit_fusion_bwd"
    gradients: tuple[Tensor, ...],  # of backward: dfused [N, C], dweights [M, N]
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    outputs: tuple[Tensor, ...],  # contiguous, in the dtype of `logits`
    score: str,
    temperature: float,
) -> None:
    if logits.numel() == 0:
        return
    if gradients:
        gradients = tuple([cast(gradient, logits.dtype).contiguous() for gradient in gradients])
    mask = None if present is None else present.contiguous()
    getattr(_backend.extension("cpu"), entry)(
        *[gradient.data_ptr() for gradient in gradients],
        *strided(logits),
        address(mask),
        *[output.data_ptr() for output in outputs],
        SCORES.index(score),
        temperature,
        DTYPE_CODE[logits.dtype],
        torch.get_num_threads(),
    )


def _fwd_cpu(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,  # "entropy" or "certainty"
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    outputs = _fwd_fake(logits, present, score, temperature, "cpu")
    _run_cpu("logit_fusion_fwd", (), logits, present, outputs, score, temperature)
    return outputs


def _fwd_triton(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    launch = _backend.kernels("logit_fusion").logit_fusion_fwd
    return launch(logits, present, SCORES.index(score), temperature)


def _fwd_reference(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    return _reference.logit_fusion(logits, present=present, score=score, temperature=temperature)


def _bwd_cpu(
    dfused: Tensor,  # [N, C]
    dweights: Tensor,  # [M, N]
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float,
) -> Tensor:  # [M, N, C]
    dlogits = logits.new_empty(*logits.shape)
    gradients = (dfused, dweights)
    _run_cpu("logit_fusion_bwd", gradients, logits, present, (dlogits,), score, temperature)
    return dlogits


def _bwd_triton(
    dfused: Tensor,  # [N, C]
    dweights: Tensor,  # [M, N]
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float,
) -> Tensor:  # [M, N, C]
    launch = _backend.kernels("logit_fusion").logit_fusion_bwd
    return launch(dfused, dweights, logits, present, SCORES.index(score), temperature)


def _bwd_reference(
    dfused: Tensor,  # [N, C]
    dweights: Tensor,  # [M, N]
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float,
) -> Tensor:  # [M, N, C]
    dlogits, _ = _reference.logit_fusion_bwd(
        dfused, dweights, logits, present=present, score=score, temperature=temperature
    )
    return dlogits


def _fwd_fake(logits, present, score, temperature, backend):
    num_modalities, num_samples, num_classes = logits.shape
    return logits.new_empty(num_samples, num_classes), logits.new_empty(num_modalities, num_samples)


def _bwd_fake(dfused, dweights, logits, present, score, temperature, backend):
    return logits.new_empty(logits.shape)


_fwd_op = define(
    "logit_fusion",
    "logit_fusion_fwd(Tensor logits, Tensor? present, str score, float temperature, str backend)"
    " -> (Tensor, Tensor)",
    fake=_fwd_fake,
    reference=_fwd_reference,
    cpu=_fwd_cpu,
    triton=_fwd_triton,
)
_bwd_op = define(
    "logit_fusion",
    "logit_fusion_bwd(Tensor dfused, Tensor dweights, Tensor logits, Tensor? present, str score,"
    " float temperature, str backend) -> Tensor",
    fake=_bwd_fake,
    reference=_bwd_reference,
    cpu=_bwd_cpu,
    triton=_bwd_triton,
    by="logits",
)
