"""A visit to a GPU: the order of its runs, its time limit, and that nothing finished is lost on the way home."""
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow/gpu"))

import pack  # noqa: E402
import unpack  # noqa: E402
import visit  # noqa: E402
from cxrvlm.settings import digest, load_arm, load_settings  # noqa: E402
from sweep import Clock, Results, Sweep, execute, plan, read_queue, tasks_for  # noqa: E402

TODAY = digest(load_settings("smoke"), load_arm("baseline"))

RESULT = {
    "preset": "smoke", "arm": "baseline", "fraction": 0.5, "seed": 0, "metrics": {"auroc": 0.625}, "data": "d" * 16,
    "counts": {"train": 26, "validation": 6, "test": 6}, "digest": TODAY, "seconds": 1.5,
    "training": {"steps": 12, "best_step": 8, "best_valid": 1.25},
    "provenance": {"commit": "cxrvlm 0.1.0+g07c8bb8f9904.changed", "device": "NVIDIA H100", "threads": 1},
}  # fmt: skip


class Time:
    "A clock that only `sleep` moves, and processes that take as long as they are told."

    def __init__(self, durations: dict, codes: dict | None = None):
        self.t, self.durations, self.codes, self.started, self.killed, self.ended = 0.0, durations, codes or {}, [], [], []

    def now(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        self.t += seconds

    def start(self, task):
        time, end = self, self.t + self.durations.get(task.notebook, 1)

        class Process:
            exitcode = property(lambda self: time.codes.get(str(task), 0) if time.t >= end else None)

            def kill(self):
                time.killed.append(str(task))

        self.started.append(str(task))
        return Process()

    def sweep(self, tasks, slots: int, seconds: float) -> dict:
        def finished(task, code, took):
            self.ended.append(str(task))

        return Sweep(slots, Clock(seconds, self.now), self.start, finished, self.sleep).run(tasks)


def tasks(tmp_path: Path, queue: str, results: str = "nothing") -> list:
    (tmp_path / "queue.txt").write_text(queue)
    return plan(read_queue(tmp_path / "queue.txt"), tmp_path / "runs", tmp_path / results)


def test_the_list_comes_in_its_order_and_each_task_once(tmp_path):
    found = [str(task) for task in tasks(tmp_path, "smoke ours,baseline 1 0-1  # first\n\nsmoke * * *\n")]
    assert found == [
        "prepare_data smoke",
        "adapt_image smoke 0", "adapt_text smoke random 0", "train_vlm smoke ours 1.0 0", "train_vlm smoke baseline 1.0 0",
        "adapt_image smoke 1", "adapt_text smoke random 1", "train_vlm smoke ours 1.0 1", "train_vlm smoke baseline 1.0 1",
        "train_vlm smoke baseline 0.5 0", "train_vlm smoke adapted 0.5 0", "train_vlm smoke ours 0.5 0", "train_vlm smoke adapted 1.0 0",
    ]  # fmt: skip


def test_the_committed_list_names_presets_and_arms_that_there_are():
    assert len(list(read_queue(ROOT / "workflow/gpu/queue.txt"))) > 10


@pytest.mark.parametrize("line", ["smoke ours 1", "smoke oars 1 0", "smole ours 1 0", "smoke ours half 0", "smoke ours 1 0-x"])
def test_a_wrong_line_is_named(tmp_path, line):
    with pytest.raises(SystemExit, match="queue.txt, line 2: .*is not PRESET ARMS FRACTIONS SEEDS"):
        tasks(tmp_path, f"# a list\n{line}\n")


def test_runs_that_are_known_are_left_out(tmp_path):
    record = ROOT / "results/demo/runs.csv"
    known = pd.read_csv(record).query("arm == 'baseline' and fraction == 1").iloc[0]
    queue = f"demo baseline 1 {known.seed}\n"
    assert len(tasks(tmp_path, queue)) == 2
    (tmp_path / "old/demo").mkdir(parents=True)
    pd.read_csv(record).assign(digest="0" * 12).to_csv(tmp_path / "old/demo/runs.csv", index=False)  # of other settings
    assert len(tasks(tmp_path, queue, "old")) == 2
    assert plan([("demo", "baseline", 1.0, int(known.seed))], tmp_path, ROOT / "results") == []


def test_what_has_to_wait_lets_the_next_one_go_first(tmp_path):
    time = Time({"prepare_data": 2, "adapt_image": 9, "adapt_text": 9, "train_vlm": 3})
    outcome = time.sweep(tasks(tmp_path, "smoke ours,baseline 0.5,1 0\n"), slots=3, seconds=100)
    assert time.started == [
        "prepare_data smoke",
        "adapt_image smoke 0", "adapt_text smoke random 0", "train_vlm smoke baseline 0.5 0",
        "train_vlm smoke baseline 1.0 0", "train_vlm smoke ours 0.5 0", "train_vlm smoke ours 1.0 0",
    ]  # fmt: skip
    assert len(outcome["done"]) == 7 and not outcome["left"] and not time.killed


def test_the_sweep_ends_in_time_and_starts_nothing_that_cannot(tmp_path):
    time = Time({"prepare_data": 1, "train_vlm": 10})
    outcome = time.sweep(tasks(tmp_path, "smoke baseline 1 0-9\n"), slots=2, seconds=48)
    assert len(time.ended) == 1 + 8 and len(outcome["left"]) == 2  # 4 times two; then 7 s are left, and 10 are needed
    assert not outcome["stopped"] and time.t < 48
    time = Time({"prepare_data": 1, "train_vlm": 10})
    outcome = time.sweep(tasks(tmp_path, "smoke baseline 1 0-9\n"), slots=2, seconds=6)  # nobody knows yet how long they take
    assert time.killed == ["train_vlm smoke baseline 1.0 0", "train_vlm smoke baseline 1.0 1"] == [str(task) for task in outcome["stopped"]]
    assert time.t == pytest.approx(6, abs=0.3)


def test_what_failed_holds_up_only_what_needs_it(tmp_path):
    time = Time({}, {"adapt_text smoke random 0": 1})
    outcome = time.sweep(tasks(tmp_path, "smoke ours,baseline 1 0-1\n"), slots=4, seconds=100)
    assert [str(task) for task in outcome["failed"]] == ["adapt_text smoke random 0"]
    assert [str(task) for task in outcome["left"]] == ["train_vlm smoke ours 1.0 0"]
    assert "train_vlm smoke ours 1.0 1" in time.ended


def test_a_clock_gives_a_share_of_what_is_left():
    time = Time({})
    clock = Clock(100, time.now)
    time.sleep(20)
    part = clock.share(0.25)
    assert (clock.left(), part.left()) == (80, 20)
    time.sleep(30)
    assert (clock.left(), part.left()) == (50, 0)


def test_a_notebook_gets_its_parameters_as_papermill_gives_them(tmp_path):
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["not code"]},
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed = 0\n", "arm = 'a'"]},
        {"cell_type": "code", "metadata": {}, "source": ["given = In[1], globals()['seed']"]},
        {"cell_type": "code", "metadata": {}, "source": ["raise RuntimeError"]},
    ]
    (tmp_path / "little.ipynb").write_text(json.dumps({"cells": cells}))
    names = execute(tmp_path / "little.ipynb", {"seed": 7}, lambda names: "given" in names)
    assert names["given"] == ("# Parameters\nseed = 7", 7) and names["arm"] == "a"
    with pytest.raises(RuntimeError):
        execute(tmp_path / "little.ipynb", {"seed": 7})


