"""Sums of partial sums in a fixed order: the last launch of gradients that many programs have a part in."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch

# Rows read at a time, which are mostly all, for a loop would wait for memory in each turn; and columns of a program.
_ROWS, _COLUMNS, _WARPS = 512, 16, 8


@triton.jit(do_not_specialize=["rows"])
def _column_sums_kernel(p_parts, p_sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        o_r = start + tl.arange(0, ROWS)[:, None]
        # [ROWS, COLUMNS]
        b_sum += tl.load(p_parts + o_r * columns + o_c, mask=(o_r < rows) & (o_c < columns), other=0.0)
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(p_sums + o_c, tl.sum(b_sum, 0), mask=o_c < columns)


def plan_column_sums(
    parts: Tensor,  # [R, C] float32
    sums: Tensor,  # [C] float32
) -> Launch:
    """sums = parts.sum(0), contiguous both; the order follows from R and C alone."""
    rows, columns = parts.shape
    arguments = {
        "p_parts": parts, "p_sums": sums, "rows": rows, "columns": columns, "ROWS": _ROWS, "COLUMNS": _COLUMNS,
    }  # fmt: skip
    return Launch(_column_sums_kernel, (triton.cdiv(columns, _COLUMNS),), arguments, _WARPS)
