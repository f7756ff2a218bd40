"""Dropout by keys: masks against SplitMix64 written out, and the implementations against each other, bit by bit."""

import contextlib

import numpy as np
import pytest
import torch

from batches import TINY, random_batch, randomise
from interpreter_bf16 import interpreted_bfloat16
from poisoned_memory import guarded, poisoned_memory
from wireframe import Perceiver, hashing
from wireframe.kernels import dispatch, dropout, launch, ops
from wireframe.kernels.dispatch import ImplementationError
from wireframe.kernels.dropout_reference import drop_threshold, dropout_factors, keep_scale

interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_dropout.py")
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])

# Scenes of less than a hash, of no whole number of hashes, of one program (256 hashes) and of several.
SHAPES = [(3, 1), (2, 3), (3, 5, 7), (2, 4, 256), (2, 3, 701), (4,)]


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_keys(scenes, seed=0):
    # The whole range, the ends of it too.
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (scenes,), generator=torch.Generator().manual_seed(seed))
    keys[:2] = torch.tensor([-(1 << 63), (1 << 63) - 1])[:scenes]
    return keys


def kept(key, site, p, count):
    """bool [count] for one scene, in Python's integers."""
    key = hashing._mix_int(((key ^ site) + hashing._GOLDEN) % 2**64)
    words = [hashing._mix_int((key + (i + 1) * hashing._GOLDEN) % 2**64) for i in range(-(-count // 4))]
    bits = [word >> 16 * i & 0xFFFF for word in words for i in range(4)]
    return np.array(bits[:count]) >= min(round(p * 65536), 65535)


def oracle(x, branch, keys, site, p):
    """out, and the gradient of branch for that of out; x and branch float32."""
    scale = np.float32(65536 / (65536 - min(round(p * 65536), 65535)))
    keep = [kept(int(key) % 2**64, site, p, x[0].numel()) for key in keys]
    factors = (np.array(keep) * scale).astype(np.float32).reshape(x.shape)
    return torch.from_numpy(x.numpy() + branch.numpy() * factors), torch.from_numpy(factors)


def results(x, branch, keys, grad, impl, site=3, p=0.1):
    """out and both gradients."""
    leaves = [x.detach().requires_grad_(), branch.detach().requires_grad_()]
    out = ops.dropout_add(*leaves, keys, site=site, p=p, impl=impl)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def same_bits(first, second):
    return all(
        a.dtype == b.dtype and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 7, 169_999, torch.tensor(7), torch.tensor([1 << 31])])
def test_the_keys_of_a_step_are_those_of_the_hash(step):
    scenes = [0, 1, 2**63, 2**64 - 1, hashing.scene_key("a scene")]
    bits = torch.from_numpy(np.array(scenes, dtype=np.uint64).view(np.int64))
    for seed in (0, 353, -1, 2**64 - 3):
        found = ops.step_keys(bits, seed, step)
        wanted = [hashing.key(seed, scene, hashing.DROPOUT + int(step)) for scene in scenes]
        assert found.dtype == torch.int64 and [int(key) % 2**64 for key in found] == wanted
    assert bits.tolist() == np.array(scenes, dtype=np.uint64).view(np.int64).tolist()
    assert ops.step_keys(bits[:0], 1, step).shape == (0,)


@pytest.mark.parametrize("arguments, said", [
    ((None, 1, 2), "scene_keys must be a tensor, not NoneType"),
    ((torch.zeros(2), 1, 2), "scene_keys must be int64, got torch.float32"),
    ((torch.zeros(2).long(), 1.5, 2), "seed must be an integer, not float"),
    ((torch.zeros(2).long(), 1, 2.0), "step must be an integer, not float"),
    ((torch.zeros(2).long(), 1, torch.zeros(2).long()), "step must be one int64"),
    ((torch.zeros(2).long(), 1, torch.zeros(1)), "step must be one int64"),
])  # fmt: skip
def test_the_keys_of_a_step_need_integers(arguments, said):
    with pytest.raises((TypeError, ValueError), match=f"^step_keys: {said}"):
        ops.step_keys(*arguments)


@each_impl
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99999, 1e-7])
def test_masks_and_results_are_those_of_the_hash_written_out(shape, p, impl):
    x, branch, grad, keys = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2), random_keys(shape[0])
    # Results below the normal range, an exact zero, and one of each sign.
    branch.view(-1)[:3] = torch.tensor([1e-40, 0.0, -0.0])[: branch.numel()]
    x.view(-1)[:3] = torch.tensor([1e-41, -0.0, -0.0])[: x.numel()]
    with poisoned_memory():
        found = results(*map(guarded, (x, branch, keys, grad)), impl, site=2**31 - 1, p=p)
    out, factors = oracle(x, branch, keys, 2**31 - 1, p)
    if p == 1e-7:
        assert torch.equal(factors, torch.ones(shape)) and same_bits(found[:1], [x + branch])
    assert same_bits(found, (out, grad, grad * factors))


