"""The model of the training step: what is counted of known graphs, and the published figures of the whole one."""

import collections
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from batches import TINY, random_batch
from wireframe.bench import step_cases, step_model
from wireframe.bench.plain_model import PlainPerceiver
from wireframe.bench.step_aten import (
    ATTENTION,
    DATA,
    ELEMENTWISE,
    MOVEMENT,
    OPTIMISER,
    PRODUCTS,
    REDUCTION,
    TRANSPORT,
    reduced,
)
from wireframe.bench.step_fusion import fused
from wireframe.bench.step_trace import AROUND, BACKWARD, FORWARD, LOSS, UPDATE, Trace
from wireframe.cli import main
from wireframe.kernels import dispatch, launch, ops
from wireframe.perceiver import PerceiverConfig
from wireframe.train.rows import RowLayout

# By stage: points of a scene, and millions of multiply-adds of its forward pass.
PUBLISHED = {1: (2048, 3817), 2: (4096, 5761)}


def meta(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)


def traced(function):
    with Trace() as trace:
        function()
    return trace.rows


def counted(function):
    """Names with launches and bytes of what a function does."""
    return [(row.name, row.launches, row.moved) for row in traced(function)]


@pytest.fixture(scope="module")
def plain():
    return {stage: step_cases.traced("plain", stage) for stage in PUBLISHED}


@pytest.fixture(scope="module")
def ours():
    return step_cases.traced("ours", 1)


def test_a_small_graph_is_counted_operation_by_operation():
    x, w, b = meta(8, 4, grad=True), meta(16, 4, grad=True), meta(16, grad=True)

    def step():
        out = F.gelu(F.linear(x, w, b)).sum()
        torch.autograd.grad(out, [x, w, b])

    rows = traced(step)
    assert [(row.name, row.phase, row.kind, row.launches, row.moved) for row in rows] == [
        ("addmm", FORWARD, PRODUCTS, 1, 4 * (16 + 32 + 64 + 128)),
        ("gelu", FORWARD, ELEMENTWISE, 1, 4 * 256),
        ("sum", FORWARD, REDUCTION, 1, 4 * 129),
        ("ones_like", FORWARD, MOVEMENT, 1, 8),
        # The gradient of the sum is one number, expanded.
        ("gelu_backward", BACKWARD, ELEMENTWISE, 1, 4 * (1 + 128 + 128)),
        ("mm", BACKWARD, PRODUCTS, 1, 4 * (128 + 64 + 32)),
        ("mm", BACKWARD, PRODUCTS, 1, 4 * (128 + 32 + 64)),
        ("sum", BACKWARD, REDUCTION, 1, 4 * (128 + 16)),
    ]
    assert [row.flops for row in rows if row.kind == PRODUCTS] == [2 * 8 * 4 * 16] * 3
    assert not any(row.half for row in rows)


@pytest.mark.parametrize("function, expected", [
    (lambda: meta(8, 4).t()[0].unsqueeze(0).expand(5, 8).detach(), []),
    (lambda: torch.zeros(3, 3), []),
    (lambda: meta(4, 5).add_(meta(5)), [("add_", 1, 4 * (20 + 5 + 20))]),
    (lambda: meta(4, 5).copy_(meta(4, 1)), [("copy_", 1, 4 * (4 + 20))]),
    (lambda: meta(4, 5, dtype=torch.bfloat16).float(), [("_to_copy", 1, 20 * (2 + 4))]),
    (lambda: F.embedding(meta(6, dtype=torch.int64), meta(1000, 8)), [("embedding", 1, 6 * 8 + 2 * 4 * 48)]),
    (lambda: F.embedding(meta(600, dtype=torch.int64), meta(3, 8)), [("embedding", 1, 600 * 8 + 4 * 24 + 4 * 4800)]),
    (lambda: torch.logsumexp(meta(4, 5), 1), [("logsumexp", 9, 4 * (20 + 4 + 4 * 20))]),
    (lambda: torch._foreach_add_([meta(7) for _ in range(111)], 1.0), [("_foreach_add_", 2, 111 * 7 * 8)]),
    (lambda: torch._foreach_mul_([meta(3 * 65536 * 320)], 2.0), [("_foreach_mul_", 3, 3 * 65536 * 320 * 8)]),
], ids=["views", "another device", "in place", "overwritten", "cast", "rows looked up", "a small table looked up",
        "several kernels", "many tensors", "many blocks"])  # fmt: skip
