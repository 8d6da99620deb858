"""Zero-shot classification, its measures and intervals: against loops, by property, and with hostile labels."""
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.downstream import (
    conditions,
    downstream_metrics,
    embed_prompts,
    linear_probe,
    out_of_fold,
    patient_weights,
    positive,
    score_table,
    weighted_scores,
    zero_shot,
    zero_shot_margins,
    zero_shot_probabilities,
)
from cxrvlm.initialisation import build_model
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.studies import seed_from

properties = settings(deadline=None, max_examples=40, derandomize=True)
NUMBERS = ["balanced_accuracy", "auroc"]


@st.composite
def tasks(draw, ties=True):
    "Embeddings of N images and of the prompts of two labels, the labels, and patients with several images."
    n, rng = draw(st.integers(8, 40)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["continuous", "ties"] if ties else ["continuous"]))
    images, present, absent = (
        rng.normal(size=(rows, 3)) if kind == "continuous" else np.c_[rng.integers(-1, 2, (rows, 2)), np.ones(rows)]
        for rows in (n, 2, 2)
    )
    y = rng.random((n, 2)) < 0.4
    y[0], y[1] = True, False
    return images, present, absent, pd.DataFrame(y, columns=["a", "b"]).astype(float), rng.integers(0, n // 2, n)


def drawn_again(y, score, parts, patients, resamples, seed=0):
    "Both measures of each resample, from rows that are really drawn again."
    names = sorted(set(map(str, patients)))
    rng, values = np.random.default_rng(seed_from(seed, "bootstrap")), []
    for _ in range(resamples):
        rows = [row for place in rng.integers(len(names), size=len(names))
                for row in range(len(y)) if str(patients[row]) == names[place]]
        each = []
        for part in parts:
            mine = [row for row in rows if row in set(part.tolist())]
            if len(set(y[mine].tolist())) == 2:
                each.append((balanced_accuracy_score(y[mine], score[mine] > 0), roc_auc_score(y[mine], score[mine])))
        values.append(np.mean(each, axis=0) if each else [np.nan, np.nan])
    return np.array(values)


# --- the measures ---


@properties
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_measures_are_those_of_scikit_learn_on_repeated_rows(n, levels, seed):
    rng = np.random.default_rng(seed)
    y, score, weights = rng.random(n) < 0.5, rng.integers(-levels, levels, n) / 3, rng.integers(0, 3, (4, n))
    balanced, auroc = weighted_scores(y, score, weights)
    for row, w in enumerate(weights):
        y_w, score_w = np.repeat(y, w), np.repeat(score, w)
        if len(set(y_w.tolist())) < 2:
            assert np.isnan(balanced[row]) and np.isnan(auroc[row])
        else:
            assert balanced[row] == pytest.approx(balanced_accuracy_score(y_w, score_w > 0), abs=1e-12)
            assert auroc[row] == pytest.approx(roc_auc_score(y_w, score_w), abs=1e-12)


@properties
@given(tasks())
def test_zero_shot_is_the_papers_method_written_out(task):
    images, present, absent, labels, patients = task
    table = zero_shot(images, present, absent, labels, patients, resamples=0)
    unit = [F.normalize(torch.tensor(x, dtype=torch.float64), dim=1) for x in (images, present, absent)]
    for place, label in enumerate(labels):
        pairs = torch.stack([unit[0] @ unit[1][place], unit[0] @ unit[2][place]], dim=1)
        truth, margin = labels[label].to_numpy() == 1, (pairs[:, 0] - pairs[:, 1]).numpy()
        margin = np.where(abs(margin) < 1e-7, 0, margin).round(7)  # ties up to rounding
        assert table.balanced_accuracy[place] == pytest.approx(balanced_accuracy_score(truth, margin > 0), abs=1e-9)
        assert table.auroc[place] == pytest.approx(roc_auc_score(truth, margin), abs=1e-2)
        probability = zero_shot_probabilities(zero_shot_margins(*task[:3]), tau=0.5)[:, place]
        assert probability == pytest.approx((pairs / 0.5).softmax(1)[:, 0].numpy(), abs=1e-6)


@properties
@given(tasks(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(task, random):
    images, present, absent, labels, patients = task
    order = list(range(len(images)))
    random.shuffle(order)
    before = zero_shot(images, present, absent, labels, patients, resamples=20)
    after = zero_shot(images[order], present, absent, labels.iloc[order], patients[order], resamples=20)
    pd.testing.assert_frame_equal(before, after, rtol=1e-12)


@properties
@given(tasks())
def test_swapped_prompts_mirror_the_numbers(task):
    images, present, absent, labels, patients = task
    both = (present, absent), (absent, present)
    table, mirror = (zero_shot(images, *prompts, labels, patients, 20) for prompts in both)
    assert (table.auroc + mirror.auroc).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert (table.auroc_low + mirror.auroc_high).tolist() == pytest.approx([1] * 3, abs=1e-9)
    if (zero_shot_margins(images, present, absent) != 0).all():
        assert (table.balanced_accuracy + mirror.balanced_accuracy).tolist() == pytest.approx([1] * 3, abs=1e-12)


def test_the_temperature_changes_neither_guess_nor_order():
    rng = np.random.default_rng(0)
    margins = zero_shot_margins(*(rng.normal(size=(n, 4)) for n in (50, 3, 3)))
    for tau in (0.05, 0.5, 5):
        probability = zero_shot_probabilities(margins, tau)
        assert ((probability > 0.5) == (margins > 0)).all()
        assert (probability.argsort(axis=0) == margins.argsort(axis=0)).all()
        assert probability + zero_shot_probabilities(-margins, tau) == pytest.approx(1)


def test_equal_prompts_say_no_and_are_chance():
    rng = np.random.default_rng(0)
    prompts, labels = rng.normal(size=(1, 4)), pd.DataFrame({"a": [1, 0, 1, 0, 0.0]})
    table = zero_shot(rng.normal(size=(5, 4)), prompts, prompts * 3, labels, np.arange(5), resamples=30)
    assert table.balanced_accuracy.tolist() == table.auroc.tolist() == [0.5, 0.5]


# --- labels ---


@pytest.mark.parametrize("blank", [0.0, -1.0, math.nan])
def test_unsure_and_blank_are_negative(blank):
    rng = np.random.default_rng(0)
    images, prompts = rng.normal(size=(30, 4)), rng.normal(size=(2, 1, 4))
    labels = pd.DataFrame({"a": np.where(np.arange(30) % 3 == 0, 1.0, blank)})
    zeros = pd.DataFrame({"a": np.where(np.arange(30) % 3 == 0, 1.0, 0.0)})
    unsure, absent = (zero_shot(images, *prompts, table, np.arange(30), 10) for table in (labels, zeros))
    pd.testing.assert_frame_equal(unsure, absent)
    nullable = pd.DataFrame({"a": pd.array([1, None, -1, 0], dtype="Int64")})
    assert positive(nullable)[:, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("value", [2, 0.5, "1", "positive", math.inf])
def test_what_is_no_label_is_an_error(value):
    labels = pd.DataFrame({"Edema": pd.Series([1, 0, value], dtype=object)})
    with pytest.raises(ValueError, match="label Edema: the value in row 2 is"):
        zero_shot(np.ones((3, 2)), np.ones((1, 2)), np.ones((1, 2)), labels, np.arange(3))


@pytest.mark.parametrize(("value", "reason"), [(0, "nobody has it"), (-1, "nobody has it"), (1, "everybody has it")])
@pytest.mark.parametrize("resamples", [0, 25])
def test_a_label_of_one_group_gets_its_reason_and_no_number(value, reason, resamples):
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"odd": np.full(40, value), "fair": (rng.random(40) < 0.4).astype(float)})
    with warnings.catch_warnings(action="error"):
        table = zero_shot(*(rng.normal(size=(n, 3)) for n in (40, 2, 2)), labels, np.arange(40), resamples)
    assert table.note[0] == reason
    assert table.drop(columns=["label", "positives", "patients", "note"]).loc[0].isna().all()
    if resamples:
        fair, mean = table.iloc[1], table.iloc[2]
        assert mean.note == "of 1 of 2 labels" and mean[NUMBERS].tolist() == fair[NUMBERS].tolist()
        assert (mean.auroc_low, mean.auroc_high) == (fair.auroc_low, fair.auroc_high)


def test_no_label_that_can_be_scored_and_no_label_at_all():
    nobody = pd.DataFrame({"a": np.zeros(9)})
    with warnings.catch_warnings(action="error"):
        table = zero_shot(np.eye(9), np.eye(9)[:1], np.eye(9)[1:2], nobody, np.arange(9), 10)
        none = zero_shot(np.eye(9), np.eye(9)[:0], np.eye(9)[:0], pd.DataFrame(index=range(9)), np.arange(9), 10)
    assert np.isnan(table.auroc).all() and table.note.tolist() == ["nobody has it", "of 0 of 1 labels"]
    assert none.label.tolist() == ["mean"]


def test_what_cannot_be_scored_is_refused():
    rng = np.random.default_rng(0)
    images, prompts, labels = rng.normal(size=(6, 3)), rng.normal(size=(2, 2, 3)), pd.DataFrame(np.eye(6)[:, :2])
    images[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"images: NaN or infinity in 1 of 6 rows \(4\)"):
        zero_shot(images, *prompts, labels, np.arange(6))
    images[4] = 0
    with pytest.raises(ValueError, match="are all zeros"):
        zero_shot(images, *prompts, labels, np.arange(6))
    images[4] = 1
    with pytest.raises(ValueError, match=r"no patient in 1 of 6 rows \(2\)"):
        zero_shot(images, *prompts, labels, np.array(["a", "b", None, "c", "d", "e"], dtype=object))
    with pytest.raises(ValueError, match="2 prompts of each kind for 1 labels"):
        zero_shot(images, *prompts, labels[[0]], np.arange(6))
    with pytest.raises(ValueError, match=r"prompts \[2, 3\] and \[1, 3\]"):
        zero_shot(images, prompts[0], prompts[1, :1], labels, np.arange(6))
    with pytest.raises(ValueError, match="one row for each image"):
        zero_shot(images[:5], *prompts, labels, np.arange(6))


# --- intervals ---


@pytest.mark.parametrize("share", [0.4, 0.06])
def test_intervals_of_zero_shot_are_those_of_a_loop(share):
    rng = np.random.default_rng(3)
    y, patients = rng.random(60) < share, rng.integers(0, 30, 60)
    images, prompts = rng.normal(size=(60, 4)), rng.normal(size=(2, 1, 4))
    images[y] += prompts[0]
    table = zero_shot(images, *prompts, pd.DataFrame({"a": y.astype(float)}), patients, resamples=40)
    values = drawn_again(y, zero_shot_margins(images, *prompts)[:, 0], [np.arange(60)], patients, 40)
    for place, name in enumerate(NUMBERS):
        expected = np.nanquantile(values[:, place], [0.025, 0.975])
        assert table[[f"{name}_low", f"{name}_high"]].loc[0].tolist() == pytest.approx(expected)
    lost = int(np.isnan(values[:, 0]).sum())
    assert table.note[0] == (f"{lost} of 40 resamples have one group only" if lost else "")
    assert (lost > 0) == (share < 0.1)


def test_intervals_of_the_probe_are_those_of_a_loop_over_the_folds():
    rng = np.random.default_rng(4)
    x, patients = rng.normal(size=(90, 3)).astype(np.float32), rng.integers(0, 60, 90).astype(str)
    truth = pd.DataFrame({"a": x[:, 0] + rng.normal(size=90) > 0.3, "b": rng.random(90) < 0.4})
    scored = out_of_fold(x, truth, patients, folds=3, seed=0, C=1.0, steps=1000)
    assert not np.isnan(scored.score).any() and sorted(np.concatenate(scored.parts)) == list(range(90))
    table = linear_probe(x, truth.astype(float), patients, folds=3, resamples=30)
    pd.testing.assert_frame_equal(table, score_table(scored, patients, 30))
    both = [drawn_again(truth[label].to_numpy(), scored.score[:, place], scored.parts, patients, 30)
            for place, label in enumerate(truth)]
    for row, values in enumerate([*both, np.mean(both, axis=0)]):
        for place, name in enumerate(NUMBERS):
            expected = np.quantile(values[:, place], [0.025, 0.975])
            assert table[[f"{name}_low", f"{name}_high"]].loc[row].tolist() == pytest.approx(expected)


def test_patients_are_drawn_whole():
    rng = np.random.default_rng(0)
    images, prompts, y = rng.normal(size=(50, 4)), rng.normal(size=(2, 1, 4)), rng.random(50) < 0.4
    labels = pd.DataFrame({"a": y.astype(float)})
    one = zero_shot(images, *prompts, labels, np.arange(50), 200)
    copies, copied = np.repeat(images, 3, 0), labels.loc[labels.index.repeat(3)]
    tripled = zero_shot(copies, *prompts, copied, np.arange(50).repeat(3), 200)
    torn = zero_shot(copies, *prompts, copied, np.arange(150), 200)
    numbers = one.columns.drop(["label", "positives", "patients", "note"])
    pd.testing.assert_frame_equal(one[numbers], tripled[numbers])  # more images of the same patients teach nothing
    assert (torn.auroc_high - torn.auroc_low)[0] < 0.75 * (one.auroc_high - one.auroc_low)[0]
    assert tripled.patients.tolist() == one.patients.tolist() and tripled.positives[0] == 3 * one.positives[0]


def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    truth, held = norm.cdf(1 / math.sqrt(2)), 0  # of scores that are one standard deviation apart
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = rng.random(150) < 0.4
        images = np.c_[rng.normal(size=150) + y, np.full(150, 100.0)]  # so far out that the angle is a line
        labels = pd.DataFrame({"a": y.astype(float)})
        table = zero_shot(images, [[1.0, 100.0]], [[-1.0, 100.0]], labels, np.arange(150), resamples=200, seed=seed)
        held += table.auroc_low[0] <= truth <= table.auroc_high[0]
    assert 50 <= held <= 60


def test_resamples_depend_on_the_seed_alone():
    patients = np.array(["b", "a", "c", "a"])
    whole = next(patient_weights(patients, 30, seed=1))
    parts = np.concatenate(list(patient_weights(patients, 30, seed=1, block=7)))
    assert np.array_equal(whole, parts) and not np.array_equal(whole, next(patient_weights(patients, 30, seed=2)))
    renamed = next(patient_weights(np.array([2, 1, 3, 1]), 30, seed=1))
    assert np.array_equal(whole, renamed) and (whole[:, [0, 1, 2]].sum(1) == 3).all()


# --- a model ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A tiny model with random weights, studies and their pixels."
    tiny = replace(load_settings("smoke"), image_encoder="timm:test_resnet", bootstrap=20)
    studies, _ = load_studies(tiny)
    model = build_model(tiny, load_arm("baseline"), make_tokenizer(tiny, studies), seed=0)
    return tiny, studies, model, open_store(tiny, studies, tmp_path_factory.mktemp("store"))


def test_an_ensemble_is_the_mean_direction(smoke):
    def embed(*templates):
        return embed_prompts(smoke[2], ["Edema", "Fracture"], templates, 32)

    one, other, both = embed("{} remains visible"), embed("seen: {}"), embed("{} remains visible", "seen: {}")
    assert torch.allclose(both, F.normalize((one + other) / 2, dim=1), atol=1e-6)
    assert torch.allclose(both, embed("seen: {}", "{} remains visible"), atol=1e-6)
    assert torch.allclose(one, embed(*["{} remains visible"] * 3), atol=1e-6)
    assert torch.allclose(both.norm(dim=1), torch.ones(2))


def test_a_label_with_braces_is_a_label(smoke):
    model = smoke[2]
    embedded = embed_prompts(model, ["a {0} b", "{}"], ["{} remains visible"], 32)
    assert embedded.isfinite().all() and not torch.allclose(*embedded)


def test_metrics_are_floats_that_json_can_hold_and_come_twice(smoke):
    tiny, studies, model, store = smoke
    model.train()  # dropout would change the numbers
    metrics, tables = downstream_metrics(model, studies, store, tiny)
    again, _ = downstream_metrics(model, studies, store, tiny)
    assert metrics == again == json.loads(json.dumps(metrics, allow_nan=False))
    table = tables["zero_shot"]
    assert table.label.tolist() == [*conditions(studies), "mean"] and "No Finding" not in set(table.label)
    assert metrics["zero_shot_auroc"] == pytest.approx(np.nanmean(table.auroc[:-1]))
    assert metrics["zero_shot_labels"] == table.auroc[:-1].notna().sum() < 12
    assert metrics["zero_shot_auroc_low"] <= metrics["zero_shot_auroc"] <= metrics["zero_shot_auroc_high"]


def test_labels_of_a_users_table_and_none(smoke):
    tiny, studies, model, store = smoke
    mine = studies[["study_id", "patient_id", "image", "findings", "impression", "split"]]
    assert downstream_metrics(model, mine, store, tiny) == ({}, {})
    mine = mine.assign(scoliosis=(np.arange(len(mine)) % 2).astype(float), empty=np.nan)[::-1]
    metrics, tables = downstream_metrics(model, mine, store, tiny)
    assert tables["probe"].label.tolist() == ["scoliosis", "empty", "mean"] and metrics["probe_labels"] == 1
    assert tables["zero_shot"].note[1] == "nobody has it"
    metrics, tables = downstream_metrics(model, mine.drop(columns="scoliosis"), store, tiny)
    assert metrics == {} and np.isnan(tables["probe"].auroc).all()
