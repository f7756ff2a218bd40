"""Rows as ``wireframe bench`` writes them, for the tests of its report."""

import json

from wireframe.bench.report_rows import read_rows

HOSTILE = '| <!-- /bench --> `x` $\\frac{ </td></script><script>document.title="ran"</script><img src=x> \x1b[2J *a*'
MASKED = "4 x 4/2 x 256 x 2048 x 64, key mask"


def made(op="qk_norm_attention", provider="ours", p50=1.0, ratio=None, **changes):
    """A row as ``wireframe bench`` writes it."""
    part = changes.get("part", "kernels")
    times = {"p20_ms": None, "p50_ms": None, "p80_ms": None, "calls": 0}
    if p50 is not None:
        times = {"p20_ms": 0.9 * p50, "p50_ms": p50, "p80_ms": 1.2 * p50, "calls": 9}
    return {
        "part": "kernels", "op": op, "provider": provider, "mode": "forward", "shape": MASKED,
        "sizes": {"batch": 4, "keys": 2048}, "dtype": "float32", "deterministic": provider == "ours", **times,
        "ratio": ratio and dict(zip(("p50", "low", "high"), ratio)), "cache": None, "error": 1e-7, "peak_mib": 2.0,
        "first_s": 0.1, "flops": 4e9, "bytes": 1e7, "whole": None, "device": "Made CPU", "threads": 2,
        "torch": "2.13.0", "triton": "3.7.1", "cuda": None, "driver": None, "numpy": "2.4.6", "python": "3.11.7",
        "commit": "abc1234", "date": "2026-11-28 10:00 UTC", "load": 0.5,
        "command": f"wireframe bench {part}" + (" --threads 2" if part != "step" else ""), **changes,
    }  # fmt: skip


def attention():
    return [
        made(p50=2.0),
        made(provider="eager", p50=5.0, ratio=(2.5, 2.4, 2.6)),
        made(provider="eager, deterministic", p50=6.0, ratio=(3.0, 2.9, 3.1), deterministic=True),
        made(provider="torch.compile", p50=1.6, ratio=(0.8, 0.78, 0.83)),
        made(provider="FlexAttention", p50=None, failed="does not run on a CPU"),
        made(provider="flash, no mask", p50=1.0, ratio=(0.5, 0.49, 0.51), error=None),
    ]


def pipeline():
    at = {"part": "pipeline", "shape": "6 x 768 x 576", "sizes": {"views": 6}}
    part = {"whole": "raw bytes -> wireframe"}
    whole = {**part, "provider": "raw bytes -> wireframe", "error": None}
    prepared = {**at, "op": "prepare", "shape": "48 scenes, full size", "sizes": {"scenes": 48}}
    return [
        made(**{**at, "op": "raw bytes -> wireframe"}, p50=200.0),
        made(**{**at, "op": "read_scene"}, p50=50.0, **part),
        # In turn with the part it took longer than by itself.
        made(**{**at, "op": "read_scene"}, p50=250.0, ratio=(5.0, 4.9, 5.1), **whole),
        made(**{**at, "op": "fuse_views + sample_points"}, p50=10.0, **part),
        made(**{**at, "op": "fuse_views + sample_points"}, p50=200.0, ratio=(20.0, 18.0, 21.0), **whole),
        made(**{**at, "op": "fuse_views + sample_points"}, provider="NumPy reference", p50=75.0, ratio=(7.5, 7.0, 8.0),
             **part),
        *(made(**{**at, "op": "raw bytes -> wireframe", "shape": f"6 x 768 x 576, {n} threads",
                  "sizes": {"views": 6, "threads": n}}, p50=300.0 / n) for n in (1, 2)),
        made(**prepared, p50=2000.0),
        made(**prepared, provider="ours, 1 worker", p50=4000.0, ratio=(2.0, 1.9, 2.1)),
    ]  # fmt: skip


def steps():
    at = {"part": "step", "op": "training step", "mode": "forward + backward + update", "shape": "32 x 2048, bfloat16",
          "dtype": "bfloat16", "device": "NVIDIA H200", "cuda": "13.0", "driver": "580.1", "threads": 16}  # fmt: skip
    return [
        made(**at, p50=8.0, mfu=0.4, mfu_of=989.0, launches=643, idle=0.01),
        made(**at, provider="ours, torch's determinism off", p50=7.9, ratio=(0.98, 0.97, 0.99)),
        made(**at, provider="torch.compile", p50=16.0, ratio=(2.0, 1.98, 2.02), launches=1071, idle=0.1),
        made(**at, provider="torch.compile, deterministic", p50=20.0, ratio=(2.5, 2.4, 2.6), deterministic=True),
    ]


def growth():
    both = {"mode": "forward + backward", "threads": 2}
    found = [
        made(provider=name, p50=n / 1024 * factor, sizes={"batch": 4, "keys": n}, shape=f"4 x 4/2 x 256 x {n}", **both)
        for n in (1024, 4096, 16384) for name, factor in (("ours", 1.0), ("eager", 2.0))
    ]  # fmt: skip
    for name, key in (("sinkhorn", "batch"), ("segment_matching", "segments")):
        found += [made(name, p50=0.1 * n, sizes={"iters": 20, key: n}, shape=f"{n} x #", **both) for n in (1, 4, 16)]
    return found


def every():
    return [*attention(), *pipeline(), *steps(), *growth()]


def write(folder, rows):
    """A folder in ``folder`` with a file of the rows."""
    found = folder / "rows"
    found.mkdir(exist_ok=True)
    (found / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def rows_of(found, folder):
    """Rows as the report reads them."""
    return read_rows([write(folder, found)])