def test_launches_and_bytes_of(function, expected):
    assert counted(function) == expected


HALF = torch.bfloat16


@pytest.mark.parametrize("function, launches", [
    (lambda: torch._foreach_copy_([meta(8, 4) for _ in range(3)], [meta(8, 4) for _ in range(3)]), 1),
    (lambda: torch._foreach_copy_([meta(8, 4) for _ in range(3)], [meta(8, 4, dtype=HALF) for _ in range(3)]), 1),
    (lambda: torch._foreach_copy_([meta(8, 1)] * 3, [meta(1, 8).t()] * 3), 1),
    (lambda: torch._foreach_copy_([meta(8, 4) for _ in range(3)], [meta(8, 4), meta(4, 8).t(), meta(8, 4)]), 3),
    (lambda: torch._foreach_copy_([meta(8, 4) for _ in range(3)], [meta(8, 4), meta(8, 4), meta(4)]), 3),
    (lambda: torch._foreach_copy_([meta(8, 4), meta(4)], [meta(8, 4), meta(4, dtype=HALF)]), 2),
    (lambda: torch._foreach_copy_([meta(8, 8)[:, ::2]] * 3, [meta(8, 8)[:, ::2]] * 3), 3),
    (lambda: torch._foreach_add_([meta(8, 4)] * 3, [meta(8, 4, dtype=HALF)] * 3), 3),
    (lambda: torch._foreach_norm([meta(8, 4), meta(5)]), 1),
], ids=["alike", "cast", "an axis of one", "one is turned", "one is broadcast", "two dtypes", "gaps", "promoted",
        "lists of results"])  # fmt: skip
def test_lists_of_tensors_that_do_not_lie_alike_are_taken_one_by_one(function, launches):
    assert [row.launches for row in traced(function)] == [launches]


def test_a_planted_operation_is_seen():
    x = meta(64, 64, grad=True)

    def step(planted):
        y = (x @ x).clone() if planted else x @ x
        torch.autograd.grad(y.sum(), x)

    without, planted = counted(lambda: step(False)), counted(lambda: step(True))
    assert collections.Counter(planted) - collections.Counter(without) == {("clone", 1, 2 * 4 * 64 * 64): 1}


def test_phases_are_told_apart():
    w = meta(4, 4, grad=True)
    trace = Trace()

    def loss(y):
        return y.square().mean()

    with trace:
        (gradient,) = torch.autograd.grad(trace.of_loss(loss)(torch.tanh(w)), w)
        gradient.mul_(2)
    found = [(row.name, row.phase, row.part) for row in trace.rows]
    assert ("tanh", FORWARD, ELEMENTWISE) in found and ("mean", LOSS, TRANSPORT) in found
    assert ("tanh_backward", BACKWARD, ELEMENTWISE) in found
    assert sum(phase == LOSS for _, phase, _ in found) > 3, "the loss has a backward pass"
    assert found[-1] == ("mul_", UPDATE, OPTIMISER)


def test_an_operation_of_ours_is_its_launches_and_nothing_runs():
    x, branch = meta(2, 64, 32, grad=True), meta(2, 32, 64, dtype=torch.bfloat16, grad=True)
    keys, run = meta(2, dtype=torch.int64), launch.run

    def step():
        out = ops.dropout_add(x, branch.transpose(1, 2), keys, site=1, p=0.1)
        torch.autograd.grad(out.sum(), [x, branch])

    rows = traced(step)
    assert launch.run is run
    names = [row.name for row in rows]
    assert names.count("_dropout_add_fwd_kernel") == names.count("_dropout_add_bwd_kernel") == 1
    forward = names.index("_dropout_add_fwd_kernel")
    # Scenes that are not in one piece are copied by the operation itself.
    assert names[:forward] == ["clone"]
    assert (rows[forward].launches, rows[forward].flops) == (1, 2 * 4096)
    assert rows[forward].moved == 4096 * (4 + 2 + 4) + 2 * 8 and rows[forward].half
    assert rows[names.index("_dropout_add_bwd_kernel")].phase == BACKWARD


