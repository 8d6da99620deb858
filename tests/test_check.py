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

from cxrvlm.check import (
    NEAR,
    SAME,
    SPREAD,
    as_json,
    as_text,
    check_preset,
    check_table,
    hash_square,
    inspect_image,
    near_pairs,
    smallest_gain,
    tie_ceiling,
)
from cxrvlm.data import load_studies
from cxrvlm.downstream import conditions
from cxrvlm.images import to_square
from cxrvlm.phantom import render_reference
from cxrvlm.results import read_beside
from cxrvlm.retrieval import retrieval_auroc
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import from_root, load_settings, replace

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
    rows["report"] = [f"FINDINGS: Effusion, number {n}.\nIMPRESSION: Small effusion number {n}." for n in range(90)]
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
    ("images", "error", "there is no such file", {"image": {4: "gone.png"}}),
    ("images", "error", "unusable: 60 of 90; a run stops, for unreadable = 0.01", {"image": {n: f"gone{n}.png" for n in range(60)}}),
    ("images", "warning", "files that belong to more than one study: 1", {"image": {6: "05.png"}, "study_id": {n: f"s{n}" for n in range(90)}}),
    ("table", "warning", "P05, p05", {"patient_id": {6: "P05"}}),
    ("table", "error", "1,234 in row 8 is there without its commas too", {"patient_id": {6: "1,234", 7: "1234"}}),
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


def test_a_heading_that_was_missed_is_counted_in_rows_that_are_left_out_too(home):
    report = check(home, table(report={3: "FINDINGS: Clear. Results: normal.", 4: "Diagnosis\nNormal."}))
    assert any("2 look as if they held a heading that was not found (row 5, row 6), 1 of them left out" in remark.text for remark in report.remarks)


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


# What check passes, a run can use


def mine(home: Path, **changes):
    "A preset whose data are a table with a split of its own."
    return replace(SMOKE, source="table", pairs=0, data=str(home / "mine.csv"), split="column", **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"batch_size": 31}, "pairs for validation: 30. A batch has 31: lower batch_size"),
    ({"simclr_batch_size": 64}, "images for validation: 30. A batch has 64: lower simclr_batch_size"),
    ({"cxrbert_batch_size": 64}, "reports with findings and impression for validation: 30. A batch has 64: lower cxrbert_batch_size"),
    ({"vocab_size": 100}, None),
    ({"split": "patient", "batch_size": 20}, "pairs for validation: 9. A batch has 20: lower batch_size"),
])  # fmt: skip
def test_a_batch_that_a_split_does_not_fill_is_an_error(home, changes, words):
    "And the advice helps: with the setting lowered, the error is gone."
    table().to_csv(home / "mine.csv", index=False)
    found = [remark.text for remark in check_preset(replace(mine(home), **changes)).remarks if remark.level == "error"]
    assert [text for text in found if words in text] if words else found == []
    if words:
        key, size = next((key, value) for key, value in changes.items() if "batch_size" in key), int(words.split(": ")[1].split(".")[0])
        again = check_preset(replace(mine(home), **changes | {key[0]: size}))
        assert not any(words.split(":")[0] in remark.text and remark.level == "error" for remark in again.remarks), as_text(again)


def test_a_table_without_findings_cannot_match_them(home):
    table(report={n: f"Small effusion number {n}." for n in range(90)}).to_csv(home / "mine.csv", index=False)
    assert any("set cxrbert_rsm = 0" in remark.text for remark in check_preset(mine(home)).remarks if remark.level == "error")
    assert check_preset(mine(home, cxrbert_rsm=0)).ok


