"""Splits and fractions by property; the schema against hostile tables."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm.studies import (
    StudiesError,
    check_studies,
    nested_fraction,
    parse_phantom_reference,
    patients_on_two_sides,
    phantom_reference,
    split_by_patient,
)

patients = st.lists(st.integers(0, 60).map("p{}".format), min_size=40, max_size=200)


def table(patient_ids):
    "A studies table with these patients."
    return pd.DataFrame({
        "study_id": [f"s{i}" for i in range(len(patient_ids))],
        "patient_id": patient_ids,
        "image": [f"{i}.png" for i in range(len(patient_ids))],
        "findings": "",
        "impression": "No acute disease.",
    })


@settings(max_examples=40, deadline=None)
@given(patients, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_split_depends_on_patients_and_seed_alone(patient_ids, seed, random):
    studies = table(patient_ids)
    if studies.patient_id.nunique() < 20:
        return
    split = split_by_patient(studies, seed)
    assert patients_on_two_sides(split) == []
    assert split.drop(columns="split").equals(studies)
    shuffled = studies.sample(frac=1, random_state=random.randrange(2**31))
    assert split_by_patient(shuffled, seed).split.sort_index().equals(split.split)
    sizes = split.groupby("split").patient_id.nunique() / studies.patient_id.nunique()
    assert abs(sizes["train"] - 0.8) < 0.05


@settings(max_examples=40, deadline=None)
@given(patients, st.integers(0, 5), st.lists(st.floats(0.001, 1), min_size=2, max_size=5))
def test_fractions_are_nested_and_large_enough(patient_ids, seed, fractions):
    studies = table(patient_ids)
    parts = [nested_fraction(studies, fraction, seed) for fraction in sorted(fractions)]
    for fraction, part in zip(sorted(fractions), parts, strict=True):
        assert len(part) >= max(20, round(fraction * len(studies)))
        rest = studies.drop(part.index)
        assert not set(rest.patient_id) & set(part.patient_id)
        largest = part.patient_id.value_counts().max()
        assert len(part) < max(20, round(fraction * len(studies))) + largest
    for small, large in zip(parts, parts[1:], strict=False):
        assert set(small.index) <= set(large.index)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        nested_fraction(table(["p"] * 30), fraction, 0)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="19 pairs do not fill one batch of 20"):
        nested_fraction(table(["p"] * 19), 1.0, 0)


@pytest.mark.parametrize("column", ["study_id", "patient_id", "image", "impression"])
@pytest.mark.parametrize("value", ["", "  \t\n", None, np.nan, 7])
def test_every_bad_cell_is_named(column, value):
    studies = table(["p0", "p1", "p2"]).astype(object)
    studies.loc[1, column] = value
    with pytest.raises(StudiesError, match=f"row 3, .*{column} is blank"):
        check_studies(studies)


def test_all_faults_come_at_once_whatever_the_index():
    studies = table([f"p{i}" for i in range(30)])
    studies.loc[[3, 8, 21], "impression"] = " "
    studies.index = [0] * 30
    with pytest.raises(StudiesError, match="3 faults in 30 rows") as caught:
        check_studies(studies)
    assert all(f"row {row + 2}, study 's{row}'" in str(caught.value) for row in (3, 8, 21))


@pytest.mark.parametrize("label", [2, 0.5, "yes", np.inf])
def test_a_label_is_1_0_minus_1_or_blank(label):
    studies = table(["p0", "p1", "p2"])
    assert check_studies(studies.assign(Edema=[1, -1, np.nan])) is not None
    with pytest.raises(StudiesError, match="Edema is none of 1, 0, -1"):
        check_studies(studies.assign(Edema=[1, 0, label]))


@given(st.integers(0, 2**62), st.lists(st.text(st.characters(exclude_characters="|"))))
def test_a_phantom_reference_can_be_read_back(seed, mesh):
    assert parse_phantom_reference(phantom_reference(seed, mesh)) == (seed, mesh)


@pytest.mark.parametrize("ref", ["a.png", "phantom:", "phantom:x|Mass", "phantom:-1"])
def test_what_is_no_phantom_reference_is_refused(ref):
    with pytest.raises(ValueError, match="no phantom reference"):
        parse_phantom_reference(ref)