def test_launching_is_as_before_after_an_error():
    run = launch.run
    with pytest.raises(RuntimeError), Trace():
        ops.dropout_add(meta(2, 4), meta(2, 4), meta(2, dtype=torch.int64), site=0, p=0.5)
        raise RuntimeError
    assert launch.run is run


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_published_forward_pass_is_counted(plain, stage):
    points, millions = PUBLISHED[stage]
    found = plain[stage]
    assert found.points == points
    products = [row for row in found.rows if row.part in (PRODUCTS, ATTENTION)]
    total = {
        (row.phase, row.kind): sum(r.flops for r in products if (r.phase, r.kind) == (row.phase, row.kind))
        for row in products
    }
    forward, backward = (sum(total[phase, kind] for kind in (PRODUCTS, ATTENTION)) for phase in (FORWARD, BACKWARD))
    assert forward / found.scenes == pytest.approx(2e6 * millions, rel=0.001)
    # Every product has two gradients; of the two of attention, the first is computed once more.
    assert total[BACKWARD, PRODUCTS] == 2 * total[FORWARD, PRODUCTS]
    assert total[BACKWARD, ATTENTION] == 2.5 * total[FORWARD, ATTENTION]
    assert 2.0 < backward / forward < 2.3


def test_our_step_is_traced_whole(ours):
    """The same products as the plain one's, but for what the first layer folds away; every part is seen."""
    total = collections.Counter()
    for row in ours.rows:
        total[row.phase, row.kind] += row.flops
    forward = sum(total[FORWARD, kind] for kind in (PRODUCTS, ATTENTION)) / ours.scenes
    assert 0.9 * 2e6 * 3817 < forward < 1.02 * 2e6 * 3817
    # Twice, and the first maps of the points and of ten feed-forwards once more.
    assert 2.1 < total[BACKWARD, PRODUCTS] / total[FORWARD, PRODUCTS] < 2.3
    assert {row.phase for row in ours.rows} == {AROUND, FORWARD, LOSS, BACKWARD, UPDATE}
    kernels = collections.Counter(row.name for row in ours.rows if row.ours)
    # Ten layers attend to themselves, and six to a memory.
    assert kernels["_qk_norm_attention_fwd_kernel"] == kernels["_qk_norm_attention_dkv_kernel"] == 16
    assert kernels["_segment_matching_fwd_kernel"] == 1
    assert all(row.half for row in ours.rows if row.kind in (PRODUCTS, ATTENTION) and row.flops > 1e9)


def test_the_batch_and_what_is_told_are_part_of_the_step(ours, plain):
    around = [row for row in ours.rows if row.phase == AROUND]
    assert around == [row for row in ours.rows if row.part == DATA]
    # Rows of bytes are read and written, and their places read.
    gathered = max(row.moved for row in around if row.name == "index_select")
    assert gathered == 2 * 32 * RowLayout(2048, 64).bytes + 32 * 8
    # x and z of points and of the ends of segments, two products and a sum each.
    names = collections.Counter(row.name for row in around)
    assert (names["mul"], names["add"]) == (8, 4)
    # Behind the update the losses of every scene and of the step go into their line.
    assert [row.name for row in ours.rows[-4:]] == ["eq", "where", "copy_", "add_"]
    assert ours.rows[-5].phase == UPDATE and "[33,4]" in ours.rows[-3].shapes
    # The plain step has the same batch, but no script.
    batch = [(row.name, row.moved) for row in plain[1].rows if row.phase == AROUND]
    assert batch == [(row.name, row.moved) for row in around][4:-4]


def test_what_is_around_a_step_is_fused_with_nothing(plain):
    before, after = ([row for row in rows if row.phase == AROUND] for rows in (plain[1].rows, fused(plain[1].rows)))
    assert len(before) > 20 and before == after


