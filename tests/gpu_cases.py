"""Calls of the model's operations for tests on a GPU: real sizes there, small ones where kernels are interpreted."""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_budget import attention_problem
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = (1.0, 0.2, 0.5)

# (B, Nq, Nk, H, Hkv, D), masked: those of the published model, other head dimensions, and what is interpreted.
ATTENTION = {
    "cuda": {
        "cross": ((32, 256, 2048, 4, 2, 64), True),
        "latent_self": ((32, 256, 256, 4, 2, 64), False),
        "decoder": ((32, 64, 256, 4, 2, 64), False),
        "one_scene": ((1, 256, 4096, 4, 2, 64), True),
        "narrow_heads": ((16, 256, 1030, 4, 2, 32), True),
        "wide_heads": ((16, 256, 1024, 4, 2, 128), False),
    },
    "cpu": {
        "cross": ((2, 9, 40, 2, 1, 32), True),
        "latent_self": ((2, 9, 9, 2, 1, 32), False),
        "decoder": ((1, 5, 9, 2, 2, 32), False),
        "one_scene": ((1, 3, 520, 2, 1, 32), True),
        "narrow_heads": ((2, 5, 40, 1, 1, 32), True),
        "wide_heads": ((2, 5, 40, 1, 1, 128), False),
    },
}
# As above: one side far longer than the other.
LENGTHS = {
    "cuda": {"many_keys": ((1, 65, 8192, 4, 2, 64), True), "many_queries": ((1, 8192, 65, 4, 2, 64), False)},
    "cpu": {"many_keys": ((1, 2, 530, 2, 1, 32), True), "many_queries": ((1, 130, 5, 2, 1, 32), False)},
}
# (B, N, M, iterations), and the range of costs: those of the loss, others that the scaling form takes, those that it
# leaves to the log domain, and problems that are streamed.
TRANSPORT = {
    "cuda": {
        "recipe": ((64, 64, 64, 20), (0.0, 1.0)),
        "far_apart": ((8, 64, 64, 20), (0.0, 10.0)),
        "below_zero": ((8, 64, 64, 20), (-20.0, 0.0)),
        "large": ((4, 200, 256, 20), (0.0, 1.0)),
    },
    "cpu": {
        "recipe": ((3, 6, 7, 4), (0.0, 1.0)),
        "far_apart": ((1, 6, 7, 4), (0.0, 10.0)),
        "below_zero": ((3, 6, 7, 4), (-20.0, 0.0)),
        "large": ((2, 5, 130, 3), (0.0, 1.0)),
    },
}


class Case(NamedTuple):
    """function(*inputs, *fixed) -> outputs, with gradients of the first one to the inputs.

    scenes: how many of the inputs, from the first, have a batch axis; fixed has one everywhere.
    """

    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    gradient: Tensor
    scenes: int

    def scene(self, i: int) -> "Case":
        """One scene alone."""
        inputs = (*(x[i : i + 1] for x in self.inputs[: self.scenes]), *self.inputs[self.scenes :])
        return self._replace(
            inputs=inputs, fixed=tuple(x[i : i + 1] for x in self.fixed), gradient=self.gradient[i : i + 1]
        )


