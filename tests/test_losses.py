"Losses and the local similarity against written-out twins: any mask, any layout, any block, and nothing that is not a number."

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.local import with_contexts
from cxrvlm.encoders import Embedding
from cxrvlm.local import attend_backward, block_shape, word_attention, word_fits
from cxrvlm.losses import (
    contrastive_loss,
    contrastive_terms,
    global_similarity,
    local_similarity,
    nt_xent,
    nt_xent_floor,
)

ROOT = Path(__file__).resolve().parents[1]
properties = settings(deadline=None, max_examples=30, derandomize=True)
SEEDS = st.integers(0, 2**31)
SIZES = {name: st.integers(1, 4) for name in "BCWM"}


def by_hand(regions, words, word_mask, tau2=0.25, tau3=0.2, length_norm=False):
    "Equations 2 and 3 in float64, word by word."
    Z = torch.zeros(len(regions), len(words), dtype=torch.float64)
    for b, image in enumerate(regions.double()):
        for j, report in enumerate(words.double()):
            total = count = 0
            for word, there in zip(report, word_mask[j], strict=True):
                if there:
                    s = torch.stack([F.cosine_similarity(word, region, dim=0) for region in image])
                    context = sum(a * region / region.norm() for a, region in zip((s / tau2).softmax(0), image, strict=True))
                    total, count = total + torch.exp(context @ word / word.norm() / tau3), count + 1
            Z[b, j] = tau3 * torch.log(total / count if length_norm else total)
    return Z


def make_batch(seed, B=2, C=3, W=4, M=5, E=6, dtype=torch.float32):
    "Random regions and words that want gradients, and a mask with gaps and at least one word in each row."
    generator = torch.Generator().manual_seed(seed)
    regions, words = (torch.randn(*shape, E, generator=generator, dtype=dtype) for shape in ((B, M), (C, W)))
    mask = torch.rand(C, W, generator=generator) < 0.6
    mask[torch.arange(C), torch.randint(W, (C,), generator=generator)] = True
    return regions.requires_grad_(), words.requires_grad_(), mask


def value_and_gradients(function, regions, words, *rest, **options):
    "Z and the gradients of a sum of it in which every pair has a weight of its own."
    Z = function(regions, words, *rest, **options)
    weights = torch.randn(Z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Z, *torch.autograd.grad((Z * weights).sum(), (regions, words))


def assert_close(ours, theirs, atol=1e-6):
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y.double(), atol=atol, rtol=1e-5)


# The local similarity


@properties
@given(seed=SEEDS, **SIZES, tau2=st.sampled_from([0.05, 0.25, 1]), tau3=st.sampled_from([0.05, 0.2, 1]), length_norm=st.booleans())
def test_local_similarity_is_equations_2_and_3(seed, B, C, W, M, tau2, tau3, length_norm):
    batch, options = make_batch(seed, B, C, W, M), {"tau2": tau2, "tau3": tau3, "length_norm": length_norm}
    ours = value_and_gradients(local_similarity, *batch, **options)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    theirs = value_and_gradients(by_hand, *batch, **options)
    assert_close(ours[:1], theirs[:1], 1e-6)
    assert_close(ours[1:], theirs[1:], 1e-6 / tau2 / tau3)