def test_the_reference_folds_all_parts_as_the_hash_folds_them():
    scene, seed, step, site = hashing.scene_key("a scene"), 353, 12, 5
    keys = ops.step_keys(torch.from_numpy(hashing.key_bits(["a scene"])), seed, step)
    whole = hashing.key(seed, scene, hashing.DROPOUT + step, site)
    words = [hashing._mix_int((whole + (i + 1) * hashing._GOLDEN) % 2**64) for i in range(50)]
    bits = np.array(words, dtype="<u8").view("<u2")
    factors = dropout_factors(keys, site, drop_threshold(0.3), 200)
    assert np.array_equal(factors[0].numpy() > 0, bits >= round(0.3 * 65536))
    # The sequence is that of hash64, whose key has three parts.
    assert hashing.hash64(1, 2, 3, np.array([6])) == hashing._mix_int(
        (hashing.key(1, 2, 3) + 7 * hashing._GOLDEN) % 2**64
    )


def test_the_reference_gives_many_scenes_the_masks_it_gives_one():
    # More hashes than it computes at a time.
    keys = random_keys(40)
    factors = dropout_factors(keys, 1, drop_threshold(0.5), 8190)
    assert all(torch.equal(factors[i : i + 1], dropout_factors(keys[i : i + 1], 1, 32768, 8190)) for i in range(40))


@interpreted
@pytest.mark.parametrize("dtypes", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 701)])
def test_in_half_precision_the_kernels_have_the_bits_of_the_reference(shape, dtypes):
    x, branch, grad = (randn(*shape, seed=i, dtype=dtypes[i % 2]) for i in range(3))
    keys = random_keys(shape[0])
    found, expected = (results(x, branch, keys, grad, impl) for impl in ("triton", "reference"))
    assert same_bits(found, expected)
    assert [a.dtype for a in found] == [torch.promote_types(*dtypes), *dtypes]
    # In float32, and rounded once.
    out, factors = oracle(x.float(), branch.float(), keys, 3, 0.1)
    dbranch = grad.to(found[0].dtype).float() * factors
    assert same_bits(found[::2], [out.to(found[0].dtype), dbranch.to(dtypes[1])])


def test_in_double_precision_the_factor_is_the_same_float32():
    x, branch, grad, keys = *(randn(3, 9, seed=i).double() for i in range(3)), random_keys(3)
    out, dx, dbranch = results(x, branch, keys, grad, "reference")
    factors = dropout_factors(keys, 3, drop_threshold(0.1), 9).double()
    assert same_bits((out, dx, dbranch), (x + branch * factors, grad, grad * factors))
    function = lambda x, branch: ops.dropout_add(x, branch, keys, site=3, p=0.4)  # noqa: E731
    leaves = x.requires_grad_(), branch.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


@each_impl
def test_a_mask_depends_on_neither_the_batch_nor_the_place_in_it(impl):
    x, branch, keys, grad = randn(4, 3, 701), randn(4, 3, 701, seed=1), random_keys(4), randn(4, 3, 701, seed=2)
    whole = results(x, branch, keys, grad, impl)
    for order in ([2], [3, 0], [1, 3, 2, 0]):
        part = results(x[order], branch[order], keys[order], grad[order], impl)
        assert same_bits(part, [a[order] for a in whole])


