"""Derivatives of every order and in every mode, batches, and graphs: what torch's own ops do, ours do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import additive_shapley as plain_additive
from mmfast.reference import duc_loss as plain_duc
from mmfast.reference import logit_fusion as plain_fusion
from mmfast.reference import shapley_values as plain_shapley
from mmfast.reference import sigmoid_loss as plain_sigmoid

LABELS = torch.arange(6) % 3
PRESENT = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
EFFECTIVE = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KEY, PROJECTOR = _numbers(6, 4, seed=1), _numbers(4, 4, seed=2)


def _joined(outputs) -> Tensor:
    return torch.cat([output.flatten() for output in outputs])


def _moments(x: Tensor) -> Tensor:
    members = [x[k == LABELS] for k in range(3)]
    return _joined(
        [torch.stack([f(0) for f in fs]) for fs in zip(*[(m.mean, _variance(m)) for m in members])]
    )


def _variance(members: Tensor):
    return lambda dim: members.var(dim, correction=0)


def _step(x: Tensor, backend: str) -> Tensor:
    projector = torch.eye(4, dtype=x.dtype, device=x.device)
    feature = torch.arange(1.0, 5.0, dtype=x.dtype, device=x.device)
    return ops.update_and_project_(projector, feature, x, alpha=0.5, backend=backend)


def _updated(dtype: torch.dtype) -> Tensor:
    feature = torch.arange(1.0, 5.0, dtype=dtype)
    return torch.eye(4, dtype=dtype) - torch.outer(feature, feature) / (0.5 + feature @ feature)


# Per op: the shape of x, the op of x and a backend, and the same in plain torch.
CALLS = {
    "shapley_values": ((6, 8), lambda x, b: ops.shapley_values(x, backend=b), plain_shapley.shapley_values),
    "project_gradient": (
        (6, 4),
        lambda x, b: ops.project_gradient(x, PROJECTOR.to(x.dtype), backend=b),
        lambda x: x @ PROJECTOR,
    ),
    "update_and_project_": (
        (6, 4),
        lambda x, b: _step(x, b),
        lambda x: x @ _updated(x.dtype),
    ),
    "entropy_fusion": (
        (2, 6, 3),
        lambda x, b: _joined(ops.entropy_fusion(x, present=PRESENT, backend=b)),
        lambda x: _joined(plain_fusion.entropy_fusion(x, present=PRESENT)),
    ),
    "certainty_fusion": (
        (2, 6, 3),
        lambda x, b: _joined(ops.certainty_fusion(x, temperature=0.5, backend=b)),
        lambda x: _joined(plain_fusion.certainty_fusion(x, temperature=0.5)),
    ),
    "weights alone": (
        (2, 6, 3),
        lambda x, b: ops.certainty_fusion(x, backend=b)[1],
        lambda x: plain_fusion.certainty_fusion(x)[1],
    ),
    "coalition_utilities": (
        (6, 4, 3),
        lambda x, b: ops.coalition_utilities(x, LABELS, utility="log_probability", backend=b),
        lambda x: plain_additive.coalition_utilities(x, LABELS, utility="log_probability"),
    ),
    "additive_shapley": (
        (2, 6, 3),
        lambda x, b: ops.additive_shapley(x, LABELS, utility="margin", backend=b),
        lambda x: plain_additive.additive_shapley(x, LABELS, utility="margin"),
    ),
    "with a bias": (
        (3, 6, 3),
        lambda x, b: ops.additive_shapley(x[:2], LABELS, x[2, 0], utility="probability", backend=b),
        lambda x: plain_additive.additive_shapley(x[:2], LABELS, x[2, 0], utility="probability"),
    ),
    "unidirectional_info_nce": (
        (6, 4),
        lambda x, b: ops.unidirectional_info_nce(x, KEY.to(x.dtype), temperature=0.7, backend=b),
        lambda x: plain_duc.unidirectional_info_nce(x, KEY, temperature=0.7),
    ),
    "duc_loss": (
        (2, 6, 4),
        lambda x, b: ops.duc_loss(x, EFFECTIVE, temperature=0.7, reduction="none", backend=b),
        lambda x: plain_duc.duc_loss(x, EFFECTIVE, temperature=0.7, reduction="none"),
    ),
    "unidirectional_sigmoid_loss": (
        (6, 4),
        lambda x, b: ops.unidirectional_sigmoid_loss(
            x, KEY.to(x.dtype), temperature=0.7, bias=-1.0, reduction="none", backend=b
        ),
        lambda x: plain_sigmoid.unidirectional_sigmoid_loss(
            x, KEY, temperature=0.7, bias=-1.0, reduction="none"
        ),
    ),
    "learnt temperature and bias": (
        (7, 4),
        lambda x, b: ops.unidirectional_sigmoid_loss(
            x[:6], KEY.to(x.dtype), temperature=x[6, 0].exp(), bias=x[6, 1:2], backend=b
        ),
        lambda x: plain_sigmoid.unidirectional_sigmoid_loss(
            x[:6], KEY, temperature=x[6, 0].exp(), bias=x[6, 1]
        ),
    ),
    "class_moments": ((6, 2), lambda x, b: _joined(ops.class_moments(x, LABELS, 3, backend=b)[1:]), _moments),
    "variances alone": (
        (6, 2),
        lambda x, b: ops.class_moments(x, LABELS, 3, backend=b).var.flatten(),
        lambda x: _moments(x)[6:],
    ),
}


def _summed(f):
    """Return f's results added up, in different shares: the sum of weights, for one, is 1."""

    def g(x):
        y = f(x).flatten()
        return (y * torch.linspace(1, 2, len(y), dtype=y.dtype)).sum()

    return g


