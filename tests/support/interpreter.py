"""Triton's interpreter without work that it does again and again, which is half of its time.

For each device function that a kernel calls it patches all of `triton.language`, as the kernel's launch has
done already, and for each value it builds its table of dtypes. What kernels compute stays the same.
"""

from __future__ import annotations

import functools
from typing import Any


def make_quicker() -> None:
    """Patch once a launch, and look dtypes up once, until the process ends."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    # Modules that the launch in progress has patched; None between launches.
    patched: set[tuple[int, ...]] | None = None

    def patch_once(function: Any) -> Any:
        modules = tuple(id(function.__globals__.get(name)) for name in ("tl", "core"))
        if patched is not None and modules in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if patched is not None:
            patched.add(modules)
        return scope

    def launch_patched(executor: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal patched
        patched = set()
        try:
            launch(executor, *args, **kwargs)
        finally:
            patched = None

    look_up, of_numbers = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def looked_up(dtype: Any) -> Any:
        return look_up(dtype) if dtype.scalar.is_ptr() else of_numbers(dtype.scalar)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched
    interpreter._get_np_dtype = looked_up
