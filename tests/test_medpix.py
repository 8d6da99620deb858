"""MedPix: a made-up repository of its layout, what is wrong with real ones, its strips, and folds by case."""
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cxrvlm.settings
from cxrvlm.data import (
    RESTRICTED,
    data_fingerprint,
    is_restricted,
    load_studies,
    open_store,
    source_files,
    take_fold,
    watch_source,
)
from cxrvlm.medpix import LOCATIONS, MODALITIES, STRIPS, load_medpix, shared_captions
from cxrvlm.model_card import SOURCES
from cxrvlm.settings import DataSettings, SettingsError, digest, load_arm, load_settings, replace
from cxrvlm.studies import FOLDS, SPLITS, StudiesError, patients_on_two_sides, split_by_fold

sys.path.append(str(Path(__file__).resolve().parents[1] / "workflow/gpu"))
from sweep import EXPERIMENTS, execute

SECRET = "zyzzyva quokka"  # stands in every caption, and may stand in no message
DESCRIPTIONS, TOPICS = "Descriptions.json", "Case_topic.json"


def records(cases: int = 12) -> tuple[list[dict], list[dict]]:
    "Two images of each case with one caption, broken in lines at another place; and the cases."
    images, topics = [], []
    for case in range(cases):
        name = f"MPX{1000 + case}"
        for view in range(2):
            caption = f"{SECRET} of the" + ["\n", "  "][view] + f"case {case}."
            images.append({"Type": MODALITIES[case % 2], "U_id": name, "image": f"{name}_synpic{case}{view}", "Location": "Chest",
                           "Description": {"Caption": caption, "Plane": "Axial"}, "Location Category": LOCATIONS[case % 5]})
        topics.append({"U_id": name, "Case": {"Findings": f"Case {case}:\r\n found."} if case else {"Title": "Nothing"}, "Topic": {}})
    return images, topics


def picture(case: int) -> Image.Image:
    "A gray ramp between a white strip at the top and another at the bottom that is the case's alone."
    pixels = np.tile(np.linspace(40, 160, 100, dtype=np.uint8), (100, 1))
    pixels[:7], pixels[92:, :50], pixels[92:, 50:] = 255, 255 * (case % 2), 255 * (1 - case % 2)
    return Image.fromarray(pixels)


