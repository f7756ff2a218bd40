"""Memory that shows when it is read before it is written, and tensors with guards around them.

Inside :func:`poisoned_memory`, ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` give NaN (-1 for
integers) with guards of the same before and behind each tensor; the end of the block checks that nothing wrote into a
guard. :func:`guarded` copies a tensor between guards, so that reading beyond its ends shows too.
"""

import contextlib

import torch

# Elements; keeps the 16-byte alignment of what lies between.
_GUARD = 1024


def _poison(dtype):
    return torch.nan if dtype.is_floating_point else True if dtype == torch.bool else -1


def _between_guards(size, dtype, device, empty=torch.empty):
    size = torch.Size(size)
    buffer = empty(size.numel() + 2 * _GUARD, dtype=dtype, device=device).fill_(_poison(dtype))
    # Not a view of the buffer for autograd, but a tensor of its own on the same storage.
    tensor = empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), _GUARD, size)
    return buffer, tensor


def guarded(x):
    """A contiguous copy of ``x`` with NaN (-1, True) before and behind it."""
    _, tensor = _between_guards(x.shape, x.dtype, x.device)
    return tensor.copy_(x)


@contextlib.contextmanager
def poisoned_memory():
    """Allocations as described above; yields the list of (buffer, tensor) that were given."""
    empty, empty_like, given = torch.empty, torch.empty_like, []

    def poisoned_empty(*size, dtype=None, device=None):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        given.append(_between_guards(size, dtype or torch.get_default_dtype(), device or "cpu", empty))
        return given[-1][1]

    def poisoned_like(x, dtype=None, device=None, memory_format=torch.preserve_format):
        # The strides of a view would be kept.
        assert x.is_contiguous() or memory_format == torch.contiguous_format, "not poisoned: strides of a view"
        return poisoned_empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    def poisoned_new(x, *size, dtype=None, device=None):
        return poisoned_empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    torch.empty, torch.empty_like, torch.Tensor.new_empty = poisoned_empty, poisoned_like, poisoned_new
    try:
        yield given
    finally:
        torch.empty, torch.empty_like = empty, empty_like
        # Inherited from the base class before.
        del torch.Tensor.new_empty
    for buffer, tensor in given:
        for guard in (buffer[:_GUARD], buffer[buffer.numel() - _GUARD :]):
            untouched = guard.isnan() if tensor.is_floating_point() else guard == _poison(tensor.dtype)
            assert untouched.all(), f"something wrote beyond a tensor {list(tensor.shape)}"