def test_the_trace_repeats_itself(plain):
    assert step_cases.traced("plain", 1).rows == plain[1].rows


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_autocast_on_meta_tensors_is_that_of_a_device():
    """Products and their dtypes, against torch.autocast itself on the CPU, which shares its rule for them."""
    config = PerceiverConfig(**TINY)
    real = PlainPerceiver(config)
    with Trace("cpu") as on_cpu, torch.autocast("cpu", torch.bfloat16):
        real(random_batch())
    batch = {name: tensor.to("meta") for name, tensor in random_batch().items()}
    model = PlainPerceiver(config).to("meta")
    with Trace() as on_meta, step_cases.OnCuda(torch.bfloat16):
        model(batch)
    products = [
        [(row.name, row.shapes, row.flops) for row in trace.rows if row.kind == PRODUCTS] for trace in (on_cpu, on_meta)
    ]
    assert products[0] == products[1] and len(products[0]) > 20
    assert all("bf16" in shapes for _, shapes, _ in products[1])
    # Weights are cast once, though two projections of three read the points in every layer.
    casts = collections.Counter(row.shapes for row in on_meta.rows if row.name == "_to_copy")
    assert casts["[32,32]"] == sum(p.shape == (32, 32) for p in model.parameters())


def test_without_autocast_nothing_is_cast(plain):
    names = [row.name for row in step_cases.traced("plain", 1, half=False).rows if row.phase == FORWARD and row.flops]
    assert names == [
        {"_scaled_dot_product_flash_attention": "_scaled_dot_product_efficient_attention"}.get(row.name, row.name)
        for row in plain[1].rows
        if row.phase == FORWARD and row.flops
    ]


def test_a_chain_of_elementwise_operations_is_one_kernel():
    x, w = meta(64, 64), meta(64, 64)

    def step():
        kept = (x * 2 + 1).relu()
        other = kept.sum(1, keepdim=True)
        across = (kept / other).sum(0)
        return kept @ w, across

    rows = traced(step)
    assert [row.name for row in rows] == ["mul", "add", "relu", "sum", "div", "sum", "mm"]
    chains = fused(rows)
    # The second sum runs over other axes than the first.
    assert [(row.launches, row.kind) for row in chains] == [(1, REDUCTION), (1, REDUCTION), (1, PRODUCTS)]
    full, line = 4 * 64 * 64, 4 * 64
    # x is read and the rectified values are written, for the product, and the quotient for the second sum.
    assert chains[0].moved == 3 * full
    assert chains[1].moved == full + line


def test_what_waits_for_a_product_is_not_fused_across_it():
    x, w = meta(8, 8), meta(8, 8)
    rows = fused(traced(lambda: ((x + 1) @ w) + 1))
    assert [(row.name, row.launches) for row in rows] == [("add", 1), ("mm", 1), ("add", 1)]


def test_times_are_the_largest_of_products_bytes_and_launches(plain):
    row = traced(lambda: meta(1024, 1024, dtype=torch.bfloat16) @ meta(1024, 1024, dtype=torch.bfloat16))[0]
    gpu, rate = step_model.GPUS["RTX 4090"], step_model.RATES["RTX 4090"][PRODUCTS]
    products = 2 * 1024**3 / (gpu.half * rate.products) / 1e6
    assert step_model.predicted_us("RTX 4090", row, 2.0) == pytest.approx(products)
    assert step_model.predicted_us("RTX 4090", row, 50.0) == 50.0
    assert step_model.predicted_us("RTX 4090", row._replace(half=False), 0.0) == pytest.approx(products * 165 / 82.6)
    moved = row._replace(moved=10**9)
    assert step_model.predicted_us("RTX 4090", moved, 0.0) == pytest.approx(1e9 / gpu.bandwidth / rate.bandwidth / 1e6)
    waits = row._replace(name="_segment_matching_fwd_kernel")
    assert step_model.predicted_us("H200", waits, 0.0) == pytest.approx(25.8)
    for name in step_model.GPUS:
        bounds = [step_model.bound_us(step_model.GPUS[name], row) for row in plain[1].rows]
        assert all(step_model.predicted_us(name, row, 0.0) >= bound for row, bound in zip(plain[1].rows, bounds))


