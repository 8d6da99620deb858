"""Run every notebook, and compare what comes out with what is stored.

`make test` runs them in a copy of the working tree (test_notebooks.py); `make outputs` in place, to store new outputs.
"""
import base64
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
from nbconvert import MarkdownExporter
from PIL import Image
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK_FOLDERS = ("nbs", "paper_figures")
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# One thread and no instructions newer than AVX2: sums are rounded in the same order on every x86 machine.
QUIET |= {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
QUIET |= {"MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}


def run(root: Path, *command: str) -> None:
    "Run a command of the virtual environment in `root`, with the package of `root`."
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(root)}
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-5000:]}\n{done.stderr[-15000:]}")


def copy_tree(target: Path) -> Path:
    "Copy what git tracks, and what it would, to `target`."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def all_notebooks(root: Path) -> list[str]:
    "The paths of all notebooks, from `root`; not the copies that an editor left."
    paths = [path.relative_to(root) for folder in NOTEBOOK_FOLDERS for path in sorted((root / folder).rglob("*.ipynb"))]
    return [str(path) for path in paths if ".ipynb_checkpoints" not in path.parts]


def execute(root: Path) -> None:
    "Run all notebooks, each in a process of its own, and store their outputs."
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: run(root, "nbdev-test", path, "--save"), all_notebooks(root)))


def generate(root: Path) -> None:
    "Everything that follows from the notebooks: clean notebooks, the package, the README."
    for folder in NOTEBOOK_FOLDERS:
        run(root, "nbdev-clean", "--fname", folder)
    run(root, "nbdev-export")
    hidden = {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}}}
    text, _ = MarkdownExporter(config=Config(hidden)).from_filename(root / "nbs/index.ipynb")
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = text.replace("](../", "](").replace("](0", "](nbs/0").replace("](1", "](nbs/1").replace("](2", "](nbs/2")
    (root / "README.md").write_text("<!-- Generated from nbs/index.ipynb by `make outputs`: edit that. -->\n\n" + text.strip() + "\n")


def picture(output: dict) -> np.ndarray | None:
    "The pixels of an output, if it has any."
    data = output.get("data", {})
    coded = data.get("image/png") or data.get("image/jpeg")
    return coded and np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGB"), dtype=float)


def same_output(one: dict, other: dict) -> bool:
    "Equal text; pictures of equal size that differ in no more than the smoothing of lines."
    pixels = picture(one), picture(other)
    if pixels[0] is not None and pixels[1] is not None:
        return pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 0.5
    return one == other


def compare_notebooks(stored: Path, fresh: Path) -> list[str]:
    "What differs between two notebooks, cell by cell."
    pair = [nbformat.read(path, as_version=4) for path in (stored, fresh)]
    faults = [f"{stored.name}: metadata differ"] if pair[0].metadata != pair[1].metadata else []
    for number, (a, b) in enumerate(zip(pair[0].cells, pair[1].cells, strict=True)):
        outputs = a.pop("outputs", []), b.pop("outputs", [])
        if a != b:
            faults.append(f"{stored.name}, cell {number}: not clean")
        if len(outputs[0]) != len(outputs[1]) or not all(map(same_output, *outputs)):
            faults.append(f"{stored.name}, cell {number}: the stored output is not what the code gives")
    return faults


def differences(stored: Path, fresh: Path) -> list[str]:
    "What `generate` and `execute` changed, file by file."
    faults = []
    for folder in NOTEBOOK_FOLDERS:
        for path in sorted((fresh / folder).rglob("*.ipynb")):
            faults += compare_notebooks(stored / path.relative_to(fresh), path)
    for name in ("README.md", *(str(path.relative_to(fresh)) for path in sorted((fresh / "cxrvlm").glob("*.py")))):
        if not (stored / name).exists() or (stored / name).read_bytes() != (fresh / name).read_bytes():
            faults.append(f"{name} is stale")
    return faults


def write(root: Path) -> None:
    "Store what the notebooks give in a copy that has no runs/ of an earlier state of the code."
    with tempfile.TemporaryDirectory() as folder:
        fresh = copy_tree(Path(folder))
        execute(fresh)
        generate(fresh)
        generated = [str(path.relative_to(fresh)) for path in (fresh / "cxrvlm").glob("*.py")]
        for name in [*all_notebooks(fresh), *generated, "README.md"]:
            shutil.copyfile(fresh / name, root / name)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write(ROOT)
