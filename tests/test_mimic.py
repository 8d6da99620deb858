"""MIMIC-CXR-JPG in miniature: the loader, the whole graph in both split modes, and that nothing of a patient leaks."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from marks import files_with_picture, files_with_text, likeness
from miniature import MARKER, marker_picture, unpack, write_mimic
from PIL import Image

from cxrvlm.images import ImageStore
from cxrvlm.mimic import beside_paper, load_mimic
from cxrvlm.settings import read_ini
from cxrvlm.studies import flow, patients_on_two_sides
from notebooks import copy_tree

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    "A folder with what goes wrong in real ones, and where it went wrong."
    root = tmp_path_factory.mktemp("data") / "mimic"
    return root, write_mimic(root, 90, spoil=True)


def load(root: Path, **options) -> tuple[pd.DataFrame, pd.DataFrame]:
    with warnings.catch_warnings(action="ignore"):
        return load_mimic(root, **options)


def test_every_study_is_a_pair_or_an_exclusion(spoilt):
    root, what = spoilt
    studies, exclusions = load(root)
    assert len(studies) + len(exclusions) == 90 and not patients_on_two_sides(studies)
    assert exclusions.reason.value_counts().to_dict() == {"no impression": 3, "no report": 1, "no frontal image (AP or PA)": 1}
    texts = studies.set_index("study_id").impression
    reports = what["reports"]
    assert set(exclusions.study_id[exclusions.reason == "no impression"]) == {reports[name] for name in ("no impression", "only marks", "empty")}
    assert texts[reports["NUL bytes"]] == "Small effusion." and texts[reports["Latin-1"]] == "Frühere Aufnahme, effusion."
    assert texts[reports["misspelt"]] == "Effusion." and len(texts[reports["long"]].split()) == 100_000 and texts[reports["one letter"]] == "A"
    assert flow(studies, exclusions).left.iloc[-1] == 85 and beside_paper(studies).loc["total", "pairs"] == 85


def test_unusable_images_are_counted_by_the_store(spoilt, tmp_path):
    root, what = spoilt
    studies, _ = load(root)
    failed = ImageStore.build(studies.image.tolist(), tmp_path, 32).failed.set_index("ref").reason
    assert set(failed.index) == set(what["images"].values()) & set(studies.image) and len(failed) == 6
    for name, words in [("truncated", "cannot be decoded"), ("missing", "no such file"), ("folder", "a folder"), ("one pixel", "1 x 1")]:
        assert words in failed[what["images"][name]]


@pytest.mark.parametrize("split", ["folder", "official"])
def test_packed_and_unpacked_are_the_same(tmp_path, split):
    write_mimic(tmp_path / "packed", 40, packed=True, images=False)
    write_mimic(tmp_path / "plain", 40, packed=False, images=False)
    packed, plain = (load(tmp_path / name, split=split)[0] for name in ("packed", "plain"))
    assert all(image.startswith(str(tmp_path / "packed/files/p1")) for image in packed.image)
    pd.testing.assert_frame_equal(packed.drop(columns="image"), plain.drop(columns="image"))
    unpack(tmp_path / "packed/mimic-cxr-2.0.0-metadata.csv.gz")
    pd.testing.assert_frame_equal(load(tmp_path / "packed", split=split)[0], packed)


def test_the_two_splits(tmp_path):
    write_mimic(tmp_path, 60, images=False)
    by_folder, official = (load(tmp_path, split=split)[0] for split in ("folder", "official"))
    assert by_folder.groupby(by_folder.patient_id.str[:2]).split.unique().map(list).to_dict() == {
        "10": ["test"], "11": ["validation"], **{str(n): ["train"] for n in range(12, 20)}}
    assert official.set_index("study_id").split.to_dict() != by_folder.set_index("study_id").split.to_dict()
    splits = pd.read_csv(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", dtype=str).replace({"validate": "validation"})
    assert official.split.tolist() == splits.drop_duplicates("study_id").set_index("study_id").split[official.study_id].tolist()


def test_a_study_that_the_official_split_lacks_is_counted(tmp_path):
    write_mimic(tmp_path, 40, images=False)
    path = tmp_path / "mimic-cxr-2.0.0-split.csv.gz"
    table = pd.read_csv(path, dtype=str)
    table[table.study_id != "50000007"].to_csv(path, index=False)
    studies, exclusions = load(tmp_path, split="official")
    assert exclusions.values.tolist() == [["50000007", "not in the official split"]] and len(studies) == 39


def test_views(tmp_path):
    "The first frontal image by dicom_id, or all of them."
    write_mimic(tmp_path, 30, images=False)
    path = tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    table = pd.read_csv(path, dtype=str)
    more = table[table.study_id == "50000004"].iloc[:1].assign(dicom_id="00000000-first", ViewPosition="pa ")
    pd.concat([table, more]).to_csv(path, index=False)
    first, every = (load(tmp_path, views=views)[0] for views in ("first", "all"))
    assert len(first) == 30 and len(every) == 31
    assert Path(first.set_index("study_id").image["50000004"]).stem == "00000000-first"
    assert every[every.study_id == "50000004"].impression.nunique() == 1


# The graph


def preset_text(source: Path, **changes) -> str:
    "[little]: smoke, on the miniature."
    _, parser = read_ini()
    values = dict(parser["smoke"]) | {"source": "mimic", "data": str(source), "pairs": "0", "split": "folder", "arms": "ours", "fractions": "1"} | changes
    return "\n[little]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def call(root: Path, *command: str) -> tuple[int, str]:
    "Run a command of the virtual environment with the package of `root`."
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(spoilt, tmp_path_factory):
    "A clone in which the whole graph has run on the miniature."
    root = copy_tree(tmp_path_factory.mktemp("clone"))
    with (root / "settings.ini").open("a") as file:
        file.write(preset_text(spoilt[0]))
    code, output = call(root, "snakemake", "--cores", "2", "little")
    assert code == 0, output
    (root / "runs/snakemake.log").write_text(output)
    return root


def test_the_whole_graph_runs_on_mimic(finished):
    results = [json.loads(path.read_text()) for path in finished.glob("runs/little/*/*/*/result.json")]
    assert len(results) == 1 and 0 < results[0]["metrics"]["auroc"] < 1 and results[0]["counts"]["test"]
    record = json.loads((finished / "runs/little/data/data.json").read_text())
    assert sum(record["pairs"].values()) == 85 and len(record["unreadable"]) == 6
    notebook = (finished / "runs/little/data/prepare_data.ipynb").read_text()
    assert "paper, Table 1" in notebook and "no frontal image (AP or PA)" in notebook
    assert (finished / "runs/little/figures/retrieval_curve.png").exists()


def test_the_official_split_trains_too(spoilt, finished, tmp_path):
    root = copy_tree(tmp_path)
    with (root / "settings.ini").open("a") as file:
        file.write(preset_text(spoilt[0], split="official"))
    run = root / "runs/little/baseline/1/0"
    run.mkdir(parents=True)
    code, output = call(root, "papermill", "nbs/experiments/train_vlm.ipynb", str(run / "train_vlm.ipynb"), "-k", "python3", "-p", "preset", "little")
    assert code == 0, output
    official, folder = (json.loads((place / f"runs/little/{arm}/1/0/result.json").read_text()) for place, arm in ((root, "baseline"), (finished, "ours")))
    assert official["data"] != folder["data"] and official["counts"]["test"] != 0


def test_no_text_and_no_picture_of_a_patient_is_left_anywhere(finished):
    "Only the store holds pixels: it is what the runs read."
    text = files_with_text(finished / "runs", MARKER)
    assert text == [], f"a report's words stand in {text}"
    assert files_with_text(finished / "nbs", MARKER) == files_with_text(finished / "paper_figures", MARKER) == []
    shown = files_with_picture(finished / "runs", marker_picture())
    assert shown == [], f"a radiograph is shown in {shown}"
    store = ImageStore.open(finished / "runs/little/data")
    marked = next(ref for ref in store.rows if likeness(store[ref].astype(float), marker_picture()) > 0.8)
    pixels = store[marked].tobytes()[:96]
    holders = [path for path in (finished / "runs").rglob("*") if path.is_file() and pixels in path.read_bytes()]
    assert [path.name for path in holders] == ["pixels.npy"]


def test_examples_are_refused_unless_asked_for_and_then_lie_below_runs(finished):
    "The same search as above finds the marker here: it can fail."
    assert not list(finished.rglob("retrieved_examples*.png")) and not list(finished.rglob("figure_6*.png"))
    store = ImageStore.open(finished / "runs/little/data")
    marked = next(ref for ref in store.rows if likeness(store[ref].astype(float), marker_picture()) > 0.8)
    name = Path(marked).parent.name[1:]
    table = pd.DataFrame({"query": name, "study_id": name, "shown": ["own", "top", "top", "least"], "rank": [1, 1, 2, 9], "similarity": 0.5})
    examples = finished / "runs/little/examples.csv"
    table.to_csv(examples, index=False)
    base = ["papermill", "paper_figures/retrieved_examples.ipynb", "runs/little/examples.ipynb", "-k", "python3", "-p", "preset", "little",
            "-p", "examples", str(examples)]
    code, output = call(finished, *base, "-p", "output", "runs/little/figures")
    assert code != 0 and "the data of the preset little are restricted" in output and "show_restricted=True" in output
    code, output = call(finished, *base, "-p", "show_restricted", "True", "-p", "output", "results/little")
    assert code != 0 and "may only be written below runs" in output
    code, output = call(finished, *base, "-p", "show_restricted", "True", "-p", "show_text", "True", "-p", "output", "runs/little/figures")
    assert code == 0, output
    assert files_with_picture(finished / "runs", marker_picture()) == [finished / "runs/little/figures/retrieved_examples.png"]
    assert files_with_text(finished / "runs", MARKER) == []


def test_the_search_for_a_picture_can_find_and_can_fail(tmp_path):
    "In a PNG, in base64, in any bytes; other pictures are not taken for it."
    rng = np.random.default_rng(0)
    page = rng.integers(0, 255, (300, 400)).astype(np.uint8)
    Image.fromarray(page).save(tmp_path / "noise.png")
    assert files_with_picture(tmp_path, marker_picture()) == []
    page[40:140, 200:300] = Image.fromarray(marker_picture()).resize((100, 100))
    Image.fromarray(page).convert("RGB").save(tmp_path / "page.jpg", quality=70)
    (tmp_path / "events").write_bytes(b"abc" + (tmp_path / "page.jpg").read_bytes() + b"xyz")
    assert [path.name for path in files_with_picture(tmp_path, marker_picture())] == ["events", "page.jpg"]
