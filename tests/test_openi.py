"""Open-i against torchxrayvision's own reader, real file names, and folders that are not what they should be."""

import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm import openi
from cxrvlm.openi import MESH_LABELS, frontal_image, image_id, load_openi, mesh_labels, read_reports, read_views
from cxrvlm.studies import CHEXPERT_LABELS, COLUMNS, is_phantom, parse_phantom_reference

PNGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi_png"
ALL = 3955


@pytest.fixture(scope="module")
def reports():
    return read_reports()


@pytest.fixture(scope="module")
def phantoms():
    return load_openi()


@pytest.fixture
def read_once(monkeypatch, reports):
    """Reading the archive takes a second; where the folder is what is tested, once is enough."""
    monkeypatch.setattr(openi, "read_reports", reports.copy)


def folder_with(tmp_path, *names):
    for name in names:
        (tmp_path / name).touch()
    return tmp_path


def test_every_report_is_a_pair_or_an_exclusion(phantoms, reports):
    studies, exclusions = phantoms
    assert len(studies) == 3820
    assert (studies.findings != "").sum() == 3331
    assert exclusions.groupby("reason").size().to_dict() == {"no image": 104, "no impression": 31}
    assert sorted([*studies.study_id, *exclusions.study_id]) == sorted(reports.study_id)
    assert list(studies.columns) == [*COLUMNS, *MESH_LABELS]
    assert set(MESH_LABELS) < set(CHEXPERT_LABELS)
    assert (studies.patient_id == studies.study_id).all()


