"""The contrastive loss of one ordered pair, and of two modalities: against attention kernels with v = k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.reference import duc_loss as reference

from .harness import Case, Options, Work
from .peers import DIRECTIONS, Missing, assert_close, bind_all, check_against, compiled, on_gpu, optional

SIZE = "Samples N"
PAIRS = [(n, d, torch.float32) for d in (64, 128, 256, 512) for n in (16, 64, 512, 4096, 16_384)]
PAIRS += [(n, d, torch.bfloat16) for d in (128, 512) for n in (16, 64, 512, 4096)]
QUICK = [(64, 64, torch.float32), (512, 128, torch.float32), (512, 128, torch.bfloat16)]
TWO_MODALITIES = (16, 64, 512, 4096)
# On a GPU, in bfloat16, one and two modalities: what the loss is held against attention kernels by.
HEADLINE = [(n, d) for d in (64, 128, 256) for n in (16_384, 65_536)]
# Here one N x N matrix takes 17 GB, so only what needs none takes part, once.
MEMORY = (65_536, 512)
# Forward and backward are measured each alone, too, in so many dimensions and below so many samples.
ALONE, LARGE = 128, 16_384
# Samples whose loss and gradient are computed in float64, against all keys.
CHECKED = 256


def cases(options: Options) -> Iterator[Case]:
    """Yield one pair of N samples in d dimensions, two modalities with columns to gather, the memory case.

    On a GPU the headline cases come before the last.
    """
    for num_samples, dim, dtype in QUICK if options.quick else PAIRS:
        yield from _pair(num_samples, dim, dtype, options)
    for num_samples in (64,) if options.quick else TWO_MODALITIES:
        yield from _two_modalities(num_samples, 128, torch.float32, options)
    if options.device == "cuda" and not options.quick:
        for num_samples, dim in HEADLINE:
            yield from _pair(num_samples, dim, torch.bfloat16, options)
            yield from _two_modalities(num_samples, dim, torch.bfloat16, options)
    if not options.quick:
        yield from _pair(*MEMORY, torch.float32, options, once=True)


def _pair(
    num_samples: int, dim: int, dtype: torch.dtype, options: Options, once: bool = False
) -> Iterator[Case]:
    query, key = (torch.randn(num_samples, dim, device=options.device).to(dtype) for _ in range(2))
    query.requires_grad_()
    temperature = math.sqrt(dim)

    def ours(query: Tensor, key: Tensor) -> Tensor:
        return ops.unidirectional_info_nce(query, key, temperature=temperature)

    labels = torch.arange(num_samples, device=options.device)

    def eager(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(query @ key.T / temperature, labels)

    def attention(name: str) -> Callable[..., Tensor]:
        return lambda query, key: AttentionLoss.apply(query, key, temperature, name)

    peers: dict[str, Any] = {"eager": eager, "torch.compile": compiled(eager, options.quick)}
    too_large = _too_large(num_samples, query)
    if too_large:
        peers = dict.fromkeys(peers, too_large)
    if options.device == "cpu":
        peers["aten flash, v = k"] = attention("cpu")
    else:
        half, only = dtype != torch.float32, Missing("takes half precision only")
        peers["SDPA efficient, v = k"] = attention("efficient")
        peers["SDPA flash, v = k"] = attention("flash") if half else only
        peers["cuDNN, v = k"] = attention("cudnn") if half else only
    peers |= _packages(temperature, labels, options, too_large)
    bytes_of = {"forward": (2, 0), "backward": (1, 1), "both": (2, 1)}
    products = {"forward": 1, "backward": 0, "both": 2}
    for direction in DIRECTIONS if dim == ALONE and num_samples < LARGE else ("both",):
        read, written = (factor * query.nbytes for factor in bytes_of[direction])
        yield Case(
            name=f"N={num_samples:,} d={dim}",
            size=num_samples,
            panel=f"d={dim} {'bfloat16' if dtype == torch.bfloat16 else 'float32'}",
            check=_make_check(query.detach(), key, temperature, direction),
            work=Work(read, written, 2 * products[direction] * num_samples**2 * dim),
            dtype=dtype,
            once=once,
            **bind_all(ours, peers, (query, key), direction),
        )


def _too_large(num_samples: int, features: Tensor) -> Missing | None:
    """Return why no matrix of all pairs is made, where it takes too much."""
    if num_samples <= LARGE:
        return None
    return Missing(f"one N x N matrix takes {num_samples**2 * features.element_size() / 1e9:.0f} GB")


def _two_modalities(num_samples: int, dim: int, dtype: torch.dtype, options: Options) -> Iterator[Case]:
    """Yield duc_loss of two modalities that each teach the other `dim` of 2 `dim` dimensions."""
    features = [
        torch.randn(num_samples, 2 * dim, device=options.device).to(dtype).requires_grad_() for _ in range(2)
    ]
    effective = torch.zeros(2, 2 * dim, dtype=torch.bool, device=options.device)
    order = torch.randperm(2 * dim, device=options.device)
    effective[0, order[:dim]] = effective[1, order[dim:]] = True
    dims, temperature = ops.DucDims(effective), math.sqrt(dim)

    def ours(*features: Tensor) -> Tensor:
        return ops.duc_loss(features, dims, temperature=temperature)

    columns = {(m, n): dims.dims(m, n) for m, n in ((0, 1), (1, 0))}

    def by(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def total(*features: Tensor) -> Tensor:
            pairs = [
                loss(features[n].index_select(1, d), features[m].detach().index_select(1, d))
                for (m, n), d in columns.items()
            ]
            return pairs[0] + pairs[1]

        return total

    labels = torch.arange(num_samples, device=options.device)
    eager = by(lambda query, key: F.cross_entropy(query @ key.T / temperature, labels))
    too_large = _too_large(num_samples, features[0])
    peers: dict[str, Any] = {
        "eager": too_large or eager,
        "torch.compile": too_large or compiled(eager, options.quick),
    }

    def attention(kernel: str) -> Callable[..., Tensor]:
        return by(lambda query, key: AttentionLoss.apply(query, key, temperature, kernel))

    if options.device == "cpu":
        peers["aten flash, v = k"] = attention("cpu")
    elif dtype == torch.float32:
        peers["SDPA efficient, v = k"] = attention("efficient")
    else:
        peers["SDPA flash, v = k"] = attention("flash")
        peers["cuDNN, v = k"] = attention("cudnn")

    def plain(*features: Tensor) -> Tensor:
        return reference.duc_loss(features, effective, temperature=temperature)

    size = features[0].nbytes
    bytes_of = {"forward": (2 * size, 0), "backward": (2 * size, 2 * size), "both": (2 * size, 2 * size)}
    products = {"forward": 2, "backward": 0, "both": 4}
    is_headline = num_samples >= LARGE
    for direction in ("both",) if is_headline else DIRECTIONS:
        check = check_against(plain, features, direction)
        if is_headline:
            # In float64 all pairs at once would not fit.
            check = _make_check_of_two([x.detach() for x in features], columns, temperature)
        yield Case(
            name=f"M=2 N={num_samples:,} d={dim}",
            size=num_samples,
            panel=f"two modalities, d={dim}" + (" bfloat16" if dtype == torch.bfloat16 else ""),
            check=check,
            work=Work(*bytes_of[direction], 2 * products[direction] * num_samples**2 * dim),
            dtype=dtype,
            **bind_all(ours, peers, features, direction),
        )


class AttentionLoss(torch.autograd.Function):
    """The loss and its gradient from an attention kernel with values = keys: sum_j p_ij k_j, log-sum-exp."""

    @staticmethod
    def forward(ctx, query, key, temperature, kernel):
        out, lse = _attention(query, key, 1 / temperature, kernel)
        own = (query.float() * key.float()).sum(1) / temperature
        ctx.save_for_backward(out - key)
        ctx.scale = 1 / (temperature * len(query))
        return (lse - own).mean()

    @staticmethod
    def backward(ctx, dloss):
        (residual,) = ctx.saved_tensors
        return residual * (dloss * ctx.scale), None, None, None


def _attention(
    query: Tensor,  # [N, d]
    key: Tensor,  # [N, d]
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:  # [N, d], [N]
    q, k = query[None, None], key[None, None]
    aten = torch.ops.aten
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[:2]
    elif kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, k, None, True, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, k, None, True, scale=scale)[:2]
    return out[0, 0], lse.flatten()[: len(query)]


def _packages(
    temperature: float,
    labels: Tensor,  # [N]
    options: Options,
    too_large: Missing | None,
) -> dict[str, Any]:
    """Return what the package index offers; the first normalises its inputs, which costs it little."""

    def info_nce(package: Any) -> Callable[..., Tensor]:
        return lambda query, key: package.info_nce(query, key, temperature=temperature)

    def cut(package: Any) -> Callable[..., Tensor]:
        return lambda query, key: package.linear_cross_entropy(query / temperature, key, labels)

    def liger(package: Any) -> Callable[..., Tensor]:
        loss = package.LigerFusedLinearCrossEntropyLoss()
        return lambda query, key: loss(key, query / temperature, labels)

    def inf_cl(package: Any) -> Callable[..., Tensor]:
        return lambda query, key: package.cal_flash_loss(query / temperature, key)

    device = options.device
    return {
        "info-nce-pytorch": too_large or optional("info_nce", "info-nce-pytorch", info_nce),
        "cut-cross-entropy": on_gpu(device, "cut_cross_entropy", "cut-cross-entropy", cut),
        "liger-kernel": on_gpu(device, "liger_kernel.transformers", "liger-kernel", liger),
        "Inf-CL": on_gpu(device, "inf_cl", "inf-cl", inf_cl),
    }


def _make_check(
    query: Tensor,  # [N, d]
    key: Tensor,  # [N, d]
    temperature: float,
    direction: str,
) -> Callable[[Any], None]:
    """Return a check of some samples' losses and gradients, against all keys, and of the mean over all."""

    def check(found: Any) -> None:
        found = (found,) if isinstance(found, Tensor) else found
        num_samples = len(query)
        losses = ops.unidirectional_info_nce(query, key, temperature=temperature, reduction="none")
        some = torch.linspace(0, num_samples - 1, min(num_samples, CHECKED), device=query.device).long()
        truth, plain = (
            _rows(query.to(t), key.to(t), some, temperature) for t in (torch.float64, query.dtype)
        )
        assert_close(losses[some], truth[0], plain[0])
        if direction != "backward":
            assert_close(found[0], losses.double().mean(), losses.mean())
        if direction != "forward":
            assert_close(found[-1][some] * num_samples * temperature, truth[1], plain[1])

    return check


