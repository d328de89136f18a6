"""What several ops' launchers share."""

from __future__ import annotations

import contextlib
import struct

import torch


def _on(device: torch.device):
    """Return a context in which launches go to `device`; Triton's go to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bits(number: float) -> int:
    """Return the bits of a float64, for a kernel to take apart: Triton hands floats over in float32."""
    return struct.unpack("q", struct.pack("d", number))[0]
