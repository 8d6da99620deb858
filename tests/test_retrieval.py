"Retrieval metrics by property, against independent references, and at the scale of the paper's test split."

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from cxrvlm.matching import matrix_metrics
from cxrvlm.retrieval import (
    cosine_scores,
    nearest,
    pair_auroc,
    ranks,
    recall_at_k,
    retrieval_auroc,
    retrieval_metrics,
    retrieved_examples,
)

properties = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def pairs(draw, kind=None):
    "Image and text embeddings: continuous, full of ties, or all but collapsed to one point."
    n, e = draw(st.integers(2, 24)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = kind or draw(st.sampled_from(["continuous", "ties", "collapsed"]))
    if kind == "continuous":
        return rng.normal(size=(n, e)), rng.normal(size=(n, e))
    if kind == "ties":  # entries -1, 0, 1, and a last one that is never 0
        rows = rng.integers(-1, 2, size=(2, n, e))
        return tuple(np.concatenate([r, np.ones((n, 1))], axis=1).astype(np.float32) for r in rows)
    return tuple(1 + 1e-4 * rng.normal(size=(2, n, e)).astype(np.float32))


def whole_matrix(images, texts):
    return cosine_scores(images, texts)(0, len(images)).numpy()


@properties
@given(pairs())
def test_auroc_is_that_of_scikit_learn_on_the_whole_matrix(data):
    images, texts = data
    own = np.eye(len(images), dtype=bool)
    expected = roc_auc_score(own.ravel(), whole_matrix(images, texts).ravel())
    assert retrieval_auroc(images, texts) == pytest.approx(expected, abs=1e-12)
    assert retrieval_auroc(torch.tensor(images), torch.tensor(texts)) == retrieval_auroc(images, texts)


def masked_by_loops(S, texts):
    "The share of (own pair, pair of unequal texts) that the own pair wins; a tie is one half."
    n = len(S)
    negatives = [S[i, j] for i in range(n) for j in range(n) if texts[i] != texts[j]]
    return np.mean([(S[k, k] > z) + (S[k, k] == z) / 2 for k in range(n) for z in negatives])


@properties
@given(pairs(), st.data(), st.integers(1, 700))
def test_the_masked_auroc_is_that_of_a_loop(data, draw, block):
    images, texts = data
    reports = draw.draw(st.lists(st.sampled_from("abcd"), min_size=len(images), max_size=len(images)).filter(lambda names: len(set(names)) > 1))
    S = whole_matrix(images, texts)
    expected = masked_by_loops(S, reports)
    assert retrieval_auroc(images, texts, reports, masked=True) == pytest.approx(expected, abs=1e-12)
    assert matrix_metrics(torch.from_numpy(S), reports)["auroc_masked"] == retrieval_auroc(images, texts, reports, masked=True)
    groups = torch.tensor(["abcd".index(name) for name in reports])
    assert pair_auroc(lambda a, b: torch.from_numpy(S[a:b]), groups, block, masked=True) == retrieval_auroc(images, texts, reports, masked=True)


def test_what_no_model_can_win_costs_the_masked_auroc_nothing():
    emb, reports = np.eye(6)[[0, 0, 0, 3, 4, 5]], ["normal"] * 3 + list("abc")
    metrics = retrieval_metrics(emb, emb, reports)
    assert metrics["auroc"] < 1 == metrics["auroc_masked"] and masked_by_loops(emb @ emb.T, reports) == 1
    assert retrieval_metrics(-emb, emb, reports)["auroc_masked"] == 0


@properties
@given(pairs("continuous"))
def test_auroc_from_similarities_computed_without_this_package(data):
    images, texts = data
    cosine = images @ texts.T / np.outer(np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1))
    if images.shape[1] > 1:  # with one dimension every cosine is 1 or -1, up to rounding
        own = np.eye(len(images), dtype=bool)
        assert retrieval_auroc(images, texts) == pytest.approx(roc_auc_score(own.ravel(), cosine.ravel()), abs=1e-9)


@properties
@given(pairs(), st.lists(st.integers(1, 700), min_size=2, max_size=3), st.data())
def test_auroc_does_not_depend_on_blocks_order_dimensions_or_scale(data, blocks, draw):
    images, texts = data
    n, e = images.shape
    scores = cosine_scores(images, texts)
    value = retrieval_auroc(images, texts)
    assert {pair_auroc(scores, torch.arange(n), b) for b in blocks} == {value}
    studies = draw.draw(st.permutations(range(n)))
    assert retrieval_auroc(images[studies], texts[studies]) == value
    dims = draw.draw(st.permutations(range(e)))
    assert np.array_equal(whole_matrix(images[:, dims], texts[:, dims]), whole_matrix(images, texts))
    assert retrieval_auroc(images * 4, texts / 1024) == value


