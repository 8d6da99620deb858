"""What bounds runs side by side on one card: their pace, alone and together, with and without NVIDIA's MPS."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sweep import EXPERIMENTS, Clock, Processes, execute

STEPS, WARM = 30, 5  # of a measurement, and before it


def mps_environment(folder: Path) -> dict[str, str]:
    "What a process needs to know of NVIDIA's Multi-Process Service, by which processes use the card together and not in turn."
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "mps"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "mps-log")}


def start_mps(log, folder: Path) -> dict[str, str] | None:  # the environment of its clients; None if it does not start
    "Start the service, and try it."
    environment = mps_environment(folder)
    for path in environment.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    try:
        options = {"env": os.environ | environment, "check": True, "capture_output": True}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], timeout=20, **options)
        subprocess.run([sys.executable, "-c", "import torch; torch.ones(2, device='cuda').sum().item()"], timeout=60, **options)
    except (OSError, subprocess.SubprocessError) as error:
        log(f"MPS does not start: {error}")
        return None
    return environment


def stop_mps(folder: Path) -> None:
    "Leave the card as it was found, whether the service runs or not."
    if shutil.which("nvidia-cuda-mps-control"):
        with suppress(subprocess.TimeoutExpired):
            environment = os.environ | mps_environment(folder)
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=environment, timeout=10, capture_output=True)


def pace(preset: str, runs: Path, number: int, barrier) -> None:
    "Some steps of the arm `ours`, all processes at the same time: steps/s, the share of a core that they take, and what waits for batches."
    from cxrvlm.settings import replace

    folder = runs / "pace" / str(number)

    def limit(names: dict, steps: int) -> None:
        names["settings"] = replace(names["settings"], device="auto", max_iterations=steps, train_iterations=STEPS, valid_iterations=1)

    def after(names: dict) -> bool:
        if names.get("folder", folder) != folder:  # the cell that reads the settings has run
            generic = {"image_init": "generic", "text_init": "generic"}  # what a step costs does not depend on its weights
            names |= {"folder": folder, "way": names["way"].model_copy(update=generic), "digest": lambda *given: ""}
            limit(names, WARM)
        return "progress" in names

    names = execute(EXPERIMENTS / "train_vlm.ipynb", {"preset": preset, "arm": "ours", "seed": number, "runs": str(runs)}, after)
    limit(names, WARM + STEPS)
    warm = names["progress"]
    barrier.wait(100)
    wall, busy = time.perf_counter(), time.process_time()
    exec(names["In"][-1], names)  # the same cell goes on from its checkpoint
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    seconds, waited = names["progress"].seconds - warm.seconds, names["progress"].loading - warm.loading
    found = {"rate": STEPS / seconds, "waited": waited / seconds, "core": busy / wall}
    (runs / f"pace-{number}.json").write_text(json.dumps(found))


def card_busy() -> float:
    "The share of the last moments in which the card was at work, in percent; NaN if there is none."
    try:
        asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        return float(subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return float("nan")


def side_by_side(processes: Processes, preset: str, runs: Path, count: int, clock: Clock) -> list[dict]:  # rate, waited, core, card
    "The pace of so many processes; of none, if one of them failed or the time was over."
    folder = Path(tempfile.mkdtemp(dir=runs.parent))
    (folder / preset).mkdir()
    (folder / preset / "data").symlink_to(runs / preset / "data")
    barrier, busy, clock = processes.context.Barrier(count), [], Clock(min(120, clock.left()), clock.now)
    started = [processes.start(folder / f"{n}.log", pace, preset, folder, n, barrier) for n in range(count)]
    while clock.left() and not any(process.exitcode for process in started) and any(process.exitcode is None for process in started):
        busy.append(card_busy())
        time.sleep(0.3)
    for process in started:
        process.kill()
    found = [json.loads(path.read_text()) | {"card": sorted(busy)[len(busy) * 3 // 4]} for path in folder.glob("pace-*.json")]
    return found if len(found) == count else []


def bounds(log, processes: Processes, preset: str, runs: Path, counts: list[int], clock: Clock) -> tuple[int, dict]:
    "Measure, and choose what is fastest: how many processes, and their environment (of MPS, or empty)."
    log(f"\nSide by side: {STEPS} steps of `ours`, preset {preset}. What is near 100% is what bounds them.")
    log("processes  MPS  steps/s of each: lowest median highest    sum  waited for batches  of a core  card busy")
    best = 0, counts[-1], {}
    for begin in (dict, lambda: start_mps(log, runs.parent)):
        if (environment := begin()) is None:
            break
        processes.environment = environment
        for count in counts:
            if not (found := side_by_side(processes, preset, runs, count, clock)):
                log(f"{count:9d}  {'yes' if environment else 'no':3s}  not measured: see the logs in {runs.parent}, or give it more time")
                continue
            rates = sorted(row["rate"] for row in found)
            waited, core = (sum(row[name] for row in found) / count for name in ("waited", "core"))
            log(f"{count:9d}  {'yes' if environment else 'no':3s}  {rates[0]:23.2f} {rates[count // 2]:6.2f} {rates[-1]:7.2f} "
                f"{sum(rates):6.2f} {waited:19.0%} {core:10.0%} {found[0]['card']:9.0f}%")
            best = max(best, (sum(rates), count, environment), key=lambda row: row[0])
    log(f"chosen: {best[1]} side by side, {'with' if best[2] else 'without'} MPS")
    return best[1:]