def test_the_share_that_is_kept_is_that_asked_for():
    for p in (0.1, 0.5, 0.9):
        factors = dropout_factors(random_keys(64), 0, drop_threshold(p), 4099)
        share, n = (factors > 0).double().mean(), factors.numel()
        assert abs(share - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
        # The expectation of branch is kept.
        assert abs(factors.double().mean() - 1) < 4 * (p / (1 - p) / n) ** 0.5 + 1e-4


def test_other_seeds_steps_scenes_and_sites_drop_other_elements():
    def mask(seed=0, step=0, scene=0, site=0):
        keys = ops.step_keys(torch.tensor([scene]), seed, step)
        return dropout_factors(keys, site, drop_threshold(0.5), 4096)[0] > 0

    masks = [mask()]
    for name in ("seed", "step", "scene", "site"):
        masks += [mask(**{name: value}) for value in (1, 2, 3, 1 << 16)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            # Independent masks agree on half of the elements.
            assert abs((first == second).double().mean() - 0.5) < 0.04
        # The four elements of a hash, and neighbours, agree no more than others.
        assert abs((first[1:] == first[:-1]).double().mean() - 0.5) < 0.04
    assert torch.equal(mask(5, 6, 7, 8), mask(5, 6, 7, 8))


@each_impl
def test_p_of_zero_is_the_plain_sum(impl):
    keys = random_keys(3)
    for dtypes in ((torch.float32, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)):
        x, branch = (randn(3, 5, 7, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes))
        x[0, 0], branch[0, 0] = -0.0, -0.0
        found = results(x, branch, keys, randn(3, 5, 7, seed=4), impl, p=0)
        assert same_bits(found[:1], [x + branch])
        assert all(torch.equal(g, randn(3, 5, 7, seed=4).to(found[0].dtype).to(g.dtype)) for g in found[1:])


def awkward_inputs():
    """Name, x, branch: views of every kind."""
    yield "one for all scenes", randn(1, 3, 701).expand(4, -1, -1), randn(4, 3, 701, seed=1)
    yield "transposed", randn(3, 4, 701).transpose(0, 1), randn(4, 701, 3, seed=1).transpose(1, 2)
    yield "part of a row", randn(4, 6, 709)[:, 1:4, 5:706], randn(4, 3, 2103, seed=1)[:, :, ::3]
    yield "from an odd address", randn(4 * 2103 + 1)[1:].view(4, 3, 701), randn(4, 2110, seed=1)[:, 7:].view(4, 3, 701)


@each_impl
@pytest.mark.parametrize("x, branch", [pytest.param(*pair, id=name) for name, *pair in awkward_inputs()])
def test_views_give_what_their_copies_give(x, branch, impl):
    keys = random_keys(8)[::2]
    for grad in (randn(1).expand(4, 3, 701), randn(4, 2110)[:, 7:].view(4, 3, 701)):
        with poisoned_memory():
            found = results(x, branch, keys, grad, impl)
        copies = [a.clone(memory_format=torch.contiguous_format) for a in (x, branch, keys, grad)]
        assert same_bits(found, results(*copies, impl))
        assert found[0].is_contiguous() and found[2].is_contiguous()


@each_impl
def test_an_embedding_of_all_scenes_gets_the_sum_of_their_gradients(impl):
    embedding, branch, keys = randn(5, 8).requires_grad_(), randn(3, 5, 8, seed=1).requires_grad_(), random_keys(3)
    grad = randn(3, 5, 8, seed=2)
    out = ops.dropout_add(embedding.expand(3, -1, -1), branch, keys, site=0, p=0.1, impl=impl)
    dembedding, dbranch = torch.autograd.grad(out, (embedding, branch), grad)
    assert torch.equal(dembedding, grad.sum(0))
    assert torch.equal(dbranch, grad * oracle(grad, grad, keys, 0, 0.1)[1])


@each_impl
def test_only_keys_are_kept_for_the_backward_pass_and_only_wanted_gradients_made(impl, monkeypatch):
    x, branch, keys = randn(3, 5, 7), randn(3, 5, 7, seed=1), random_keys(3)
    kept_for_later, launched, run = [], [], launch.run
    monkeypatch.setattr(launch, "run", lambda launches: (launched.append(len(launches)), run(launches)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept_for_later.append(t), t)[1], lambda t: t):
        out = ops.dropout_add(x.requires_grad_(), branch.requires_grad_(), keys, site=0, p=0.1, impl=impl)
    assert [t.data_ptr() for t in kept_for_later] == [keys.data_ptr()]
    out.backward(torch.ones(3, 5, 7))
    assert x.grad is not None and branch.grad is not None
    assert launched == ([1, 1] if impl == "triton" else [])
    del launched[:]
    x.grad = branch.grad = None
    ops.dropout_add(x, branch.detach(), keys, site=0, p=0.1, impl=impl).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 5, 7)) and launched == ([1] if impl == "triton" else [])


