"""How far ``adamw_step`` may lie from the float64 reference, in the form of ``kernel_budget``.

With g the clipped gradient, |x| elementwise absolute values and E_x what one rounding in every operation does to x at
most, to first order and in units of float32's eps (a sum counts the sum of its absolute terms):

    E_m   b1 |m| + (1 - b1) |g|                     which is at least |m'|
    E_v   b2 v + (1 - b2) g^2 = v'
    E_w   |w| + rate (E_m + |m'|) / root            with root = sqrt(v') / sqrt(1 - b2^t) + eps, rate = lr / (1 - b1^t)

where m', v' are those after the step. Where nothing is (the gaps between parameters) nothing may come to be: a scale of
0 demands 0.
"""

import torch
from torch import Tensor

from kernel_budget import Usage, check
from wireframe.kernels import ops

SETTINGS = {"grad_clip": 0.7, "betas": (0.9, 0.95), "weight_decay": 0.02, "late_weight_decay": 0.3}
# What a step changes.
STATE = ("weights", "exp_avg", "exp_avg_sq", "count")


def problem(size: int, steps: int = 0, norm: float = 1.0, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Arguments after some steps, float32: a gradient of about that norm, and lr so large that updates show.

    Gradients are of three sizes, the smallest comparable with eps; of eleven elements two are gaps, where all is 0, and
    three weights are 0, so that their update is all there is.
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(size, generator=g)  # noqa: E731
    place = torch.arange(size)
    unit = norm / max(size, 1) ** 0.5
    gradient = draw() * unit * torch.tensor([1.0, 1.0, 1e-3]).index_select(0, place % 3)
    gradient[1::7] *= 1e-8 / unit
    weights = draw().where(place % 11 < 6, 0.0)
    moments = (unit * draw(), unit**2 * draw().square()) if steps else (torch.zeros(size), torch.zeros(size))
    gap = place % 11 > 8
    values = {
        "weights": weights, "gradient": gradient.where(~gap, 0.0), "exp_avg": moments[0].where(~gap, 0.0),
        "exp_avg_sq": moments[1].where(~gap, 0.0), "count": torch.tensor(float(steps)), "lr": torch.tensor(0.1),
        "healthy": torch.tensor(True),
    }  # fmt: skip
    return {name: x.to(device) for name, x in values.items()}


def doubled(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in values.items()}


def after(values: dict[str, Tensor], impl: str, **settings) -> dict[str, Tensor]:
    """``STATE`` after a step from copies of the values, and ``norm``; the late decay begins after a third."""
    copies = {name: x.clone() for name, x in values.items()}
    settings = {**SETTINGS, "late_from": values["weights"].numel() // 3, **settings}
    norm = ops.adamw_step(**copies, **settings, impl=impl)
    return {name: copies[name] for name in STATE} | {"norm": norm}


def scales(values: dict[str, Tensor], exact: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """E_w, E_m and E_v of float64 values and the state after them."""
    settings = SETTINGS | settings
    g = values["gradient"].abs() * (settings["grad_clip"] / (exact["norm"] + 1e-6)).clamp(max=1)
    (beta1, beta2), eps = settings["betas"], settings.get("eps", 1e-8)
    of_m = beta1 * values["exp_avg"].abs() + (1 - beta1) * g
    rest1, rest2 = (1 - beta ** exact["count"] for beta in (beta1, beta2))
    root = (exact["exp_avg_sq"] / rest2).sqrt() + eps
    update = values["lr"] / rest1 * (of_m + exact["exp_avg"].abs()) / root
    return {"weights": values["weights"].abs() + update, "exp_avg": of_m, "exp_avg_sq": exact["exp_avg_sq"]}


def check_step(found: dict[str, Tensor], values: dict[str, Tensor], **settings) -> dict[str, Usage]:
    """Assert that a step from float32 values lies within the budget."""
    exact = after(doubled(values), "reference", **settings)
    eager = after(values, "reference", **settings)
    assert found["count"] == values["count"] + 1 and found["norm"].dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found["norm"].double(), exact["norm"], rtol=4 * eps, atol=0)
    scale = scales(doubled(values), exact, **settings)
    return {name: check(name, found[name], exact[name], eager[name], scale[name], eps) for name in scale}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """torch.equal takes -0 for 0 and no NaN for itself."""
    bits = lambda x: x.reshape(-1).view(torch.uint8)  # noqa: E731
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and torch.equal(bits(x), bits(second[name])) for name, x in first.items()
    )