def randn(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def attention_case(device, name, impl="triton", dtype=torch.float32, largest_scale=None):
    """largest_scale: of the heads that share the last key head."""
    sizes, mask = ATTENTION[device][name]
    *inputs, key_mask, dout = attention_problem(*sizes, dtype=dtype, device=device, mask=mask)
    if largest_scale is not None:
        inputs[3][-sizes[3] // sizes[4] :] = math.log(largest_scale)
    fixed = () if key_mask is None else (key_mask,)
    return Case(lambda *x: (ops.qk_norm_attention(*x, impl=impl),), tuple(inputs), fixed, dout, 3)


def real_columns(device, batch, columns):
    """bool [batch, columns]: all columns of the first scene, none of the second, then others."""
    counts = torch.tensor([columns, 0, 1, *(range(2, batch))])[:batch] % (columns + 1)
    return (torch.arange(columns) < counts[:, None]).to(device)


def sinkhorn_case(device, name, impl="triton", dtype=torch.float32):
    (batch, rows, columns, iters), (low, high) = TRANSPORT[device][name]
    generator = torch.Generator().manual_seed(3)
    cost = low + (high - low) * torch.rand(batch, rows, columns, generator=generator)
    cost = cost.to(device=device, dtype=dtype)
    mask = real_columns(device, batch, columns)
    # Nothing is asked of masked columns, whose log_plan is -inf.
    seen = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)[:, None, :]
    gradient = torch.where(seen, randn(device, batch, rows + 1, columns + 1, seed=4), 0.0)
    return Case(lambda c, m: (ops.sinkhorn(c, m, iters=iters, impl=impl),), (cost,), (mask,), gradient, 1)


def segments(device, batch, count, seed):
    return 0.3 * randn(device, batch, count, 2, 3, seed=seed)


def cost_case(device, name, impl="triton", dtype=torch.float32):
    (batch, rows, columns, _), _ = TRANSPORT[device][name]
    inputs = (segments(device, batch, rows, 5).to(dtype), segments(device, batch, columns, 6).to(dtype))

    def function(pred, target):
        return (ops.segment_cost(pred, target, weights=WEIGHTS, impl=impl),)

    return Case(function, inputs, (), randn(device, batch, rows, columns, seed=7), 2)


def matching_case(device, name, impl="triton", dtype=torch.float32):
    (batch, rows, columns, iters), _ = TRANSPORT[device][name]
    inputs = (segments(device, batch, rows, 5).to(dtype), segments(device, batch, columns, 6).to(dtype))

    def function(pred, target, mask):
        return ops.segment_matching(pred, target, mask, weights=WEIGHTS, iters=iters, impl=impl)

    return Case(function, inputs, (real_columns(device, batch, columns),), randn(device, batch, seed=7), 2)


CASES = {
    "qk_norm_attention": functools.partial(attention_case, name="cross"),
    "sinkhorn": functools.partial(sinkhorn_case, name="recipe"),
    "segment_cost": functools.partial(cost_case, name="recipe"),
    "segment_matching": functools.partial(matching_case, name="recipe"),
}
# What else there is to take in a kernel or on the way to one. The name begins with that of the operation.
BRANCHES = {
    "qk_norm_attention_narrow": functools.partial(attention_case, name="narrow_heads"),
    "qk_norm_attention_wide": functools.partial(attention_case, name="wide_heads"),
    "qk_norm_attention_running_maximum": functools.partial(attention_case, name="cross", largest_scale=60.0),
    "sinkhorn_streamed": functools.partial(sinkhorn_case, name="large"),
    "sinkhorn_log_domain": functools.partial(sinkhorn_case, name="below_zero"),
    "segment_matching_composed": functools.partial(matching_case, name="large"),
}
EVERY = {**CASES, **BRANCHES}


def dtypes(name) -> tuple[torch.dtype, ...]:
    """Those in which a case of EVERY is computed in another way."""
    if not name.startswith("qk_norm_attention"):
        # Transport computes in float32, whatever it is given.
        return DTYPES[:1]
    # float16 keeps the running maximum always.
    return tuple(x for x in DTYPES if not (name.endswith("running_maximum") and x == torch.float16))


def evaluate(case: Case) -> list[Tensor]:
    """Outputs, and gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    outputs = case.function(*inputs, *case.fixed)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[0], inputs, case.gradient)]


def exactly(case: Case) -> list[Tensor]:
    return evaluate(case._replace(inputs=tuple(x.double() for x in case.inputs), gradient=case.gradient.double()))


@contextlib.contextmanager
def poisoned():
    """Memory from torch.empty holds NaN: what a kernel leaves unwritten, or reads before it is, shows."""
    with deterministic():
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield


def same_bits(first, second) -> bool:
    # torch.equal takes -0 for 0 and no NaN for itself.
    return all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


def digest(device):
    """SHA-256 of all results of all operations."""
    hashed = hashlib.sha256()
    for name, make in EVERY.items():
        for dtype in dtypes(name) if device == "cuda" else DTYPES[:1]:
            for x in evaluate(make(device, dtype=dtype)):
                hashed.update(x.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return hashed.hexdigest()


def triton_attention(*inputs):
    return ops.qk_norm_attention(*inputs, impl="triton")