@properties
@given(pairs())
def test_auroc_turned_around(data):
    images, texts = data
    assert retrieval_auroc(texts, images) == retrieval_auroc(images, texts)
    assert retrieval_auroc(-images, texts) == pytest.approx(1 - retrieval_auroc(images, texts), abs=1e-12)


@properties
@given(pairs(), st.data())
def test_groups_make_more_positives(data, draw):
    images, texts = data
    n = len(images)
    groups = draw.draw(st.lists(st.sampled_from(["normal", "Normal", "", "nodule"]), min_size=n, max_size=n))
    same = np.array(groups)[:, None] == np.array(groups)
    if same.all():
        with pytest.raises(ValueError, match="at least two different reports"):
            retrieval_auroc(images, texts, groups)
    else:
        expected = roc_auc_score(same.ravel(), whole_matrix(images, texts).ravel())
        assert retrieval_auroc(images, texts, groups) == pytest.approx(expected, abs=1e-12)


@properties
@given(pairs())
def test_ranks_are_those_of_scipy(data):
    images, texts = data
    for direction, S in (("text_to_image", whole_matrix(texts, images)), ("image_to_text", whole_matrix(images, texts))):
        best, worst = ranks(images, texts, direction)
        assert best.tolist() == [rankdata(-row, "min")[i] for i, row in enumerate(S)]
        assert worst.tolist() == [rankdata(-row, "max")[i] for i, row in enumerate(S)]


@properties
@given(pairs())
def test_recall_rises_to_one(data):
    images, texts = data
    n = len(images)
    recall = list(recall_at_k(images, texts, ks=range(1, n + 2)).values())
    assert all(a <= b for a, b in zip(recall, recall[1:], strict=False))
    assert recall[n - 1] == recall[n] == 1 and 0 <= recall[0]


@properties
@given(pairs("ties"), st.integers(0, 2**32 - 1))
def test_recall_is_the_mean_over_random_tie_breaks(data, seed):
    images, texts = data
    S, rng = whole_matrix(texts, images), np.random.default_rng(seed)
    trials = 400
    hits = 0
    for _ in range(trials):
        order = np.lexsort((rng.random(S.shape), -S))
        hits += (order[:, :2] == np.arange(len(S))[:, None]).sum()
    assert recall_at_k(images, texts, ks=[2])[2] == pytest.approx(hits / trials / len(S), abs=0.08)


def test_equal_reports_tie_wherever_they_stand():
    "Equal columns of a float32 matrix product can differ in the last bit; these may not."
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(333, 128)).astype(np.float32), rng.normal(size=(333, 128)).astype(np.float32)
    texts[::3] = texts[0]
    S = cosine_scores(images, texts)(0, 333)
    assert (S[:, ::3] == S[:, :1]).all()
    assert torch.equal(torch.cat([cosine_scores(images, texts[:7])(0, 333), S[:, 7:]], dim=1), S)
    exact = (images.astype(np.float64) @ texts.T.astype(np.float64)) / np.outer(
        np.linalg.norm(images.astype(np.float64), axis=1), np.linalg.norm(texts.astype(np.float64), axis=1))
    assert np.abs(S.numpy() - exact).max() < 1e-7


def test_the_callers_matrix_is_left_alone():
    S = torch.arange(9.0).reshape(3, 3)
    pair_auroc(lambda a, b: S[a:b], torch.arange(3))
    assert torch.equal(S, torch.arange(9.0).reshape(3, 3))


def test_threads_change_nothing():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(200, 32)), rng.normal(size=(200, 32))
    threads, values = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values.add(pair_auroc(cosine_scores(images, texts), torch.arange(200), block=3000))
    finally:
        torch.set_num_threads(threads)
    assert len(values) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_and_gradients(dtype):
    emb = torch.eye(4, dtype=dtype, requires_grad=True)
    assert retrieval_auroc(emb, emb * 3) == 1 and recall_at_k(emb, emb, ks=[1]) == {1: 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value):
    good, bad = torch.randn(9, 4), torch.randn(9, 4)
    bad[6, 2] = value
    for call in (retrieval_auroc, ranks, recall_at_k, nearest):
        with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 9 rows \(6\)"):
            call(good, bad)
    with pytest.raises(ValueError, match="rows 0 to 8 is NaN or infinite"):
        pair_auroc(lambda a, b: bad[a:b] @ good.T, torch.arange(9))