@properties
@given(seed=SEEDS, size=st.sampled_from([1, 7, 40, 10**6]), keep=st.sampled_from([0, 70, 10**6]), threads=st.sampled_from([1, 2, 3]))
def test_blocks_kept_similarities_and_threads_change_nothing(seed, size, keep, threads):
    regions, words, _ = make_batch(seed, B=5, C=6, W=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        parts = value_and_gradients(lambda r, w: word_fits(r, w[:, 0], size=size, keep=keep), regions, words)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    whole = value_and_gradients(lambda r, w: by_hand(r, w, torch.ones(6, 1)), regions, words)
    assert_close(parts, whole)


def at_once(regions, words, tau2=0.25):
    "Equation 2 and the fit of each word as PyTorch differentiates it, every logit at once: the reference of `word_fits`."
    v, t = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    similarity = torch.einsum("bme,te->btm", v, t)
    return ((similarity / tau2).softmax(2) * similarity).sum(2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("M, E", [(3, 8), (9, 128), (70, 16), (361, 24)])
def test_both_orders_in_memory_are_the_plain_computation(monkeypatch, device, M, E):
    "A GPU's order and block sizes, on the CPU: all that depends on `is_cuda` but bfloat16."
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    regions, words, mask = make_batch(0, B=5, C=9, W=50, M=M, E=E, dtype=torch.float64)
    for size, keep in ((2**25, 2**25), (900, 0), (900, 10**4)):
        ours = value_and_gradients(lambda r, w, size=size, keep=keep: word_fits(r, w[mask], 0.1, size, keep), regions, words)
        theirs = value_and_gradients(lambda r, w: at_once(r, w[mask], 0.1), regions, words)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def test_a_gpu_takes_few_logits_at_once(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("cxrvlm.local.Attend.apply", lambda *_: pytest.fail("in blocks"))
    regions, words, mask = make_batch(0, B=5, C=9, W=50, M=70, E=16, dtype=torch.float64)
    ours = value_and_gradients(lambda r, w: word_fits(r, w[mask], 0.1), regions, words)
    theirs = value_and_gradients(lambda r, w: at_once(r, w[mask], 0.1), regions, words)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def products(function, *arguments):
    "How many products of all words with all regions the forward and the backward pass take, in multiplications and additions."
    regions, words = arguments[:2]
    with FlopCounterMode(display=False) as counter:
        function(*arguments).sum().backward()
    (B, M, E), T = regions.shape, words[..., 0].numel()
    return counter.get_total_flops() / (2 * B * M * T * E)


class Sizes(TorchDispatchMode):
    "How many numbers the largest result of all operations has."

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def one_thread():
    "What a thread of ours does no mode sees."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_three_products_where_the_slopes_are_kept_four_where_not_and_none_for_padding(one_thread):
    regions, words, mask = make_batch(0, B=6, C=6, W=20, M=30, E=16)
    packed = words[mask].detach().requires_grad_()
    assert products(lambda r, w: word_fits(r, w, size=500), regions, packed) == 3
    assert products(lambda r, w: word_fits(r, w, size=500, keep=0), regions, packed) == 4
    assert 3 < products(lambda r, w: word_fits(r, w, size=500, keep=6 * 30 * 40), regions, packed) < 4
    assert products(local_similarity, regions, words, mask) == pytest.approx(3 * mask.sum().item() / mask.numel())
    assert products(with_contexts, regions, words, mask) > 6
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        local_similarity(regions, words, mask)
    assert counter.get_total_flops() == 2 * 6 * 30 * 16 * mask.sum()


@pytest.mark.parametrize("M", [9, 256])
def test_no_block_is_larger_than_the_cache_of_a_core(one_thread, M):
    regions, words = torch.randn(40, M, 128), torch.randn(1000, 128)
    with Sizes() as sizes:
        word_fits(regions, words)
    assert 2**17 < sizes.largest <= 2**18
    assert block_shape(2**18, 256, 4656) == (2, 512) and block_shape(2**18, 9, 400) == (72, 400)
    assert block_shape(1, 10**6, 10) == (1, 1) and block_shape(2**18, 10**6, 0) == (1, 1)


@pytest.mark.gpu
def test_local_similarity_on_the_gpu_waits_once_and_is_that_of_the_cpu():
    regions, words, mask = make_batch(0, B=6, C=6, W=20, M=70, E=16)
    there = [x.detach().cuda().requires_grad_() for x in (regions, words)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        local_similarity(*there, mask)  # a mask on the CPU: no wait at all
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = torch.autograd.grad(local_similarity(*there, mask.cuda()).sum(), there)
    expected = torch.autograd.grad(local_similarity(regions, words, mask).sum(), (regions, words))
    assert_close([x.cpu() for x in gradients], expected, 1e-5)


def test_more_words_than_one_block_takes():
    batch = make_batch(0, B=3, C=30, W=90, M=3, E=4)
    assert batch[2].sum() > 512
    assert_close(value_and_gradients(local_similarity, *batch), value_and_gradients(with_contexts, *batch))


@pytest.mark.parametrize("M", [5, 9])  # fewer and more regions than the 6 numbers of a vector: two orders in memory
@pytest.mark.parametrize("keep", [0, 70, 10**6])
def test_gradients_agree_with_difference_quotients(keep, M):
    regions, words, mask = make_batch(0, M=M, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r, w: word_fits(r, w[mask], size=20, keep=keep), (regions, words))
    assert torch.autograd.gradcheck(lambda r, w: local_similarity(r, w, mask, 0.1, 0.3, True), (regions, words))


def test_strides_do_not_matter():
    regions, words, mask = make_batch(0, B=4, M=3, E=8)
    expected = value_and_gradients(local_similarity, regions, words, mask)
    strided = lambda x: torch.stack([x.mT, x.mT], 3)[..., 0].mT.detach().requires_grad_()  # noqa: E731
    batch = strided(regions), strided(words), torch.stack([mask, ~mask], 2)[..., 0]
    assert not any(x.is_contiguous() for x in batch)
    assert_close(value_and_gradients(local_similarity, *batch), expected, 1e-7)
    maps = torch.rand(4, 8, 3, 3, requires_grad=True)  # as a backbone gives them
    assert_close([local_similarity(maps.flatten(2).mT, words, mask)], [local_similarity(maps.flatten(2).mT.contiguous(), words, mask)])


def test_one_side_may_be_frozen():
    regions, words, mask = make_batch(0)
    _, d_regions, d_words = value_and_gradients(local_similarity, regions, words, mask)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = torch.autograd.grad((local_similarity(regions, words.detach(), mask) * weights).sum(), regions)
    other = torch.autograd.grad((local_similarity(regions.detach(), words, mask) * weights).sum(), words)
    assert torch.equal(one[0], d_regions) and torch.equal(other[0], d_words)
    with torch.inference_mode():
        neither = local_similarity(regions, words, mask)
    assert not neither.requires_grad and torch.equal(neither, local_similarity(regions, words, mask))


@properties
@given(seed=SEEDS)
def test_padding_counts_for_nothing(seed):
    regions, words, mask = make_batch(seed)
    expected = value_and_gradients(local_similarity, regions, words, mask)
    assert (expected[2][~mask] == 0).all()
    for filler in (torch.nan, torch.inf, 1e30, 0):
        changed = torch.where(mask[..., None], words, filler).detach().requires_grad_()
        assert all(map(torch.equal, value_and_gradients(local_similarity, regions, changed, mask), expected))
    wider = F.pad(words, (0, 0, 2, 3)).detach().requires_grad_(), F.pad(mask, (2, 3))
    Z, d_regions, d_words = value_and_gradients(local_similarity, regions, *wider)
    assert_close((Z, d_regions, d_words[:, 2:-3]), expected)


@properties
@given(seed=SEEDS)
def test_order_does_not_matter(seed):
    regions, words, mask = make_batch(seed)
    Z = local_similarity(regions, words, mask)
    pick = lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    b, j, i, m = pick(2), pick(3), pick(4), pick(5)
    assert_close([local_similarity(regions[b][:, m], words[j][:, i], mask[j][:, i])], [Z[b][:, j]])


def test_one_word_and_one_region_are_a_cosine():
    v, t = torch.randn(2, 4, 8)
    mask = torch.ones(4, 1, dtype=torch.bool)
    assert_close([local_similarity(v[:, None], t[:, None], mask)], [global_similarity(v, t)])
    assert_close([local_similarity(v[:, None], t[:, None], mask, tau2=0.01, tau3=5, length_norm=True)], [global_similarity(v, t)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(dtype):
    regions, words, mask = make_batch(0, B=4, C=5, W=9, M=16, E=32)
    mask[0] = torch.arange(9) == 4  # one word
    expected = value_and_gradients(local_similarity, regions, words, mask)
    for factor in (1e-3, 1, 1e3):
        half = [(x * factor).detach().to(dtype).requires_grad_() for x in (regions, words)]
        Z, *gradients = value_and_gradients(local_similarity, *half, mask)
        assert Z.dtype == torch.float32 and [g.dtype for g in gradients] == [dtype] * 2
        assert all(x.isfinite().all() for x in (Z, *gradients))
        torch.testing.assert_close(Z, expected[0], atol=0.01, rtol=0)


def test_autocast_does_not_lower_the_precision():
    regions, words, mask = make_batch(0, B=5, E=32)
    expected = value_and_gradients(local_similarity, regions, words, mask)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass inside it too
        inside = value_and_gradients(local_similarity, regions, words, mask)
    assert inside[0].dtype == torch.float32
    assert_close(inside, expected, 1e-7)


@pytest.mark.parametrize("temperatures", [(1e-3, 1e-3), (1e3, 1e3), (1e-3, 1e3)])
def test_extreme_temperatures_and_vectors_stay_finite(temperatures):
    regions, words, mask = make_batch(0)
    with torch.no_grad():
        regions[0, 0], words[0] = 0, 1e20
        regions[1] = -words[0, 0] * 1e-20  # opposite to the report
    for x in value_and_gradients(local_similarity, regions, words, mask, *temperatures):
        assert x.isfinite().all()


def test_a_second_backward_pass_gives_the_same():
    regions, words, mask = make_batch(0)
    Z = local_similarity(regions, words, mask).sum()
    first = torch.autograd.grad(Z, (regions, words), retain_graph=True)  # uses up what was kept
    assert all(map(torch.equal, first, torch.autograd.grad(Z, (regions, words))))


def test_on_a_gpu_bfloat16_is_multiplied_as_such_and_summed_in_float32():
    with FakeTensorMode():  # shapes and types only: whoever asks for a number, and so would wait for the GPU, gets an error
        regions, queries = (torch.empty(*shape, 8, dtype=torch.bfloat16, device="cuda") for shape in ((3, 4), (30,)))
        fits = word_fits(regions, queries, size=50)
        d_regions = torch.empty_like(regions)
        d_queries = attend_backward(regions, queries, (2, 7), fits, fits, {}, d_regions)
    assert (fits.dtype, fits.shape) == (torch.float32, (3, 30))
    assert (d_queries.dtype, d_queries.shape) == (torch.float32, (30, 8))


def test_what_is_no_batch_of_images_and_reports_is_refused():
    regions, words, mask = make_batch(0)
    for batch in ((regions[0], words, mask), (regions, words[..., 1:], mask), (regions, words, mask[:, 1:]), (regions, words, mask[..., None])):
        with pytest.raises(ValueError, match=r"expected regions \[B, M, E\], words \[C, W, E\] and word_mask \[C, W\], not"):
            local_similarity(*batch)
    with pytest.raises(ValueError, match="without regions"):
        local_similarity(regions[:, :0], words, mask)
    with pytest.raises(ValueError, match="True where there is a word"):
        local_similarity(regions, words, torch.where(mask, 0.0, -torch.inf))
    with pytest.raises(ValueError, match=r"reports \[1\] of the batch .* have no word"):
        local_similarity(regions, words, mask & (torch.arange(3) != 1)[:, None])
    assert torch.equal(local_similarity(regions, words, mask.long()), local_similarity(regions, words, mask))


def test_attention_is_what_the_similarity_uses():
    regions, words, _ = make_batch(0)
    a = word_attention(regions[0], words[0])
    assert_close([a.sum(1)], [torch.ones(4)])
    fits = (a * (F.normalize(words[0], dim=1) @ F.normalize(regions[0], dim=1).T)).sum(1)
    assert_close([word_fits(regions[:1], words[0])[0]], [fits])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_fraction_of_that_of_all_contexts():
    code = "import json; from benchmarks.local import memory_ratio; print(json.dumps(memory_ratio(B=24, W=64, M=100, E=512)))"
    ratio = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert ratio["full"] < 0.4 and ratio["ragged"] < 0.4


# Losses


def one_of_each(seed, B=3):
    regions, words, mask = make_batch(seed, B=B, C=B)
    images = Embedding(regions.mean(1), regions, torch.ones(B, 5, dtype=torch.bool))
    return images, Embedding(words.mean(1), words, mask)


def test_terms_are_those_of_the_loss():
    images, texts = one_of_each(0)
    options = {"tau": 0.1, "tau2": 0.3, "tau3": 0.4, "length_norm": True}
    both = contrastive_terms(images, texts, "combined", **options)
    assert list(both) == ["infonce", "gloria"]
    assert both["infonce"] == contrastive_loss(global_similarity(images.pooled, texts.pooled), 0.1)
    assert both["gloria"] == contrastive_loss(local_similarity(images.local, texts.local, texts.mask, 0.3, 0.4, True), 0.1)
    assert contrastive_terms(images._replace(pooled=None), texts._replace(pooled=None), "gloria", **options) == {"gloria": both["gloria"]}
    assert contrastive_terms(images._replace(local=None), texts._replace(local=None), tau=0.1) == {"infonce": both["infonce"]}
    with pytest.raises(ValueError, match="loss = local: use infonce, gloria, combined"):
        contrastive_terms(images, texts, "local")
    with pytest.raises(ValueError, match="square matrix"):
        contrastive_terms(images, one_of_each(0, B=2)[1], "gloria")


def nt_xent_by_hand(a, b, tau):
    views, N = [*a.double(), *b.double()], len(a)
    total = 0
    for i, view in enumerate(views):
        e = {k: torch.exp(F.cosine_similarity(view, other, dim=0) / tau) for k, other in enumerate(views) if k != i}
        total -= torch.log(e[(i + N) % (2 * N)] / sum(e.values()))
    return total / (2 * N)


@properties
@given(seed=SEEDS, N=st.integers(1, 5), tau=st.sampled_from([0.1, 0.5, 2]))
def test_nt_xent_is_simclrs_equation(seed, N, tau):
    a, b = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    ours, theirs = nt_xent(a, b, tau), nt_xent_by_hand(a, b, tau)
    assert_close([ours, nt_xent(b, a, tau)], [theirs, theirs])
    assert_close(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b)), 1e-5)
    assert ours >= nt_xent_floor(N, tau) - 1e-6


def test_nt_xents_limits():
    for N in (1, 2, 64):
        same = torch.ones(N, 3)
        assert math.isclose(nt_xent(same, same, 0.1), math.log(2 * N - 1), abs_tol=1e-5)
        simplex = torch.eye(N) - 1 / N if N > 1 else same
        assert math.isclose(nt_xent(simplex, 3 * simplex, 0.1), nt_xent_floor(N, 0.1), abs_tol=1e-5)
    a, b = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(a, b) == nt_xent(a, b).float()
        assert torch.allclose(nt_xent(a.bfloat16(), b.bfloat16()), nt_xent(a, b), atol=0.01)
    for views in ((a, b[1:]), (a, b[:, 1:]), (a[0], b[0]), (a[:0], b[:0])):
        with pytest.raises(ValueError, match="two views"):
            nt_xent(*views)


def test_float64_stays_float64():
    a, b = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert global_similarity(a, b).dtype == torch.float64
    assert torch.autograd.gradcheck(nt_xent, (a, b))
