"""The machine, a row of the table, and the file with all numbers."""
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .versions import COMMIT, ROOT

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "transformers", "tokenizers", "timm", "open_clip_torch", "accelerate", "lightly")
COLUMNS = ("line", "what is ours", "reference", "precision, threads", "ours", "reference takes", "ratio", "target", "met", "agree in")


def versions() -> dict[str, str]:
    "Of Python and the packages that take the time."
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def commit() -> str:
    "Of our version; with a plus if files were changed since."
    def git(*command):
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


def cpu_name() -> str:
    "As the kernel calls it."
    path = Path("/proc/cpuinfo")
    names = [row.split(":")[1].strip() for row in path.read_text().splitlines() if row.startswith("model name")] if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    "What PyTorch uses of the CPU, and what an environment variable has taken from it."
    words = [torch.backends.cpu.get_cpu_capability()]
    words += ["AMX"] if torch.cpu._is_amx_tile_supported() else ["no AMX"]
    limits = [f"{key}={os.environ[key]}" for key in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if key in os.environ]
    return ", ".join(words + limits)


def gpu_name() -> str:
    "The card and its driver."
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return torch.cuda.get_device_name()


def machine(device: str, clock: str) -> dict:
    "What every number depends on."
    found = {"date": datetime.now().isoformat(timespec="minutes"), "commit": commit(), "reference": COMMIT, "device": device}
    found |= {"cpu": cpu_name(), "cores": os.cpu_count(), "instructions": instruction_set(), "system": platform.platform()}
    found |= {"gpu": gpu_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return found | {"clock": clock, "load": os.getloadavg()[0], "versions": versions()}


def header(found: dict) -> str:
    "The machine in some lines of Markdown."
    lines = [f"Benchmarks of {found['commit']} on {found['date']}; the reference is {found['reference']} where no other is named.", ""]
    lines += [f"- {found['cpu']}, {found['cores']} cores, {found['instructions']}; {found['system']}"]
    lines += [f"- {found['gpu']}, CUDA {found['cuda']}"] if "gpu" in found else []
    lines += ["- " + ", ".join(f"{name} {number}" for name, number in found["versions"].items())]
    lines += [f"- medians by the {found['clock']} clock, in turn in one process; load average before the start {found['load']:.2f}"]
    return "\n".join(lines)


def warn_if_busy(load: float) -> None:
    "Say it if other work is running: then the numbers are not this machine's."
    if load > 0.5:
        print(f"WARNING: the load average is {load:.2f} before anything was started, so other work is running. These numbers are not "
              "those of a quiet machine; --clock cpu --threads 1 disturbs the ratios less.", file=sys.stderr)


BUSY = " (busy)"

def is_busy(row: dict) -> bool:
    "Was there other work while the line ran? Its own threads are part of the load."
    return row["load"] > row["threads"] + 1


def duration(seconds: float) -> str:
    "With the unit that suits it."
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1e} s"


def verdict(ratio: float, target: float | None) -> str:
    "Is the target met? A line without one is only looked at."
    return "" if target is None else "yes" if round(ratio, 2) <= target else "**no**"


def table_rows(row: dict) -> list[list[str]]:
    "The row's cells: one line for time, and one for memory where it was measured."
    if "fault" in row:
        kind = "SKIPPED" if row.get("skipped") else "**FAILED**"
        return [[row["line"], kind, row["fault"].replace("|", "/").replace("\n", " "), *[""] * (len(COLUMNS) - 3)]]
    def number(value):
        return "" if value is None else f"{value:g}"
    name = [row["line"], row["variant"], row["against"], f"{row['precision']}, {row['threads']}"]
    unit = f" {row['unit']}" if row["unit"] else ""
    rows = [[*name, duration(row["ours"]) + unit, duration(row["reference"]) + unit, f"{row['ratio']:.2f}" + BUSY * is_busy(row), number(row["target"]),
             verdict(row["ratio"], row["target"]), row["checked"]]]
    if "memory_ratio" in row:
        sizes = [f"{row[key]:.0f} MiB" for key in ("MiB_ours", "MiB_reference")]
        ratio, target = row["memory_ratio"], row["memory_target"]
        rows.append([*name, *sizes, f"{ratio:.2f}", number(target), verdict(ratio, target), ""])
    return rows


def table_head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def write(path: Path | None, found: dict, rows: list[dict]) -> None:
    "All that is known so far: a run that is stopped has left what it measured."
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": found, "rows": rows}, indent=1), encoding="utf-8")
    temporary.replace(path)