def test_rates_name_what_was_measured():
    path = Path(step_model.__file__).parent / "results" / "nvidia-h200.jsonl"
    measured = [json.loads(line) for line in path.open()]

    def us(*what):
        rows = [row for row in measured if (row["op"], row["mode"], row["provider"], row["shape"]) == what]
        return {round(1e3 * row["p50_ms"], 1) for row in rows}

    shape, both = "32 x 4/2 x 256 x 2048 x 64, key mask", ("qk_norm_attention", "forward + backward")
    assert 262.4 in us(*both, "ours", shape) and 362.6 in us(*both, "torch.compile", shape)
    graph = "64 x 64 x 64, 20 iterations"
    for kernel, least in step_model.LEAST_US.items():
        op, direction = re.fullmatch(r"_(\w+)_(fwd|bwd)_kernel", kernel).groups()
        found = us(op, f"{'forward' if direction == 'fwd' else 'backward'}, graph", "ours", graph)
        assert any(abs(least - x) < 0.1 for x in found), kernel
    for rates in step_model.RATES.values():
        assert all(0 < rate.products <= 1 and 0 < rate.bandwidth <= 1 and rate.source for rate in rates.values())


def test_the_command_reports_classes_totals_and_operations(tmp_path, capsys):
    out = tmp_path / "model.jsonl"
    out.write_text('{"another": "row"}\n')
    assert main(["bench", "step", "--model", "--of", "plain", "--stage", "1", "--list", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "plain, stage 1: 32 x 2048 points, eager" in text and "chains fused, in a CUDA graph" in text
    assert "wanted on an RTX 4090: 10; published there: 43" in text
    kept, report = map(json.loads, out.read_text().splitlines())
    assert kept == {"another": "row"}
    every = len(text[text.index("every operation"):].split("\n\n")[0].splitlines()) - 2
    eager, chains = report["ways"]["eager"], report["ways"]["chains fused, from the host"]
    assert len(report["operations"]) == eager["operations"] == every
    assert sum(row["launches"] for row in report["operations"]) == eager["launches"] > 2 * chains["launches"]
    assert chains["mb"] < 0.7 * eager["mb"] and chains["gflop"] == pytest.approx(eager["gflop"])
    assert {row["class"] for row in report["operations"]} == set(step_model.KINDS)


@pytest.mark.parametrize("arguments, words", [
    (["bench", "step", "--device", "cpu", "--small", "--out", "/nowhere/rows.jsonl"], "/nowhere is no folder"),
    (["bench", "step", "--model", "--out", "/nowhere/model.json"], "/nowhere is no folder"),
])  # fmt: skip
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_meta_tensors_take_triton_where_it_is_installed(monkeypatch):
    for op in dispatch.MODEL_OPS:
        assert dispatch.choose(op, "auto", "meta") == dispatch.choose(op, "triton", "meta") == "triton"
        assert dispatch.choose(op, "reference", "meta") == "reference"
        assert dispatch.choose(op, "auto", "meta", "too large") == "reference"
        with pytest.raises(dispatch.ImplementationError, match="too large"):
            dispatch.choose(op, "triton", "meta", "too large")
    monkeypatch.setattr(dispatch, "INTERPRETED", not dispatch.INTERPRETED)
    assert dispatch.choose("sinkhorn", "auto", "meta") == "triton"
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert dispatch.choose("sinkhorn", "auto", "meta") == "reference"
    with pytest.raises(dispatch.ImplementationError, match="not installed"):
        dispatch.choose("sinkhorn", "triton", "meta")


def test_operations_give_shapes_on_meta_tensors():
    q, k = meta(2, 5, 4, 32, dtype=torch.bfloat16, grad=True), meta(2, 7, 2, 32, dtype=torch.bfloat16, grad=True)
    out = ops.qk_norm_attention(q, k, k, meta(4, grad=True), meta(2, 7, dtype=torch.bool))
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    assert [x.shape for x in torch.autograd.grad(out.sum(), [q, k])] == [q.shape, k.shape]
    pred = meta(2, 5, 2, 3, grad=True)
    loss, _ = ops.segment_matching(pred, meta(2, 6, 2, 3), meta(2, 6, dtype=torch.bool))
    assert loss.shape == (2,) and torch.autograd.grad(loss.sum(), pred)[0].shape == pred.shape


def test_ours_needs_triton(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert main(["bench", "step", "--model"]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_the_backward_of_a_norm_sums_over_the_last_axes_whose_lengths_it_is_given():
    x = torch.empty(2, 3, 256, device="meta")
    assert reduced("native_layer_norm_backward", (x, x, [256], x, x), {}) == ((2, 3, 256), (2,))
    assert reduced("_fused_rms_norm_backward", (x, x, [3, 256], x), {}) == ((2, 3, 256), (1, 2))
