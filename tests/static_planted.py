"""As ``static_toys``, with kernels planted among the cases: one that spills, and one that does not compile."""

import static_toys

from wireframe.bench.static_cases import Case


def cases():
    planted = {"planted": static_toys.spilling_launch, "broken": static_toys.broken_launch}
    return [
        *static_toys.cases(),
        Case("twice", "fp32", 64, lambda arch: [static_toys.dot_launch(), static_toys.dot_launch(warps=8)]),
        *(Case(name, "fp32", 128, lambda arch, plan=plan: [plan()]) for name, plan in planted.items()),
    ]


minimum_warps = static_toys.minimum_warps
