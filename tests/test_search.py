"""Search: the ranking against brute force, hostile folders, tables and models, and the model card."""
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrvlm.data import load_studies, make_tokenizer
from cxrvlm.images import read_image, to_float
from cxrvlm.initialisation import build_model
from cxrvlm.local import local_similarity
from cxrvlm.losses import global_similarity
from cxrvlm.model_card import card_text, write_model_card
from cxrvlm.search import Usage, contact_sheet, files_below, image_refs, open_model, read_usage, search, search_command
from cxrvlm.settings import load_arm, load_settings
from cxrvlm.text import tokenize

SETTINGS, ARM = load_settings("smoke"), load_arm("ours")
COUNTS = {"train": 51, "validation": 6, "test": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A run's folder with a model of random weights in it."
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer(SETTINGS, load_studies(SETTINGS)[0])
    build_model(SETTINGS, load_arm("baseline"), tokenizer, seed=0).save_pretrained(folder / "model")
    write_model_card(folder / "model", SETTINGS, ARM, 1.0, 0, {"auroc": 0.5}, COUNTS, "f")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Twelve images of four formats in two folders."
    home, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (home / "sub").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (40, 30), dtype=np.uint8)
        suffix = ("png", "jpg", "tif", "bmp")[number % 4]
        Image.fromarray(pixels).save((home / "sub" if number > 7 else home) / f"{number:02d}.{suffix}")
    return home


@pytest.mark.parametrize("matching", ["global", "local"])
def test_the_ranking_is_that_of_a_loop(model, folder, matching):
    encoder, usage = open_model(model)
    found, failed = search(encoder, folder, "left effusion", usage, k=12, matching=matching, batch_size=5)
    scores = {}
    with torch.no_grad():
        text = encoder.embed_texts(tokenize(encoder.tokenizer, ["left effusion"], usage.max_tokens))
        for ref in files_below(folder):
            one = encoder.embed_images(to_float(torch.from_numpy(read_image(ref, usage.image_size, folder))[None, None]))
            scores[ref] = (global_similarity(one.pooled, text.pooled) if matching == "global" else
                           local_similarity(one.local, text.local, text.mask, usage.tau2, usage.tau3, usage.length_norm)).item()
    assert failed.empty and found["rank"].tolist() == list(range(1, 13)) and set(found.image) == set(scores)
    assert found.similarity.tolist() == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    assert [scores[ref] for ref in found.image] == pytest.approx(found.similarity.tolist(), abs=1e-5)
    assert list(found.columns) == ["image", "similarity", "rank"]


def test_fewer_and_more_than_there_are_and_equal_images(model, folder, tmp_path):
    encoder, usage = open_model(model)
    everything = search(encoder, folder, "edema", usage, k=100)[0]
    assert len(everything) == 12
    assert search(encoder, folder, "edema", usage, k=3)[0].equals(everything[:3])
    for name in ("b", "a", "c"):
        shutil.copy(folder / "00.png", tmp_path / f"{name}.png")
    # Copies may come in any order: a sum is rounded a little otherwise in each place of a batch.
    copies = search(encoder, tmp_path, "edema", usage)[0]
    assert sorted(copies.image) == ["a.png", "b.png", "c.png"] and np.ptp(copies.similarity) < 1e-5
    for wrong, says in ((0, "k = 0"), (-1, "k = -1")):
        with pytest.raises(ValueError, match=says):
            search(encoder, folder, "edema", usage, k=wrong)


def test_a_hostile_folder(model, folder, tmp_path, capsys):
    home = tmp_path / "hostile"
    shutil.copytree(folder, home)
    (home / ".hidden").mkdir()
    shutil.copy(folder / "00.png", home / ".hidden/x.png")
    shutil.copy(folder / "00.png", home / ".x.png")
    (home / "loop").symlink_to(home)  # a link to the folder itself
    (home / "gone.png").symlink_to(home / "nowhere.png")
    os.mkfifo(home / "pipe.png")  # reading it would wait for ever
    (home / "folder.png").mkdir()
    (home / "empty.png").touch()
    (home / "cut.jpg").write_bytes((folder / "01.jpg").read_bytes()[:200])
    (home / "text.png").write_text("no picture")
    Image.new("L", (3, 3)).save(home / "tiny.png")
    shutil.copy(folder / "00.png", home / "line\nbreak.png")
    shutil.copy(folder / "00.png", os.fsencode(home) + b"/latin-\xe9.png")
    encoder, usage = open_model(model)
    found, failed = search(encoder, home, "effusion", usage, k=100)
    assert sorted(failed.image) == ["cut.jpg", "empty.png", "text.png", "tiny.png"] and failed.reason.map(len).min() > 10
    assert len(found) == 14
    assert search_command(model, home, "effusion", k=100, sheet=tmp_path / "sheet.png") == 0
    said = capsys.readouterr().out
    assert "4 files could not be read" in said and "empty.png" in said and "line?break.png" in said and "latin-?.png" in said
    said.encode("utf-8")
    assert Image.open(tmp_path / "sheet.png").size == (4 * 220, 4 * 254)


def test_many_unreadable_files_are_counted(model, folder, tmp_path, capsys):
    for number in range(15):
        (tmp_path / f"bad{number:02d}.png").touch()
    encoder, usage = open_model(model)
    with pytest.raises(ValueError, match="none of the 15 files can be read as an image, e.g. bad00.png"):
        search(encoder, tmp_path, "effusion", usage)
    shutil.copy(folder / "00.png", tmp_path)
    assert search_command(model, tmp_path, "effusion", sheet=tmp_path / "sheet.png") == 0
    said = capsys.readouterr().out
    assert "15 files could not be read" in said and "bad09.png" in said and "bad10.png" not in said and "and 5 more" in said


