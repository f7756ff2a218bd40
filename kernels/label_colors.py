"""Colours of label maps to class ids, on tensors (``wireframe.classes.colors_to_ids`` is the same on arrays)."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe import classes
from wireframe.kernels import dispatch
from wireframe.kernels.checks import thread_count


@torch.library.custom_op("wireframe::colors_to_ids", mutates_args=())
def _colors_to_ids(image: Tensor, table: str, impl: str, threads: int) -> Tensor:
    ids = classes.colors_to_ids(image.detach().cpu().numpy(), table, impl=impl, threads=threads)
    return torch.from_numpy(ids).to(image.device)


@_colors_to_ids.register_fake
def _(image: Tensor, table: str, impl: str, threads: int) -> Tensor:
    return image.new_empty(image.shape[:-1])


def colors_to_ids(
    image: Tensor,  # [..., 3]
    table: str,
    *,
    impl: str = "auto",
    threads: int | None = None,
) -> Tensor:
    """Class ids uint8 [...] of a colour-coded label map.

    Args:
        image: uint8 [..., 3], RGB. The work is done on the CPU wherever the tensor lies.
        table: "gestalt" or "ade", whose ids are the positions in ``classes.GESTALT_NAMES`` and ``ADE_NAMES``.
        impl: "auto", "reference" or "native"; all give the same ids.
        threads: of the native implementation; None takes torch's number.

    Returns:
        uint8 [...] on the image's device; ``classes.UNKNOWN`` where the colour is not in the table.

    Raises:
        TypeError: the image is not a tensor.
        ValueError: an image of another shape or dtype, an unknown ``table`` or ``impl``, or less than one thread.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"colors_to_ids: image must be a tensor, not {type(image).__name__}")
    if image.dtype != torch.uint8 or image.shape[-1:] != (3,):
        raise ValueError(f"colors_to_ids: image must be uint8 [..., 3], got {image.dtype} {list(image.shape)}")
    chosen = dispatch.choose("colors_to_ids", impl, image.device.type)
    return _colors_to_ids(image, table, chosen, thread_count(threads))
