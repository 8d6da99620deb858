"""The runs of a list, side by side and without papermill: each is a notebook of nbs/experiments, executed cell by cell."""
import gzip
import io
import json
import multiprocessing
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "nbs/experiments"
RECORDS = ("history.csv", "placements.csv", "downstream.csv", "neighbours.csv", "adaptation.json", "result.json")  # last: it is all there
ARCHIVE = 15 * 2**20  # bytes of one file that is brought home, at most


class Clock:
    "How much of the visit is left."

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self.now, self.end = now, now() + seconds

    def left(self) -> float:  # seconds
        return max(0.0, self.end - self.now())

    def share(self, of_it: float) -> "Clock":
        "A clock for a part of what is left."
        return Clock(of_it * self.left(), self.now)


# A run


def execute(notebook: Path, values: dict, after: Callable[[dict], bool] = lambda names: False) -> dict:
    "Run a notebook's code cells with these parameters, as papermill would; until `after` a cell says that it is enough."
    names = {"__name__": notebook.stem, "In": [], "display": lambda *things: None}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        sources = ["".join(cell["source"])]
        if "parameters" in cell["metadata"].get("tags", []):
            sources.append("# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items()))
        for source in sources:
            names["In"].append(source)
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)
        if after(names):
            break
    return names


@dataclass(frozen=True)
class Task:
    "A notebook to run."
    notebook: str
    values: tuple[tuple[str, object], ...]  # its parameters
    record: Path  # what it writes last
    needs: tuple["Task", ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return " ".join([self.notebook, *(str(value) for name, value in self.values if name != "runs")])

    @property
    def kind(self) -> tuple:
        "Tasks that take about equally long."
        return self.notebook, *(value for name, value in self.values if name in ("preset", "arm"))


def tasks_for(preset: str, arm: str, fraction: float, seed: int, runs: Path) -> list[Task]:
    "A run, after what has to be there before it: as in workflow/Snakefile."
    from cxrvlm.initialisation import cxrbert_folder, simclr_folder, text_start
    from cxrvlm.results import run_folder
    from cxrvlm.settings import load_arm, load_settings

    def task(notebook, record, needs=(), **values):
        return Task(notebook, tuple({"preset": preset, **values, "runs": str(runs)}.items()), record, needs)

    way, stage1 = load_arm(arm), runs / preset / "stage1"
    data = task("prepare_data", runs / preset / "data/data.json")
    before = [data]
    if way.adapts_image:
        before.append(task("adapt_image", simclr_folder(stage1, seed) / "adaptation.json", (data,), seed=seed))
    if way.adapts_text:
        start = text_start(load_settings(preset), way)
        before.append(task("adapt_text", cxrbert_folder(stage1, start, seed) / "adaptation.json", (data,), start=start, seed=seed))
    record = run_folder(runs, preset, arm, fraction, seed) / "result.json"
    return [*before, task("train_vlm", record, tuple(before), arm=arm, fraction=fraction, seed=seed)]


# Processes


def work(function: Callable, output: Path, environment: dict, *arguments) -> None:
    "What a process of its own does: its output goes to a file."
    output.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    function(*arguments)


def run_task(task: Task) -> None:
    "Run the notebook on what there is: a preset for laptops says device = cpu, and this is a visit to a GPU."
    import cxrvlm.settings
    load = cxrvlm.settings.load_settings
    cxrvlm.settings.load_settings = lambda *args, **kwargs: cxrvlm.settings.replace(load(*args, **kwargs), device="auto")
    execute(EXPERIMENTS / f"{task.notebook}.ipynb", dict(task.values))


class Processes:
    "Starts functions in processes that have imported everything already."

    def __init__(self):
        self.context, self.environment = multiprocessing.get_context("forkserver"), {}
        sources = [path.read_text() for path in sorted(EXPERIMENTS.glob("*.ipynb"))]
        self.context.set_forkserver_preload(sorted({name for text in sources for name in re.findall(r"from (cxrvlm[.\w]*) import", text)}))

    def start(self, output: Path, function: Callable, *arguments):
        process = self.context.Process(target=work, args=(function, output, self.environment, *arguments), daemon=False)
        process.start()
        return process


# The list


def numbers(text: str, kind: type) -> list:
    "0,2-4 -> 0 2 3 4"
    parts = [re.fullmatch(r"(\d+)-(\d+)", part) or part for part in text.split(",")]
    spans = [range(int(p[1]), int(p[2]) + 1) if isinstance(p, re.Match) else [kind(p)] for p in parts]
    return [value for span in spans for value in span]


def read_queue(path: Path) -> Iterator[tuple[str, str, float, int]]:
    "The runs of a list, in its order."
    from cxrvlm.settings import load_arm, load_settings

    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        try:
            preset, arms, fractions, seeds = fields
            settings = load_settings(preset)
            arms = settings.arms if arms == "*" else arms.split(",")
            fractions = settings.fractions if fractions == "*" else numbers(fractions, float)
            seeds = settings.seeds if seeds == "*" else numbers(seeds, int)
            for arm in arms:
                load_arm(arm)
        except ValueError as error:  # SettingsError is one
            raise SystemExit(f"{path.name}, line {number}: {line.strip()!r} is not PRESET ARMS FRACTIONS SEEDS: {error}") from None
        yield from ((preset, arm, fraction, seed) for seed in seeds for fraction in fractions for arm in arms)


def known_runs(preset: str, results: Path = ROOT / "results") -> set[tuple]:
    "The runs that the committed table has."
    import pandas as pd

    path, keys = results / preset / "runs.csv", ["arm", "fraction", "seed", "digest"]
    return set(pd.read_csv(path, dtype={"digest": str})[keys].itertuples(index=False, name=None)) if path.is_file() else set()


def plan(wanted, runs: Path, results: Path = ROOT / "results") -> list[Task]:
    "The tasks of a list, each once; without the runs that are known."
    from cxrvlm.settings import digest, load_arm, load_settings

    tasks, known = {}, {}
    for preset, arm, fraction, seed in wanted:
        known.setdefault(preset, known_runs(preset, results))
        if (arm, fraction, seed, digest(load_settings(preset), load_arm(arm))) not in known[preset]:
            tasks |= dict.fromkeys(tasks_for(preset, arm, fraction, seed, runs))
    return list(tasks)


# The sweep


@dataclass
class Sweep:
    "Tasks side by side: in the order of the list, but what has to wait for another lets the next one go first."
    slots: int
    clock: Clock
    start: Callable  # task -> process, with exitcode (None: at work) and kill()
    finished: Callable  # called with task, its exit code and seconds
    sleep: Callable[[float], None] = time.sleep
    longest: dict = field(default_factory=dict)  # kind -> seconds

    def fits(self, task: Task) -> bool:
        "May it end in time? A kind that nobody has seen is given a try."
        return self.clock.left() > self.longest.get(task.kind, 0)

    def collect(self, running: dict, done: set, failed: set) -> None:
        "Look which tasks have ended."
        for task, (process, began) in list(running.items()):
            if process.exitcode is not None:
                del running[task]
                seconds = self.clock.now() - began
                (failed if process.exitcode else done).add(task)
                self.longest[task.kind] = max(seconds, self.longest.get(task.kind, 0))
                self.finished(task, process.exitcode, seconds)

    def run(self, tasks: list[Task]) -> dict[str, list[Task]]:  # done, failed, stopped, left
        "Work until the list or the time is over."
        done, failed, running = {task for task in tasks if task.record.is_file()}, set(), {}
        waiting = [task for task in tasks if task not in done]
        try:
            while self.clock.left():
                self.collect(running, done, failed)
                ready = [task for task in waiting if done.issuperset(task.needs) and self.fits(task)]
                for task in ready[: self.slots - len(running)]:
                    waiting.remove(task)
                    running[task] = self.start(task), self.clock.now()
                if not running:
                    break
                self.sleep(0.2)
        finally:
            for process, _ in running.values():
                process.kill()
        return {"done": [*done], "failed": [*failed], "stopped": [*running], "left": waiting}


class Results:
    "What is brought home, written as it comes."

    def __init__(self, out: Path, runs: Path):
        self.out, self.runs, self.number = out, runs, 1

    def add(self, task: Task) -> None:
        "Keep the records of a finished task: one archive behind another in one file, then the table of all runs in one piece."
        content = io.BytesIO()
        with gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for path in [task.record.with_name(name) for name in RECORDS]:
                if path.is_file():
                    archive.add(path, path.relative_to(self.runs))
        if self.archive.exists() and self.archive.stat().st_size + content.tell() > ARCHIVE:
            self.number += 1
        with self.archive.open("ab") as file:
            file.write(content.getvalue())
        if task.record.name == "result.json":
            from cxrvlm.results import read_results
            from cxrvlm.training import write_atomically

            write_atomically(self.out / "runs.csv", lambda path: read_results(self.runs).to_csv(path, index=False))

    @property
    def archive(self) -> Path:
        return self.out / f"runs-{self.number}.tar.gz"


def run_sweep(log, tasks: list[Task], processes: Processes, slots: int, clock: Clock, results: Results) -> dict:
    "The list, or as much of it as there is time for."
    def start(task: Task):
        return processes.start(task.record.with_name(f"{task.notebook}.log"), run_task, task)

    def finished(task: Task, code: int, seconds: float) -> None:
        log(f"{'FAILED ' if code else ''}{task}: {seconds:.0f} s, {clock.left():.0f} s are left")
        if code:
            log("\n".join(task.record.with_name(f"{task.notebook}.log").read_text().splitlines()[-12:]))
        else:
            results.add(task)

    return Sweep(slots, clock, start, finished).run(tasks)
