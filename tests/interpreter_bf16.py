"""bfloat16 for Triton's interpreter, which keeps such numbers as uint16 bit patterns and computes with the patterns.

Inside :func:`interpreted_bfloat16` a cast rounds to nearest even and ``tl.dot`` multiplies the values, with float32
products and sums, as a tensor core does up to the order of its sums. Arithmetic on bfloat16 tensors, which would add
and multiply patterns, raises: a kernel converts to float32 first. Loops up to a run-time argument work too, which
Triton before 3.7 and NumPy from 2.4 on do not manage together.
"""

import contextlib

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from wireframe.kernels import adamw_step, dropout, linear_gelu, point_features, qk_norm_attention, residual_norm


def bits_of(values):
    """float32 values as bfloat16 bit patterns (uint16), rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def values_of(bits):
    """bfloat16 bit patterns (uint16) as the float32 values they stand for, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _cast(original):
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return original(self, src, dst_type)
        if source == tl.bfloat16:
            return original(self, TensorHandle(values_of(src.data), tl.float32), dst_type)
        return TensorHandle(bits_of(src.data.astype(np.float32)).reshape(src.data.shape), tl.bfloat16)

    return cast_impl


def _dot(original):
    def create_dot(self, a, b, d, *options):
        if _is_bfloat16(a):
            a, b = (TensorHandle(values_of(x.data), tl.float32) for x in (a, b))
        return original(self, a, b, d, *options)

    return create_dot


def _refuse(original):
    def op(self, *arguments):
        if any(isinstance(x, TensorHandle) and _is_bfloat16(x) for x in arguments):
            raise TypeError("arithmetic on bfloat16 in an interpreted kernel; convert to float32 first")
        return original(self, *arguments)

    return op


def _index(original):
    def patch_lang_tensor(tensor, *scope):
        original(tensor, *scope)
        # Triton 3.4 has no scope that would undo it; its own patch stays too.
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


@contextlib.contextmanager
def interpreted_bfloat16():
    """bfloat16 as described above for every interpreted kernel, undone at the end."""
    patches = {(InterpreterBuilder, "cast_impl"): _cast, (InterpreterBuilder, "create_dot"): _dot}
    patches |= {(InterpreterBuilder, name): _refuse for name in ("binary_op", "unary_op", "create_fma")}
    patches[interpreter, "_patch_lang_tensor"] = _index
    # Operations refuse what the interpreter cannot do unpatched.
    for op in (adamw_step, dropout, linear_gelu, point_features, qk_norm_attention, residual_norm):
        patches[op, "_INTERPRETED_DTYPES"] = lambda dtypes: (*dtypes, torch.bfloat16)
    originals = {place: getattr(*place) for place in patches}
    try:
        for place, patch in patches.items():
            setattr(*place, patch(originals[place]))
        yield
    finally:
        for place, original in originals.items():
            setattr(*place, original)