def write(root: Path, images: list[dict], topics: list[dict], drawn: int | None = None) -> Path:
    "The repository as `git clone` leaves it; pictures of the first `drawn` images only."
    home = root / "MedPix-2-0"
    for folder in ("images", "splitted_dataset"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for row in images[:drawn]:
        picture(int(row["U_id"][3:])).save(home / "images" / f"{row['image']}.png")
    (home / DESCRIPTIONS).write_text(json.dumps(images))
    (home / TOPICS).write_text(json.dumps(topics))
    for place, name in enumerate(("train", "dev", "test")):
        rows = [row for row in images if min((int(row["U_id"][3:]) - 1000) // 4, 2) == place]
        (home / f"splitted_dataset/descriptions_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def repository(tmp_path):
    return write(tmp_path / "clone", *records())


@pytest.fixture
def settings(repository):
    return replace(load_settings("smoke"), source="medpix", data=str(repository), pairs=0, split="official")


def test_every_image_is_a_pair_of_its_case(repository):
    studies, exclusions = load_medpix(repository)
    assert len(studies) == 24 and exclusions.empty and not patients_on_two_sides(studies)
    assert studies.split.value_counts()[SPLITS].tolist() == [8, 8, 8]
    assert shared_captions(studies) == 1 and studies.impression[0] == f"{SECRET} of the case 0."  # however the lines were broken
    assert studies.findings[0] == "" and (studies.findings[2:] == "Case " + (studies.index[2:] // 2).astype(str) + ": found.").all()
    assert studies[MODALITIES].to_numpy().tolist() == [[1 - i // 2 % 2, i // 2 % 2] for i in range(24)]
    assert (studies[LOCATIONS].to_numpy().argmax(1) == studies.index // 2 % 5).all() and (studies[LOCATIONS].sum(axis=1) == 1).all()


def test_what_is_no_pair_is_counted(tmp_path):
    images, topics = records()
    images[0]["Description"]["Caption"] = " REPLACE this - DESCRIPTION OF IMAGE "
    images[1]["Description"]["Caption"] = " \n"
    images[2]["Description"]["Caption"] = None
    root = write(tmp_path, images, topics, drawn=23)
    split = root / "MedPix-2-0/splitted_dataset/descriptions_train.jsonl"
    split.write_text("\n".join(line for line in split.read_text().split("\n") if images[3]["image"] not in line))
    studies, exclusions = load_medpix(root)
    found = exclusions.groupby("reason").study_id.apply(list).to_dict()
    names = [row["image"] for row in images]
    assert found == {"placeholder caption": names[:1], "no caption": names[1:3], "no image file": names[23:],
                     "in none of the authors' splits": names[3:4]}
    assert len(studies) == 24 - 5


def broken(change):
    "A change of the records, of the images or the cases."
    images, topics = records()
    change(images, topics)
    return images, topics


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda images, topics: images[4].pop("U_id"), "Descriptions.json, record 5 has no U_id"),
        (lambda images, topics: images[4].update(Description=SECRET), "Descriptions.json, record 5 has no Description > Caption"),
        (lambda images, topics: images[4].update({"Location Category": f"{SECRET} and more"}), "record 5: the location a text of 23 characters is none of Abdomen"),
        (lambda images, topics: images[4].update(Type="PET"), "record 5: the modality 'PET' is none of CT, MR"),
        (lambda images, topics: images[4].update(Type=None), "is none of CT, MR"),
        (lambda images, topics: topics.pop(2), "Case_topic.json has no case MPX1002"),
        (lambda images, topics: topics[2].pop("U_id"), "Case_topic.json, record 3 has no U_id"),
        (lambda images, topics: images.append(images[0]), "stands twice"),
        (lambda images, topics: images.insert(0, SECRET), "Descriptions.json, record 1 has no image"),
    ],
)
def test_another_layout_is_refused_and_no_caption_quoted(change, message, tmp_path):
    images, topics = broken(change)
    root = write(tmp_path, *records())
    (root / "MedPix-2-0" / DESCRIPTIONS).write_text(json.dumps(images))
    (root / "MedPix-2-0" / TOPICS).write_text(json.dumps(topics))
    with pytest.raises(StudiesError) as caught:
        load_medpix(root)
    assert message in str(caught.value) and "quokka" not in str(caught.value)


@pytest.mark.parametrize("name", [DESCRIPTIONS, TOPICS, "splitted_dataset/descriptions_dev.jsonl"])
@pytest.mark.parametrize("fault", ["gone", "cut", "latin-1"])
def test_a_file_that_cannot_be_read_is_named(name, fault, repository):
    path = repository / "MedPix-2-0" / name
    content = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(content[: len(content) // 2] if fault == "cut" else content.replace(b"a", b"\xe4"))
    with pytest.raises(StudiesError) as caught:
        load_medpix(repository)
    assert path.name in str(caught.value) and "clone" in str(caught.value) and "zyzzyva" not in str(caught.value)


def test_whoever_has_no_copy_is_told_where_it_is(tmp_path):
    with pytest.raises(StudiesError, match="git clone https://github.com/CHILab1/MedPix-2.0 data/medpix"):
        load_studies(replace(load_settings("medpix"), data=str(tmp_path)))


def test_a_case_on_two_sides_is_refused(repository, settings):
    folder = repository / "MedPix-2-0/splitted_dataset"
    moved = (folder / "descriptions_train.jsonl").read_text().split("\n")
    (folder / "descriptions_train.jsonl").write_text("\n".join(moved[1:]))
    (folder / "descriptions_test.jsonl").write_text((folder / "descriptions_test.jsonl").read_text() + "\n" + moved[0])
    with pytest.raises(StudiesError, match="MPX1000"):
        load_studies(settings)
    assert not patients_on_two_sides(load_studies(replace(settings, split="folds"))[0])


def test_the_strips_are_cut_off_and_the_store_knows_it(settings, tmp_path):
    studies, _ = load_studies(settings)
    cut = open_store(settings, studies, tmp_path)
    whole = open_store(replace(settings, crop="0 0"), studies, tmp_path)
    assert cut.crop == STRIPS and whole.crop == (0, 0)
    shown = cut.batch(studies.image.tolist()).numpy()
    assert 40 <= shown.min() and shown.max() <= 160 and whole.batch(studies.image.tolist()).max() == 255
    assert len({cut.folder, whole.folder}) == len({cut.fingerprint, whole.fingerprint}) == 2
    assert data_fingerprint(studies, cut) != data_fingerprint(studies, whole)  # no result goes on with other pixels
    strip = open_store(replace(settings, crop="0.92 0"), studies, tmp_path).batch(studies.image.tolist()).numpy()
    assert set(np.unique(strip[:, :, :, [0, -1]])) == {0, 255} and (np.ptp(strip, axis=2) == 0).all()  # the bottom strip alone, as a control
    again = open_store(settings, studies, tmp_path)
    assert again.folder == cut.folder and (again.batch(studies.image.tolist()).numpy() == shown).all()


def test_a_crop_is_part_of_the_digest_and_must_leave_something(settings):
    arm = load_arm("adapted")
    assert len({digest(replace(settings, crop=crop), arm) for crop in ("", "0 0", "0.07 0.08", "0.5 0.1")}) == 4
    for crop in ("0.5", "0.5 0.5", "0.1 0.1 0.1", "-0.1 0"):
        with pytest.raises(SettingsError, match="crop"):
            replace(settings, crop=crop)


def test_medpix_is_restricted_whatever_somebody_writes(settings):
    assert is_restricted(settings) and is_restricted(load_settings("medpix"))
    with pytest.raises(SettingsError, match="contributors of MedPix have not allowed"):
        replace(settings, restricted="no")


def test_every_source_says_what_may_be_shown_and_where_it_comes_from():
    assert set(get_args(DataSettings.model_fields["source"].annotation)) == set(RESTRICTED) == set(SOURCES)


def test_a_changed_file_makes_the_data_be_prepared_again(settings, repository, tmp_path):
    assert [path.name for path in source_files(settings)][:2] == [DESCRIPTIONS, TOPICS]
    written = Path(watch_source(settings, tmp_path / "data")[0])
    first = written.read_text()
    assert watch_source(settings, tmp_path / "data") and written.read_text() == first
    topics = repository / "MedPix-2-0" / TOPICS
    topics.write_text(topics.read_text().replace("found", "seen"))
    assert watch_source(settings, tmp_path / "data") and written.read_text() != first


@pytest.mark.parametrize("seed", [0, 7])
def test_each_patient_is_tested_once_and_validated_once(seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"patient_id": [f"p{i}" for i in rng.integers(0, 43, 300)]})
    sides = pd.DataFrame({fold: split_by_fold(table, fold, seed).split for fold in range(FOLDS)})
    assert (sides.groupby(table.patient_id).nunique() == 1).all(axis=None)
    assert (sides == "test").sum(axis=1).eq(1).all() and (sides == "validation").sum(axis=1).eq(1).all()
    for fold in range(FOLDS):
        tested, next_validated = sides[(fold + 1) % FOLDS] == "test", sides[fold] == "validation"
        assert tested.equals(next_validated)
    patients = table.patient_id.groupby(sides[0]).nunique()
    assert patients["test"] in (8, 9) and patients["train"] in (25, 26)
    shuffled = table.sample(frac=1, random_state=seed)
    assert split_by_fold(shuffled, 2, seed).split.loc[table.index].equals(sides[2])
    assert not split_by_fold(table, 2, seed + 1).split.equals(sides[2])


@pytest.mark.parametrize("notebook", ["train_vlm", "adapt_text", "adapt_image"])
def test_a_run_takes_the_fold_of_its_seed_and_all_folds_have_one_digest(notebook, tmp_path, monkeypatch):
    crossed = replace(load_settings("smoke"), split="folds")
    monkeypatch.setattr(cxrvlm.settings, "load_settings", lambda preset: crossed)
    studies, _ = load_studies(crossed)
    seen = {}
    for seed in (0, 3):
        names = execute(EXPERIMENTS / f"{notebook}.ipynb", {"seed": seed, "runs": str(tmp_path)}, lambda names: "parts" in names)
        table = {"adapt_image": "table"}.get(notebook, "studies")
        fold = take_fold(studies, crossed, seed)
        assert names[table].set_index("study_id").split.equals(fold.set_index("study_id").split)
        train = names["parts"]["training" if notebook == "adapt_image" else "train"]
        assert set(train.patient_id) <= set(fold[fold.split == "train"].patient_id)
        seen[seed] = set(train.study_id), names.get("data")
    assert seen[0][0] != seen[3][0] and seen[0][1] == seen[3][1]


def test_with_folds_a_seed_is_the_number_of_a_fold(settings):
    with pytest.raises(SettingsError, match="0 to 4"):
        replace(settings, split="folds", seeds=(0, 5))
    with pytest.raises(ValueError, match="0 to 4"):
        take_fold(load_studies(settings)[0], replace(settings, split="folds"), 5)