def _make_check_of_two(
    features: list[Tensor],  # two of [N, D]
    columns: dict[tuple[int, int], Tensor],  # (teacher, taught) -> [d], dimensions
    temperature: float,
) -> Callable[[Any], None]:
    """Return a check of the sum of both pairs' losses, and of some samples' gradients against all keys."""

    def check(found: tuple[Tensor, ...]) -> None:
        total, *gradients = found
        means = []
        for (m, n), dims in columns.items():
            query, key = (features[part].index_select(1, dims) for part in (n, m))
            losses = ops.unidirectional_info_nce(query, key, temperature=temperature, reduction="none")
            means.append(losses.double().mean())
            gradient = gradients[n].index_select(1, dims)
            _make_check(query, key, temperature, "both")((losses.mean(), gradient))
        assert_close(total, means[0] + means[1], (means[0] + means[1]).to(total.dtype))

    return check


def _rows(
    query: Tensor,  # [N, d]
    key: Tensor,  # [N, d]
    some: Tensor,  # [n]
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [n], [n, d]
    """Return some samples' losses, and the gradient of their sum times the temperature, in plain torch."""
    scores = query[some] @ key.T / temperature
    own = scores.gather(1, some[:, None]).squeeze(1)
    return scores.logsumexp(1) - own, scores.softmax(1) @ key - key[some]
