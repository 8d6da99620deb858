"""What the phantom notebook cannot show: any combination of findings, hostile annotations."""
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counting import python_lines
from cxrvlm.phantom import (
    KINDS,
    Finding,
    findings_from_mesh,
    render,
    render_reference,
    visit_seed,
)
from cxrvlm.studies import phantom_reference
from strategies import FINDINGS

SEEDS = st.integers(0, 2**63 - 1)


@settings(deadline=None, max_examples=60)
@given(findings=st.lists(FINDINGS, max_size=5), seed=SEEDS, size=st.sampled_from([64, 65, 96]))
def test_any_findings_render_and_leave_a_mask(findings, seed, size):
    image, masks = render(findings, size, seed)
    assert image.dtype == np.uint8 and image.shape == (size, size)
    assert masks.dtype == bool and masks.shape == (len(findings), size, size)
    assert masks.any(axis=(1, 2)).all()
    again, masks_again = render(findings, size, seed)
    assert image.tobytes() == again.tobytes() and (masks == masks_again).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_at_its_faintest_is_visible_at_64_px(kind):
    for seed in range(4):
        image, masks = render([Finding(kind, severity=0.0)], 64, seed)
        assert masks[0].any()
        assert (image != render([], 64, seed)[0])[masks[0]].any()


@pytest.mark.parametrize("kind", ["effusion", "opacity", "pneumothorax", "nodule", "atelectasis", "rib_fracture", "chest_tube",
                                  "elevated_diaphragm", "scar", "hyperinflation", "calcified_granuloma"])
def test_the_patients_left_is_the_images_right(kind):
    for seed in range(6):
        for side, half in (("left", np.s_[:, 48:]), ("right", np.s_[:, :48])):
            mask = render([Finding(kind, side)], 96, seed)[1][0]
            assert mask[half].sum() > 0.9 * mask.sum()
        both = render([Finding(kind, "both")], 96, seed)[1][0]
        assert both[:, :48].any() and both[:, 48:].any()


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, low=st.floats(0, 0.8), more=st.floats(0.2, 0.9), kind=st.sampled_from(["cardiomegaly", "effusion"]))
def test_a_worse_finding_is_larger(seed, low, more, kind):
    side = "right" if KINDS[kind].side else ""
    areas = [render([Finding(kind, side, severity=s)], 96, seed)[1].sum() for s in (low, min(1.0, low + more))]
    assert areas[0] < areas[1]


@settings(deadline=None, max_examples=15)
@given(finding=FINDINGS, other=FINDINGS, seed=SEEDS)
def test_findings_do_not_move_each_other(finding, other, seed):
    if finding.kind == other.kind or KINDS[finding.kind].shapes or KINDS[other.kind].shapes:
        return
    alone, pair, swapped = (render(fs, 64, seed) for fs in ([finding], [other, finding], [finding, other]))
    assert (alone[1][0] == pair[1][1]).all()
    assert (pair[1][::-1] == swapped[1]).all()


def test_a_finding_changes_nothing_outside_itself():
    bare = render([], 128, 5)[0].astype(int)
    image, masks = render([Finding("nodule", "left", "upper lobe")], 128, 5)
    far = ~masks[0]
    far[np.argwhere(masks[0]).min(0)[0] - 6:, np.argwhere(masks[0]).min(0)[1] - 6:] = False
    assert (image == bare)[far].all() and (image != bare)[masks[0]].mean() > 0.9


def test_seeds_are_patients_and_high_bits_are_visits():
    first, again, other = (render([], 64, seed)[0].astype(float) for seed in (visit_seed(11), visit_seed(11, 1), 12))
    assert (first != again).mean() > 0.3
    same, different = (np.corrcoef(first.ravel(), image.ravel())[0, 1] for image in (again, other))
    assert same > different and len({render([], 64, seed)[0].tobytes() for seed in range(30)}) == 30


def test_sizes_show_the_same_patient():
    findings = [Finding("effusion", "left"), Finding("cardiomegaly"), Finding("mass", "right", "upper lobe")]
    for seed in range(4):
        small, large = (render(findings, size, seed) for size in (64, 256))
        shrunk = large[0].reshape(64, 4, 64, 4).mean((1, 3))
        assert np.corrcoef(small[0].ravel(), shrunk.ravel())[0, 1] > 0.97
        for a, b in zip(small[1], large[1], strict=True):
            b = b.reshape(64, 4, 64, 4).mean((1, 3)) > 0.5
            assert (a & b).sum() / (a | b).sum() > 0.6


def test_a_fresh_process_renders_the_same_bytes():
    code = ("import hashlib; from cxrvlm.phantom import Finding, render;"
            "image, _ = render([Finding('edema'), Finding('nodule')], 96, 77);"
            "print(hashlib.sha256(image.tobytes()).hexdigest())")
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": "1"})
    image, _ = render([Finding("edema"), Finding("nodule")], 96, 77)
    assert fresh.stdout.strip() == hashlib.sha256(image.tobytes()).hexdigest()


def test_a_phantom_is_drawn_without_a_loop_over_its_pixels():
    findings = [Finding("opacity", "left", "base"), Finding("cardiomegaly")]
    render(findings, 128, 0)  # what is made once is there
    assert all(python_lines(render, findings, size, 1) < 5000 for size in (64, 256))  # 3,394 today


@pytest.mark.parametrize("major", [[], [""], ["normal"], ["No Indexing"], ["///"], ["/left"], ["left"], ["Unknown Head/right"],
                                   [" "], ["Lung"], ["Technical Quality of Image Unsatisfactory "]])
def test_annotations_that_mean_nothing_give_no_finding(major):
    assert findings_from_mesh(major) == []


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_text_is_read_without_an_error(major):
    assert isinstance(findings_from_mesh(major), list)


def test_annotations_are_read_whatever_their_case_spaces_and_doubles():
    plain = findings_from_mesh(["Pleural Effusion/left/large"])
    assert plain == [Finding("effusion", "left", severity=0.9)]
    assert findings_from_mesh(["pleural  effusion/ LEFT /large ", "Pleural Effusion/left/large"]) == plain
    assert findings_from_mesh(["Nodule/lung/left/right"])[0].side == "both"


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Finding("effusion", side="bilateral"), "must be 'left'"),
    (lambda: Finding("effusion", severity=1.5), "between 0 and 1"),
    (lambda: render([Finding("gremlin")], 64, 0), "gremlin"),
    (lambda: render([], 0, 0), "16 pixels"),
    (lambda: findings_from_mesh("normal"), "takes a list"),
    (lambda: render_reference("a/file.png", 64), "phantom reference"),
])
def test_errors_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_reference_renders_what_it_says():
    ref = phantom_reference(8, ["Pleural Effusion/left", "normal"])
    assert (render_reference(ref, 64) == render([Finding("effusion", "left")], 64, 8)[0]).all()