def _penalized(f):
    """Return the gradient of a penalty on the gradient, by torch.autograd.grad and by backward."""

    def g(x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(_summed(f)(x), x, create_graph=True)
        penalty = first.pow(3).sum()
        if not penalty.requires_grad:
            return torch.zeros(2, *x.shape, dtype=x.dtype)
        (alone,) = torch.autograd.grad(penalty, x, retain_graph=True, allow_unused=True)
        (_summed(f)(x) + penalty).backward()
        return torch.stack([torch.zeros_like(x) if alone is None else alone, x.grad - first.detach()])

    return g


def _dual(f):
    def g(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    return g


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(_summed(f)),
    "vjp": lambda f: lambda x: torch.func.vjp(_summed(f), x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(_summed(f)),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, x.cos(), x.sin()])),
    "vmap of the second dimension": lambda f: (
        lambda x: torch.func.vmap(f, in_dims=1)(torch.stack([x, x.cos(), x.sin()], 1))
    ),
    "gradients of samples": lambda f: (
        lambda x: torch.func.vmap(torch.func.grad(_summed(f)))(torch.stack([x, x.cos()]))
    ),
    "penalty": _penalized,
    "dual": _dual,
}


BACKENDS = pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", "cuda", "cuda-emulated"], indirect=True
)


def _require(name: str, backend: str) -> None:
    stems = dict.fromkeys(("project_gradient", "update_and_project_"), "gradient_projection")
    stems["entropy_fusion"] = "logit_fusion"
    stems |= dict.fromkeys(("certainty_fusion", "weights alone"), "logit_fusion")
    if not _backend.implements(backend, stems.get(name, "shapley_values")):
        pytest.skip(f"no {backend} kernel")


@BACKENDS
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_transforms_give_what_they_give_for_plain_torch(name, transform, backend, device):
    if device.type != "cpu":
        pytest.skip("the constants lie on the CPU")
    _require(name, backend)
    shape, op, plain = CALLS[name]
    x = _numbers(*shape)
    expected = TRANSFORMS[transform](plain)(x)
    dtype = torch.float32 if backend == "triton" else torch.float64
    found = TRANSFORMS[transform](lambda x: op(x, backend))(x.to(dtype))
    bound = 1e-4 if dtype == torch.float32 else 1e-11
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


