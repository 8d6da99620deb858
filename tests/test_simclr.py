"""SimCLR and its experiment: hostile folders, resuming, and the promise that nobody held out is ever trained on."""
import json
import math
import shutil
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from cxrvlm import training
from cxrvlm.augment import augmentation
from cxrvlm.data import load_studies, open_store
from cxrvlm.downstream import linear_probe, match_labels, read_labels
from cxrvlm.images import ImageError, ImageStore
from cxrvlm.initialisation import load_backbone
from cxrvlm.phantom import render_reference
from cxrvlm.settings import SettingsError, in_stage, load_settings, replace
from cxrvlm.simclr import ImageViews, alignment, build_objective, folder_images, image_features, uniformity
from prepared import prepare

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs/experiments/adapt_image.ipynb"
SMOKE = in_stage(load_settings("smoke"), "simclr")


def adapt(until: str = "", **parameters) -> dict:
    "Run adapt_image.ipynb's cells in this process, up to one that holds `until`; the variables it leaves."
    matplotlib.use("Agg")
    given = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    names = {"In": [given]}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            exec(given, names)
        if until and until in cell.source:
            break
    matplotlib.pyplot.close("all")
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "48 images of 24 patients, two that cannot be read, one that is tiny, one without a row in labels.csv."
    home = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    names = [f"ward {i % 2}/{i:03d}.{('png', 'JPG', 'bmp')[i % 3]}" for i in range(48)]
    for i, name in enumerate(names):
        (home / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 120, (40, 30), np.uint8)
        pixels[:20] += 100 * np.uint8(i // 2 % 2)  # what the label Bright says
        Image.fromarray(pixels).save(home / name)
    (home / "torn.png").write_bytes((home / names[0]).read_bytes()[:60])
    (home / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(home / "tiny.png")
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(home / "unlisted.png")
    rows = [(name, i // 2, "Bright" if i // 2 % 2 else "Dull") for i, name in enumerate(names)]
    rows += [("torn.png", 90, "Bright"), ("empty.jpg", 91, "Bright|Rare"), ("tiny.png", 92, ""), ("gone.png", 93, "Dull")]
    labels = pd.DataFrame(rows, columns=["image", "patient", "labels"])
    labels.to_csv(home / "labels.csv", index=False)
    return home


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory) -> tuple[dict, Path]:
    "The experiment on the folder."
    output = tmp_path_factory.mktemp("output")
    return adapt(images=str(folder), labels=str(folder / "labels.csv"), output=str(output)), output


# --- the two numbers ---

VECTORS = st.tuples(st.integers(2, 8), st.integers(2, 6), st.integers(0, 2**32 - 1))


def vectors(n: int, e: int, seed: int) -> torch.Tensor:
    "Two sets of n random vectors."
    return torch.randn(2, n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@hypothesis_settings(deadline=None, max_examples=50)
@given(VECTORS, st.floats(0.1, 4))
def test_alignment_and_uniformity_keep_within_their_limits(shape, t):
    a, b = vectors(*shape)
    assert -1e-6 <= alignment(a, b) <= 4 + 1e-6 and alignment(a, b) == pytest.approx(alignment(b, a), abs=1e-5)
    assert -4 * t - 1e-6 <= uniformity(a, t) <= 1e-6
    assert uniformity(a, t) == pytest.approx(uniformity(a.flip(0) * 7, t), abs=1e-6)
    assert alignment(a, a * 3) < 1e-6


def test_uniformity_of_more_rows_than_a_block_holds():
    x = vectors(1500, 3, 0)[0]
    unit = torch.nn.functional.normalize(x, dim=1)
    assert uniformity(x) == pytest.approx(torch.pdist(unit).square().mul(-2).exp().mean().log().item(), abs=1e-9)


# --- training ---


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    studies, _ = load_studies(SMOKE)
    store, transform = open_store(SMOKE, studies, tmp_path / "store"), augmentation(SMOKE, "simclr")
    sets = [ImageViews(studies[studies.split == split], store, transform) for split in ("train", "validation")]
    short = replace(SMOKE, train_iterations=2, max_iterations=4, patience=9, image_encoder="timm:test_resnet")
    whole, first, second = (build_objective(short, seed=0) for _ in range(3))
    progress = training.train(whole, *sets, short, 0, tmp_path / "whole")
    training.train(first, *sets, replace(short, max_iterations=2), 0, tmp_path / "parts")
    assert training.train(second, *sets, short, 0, tmp_path / "parts").history == progress.history
    weights = whole.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in second.state_dict().items())
    assert not torch.equal(weights["head.0.weight"], build_objective(short, seed=0).head[0].weight)


def test_stage_1_trains_on_nobody_who_is_held_out(tmp_path, monkeypatch):
    read, trained = set(), []
    look_up, step = ImageStore.__getitem__, training.train_step

    def note_ref(store, ref):
        read.add(ref)
        return look_up(store, ref)

    def note_batch(objective, batch, *arguments):
        trained.extend(batch["study_id"])
        return step(objective, batch, *arguments)

    monkeypatch.setattr(ImageStore, "__getitem__", note_ref)
    monkeypatch.setattr(training, "train_step", note_batch)
    adapt(until="progress = train(", runs=str(tmp_path))
    studies = load_studies(load_settings("smoke"))[0].set_index("study_id")
    assert len(trained) == SMOKE.simclr_max_iterations * SMOKE.batch_size and trained
    patients = studies.groupby("split").patient_id.agg(set)
    assert not set(studies.patient_id[trained]) & (patients["validation"] | patients["test"])
    assert read and not read & set(studies.image[studies.split == "test"])


# --- a folder of images ---


def test_a_folder_is_split_by_patient_and_what_is_wrong_is_counted(adapted):
    names, output = adapted
    record = json.loads((output / "adaptation.json").read_text())
    counts = record["counts"]
    assert counts["unreadable"] == 3 and counts["not in labels"] == 1 and counts["files"] == 52
    assert counts["training"] + counts["validation"] == 48
    assert set(names["store"].failed.ref) == {"torn.png", "empty.jpg", "tiny.png"}
    trained, held_out = (set(part.patient_id) for part in names["parts"].values())
    assert not trained & held_out and len(trained | held_out) == 24
    probe = {row["label"]: row for row in record["probe"]}
    assert probe["Bright"]["after"] > 0.6 and probe["Bright"]["note"] == ""
    assert probe["Rare"]["after"] is None and probe["Rare"]["note"] == "patients with it: 0, needed: 5"
    assert {"provenance", "settings", "seconds", "training", "digest", "data"} <= record.keys()


def test_the_backbone_is_what_was_trained(adapted):
    names, output = adapted
    assert not (output / "checkpoint").exists()
    start, again = (build_objective(SMOKE, seed=5).image_encoder for _ in range(2))
    load_backbone(again, SMOKE.image_encoder, str(output / "backbone.safetensors"))
    refs, store = names["valid_images"].image.tolist(), names["store"]
    features = image_features(names["encoder"], refs, store)
    assert torch.equal(image_features(again, refs, store), features)
    assert not torch.allclose(image_features(start, refs, store), features)


def test_what_is_finished_is_not_trained_again(adapted, folder, tmp_path, monkeypatch):
    names, output = adapted
    copy = shutil.copytree(output, tmp_path / "output")
    parameters = {"images": str(folder), "labels": str(folder / "labels.csv"), "output": str(copy)}
    before = (copy / "adaptation.json").read_bytes()
    again = adapt(**parameters)
    assert again["finished"] and (copy / "adaptation.json").read_bytes() == before
    assert again["after"] == pytest.approx(names["after"])
    other = adapt(seed=1, **parameters)
    assert not other["finished"] and json.loads((copy / "adaptation.json").read_text())["seed"] == 1


def test_parameters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="name a folder for the results"):
        adapt(images=str(tmp_path))
    with pytest.raises(SettingsError, match="labels belong to a folder of images"):
        adapt(labels="labels.csv")
    with pytest.raises(ImageError, match="holds no files"):
        adapt(images=str(tmp_path), output=str(tmp_path / "output"))


def test_too_few_images_to_validate_with(folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((folder / "ward 0").iterdir())[:12]:
        shutil.copy(path, few)
    with pytest.raises(SettingsError, match="1 images to validate with are less than simclr_batch_size = 4"):
        adapt(images=str(few), output=str(tmp_path / "output"))


def test_a_copy_of_a_held_out_image_is_not_trained_on(tmp_path):
    home = tmp_path / "images"
    home.mkdir()
    for i in range(60):
        picture = Image.fromarray(render_reference(f"phantom:{i // 2}|normal", 64))
        picture.save(home / f"{i}.{'png' if i % 2 else 'jpg'}")  # each file has a copy in another format
    names = adapt(until="held_out =", images=str(home), output=str(tmp_path / "output"))
    trained, validated = ({int(Path(ref).stem) // 2 for ref in names[part].refs} for part in ("train_set", "valid_set"))
    assert len(names["copies"]) and len(trained) > 10 and not trained & validated


def test_odd_names_in_a_folder(tmp_path):
    hidden = [".hidden.png", ".git/a.png", "sub/.DS_Store"]
    for name in ("ä b.png", "x.PNG", "report.txt", "png", "a.png.txt", "deep/er/1.webp", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert folder_images(tmp_path).image.tolist() == ["deep/er/1.webp", "x.PNG", "ä b.png"]


# --- labels ---


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("image,labels\na.png,Edema\n", r"lacks the column patient \(or patient_id\)"),
        ("patient,labels\n1,Edema\n", "lacks the column image; it has patient_id, labels"),
        ("a;b\n1;2\n", "lacks the column image and the column patient"),
        ("image,patient,labels\na.png,1,Edema\nb.png,,Edema\n", "patient_id is blank in row 3"),
        ("image,patient,labels\n,1,Edema\n", "image is blank"),
        ("image,patient,labels\na.png,1,A\na.png,2,A\n", "an earlier row has, e.g. a.png"),
        ("image,patient\na.png,1\n", "has no labels"),
        ("image,patient,labels\na.png,1,\n", "has no labels"),
    ],
)
def test_a_labels_file_that_cannot_be_used(tmp_path, text, complaint):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_labels(tmp_path / "labels.csv")


def test_labels_find_their_images_by_path_before_name():
    images = pd.DataFrame({"study_id": ["x/1.png", "y/2.png"], "image": ["x/1.png", "y/2.png"]})
    labels = pd.DataFrame({"image": ["x/1.png", "1.png", "2.png"], "patient_id": ["a", "b", "c"], "Edema": [1, 0, 0]})
    assert match_labels(images, labels).patient_id.tolist() == ["a", "c"]


# --- the probe ---


@pytest.mark.parametrize(("value", "word"), [(0.0, "with"), (-1.0, "with"), (math.nan, "with"), (1.0, "without")])
def test_a_label_that_all_or_none_have_gets_a_reason(value, word):
    x = np.random.default_rng(0).normal(size=(60, 3))
    labels = pd.DataFrame({"odd": np.full(60, value), "fair": (x[:, 0] > 0).astype(float)})
    probe = linear_probe(x, labels, np.arange(60)).set_index("label")
    assert probe.note.odd == f"patients {word} it: 0, needed: 5"
    assert np.isnan([probe.auroc.odd, probe.balanced_accuracy.odd]).all()
    assert probe.balanced_accuracy.fair > 0.9 and probe.note.fair == ""


def test_other_labels_do_not_get_in_the_way():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 5)), rng.random((200, 2)) < [0.5, 0.03]
    x[:, 0] += 2 * y[:, 0]
    probe = linear_probe(x, pd.DataFrame(y, columns=["a", "b"]).astype(float), rng.integers(0, 80, 200))
    alone = linear_probe(x, pd.DataFrame(y[:, :1], columns=["a"]).astype(float), rng.integers(0, 80, 200))
    assert probe.balanced_accuracy[0] == pytest.approx(alone.balanced_accuracy[0], abs=0.06)
    assert len(linear_probe(x, pd.DataFrame(index=range(200)), np.arange(200))) == 0


def test_validation_prepares_its_images_in_float32_whatever_the_precision(tmp_path):
    # The blur was once made inside the autocast, which a GPU refused and which would have given other pictures.
    seen = {}
    for precision in ("float32", "bf16"):
        settings = replace(SMOKE, precision=precision, batch_size=16, valid_iterations=2)
        training_studies, store, _ = prepare(settings, tmp_path)
        objective, views = build_objective(settings, seed=0), ImageViews(training_studies, store, augmentation(settings, "simclr"))
        seen[precision] = []
        objective.register_forward_pre_hook(lambda module, given, to=seen[precision]: to.append(given[0]["views"]))
        assert math.isfinite(training.validate(objective, views, settings, training.start_device(settings))["simclr"])
    for expected, found in zip(*seen.values(), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