@each_impl
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)])
def test_nothing_gives_nothing(shape, impl):
    found = results(randn(*shape), randn(*shape), random_keys(shape[0]), randn(*shape), impl)
    assert [a.shape for a in found] == [shape] * 3


X, KEYS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("arguments, said", [
    (([0.0], X, KEYS, 0, 0.1), "x must be a tensor, not list"),
    ((X, X.long(), KEYS, 0, 0.1), "branch must be floating, got int64"),
    ((X, X[:1], KEYS, 0, 0.1), r"share one shape \[B, ...\], got \[2, 3\] and \[1, 3\]"),
    ((X[0, 0], X[0, 0], KEYS, 0, 0.1), "share one shape"),
    ((X, X, None, 0, 0.1), "keys must be a tensor, not NoneType"),
    ((X, X, KEYS[:1], 0, 0.1), r"keys must be int64 \[2\], one for each scene, got torch.int64 \[1\]"),
    ((X, X, KEYS.int(), 0, 0.1), r"got torch.int32 \[2\]"),
    ((X, X.to("meta"), KEYS, 0, 0.1), "branch is on meta, x on cpu"),
    ((X, X, KEYS, 1.0, 0.1), "site must be an integer, not float"),
    ((X, X, KEYS, -1, 0.1), r"site must be in \[0, 2\^31\), got -1"),
    ((X, X, KEYS, 1 << 31, 0.1), "site must be in"),
    ((X, X, KEYS, 0, "a"), "p must be a number, not str"),
    ((X, X, KEYS, 0, 1.0), r"p must be in \[0, 1\), got 1.0"),
    ((X, X, KEYS, 0, float("nan")), "p must be in"),
    ((X, X, KEYS, 0, 0.1, "fast"), "unknown impl 'fast'"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(arguments, said):
    x, branch, keys, site, p, *impl = arguments
    with pytest.raises((TypeError, ValueError), match=f"^dropout_add: .*{said}") as error:
        ops.dropout_add(x, branch, keys, site=site, p=p, impl=impl[0] if impl else "auto")
    assert "\n" not in str(error.value)


def test_what_the_kernels_do_not_take_is_refused_or_left_to_the_reference(monkeypatch):
    with pytest.raises(ImplementationError, match="not built"):
        ops.dropout_add(X, X, KEYS, site=0, p=0.1, impl="native")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ImplementationError, match="float64"):
        ops.dropout_add(X.double(), X, KEYS, site=0, p=0.1, impl="triton")
    monkeypatch.setattr(dropout, "_INTERPRETED_DTYPES", (torch.float32,))
    with pytest.raises(ImplementationError, match="bfloat16"):
        ops.dropout_add(X.bfloat16(), X, KEYS, site=0, p=0.1, impl="triton")
    assert ops.dropout_add(X.double(), X, KEYS, site=0, p=0.1).dtype == torch.float64
    assert "dropout_add" in dispatch.MODEL_OPS


@interpreted
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4)])
def test_the_registered_operators_pass_opcheck(shape):
    x, branch, keys = randn(*shape).requires_grad_(), randn(*shape).requires_grad_(), random_keys(shape[0])
    torch.library.opcheck(torch.ops.wireframe.dropout_add.default, (x, branch, keys, 3, 6554))
    grad = randn(*shape)
    torch.library.opcheck(torch.ops.wireframe.dropout_add_backward.default, (grad, keys, 3, 6554, torch.float16))


