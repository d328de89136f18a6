"""How raw ops become differentiable: in the fewest microseconds, and under all that torch.func does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_is_torch_func_active = torch._C._are_functorch_transforms_active
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
# A tensor that a function under torch.func let out is still wrapped.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def is_constant(*tensors: Tensor | None) -> bool:
    """Whether nothing is asked of these tensors but a result, so that a raw op may be called alone.

    A Function costs 2.6 microseconds, as much as the rest of a call with few samples. torch.func and forward-
    mode AD have to find it, and a compiler traces one way for both.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _is_torch_func_active():
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return True


# Of other classes nobody knows what stands behind an address.
CLASSES = (Tensor, torch.nn.Parameter)


def is_ordinary() -> bool:
    """Whether nothing stands between a call and the memory of its tensors: no compiler, transform or mode."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _is_torch_func_active()
        or _num_dispatch_modes()
        or _num_function_modes()
    )


def is_direct(*tensors: Tensor) -> bool:
    """Whether a raw op's function may be called without torch's dispatcher, which takes 1.5 microseconds.

    Nothing is asked of the tensors but a result, and nobody listens.
    """
    if not is_ordinary():
        return False
    with_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in CLASSES or (with_gradient and tensor.requires_grad):
            return False
    return True


def is_transformed() -> bool:
    """Whether torch.func (grad, vjp, vmap, jvp, ...) or forward-mode AD is at work around the call."""
    return forward_ad._current_level >= 0 or _is_torch_func_active()


def without_derivative(
    *tensors: Tensor | None,  # any shapes
) -> Sequence[Any]:  # like `tensors`
    """Return tensors of an op that has no derivative with nothing left for one to be asked through."""
    if is_constant(*tensors):
        return tensors
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class Op:
    """What an op tells: its kernels, forward and for the gradient, and the gradient as plain torch writes it.

    Training asks for `forward` and `gradient`, which run kernels. Derivatives of higher order and those in
    forward mode come from `formula` by torch's own rules: slower, with more memory, and right.
    """

    # Of the outputs, those with a gradient, and those that `gradient` reads.
    smooth = slice(None)
    kept = slice(0)
    # Whether the outputs that are not smooth are there for `gradient` alone: the caller gets the smooth ones.
    is_hidden = False

    # Whether the outputs are linear in the first input: no gradient reads it, it may change or go.
    is_linear = False

    # Static, of (options, *tensors): returns the outputs, a tuple or one tensor; `options` holds no tensor.
    forward: Callable

    @staticmethod
    def gradient(
        options: tuple,
        gradients: Sequence[Tensor | None],  # of all outputs, or of the smooth ones where others are hidden
        tensors: Sequence[Tensor | None],  # the inputs, without the first where `is_linear`
        kept: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Return the gradient of every input, None of one that has none."""
        raise NotImplementedError

    @staticmethod
    def formula(
        options: tuple,
        gradients: Sequence[Tensor],  # of the outputs `smooth`
        tensors: Sequence[Tensor | None],  # the inputs
    ) -> Sequence[Tensor | None]:
        """Return what `gradient` does, in torch's ops."""
        raise NotImplementedError


def differentiable(op: type[Op]) -> Callable:
    """Return the function of (options, *tensors) that runs `op` and tells autograd, in the form that fits.

    torch's `apply` of a Function with `setup_context` looks up the signature of `forward` in every call, 8
    microseconds; without `setup_context` torch.func refuses it, and torch.compile refuses one with `jvp`.
    """
    plain, transformed = _plain(op), _transformed(op)
    # What `plain.apply` calls after it has asked, for a microsecond, whether torch.func is at work.
    apply_plain = super(torch.autograd.Function, plain).apply

    def apply(options: tuple, *tensors: Tensor | None):
        if torch.compiler.is_compiling():
            return plain.apply(options, *tensors)
        if forward_ad._current_level < 0 and not _is_torch_func_active():
            values = [x if x is None else _unwrap_if_dead(x) for x in tensors]
            try:
                return apply_plain(options, *values)
            except RuntimeError:
                # What inference mode made cannot be saved; a copy can.
                copies = [x.clone() if x is not None and x.is_inference() else x for x in values]
                if all(copy is x for copy, x in zip(copies, values, strict=True)):
                    raise
            return apply_plain(options, *copies)
        outputs = transformed.apply(options, *tensors)
        return _alone(outputs[op.smooth]) if op.is_hidden else outputs

    return apply


