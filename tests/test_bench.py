"""The preset `bench`: who is a pair, who is read by stage 1 alone, and what the text of a pair is, from the table to the records."""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

import cxrvlm.settings
from cxrvlm.check import check_preset
from cxrvlm.cxrbert import ReportSections, has_both_sections
from cxrvlm.data import load_studies, make_tokenizer
from cxrvlm.declip import training_set
from cxrvlm.initialisation import cxrbert_folder, simclr_folder
from cxrvlm.results import read_results, run_folder
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.studies import (
    COLUMNS,
    UNPAIRED,
    StudiesError,
    add_pair_text,
    check_studies,
    only_pairs,
    pair_texts,
    patients_on_two_sides,
    split_by_sizes,
    stage1_studies,
)
from prepared import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow/gpu"))
from sweep import EXPERIMENTS, execute

SIZES = {"train": 40, "validation": 8, "test": 12}
TINY = replace(load_settings("smoke"), pairs=60, split_sizes=tuple(SIZES.values()), unpaired=30, pair_text="findings_impression")


@pytest.fixture(scope="module")
def tiny():
    return load_studies(TINY)[0]


# The table


def test_bench_is_what_its_settings_say():
    settings = load_settings("bench")
    studies = load_studies(settings)[0]
    assert studies.split.value_counts().to_dict() == {UNPAIRED: 22000, "train": 8000, "validation": 1000, "test": 3000}
    assert not patients_on_two_sides(studies) and len(stage1_studies(studies)) == 30000 and studies.study_id.is_unique
    test = studies[studies.split == "test"]
    assert test.impression.duplicated(keep=False).mean() > 0.5 > 0.15 > pair_texts(test).duplicated(keep=False).mean()


def test_further_studies_change_no_pair_and_share_no_patient(tiny):
    alone, more = (load_studies(replace(TINY, unpaired=count))[0] for count in (0, 50))
    assert alone.equals(only_pairs(tiny)) and tiny.equals(more.head(90))
    assert alone[COLUMNS].equals(sample_studies(60, seed=0)[COLUMNS])
    assert not set(tiny.patient_id[60:]) & set(alone.patient_id)


def test_rows_are_split_exactly_and_patients_are_not(tiny):
    assert tiny.split.value_counts().to_dict() == SIZES | {UNPAIRED: 30}
    for seed in range(30):
        split = split_by_sizes(sample_studies(200, seed=1), seed, (120, 30, 50))
        assert split.split.value_counts().to_dict() == {"train": 120, "test": 50, "validation": 30} and not patients_on_two_sides(split)
    with pytest.raises(StudiesError, match="add up to 60, and there are 61 pairs"):
        split_by_sizes(sample_studies(61, seed=0), 0, (40, 8, 12))


# The text of a pair


def test_a_report_without_findings_is_its_impression():
    studies = sample_studies(300, seed=0)
    texts = pair_texts(add_pair_text(studies, "findings_impression"))
    bare = studies.findings == ""
    assert 0 < bare.sum() < 300 and texts[bare].equals(studies.impression[bare])
    assert (texts[~bare] == studies.findings[~bare] + " " + studies.impression[~bare]).all()
    assert pair_texts(add_pair_text(studies.assign(pair_text="old"), "impression")).equals(studies.impression)


@pytest.mark.parametrize("arm", ["baseline", "ours"])
def test_what_is_trained_on_is_the_pairs_text(tiny, tmp_path, arm):
    training, store, tokenizer = prepare(TINY, tmp_path)
    pairs = training_set(training, store, tokenizer, TINY, load_arm(arm))
    assert pairs.texts == training.pair_text.tolist() and set(training.split) == {"train"}
    sample = pairs[0, 0]
    assert sample["tokens"] == tokenizer(training.pair_text.iloc[0], truncation=True, max_length=TINY.max_tokens)["input_ids"]


def test_any_source_may_pair_images_with_whole_reports():
    demo = load_studies(replace(load_settings("demo"), pair_text="findings_impression"))[0]
    assert (demo.findings == "").any() and (pair_texts(demo) != "").all() and pair_texts(demo).nunique() > demo.impression.nunique()