def test_a_preset_can_be_told_what_check_can(home, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(table(report={3: "FINDINGS: Größer.\nIMPRESSION: Früher."}).to_csv(index=False).encode("latin-1"))
    settings = replace(mine(home), data=str(path), root=str(home), encoding="latin-1")
    assert check_preset(settings).ok and check_table(path, settings, home, "latin-1").ok
    studies, _ = load_studies(settings)
    assert studies.impression[3] == "Früher." and Path(studies.image[3]).parent == home


def test_everything_is_said_in_one_go(home):
    (home / "cut.png").write_bytes((home / "05.png").read_bytes()[:100])
    rows = table(image={3: "../x.png", 4: "gone.png", 5: "cut.png"}, patient_id={80: "p07"}, split={9: "holdout"}, Edema={n: n % 2 for n in range(89)} | {89: 7})
    text = as_text(check(home, rows))
    for words in ("row 5: the image '../x.png'", "there is no such file", "cut.png", "more than one split: 1 (p07)", "split 'holdout' in row 11", "row 91; use 1, 0, -1"):
        assert words in text, text


def test_lengths_name_the_setting_that_fits_and_unknown_words_are_counted(home):
    rows = table(report={n: "FINDINGS: x\nIMPRESSION: " + "effusion " * 60 for n in range(10)} | {80: "FINDINGS: x\nIMPRESSION: 所見 ☃ effusion"})
    report = check(home, rows)
    advised = int(as_text(report).split("max_tokens = ")[1].split()[0])
    assert report.counts["unknown tokens"] > 0 and "are [UNK], in 1 of 90 reports" in as_text(report)
    assert check_table(home / "mine.csv", replace(SMOKE, max_tokens=advised)).counts["cut reports"] == 0
    assert check_table(home / "mine.csv", replace(SMOKE, max_tokens=advised - 1)).counts["cut reports"] > 0


def test_no_finding_is_no_finding(home):
    names = ["No finding", "no_finding", "NO FINDING", "No Finding", "normal", "Pleural_Other", "Mass"]
    assert conditions(pd.DataFrame(columns=names)) == ["Mass"]
    report = check(home, table(**{"No finding": {n: n % 2 for n in range(90)}}))
    assert "neither asked for nor probed: No finding" in as_text(report)


def test_one_name_for_many_patients(home):
    assert "'nobody' has 30 of 90 pairs" in as_text(check(home, table(patient_id={n: "nobody" for n in range(30)})))


def test_the_spread_of_gains_is_the_demos():
    "SPREAD is what arms gained over the baseline in results/demo: the middle of their standard deviations over patients."
    table = read_beside(from_root("results/demo/runs.csv"), "placements.csv")
    wide = table[table.matching == "global"].pivot_table(index="patient_id", columns=["arm", "fraction", "seed"], values="value")
    gains = [wide[key] - wide[("baseline", *key[1:])] for key in wide if key[0] != "baseline" and ("baseline", *key[1:]) in wide]
    assert len(gains) > 20 and abs(np.median([gain.std() for gain in gains]) - SPREAD) < 0.05
    assert smallest_gain(400) == pytest.approx(1.96 * SPREAD / 20)


def test_a_few_unusable_images_are_a_warning_and_more_than_the_setting_allows_an_error(home):
    table(image={5: "gone.png"}).to_csv(home / "mine.csv", index=False)
    for allowed, level in ((0.01, "error"), (0.02, "warning")):
        found = check_table(home / "mine.csv", replace(SMOKE, unreadable=allowed))
        assert {remark.level for remark in found.remarks if "unusable" in remark.text} == {level}


def test_what_stage_1_lacks_is_an_error_where_the_preset_was_named(home):
    "Nobody asked for the arms of the demo who only wants to know whether a table is sound."
    table().to_csv(home / "mine.csv", index=False)
    large = replace(SMOKE, simclr_batch_size=1000)
    levels = {named: [r.level for r in check_table(home / "mine.csv", large, named=named).remarks if r.about.startswith("stage 1")] for named in (True, False)}
    assert set(levels[True]) == {"error"} and set(levels[False]) == {"warning"}


@pytest.mark.parametrize(("changes", "level"), [({"text_encoder": "nobody/nothing", "tokenizer": "nobody/nothing"}, "error"), ({"image_weights": "gone.pt"}, "error"),
                                                ({"arms": ("baseline", "text-clinicalbert")}, "warning")])
def test_weights_that_are_not_there_are_said_before_the_run_says_it(home, monkeypatch, tmp_path, changes, level):
    monkeypatch.setattr("cxrvlm.weights.reachable", lambda url: False)
    table().to_csv(home / "mine.csv", index=False)
    settings = replace(SMOKE, weights=str(tmp_path), **changes)
    report = check_table(home / "mine.csv", settings)
    assert [remark.level for remark in report.remarks if remark.about == "weights of smoke"] == [level] and report.ok == (level == "warning")
    assert check_table(home / "mine.csv", settings, named=False).ok


@pytest.mark.parametrize(("key", "words"), [("image_weights", "does not fit image_encoder = resnet18"), ("text_encoder", "make no tokenizer"), ("tokenizer", "make no tokenizer")])
def test_weights_of_ones_own_that_do_not_fit_are_said(home, tmp_path, key, words):
    import torch
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "own.pt")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/tokenizer.json").write_text("{}")
    (tmp_path / "own/config.json").write_text('{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 300}')
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "own/pytorch_model.bin")
    table().to_csv(home / "mine.csv", index=False)
    report = check_table(home / "mine.csv", replace(SMOKE, **{key: str(tmp_path / ("own.pt" if key == "image_weights" else "own"))}))
    assert [remark.text for remark in report.remarks if remark.about == "weights of smoke" and words in remark.text and remark.level == "error"]