@BACKENDS
@pytest.mark.parametrize("size", [3, 64, 129, 300])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_temperature_learns_at_every_size(size, shape, backend, device):
    dtype = torch.float32
    query, key = (_numbers(size, 5, seed=i).to(device, dtype) for i in range(2))
    present = torch.tensor([True, False], device=device)[:, None].expand(2, size)
    mask = EFFECTIVE.to(device)[:, [0, 1, 2, 3, 3]]
    logits = torch.stack([query, key])
    fusing = [torch.ones(2, size, dtype=torch.bool, device=device), present]

    def losses(t, ours):
        if ours:
            yield ops.unidirectional_info_nce(query, key, temperature=t, backend=backend)
            yield ops.duc_loss([query, key], mask, temperature=t, backend=backend)
            # There is no CUDA kernel for the fusions.
            for p in fusing if backend != "cuda" else ():
                yield (
                    ops.certainty_fusion(logits, temperature=t, present=p, backend=backend)[0].square().mean()
                )
            return
        own = torch.arange(size, device=device)
        q, k = query.double(), key.double()
        yield F.cross_entropy(q @ k.T / t, own)
        columns = [(mask[a] & ~mask[1 - a]).double() for a in range(2)]
        yield sum(
            F.cross_entropy((x * c) @ (y * c).T / t, own)
            for x, y, c in ((k, q, columns[0]), (q, k, columns[1]))
        )
        for p in fusing:
            scores = (logits.double().softmax(-1).amax(-1) / t).masked_fill(~p, -torch.inf)
            yield (scores.softmax(0)[..., None] * logits.double()).sum(0).square().mean()

    ours, plain = (
        nn.Parameter(torch.full(shape, 0.7, dtype=d, device=device)) for d in (dtype, torch.float64)
    )
    # Where there is no kernel for the fusion, the plain ones are left over.
    for loss, expected in zip(losses(ours, True), losses(plain, False), strict=False):
        assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-6)
        (found,), (right,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, plain)
        assert found.shape == shape
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learnt_temperature_rounds_no_query_on_a_cpu(dtype):
    query = torch.tensor([[300.0, 1.0], [1.0, 200.0]], dtype=dtype, requires_grad=True)
    temperature = nn.Parameter(torch.tensor(1e-3))
    loss = ops.unidirectional_info_nce(query, query.detach() * 1e-4, temperature=temperature)
    loss.backward()
    assert query.grad.dtype == dtype
    assert loss.isfinite()
    assert temperature.grad.isfinite()


@pytest.mark.parametrize(
    ("temperature", "error"),
    [
        (torch.ones(3), ValueError),
        (torch.tensor(0.0), ValueError),
        (torch.tensor(float("nan")), ValueError),
        (torch.tensor(1), TypeError),
        (torch.tensor(1j), TypeError),
        ("0.1", TypeError),
        (None, TypeError),
        (1j, TypeError),
    ],
)
def test_what_is_no_temperature_is_refused(temperature, error):
    x = _numbers(2, 4, 3)
    for call in (
        lambda: ops.unidirectional_info_nce(x[0], x[1], temperature=temperature),
        lambda: ops.duc_loss(x, torch.ones(2, 3, dtype=torch.bool), temperature=temperature),
        lambda: ops.certainty_fusion(x, temperature=temperature),
    ):
        with pytest.raises(error, match="temperature"):
            call()


@pytest.mark.parametrize("size", [16, 64, 65, 129, 300])
class TestOneBehaviourAtEverySize:
    def test_a_key_changed_before_backward_is_noticed(self, size):
        query, key = _numbers(size, 4).requires_grad_(), _numbers(size, 4, seed=1)
        loss = ops.unidirectional_info_nce(query, key)
        key.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_keys_of_inference_mode(self, size):
        query = _numbers(size, 4).requires_grad_()
        with torch.inference_mode():
            key = _numbers(size, 4, seed=1)
        ops.unidirectional_info_nce(query, key).backward()
        assert query.grad.isfinite().all()

    def test_a_second_derivative(self, size):
        key = _numbers(size, 4, seed=1)
        results = []
        for f in (ops.unidirectional_info_nce, plain_duc.unidirectional_info_nce):
            query = _numbers(size, 4).requires_grad_()
            (first,) = torch.autograd.grad(f(query, key), query, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), query)[0])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def _of_inference_mode():
    with torch.inference_mode():
        return {
            "labels": LABELS.clone(),
            "present": PRESENT.clone(),
            "effective": EFFECTIVE.clone(),
            "projector": PROJECTOR.clone(),
            "other": _numbers(6, 4, seed=1),
        }


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((6, 4, 3), lambda x, c: ops.coalition_utilities(x, c["labels"], utility="margin")),
        ((2, 6, 3), lambda x, c: ops.additive_shapley(x, c["labels"], utility="margin")),
        ((6, 2), lambda x, c: ops.class_moments(x, c["labels"], 3).var),
        ((2, 6, 3), lambda x, c: ops.entropy_fusion(x, present=c["present"])[0]),
        ((6, 4), lambda x, c: ops.project_gradient(x, c["projector"])),
        ((6, 4), lambda x, c: ops.duc_loss([x, x.detach()], c["effective"])),
        ((6, 4), lambda x, c: ops.duc_loss([x, c["other"]], c["effective"])),
    ],
)
def test_constants_of_inference_mode(shape, call):
    """As an evaluation leaves them: autograd saves none of them, and a copy is taken."""
    results = []
    for constants in (_of_inference_mode(), {name: x.clone() for name, x in _of_inference_mode().items()}):
        x = _numbers(*shape).requires_grad_()
        results.append(torch.autograd.grad(call(x, constants).sum(), x)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["shapley_values", "project_gradient"])
