"""What several ops' launchers share."""

from __future__ import annotations

import contextlib

import torch


def _on(device: torch.device):
    """Return a context in which launches go to `device`; Triton's go to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
