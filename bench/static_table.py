"""The main kernels of the committed report as Markdown: ``wireframe bench static --table``, the table of the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from wireframe.bench.static import REPORT, read_report
from wireframe.bench.timing import milliseconds
from wireframe.errors import WireframeError

ARCHITECTURE = 89

_HEADING = (
    "launch", "tile, warps", "registers", "stack", "shared memory", "resident warps",
    "main loop: instructions, tensor core", "bound on a 4090, us",
)  # fmt: skip

_ATTENTION, _MATCHING = "cross 32x4x256x4096 masked bf16 64", "segment_matching 64x64x64 fp32 64"
_GELU, _NORM = "linear_gelu 65536x128x1024 bf16 128", "rms_norm 65536x256 bf16 256"
_RESIDUAL = "residual_norm 32x256x256 bf16 256"

# What a launch is called, its kernel, and the case that comes to it.
_SHOWN = (
    ("attention forward, 32 x 4 x 256 x 4096, key mask", "_qk_norm_attention_fwd_kernel", _ATTENTION),
    ("attention dq, the same", "_qk_norm_attention_dq_kernel", _ATTENTION),
    ("attention dk and dv, the same", "_qk_norm_attention_dkv_kernel", _ATTENTION),
    ("1 / norm of the keys, the same", "_qk_norm_attention_keys_kernel", _ATTENTION),
    ("attention forward, one scene, keys split", "_qk_norm_attention_fwd_kernel",
     "one scene 1x4x256x4096 masked bf16 64"),
    ("attention forward, 32 x 4 x 256 x 256", "_qk_norm_attention_fwd_kernel", "latent 32x4x256x256 bf16 64"),
    ("Sinkhorn forward, 64 x 64 x 64, fp32", "_sinkhorn_fwd_kernel", "sinkhorn 64x64x64 fp32 64"),
    ("Sinkhorn backward, the same", "_sinkhorn_bwd_kernel", "sinkhorn 64x64x64 fp32 64"),
    ("segment matching forward, the same", "_segment_matching_fwd_kernel", _MATCHING),
    ("segment matching backward, the same", "_segment_matching_bwd_kernel", _MATCHING),
    ("features of points, 32 x 2048", "_point_features_fwd_kernel", "point_features 32x2048 bf16 128"),
    ("linear with GELU, 65,536 x 128 -> 1024", "_linear_gelu_fwd_kernel", _GELU),
    ("gradient before the GELU, the same", "_linear_gelu_bwd_kernel", _GELU),
    ("residual, dropout, RMSNorm, 32 x 256 x 256", "_residual_norm_fwd_kernel", _RESIDUAL),
    ("its gradients", "_residual_norm_bwd_kernel", _RESIDUAL),
    ("RMSNorm, 65,536 x 256", "_residual_norm_fwd_kernel", _NORM),
    ("its gradients", "_residual_norm_bwd_kernel", _NORM),
    ("AdamW and the half-precision copy, 8.86 M", "_adamw_step_update_kernel", "adamw_step 8855104 bf16 256"),
)  # fmt: skip

# Shorter loops are the slow paths of a quotient or a root.
_LEAST_LOOP = 32


def run(path: Path = REPORT) -> int:
    """Prints the table; 0.

    Raises:
        WireframeError: the file is no report, or lacks one of the launches.
    """
    print(table(read_report(path)["rows"]))
    return 0


def table(rows: Iterable[dict]) -> str:
    """Markdown of the main launches among the rows of a report.

    Raises:
        WireframeError: one of them is missing.
    """
    found = {(row["kernel"], case): row for row in rows if row["arch"] == ARCHITECTURE for case in row["cases"]}
    lines = [_line(_HEADING), f"|{'---|' * len(_HEADING)}"]
    for launch, kernel, case in _SHOWN:
        if (kernel, case) not in found:
            raise WireframeError(
                f"the report has no {kernel} of {case} for sm_{ARCHITECTURE}; run: wireframe bench static --out REPORT"
            )
        lines.append(_line((launch, *_cells(found[kernel, case]))))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict) -> tuple[str, ...]:
    shared = f"{row['shared']:,} B" if row["shared"] else "0"
    bound = milliseconds(row["roofline_us"]["RTX 4090"])
    return (
        ", ".join(filter(None, (_tile(row["constants"]), str(row["num_warps"])))), str(row["registers"]),
        str(row["stack"]), shared, str(row["resident_warps"]), _loop(row), bound,
    )  # fmt: skip


def _tile(constants: dict) -> str:
    """Rows x columns of a program, or one of the two."""
    if "BN" in constants:
        return f"{constants['BM']} x {constants['BN']}"
    if "SIDE" in constants:
        return f"{constants['SIDE']} x {constants['SIDE']}"
    named = {"BM": " rows", "BR": " rows", "KEYS": " keys", "TILE": ""}
    return next((f"{constants[name]}{what}" for name, what in named.items() if name in constants), "")


def _loop(row: dict) -> str:
    """Of the loop with most products on tensor cores; where there is none, of the first."""
    if row["loop"]["tensor_core"]:
        return f"{row['loop']['instructions']}, {row['loop']['tensor_core']}"
    return next((str(length) for length in row["loops"] if length >= _LEAST_LOOP), "no loop")
