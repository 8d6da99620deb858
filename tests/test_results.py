"""Results: gains against a loop, and figures that lack runs."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cxrvlm.data
import cxrvlm.images
import cxrvlm.settings
from cxrvlm.committed import SAME, merge_results
from cxrvlm.grounding import METRICS, read_grounding
from cxrvlm.results import (
    by_matching,
    over_seeds,
    paired_gains,
    read_results,
    read_runs,
    result_row,
    run_folder,
    write_result,
)
from cxrvlm.studies import read_own
from cxrvlm.training import Progress

ROOT = Path(__file__).resolve().parents[1]
SWEPT = pd.read_csv(ROOT / "results/demo/runs.csv")


def made_up(**arms: dict) -> pd.DataFrame:
    "Runs with one fraction and one seed; each arm with the metrics that it has."
    common = {"preset": "demo", "fraction": 0.2, "seed": 0, "train_pairs": 611}
    return pd.DataFrame([{**common, "arm": arm, **metrics} for arm, metrics in arms.items()])


def draw(name: str, runs: pd.DataFrame, folder: Path, **given: str) -> dict:
    "The names that a figure notebook leaves, run on `runs`."
    runs.to_csv(folder / "runs.csv", index=False)
    values = {"In": [], "display": lambda table: None}
    for cell in json.loads((ROOT / f"paper_figures/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
        if "parameters" in cell["metadata"].get("tags", []):
            values |= {"results": str(folder / "runs.csv"), "output": str(folder), **given}
    plt.close("all")
    return values


def labels(figure) -> list[set[str]]:
    "What the legend of each panel says."
    return [{text.get_text() for text in ax.get_legend().get_texts()} if ax.get_legend() else set() for ax in figure.axes]


def test_an_arm_has_a_row_for_what_it_trains_only():
    runs = made_up(words={"local_auroc": 0.6}, both={"auroc": 0.7, "local_auroc": 0.8}, whole={"auroc": 0.9})
    rows = by_matching(runs)
    assert rows[["arm", "matching", "auroc"]].values.tolist() == [
        ["both", "global", 0.7], ["both", "local", 0.8], ["whole", "global", 0.9], ["words", "local", 0.6],
    ]  # fmt: skip
    assert by_matching(made_up(words={"local_auroc": 0.6})).matching.tolist() == ["local"]
    assert over_seeds(runs)["mean"].notna().all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.05, 0.2]), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8,
                unique_by=lambda run: run[:2]), st.data())
def test_gains_are_those_of_a_loop(given_runs, data):
    kept = data.draw(st.lists(st.booleans(), min_size=len(given_runs), max_size=len(given_runs)))
    rows = []
    for (fraction, seed, own, other), keep in zip(given_runs, kept, strict=True):
        common = {"preset": "demo", "fraction": fraction, "seed": seed, "train_pairs": 1}
        rows += [{**common, "arm": "reference", "auroc": own}] + [{**common, "arm": "other", "auroc": other}] * keep
    table = paired_gains(pd.DataFrame(rows), "reference").set_index("fraction")
    expected = {}
    for (fraction, _, own, other), keep in zip(given_runs, kept, strict=True):
        if keep:
            expected.setdefault(fraction, []).append(other - own)
    assert set(table.index) == set(expected)
    for fraction, gains in expected.items():
        row = table.loc[fraction]
        assert row["mean"] == pytest.approx(np.mean(gains)) and row.seeds == len(gains) and row.up == sum(gain > 0 for gain in gains)
        assert np.isnan(row.low) if len(gains) == 1 else row.low <= row["mean"] + 1e-12 and row.high >= row["mean"] - 1e-12


def test_arms_without_a_run_in_common_have_no_gain():
    runs = pd.concat([made_up(a={"auroc": 0.6}), made_up(b={"auroc": 0.7}).assign(seed=1)], ignore_index=True)
    assert paired_gains(runs, "a").empty and paired_gains(runs[runs.arm == "a"], "a").empty


def test_a_table_of_ours_is_read_as_it_was_written(tmp_path):
    text = "preset,arm,fraction,seed,auroc,data,digest,commit,device,isa\nsmoke,none,0.1,0,0.30000000000000004,0001,123456e78901,12e4,NA,\n"
    (tmp_path / "runs.csv").write_text(text)
    table = read_own(tmp_path / "runs.csv")
    assert table[["arm", "data", "digest", "commit", "device"]].values.tolist() == [["none", "0001", "123456e78901", "12e4", "NA"]]
    assert table.to_csv(index=False) == text and read_runs(tmp_path / "runs.csv").precision.isna().all()


def recorded(runs: Path, auroc: float) -> dict:
    "A run of smoke that never was: its row."
    smoke, arm = cxrvlm.settings.load_settings("smoke"), cxrvlm.settings.load_arm("baseline")
    folder, counts = run_folder(runs, "smoke", "baseline", 1, 0), {"train": 53, "validation": 6, "test": 5}
    return result_row(write_result(folder, smoke, arm, 1, 0, {"auroc": auroc}, counts, "f" * 16, Progress(step=12, best=1.2)))


def committed(folder: Path, row: dict, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row | changes]).to_csv(folder / "runs.csv", index=False)


@pytest.mark.parametrize(("changes", "auroc"), [({}, 0.7), ({"digest": "0" * 12}, 0.6), ({"data": "0" * 16}, 0.6), ({"seed": 1}, None)])
def test_a_record_that_is_stale_gives_way_to_a_committed_row(tmp_path, changes, auroc):
    committed(tmp_path / "smoke/committed", recorded(tmp_path, 0.7), **{"auroc": 0.6, **changes})
    assert read_results(tmp_path).auroc.tolist() == ([auroc] if auroc else [0.7, 0.6])


def test_a_record_older_than_the_precision_has_a_blank(tmp_path):
    row = recorded(tmp_path, 0.7)
    path = run_folder(tmp_path, "smoke", "baseline", 1, 0) / "result.json"
    record = json.loads(path.read_text())
    assert {"precision", "isa", "device", "threads"} <= record["provenance"].keys() and row["isa"] == record["provenance"]["isa"]
    record["provenance"] = {key: record["provenance"][key] for key in ("commit", "device", "threads")}
    path.write_text(json.dumps(record))
    assert read_results(tmp_path)[["precision", "isa"]].isna().all(axis=None)


def test_what_lies_beside_a_replaced_run_goes_with_it_and_is_named(tmp_path):
    row = recorded(tmp_path / "runs", 0.7)
    fresh, kept = tmp_path / "fresh", tmp_path / "kept"
    committed(fresh, row)
    committed(kept, row, seconds=99, auroc=0.6)
    look = {"preset": "smoke", "fraction": 1.0, "seed": 0, "split": "test", "finding": "all", "n": 5, **dict.fromkeys(METRICS, 0.5)}
    pd.DataFrame([look | {"arm": arm} for arm in ("baseline", "ours")]).to_csv(kept / "grounding.csv", index=False)
    pd.DataFrame([{key: row[key] for key in SAME} | {"study_id": "1", "neighbour": "2"}]).to_csv(kept / "neighbours.csv", index=False)
    said = merge_results("smoke", fresh, kept)
    assert said[1] == "replaced by the one trained again: smoke/baseline/1/0" and len(said) == 4
    assert all(f"{name}: 1 runs that were replaced had rows here" in line for name, line in zip(("grounding.csv", "neighbours.csv"), said[2:], strict=True))
    assert read_runs(kept / "runs.csv").auroc.tolist() == [0.7]
    assert read_grounding(kept).arm.tolist() == ["ours"] and not (kept / "neighbours.csv").exists()


@pytest.mark.parametrize("name", ["figure_3", "figure_4", "ablation"])
def test_a_figure_without_its_arms_says_so(name, tmp_path):
    other = SWEPT[SWEPT.arm == "baseline"].assign(arm="declip-combined" if name != "figure_4" else "image-random")
    figure = draw(name, other, tmp_path)["fig"]
    assert all(ax.texts[0].get_text() == "no runs" for ax in figure.axes)
    assert (tmp_path / f"{name}.svg").stat().st_size > 1000


def test_figure_4_knows_arms_by_what_they_do(tmp_path):
    adapted, both = (SWEPT[SWEPT.arm == arm] for arm in ("adapted", "combined"))
    words = both.assign(arm="gloria", auroc=np.nan)
    runs = pd.concat([adapted, adapted.assign(arm="infonce"), both, words, both.assign(arm="ours")], ignore_index=True)
    values = draw("figure_4", runs, tmp_path)
    lines = ["InfoNCE (G)", "InfoNCE + local (G)", "InfoNCE + local (L)"]
    a, b = ({label.rsplit(", ", 1)[0] for label in panel} for panel in labels(values["fig"]))
    assert a == {*lines, "local (L)"}
    assert b == {*lines, "DeCLIP, InfoNCE + local (G)", "DeCLIP, InfoNCE + local (L)"}
    assert values["shown"].groupby(["arm", "fraction", "seed"]).size().max() == 1


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("figure_4", "loss = combined\nalpha = 0.2\nbeta = 0.2\ngamma = 0.2"),  # generic encoders, but not the baseline
        ("figure_4", "image_init = simclr\ntext_init = adapted\nalpha = 0.1\nbeta = 0.1\ngamma = 0.1"),
        ("ablation", "image_init = simclr\ntext_init = adapted\nalpha = 0.1"),
    ],
)
def test_an_arm_with_other_weights_is_not_taken_for_the_papers(name, arm, tmp_path, monkeypatch):
    own = tmp_path / "settings.ini"
    own.write_text((ROOT / "settings.ini").read_text() + f"\n[arm mine]\n{arm}\n")
    read_arm, names = cxrvlm.settings.load_arm, cxrvlm.settings.arm_names(own)
    monkeypatch.setattr(cxrvlm.settings, "load_arm", lambda name, path=None: read_arm(name, own))
    monkeypatch.setattr(cxrvlm.settings, "arm_names", lambda path=None: names)
    shown = draw(name, SWEPT, tmp_path)["names"]
    assert "mine" in names and "mine" not in shown and {"adapted", "infonce"} <= set(shown)


@pytest.mark.parametrize("real", [False, True])
def test_figure_6_claims_nothing_about_real_images(real, tmp_path, monkeypatch):
    studies, exclusions = cxrvlm.data.load_studies(cxrvlm.settings.load_settings("smoke"))
    if real:
        studies = studies.assign(image="png/" + studies.study_id)
        monkeypatch.setattr(cxrvlm.images, "read_image", lambda ref, size, *more: np.zeros((size, size), np.uint8))
    monkeypatch.setattr(cxrvlm.data, "load_studies", lambda settings: (studies, exclusions))
    pairs = {"study_id": studies.study_id, "neighbour": np.roll(studies.study_id, 1), "similarity": np.linspace(1, 0, len(studies))}
    pd.DataFrame(pairs).to_csv(tmp_path / "neighbours.csv", index=False)
    values = draw("figure_6", SWEPT, tmp_path, neighbours=str(tmp_path / "neighbours.csv"), preset="smoke")
    shares = values["in_common"](values["table"].neighbour)
    captions = [ax.get_xlabel() for ax in values["fig"].axes]
    assert ("same annotation" in shares) == (not real) and captions[0]
    assert not real or set(captions) <= set(studies.study_id)
    assert not {text for text in studies.impression if text in " ".join(captions)}
