"""Local matching: the matrix against equations 2 and 3, equal rows, killed computations, errors."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

import cxrvlm.matching
from cxrvlm.encoders import Embedding
from cxrvlm.matching import local_matrix, matrix_examples, matrix_metrics
from cxrvlm.retrieval import cosine_scores, retrieval_metrics, retrieved_examples

properties = settings(deadline=None, max_examples=40, derandomize=True)



def ragged(seed, n=6, m=5, w=4, e=6, reports=None):
    "Random regions and words, masks with gaps, and some equal reports and equal images; NaN where there is no word."
    g = torch.Generator().manual_seed(seed)
    c = reports or n
    regions, words = torch.randn(n, m, e, generator=g), torch.randn(c, w, e, generator=g)
    mask = torch.rand(c, w, generator=g) < 0.6
    mask[torch.arange(c), torch.randint(w, (c,), generator=g)] = True
    first_text, first_image = torch.arange(c) // 2 * 2 % max(2, c - 1), torch.arange(n) // 3 * 3
    regions, words, mask = regions[first_image], words[first_text], mask[first_text]
    words[~mask] = torch.nan
    ones = torch.ones(n, m, dtype=torch.bool)
    return Embedding(regions.mean(1), regions, ones), Embedding(words.nan_to_num().mean(1), words, mask)


def by_hand(images, texts, tau2=0.25, tau3=0.2, length_norm=False):
    "Equations 2 and 3 in float64, with every context vector."
    Z = np.zeros((len(images.local), len(texts.local)))
    for i, v in enumerate(images.local.double().numpy()):
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        for j, there in enumerate(texts.mask.numpy()):
            fits = []
            for t in texts.local[j].double().numpy()[there]:
                t = t / np.linalg.norm(t)
                a = np.exp(v @ t / tau2)
                fits.append((a[:, None] * v / a.sum()).sum(0) @ t)
            Z[i, j] = tau3 * math.log(sum(math.exp(f / tau3) for f in fits) / (len(fits) if length_norm else 1))
    return Z


@properties
@given(st.integers(0, 2**31), *[st.integers(1, most) for most in (9, 9, 5, 12)], st.booleans())
def test_local_matrix_is_equations_2_and_3(seed, n, reports, m, block, length_norm):
    images, texts = ragged(seed, n, m, reports=reports)
    options = {"tau2": 0.1 + seed % 3 / 4, "tau3": 0.05 + seed % 2, "length_norm": length_norm}
    Z = local_matrix(images, texts, **options, block=block)
    assert Z.shape == (n, reports) and Z.dtype == torch.float32
    np.testing.assert_allclose(Z, by_hand(images, texts, **options), rtol=0, atol=2e-6)


def test_tiles_of_any_size(monkeypatch):
    images, texts = ragged(0, 9, reports=17)
    for places in (1, 40, 10**6):
        monkeypatch.setattr(cxrvlm.matching, "PLACES", places)
        np.testing.assert_allclose(local_matrix(images, texts), by_hand(images, texts), rtol=0, atol=2e-6)


def test_equal_reports_and_equal_images_tie_in_local_matching():
    "Among others of all lengths, in other places, in blocks and tiles of any size: equal to the last bit."
    g = torch.Generator().manual_seed(0)
    everywhere = torch.ones(99, 9, dtype=torch.bool)
    images, texts = (Embedding(None, torch.randn(99, k, 64, generator=g), everywhere[:, :k].clone()) for k in (9, 7))
    texts = texts._replace(mask=torch.arange(7) < torch.randint(1, 8, (99, 1), generator=g))
    for rows, part in ((slice(None, None, 4), texts), (slice(1, None, 5), images)):
        part.local[rows], part.mask[rows] = part.local[rows][:1].clone(), part.mask[rows][:1].clone()
    for block in (None, 1, 10, 64):
        Z = local_matrix(images, texts, block=block)
        assert (Z[:, ::4] == Z[:, :1]).all() and (Z[1::5] == Z[1]).all()
        assert len(Z[0].unique()) > 70
    collapsed = local_matrix(images._replace(local=images.local[:1].expand(99, -1, -1)), texts)
    assert matrix_metrics(collapsed, [str(i) for i in range(99)])["t2i_recall@1"] == pytest.approx(1 / 99)


@properties
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_metrics_of_a_matrix_are_those_of_scikit_learn_and_scipy_both_ways(seed, n):
    Z = np.random.default_rng(seed).integers(0, 5, size=(n, n)).astype(np.float32)  # full of ties
    names = [str(i) for i in range(n)]
    one, other = matrix_metrics(Z, names, ks=(1, 3)), matrix_metrics(torch.tensor(Z).T, names, ks=(1, 3))
    assert one["auroc"] == other["auroc"] == pytest.approx(roc_auc_score(np.eye(n).ravel(), Z.ravel()), abs=1e-12)
    turned = {"t2i": "i2t", "i2t": "t2i"}
    assert {turned.get(key[:3], key[:3]) + key[3:]: value for key, value in one.items()} == other
    ranked = [(rankdata(-Z[:, i], "min")[i] + rankdata(-Z[:, i], "max")[i]) / 2 for i in range(n)]
    assert one["t2i_median_rank"] == np.median(ranked)
    sheet = matrix_examples(Z, range(n), k=1)
    assert sheet[sheet.shown == "own"].image.tolist() == list(range(n))
    assert sheet[sheet.shown == "top"].similarity.tolist() == Z.max(0).tolist()
    assert sheet[sheet.shown == "least"].similarity.tolist() == Z.min(0).tolist()


def test_a_matrix_of_cosines_gives_the_metrics_of_the_embeddings():
    rng = np.random.default_rng(0)
    images, texts = rng.integers(-1, 2, size=(2, 40, 4)) + 0.5
    reports = [f"report {i // 3}" for i in range(40)]
    Z = cosine_scores(images, texts)(0, 40)
    assert matrix_metrics(Z, reports) == retrieval_metrics(images, texts, reports)
    assert matrix_examples(Z, [3, 39], k=5).equals(retrieved_examples(images, texts, [3, 39], k=5))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from test_matching import ragged
import cxrvlm.matching as matching
torch.set_num_threads(1)
name, after, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
function, calls = getattr(matching, name), [0]
def count(*args):
    if calls[0] == after:
        os.kill(os.getpid(), signal.SIGKILL)
    calls[0] += 1
    return function(*args)
setattr(matching, name, count)
matching.local_matrix(*ragged(3, 50, e=32), path=path, block=3)
"""


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name, calls, done", [
    ("local_rows", 3, 3),  # in the middle of the fourth of six blocks
    ("save_record", 5, 4),  # the fifth block is written, but not its record (the first record says 0)
])
def test_a_killed_computation_goes_on_to_the_same_bytes(tmp_path, monkeypatch, one_thread, name, calls, done):
    whole, path = tmp_path / "whole.npy", tmp_path / "Z.npy"
    pairs = ragged(3, 50, e=32)
    assert len(pairs[0].local.unique(dim=0)) == 17
    Z = local_matrix(*pairs, path=whole, block=3)
    assert torch.equal(Z, local_matrix(*pairs, block=3)) and not (tmp_path / "Z.json").exists()
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(calls), str(path)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not path.exists() or path.read_bytes() != whole.read_bytes()
    blocks, function = [], cxrvlm.matching.local_rows
    monkeypatch.setattr(cxrvlm.matching, "local_rows", lambda *args: (blocks.append(1), function(*args))[1])
    assert torch.equal(local_matrix(*pairs, path=path, block=3), Z)
    assert path.read_bytes() == whole.read_bytes() and len(blocks) == 6 - done
    local_matrix(*pairs, path=path, block=3)
    assert len(blocks) == 6 - done  # nothing is left to do