@each_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_is_one_graph_with_the_same_bits(impl, backend):
    x, branch, keys, grad = randn(3, 5, 7), randn(3, 5, 7, seed=1), random_keys(3), randn(3, 5, 7, seed=2)
    torch.compiler.reset()

    def function(x, branch, scenes, step):
        keys = ops.step_keys(scenes, 353, step)
        return 2 * ops.dropout_add(x, branch, keys, site=3, p=0.1, impl=impl)

    found = []
    for run in (torch.compile(function, fullgraph=True, backend=backend), function):
        leaves = x.clone().requires_grad_(), branch.clone().requires_grad_()
        out = run(*leaves, keys, torch.tensor(5))
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert same_bits(*found)


@contextlib.contextmanager
def recorded(monkeypatch):
    """(site, p, keys, dtype of x, dtype of branch) of every residual connection that drops out."""
    calls = []

    def recording(name, where):
        original = getattr(ops, name)

        def call(x, branch, *arguments, **settings):
            if settings["p"] > 0:
                calls.append((settings["site"], settings["p"], arguments[where], x.dtype, branch.dtype))
            return original(x, branch, *arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        for name, where in (("dropout_add", 0), ("residual_norm", 1)):
            patch.setattr(ops, name, recording(name, where))
        yield calls


def trained_model():
    model = Perceiver(TINY).train()
    randomise(model)
    return model


def test_every_block_of_the_model_is_a_site_of_its_own_with_the_keys_given(monkeypatch):
    keys = random_keys(2)
    with recorded(monkeypatch) as calls:
        trained_model()(random_batch(), keys)
    # Latent layers 0 and 2 read the points, 1 does not; then two decoder layers.
    assert [site for site, *_ in calls] == [0, 1, 2, 4, 5, *range(6, 15)]
    assert all(p == 0.1 and given is keys for _, p, given, *_ in calls)


def test_no_dropout_in_eval_mode_and_none_at_p_of_zero(monkeypatch):
    plain = Perceiver({**TINY, "dropout": 0.0})
    randomise(plain)
    model = trained_model().eval()
    torch.manual_seed(3)
    with recorded(monkeypatch) as calls:
        expected = plain.eval()(random_batch())
        results = [model(random_batch()), model(random_batch(), random_keys(2)), plain.train()(random_batch())]
    assert not calls and all(same_bits(found, expected) for found in results)
    # Nothing was drawn either.
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_keys_that_are_not_given_follow_the_global_generator():
    model, found = trained_model(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(random_batch()))
    assert same_bits(found[0], found[1]) and not torch.equal(found[0].conf, found[2].conf)


def test_with_keys_the_model_neither_reads_nor_changes_the_global_generator():
    model, keys = trained_model(), random_keys(2)
    torch.manual_seed(1)
    first = model(random_batch(), keys)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert same_bits(first, model(random_batch(), keys))


def test_a_scene_is_dropped_out_alike_wherever_it_stands():
    model, keys, batch = trained_model(), random_keys(3), random_batch(3)
    whole = model(batch, keys)
    for order in ([2, 0, 1], [1]):
        part = model({name: value[order] for name, value in batch.items()}, keys[order])
        # Products of matrices may be rounded otherwise in another batch; another mask would be seen from afar.
        torch.testing.assert_close(part.conf, whole.conf[order], rtol=0, atol=1e-4)
    assert (model(batch, keys.flip(0)).conf - whole.conf).abs().max() > 0.01


def test_under_autocast_the_residual_stays_float32(monkeypatch):
    model = trained_model()
    with recorded(monkeypatch) as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(random_batch(), random_keys(2))
    assert {call[3:] for call in calls} == {(torch.float32, torch.bfloat16)}
    prediction.conf.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_other_keys_are_refused_by_name():
    with pytest.raises(ValueError, match=r"residual_norm: keys must be int64 \[2\]"):
        trained_model()(random_batch(), random_keys(3))


def test_the_scale_is_the_inverse_of_what_is_kept():
    assert [drop_threshold(p) for p in (0, 0.1, 0.5, 0.9999999)] == [0, 6554, 32768, 65535]
    assert [keep_scale(t) for t in (0, 32768, 65535)] == [1.0, 2.0, 65536.0]