def test_the_vocabulary_knows_no_unpaired_report(tiny):
    other = tiny.assign(findings=tiny.findings.where(tiny.split != UNPAIRED, "zygomatic"))
    assert make_tokenizer(TINY, other).get_vocab() == make_tokenizer(TINY, tiny).get_vocab()


def test_a_check_counts_pairs_and_says_who_is_none(tiny):
    report = check_preset(TINY)
    assert report.counts["pairs"] == 60 and report.counts["train pairs"] == 40 and report.counts["unpaired"] == 30
    assert any("that stage 1 alone reads: 30" in remark.text for remark in report.remarks)
    assert report.counts["different reports"] == only_pairs(tiny).pair_text.str.lower().nunique()


# From the settings to the records


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two arms at two fractions, and all that comes before."
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setattr(cxrvlm.settings, "load_settings", lambda name, path=None: TINY.model_copy(update={"preset": name}))
    common = {"preset": "tiny", "runs": str(folder)}
    for notebook, values in [("prepare_data", {}), ("adapt_image", {"seed": 0}), ("adapt_text", {"seed": 0})]:
        execute(EXPERIMENTS / f"{notebook}.ipynb", common | values)
    for arm in ("baseline", "ours"):
        for fraction in (0.5, 1.0):
            execute(EXPERIMENTS / "train_vlm.ipynb", common | {"arm": arm, "fraction": fraction, "seed": 0})
    patch.undo()
    plt.close("all")
    return folder


def test_stage_1_reads_all_and_the_pairs_are_the_pairs(runs):
    data = json.loads((runs / "tiny/data/data.json").read_text())
    assert data["pairs"] == SIZES and data["unpaired"] == 30
    records = [folder / "adaptation.json" for folder in (simclr_folder(runs / "tiny/stage1", 0), cxrbert_folder(runs / "tiny/stage1", "random", 0))]
    image, text = (json.loads(path.read_text()) for path in records)
    assert image["counts"] == {"training": 70, "validation": 8, "unreadable": 0}
    assert text["counts"]["train"]["studies"] == 70 and text["counts"]["validation"]["studies"] == 8
    table = read_results(runs / "tiny").set_index(["arm", "fraction"])
    assert (table.train_pairs[:, 1.0] == 40).all() and table.train_pairs[:, 0.5].between(20, 23).all()
    assert (table.validation_pairs == 8).all() and (table.test_pairs == 12).all() and table.data.nunique() == 1


def test_a_run_leaves_the_masked_auroc_and_what_each_pair_adds_to_it(runs):
    table = read_results(runs / "tiny").set_index(["arm", "fraction"])
    assert table.auroc_masked.between(0, 1).all() and table.local_auroc_masked["ours"].notna().all()
    for arm, prefixes in (("baseline", {"global": ""}), ("ours", {"global": "", "local": "local_"})):
        placed = pd.read_csv(run_folder(runs, "tiny", arm, 1.0, 0) / "placements.csv")
        means = placed.groupby("matching")[["value", "auroc_masked"]].mean()
        for matching, prefix in prefixes.items():
            row = table.loc[arm, 1.0]
            assert means.loc[matching].tolist() == pytest.approx([row[f"{prefix}auroc"], row[f"{prefix}auroc_masked"]], abs=1e-4)


# Studies by name


def test_studies_that_each_patient_counts_from_1_are_refused_and_lose_stage_1_no_report(tiny):
    visits = tiny.assign(study_id=(tiny.groupby("patient_id").cumcount() + 1).astype(str))
    with pytest.raises(StudiesError, match=r"study '1' belongs to \d+ patients"):
        check_studies(visits)
    tokenizer, both = make_tokenizer(TINY, tiny), tiny[has_both_sections(tiny)]
    assert len(ReportSections(visits, tokenizer, TINY)) == len(both.drop_duplicates(["findings", "impression"])) > visits.study_id.nunique()