# On the way home


def finish(results: Results, seed: int, **changes) -> None:
    "What a run leaves."
    *_, task = tasks_for("smoke", "baseline", 0.5, seed, results.runs)
    task.record.parent.mkdir(parents=True)
    task.record.write_text(json.dumps(RESULT | {"seed": seed} | changes))
    placed = pd.DataFrame({"patient_id": ["p7", "p3"], "matching": "global", "value": [0.25, 0.123456]})
    placed.to_csv(task.record.with_name("placements.csv"), index=False)
    task.record.with_name("state.pt").write_bytes(b"a checkpoint")
    results.add(task)


@pytest.fixture
def visited(tmp_path) -> Results:
    "A visit that finished two runs."
    results = Results(tmp_path / "out", tmp_path / "there/runs")
    results.out.mkdir()
    (results.out / "visit.log").write_text("visit of 2026-11-27 20:30:59, Python 3.12\n")
    for seed in (0, 1):
        finish(results, seed)
    return results


def home(tmp_path: Path, name: str = "runs.csv") -> pd.DataFrame:
    return pd.read_csv(tmp_path / "home/results/smoke" / name, dtype=str)


def test_runs_come_home_once(tmp_path, visited, capsys):
    unpack.main([visited.out], tmp_path / "home")
    assert "2 runs, 2 of them new" in capsys.readouterr().out
    runs, placed = home(tmp_path), home(tmp_path, "placements.csv.gz")
    assert runs[["seed", "digest", "commit", "auroc"]].values.tolist() == [[seed, TODAY, "07c8bb8f9904 with changes", "0.625"] for seed in "01"]
    assert placed[["patient_id", "value", "seed"]].values.tolist() == [["1", "0.2500", "0"], ["0", "0.1235", "0"], ["1", "0.2500", "1"], ["0", "0.1235", "1"]]
    assert (tmp_path / "home/results/gpu/20261127-2030.log").read_text().startswith("visit of 2026")
    assert not list((tmp_path / "home").rglob("state.pt"))
    before = {name: (tmp_path / "home/results/smoke" / name).read_bytes() for name in ("runs.csv", "placements.csv.gz")}
    unpack.main([visited.out], tmp_path / "home")
    assert "2 runs, 0 of them new" in capsys.readouterr().out
    assert before == {name: (tmp_path / "home/results/smoke" / name).read_bytes() for name in before}