def _alone(outputs: tuple[Tensor, ...]):
    return outputs[0] if len(outputs) == 1 else outputs


def _others(part: slice) -> tuple[int | None, int | None]:
    """Return where what a slice from the first or to the last leaves out begins and ends."""
    return (None, part.start or 0) if part.stop is None else (part.stop, None)


def _plain(op: type[Op]) -> Any:
    """Return the Function that training meets: every line of it counts, once in a call."""
    run, gradient, keeps, is_hidden = op.forward, op.gradient, op.kept != slice(0), op.is_hidden
    is_linear = op.is_linear
    # As numbers: torch 2.10 compiles no function that holds a slice.
    kept_from, kept_to = op.kept.start, op.kept.stop
    rough_from, rough_to = _others(op.smooth)
    smooth_from, smooth_to = op.smooth.start, op.smooth.stop

    # torch.compile tells whether `forward` takes ctx by the number of its parameters: as many as there are
    # inputs mean that it does not, and there are two at least.
    def forward(*args):
        ctx, options, *tensors = args
        ctx.options = options
        output = run(options, *tensors)
        if not keeps:
            # A tuple of its own: torch before 2.12 compiles no assignment to an item of the inputs' list.
            ctx.save_for_backward(*((None, *tensors[1:]) if is_linear else tensors))
            return output
        ctx.save_for_backward(*tensors, *output[kept_from:kept_to])
        if is_hidden:
            return _alone(output[smooth_from:smooth_to])
        ctx.mark_non_differentiable(*output[rough_from:rough_to])
        return output

    def backward(ctx, *gradients):
        tensors, kept = ctx.saved_tensors, ()
        if keeps:
            num_tensors = len(ctx.needs_input_grad) - 1
            tensors, kept = tensors[:num_tensors], tensors[num_tensors:]
        # Mostly nothing is asked of a gradient.
        is_asked = torch.is_grad_enabled() or is_transformed()
        if is_asked and not (is_constant(*gradients, *tensors) or torch.compiler.is_compiling()):
            return None, *_gradient(op, ctx.options, gradients, tensors, kept)
        return None, *gradient(ctx.options, gradients, tensors, kept)

    members: dict = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op.__name__, (torch.autograd.Function,), members)


def _transformed(op: type[Op]) -> Any:
    """Return the Function that torch.func and forward-mode AD meet: all outputs are returned."""

    def setup_context(ctx, inputs, output):
        ctx.options, *tensors = inputs
        ctx.num_tensors = len(tensors)
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(*tensors, *outputs[op.kept])
        ctx.save_for_forward(*tensors)
        ctx.is_smooth = [index in range(len(outputs))[op.smooth] for index in range(len(outputs))]
        ctx.outputs = [(y.shape, y.dtype, y.device) for y in outputs[op.smooth]]
        # None instead of a tensor of zeros for an output that nothing depends on.
        ctx.set_materialize_grads(False)
        rough = [y for y, is_smooth in zip(outputs, ctx.is_smooth, strict=True) if not is_smooth]
        if rough:
            ctx.mark_non_differentiable(*rough)

    def backward(ctx, *gradients):
        tensors, kept = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        if op.is_hidden:
            gradients = gradients[op.smooth]
        if all(gradient is None for gradient in gradients[op.smooth]):
            return None, *[None] * ctx.num_tensors
        if is_constant(*gradients, *tensors) or torch.compiler.is_compiling():
            return None, *op.gradient(ctx.options, gradients, tensors, kept)
        return None, *_gradient(op, ctx.options, gradients, tensors, kept)

    def jvp(ctx, _, *tangents):
        tensors, wrt = ctx.saved_tensors, [i for i, tangent in enumerate(tangents) if tangent is not None]

        # The gradient is linear in that of the outputs: its transposed map is the derivative.
        def gradient(*gradients):
            found = op.formula(ctx.options, gradients, tensors[: len(tangents)])
            return tuple(torch.zeros_like(tensors[i]) if found[i] is None else found[i] for i in wrt)

        zeros = [torch.zeros(shape, dtype=d, device=device) for shape, d, device in ctx.outputs]
        found = iter(torch.func.vjp(gradient, *zeros)[1](tuple(tangents[i] for i in wrt)))
        results = [next(found) if is_smooth else None for is_smooth in ctx.is_smooth]
        return results[0] if len(results) == 1 else tuple(results)

    members: dict = {
        "forward": staticmethod(op.forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "vmap": classmethod(_looped),
    }
    return type(op.__name__, (torch.autograd.Function,), members)


def _looped(function: type[torch.autograd.Function], info, in_dims, *args):
    """Run a Function under vmap once for each member of the batch."""
    return looped(function.apply, info.batch_size, in_dims, args)


def looped(
    call: Callable,
    batch_size: int,
    in_dims: tuple,  # of the structure of `args`: the dimension that is the batch's, or None
    args: tuple,
):
    """Return the results of a call of each member of a batch, stacked, and where their dimension is."""
    flat, spec = pytree.tree_flatten(args)
    dims = pytree.tree_flatten(in_dims)[0]
    if len(dims) != len(flat):
        # A list that holds no tensor of the batch has one None for all.
        dims = [dim for x, dim in zip(args, in_dims, strict=True) for _ in pytree.tree_flatten(x)[0]]
    results = []
    for index in range(batch_size):
        member = [x if dim is None else x.select(dim, index) for x, dim in zip(flat, dims, strict=True)]
        results.append(call(*pytree.tree_unflatten(member, spec)))
    if results[0] is None:
        return None, None
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    columns = zip(*results, strict=True)
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in columns)
    return stacked, (0,) * len(stacked)