def test_tables(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    names = ["images/00.png", "images/00.png", "", "images/sub/09.jpg", "phantom:3|Pleural Effusion/left"]
    pd.DataFrame({"image": names, "impression": "a; b"}).to_csv(tmp_path / "t.csv", index=False, sep=";")
    pd.DataFrame({"image": names}).to_parquet(tmp_path / "t.parquet")
    encoder, usage = open_model(model)
    for table in ("t.csv", "t.parquet"):
        assert image_refs(tmp_path / table) == ([names[0], *names[3:]], tmp_path)
        found, failed = search(encoder, tmp_path / table, "effusion", usage)
        assert len(found) == 3 and failed.empty and contact_sheet(found, tmp_path).size[0] == 880
    pd.DataFrame({"picture": names}).to_csv(tmp_path / "u.csv")
    with pytest.raises(ValueError, match="no column image"):
        image_refs(tmp_path / "u.csv")
    with pytest.raises(ValueError, match="no images in"):
        image_refs([])


def test_what_people_get_wrong(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    long = "effusion " * SETTINGS.max_tokens
    for arguments, says in [
        (("nowhere", folder, "effusion"), "nowhere is no trained model: there is no such folder"),
        (("empty", folder, "effusion"), "the folder has no config.json and no model.safetensors"),
        ((model, "empty", "effusion"), "there are no images in empty"),
        ((model, "nowhere", "effusion"), "nowhere does not exist"),
        ((model, folder / "00.png", "effusion"), "neither a folder nor a table"),
        ((model, folder, " \n"), "the text is empty"),
        ((model, folder, long), f"the model reads {SETTINGS.max_tokens}: shorten it"),
        ((model, folder, "\u80ba\u6c34"), "no word of"),
        ((model, folder, "effusion", 0), "k = 0"),
        ((model, folder, "effusion", 3, tmp_path), "it is a folder"),
        ((model, folder, "effusion", 3, tmp_path / "no/sheet.png"), "there is no folder"),
        ((model, folder, "effusion", 3, tmp_path / "s.png", "nearest"), "trained with global and local"),
    ]:
        assert search_command(*arguments) == 1
        out, said = capsys.readouterr()
        assert says in " ".join(said.split()) and "Traceback" not in said and out == ""
    assert sorted(os.listdir(tmp_path)) == ["empty", "runs"] and not os.listdir("runs")  # no sheet, no half of one


def test_a_relative_path_starts_where_one_is(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(model)
    assert search_command("model", folder, "effusion", sheet=tmp_path / "a.png") == 0
    assert search_command(".", folder, "effusion", sheet=tmp_path / "b.png") == 0  # the run's folder
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "Loading" not in capsys.readouterr().out


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", b"not weights"), ("config.json", b"{"), ("config.json", b'{"image_encoder": "resnet18"}'),
    ("tokenizer.json", b"{}"), ("usage.json", b"{"), ("usage.json", b'{"image_size": "large"}'), ("usage.json", b"[1]"),
])
def test_damaged_models_are_named(model, tmp_path, name, content):
    shutil.copytree(model / "model", tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(ValueError, match="copy.* (cannot be read|does not say)"):
        open_model(tmp_path / "copy")


def test_an_old_run_says_in_its_record_how_to_use_its_model(model, tmp_path):
    shutil.copytree(model / "model", tmp_path / "model")
    (tmp_path / "model/usage.json").unlink()
    with pytest.raises(ValueError, match="no usage.json"):
        read_usage(tmp_path / "model")
    arm = load_arm("gloria")
    settings = SETTINGS.model_dump(mode="json") | {"a key of yesterday": 1}
    (tmp_path / "result.json").write_text(json.dumps({"settings": settings, "arm_settings": arm.model_dump(mode="json")}))
    usage = read_usage(tmp_path / "model")
    assert usage == Usage.of(SETTINGS, arm) and usage.matchings == ("local",)
    encoder = open_model(tmp_path)[0]
    with pytest.raises(ValueError, match="was trained with local"):
        search(encoder, [], "effusion", usage, matching="global")


def test_a_diverged_model_is_refused(model, folder):
    encoder, usage = open_model(model)
    with torch.no_grad():
        encoder.image_encoder.to_pooled.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        search(encoder, folder, "effusion", usage)


def test_the_card_stays_and_tells_nothing_private(model):
    card = (model / "model/README.md").read_text()
    assert "Not for diagnosis" in card and "| train | 51 |" in card and "| `image_size` | 32 |" in card
    open_model(model)[0].save_pretrained(model / "model")  # leaves a card that is there
    assert (model / "model/README.md").read_text() == card
    openi = load_studies(load_settings("demo"))[0]
    texts = {*openi.impression[openi.impression.str.len() > 20], *openi.study_id, *openi.image}
    card = card_text(load_settings("demo"), ARM, 0.2, 0, {"auroc": 0.7}, COUNTS, "f")
    assert not [text for text in texts if text in card]


def test_the_card_of_restricted_data_says_so_and_names_no_folder():
    secret = load_settings("paper").model_copy(update={"data": "/home/somebody/mimic", "weights": "/home/somebody/weights"})
    card = card_text(secret, ARM, 0.01, 0, {}, COUNTS, "f")
    assert "Restricted data" in card and "PhysioNet" in card and "somebody" not in card and "1% of the" in card
    assert "Restricted data" not in card_text(SETTINGS, ARM, 1.0, 0, {}, COUNTS, "f")
    with pytest.raises(ValueError, match="save the model first"):
        write_model_card("/no/such/folder", SETTINGS, ARM, 1.0, 0, {}, COUNTS, "f")
