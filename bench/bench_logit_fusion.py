"""Fusion of unimodal logits by entropy or certainty: against eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmfast import ops
from mmfast.reference import logit_fusion as reference

from .harness import Case, Options, Work
from .peers import DIRECTIONS, bind_all, check_against, compiled

SIZE = "Logits M N C"
# M, N, C: from one batch of few classes to a data set of many.
SHAPES = ((2, 64, 6), (2, 20_000, 6), (2, 100_000, 31), (3, 20_000, 101), (2, 5_000, 309))
QUICK = ((2, 64, 6), (2, 5_000, 31))


def cases(options: Options) -> Iterator[Case]:
    """Yield all passes of entropy_fusion, and of certainty_fusion at one shape."""
    shapes = QUICK if options.quick else SHAPES
    for score, chosen in (("entropy", shapes), ("certainty", shapes[1:2])):
        name = f"{score}_fusion"
        for num_modalities, num_samples, num_classes in chosen:
            logits = torch.randn(num_modalities, num_samples, num_classes, device=options.device)
            logits.requires_grad_()

            def plain(logits, name=name):
                return getattr(reference, name)(logits)[0]

            def ours(logits, name=name):
                return getattr(ops, name)(logits)[0]

            peers = {"eager": plain, "torch.compile": compiled(plain, options.quick)}
            small, count = 4 * num_samples * (num_classes + num_modalities), logits.numel()
            work = {
                "forward": Work(logits.nbytes, small, exponentials=count),
                "backward": Work(logits.nbytes + small, logits.nbytes, exponentials=count),
            }
            work["both"] = Work(2 * logits.nbytes + small, logits.nbytes + small, exponentials=2 * count)
            for direction in DIRECTIONS:
                yield Case(
                    name=f"{score} M={num_modalities} N={num_samples:,} C={num_classes}",
                    size=logits.numel(),
                    panel=score,
                    check=check_against(plain, (logits,), direction, num_samples),
                    work=work[direction],
                    **bind_all(ours, peers, (logits,), direction),
                )