def _gradient(
    op: type[Op],
    options: tuple,
    gradients: Sequence[Tensor | None],  # of all outputs
    tensors: Sequence[Tensor | None],  # the inputs
    kept: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradient of every input, by kernels, itself differentiable to any order by `formula`."""
    found = _Gradient.apply(op, options, len(gradients), len(tensors), *gradients, *tensors, *kept)
    return list(found)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(op, options, num_gradients, num_tensors, *tensors):
        gradients, rest = tensors[:num_gradients], tensors[num_gradients:]
        return tuple(op.gradient(options, gradients, rest[:num_tensors], rest[num_tensors:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.options, ctx.num_gradients, ctx.num_tensors, *tensors = inputs
        tensors = tensors[: ctx.num_gradients + ctx.num_tensors]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _map(ctx):
        """Return the formula as a function of its differentiable arguments, these, and their positions."""
        saved = list(ctx.saved_tensors)
        smooth = range(ctx.num_gradients)[ctx.op.smooth]
        places = [
            i
            for i, x in enumerate(saved)
            if x is not None and x.is_floating_point() and (i >= ctx.num_gradients or i in smooth)
        ]

        def formula(*values):
            tensors = list(saved)
            for place, value in zip(places, values, strict=True):
                tensors[place] = value
            gradients = [tensors[i] for i in smooth]
            return ctx.op.formula(ctx.options, gradients, tensors[ctx.num_gradients :])

        return formula, places, [saved[i] for i in places]

    @staticmethod
    def backward(ctx, *seconds):
        formula, places, values = _Gradient._map(ctx)
        used = [i for i, second in enumerate(seconds) if second is not None]

        def of_used(*values):
            found = formula(*values)
            return tuple(found[i] for i in used)

        results: list[Tensor | None] = [None] * ctx.num_inputs
        if used:
            found = torch.func.vjp(of_used, *values)[1](tuple(seconds[i] for i in used))
            for place, value in zip(places, found, strict=True):
                results[4 + place] = value
        return tuple(results)

    @staticmethod
    def jvp(ctx, op, options, num_gradients, num_tensors, *tangents):
        formula, places, values = _Gradient._map(ctx)
        used = [i for i, place in enumerate(places) if tangents[place] is not None]

        def outputs(*some):
            tensors = list(values)
            for i, value in zip(used, some, strict=True):
                tensors[i] = value
            return tuple(x for x in formula(*tensors) if x is not None)

        def transposed(*seconds):
            return torch.func.vjp(outputs, *[values[i] for i in used])[1](seconds)

        shapes = formula(*values)
        zeros = [torch.zeros_like(x) for x in shapes if x is not None]
        found = iter(torch.func.vjp(transposed, *zeros)[1](tuple(tangents[places[i]] for i in used)))
        return tuple(None if x is None else next(found) for x in shapes)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        return _looped(cls, info, in_dims, *args)
