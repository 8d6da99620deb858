"""The whole graph on the smoke preset: snakemake, papermill, real kernels."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from cxrvlm.committed import merge_results
from cxrvlm.figures import draw_all
from cxrvlm.results import read_beside, read_results, read_runs

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RUN, SHOWN = "smoke/baseline/1/0", "smoke/ours/1/0"
pytestmark = pytest.mark.timeout(1800)  # for what hangs, and not for a slow machine


def start(*command: str) -> subprocess.Popen:
    "Start a command of the virtual environment, in a process group of its own."
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [BIN / command[0], *command[1:]], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def snakemake(runs: Path, *arguments: str) -> tuple[int, str]:
    "Run the graph with its runs in `runs`; exit code and output."
    process = start("snakemake", "--cores", "2", "smoke", "--config", f"runs={runs}", *arguments)
    output = process.communicate()[0]
    return process.returncode, output


def train(runs: Path, **parameters) -> subprocess.Popen:
    "One run by hand, as the README has it."
    given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    (runs / RUN).mkdir(parents=True, exist_ok=True)
    notebook = "nbs/experiments/train_vlm.ipynb"
    return start("papermill", notebook, str(runs / RUN / "train_vlm.ipynb"), "-k", "python3", "-p", "runs", str(runs), *given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "The finished graph."
    folder = tmp_path_factory.mktemp("runs")
    code, output = snakemake(folder)
    assert code == 0, output
    return folder


def test_the_graph_leaves_what_the_design_names(runs):
    for name in ("train_vlm.ipynb", "model/model.safetensors", "model/config.json", "model/tokenizer.json", "history.csv"):
        assert (runs / RUN / name).is_file()
    assert not (runs / RUN / "checkpoint").exists()
    result = json.loads((runs / RUN / "result.json").read_text())
    assert {"metrics", "counts", "data", "digest", "provenance", "settings", "seconds"} <= result.keys()
    assert 0 < result["metrics"]["auroc"] < 1
    assert len(list(runs.rglob("result.json"))) == 6
    for figure in ("retrieval_curve", "figure_3", "figure_4", "ablation", "figure_6"):
        assert (runs / f"smoke/figures/{figure}.svg").stat().st_size > 1000
    text = (runs / "smoke/figures/retrieval_curve.txt").read_text()
    assert all(word in text for word in ("baseline", "adapted", "ours", "global", "local"))


def test_an_arm_has_the_metrics_of_what_it_trains_and_leaves_its_neighbours(runs):
    metrics = {arm: json.loads((runs / f"smoke/{arm}/1/0/result.json").read_text())["metrics"] for arm in ("baseline", "ours")}
    assert "local_auroc" not in metrics["baseline"] and {"auroc", "local_auroc", "local_t2i_recall@10"} <= metrics["ours"].keys()
    table = pd.read_csv(runs / SHOWN / "neighbours.csv", dtype={"study_id": str, "neighbour": str})
    assert len(table) and set(table) == {"study_id", "neighbour", "similarity"} and (table.study_id != table.neighbour).all()
    assert not list((runs / "smoke/baseline").rglob("neighbours.csv"))
    history = pd.read_csv(runs / SHOWN / "history.csv")
    assert {f"train_{term}" for term in ("infonce", "gloria", "iss", "tss", "mvs_infonce", "mvs_gloria")} <= set(history)


def test_a_run_leaves_what_the_intervals_and_the_downstream_tables_need(runs):
    metrics = json.loads((runs / SHOWN / "result.json").read_text())["metrics"]
    placed = pd.read_csv(runs / SHOWN / "placements.csv")
    means = placed.groupby("matching").value.mean()
    assert means["global"] == pytest.approx(metrics["auroc"], abs=1e-4) and means["local"] == pytest.approx(metrics["local_auroc"], abs=1e-4)
    assert set(pd.read_csv(runs / SHOWN / "downstream.csv").task) == {"zero-shot", "probe"}
    assert (runs / "smoke/figures/placements.csv.gz").exists() and (runs / "smoke/figures/downstream.csv").exists()


def test_a_model_has_a_card(runs):
    card = (runs / SHOWN / "model/README.md").read_text().lower()
    assert all(words in card for words in ("not for diagnosis", "smoke", "ours", "auroc")), card


def test_all_figures_are_drawn_or_say_why_not(runs):
    said = draw_all("smoke", runs / "smoke/all", runs, only=("retrieval_curve", "figure_3", "figure_4", "claims", "figure_5", "table_4", "grounding"))
    assert said.pop("grounding").startswith("there is no grounding.csv") and set(said.values()) == {""}, said
    assert (runs / "smoke/all/claims.md").stat().st_size > 1000
    for name in ("retrieval_curve.svg", "figure_3.png", "figure_3.svg", "figure_4.png", "placements.csv.gz"):
        assert (runs / "smoke/all" / name).read_bytes() == (runs / "smoke/figures" / name).read_bytes(), f"{name} differs when drawn again"


def test_evaluation_repeats_the_record(runs):
    result, evaluation = (json.loads((runs / SHOWN / f"{name}.json").read_text()) for name in ("result", "evaluation"))
    assert evaluation["metrics"] == pytest.approx(result["metrics"])
    assert set(pd.read_csv(runs / SHOWN / "examples.csv").shown) == {"own", "top", "least"}


def test_each_encoder_is_adapted_once_and_used_by_all_runs(runs):
    records = sorted(runs.rglob("adaptation.json"))
    assert [str(path.parent.relative_to(runs / "smoke/stage1")) for path in records] == ["random-adapted/0", "simclr/0"]
    made = max(path.stat().st_mtime for path in records)
    results = sorted((runs / "smoke/adapted").rglob("result.json"))
    assert len(results) == 2 and all(path.stat().st_mtime > made for path in results)


def test_an_adapted_run_starts_from_stage_1(tmp_path):
    process = train(tmp_path, preset="smoke", arm="adapted", fraction=1, seed=0)
    output = process.communicate()[0]
    assert process.returncode != 0 and "run nbs/experiments/adapt_text.ipynb for this preset and seed first" in output


def test_arms_without_weights_are_left_out_and_named():
    process = start("snakemake", "openi", "--dry-run", "--quiet", "host")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Left out: arm clip. clip is not on this machine" in output and "hf download timm/resnet50_clip.openai" in output
    counts = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    assert counts["adapt_image"] == counts["adapt_text"] == "3" and counts["run"] == str(11 * 6 * 3)


def test_a_preset_none_of_whose_arms_can_be_run_says_so():
    process = start("snakemake", "--dry-run", "paper")
    output = process.communicate()[0]
    assert process.returncode != 0 and "no arm of the preset paper can be run here" in output
    assert "hf download microsoft/BiomedVLP-CXR-BERT-general --local-dir weights/BiomedVLP-CXR-BERT-general" in output


def test_a_finished_graph_has_nothing_to_do(runs):
    code, output = snakemake(runs, "--dry-run")
    assert code == 0 and "Nothing to be done" in output, output


def test_committed_runs_are_drawn_and_only_the_others_are_trained(runs, tmp_path):
    folder, results = tmp_path / "runs", tmp_path / "results"
    merge_results("smoke", runs / "smoke/figures", results / "smoke")
    table = read_runs(results / "smoke/runs.csv")
    table.loc[(table.arm == "baseline") & (table.fraction == 1), "digest"] = "0" * 12  # other settings than today's
    table.to_csv(results / "smoke/runs.csv", index=False)
    shutil.copytree(runs / "smoke/data", folder / "smoke/data")

    def graph(*arguments, **config):
        given = [f"{key}={value}" for key, value in {"runs": folder, "results": results, **config}.items()]
        process = start("snakemake", "--cores", "2", *arguments, "--config", *given)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        return output, dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))

    everything = graph("smoke", "--dry-run", "--quiet", "host", committed=False)[1]
    assert everything["run"] == "6" and everything["adapt_image"] == everything["evaluate"] == "1" and "committed" not in everything
    output, _ = graph(f"{folder}/smoke/committed/runs.csv")
    assert "5 runs are done, and not trained again. 1 of other settings ignored." in output
    left = graph("smoke", "--dry-run", "--quiet", "host")[1]
    assert left["run"] == "1" and not left.keys() & {"adapt_image", "adapt_text", "evaluate"} and left["figure_6"] == "1"

    graph(f"{folder}/smoke/figures/retrieval_curve.png", f"{folder}/smoke/figures/figure_6.png")
    assert [path.parent.relative_to(folder) for path in folder.rglob("result.json")] == [Path(RUN)]
    same = ["preset", "arm", "fraction", "seed", "auroc", "local_auroc", "data", "digest", "precision", "isa", "steps"]
    assert read_results(folder)[same].equals(read_results(runs)[same])
    one, other = (read_beside(root, "placements.csv").groupby(["arm", "fraction", "matching", "patient_id"]).value.sum() for root in (folder, runs))
    assert (one.index == other.index).all() and (one - other).abs().max() < 1e-3
    assert (folder / "smoke/figures/neighbours.csv").read_bytes() == (runs / "smoke/figures/neighbours.csv").read_bytes()
    said = merge_results("smoke", folder / "smoke/figures", results / "smoke")
    assert "6 runs, 0 of them new, 0 of other" in said[0] and said[1].endswith("smoke/baseline/1/0") and len(said) == 2


def test_only_what_is_missing_is_done_again(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    before = (copy / RUN / "result.json").read_text()
    (copy / RUN / "result.json").unlink()
    code, output = snakemake(copy, "--dry-run", "--quiet", "host")
    assert code == 0 and re.search(r"^run +1$", output, re.MULTILINE), output
    process = train(copy, preset="smoke", fraction=1, seed=0)
    assert process.wait() == 0, process.stdout.read()
    again = json.loads((copy / RUN / "result.json").read_text())
    assert again["metrics"] == json.loads(before)["metrics"]


def test_a_failing_run_does_not_stop_the_others(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(copy / "smoke/baseline")
    broken = copy / "smoke/baseline/0.5/0"
    (broken / "checkpoint").mkdir(parents=True)
    (broken / "checkpoint/state.pt").write_text("this is no checkpoint")
    code, output = snakemake(copy)
    assert code != 0 and "state.pt cannot be read" in output
    assert len(list(copy.rglob("result.json"))) == 5 and not (broken / "result.json").exists()


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"fracton": 0.5}, "there is no parameter fracton: did you mean fraction?"),
        ({"seed": "one"}, "seed = 'one': must be int"),
        ({"arm": "theirs"}, "has no arm 'theirs'"),
        ({"fraction": 0}, "must be above 0"),
    ],
)
def test_a_wrong_parameter_is_refused(tmp_path, parameters, complaint):
    process = train(tmp_path, **parameters)
    output = process.communicate()[0]
    assert process.returncode != 0 and complaint in output
    assert not list(tmp_path.rglob("result.json"))


def test_the_parameters_are_documented():
    process = start("papermill", "--help-notebook", "nbs/experiments/train_vlm.ipynb")
    text = process.communicate()[0]
    assert process.returncode == 0
    for name, kind in [("preset", "str"), ("arm", "str"), ("fraction", "float"), ("seed", "int"), ("runs", "str")]:
        assert f"{name}: {kind}" in text


def test_a_killed_kernel_is_no_finished_run(runs, tmp_path):
    process = train(tmp_path, preset="smoke", fraction=1, seed=0)
    checkpoint = tmp_path / RUN / "checkpoint/state.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)  # the kernel has a session of its own
    process.wait()
    assert checkpoint.exists() and not (tmp_path / RUN / "result.json").exists()
    again = train(tmp_path, preset="smoke", fraction=1, seed=0)
    assert again.wait() == 0, again.stdout.read()
    killed, whole = (json.loads((folder / RUN / "result.json").read_text()) for folder in (tmp_path, runs))
    assert killed["metrics"] == whole["metrics"] and killed["training"] == whole["training"]
