"""How far ``linear_gelu`` may lie from the float64 reference, in the form of ``kernel_budget``.

With y = x w^T + b, Phi and phi the normal distribution and its density, |x| elementwise absolute values, d float32's
eps, and E_x what one rounding in every operation does to x at most, to first order (a sum counts d times the sum of its
absolute terms; a result its own eps times itself):

    E_y      d (|x| |w|^T + |b|)
    out      |gelu'(y)| E_y + d |y| + eps |out|              since Phi is a number of size 1
    E_dy     |dout| (|gelu''(y)| E_y + 2 d) + eps |dy|       with gelu'' = phi(y) (2 - y^2)
    dx       E_dy |w| + d |dy| |w| + eps |dx|
    dweight  E_dy^T |x| + d |dy|^T |x| + eps |dweight|
    dbias    sum over rows of E_dy - eps |dy| + d |dy|, and eps |dbias|, since it is added before dy is rounded

Below its smallest normal number a dtype rounds to a fixed spacing; so dy and results count at least that number.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_budget import Usage, check
from wireframe.kernels import ops


class Problem(NamedTuple):
    """Arguments of linear_gelu and the gradient of its result."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    dout: Tensor  # [..., N]

    def change(self, function) -> "Problem":
        """function of every tensor."""
        return Problem(*(None if x is None else function(x) for x in self))

    def rows(self, order) -> "Problem":
        """Some of the leading axis, in some order."""
        return self._replace(x=self.x[order], dout=self.dout[order])


def make_problem(
    *rows: int, columns: int = 64, terms: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True,
    bias_dtype: torch.dtype | None = None, seed: int = 0,
) -> Problem:  # fmt: skip
    """Normal random numbers; y is normal with a deviation of about 1.5, in a few rows of 6 and 20."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    x = randn(*rows, terms)
    if x.dim() > 1 and rows[0] > 3:
        x[1], x[2] = 4 * x[1], 14 * x[2]
    return Problem(
        x.to(dtype), (randn(columns, terms) * 1.4 / math.sqrt(max(terms, 1))).to(dtype),
        (0.5 * randn(columns)).to(bias_dtype or dtype) if bias else None, randn(*rows, columns).to(dtype),
    )  # fmt: skip


def run(problem: Problem, impl: str, wanted: str = "x weight bias") -> dict[str, Tensor]:
    """The result and the wanted gradients by name."""
    inputs = {name: x for name, x in problem._asdict().items() if name != "dout"}
    leaves = {
        name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None and name in wanted.split()
    }
    out = ops.linear_gelu(**{**inputs, **leaves}, impl=impl)
    found = {"out": out.detach()}
    if leaves:
        gradients = torch.autograd.grad(out, list(leaves.values()), problem.dout)
        found |= {f"d{name}": x for name, x in zip(leaves, gradients)}
    return found


def check_budget(problem: Problem, found: dict[str, Tensor]) -> dict[str, Usage]:
    """Assert that results, on the device of their problem, lie within its budget."""
    double = problem.change(lambda x: x.double())
    wanted = " ".join(name[1:] for name in found if name != "out")
    exact, eager = run(double, "reference", wanted), run(problem, "reference", wanted)
    assert found.keys() == exact.keys()
    scales = _scales(double, exact, {name: x.dtype for name, x in eager.items()}, problem.x.dtype)
    used = {}
    for name, result in found.items():
        assert result.dtype == eager[name].dtype, name
        limits = torch.finfo(result.dtype)
        scale = (scales[name] / limits.eps).clamp_min(limits.smallest_normal)
        used[name] = check(name, result, exact[name], eager[name], scale, limits.eps)
    return used


def _scales(problem: Problem, exact: dict[str, Tensor], dtypes: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one rounding in every operation does at most."""
    x, weight, bias, dout = problem
    x, dout = (a.reshape(-1, a.shape[-1]) for a in (x, dout))
    d, own = torch.finfo(torch.float32).eps, torch.finfo(dtype)
    bias = torch.zeros_like(weight[:, :1].sum(1)) if bias is None else bias
    y = x @ weight.T + bias
    e_y = d * (x.abs() @ weight.T.abs() + bias.abs())
    cdf, density = torch.special.ndtr(y), torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    slope = cdf + y * density
    dy = (dout * slope).abs()
    e_sum = dout.abs() * (density * (2 - y.square()).abs() * e_y + 2 * d)
    e_dy = e_sum + (own.eps * dy).clamp_min(own.eps * own.smallest_normal)
    scales = {
        "out": (slope.abs() * e_y + d * y.abs()).view(exact["out"].shape),
        "dx": (e_dy @ weight.abs() + d * dy @ weight.abs()).view(problem.x.shape),
        "dweight": e_dy.T @ x.abs() + d * dy.T @ x.abs(),
        "dbias": (e_sum + d * dy).sum(0),
    }
    return {name: scales[name] + torch.finfo(dtypes[name]).eps * exact[name].abs() for name in exact}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype
        and torch.equal(a.contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        for name, a in first.items()
    )