@pytest.mark.parametrize("name", ["timm:resnet999", "resnet19"])
def test_an_image_encoder_that_there_is_not_is_said(home, name):
    table().to_csv(home / "mine.csv", index=False)
    for named, level in ((True, "error"), (False, "warning")):
        report = check_table(home / "mine.csv", replace(SMOKE, image_encoder=name, image_weights="random"), named=named)
        assert [remark.level for remark in report.remarks if remark.about == "encoder of smoke" and name in remark.text] == [level]
    assert not [remark for remark in check_table(home / "mine.csv", SMOKE).remarks if remark.about.startswith("encoder")]


def test_an_encoder_and_the_vocabulary_of_another_are_refused(home, tmp_path):
    from transformers import BertConfig, BertForMaskedLM
    BertForMaskedLM(BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).save_pretrained(tmp_path)
    table().to_csv(home / "mine.csv", index=False)
    mine = replace(SMOKE, text_encoder=str(tmp_path))
    said = [as_text(check_table(home / "mine.csv", mine))]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"zyxwvutsrqponmlkjihgfedcba", *(f"##{letter}" for letter in "zyxwvutsrqponmlkjihgfedcba")]))
    said += [as_text(check_table(home / "mine.csv", settings)) for settings in (mine, replace(mine, tokenizer=str(tmp_path)))]
    assert "has no vocabulary in it" in said[0] and "is another one than the tokenizer's" in said[1] and "weights of smoke" not in said[2]


def test_weights_of_a_training_that_failed_are_refused(home, tmp_path):
    import torch
    torch.save({"conv1.weight": torch.tensor([float("nan")])}, tmp_path / "own.pt")
    table().to_csv(home / "mine.csv", index=False)
    assert "own.pt: conv1.weight holds numbers that are infinite or no numbers" in as_text(check_table(home / "mine.csv", replace(SMOKE, image_weights=str(tmp_path / "own.pt"))))


def test_mirrors_and_sides(home):
    rows = table(report={n: f"FINDINGS: Clear.\nIMPRESSION: Left effusion number {n}." for n in range(3)})
    rows.to_csv(home / "mine.csv", index=False)
    said = [as_text(check_table(home / "mine.csv", replace(SMOKE, vlm_flip=flip))) for flip in (0, 0.5)]
    assert "name a side" not in said[0] and "3 of 90 name a side, and vlm_flip = 0.5 mirrors images and not words" in said[1]
