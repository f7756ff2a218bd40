"""All numbers of a run in flat buffers: weights, their half-precision copy, gradients and AdamW's moments.

One buffer each, so that clipping, AdamW and the half-precision copy are one pass (``ops.adamw_step``), whatever the
number of parameters, and nothing waits for the host. The parameters of the model are views of the buffer of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wireframe.errors import ConfigError
from wireframe.kernels import ops
from wireframe.kernels.cpu_products import has_bfloat16_products
from wireframe.layers import Linear
from wireframe.perceiver import Perceiver
from wireframe.train.config import OptimizerConfig

# Every parameter begins at a multiple of so many elements: 128 bytes in half precision, as products read them best.
_ALIGNMENT = 64

# What a checkpoint holds of the optimiser, beside one count of updates.
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNT = "step"


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of large products: one of ``config.PRECISIONS`` on a device."""
    if precision == "auto":
        halved = has_bfloat16_products() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if halved else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


class FlatAdamW:
    """AdamW over the parameters of a model, with clipping by global norm and a decay of the confidence head's own.

    ``model`` keeps float32 weights, which are what is saved and scored. ``compute`` is the same model as the step runs
    it: with ``dtype`` bfloat16 its large products read rounded copies, which every update writes anew; norms, tables,
    scales and heads are those of ``model``. With float32 the two are one.

    Attributes:
        master, exp_avg, exp_avg_sq: float32 [P], all parameters one after another with zeros between them.
        half: bfloat16 [P] or None. gradients: float32 [micro-batches, P]. count: float32 [], updates so far.

    Raises:
        ConfigError: ``dtype`` is neither float32 nor bfloat16.
    """

    def __init__(
        self, model: Perceiver, config: OptimizerConfig, dtype: torch.dtype = torch.float32, micro_batches: int = 1
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"weights are computed with in float32 or bfloat16, not {dtype}")
        self.model, self.config, self.dtype = model, config, dtype
        named = dict(model.named_parameters())
        self._places = _places(named)
        size = sum(_padded(parameter) for parameter in named.values())
        device = next(iter(named.values())).device
        self.master, self.exp_avg, self.exp_avg_sq = (torch.zeros(size, device=device) for _ in range(3))
        self.gradients = torch.zeros(micro_batches, size, device=device)
        self.count = torch.zeros((), device=device)
        for name, parameter in named.items():
            # The parameter stays the object that it is, whoever holds it.
            parameter.data = self._view(self.master, name).copy_(parameter.data)
        self._decays = _decays(named, self._places, config)
        self.half = None if dtype == torch.float32 else self.master.to(dtype)
        self.compute = model if self.half is None else self._twin()
        self._gradient_views = [[self._view(row, name) for name in named] for row in self.gradients]

    def parameters(self) -> list[Tensor]:
        """What gradients are taken to, in the order of ``collect``."""
        return list(self.compute.parameters())

    def collect(self, micro_batch: int, gradients: Sequence[Tensor]) -> None:
        """Writes gradients to ``parameters()`` into row ``micro_batch`` of ``gradients``, as float32."""
        views = self._gradient_views[micro_batch]
        # One launch takes tensors of one dtype that lie as their copies do; one of another kind would cost all theirs.
        kinds = [(mine.dtype, mine.stride() == view.stride()) for mine, view in zip(gradients, views)]
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            torch._foreach_copy_([views[i] for i in chosen], [gradients[i] for i in chosen])

    def step(self, gradient: Tensor, lr: Tensor, healthy: Tensor) -> Tensor:
        """One update of everything, unless ``healthy`` is False or the gradient is not finite; no wait for the device.

        Args:
            gradient: float32 [P]. lr: float32 []. healthy: bool [].

        Returns:
            The norm of the gradient before clipping, float32 [].
        """
        config = self.config
        return ops.adamw_step(
            self.master, gradient, self.exp_avg, self.exp_avg_sq, self.count, lr, healthy,
            grad_clip=config.grad_clip, betas=(config.beta1, config.beta2), half=self.half, **self._decays,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the optimiser: ``step``, and ``KEY:PARAMETER`` of the moments."""
        found = {COUNT: self.count}
        for key in MOMENTS:
            found |= {f"{key}:{name}": self._view(getattr(self, key), name) for name in self._places}
        return found

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Takes over weights (a state dict) and what ``state`` gave; an empty state means an optimiser that begins."""
        self.model.load_state_dict(weights)
        if self.half is not None:
            self.half.copy_(self.master)
        for name, tensor in self.state().items():
            tensor.zero_() if not state else tensor.copy_(state[name])

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        start, shape = self._places[name]
        return buffer[start : start + shape.numel()].view(shape)

    def _twin(self) -> Perceiver:
        """The model whose products read ``half`` and that shares all other tensors."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        twin = copy.deepcopy(self.model, shared)
        for prefix, module in twin.named_modules():
            if isinstance(module, Linear):
                for name, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(self._view(self.half, f"{prefix}.{name}")))
        return twin


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT


def _places(named: Mapping[str, Tensor]) -> dict[str, tuple[int, torch.Size]]:
    """Start and shape of every parameter in the buffers."""
    places, start = {}, 0
    for name, parameter in named.items():
        places[name] = (start, parameter.shape)
        start += _padded(parameter)
    return places


def _decays(named: Mapping[str, Tensor], places: Mapping[str, tuple[int, torch.Size]], config: OptimizerConfig) -> dict:
    """Weight decay by place: the confidence head is the last of the parameters."""
    names = list(named)
    first = next(i for i, name in enumerate(names) if ".conf_head." in name)
    if not all(".conf_head." in name for name in names[first:]):
        raise RuntimeError("the confidence head must hold the last of the parameters, for its decay begins at a place")
    return {
        "weight_decay": config.weight_decay,
        "late_weight_decay": config.conf_head_weight_decay,
        "late_from": places[names[first]][0],
    }
