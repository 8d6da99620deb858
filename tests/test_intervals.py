"""One formula for seeds, patients and folds: against slow loops, and in sweeps where the truth is known."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm.intervals import Estimate, clustered, estimate, standard_error, variance_components


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 7), st.integers(0, 10**6))
def test_variance_components_are_those_of_a_loop(S, P, seed):
    g = np.random.default_rng(seed).normal(size=(S, P)) * [1, 3][seed % 2] + np.arange(S)[:, None]
    whole = g.mean()
    seeds, patients = [np.mean(row) for row in g], [np.mean(column) for column in g.T]
    rest = sum((g[s, p] - seeds[s] - patients[p] + whole) ** 2 for s in range(S) for p in range(P)) / ((S - 1) * (P - 1))
    between = sum((mean - whole) ** 2 for mean in patients) / (P - 1)
    assert variance_components(g) == (pytest.approx(between), pytest.approx(rest))
    spread = sum((mean - whole) ** 2 for mean in seeds) / (S - 1)
    assert standard_error(g.mean(1), g) ** 2 == pytest.approx(spread / S + max(0, between - rest / S) / P)


def test_what_all_seeds_and_patients_share_is_gone():
    shares = np.random.default_rng(0).normal(size=(4, 50))
    found, moved = estimate(shares.mean(1), shares), estimate(shares.mean(1) + 3, shares + np.arange(4)[:, None])
    assert moved.value == pytest.approx(found.value + 3) and moved.error == pytest.approx(found.error)


def test_one_run_and_no_spread():
    assert all(map(math.isnan, (*estimate(np.array([0.3])).interval(), estimate(np.array([0.3])).chance())))
    assert [Estimate(value, 0.0, 3).chance() for value in (0.1, 0.0, -0.1)] == pytest.approx([0, 0.5, 1], abs=1e-9)
    assert math.isnan(clustered(np.array([1.0, 2.0]), np.array(["p", "p"])).error)


def covered(seeds: int, kind: str, patients: int = 1000, count: int = 2000, luck: float = 0.01) -> tuple[float, float]:
    "How often an interval contains the truth, and how often it lies wholly below it. As in 15b_intervals, with more patients."
    rng, off, half = np.random.default_rng(seeds), [], []
    for _ in range(count // 100):  # in parts: little memory
        g = luck * rng.normal(size=(100, seeds, 1)) + 0.1 * rng.normal(size=(100, 1, patients)) + 0.3 * rng.normal(size=(100, seeds, patients))
        if kind == "skewed":
            g += luck * (rng.exponential(size=(100, seeds, 1)) - 1)
        if kind in ("reference fails", "both fail"):
            g += 0.1 * ((rng.random((100, seeds, 1)) < 0.2) - 0.2)
        if kind == "both fail":
            g -= 0.1 * ((rng.random((100, seeds, 1)) < 0.2) - 0.2)
        off += g.mean((1, 2)).tolist()
        half += [Estimate(0, error, seeds).half() for error in standard_error(g.mean(-1), g)]
    off, half = np.array(off), np.array(half)
    return np.mean(np.abs(off) <= half), np.mean(off < -half)


LEAST = {"normal": (0.94, 0.94, 0.94), "skewed": (0.94, 0.94, 0.94), "both fail": (0.94, 0.94, 0.93), "reference fails": (0.84, 0.74, 0.85)}


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("kind", LEAST)
def test_an_interval_keeps_its_word(kind, seeds):
    share, below = covered(seeds, kind)
    print(f"{kind}, {seeds} seeds: {share:.3f} contain the truth, {below:.3f} lie above it")
    assert share >= LEAST[kind][(3, 5, 10).index(seeds)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1, 1)), min_size=2, max_size=20), st.integers(0, 9))
def test_a_patient_counts_once(looks, where):
    patients, values = np.array([patient for patient, _ in looks]), np.array([value for _, value in looks])
    found = clustered(np.append(values, np.nan), np.append(patients, 99))
    names = sorted(set(patients.tolist()))
    assert found.value == pytest.approx(values.mean(), abs=1e-12) and found.runs == len(names)
    if len(names) > 1:
        sums = [sum(v - values.mean() for p, v in zip(patients, values, strict=True) if p == name) for name in names]
        assert found.error == pytest.approx(math.sqrt(sum(s**2 for s in sums) * len(names) / (len(names) - 1)) / len(values), abs=1e-12)
    copies = clustered(np.tile(values, 3), np.tile(patients, 3))
    assert copies.error == pytest.approx(found.error, abs=1e-12, nan_ok=True)


def test_clustered_intervals_keep_their_word():
    rng, inside = np.random.default_rng(0), []
    for _ in range(1500):
        patients = np.repeat(np.arange(40), rng.integers(1, 4, 40))
        low, high = clustered(rng.normal(size=40)[patients] + 0.5 * rng.normal(size=len(patients)), patients).interval()
        inside.append(low <= 0 <= high)
    assert 0.93 < np.mean(inside) < 0.97


def one_feature(x, y, train, test):
    "The best single feature against no model at all: which one is best depends on a few training cases."
    best = np.abs(x[train].T @ y[train]).argmax()
    slope = x[train, best] @ y[train] / (x[train, best] @ x[train, best])
    return np.mean(y[test] ** 2) - np.mean((y[test] - slope * x[test, best]) ** 2)


def ridge(x, y, train, test):
    "Ridge regression against least squares, which hardly differ from one training set to another."
    fits = [np.linalg.solve(x[train].T @ x[train] + penalty * np.eye(x.shape[1]), x[train].T @ y[train]) for penalty in (0, 20)]
    least, shrunk = (np.mean((y[test] - x[test] @ fit) ** 2) for fit in fits)
    return least - shrunk


@pytest.mark.parametrize("folds", [5, 10])
@pytest.mark.parametrize("learner", [one_feature, ridge])
def test_folds_of_a_learner(learner, folds):
    "One fold is tested, the next validates, the others train. The truth is the mean over many data sets."
    rng, cases, width, gains = np.random.default_rng(folds), 120, 8, []
    truth, parts = rng.normal(0, 0.25, width), np.array_split(np.arange(cases), folds)
    for _ in range(1000):
        x = rng.normal(size=(cases, width))
        y = x @ truth + rng.normal(size=cases)
        gains.append([learner(x, y, np.setdiff1d(np.arange(cases), np.append(part, after)), part) for part, after in zip(parts, parts[1:] + parts[:1], strict=True)])
    gains, t = np.array(gains), Estimate(0, 1.0, folds).half()
    corrected, plain = (np.mean(np.abs(gains.mean(1) - gains.mean()) <= t * standard_error(gains, ratio=ratio)) for ratio in (1 / (folds - 2), 0))
    print(f"{learner.__name__}, {folds} folds: {corrected:.3f} with the correction, {plain:.3f} as if they were seeds")
    assert corrected > 0.93
    if learner is one_feature:
        assert plain < corrected - 0.03