@pytest.mark.parametrize("images, texts, groups, message", [
    (torch.ones(1, 3), torch.ones(1, 3), None, "at least 2"),
    (torch.ones(3, 3), torch.ones(3, 2), None, "row by row a pair"),
    (torch.ones(3), torch.ones(3), None, "row by row a pair"),
    (torch.ones(3, 3), torch.zeros(3, 3), None, r"3 of 3 rows \(0, 1, 2\) are all zeros"),
    (torch.ones(3, 3), torch.ones(3, 3), ["a", "b"], "2 groups for 3"),
    (torch.ones(3, 3), torch.ones(3, 3), ["a", None, "b"], r"1 of 3 rows \(1\) are missing"),
])
def test_errors_say_what_is_wrong(images, texts, groups, message):
    with pytest.raises(ValueError, match=message):
        retrieval_auroc(images, texts, groups)


def test_wrong_k_and_direction():
    emb = torch.eye(3)
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match="whole number"):
            recall_at_k(emb, emb, ks=[k])
    with pytest.raises(ValueError, match="text_to_image, image_to_text"):
        recall_at_k(emb, emb, direction="sideways")
    with pytest.raises(ValueError, match="k=4 of 3"):
        nearest(emb, emb, 4)


def test_groups_of_any_kind():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    numbers = [0, 0, 1, 2, 2, 2]
    kinds = [numbers, torch.tensor(numbers), np.array(numbers), list("aabccc"), [(0, n) for n in numbers]]
    assert len({retrieval_auroc(images, texts, kind) for kind in kinds}) == 1


def test_contact_sheet_of_fewer_images_than_asked():
    emb = np.eye(3)
    sheet = retrieved_examples(emb, emb, queries=[2], k=10)
    assert sheet.shown.tolist() == ["top"] * 3 + ["own", "least"]
    assert sheet.image.tolist() == [2, 0, 1, 2, 1] and sheet["rank"].tolist() == [1, 2, 3, 1, 3]


def test_metrics_survive_json_and_a_split_of_one_report():
    emb = np.eye(3)
    metrics = retrieval_metrics(emb, emb, ["normal", "nodule", "normal"])
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["t2i_recall@10"] == 1 and metrics["n"] == 3
    assert not {"auroc_dedup", "auroc_masked"} & retrieval_metrics(emb, emb, ["normal"] * 3).keys()


SCALE = """
import json, sys
from pathlib import Path
import torch
from cxrvlm import retrieval
torch.set_num_threads(2)
n, share = int(sys.argv[1]), float(sys.argv[2])
g = torch.Generator().manual_seed(0)
texts = torch.randn(n, 128, generator=g)
images = texts + 2 * torch.randn(n, 128, generator=g)
groups = None if share == 0 else [0 if i < share * n else i for i in range(n)]
rows, searched = [], []
cosine, search = retrieval.cosine_scores, torch.searchsorted
def counted(*embeddings):
    scores = cosine(*embeddings)
    return lambda a, b: rows.append(b - a) or scores(a, b)
retrieval.cosine_scores = counted
torch.searchsorted = lambda ordered, values, **how: searched.append(values.numel()) or search(ordered, values, **how)
auroc = retrieval.retrieval_auroc(images, texts, groups)
# not ru_maxrss: a child starts with that of the process that made it, here pytest
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps({"auroc": auroc, "rows": sum(rows), "searched": sum(searched), "gigabytes": int(peak.split()[1]) / 2**20}))
"""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n, share", [(17_652, 0), (8_826, 0.25)])
def test_cost_at_the_scale_of_the_papers_test_split(n, share):
    "All 311 million pairs of 17,652 studies; and half as many studies, a quarter of which has the same report."
    done = subprocess.run([sys.executable, "-c", SCALE, str(n), str(share)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["rows"] <= 2 * n + 1  # every similarity is computed twice: for the positives, and for the negatives
    assert measured["searched"] <= 1.2 * n * n and measured["gigabytes"] < 2
    assert 0.5 < measured["auroc"] < 1
