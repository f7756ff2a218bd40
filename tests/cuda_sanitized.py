"""What test_gpu_sanitizer.py runs under compute-sanitizer: ``python cuda_sanitized.py kernels|planted``.

Every Triton kernel once, at sizes that end within a tile; or a kernel that writes beyond its tensor.
"""

import sys

import torch
import triton
import triton.language as tl

import gpu_cases
from kernel_budget import attention_problem, run_attention


@triton.jit
def _beyond_the_end_kernel(p_x, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    # Nothing is allocated right behind 64 bytes.
    tl.store(p_x + SIZE + o, 1.0)


def kernels():
    for dtype in gpu_cases.DTYPES[::2]:
        # A grid with the keys in one program each, and chunks of keys in programs of their own.
        for batch, keys in ((30, 70), (1, 1030)):
            print(f"attention, {dtype}, {batch} x {keys}", flush=True)
            problem = attention_problem(batch, 37, keys, 4, 2, 64, dtype=dtype, device="cuda", mask=True)
            run_attention(gpu_cases.triton_attention, problem)
    sizes = {"tile": ((3, 37, 41, 3), (0.0, 1.0)), "streamed": ((2, 130, 200, 3), (0.0, 1.0))}
    gpu_cases.TRANSPORT["cuda"] = sizes
    for name in sizes:
        for make in (gpu_cases.sinkhorn_case, gpu_cases.cost_case, gpu_cases.matching_case):
            print(f"{make.__name__}, {name}", flush=True)
            gpu_cases.evaluate(make("cuda", name))


def planted():
    _beyond_the_end_kernel[(1,)](torch.zeros(16, device="cuda"), SIZE=16)


if __name__ == "__main__":
    {"kernels": kernels, "planted": planted}[sys.argv[1]]()
    torch.cuda.synchronize()
    print("done")
