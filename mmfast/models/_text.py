"""What a module is, in a few words."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy


def module_text(module: nn.Module) -> str:
    """Return a module's class, with what it tells of itself in one line: `MLP`, `Linear(...)`."""
    # What works on every frame is the encoder inside.
    inner = getattr(module, "encoder", None)
    if isinstance(inner, nn.Module):
        return f"{type(module).__name__} of {module_text(inner)}"
    extra = module.extra_repr()
    return f"{type(module).__name__}({extra})" if extra and "\n" not in extra else type(module).__name__


def count_text(module: nn.Module) -> str:
    """Return the number of a module's parameters, and how many of them train where some do not."""
    # What a lazy layer will have is not known yet.
    known = [p for p in module.parameters() if not is_lazy(p)]
    total, trained = sum(p.numel() for p in known), sum(p.numel() for p in known if p.requires_grad)
    text = f"{total:,} parameters"
    return text if total == trained else f"{text} ({trained:,} trained)"