def later(tmp_path: Path, seed: int, **changes) -> Path:
    "What another visit wrote that made one run."
    results = Results(tmp_path / f"later {seed}", tmp_path / f"again {seed}/runs")
    results.out.mkdir()
    finish(results, seed, **changes)
    return results.out


def test_rows_that_are_there_stay_as_they_are(tmp_path, visited):
    unpack.main([visited.out], tmp_path / "home")
    table = tmp_path / "home/results/smoke/runs.csv"
    before = table.read_text().splitlines()
    unpack.main([later(tmp_path, 2)], tmp_path / "home")
    assert table.read_text().splitlines()[:-1] == before and home(tmp_path).seed.tolist() == ["0", "1", "2"]
    assert home(tmp_path, "placements.csv.gz").seed.unique().tolist() == ["0", "1", "2"]


def test_a_run_of_other_settings_is_named_and_does_not_count(tmp_path, visited, capsys):
    unpack.main([visited.out], tmp_path / "home")
    before = home(tmp_path)
    unpack.main([later(tmp_path, 0, digest="b" * 12)], tmp_path / "home")
    assert "ignored, its settings are not today's: smoke/baseline/0.5/0" in capsys.readouterr().out
    pd.testing.assert_frame_equal(home(tmp_path), before)
    assert len(home(tmp_path, "placements.csv.gz")) == 4


@pytest.mark.parametrize("lost", ["the table", "the end of the archive", "the archive"])
def test_a_visit_that_was_cut_short_loses_nothing_that_was_finished(tmp_path, visited, lost):
    archive = visited.archive
    if lost == "the table":
        (visited.out / "runs.csv").unlink()
    elif lost == "the archive":
        archive.unlink()
    else:  # killed while the third run was written
        first = archive.stat().st_size
        finish(visited, 2)
        archive.write_bytes(archive.read_bytes()[: first + 200])
        (visited.out / "runs.csv").unlink()
    unpack.main(sorted(visited.out.iterdir()), tmp_path / "home")
    assert home(tmp_path).seed.tolist() == ["0", "1"]
    assert (tmp_path / "home/results/smoke/placements.csv.gz").exists() == (lost != "the archive")


def test_archives_stay_small_enough_to_come_home(tmp_path, visited, monkeypatch):
    monkeypatch.setattr("sweep.ARCHIVE", visited.archive.stat().st_size + 100)
    finish(visited, 2)
    assert sorted(path.name for path in visited.out.glob("*.gz")) == ["runs-1.tar.gz", "runs-2.tar.gz"]
    unpack.main([visited.out], tmp_path / "home")
    assert home(tmp_path, "placements.csv.gz").seed.tolist() == ["0", "0", "1", "1", "2", "2"]


# On the way there


def test_a_cut_file_is_whole_again_when_all_parts_have_come(tmp_path):
    content, inside = bytes(range(256)) * 3 + b"!", Path("site/model")
    (tmp_path / "weights").write_bytes(content)
    pack.split(tmp_path / "weights", [tmp_path / "packs/1", tmp_path / "packs/2"], inside)
    site, whole = tmp_path / "site", tmp_path / "site/weights"
    site.mkdir()
    for number in (1, 2):
        assert not whole.exists()
        (site / f"weights.{number}of2").write_bytes((tmp_path / f"packs/{number}" / inside / f"weights.{number}of2").read_bytes())
        visit.join_parts(site)
    assert whole.read_bytes() == content


def test_a_pack_that_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/wheel").write_bytes(b"0" * 1000)
    monkeypatch.setattr(pack, "LIMIT", pack.LIMIT // 1000)
    monkeypatch.setattr(Path, "relative_to", lambda self, other: self)
    with pytest.raises(SystemExit, match="leave something out"):
        pack.check_sizes([tmp_path / "base"])


def test_packs_of_another_state_of_the_code_are_refused(tmp_path):
    (tmp_path / "packs/base").mkdir(parents=True)
    (tmp_path / "packs/base/pack.json").write_text('{"code": "of last week"}')
    with pytest.raises(SystemExit, match="another state of the code: `make gpu-pack`"):
        visit.install(tmp_path / "packs", tmp_path / "site")
