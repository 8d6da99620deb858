"""Data that change: what was made from them before is not gone on with, not mixed, and made again."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature import write_mimic
from PIL import Image

from cxrvlm.data import data_fingerprint, load_studies, make_tokenizer, open_store, watch_source
from cxrvlm.images import ImageError
from cxrvlm.initialisation import build_model
from cxrvlm.results import over_seeds, paired_gains, read_results
from cxrvlm.settings import digest, load_arm, load_settings, read_ini, replace
from cxrvlm.studies import fingerprint
from cxrvlm.training import load_checkpoint, save_checkpoint
from notebooks import ROOT, copy_tree


def picture(path, number):
    small = np.random.default_rng(number).integers(0, 256, (6, 6)).astype(np.uint8)
    Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def mine(tmp_path):
    "A table of forty pairs and its settings."
    for number in range(40):
        picture(tmp_path / f"{number}.png", number)
    rows = [{"image": f"{n}.png", "patient_id": f"p{n}", "report": f"Small effusion number {n}."} for n in range(40)]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    return replace(load_settings("smoke"), source="table", data=str(tmp_path / "mine.csv"), pairs=0, image_size=32)


def prepare(settings, folder):
    "What prepare_data does, as far as it matters here."
    studies, _ = load_studies(settings)
    store = open_store(settings, studies, folder)
    (folder / "data.json").write_text(json.dumps({"store": store.folder.name}))
    return studies, store


def edit(settings, old, new):
    with open(settings.data) as file:
        text = file.read()
    assert old in text
    with open(settings.data, "w") as file:
        file.write(text.replace(old, new))


def test_the_data_of_a_record_are_the_table_and_the_pictures(mine, tmp_path):
    studies, store = prepare(mine, tmp_path)
    first = data_fingerprint(studies, store)
    assert first != fingerprint(studies) and first == data_fingerprint(*prepare(mine, tmp_path))
    picture(tmp_path / "7.png", 1000)
    mended = data_fingerprint(*prepare(mine, tmp_path))
    edit(mine, "Small effusion number 3.", "No effusion.")
    assert len({first, mended, data_fingerprint(*prepare(mine, tmp_path))}) == 3
    (tmp_path / "elsewhere").mkdir()
    for path in [*tmp_path.glob("*.png"), tmp_path / "mine.csv"]:
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    moved = replace(mine, data=str(tmp_path / "elsewhere/mine.csv"))
    assert data_fingerprint(*prepare(moved, tmp_path / "elsewhere")) == data_fingerprint(*prepare(mine, tmp_path))


def test_a_checkpoint_of_other_data_is_refused(mine, tmp_path):
    "As train_vlm.ipynb names it."
    import torch

    from cxrvlm.training import Progress
    model, arm = torch.nn.Linear(2, 2), load_arm("baseline")
    optimizer = torch.optim.Adam(model.parameters())

    def key():
        return f"settings {digest(mine, arm)}, data {data_fingerprint(*prepare(mine, tmp_path))}"
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, Progress(step=4), key())
    assert load_checkpoint(tmp_path / "checkpoint", model, optimizer, key()).step == 4
    edit(mine, "Small effusion number 3.", "No effusion.")
    with pytest.raises(ValueError, match="belongs to a run with other"):
        load_checkpoint(tmp_path / "checkpoint", model, optimizer, key())


def test_a_run_stops_when_more_than_a_share_of_its_images_is_unreadable(mine, tmp_path):
    (tmp_path / "0.png").write_bytes(b"by post")
    (tmp_path / "1.png").unlink()
    with pytest.raises(ImageError, match=r"2 of 40 images cannot be read, 5\.0%, and unreadable = 0\.01 allows 1\.0%.*1 x there is no such file.*1\.png"):
        prepare(mine, tmp_path)
    assert len(prepare(replace(mine, unreadable=0.05), tmp_path)[1].failed) == 2
    picture(tmp_path / "0.png", 0)
    picture(tmp_path / "1.png", 1)
    assert prepare(mine, tmp_path)[1].failed.empty


def test_what_a_run_puts_up_with_is_in_no_digest(mine):
    assert digest(replace(mine, unreadable=0.5), load_arm("ours")) == digest(mine, load_arm("ours"))


def written(settings, folder):
    (path,) = watch_source(settings, folder)
    with open(path) as file:
        return file.read()


def test_a_source_that_changed_is_written_down_and_one_that_was_touched_is_not(mine, tmp_path):
    first = written(mine, tmp_path)
    prepare(mine, tmp_path)
    assert written(mine, tmp_path) == first
    with open(mine.data) as file:
        text = file.read()
    with open(mine.data, "w") as file:
        file.write(text)  # newer, and the same
    assert written(mine, tmp_path) == first
    picture(tmp_path / "7.png", 1000)
    mended = written(mine, tmp_path)
    assert mended != first and written(mine, tmp_path) == mended
    prepare(mine, tmp_path)
    assert written(mine, tmp_path) == mended  # prepared: nothing is new
    edit(mine, "Small effusion number 3.", "No effusion.")
    assert written(mine, tmp_path) not in (first, mended)


@pytest.fixture
def own(mine, tmp_path):
    "The table with weights, an encoder and a vocabulary of one's own, whose paths say nothing of what lies there."
    (tmp_path / "encoder").mkdir()
    for name in ("own.pt", "encoder/model.safetensors", "encoder/vocab.txt"):
        (tmp_path / name).write_bytes(b"first")
    return replace(mine, image_weights=str(tmp_path / "own.pt"), text_encoder=str(tmp_path / "encoder"), tokenizer=str(tmp_path / "encoder"))


@pytest.mark.parametrize("name", ["own.pt", "encoder/model.safetensors", "encoder/vocab.txt"])
def test_own_weights_that_were_replaced_make_other_data_and_the_digest_stays(mine, own, tmp_path, name):
    kept, plain = digest(own, load_arm("ours")), data_fingerprint(*prepare(mine, tmp_path), mine)
    before, seen = data_fingerprint(*prepare(own, tmp_path), own), written(own, tmp_path)
    assert before == data_fingerprint(*prepare(own, tmp_path), own) != plain and seen == written(own, tmp_path)
    times = os.stat(tmp_path / name)
    (tmp_path / name).write_bytes(b"other")  # as long as the first
    os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data_fingerprint(*prepare(own, tmp_path), own) != before and written(own, tmp_path) != seen
    assert digest(own, load_arm("ours")) == kept
    (tmp_path / "encoder/README.md").write_text("A model.")
    (tmp_path / name).write_bytes(b"first")
    assert data_fingerprint(*prepare(own, tmp_path), own) == before and data_fingerprint(*prepare(mine, tmp_path), mine) == plain


def test_a_vocabulary_of_ones_own_is_watched_for_phantoms_too(own, tmp_path):
    smoke = replace(load_settings("smoke"), tokenizer=own.tokenizer)
    seen = written(smoke, tmp_path)
    (tmp_path / "encoder/vocab.txt").write_bytes(b"other")
    assert written(smoke, tmp_path) != seen


@pytest.mark.parametrize("packed", [True, False])
def test_mimics_reports_are_watched_packed_and_unpacked(tmp_path, monkeypatch, packed):
    write_mimic(tmp_path / "mimic", 60, packed=packed, images=False)
    mimic, folder = replace(load_settings("paper"), data=str(tmp_path / "mimic")), tmp_path / "data"
    folder.mkdir()
    first = written(mimic, folder)
    if packed:
        (tmp_path / "mimic/mimic-cxr-reports.zip").write_bytes(b"another")
        assert written(mimic, folder) != first
        return
    report = sorted((tmp_path / "mimic/files").glob("p1*/p1*/s*.txt"))[0]
    text, times = report.read_bytes(), os.stat(report)
    report.with_suffix(".new").write_bytes(text)
    os.replace(report.with_suffix(".new"), report)  # touched, and the same
    assert written(mimic, folder) == first
    report.with_suffix(".new").write_bytes(text[:-2] + b"!\n")
    os.utime(report.with_suffix(".new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(report.with_suffix(".new"), report)
    changed = written(mimic, folder)
    assert changed != first and written(mimic, folder) == changed
    report.unlink()
    assert written(mimic, folder) != changed
    monkeypatch.setattr("cxrvlm.data.file_sha", lambda *_: pytest.fail("a report was read that looks as it did"))
    written(mimic, folder)


def test_phantoms_have_no_source_to_watch(tmp_path):
    assert watch_source(load_settings("smoke"), tmp_path) == [] and not list(tmp_path.iterdir())


def test_no_figure_mixes_two_data_sets():
    runs = pd.DataFrame({"preset": "mine", "arm": "baseline", "fraction": [0.5, 1], "seed": 0, "auroc": 0.7, "train_pairs": 20, "data": ["c9078169", "6314818d"]})
    for show in (over_seeds, lambda runs: paired_gains(runs, "baseline")):
        with pytest.raises(ValueError, match=r"mine were made from 2 different data \(6314818d: 1, e\.g\. baseline at 1 .*c9078169: 1, e\.g\. baseline at 0\.5"):
            show(runs)
    assert len(over_seeds(runs.assign(data="c9078169"))) == 2
    assert len(over_seeds(read_results(ROOT / "results/demo/runs.csv")))  # what is committed stays valid


def papermill(notebook, folder, **parameters):
    "Run a notebook; what it printed."
    given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    command = [Path(sys.executable).parent / "papermill", notebook, folder / "out.ipynb", "-k", "python3", *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("notebook", "parameter", "columns"), [
    ("retrieved_examples", "examples", "query,shown,rank,similarity,study_id"), ("figure_6", "neighbours", "study_id,neighbour,similarity")])
def test_a_figure_refuses_a_table_of_other_data(tmp_path, notebook, parameter, columns):
    (tmp_path / "table.csv").write_text(f"{columns},data\n{'x,' * columns.count(',')}x,c9078169\n")
    code, output = papermill(f"paper_figures/{notebook}.ipynb", tmp_path, preset="smoke", runs=tmp_path, **{parameter: tmp_path / "table.csv"})
    assert code and re.search(r"was made from the data c9078169, and those of the preset smoke are [0-9a-f]{16} now", output)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", ["evaluate", "ground"])
def test_a_model_of_other_data_is_not_measured(tmp_path, notebook):
    smoke, (studies, _) = load_settings("smoke"), load_studies(load_settings("smoke"))
    build_model(smoke, load_arm("baseline"), make_tokenizer(smoke, studies), 0).save_pretrained(tmp_path / "model")
    (tmp_path / "result.json").write_text(json.dumps({"preset": "smoke", "data": "c9078169", "arm": "baseline", "fraction": 1, "seed": 0}))
    code, output = papermill(f"nbs/experiments/{notebook}.ipynb", tmp_path, preset="smoke", runs=tmp_path, model=tmp_path / "model")
    assert code and re.search(r"was made from the data c9078169, and those of the preset smoke are [0-9a-f]{16} now", output)


@pytest.mark.timeout(1200)
def test_the_graph_prepares_the_data_again_when_a_picture_or_the_table_has_changed(mine, tmp_path):
    root, programs = copy_tree(tmp_path / "clone"), Path(sys.executable).parent
    values = dict(read_ini()[1]["smoke"]) | {"source": "table", "data": mine.data, "pairs": "0"}
    with (root / "settings.ini").open("a") as file:
        file.write("\n[mine]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}

    def snakemake(*options):
        command = [programs / "snakemake", "--cores", "2", "runs/mine/data/data.json", *options]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return "rule data" in done.stdout + done.stderr

    assert snakemake()
    before = (root / "runs/mine/data/data.json").read_text()
    os.utime(mine.data)
    assert not snakemake("-n")  # newer, and the same
    picture(tmp_path / "7.png", 1000)
    assert snakemake() and not snakemake("-n")
    assert json.loads((root / "runs/mine/data/data.json").read_text())["data"] != json.loads(before)["data"]
    edit(mine, "Small effusion number 3.", "No effusion.")
    assert snakemake("-n")