def test_a_linear_op_keeps_no_input(name):
    """What no gradient reads may change before it is asked for, as for torch's own products."""
    shape, op, plain = CALLS[name]
    x = _numbers(*shape).requires_grad_()
    y, expected = x * 1, torch.autograd.grad(plain(x).sum(), x)[0]
    loss = op(y, "auto").sum()
    with torch.no_grad():
        y.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_what_a_transform_let_out():
    """A tensor kept from inside of torch.func is an ordinary one afterwards."""
    kept = []

    def f(x):
        kept.append(x * 1)
        return x.square().sum()

    torch.func.grad(f)(_numbers(6, 4))
    assert ops.duc_loss([kept[0], kept[0]], EFFECTIVE).isfinite()
    for _ in range(2):
        query = _numbers(6, 4, seed=1).requires_grad_()
        ops.duc_loss([query, kept[0]], EFFECTIVE).backward()
        assert query.grad.isfinite().all()


def test_a_batch_of_what_is_changed_in_place():
    features = _numbers(5, 4)
    projectors = torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    torch.func.vmap(lambda p, h: ops.update_projector_(p, h, alpha=0.1) or h)(projectors, features)
    for projector, feature in zip(projectors, features, strict=True):
        expected = torch.eye(4, dtype=torch.float64)
        ops.update_projector_(expected, feature, alpha=0.1)
        assert torch.equal(projector, expected)
    shared = torch.eye(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="batch dimension"):
        torch.func.vmap(lambda h: ops.update_projector_(shared, h, alpha=0.1) or h)(features)
    assert torch.equal(shared, torch.eye(4, dtype=torch.float64))


class _Call(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x, labels):
        match self.name:
            case "shapley_values":
                return ops.shapley_values(x.reshape(-1, 4))
            case "additive_shapley":
                return ops.additive_shapley(
                    x.reshape(-1, 2, 4).transpose(0, 1), labels, utility="probability"
                )
            case "coalition_utilities":
                return ops.coalition_utilities(x.reshape(-1, 2, 4), labels, utility="margin")
            case "fusion":
                return ops.certainty_fusion(x.reshape(-1, 2, 4).transpose(0, 1))[0]
            case "project_gradient":
                return ops.project_gradient(x, torch.ones(8, 8))
            case "unidirectional_info_nce":
                return ops.unidirectional_info_nce(x, x.flip(1))
            case "unidirectional_sigmoid_loss":
                return ops.unidirectional_sigmoid_loss(x, x.flip(1), temperature=x.abs().mean())
            case "duc_loss":
                return ops.duc_loss([x[:, :4], x[:, 4:]], EFFECTIVE)
            case "class_moments":
                return ops.class_moments(x, labels, 3).var
            case _:
                return ops.dimension_accuracy(x, labels, torch.ones(3, 8))


GRAPHS = ["shapley_values", "additive_shapley", "coalition_utilities", "fusion", "project_gradient"]
GRAPHS += ["unidirectional_info_nce", "duc_loss", "unidirectional_sigmoid_loss", "class_moments"]
GRAPHS += ["dimension_accuracy"]


@pytest.mark.parametrize("name", GRAPHS)
def test_export_with_a_dynamic_batch(name):
    batch = torch.export.Dim("batch", min=2, max=4096)
    example = (_numbers(24, 8).float(), torch.arange(24) % 3)
    program = torch.export.export(_Call(name), example, dynamic_shapes=({0: batch}, {0: batch}))
    for size in (2, 128, 129, 700):
        x, labels = _numbers(size, 8, seed=size).float(), torch.arange(size) % 3
        torch.testing.assert_close(program.module()(x, labels), _Call(name)(x, labels), equal_nan=True)


@pytest.mark.parametrize("name", GRAPHS)
def test_one_dynamic_graph_serves_every_batch(name):
    torch._dynamo.reset()
    compiled = torch.compile(_Call(name), dynamic=True, backend="aot_eager", fullgraph=True)
    smooth = name != "dimension_accuracy"
    for index, size in enumerate((24, 130, 700)):
        x, labels = _numbers(size, 8, seed=size).float().requires_grad_(smooth), torch.arange(size) % 3
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            found = compiled(x, labels)
        expected = _Call(name)(x, labels)
        torch.testing.assert_close(found, expected, equal_nan=True)
        if smooth:
            seed = torch.ones_like(expected) * 0.5
            torch.testing.assert_close(*[torch.autograd.grad(y, x, seed)[0] for y in (found, expected)])
