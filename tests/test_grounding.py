"""Grounding: scores against twins written out pixel by pixel, chance, ceilings, ties, and what cannot be measured."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm.grounding import (
    METRICS,
    WORDS,
    Look,
    find_looks,
    finding_masks,
    ground,
    ground_table,
    iou_at_area,
    map_scores,
    most_attended,
    oracle_map,
    oracle_scores,
    pointing,
    read_grounding,
    stands_for,
    widen,
)
from cxrvlm.phantom import KINDS
from cxrvlm.studies import phantom_reference


def random_case(side, step, seed, ties=False):
    "A map [side, side], and a mask of side * step pixels that is not empty."
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(side, side, generator=rng) + 0.01
    attention = (3 * values).ceil() if ties else values
    mask = torch.rand(side * step, side * step, generator=rng) < 0.3
    mask[0, 0] = True
    return attention / attention.sum(), mask


def twin(attention, mask, tolerance=0):
    "The three scores by loops over the pixels."
    size, step = len(mask), len(mask) // len(attention)
    pixels = [(y, x) for y in range(size) for x in range(size)]
    value = {p: attention[p[0] // step, p[1] // step].item() for p in pixels}
    inside = {p for p in pixels if mask[p]}
    near = {p for p in pixels if any(math.dist(p, q) <= tolerance for q in inside)}
    top = [p for p in pixels if value[p] == max(value.values())]
    common, room = 0.0, len(inside)
    for level in sorted(set(value.values()), reverse=True):
        here = [p for p in pixels if value[p] == level]
        common += sum(p in inside for p in here) * min(1, room / len(here))
        room = max(0, room - len(here))
    share = sum(value[p] for p in inside) / sum(value.values())
    return {"pointing": sum(p in near for p in top) / len(top), "overlap": share, "iou": common / (2 * len(inside) - common)}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.booleans(), st.sampled_from([0, 1, 1.5]))
def test_scores_are_those_of_the_loops(side, step, seed, ties, tolerance):
    attention, mask = random_case(side, step, seed, ties)
    assert map_scores(attention, mask, tolerance) == pytest.approx(twin(attention, mask, tolerance), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31))
def test_the_mask_itself_scores_1(size, seed):
    _, mask = random_case(size, 1, seed)
    assert map_scores(mask / mask.sum(), mask) == pytest.approx({"pointing": 1, "overlap": 1, "iou": 1}, abs=1e-5)
    assert oracle_scores(mask, size) == pytest.approx({"pointing": 1, "overlap": 1, "iou": 1}, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([0, 1, 2]))
def test_an_even_map_gives_chance(side, step, seed, tolerance):
    _, mask = random_case(side, step, seed)
    share = mask.float().mean().item()
    scores = map_scores(torch.full((side, side), 1 / side**2), mask, tolerance)
    assert scores["pointing"] == pytest.approx(widen(mask, tolerance).float().mean().item(), abs=1e-5)
    assert scores["overlap"] == pytest.approx(share, abs=1e-5)
    assert scores["iou"] == pytest.approx(share / (2 - share), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(5, 13), st.integers(0, 2**31), st.sampled_from([0, 1]))
def test_no_map_passes_the_oracle(side, size, seed, tolerance):
    "Also where the side of the image is no multiple of the map's."
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, size, generator=rng) < 0.2
    mask[-1, 0] = True
    best = oracle_scores(mask, side, tolerance)
    assert oracle_map(mask, side).sum().item() == pytest.approx(1, abs=1e-5)
    for _ in range(10):
        scores = map_scores(torch.rand(side, side, generator=rng).softmax(1) / side, mask, tolerance)
        assert scores["pointing"] <= best["pointing"] + 1e-6 and scores["iou"] <= best["iou"] + 1e-5
        assert scores["overlap"] <= oracle_scores(mask, side)["pointing"] + 1e-5  # to stare at the best region


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_the_most_attended_pixels_add_up(side, step, seed, ties):
    attention, mask = random_case(side, step, seed, ties)
    weights = most_attended(attention, len(mask), int(mask.sum()))
    assert weights.sum().item() == pytest.approx(mask.sum().item(), rel=1e-5)
    assert weights.min() >= 0 and weights.max() <= 1 + 1e-6


def test_an_empty_mask_is_refused():
    even, nothing = torch.full((2, 2), 0.25), torch.zeros(4, 4, dtype=torch.bool)
    for score in (pointing, iou_at_area, map_scores):
        with pytest.raises(ValueError, match="mask is empty"):
            score(even, nothing)


def test_words_are_of_kinds_that_exist_and_match_whole_words():
    assert set(WORDS) <= set(KINDS)
    assert all(stands_for(form.replace("*", ""), kind) for kind, forms in WORDS.items() for form in forms.split())
    assert stands_for("MASSES", "mass") and not stands_for("massive", "mass")
    assert not any(stands_for(word, kind) for kind in KINDS for word in ("no", "the", "left", "normal", ""))


def test_findings_of_a_kind_share_a_mask():
    left, right = "Pleural Effusion/left/large", "Pleural Effusion/right/large"
    _, both = finding_masks(phantom_reference(3, [left, right]), 64)
    _, one = finding_masks(phantom_reference(3, [left]), 64)
    assert list(both) == ["effusion"] and one["effusion"].any()
    assert (both["effusion"] & one["effusion"]).equal(one["effusion"]) and both["effusion"].sum() > one["effusion"].sum()
    assert finding_masks(phantom_reference(3, ["normal"]), 64)[1] == {}
    with pytest.raises(ValueError, match="only phantoms have masks"):
        finding_masks("images/1.png", 64)


@pytest.fixture
def model(monkeypatch):
    "Stands for a model: the map of a word is that of its first letter; the words after the tenth are cut off."
    def maps(model, image, report, max_tokens, tau2):
        spots = {"e": [1.0, 0, 0, 0], "o": [0, 0, 0, 1.0], "x": [math.nan] * 4}
        return [(w, torch.tensor(spots.get(w[0], [0.25] * 4)).view(2, 2)) for w in report.lower().split()[:10]]
    monkeypatch.setattr("cxrvlm.grounding.word_maps", maps)


def study(name, mesh, impression):
    return {"study_id": name, "image": phantom_reference(1, mesh), "impression": impression}


def test_looks_are_findings_that_the_report_names(model):
    effusion, opacity = "Pleural Effusion/left/large", "Opacity/lung/apex/right"
    studies = pd.DataFrame([
        study("a", [effusion, opacity], "Effusion and more"),  # the opacity is not named
        study("b", [effusion], "Normal heart"),
        study("c", ["normal"], "Effusion"),  # not drawn
        study("d", [opacity], "one two three four five six seven eight nine ten opacity"),  # cut off
        study("e", [effusion, opacity], "opacities and effusions and an effusion"),
    ])
    looks = find_looks(None, studies, 32, 12)
    assert [(look.study_id, look.finding) for look in looks] == [("a", "effusion"), ("e", "effusion"), ("e", "opacity")]
    assert looks[1].attention.tolist() == [[1, 0], [0, 0]] and looks[2].attention.tolist() == [[0, 0], [0, 1]]
    assert find_looks(None, studies[1:2], 32, 12) == []


def test_two_words_of_a_finding_have_their_mean_and_nan_is_refused(model):
    row = study("a", ["Opacity/lung/apex/right"], "opacity in airspace")
    assert find_looks(None, pd.DataFrame([row]), 32, 12)[0].attention.tolist() == [[0.125, 0.125], [0.125, 0.625]]
    row = study("a", ["Kyphosis"], "xkyphosis kyphosis")
    assert len(find_looks(None, pd.DataFrame([row]), 32, 12)) == 1
    bad = study("a", ["Scoliosis"], "xscoliosis")
    with pytest.raises(ValueError, match="NaN or infinite"):
        find_looks(None, pd.DataFrame([bad]), 32, 12)


def made_up_looks(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    masks = [torch.rand(6, 6, generator=rng) < 0.4 for _ in range(n)]
    maps = [torch.rand(3, 3, generator=rng) for _ in range(n)]
    return [Look(str(i), "edema", a / a.sum(), m) for i, (a, m) in enumerate(zip(maps, masks, strict=True))]


def test_the_other_map_is_that_of_every_other_study():
    looks = made_up_looks(5)
    scored = ground(looks)
    for i, look in enumerate(looks):
        for name in METRICS:
            by_hand = np.mean([map_scores(other.attention, look.mask)[name] for j, other in enumerate(looks) if j != i])
            assert scored[f"{name}_other"][i] == pytest.approx(by_hand)
            assert scored[f"{name}_gain"][i] == pytest.approx(scored[name][i] - by_hand)
    two = ground(looks, others=2)
    assert two.pointing_other[4] == pytest.approx(np.mean([pointing(looks[j].attention, looks[4].mask) for j in (0, 1)]))


def test_the_table_counts_studies_and_hides_small_numbers():
    looks = [*made_up_looks(6), Look("0", "mass", *made_up_looks(1)[0][2:])]
    table = ground_table(ground(looks))
    assert table.finding.tolist() == ["all", "edema", "mass"] and table.n.tolist() == [6, 6, 1]
    assert table.set_index("finding").loc["mass"].drop("n").isna().all()
    sure = table.iloc[:2]
    for name in METRICS:
        assert (sure[f"{name}_low"] <= sure[name]).all() and (sure[name] <= sure[f"{name}_high"]).all()
    assert table.equals(ground_table(ground(looks)))  # the same on every run
    assert ground_table(ground([])).values.tolist()[0][:2] == ["all", 0]


def test_tables_are_read_together_and_strangers_named(tmp_path):
    with pytest.raises(ValueError, match="no grounding.csv below"):
        read_grounding(tmp_path)
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        table = ground_table(ground(made_up_looks(6, seed))).assign(arm="a", fraction=1.0, seed=seed)
        table.to_csv(folder / "grounding.csv", index=False)
    assert read_grounding(tmp_path).seed.tolist() == [0, 0, 1, 1]
    assert len(read_grounding(tmp_path / "0/grounding.csv")) == 2
    (tmp_path / "0/grounding.csv").write_text("arm,n\na,1\n")
    with pytest.raises(ValueError, match="lacks the columns finding, fraction"):
        read_grounding(tmp_path)