def test_a_matrix_of_something_else_is_left_alone(tmp_path):
    images, texts = ragged(0)
    path = tmp_path / "Z.npy"
    local_matrix(images, texts, path=path)
    before = path.read_bytes()
    words = texts.local.clone()
    words[2][texts.mask[2]] += 1e-3
    regions = images.local.clone()
    regions[5, 4, 3] += 1e-3
    others = [
        ((images, texts), {"tau2": 0.3}), ((images, texts), {"tau3": 0.3}), ((images, texts), {"length_norm": True}),
        ((images, texts), {"block": 2}), ((images, texts._replace(local=words)), {}),
        ((images._replace(local=regions), texts), {}), ((images, ragged(0, reports=5)[1]), {}),
    ]
    for pair, options in others:
        with pytest.raises(ValueError, match="Delete it and Z.json"):
            local_matrix(*pair, **options, path=path)
    assert path.read_bytes() == before
    (tmp_path / "Z.json").unlink()  # no record, so nobody knows what it is
    with pytest.raises(ValueError, match="Delete it and Z.json"):
        local_matrix(images, texts, path=path)
    (tmp_path / "new.npy").touch()
    with pytest.raises(ValueError, match="Delete it and new.json"):
        local_matrix(images, texts, path=tmp_path / "new.npy")


def test_a_matrix_that_was_lost_or_cut_is_made_anew(tmp_path):
    images, texts = ragged(0)
    path = tmp_path / "Z.npy"
    Z = local_matrix(images, texts, path=path).clone()
    for part in (path.read_bytes()[:-4], path.read_bytes()[:50], b""):
        path.write_bytes(part)
        assert torch.equal(local_matrix(images, texts, path=path), Z)
    path.unlink()
    assert torch.equal(local_matrix(images, texts, path=path), Z)


def test_errors_of_local_matching(tmp_path):
    images, texts = ragged(0)
    nan = images.local.clone()
    nan[4, 0, 0] = torch.nan
    cases = [
        (images._replace(local=nan), texts, r"images: NaN or infinity in 1 of 6 rows \(4\)"),
        (images, texts._replace(mask=texts.mask | True), "reports: NaN or infinity"),
        (images, texts._replace(mask=texts.mask & (torch.arange(6) != 3)[:, None]), r"reports \[3\]"),
        (images, texts._replace(local=texts.local[:, :, 1:]), "expected regions"),
        (images, texts._replace(local=texts.local[:, :0], mask=texts.mask[:, :0]), "local=True"),
        (images._replace(local=images.local[:, :0]), texts, "local=True"),
        (images, texts._replace(mask=texts.mask.float()), "make it bool"),
    ]
    for one, other, message in cases:
        with pytest.raises(ValueError, match=message):
            local_matrix(one, other, path=tmp_path / "Z.npy")
    with pytest.raises(ValueError, match="end in .npy"):
        local_matrix(images, texts, path=tmp_path / "Z.json")
    assert list(tmp_path.iterdir()) == []
    for Z, message in ((torch.ones(3, 4), r"not \[3, 4\]"), (torch.ones(1, 1), "at least 2"), (torch.ones(3), "not")):
        with pytest.raises(ValueError, match=message):
            matrix_metrics(Z, ["a", "b", "c"])
    Z = torch.rand(3, 3)
    with pytest.raises(ValueError, match="2 groups for 3"):
        matrix_metrics(Z, ["a", "b"])
    Z[1, 2] = torch.inf
    for call in (matrix_metrics, matrix_examples):
        with pytest.raises(ValueError, match=r"1 of 3 rows \(1\)"):
            call(Z, [0, 1, 2])