def test_two_calls_give_the_same(phantoms, read_once):
    again = load_openi()
    for one, other in zip(phantoms, again, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_phantoms_carry_the_annotation_and_differ(phantoms, reports):
    studies, _ = phantoms
    assert studies.image.map(is_phantom).all()
    seeds, mesh = zip(*studies.image.map(parse_phantom_reference), strict=True)
    assert len(set(seeds)) == len(studies)
    assert list(mesh) == reports.set_index("study_id").mesh[studies.study_id].tolist()
    assert studies.set_index("study_id").image["CXR1"] == f"phantom:{seeds[0]}|normal"


def test_the_reports_are_those_that_torchxrayvision_reads(reports):
    theirs = pytest.importorskip("torchxrayvision").datasets.Openi_Dataset(
        "nowhere", views=["PA", "L"], use_tsne_derived_view=True).csv
    ours = reports[reports.images.map(len) > 0].set_index("study_id").loc[theirs.uid]
    assert len(theirs) == ALL - 104
    assert ours.images.str[0].tolist() == theirs.imageid.tolist()
    for column, other in (("mesh", "labels_major"), ("automatic", "labels_automatic")):
        joined = ours[column].map(lambda terms: "|".join(np.unique([t.lower() for t in terms])))
        clean = theirs[other].map(lambda terms: "|".join(np.unique([" ".join(t.split()) for t in terms.split("|")])))
        assert joined.tolist() == clean.tolist()


def test_views_are_never_frontal_where_either_source_says_lateral():
    sources, views = openi.read_sources(), read_views()
    lateral = sources.index[(sources.tsne == "L") | sources.dicom.isin(["LL", "RL", "LATERAL", "LARGE LATERAL"])]
    assert all(views[image] == "lateral" for image in lateral)
    assert len(lateral) > 1000


@settings(deadline=None)
@given(st.lists(st.sampled_from(["frontal", "lateral", None]), max_size=5))
def test_the_frontal_image_is_never_lateral(kinds):
    images = [f"image{i}" for i in range(len(kinds))]
    views = {image: kind for image, kind in zip(images, kinds, strict=True) if kind}
    chosen = frontal_image(images, views)
    if set(kinds) <= {"lateral"}:
        assert chosen == ""
    else:
        expected = "frontal" if "frontal" in kinds else None
        assert chosen == images[kinds.index(expected)]


@settings(deadline=None)
@given(st.lists(st.sampled_from([choice for choices in MESH_LABELS.values() for choice in choices]), min_size=1), st.randoms())
def test_labels_do_not_depend_on_the_order_or_on_further_terms(mesh, random):
    labels = mesh_labels(mesh)
    shuffled = [*mesh, "Scoliosis/mild", "Pericardial Effusion", "Nodule/breast", "Opacity/ribs"]
    random.shuffle(shuffled)
    assert mesh_labels(shuffled) == labels
    assert set(labels.values()) == {0.0, 1.0} or set(labels.values()) == {1.0}


@pytest.mark.parametrize(("mesh", "present"), [
    (["normal"], {"No Finding"}),
    (["Pericardial Effusion/mild"], set()),
    (["Hydropneumothorax/left"], {"Pleural Effusion", "Pneumothorax"}),
    (["Opacity/lung/base/left", "Opacity/ribs"], {"Lung Opacity"}),
    (["Opacity/ribs/right"], set()),
    (["Calcified Granuloma/lung/right"], set()),
    (["Pulmonary Emphysema", "Pulmonary Edema/mild"], {"Edema"}),
    (["Thickening/pleura/apex"], {"Pleural Other"}),
    (["Technical Quality of Image Unsatisfactory", "Cardiomegaly/borderline"], {"Cardiomegaly"}),
])
def test_labels_of_some_annotations(mesh, present):
    assert {label for label, value in mesh_labels(mesh).items() if value == 1} == present


@pytest.mark.parametrize("mesh", [[], ["No Indexing"], ["Technical Quality of Image Unsatisfactory"]])
def test_without_information_every_label_is_unknown(mesh):
    assert all(np.isnan(value) for value in mesh_labels(mesh).values())


def test_the_real_images(read_once):
    if not PNGS.is_dir():
        pytest.skip(f"no folder {PNGS}")
    studies, exclusions = load_openi(PNGS)
    paired = dict(zip(studies.study_id, studies.image.map(lambda path: Path(path).name), strict=True))
    # seen by eye: the pairs are frontal; CXR100's only file is a lateral view
    assert paired == {
        "CXR7": "CXR7_IM-2263-1001.png", "CXR25": "CXR25_IM-1024-2001.png", "CXR54": "CXR54_IM-2145-1001.png",
        "CXR303": "CXR303_IM-1404-1001.png", "CXR1000": "CXR1000_IM-0003-1001.png",
        "CXR1001": "CXR1001_IM-0004-1001.png", "CXR1900": "CXR1900_IM-0584-1001.png"}
    assert all(Path(path).is_file() for path in studies.image)
    reasons = exclusions.set_index("study_id").reason
    assert reasons["CXR100"] == "frontal image not in the folder"
    assert len(studies) + len(exclusions) == ALL and reasons.index.is_unique


def test_a_whole_collection_in_another_spelling(tmp_path, reports, read_once):
    names = [image.replace("CXR1_1_", "CXR1_").removeprefix("CXR") + ".dcm.png" for image in reports.images.explode().dropna()]
    studies, exclusions = load_openi(folder_with(tmp_path, *names))
    assert len(studies) == 3820 - 162
    assert exclusions.reason.value_counts().to_dict() == {"no frontal image": 162, "no image": 104, "no impression": 31}


@pytest.mark.parametrize(("name", "expected"), [
    ("CXR1000_IM-0003-1001.png", "CXR1000_IM-0003-1001"),
    ("1000_IM-0003-1001.dcm.png", "CXR1000_IM-0003-1001"),
    ("1_IM-0001-4001.dcm.png", "CXR1_1_IM-0001-4001"),
    ("CXR1_1_IM-0001-4001.png", "CXR1_1_IM-0001-4001"),
    ("CXR11_IM-0067-1001.jpg", "CXR11_IM-0067-1001"),
])
def test_image_ids(name, expected):
    assert image_id(name) == expected


def test_folders_that_are_not_what_they_should_be(tmp_path, read_once):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_openi(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 images, but none named like CXR1000"):
        load_openi(tmp_path)
    folder_with(tmp_path, "notes.txt", "a.png", "CXR1001_IM-0004-1001.txt")
    with pytest.raises(ValueError, match="1 images, but none named like CXR1000"):
        load_openi(tmp_path)
    with pytest.raises(ValueError, match="a.png is not a folder"):
        load_openi(tmp_path / "a.png")


def test_images_of_no_report_are_told(tmp_path, read_once):
    folder_with(tmp_path, "CXR1001_IM-0004-1001.png", "CXR9999_IM-0001-1001.png")
    with pytest.warns(UserWarning, match="no report: 1, e.g. CXR9999_IM-0001-1001.png"):
        studies, exclusions = load_openi(str(tmp_path))
    assert studies.study_id.tolist() == ["CXR1001"] and len(exclusions) == ALL - 1


def test_a_lateral_file_is_never_paired(tmp_path, read_once):
    studies, exclusions = load_openi(folder_with(tmp_path, "CXR100_IM-0002-2001.png"))
    assert len(studies) == 0 and list(studies.columns) == [*COLUMNS, *MESH_LABELS]
    assert len(exclusions) == ALL


def test_without_torchxrayvision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(openi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchxrayvision"):
        load_openi()


def test_a_broken_archive_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "broken.tgz").write_bytes(b"not an archive")
    monkeypatch.setattr(openi, "wheel_file", lambda name: tmp_path / "broken.tgz")
    with pytest.raises(tarfile.ReadError):
        read_reports()
