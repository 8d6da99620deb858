"""cxrvlm check: what it must find in a table, what it must not, and its exit codes."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from cxrvlm.check import NEAR, SAME, as_json, as_text, check_table, hash_square, inspect_image, near_pairs, tie_ceiling
from cxrvlm.images import to_square
from cxrvlm.phantom import render_reference
from cxrvlm.retrieval import retrieval_auroc
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import load_settings

NIH = Path(__file__).resolve().parents[2] / "shared/data/nih"
SMOKE = load_settings("smoke")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "Ninety phantoms as PNG files."
    folder = tmp_path_factory.mktemp("table")
    for number, ref in enumerate(sample_studies(90, seed=3).image):
        Image.fromarray(render_reference(ref, 64)).save(folder / f"{number:02}.png")
    return folder


def table(**changes) -> pd.DataFrame:
    "Ninety pairs that are as they should be, and what differs."
    rows = pd.DataFrame({"image": [f"{n:02}.png" for n in range(90)], "patient_id": [f"p{n:02}" for n in range(90)]})
    rows["report"] = [f"Small effusion number {n}." for n in range(90)]
    rows["split"] = np.repeat(["train", "validation", "test"], 30)
    for column, cells in changes.items():
        for row, value in cells.items():
            rows.loc[row, column] = value
    return rows


def check(home: Path, rows: pd.DataFrame):
    rows.to_csv(home / "mine.csv", index=False)
    return check_table(home / "mine.csv", SMOKE)


def test_a_good_table_has_no_error(home):
    report = check(home, table())
    assert report.ok and report.counts["pairs"] == report.counts["patients"] == report.counts["images"] == 90
    assert report.counts["identical images across splits"] == 0
    assert report.counts["reports with a twin"] == report.counts["unusable images"] == 0


@pytest.mark.parametrize(("about", "level", "words", "changes"), [
    ("split", "error", "patients in more than one split: 1 (p05)", {"patient_id": {80: "p05"}}),
    ("identical images", "error", "05.png (train) = again.png (test)", {"image": {80: "again.png"}}),
    ("images", "warning", "there is no such file", {"image": {4: "gone.png"}}),
    ("images", "error", "unusable, and left out by every run: 60 of 90", {"image": {n: f"gone{n}.png" for n in range(60)}}),
    ("images", "warning", "files that belong to more than one study: 1", {"image": {6: "05.png"}, "study_id": {n: f"s{n}" for n in range(90)}}),
    ("patients", "warning", "P05, p05", {"patient_id": {6: "P05"}}),
    ("reports", "note", "reports with the words of another: 3 of 90", {"report": {7: "Clear.", 8: "clear.", 9: "Clear."}}),
    ("reports", "error", "all reports have the same words", {"report": {n: "Clear." for n in range(90)}}),
    ("rows", "warning", "left out, no impression: 2", {"report": {3: "", 4: "___"}}),
    ("length", "warning", "reports (11.1%) are cut at 32 tokens", {"report": {n: "effusion " * 60 for n in range(10)}}),
    ("table", "warning", "2 of 90 rows have no patient_id", {"patient_id": {1: "", 2: ""}}),
    ("table", "error", "row 5: the image '../x.png' lies outside", {"image": {3: "../x.png"}}),
    ("split", "error", "pairs for test: 0", {"split": {n: "train" for n in range(60, 90)}}),
    ("labels", "warning", "that nobody has: Edema", {"Edema": {n: 0 for n in range(90)}}),
])  # fmt: skip
def test_each_fault_is_found(home, about, level, words, changes):
    buffer = io.BytesIO()
    Image.open(home / "05.png").save(buffer, "jpeg", quality=50)
    (home / "again.png").write_bytes(buffer.getvalue())
    report = check(home, table(**changes))
    found = [remark for remark in report.remarks if remark.about == about and words in remark.text]
    assert [remark.level for remark in found] == [level], as_text(report)
    assert report.ok == (level != "error") and json.loads(as_json(report))["ok"] == report.ok


def test_no_report_is_shown(home):
    rows = table(report={n: f"zyzzyva {n % 3}" for n in range(90)}, Edema={n: "quokka" for n in range(90)})
    report = check(home, rows)
    assert not any(word in as_text(report) + as_json(report) for word in ("zyzzyva", "quokka"))


def test_without_patients_each_row_is_one(home):
    report = check(home, table().drop(columns=["patient_id", "split"]))
    assert report.counts["patients"] == 90 and any("no row has patient_id" in remark.text for remark in report.remarks)


def test_the_command_and_its_exit_codes(home):
    table().to_csv(home / "good.csv", index=False)
    table(patient_id={80: "p05"}).to_csv(home / "bad.csv", index=False)
    for name, code in (("good.csv", 0), ("bad.csv", 1), ("none.csv", 1)):
        command = [Path(sys.executable).with_name("cxrvlm"), "check", home / name, "--preset", "smoke", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["ok"] == (code == 0) and "Traceback" not in done.stderr


def test_the_ceiling_is_what_a_perfect_model_reaches():
    "Equal reports have one embedding, different ones are told apart without error."
    import torch
    rng = np.random.default_rng(0)
    groups = pd.Series(rng.integers(0, 20, 60))
    texts = torch.eye(20)[groups.tolist()]
    assert retrieval_auroc(texts, texts) == pytest.approx(tie_ceiling(groups))


def test_hashes_of_phantoms_and_of_what_cannot_be_read(tmp_path):
    assert inspect_image("phantom:3|normal") == inspect_image("phantom:3|normal") and len(inspect_image("phantom:3|normal")["hash"]) == 32
    assert "no such file" in inspect_image(str(tmp_path / "x.png"))["reason"]


def test_near_pairs_are_only_those_across_splits():
    hashes = [bytes(32), bytes(32), bytes(31) + b"\x07", bytes([255] * 32)]
    sides = np.array(["train", "train", "test", "test"])
    assert sorted(near_pairs(hashes, sides, 3)) == [(0, 2, 3), (1, 2, 3)] and near_pairs(hashes, sides, 2) == []


def test_the_limits_on_real_radiographs():
    "NIH: copies are found, and 1,000 different images are told apart, but for one pair that is the same picture."
    if not NIH.is_dir():
        pytest.skip(f"no folder {NIH}")
    files = sorted((NIH / "images").iterdir())
    pictures = [Image.open(path).convert("L") for path in files]
    hashes = [hash_square(to_square(picture, 256)) for picture in pictures]
    words = np.frombuffer(b"".join(hashes), np.uint64).reshape(len(files), -1)
    apart = np.bitwise_count(words[:, None] ^ words).sum(-1, dtype=int)[np.triu_indices(len(files), 1)]
    assert (apart <= NEAR).sum() == (apart <= 40).sum() == 1
    changes = [lambda p: p.resize((p.width // 2, p.height // 2)), lambda p: ImageEnhance.Brightness(p).enhance(1.2)]
    for change in changes:
        copies = [hash_square(to_square(change(picture), 256)) for picture in pictures[:50]]
        bits = [(int.from_bytes(a) ^ int.from_bytes(b)).bit_count() for a, b in zip(hashes, copies, strict=False)]
        assert max(bits) <= NEAR and np.median(bits) <= SAME
