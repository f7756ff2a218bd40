"""How far ``residual_norm`` and ``rms_norm`` may lie from the float64 reference, in the form of ``kernel_budget``.

An input is exact. With t the sum, f the factors, r = 1 / sqrt(mean(t^2) + eps), u = t r, s = dnormed weight, m the mean
of s u over a row, |x| elementwise absolute values, d float32's eps, and E_x what one rounding in every operation does
to x at most, to first order (a sum counts d times the sum of its absolute terms; a result its own eps times itself):

    E_t      d (|x| + |branch f|) + eps_t |t|
    E_r / r  r^2 mean(|t| E_t) + d                       E_u  r E_t + |u| E_r / r
    normed   |weight| E_u + (d + eps) |normed|           copy  E_t + eps |t|
    E_m      mean(|s| E_u) + d mean(|s u|)
    E_g      r (|u| E_m + |m| E_u + d (|s| + |u| mean(|s u|))) + E_r / r |r (s - u m)| + d (|dtotal| + |dcopy|)
    dx       E_g + eps |dx|                              dbranch  f (E_g + d |g|) + eps |dbranch|
    dweight  sum over rows of |dnormed| E_u + d |dnormed u|

Below its smallest normal number a dtype rounds to a fixed spacing; so results that are not 0 by construction count at
least that number.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_budget import Usage, check
from wireframe.kernels import ops
from wireframe.kernels.dropout_reference import drop_threshold, dropout_factors

# Of every call here: which dropout of a model it is.
SITE = 3

NORM_EPS = 1.1920928955078125e-07


class Problem(NamedTuple):
    """Arguments of residual_norm and the gradients of its results; without branch those of rms_norm.

    A gradient that is None is of a result that nobody uses.
    """

    x: Tensor  # [B, ..., C]
    branch: Tensor | None  # [B, ..., C]
    weight: Tensor  # [C]
    keys: Tensor | None  # [B]
    dtype: torch.dtype
    dtotal: Tensor | None  # [B, ..., C]
    dnormed: Tensor | None
    dcopy: Tensor | None
    p: float = 0.1

    def double(self) -> "Problem":
        values = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self)
        return Problem(*values)._replace(dtype=torch.float64)

    def to(self, device: str) -> "Problem":
        return Problem(*(x.to(device) if isinstance(x, Tensor) else x for x in self))

    def scenes(self, order: list[int]) -> "Problem":
        """Some scenes, in some order."""
        shared = {"weight": self.weight, "dtype": self.dtype, "p": self.p}
        return self._replace(**{
            name: x if x is None else x[order] for name, x in self._asdict().items() if name not in shared
        })  # fmt: skip


def make_problem(
    *shape: int, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16), dropout: bool = True, branch: bool = True,
    given: str = "total normed copy", seed: int = 0,
) -> Problem:  # fmt: skip
    """Normal random numbers; scales of rows differ by a thousand.

    Args:
        dtypes: of x, of branch, and of normed.
        given: results that have a gradient.
    """
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(-2, 1, shape[-2])[:, None] if len(shape) > 1 else 1.0

    def randn(dtype, *size):
        return torch.randn(size, generator=g).to(dtype)

    total = torch.promote_types(*dtypes[:2]) if branch else dtypes[0]
    gradients = {
        f"d{name}": randn(total if name == "total" else dtypes[2], *shape) if name in given.split() else None
        for name in ("total", "normed", "copy")
    }
    return Problem(
        x=(randn(torch.float32, *shape) * size).to(dtypes[0]),
        branch=(randn(torch.float32, *shape) * size).to(dtypes[1]) if branch else None,
        weight=1 + 0.3 * randn(torch.float32, shape[-1]),
        keys=torch.randint(-(1 << 63), (1 << 63) - 1, shape[:1], generator=g) if dropout else None,
        dtype=dtypes[2], **gradients,
    )  # fmt: skip


def run(problem: Problem, impl: str) -> dict[str, Tensor]:
    """Results and gradients by name, those that there are."""
    names = [name for name in ("x", "branch", "weight") if getattr(problem, name) is not None]
    leaves = [getattr(problem, name).detach().requires_grad_() for name in names]
    if problem.branch is None:
        results = {"normed": ops.rms_norm(*leaves, dtype=problem.dtype, impl=impl)}
    else:
        settings = {"site": SITE, "p": problem.p, "dtype": problem.dtype, "copy": problem.dcopy is not None}
        results = ops.residual_norm(*leaves, problem.keys, **settings, impl=impl)._asdict()
    results = {name: x for name, x in results.items() if x is not None}
    given = {name: getattr(problem, f"d{name}") for name in results}
    used = [name for name, gradient in given.items() if gradient is not None]
    gradients = torch.autograd.grad(
        [results[name] for name in used], leaves, [given[name] for name in used], allow_unused=True
    )
    found = {name: x.detach() for name, x in results.items()}
    return found | {f"d{name}": x for name, x in zip(names, gradients) if x is not None}


def check_budget(problem: Problem, found: dict[str, Tensor]) -> dict[str, Usage]:
    """Assert that results, on whatever device, lie within the budget of their problem, which is on the CPU."""
    exact, eager = run(problem.double(), "reference"), run(problem, "reference")
    assert found.keys() == exact.keys() == eager.keys()
    scales = _scales(problem.double(), exact, {name: x.dtype for name, x in found.items()})
    used = {}
    for name, result in found.items():
        assert result.dtype == eager[name].dtype, name
        limits = torch.finfo(result.dtype)
        scale = scales[name] / limits.eps
        scale = torch.where(scale > 0, scale.clamp_min(limits.smallest_normal), 0.0)
        used[name] = check(name, result.cpu(), exact[name], eager[name], scale, limits.eps)
    return used


def _scales(problem: Problem, exact: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """What one rounding in every operation does at most."""
    x, branch, weight, keys, _, dtotal, dnormed, dcopy, p = problem
    d, eps = torch.finfo(torch.float32).eps, {name: torch.finfo(dtype).eps for name, dtype in dtypes.items()}
    factors = torch.ones_like(x)
    if keys is not None:
        factors = dropout_factors(keys, SITE, drop_threshold(p), x[0].numel()).double().view(x.shape)

    def mean(x):
        return x.mean(-1, keepdim=True)

    total, e_total = x, torch.zeros_like(x)
    if branch is not None:
        total = exact["total"]
        e_total = d * (x.abs() + (branch * factors).abs()) + eps["total"] * total.abs()
    r = torch.rsqrt(mean(total.square()) + NORM_EPS)
    unit = total * r
    e_r = r.square() * mean(total.abs() * e_total) + d
    e_unit = r * e_total + unit.abs() * e_r
    scales = {"total": e_total, "normed": weight.abs() * e_unit + (d + eps["normed"]) * exact["normed"].abs()}
    scales["copy"] = e_total + eps.get("copy", 0.0) * total.abs()
    e_grad = torch.zeros_like(x)
    for gradient in (dtotal, dcopy):
        e_grad = e_grad if gradient is None else e_grad + d * gradient.abs()
    if dnormed is not None:
        s = dnormed * weight
        m, m_terms = mean(s * unit), mean((s * unit).abs())
        e_m = mean(s.abs() * e_unit) + d * m_terms
        terms = unit.abs() * e_m + m.abs() * e_unit + d * (s.abs() + unit.abs() * m_terms)
        e_grad = e_grad + r * terms + e_r * (r * (s - unit * m)).abs()
        rows = dnormed.abs() * e_unit + d * (dnormed * unit).abs()
        scales["dweight"] = rows.flatten(0, -2).sum(0) if rows.dim() > 1 else rows
    scales["dx"] = e_grad + eps["dx"] * exact["dx"].abs()
    if branch is not None:
        scales["dbranch"] = factors * (e_grad + d * exact["dx"].abs()) + eps["dbranch"] * exact["dbranch"].abs()
    return scales


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype
        and torch.equal(a.cpu().contiguous().view(torch.uint8), second[name].cpu().contiguous().view(torch.uint8))
        for name, a in first.items()
    )
