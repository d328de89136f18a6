"""Try an installed mmfast: `python -P smoke.py cpu cuda` names the compiled modules that must be there.

Works without a GPU, on which alone CUDA kernels run: of those it asks which architectures they are for.
"""

from __future__ import annotations

import sys

import torch

import mmfast
from mmfast import backend, ops


def main(modules: list[str]) -> None:
    print(f"mmfast {mmfast.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    for name in modules:
        print(f"mmfast._{name}:", backend.extension(name).__file__)
    if "cuda" in modules:
        print("built for", backend.extension("cuda").architectures())
    if "cpu" not in modules:
        return
    torch.manual_seed(0)
    features, keys = torch.randn(2, 100, 40)
    labels = torch.randint(5, (100,))
    calls = {
        "shapley_values": lambda backend: ops.shapley_values(torch.cos(features[:, :8]), backend=backend),
        "additive_shapley": lambda backend: ops.additive_shapley(
            features.view(4, 100, 10), labels, backend=backend
        ),
        "duc_loss": lambda backend: ops.unidirectional_info_nce(features, keys, backend=backend),
        "class_moments": lambda backend: ops.class_moments(features, labels, 5, backend=backend),
    }
    for name, call in calls.items():
        torch.testing.assert_close(call("cpu"), call("reference"))
        print(f"{name}: cpu as reference")


if __name__ == "__main__":
    main(sys.argv[1:])
