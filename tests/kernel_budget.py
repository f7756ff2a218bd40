"""Error budgets: how far a kernel's results may lie from the float64 reference.

A result passes where, with eps that of the dtype of the inputs (kernels round intermediate results to it),

    |found - exact|_2  <=  2 |eager - exact|_2 + 4 eps |scale|_2        over the whole tensor, and
    |found - exact|    <=  12 eps scale                                 for each element.

exact is the reference in float64, eager the reference in the dtype itself, both from the same inputs, whose values the
dtype represents. Eager alone is no measure, since it can be exact by luck (with one key all gradients are 0). scale is
what one relative rounding error of size 1 in every operation could do at most: the sum of the absolute values of all
terms, as if nothing cancelled. The factors hold for every operation and shape; no test chooses its own.

The scale of attention. Write |x| for elementwise absolute values, P for the exact weights, q^ and k^ for unit vectors,
s for exp(log_scale), and r = eps(float32) / eps, which is 1 for float32 and next to 0 for the half precisions. Two
kinds of rounding count. Arithmetic is in float32 throughout, so each of its sums counts r times the sum of its absolute
terms. Weights, dS and out are rounded to the dtype, and count with their own absolute value. A logit s q^.k^ has terms
of sum s |q^||k^| <= s, so its rounding moves the weight exp(logit) by r s: each weight counts (1 + r s) times.

    out     (1 + r s) sum_j P_ij |v_j|
    dv      (1 + r s) sum_i P_ij |do_i|
    dP_ij   (1 - r) |do_i . v_j| + r |do_i| . |v_j|
    Delta_i (1 - r) |do_i| . |out_i| + r sum_j P_ij |do_i| . |v_j|, where out is what the forward stored
    dS_ij   (1 + r s) P_ij (dP_ij + Delta_i)     since dS = P (dP - Delta)
    dq^_i   s sum_j dS_ij |k^_j|                 dk^_j = s sum_i dS_ij |q^_i|
    dq      (dq^ + |q^| (|q^| . dq^)) / |q|      since dq = (dq^ - q^ (q^.dq^)) / |q|; dq^ / 1e-12 below the clamp
    dlog_scale   sum over scenes and queries of |q^| . dq^

with sums over the heads of a group in dv and dk. For float32 this is the oracle on absolute values throughout. Below
its smallest normal number a dtype rounds to a fixed spacing instead of a relative one, so P, dS and the results count
at least that number (6e-5 for float16), unless they are 0 by construction: a scale of 0 (a masked key) demands 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wireframe.kernels.reference import qk_norm_attention_reference

# Elements of a float64 weight matrix that the oracle holds at a time: 256 MiB each, a handful of them.
_CHUNK_ELEMENTS = 1 << 25


class Usage(NamedTuple):
    """Used share of a budget: of the norm-wise and, at worst, of the element-wise bound."""

    norm: float
    element: float


def check(name: str, found: Tensor, exact: Tensor, eager: Tensor, scale: Tensor, eps: float) -> Usage:
    """Assert that a result lies within the budget; all four tensors have one shape."""
    assert found.shape == exact.shape == eager.shape == scale.shape, name
    found, exact, eager, scale = (x.detach().double() for x in (found, exact, eager, scale))
    error = (found - exact).abs()
    allowed = 2 * (eager - exact).norm() + 4 * eps * scale.norm()
    # 0 / 0, an element that must be and is exactly 0, uses nothing.
    share = torch.where((error == 0) & (scale == 0), 0.0, error / (12 * eps * scale))
    # A tensor of zeros has a norm and an allowance of zero.
    norm_share = (error.norm() / allowed).item() if error.any() else 0.0
    usage = Usage(norm_share, share.max().item() if share.numel() else 0.0)
    # NaN is no number <= 1.
    assert usage.norm <= 1, f"{name}: {usage.norm:.3g} of the norm-wise budget {allowed:.3g}"
    if not usage.element <= 1:
        worst = share.nan_to_num(torch.inf).argmax().item()
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
        got, want, unit = (x.flatten()[worst].item() for x in (found, exact, scale))
        raise AssertionError(
            f"{name}{list(place)}: {got:.9g} instead of {want:.9g}, {usage.element:.3g} of 12 eps x {unit:.3g}"
        )
    return usage


class AttentionProblem(NamedTuple):
    """Arguments of qk_norm_attention, and the gradient of its output."""

    q: Tensor  # [B, Nq, H, D]
    k: Tensor  # [B, Nk, Hkv, D]
    v: Tensor  # [B, Nk, Hkv, D]
    log_scale: Tensor  # [H] float32
    key_mask: Tensor | None  # [B, Nk] bool
    dout: Tensor  # [B, Nq, H, D]

    def scenes(self, start: int, end: int) -> "AttentionProblem":
        """Scenes start..end - 1 as a problem of their own."""
        batched = {name: x[start:end] for name, x in self._asdict().items() if name != "log_scale" and x is not None}
        return self._replace(**batched)


class AttentionResults(NamedTuple):
    out: Tensor  # [B, Nq, H, D]
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog_scale: Tensor  # [H]


def attention_problem(
    batch: int, queries: int, keys: int, heads: int = 2, kv_heads: int = 1, dim: int = 32, *,
    dtype: torch.dtype = torch.float32, device: str = "cpu", mask: bool = False, seed: int = 0,
) -> AttentionProblem:  # fmt: skip
    """Normal random numbers, scales between 2 and 12, and, with ``mask``, half of the keys."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(device=device, dtype=dtype)

    return AttentionProblem(
        q=randn(batch, queries, heads, dim), k=randn(batch, keys, kv_heads, dim), v=randn(batch, keys, kv_heads, dim),
        log_scale=torch.linspace(2, 12, heads).log().to(device),
        key_mask=(torch.rand(batch, keys, generator=g) < 0.5).to(device) if mask else None,
        dout=randn(batch, queries, heads, dim),
    )  # fmt: skip


