"""The paper's claims in made-up worlds where the truth is known, and the statistics behind them against slow loops."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrvlm.claims import (
    CLAIMS,
    by_luck,
    claims_markdown,
    claims_table,
    judge,
    null_or_untested,
    paper_evidence,
    pool,
    sweep_evidence,
    weigh,
)
from cxrvlm.intervals import Estimate
from cxrvlm.results import data_multiplier, placements

ROOT = Path(__file__).resolve().parents[1]
SIZES = (0.01, 0.05, 0.1, 0.2, 0.5, 1)
# How far each arm is ahead of the baseline, in 0.7 decades of data, if all that the paper says is true; local matching leads by 0.1.
AHEAD = {
    "baseline": 0, "clip": 0, "image-random": 0, "image-imagenet": 0.2, "image-simclr": 0.4, "text-clinicalbert": 0.6,
    "text-cxrbert-general": 0.8, "text-cxrbert": 1, "adapted": 1, "gloria": 1.1, "combined": 1.2, "declip-infonce": 1.4,
    "declip-tss-iss": 1.1, "declip-mvs": 1.1, "declip-nn": 1.1, "ours": 1.6,
    "start-random": 0, "start-image": 0.3, "start-text": 0.4, "start-both": 0.8,
}  # fmt: skip
LOCAL = {"gloria", "combined", "ours"}


def curve(fraction, ahead):
    "A curve that rises quickly and then saturates, moved to the left by some decades."
    return 0.9 - 0.2 * 10 ** (-0.8 * (np.log10(fraction) + 2 + ahead))


def world(sign: float, noise: float, arms=AHEAD, wave: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Runs and downstream results: all claims true (sign > 0), reversed (sign < 0), or without any effect (0)."
    runs, downstream = [], []
    for number, arm in enumerate(arms):
        for size, fraction in enumerate(SIZES):
            for seed in range(3):
                key = {"preset": "made-up", "arm": arm, "fraction": fraction, "seed": seed}
                luck = noise * ((seed + 2 * number + wave * (size % 5)) % 3 - 1)  # without effect on the mean over the seeds
                value = curve(fraction, sign * 0.7 * AHEAD[arm]) + luck
                local = curve(fraction, sign * 0.7 * (AHEAD[arm] + 0.1)) - luck if arm in LOCAL else np.nan
                runs.append(key | {"train_pairs": 1000 * fraction, "auroc": np.nan if arm == "gloria" else value, "local_auroc": local})
                if arm in ("clip", "ours"):
                    downstream += [key | {"task": task, "label": "mean", "balanced_accuracy": value} for task in ("zero-shot", "probe")]
    level = {1: 0.6, 0: curve(0.1, 0), -1: 0.95}[np.sign(sign)]
    for task in ("zero-shot", "probe"):
        downstream.append({"arm": "biovil", "fraction": 1, "seed": 0, "task": task, "label": "mean", "balanced_accuracy": level})
    return pd.DataFrame(runs), pd.DataFrame(downstream)


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize(("sign", "noise", "expected"), [(1, 1e-5, "supported"), (-0.4, 1e-5, "contradicted"), (0, 0.3, "undecided")])
def test_a_claim_is_judged_by_what_is_true(name, sign, noise, expected):
    wave = name not in ("ten_times", "probe_carries")  # the first crossing of a bumpy curve comes early
    runs, downstream = world(sign, noise, wave=wave)
    row, parts = judge(CLAIMS[name], sweep_evidence(runs, downstream=downstream))
    assert row["verdict"] == expected, (row, parts)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_without_its_runs_is_not_tested_and_says_what_is_missing(name):
    runs, _ = world(1, 1e-5, {"clip": 0})
    row, parts = judge(CLAIMS[name], sweep_evidence(runs))
    assert row["verdict"] == "not tested" and parts.empty and row["value"] == ""
    assert ("snakemake" in row["note"] or "evaluate.ipynb" in row["note"]), row["note"]


def test_one_seed_decides_nothing_and_is_called_a_single_run():
    runs, downstream = world(1, 0)
    table, parts = claims_table([sweep_evidence(runs[runs.seed == 0], downstream=downstream[downstream.seed == 0])])
    assert set(table.verdict) == {"single run: for"} and parts.low.isna().all() and parts.shown.str.endswith("(single run)").all()
    runs, downstream = world(-0.4, 0)
    table, _ = claims_table([sweep_evidence(runs[runs.seed == 0], downstream=downstream[downstream.seed == 0])])
    assert set(table.verdict) == {"single run: against"}


def test_a_second_name_of_an_arm_is_the_same_arm():
    runs, _ = world(1, 1e-5)
    renamed = runs.replace({"arm": {"adapted": "infonce", "ours": "declip-combined"}})
    (one, _), (other, _) = (claims_table([sweep_evidence(table)]) for table in (runs, renamed))
    assert one.equals(other)


def placed(runs: pd.DataFrame, spread: float, column: str = "value") -> pd.DataFrame:
    "What 40 patients contribute to each run, alike for all seeds of an arm and a size."
    rows = []
    for (arm, fraction), part in runs.groupby(["arm", "fraction"]):
        share = np.random.default_rng([len(arm), round(100 * fraction)]).normal(0, spread, 40)
        rows += [pd.DataFrame({"patient_id": [f"p{i}" for i in range(40)], column: run.auroc + share - share.mean(), "value": 0.5} | {column: run.auroc + share - share.mean()})
                 .assign(arm=arm, fraction=fraction, seed=run.seed, matching="global") for run in part.itertuples()]  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def test_test_patients_widen_an_interval():
    runs, _ = world(1, 1e-5, ["adapted", "baseline"])
    claim = CLAIMS["both_adaptations"]
    (seeds, narrow), (patients, parts) = (judge(claim, sweep_evidence(runs, table)) for table in (None, placed(runs, 2)))
    assert seeds["verdict"] == "supported" and patients["verdict"] == "undecided" and (parts.high - parts.low).min() > 0.1
    assert parts.value.to_numpy() == pytest.approx(narrow.value.to_numpy())


def test_another_measure_has_its_own_column_and_its_own_patients():
    runs, _ = world(1, 1e-5, ["adapted", "baseline"])
    other = runs.assign(auroc_masked=runs.auroc - 0.1 * (runs.arm == "adapted"), local_auroc_masked=np.nan)
    claim = CLAIMS["both_adaptations"]
    row, parts = judge(claim, sweep_evidence(other, measure="auroc_masked"))
    assert row["verdict"] == "contradicted" and judge(claim, sweep_evidence(other))[0]["verdict"] == "supported"
    wide, own = judge(claim, sweep_evidence(other, placed(runs, 2, "auroc_masked"), measure="auroc_masked"))
    assert wide["verdict"] == "undecided" and own.value.to_numpy() == pytest.approx(parts.value.to_numpy())
    with pytest.raises(ValueError, match="made-up have no column 'f1'"):
        sweep_evidence(other, measure="f1")


def test_folds_are_no_seeds():
    runs, _ = world(1, 0.01, ["adapted", "baseline"])
    claim, folded = CLAIMS["both_adaptations"], runs.assign(preset="medpix", auroc_masked=runs.auroc, local_auroc_masked=np.nan)
    (_, seeds), (row, folds) = (judge(claim, sweep_evidence(table, placed(runs, 2) if "auroc_masked" in table else None)) for table in (runs, folded))
    assert ((folds.high - folds.low) / (seeds.high - seeds.low)).to_numpy() == pytest.approx(np.sqrt((1 / 3 + 1 / 3) * 3))
    assert row["value"].endswith("3 folds")


def luck(rng, seeds: int, fails: bool) -> pd.DataFrame:
    "Runs of four arms that are the same, at four sizes; with `fails` a seed in five fails, of any arm."
    rows = []
    for arm in ("adapted", "combined", "declip-infonce", "ours"):
        for size, fraction in enumerate((0.01, 0.05, 0.2, 1)):
            for seed in range(seeds):
                value = 0.7 + 0.05 * size + rng.normal(0, 0.03 / (1 + size)) - 0.1 * fails * (rng.random() < 0.2)
                rows.append({"preset": "made-up", "arm": arm, "fraction": fraction, "seed": seed, "train_pairs": 1, "auroc": value})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seeds", [3, 5])
def test_no_effect_at_all_is_seldom_contradicted_and_never_supported(seeds, fails):
    rng, count = np.random.default_rng(seeds), 60
    words = [judge(CLAIMS["declip_adds"], sweep_evidence(luck(rng, seeds, fails)))[0]["verdict"] for _ in range(count)]
    assert words.count("contradicted") <= 0.05 * count and "supported" not in words


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_luck_is_bounded_for_any_number_of_questions(n, seed):
    rng = np.random.default_rng(seed)
    p = rng.random((4000, n))
    for k in range(1, n + 1):
        assert (by_luck(p, k) <= 0.05).mean() <= 0.065  # all are luck
        p[:, : k - 1] = 0  # k - 1 are true: the k-th is luck
        assert (by_luck(p, k) <= 0.05).mean() <= 0.065


def test_a_pooled_effect_is_the_mean_over_the_sizes_and_is_known_better():
    rng = np.random.default_rng(0)
    runs = luck(rng, 5, False)
    evidence = sweep_evidence(runs)
    row, parts = judge(CLAIMS["declip_adds"], evidence)
    asked = CLAIMS["declip_adds"].test(evidence)
    for question in pool(asked):
        own = parts[parts.what == question.what]
        found = weigh(evidence, question.weights)
        assert found.value == pytest.approx(own.value.mean()) and 2 * found.half() < (own.high - own.low).max()
        assert f"{question.what}: {found.value:+.3f} (" in row["pooled"] and found.value == pytest.approx(own.value.mean())
    assert len(pool(asked)) == 2 and "pooled within" not in row["note"]
    same = runs.assign(auroc=0.7 + 0.001 * runs.seed + 1e-4 * rng.normal(size=len(runs)))
    assert "pooled within 0.01" in judge(CLAIMS["declip_adds"], sweep_evidence(same))[0]["note"]


@pytest.mark.parametrize(("decades", "expected"), [(0.3, "contradicted"), (1, "supported"), (1.6, "contradicted")])
def test_ten_times_is_neither_two_times_nor_forty(decades, expected):
    rng = np.random.default_rng(1)
    rows = [
        {"preset": "made-up", "arm": arm, "fraction": f, "seed": s, "train_pairs": 1, "auroc": 0.6 + 0.1 * (np.log10(100 * f) + up) + 1e-4 * rng.normal()}
        for arm, up in (("baseline", 0), ("ours", decades)) for f in SIZES for s in range(3)
    ]  # fmt: skip
    row, parts = judge(CLAIMS["ten_times"], sweep_evidence(pd.DataFrame(rows)))
    assert row["verdict"] == expected and set(parts.what) == {"data that baseline needs, above 5x", "data that baseline needs, below 20x"}
    assert set(parts[parts.what.str.contains("below")].fraction) == {0.01, 0.05}
    if decades < 1.4:
        near = parts[parts.fraction == 0.01]
        assert (near.low <= 10**decades * 1.01).all() and (near.high >= 10**decades * 0.99).all() and (near.high / near.low).max() < 1.1


def test_ninety_five_percent_is_easier_with_chance_than_above_it():
    rows = [{"preset": "made-up", "arm": "ours", "fraction": f, "seed": s, "train_pairs": 1, "auroc": value + 1e-4 * s}
            for f, value in ((0.05, 0.64), (0.1, 0.66), (1, 0.68)) for s in range(3)]  # fmt: skip
    evidence = sweep_evidence(pd.DataFrame(rows))
    (plain, one), (strict, other) = (judge(CLAIMS[name], evidence) for name in ("ten_percent", "ten_percent_above_chance"))
    assert plain["verdict"] == "supported" and strict["verdict"] == "contradicted"
    assert one.value.item() == pytest.approx(0.66 / 0.68, abs=1e-3) and other.value.item() == pytest.approx(0.16 / 0.18, abs=2e-3)
    blind = sweep_evidence(pd.DataFrame(rows).assign(auroc=0.4))
    assert "no better than chance" in judge(CLAIMS["ten_percent_above_chance"], blind)[0]["note"]


def test_an_interval_of_a_ratio_and_of_a_multiplier_holds_the_truth():
    rng, held = np.random.default_rng(0), []
    for _ in range(60):
        rows = [
            {"preset": "made-up", "arm": arm, "fraction": f, "seed": s, "train_pairs": 1, "auroc": 0.6 + 0.1 * (np.log10(100 * f) + up) + rng.normal(0, 0.01)}
            for arm, up in (("baseline", 0), ("ours", 0.8)) for f in (0.01, 0.1, 1) for s in range(5)
        ]  # fmt: skip
        evidence = sweep_evidence(pd.DataFrame(rows))
        ratio, times = (judge(CLAIMS[name], evidence)[1].iloc[0] for name in ("ten_percent_above_chance", "ten_times"))
        held.append([ratio.low <= 0.28 / 0.38 <= ratio.high, times.low <= 10**0.8 <= times.high])
    assert (np.mean(held, axis=0) > 0.88).all()


def test_what_the_paper_prints_twice_stands_beside_the_verdict():
    table, _ = claims_table([paper_evidence("table_4"), paper_evidence("figure_5")])
    row = next(line for line in claims_markdown(table).splitlines() if CLAIMS["probe_example"].text in line)
    assert "**single run: against**" in row and "**single run: for**" in row and "70.1 in Figure 5" in row and "68.9 in Table 4" in row
    other = next(line for line in claims_markdown(table).splitlines() if CLAIMS["zero_shot_clip"].text in line)
    assert "ours at 20%, zero-shot: no more than CLIP; section 3 says better" in other and "probe" not in other


def test_a_null_needs_everything_at_once():
    there, absent = Estimate(0.05, 0.005, 5), Estimate(0.001, 0.002, 5)
    whole = [absent, there, {"probe": there}, {"oracle": there}, dict.fromkeys("abc", absent)]
    assert null_or_untested(*whole) == ("null", [])
    unknown = Estimate(0.05, np.nan, 1)
    for place, spoilt in ((0, unknown), (1, unknown), (2, {}), (2, {"probe": unknown}), (3, {}), (3, {"oracle": unknown}), (4, dict.fromkeys("abc", unknown))):
        case = [*whole[:place], spoilt, *whole[place + 1 :]]
        word, reasons = null_or_untested(*case)
        assert word == "could not be tested here" and len(reasons) == 1, (place, reasons)


def test_the_papers_numbers_give_the_verdicts_of_its_slips():
    table, parts = claims_table([paper_evidence("table_4"), paper_evidence("figure_5")])
    found = {name: table[table.claim == claim.text].verdict.tolist() for name, claim in CLAIMS.items()}
    assert found.pop("zero_shot_clip") == ["single run: open"] * 2  # at 20% it ties with CLIP
    assert found.pop("zero_shot_biovil") == ["single run: against"] * 2  # at 1 to 20% it does not beat BioViL's 67.3
    assert found.pop("probe_example") == ["single run: against", "single run: for"]  # 68.9 in Table 4, 70.1 in Figure 5; CLIP 69.9 at 10%
    assert found.pop("probe_carries") == ["single run: against", "single run: open"]
    assert found.pop("full_data") == ["single run: for"] * 2
    assert set(sum(found.values(), [])) == {"not tested"} and len(found) == 20
    own = parts[parts.claim == CLAIMS["zero_shot_clip"].text]
    assert set(own[~(own.low > 0)].fraction) == {0.2} and not (own.high < 0).any()
    own = parts[parts.claim == CLAIMS["zero_shot_biovil"].text]
    assert own[own.high < 0].groupby("source").fraction.apply(set).tolist() == [{0.01, 0.05, 0.1, 0.2}] * 2


def test_the_transcription_is_the_papers():
    table, figure = (pd.read_csv(ROOT / f"results/paper/{name}.csv") for name in ("table_4", "figure_5"))
    keys, tasks = ["arm", "fraction"], ["zero_shot", "probe"]
    classes = table[table.label != "mean"].groupby(keys)[tasks].agg(["mean", "size"])
    assert (classes.xs("size", axis=1, level=1) == 12).all(axis=None)
    printed = table[table.label == "mean"].set_index(keys)[tasks].sort_index()
    gap = (classes.xs("mean", axis=1, level=1) - printed).abs().stack()
    assert gap[gap > 0.0501].round(2).to_dict() == {("biovil", 1.0, "probe"): 0.13}  # 72.77 printed as 72.9
    other = figure.set_index(keys)[tasks].sort_index()
    moved = (other != printed).stack()
    assert set(moved[moved].index) == {("ours", 0.01, "probe"), ("ours", 0.1, "zero_shot"), ("ours", 0.5, "probe")}
    assert figure.set_index(keys).slip.dropna().index.size == 5 and table.slip.notna().sum() == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_placements_are_those_of_a_loop(n, seed):
    z = np.random.default_rng(seed).integers(0, 5, size=(n, n)).astype(float)  # ties everywhere

    def share(keep):
        won = [(z[k, k] > z[i, j]) + (z[k, k] == z[i, j]) / 2 for k in range(n) for i in range(n) for j in range(n) if i != j and keep(k, i, j)]
        return np.mean(won)

    A = share(lambda k, i, j: True)
    expected = [sum(share(lambda *kij, p=p, at=at: kij[at] == p) for at in range(3)) - 2 * A for p in range(n)]
    assert placements(lambda a, b: torch.tensor(z[a:b]), n) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_masked_placements_are_the_slope_in_the_weight_of_a_study(n, seed):
    rng = np.random.default_rng(seed)
    z, groups = rng.integers(0, 5, size=(n, n)).astype(float), np.append(rng.integers(0, 3, size=n - 1), 3)
    negatives = [(i, j) for i in range(n) for j in range(n) if groups[i] != groups[j]]

    def masked_auroc(w):  # of a test set in which study p counts w[p] times
        weights = np.array([w[k] * w[i] * w[j] for k in range(n) for i, j in negatives])
        won = np.array([(z[k, k] > z[i, j]) + (z[k, k] == z[i, j]) / 2 for k in range(n) for i, j in negatives])
        return (weights * won).sum() / weights.sum()

    A, step = masked_auroc(np.ones(n)), 1e-5 * np.eye(n)
    slopes = [(masked_auroc(1 + step[p]) - masked_auroc(1 - step[p])) / 2e-5 for p in range(n)]
    found = placements(lambda a, b: torch.tensor(z[a:b]), n, torch.tensor(groups))
    assert found == pytest.approx(A + n * np.array(slopes), abs=1e-6) and found.mean() == pytest.approx(A, abs=1e-12)


def test_a_preset_says_what_its_claims_are_tested_on():
    runs, _ = world(1, 1e-5)
    bench = runs.assign(preset="bench", auroc_masked=runs.auroc + 0.1, local_auroc_masked=runs.local_auroc + 0.1)
    found, plain = (sweep_evidence(table).values.sort_index() for table in (bench, runs))
    assert found.to_numpy() == pytest.approx(plain.to_numpy() + 0.1) and found.index.equals(plain.index)
    with pytest.raises(ValueError, match="some runs have no auroc_masked, which auroc_masked needs"):
        sweep_evidence(bench, pd.DataFrame({"arm": ["a"], "matching": "global", "fraction": 1.0, "seed": 0, "patient_id": "0", "value": 0.5}))


@settings(max_examples=60, deadline=None)
@given(st.floats(-0.2, 0.2), st.floats(0.01, 0.3), st.sampled_from(SIZES))
def test_the_multiplier_on_straight_lines(gap, slope, used):
    line = 0.5 + slope * np.log10(SIZES)
    x, expected = float(data_multiplier(SIZES, line, 0.5 + slope * np.log10(used) + gap, used)), 10 ** (gap / slope)
    if expected * used > 1 + 1e-9:
        assert x == np.inf
    elif expected * used < 0.01 - 1e-9:
        assert x == 0
    else:
        assert x == pytest.approx(expected) or abs(expected * used - 1) < 1e-6 or abs(expected * used - 0.01) < 1e-6


def SHOW(table):  # what a notebook displays, for tests that look at it
    return None


def draw_notebook(name: str, folder: Path, **given: str) -> dict:
    "The names that a figure notebook leaves."
    values = {"In": [], "display": lambda table: SHOW(table)}
    for cell in json.loads((ROOT / f"paper_figures/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
        if "parameters" in cell["metadata"].get("tags", []):
            values |= {"output": str(folder), **given}
    plt.close("all")
    return values


@pytest.mark.parametrize("name", ["claims", "figure_5", "table_4", "table_3"])
def test_a_figure_without_downstream_results_says_so_and_one_with_them_is_drawn_alike_twice(name, tmp_path):
    runs, downstream = world(1, 0.01)
    runs.assign(steps=10, seconds=7.2, device="made-up", threads=1).to_csv(tmp_path / "runs.csv", index=False)
    given = {"results": str(tmp_path / "runs.csv")}
    values = draw_notebook(name, tmp_path / "without", **given)
    if name in ("figure_5", "table_4"):
        assert "evaluate.ipynb" in values["MISSING"] and all("no results" in ax.get_title() for ax in values["fig"].axes)
    parts = [downstream.assign(label=label, auroc=0.5, positives=9, note="") for label in ("mean", "Edema")]
    pd.concat(parts).to_csv(tmp_path / "downstream.csv", index=False)
    for folder in ("one", "other"):
        values = draw_notebook(name, tmp_path / folder, **given)
    if name in ("figure_5", "table_4"):
        assert not any("no results" in ax.get_title() for ax in values["fig"].axes)
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written and all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in written)


@pytest.mark.parametrize("name", ["figure_3", "figure_4", "ablation"])
def test_a_figure_of_gains_is_drawn_with_and_without_patients_and_with_both_names_of_an_arm(name, tmp_path, monkeypatch):
    runs, _ = world(1, 0.01, ["baseline", "adapted", "combined", "ours", "declip-infonce", "declip-mvs", "image-simclr"])
    second = runs[runs.arm.isin(["adapted", "image-simclr"])].replace({"arm": {"adapted": "infonce", "image-simclr": "adapted-image"}})
    runs = pd.concat([runs[runs.arm != "image-simclr"], second], ignore_index=True).assign(preset="demo")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    shown = []
    monkeypatch.setitem(draw_notebook.__globals__, "SHOW", shown.append)
    draw_notebook(name, tmp_path, results=str(tmp_path / "runs.csv"))
    placed(runs, 2).to_csv(tmp_path / "placements.csv", index=False)
    draw_notebook(name, tmp_path, results=str(tmp_path / "runs.csv"))
    half = len(shown) // 2
    for seeds, patients in zip(shown[:half], shown[half:], strict=True):
        assert seeds["mean"].equals(patients["mean"]) and (patients.high - patients.low > seeds.high - seeds.low).any()
    assert half
