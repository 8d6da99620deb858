"""A short visit to a bare GPU machine: the card, the tests, the benchmarks, what bounds runs side by side, and a sweep.

    python3 workflow/gpu/visit.py --minutes 9 --out $OUT          # or: make gpu-visit MINUTES=9

Needs Python 3.12, PyTorch and the packs of `pack.py` (which says how to bring them); no network, no git, no Jupyter.
It ends before its minutes do. All that it finds lies in the folder OUT from the moment it is found, so that nothing
finished is lost if the visit is cut short:

    visit.log           everything that was printed, with the tests' and the benchmarks' output
    runs.csv            one row per finished run
    runs-1.tar.gz, ...  what each run and each part of stage 1 recorded, one small archive behind another
    benchmarks.json     the benchmarks' numbers

Runs are the notebooks of nbs/experiments, executed cell by cell, so that there is one source of what a run is.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from bounds import bounds, stop_mps
from sweep import ROOT, Clock, Processes, Results, plan, read_queue, run_sweep

PARTS = ("tests", "benchmarks", "bounds", "sweep")
RESERVE = 15  # seconds at the end of a visit, in which everything is stopped
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}
QUIET |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # asking whether there is a card must not start CUDA before a fork


def code_state(root: Path = ROOT) -> str:
    "A digest of the code that makes a run."
    files = [*(root / "cxrvlm").rglob("*"), *(root / "nbs/experiments").glob("*.ipynb"), root / "settings.ini"]
    kept = [file for file in sorted(files) if file.is_file() and file.suffix != ".pyc"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in kept)).hexdigest()[:16]


class Log:
    "Prints, and keeps what it printed."

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def run(self, command: list[str], clock: Clock, tail: int = 15) -> None:
        "A command and its children, until the clock says stop; the log gets its output, the terminal the end of it."
        seconds = clock.left()
        self(f"\n$ {' '.join(map(str, command))}    (at most {seconds:.0f} s)")
        before = self.path.stat().st_size
        with self.path.open("ab") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                end = f"exit status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                end = "stopped, because its time was over"
            finally:
                kill_group(process.pid)
                process.wait()
        with self.path.open("rb") as file:
            file.seek(before)
            print(*file.read().decode(errors="replace").splitlines()[-tail:], sep="\n", flush=True)
        self(end)


def kill_group(number: int) -> None:
    "End a process that began a session, and all that it started."
    try:
        os.killpg(number, signal.SIGKILL)
    except ProcessLookupError:
        pass


# Installing the packs


def join_parts(site: Path) -> None:
    "Put together the files that `pack.py` has cut, if all their parts have come."
    for first in site.rglob("*.1of*"):
        count = int(first.name.rpartition("of")[2])
        parts = [first.with_name(re.sub(r"\.1of", f".{number}of", first.name)) for number in range(1, count + 1)]
        if all(part.is_file() for part in parts):
            first.with_name(first.name.rpartition(".")[0]).write_bytes(b"".join(part.read_bytes() for part in parts))


def install(packs: Path, site: Path) -> None:
    "Lay out the packs that were brought, in this process's path and its children's."
    for pack in sorted(packs.glob("*")):
        for wheel in (pack / "wheels").glob("*.whl"):
            if not (site / wheel.name).exists():  # on a warm machine it is there
                zipfile.ZipFile(wheel).extractall(site)
                (site / wheel.name).touch()
        if (pack / "site").is_dir():
            shutil.copytree(pack / "site", site, dirs_exist_ok=True)
        for folder in (pack / "reference").glob("*"):
            shutil.copytree(folder, ROOT / "build" / folder.name, dirs_exist_ok=True)
        known = pack / "pack.json"
        if known.is_file() and json.loads(known.read_text())["code"] != code_state():
            raise SystemExit(f"{pack} was packed for another state of the code: `make gpu-pack`, and bring it again")
    join_parts(site)
    os.environ.update(QUIET, PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]))
    sys.path[:0] = [str(site), str(ROOT)]


# The visit


def describe(log: Log, clock: Clock) -> None:
    "The machine."
    log(f"visit of {time.strftime('%Y-%m-%d %H:%M:%S')}, Python {sys.version.split()[0]}, {os.cpu_count()} cores, code {code_state()}")
    if shutil.which("nvidia-smi"):
        log.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,compute_mode", "--format=csv"], clock)
    text = "import torch, transformers as t, pandas as p; print('torch', torch.__version__, 'cuda', torch.version.cuda, "
    text += "torch.cuda.is_available() and torch.cuda.get_device_name(), 'transformers', t.__version__, 'pandas', p.__version__)"
    log.run([sys.executable, "-c", text], clock)


def run_tests(log: Log, device: str, clock: Clock) -> None:
    "The tests that need a GPU; without one, whether they can be imported."
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    only = [] if device == "cuda" else ["--collect-only"]
    log.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-v", "--durations=0", *only, *files], clock, 40)


def run_benchmarks(log: Log, device: str, clock: Clock, out: Path) -> None:
    "All of them, or in a rehearsal whether they start."
    if not (ROOT / "benchmarks/__main__.py").is_file():
        return log("\nthere are no benchmarks")
    quick = [] if device == "cuda" else ["--quick"]
    log.run([sys.executable, "-m", "benchmarks", "--device", device, "--json", str(out / "benchmarks.json"), *quick], clock, 60)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A short visit to a bare GPU machine.")
    parser.add_argument("--minutes", type=float, default=9, help="it ends before")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-visit", help="what is brought home")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--queue", type=Path, default=Path(__file__).with_name("queue.txt"), help="what is trained")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "none"), default=PARTS, help="what is done; none: the packs are laid out")
    parser.add_argument("--side-by-side", nargs="+", type=int, default=[1, 4, 15], metavar="N", help="how many runs at once are tried")
    parser.add_argument("--packs", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "cxrvlm-visit", help="outlasts a call on a warm machine")
    return parser.parse_args(arguments)


def train(given: argparse.Namespace, log: Log, clock: Clock, runs: Path) -> None:
    "Bounds and sweep, which share the data."
    tasks, processes, results = plan(read_queue(given.queue), runs), Processes(), Results(given.out, runs)
    log(f"\n{sum(task.notebook == 'train_vlm' for task in tasks)} runs are wanted, {len(tasks)} tasks with what they need")
    slots = max(given.side_by_side)
    try:
        if "bounds" in given.parts and tasks:
            run_sweep(log, tasks[:1], processes, 1, clock, results)  # the data of the first preset
            preset = dict(tasks[0].values)["preset"]
            slots, processes.environment = bounds(log, processes, preset, runs, given.side_by_side, clock.share(0.4))
        if "sweep" in given.parts:
            outcome = run_sweep(log, tasks, processes, slots, clock, results)
            log(", ".join(f"{len(tasks)} {name}" for name, tasks in outcome.items()))
            log("\n".join(f"stopped: {task}" for task in outcome["stopped"]))
    finally:
        stop_mps(runs.parent)


def main() -> None:
    given = parse()
    signal.signal(signal.SIGTERM, lambda *signal: sys.exit(143))  # what has been started is ended
    clock, runs, given.out = Clock(60 * given.minutes - RESERVE), given.scratch / "runs", given.out.resolve()
    for folder in (given.out, runs):
        folder.mkdir(parents=True, exist_ok=True)
    log = Log(given.out / "visit.log")
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    install(given.packs, given.scratch / "site")
    describe(log, clock)
    if "tests" in given.parts:
        run_tests(log, given.device, clock.share(0.25))
    if "benchmarks" in given.parts:
        run_benchmarks(log, given.device, clock.share(0.4), given.out)
    if {"bounds", "sweep"} & {*given.parts}:
        train(given, log, clock, runs)
    log(f"{clock.left() + RESERVE:.0f} s of {60 * given.minutes:.0f} were left")


if __name__ == "__main__":
    main()