def run_attention(function, problem: AttentionProblem) -> AttentionResults:
    """Output and gradients of function(q, k, v, log_scale, key_mask), which keeps the strides of the inputs."""
    inputs = [x.detach().requires_grad_() for x in problem[:4]]
    out = function(*inputs, problem.key_mask)
    return AttentionResults(out.detach(), *torch.autograd.grad(out, inputs, problem.dout))


class AttentionBudget(NamedTuple):
    exact: AttentionResults
    eager: AttentionResults
    scale: AttentionResults
    eps: float

    def check(self, found: AttentionResults) -> dict[str, Usage]:
        """Assert that all five results lie within the budget."""
        columns = zip(AttentionResults._fields, found, self.exact, self.eager, self.scale)
        return {name: check(name, *tensors, self.eps) for name, *tensors in columns}


def attention_budget(problem: AttentionProblem) -> AttentionBudget:
    """The budget of a problem, computed on its device, a few scenes at a time."""
    batch, queries, heads = problem.q.shape[:3]
    step = max(1, _CHUNK_ELEMENTS // max(1, heads * queries * problem.k.shape[1]))
    parts = []
    # An empty batch is one chunk too.
    for start in range(0, max(1, batch), step):
        part = problem.scenes(start, start + step)
        double = AttentionProblem(*(x if x is None or x.dtype == torch.bool else x.double() for x in part))
        with sdpa_kernel(SDPBackend.MATH):
            exact = run_attention(qk_norm_attention_reference, double)
            eager = run_attention(qk_norm_attention_reference, part)
        parts.append((exact, eager, _attention_scale(double, exact, problem.q.dtype)))
    return AttentionBudget(*(_joined(column) for column in zip(*parts)), torch.finfo(problem.q.dtype).eps)


def _joined(parts) -> AttentionResults:
    *batched, dlog_scale = zip(*parts)
    return AttentionResults(*map(torch.cat, batched), torch.stack(dlog_scale).double().sum(0))


def _attention_scale(problem: AttentionProblem, exact: AttentionResults, dtype: torch.dtype) -> AttentionResults:
    q, k, v, log_scale, key_mask, dout = problem
    valid = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    k, v = (torch.where(valid[:, :, None, None], x, 0.0) for x in (k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    norm_q, norm_k = (x.norm(dim=-1, keepdim=True) for x in (q, k))
    unit_q, unit_k = q / norm_q.clamp_min(1e-12), k / norm_k.clamp_min(1e-12)
    s = log_scale.exp()[:, None, None]
    r = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps

    def at_least_normal(x):
        return torch.where(x > 0, x.clamp_min(torch.finfo(dtype).smallest_normal), 0.0)

    logits = torch.einsum("bnhd,bmhd->bhnm", unit_q, unit_k) * s
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    # A scene without a valid key has no weights.
    weights = logits.softmax(-1).masked_fill(~valid[:, None, None], 0.0)
    dp_plain = torch.einsum("bnhd,bmhd->bhnm", dout, v).abs()
    unit_q, unit_k, v, dout, out = (x.abs() for x in (unit_q, unit_k, v, dout, exact.out))
    dp_terms = torch.einsum("bnhd,bmhd->bhnm", dout, v)
    delta = (1 - r) * torch.einsum("bnhd,bnhd->bhn", dout, out) + r * (weights * dp_terms).sum(-1)
    dp = (1 - r) * dp_plain + r * dp_terms
    ds = at_least_normal((1 + r * s) * weights * (dp + delta[..., None]))
    weights = (1 + r * s) * at_least_normal(weights)
    dq = torch.einsum("bhnm,bmhd->bnhd", s * ds, unit_k)
    dk = torch.einsum("bhnm,bnhd->bmhd", s * ds, unit_q)
    dv = torch.einsum("bhnm,bnhd->bmhd", weights, dout)
    scales = AttentionResults(
        out=torch.einsum("bhnm,bmhd->bnhd", weights, v),
        dq=_through_the_norm(dq, unit_q, norm_q),
        dk=_through_the_norm(dk, unit_k, norm_k).unflatten(2, (-1, group)).sum(3),
        dv=dv.unflatten(2, (-1, group)).sum(3),
        dlog_scale=(unit_q * dq).sum((0, 1, 3)),
    )
    return AttentionResults(*map(at_least_normal, scales))


def _through_the_norm(dunit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    projected = dunit + unit * (unit * dunit).sum(-1, keepdim=True)
    return torch.where(norm > 1e-12, projected, dunit) / norm.clamp_min(1e-12)
