"""What `check` passes runs: the smallest table that it passes, through the whole graph of the preset it names."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cxrvlm.check import as_text, check_preset
from cxrvlm.phantom import render_reference
from cxrvlm.sampler import sample_studies
from cxrvlm.settings import load_settings, read_ini, replace
from notebooks import copy_tree

BATCH = 2  # the least that a contrastive loss can have
SIZES = {key: BATCH for key in ("batch_size", "simclr_batch_size", "cxrbert_batch_size")}


def write_table(folder: Path, pairs: int) -> Path:
    "Pairs of each split, as a table."
    rows = sample_studies(3 * pairs, seed=5)[["image", "findings", "impression"]].assign(patient_id=range(3 * pairs))
    for number, ref in enumerate(rows.image):
        Image.fromarray(render_reference(ref, 32)).save(folder / f"{number}.png")
    rows = rows.assign(image=[f"{number}.png" for number in range(3 * pairs)], split=["train", "validation", "test"] * pairs)
    rows.assign(findings=[f"Findings, number {n}." for n in range(3 * pairs)], impression=[f"Opacity, number {n}." for n in range(3 * pairs)]).to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


@pytest.mark.timeout(1800)
def test_the_smallest_table_that_check_passes_runs_to_its_end(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    data = write_table(tmp_path / "large", BATCH)
    changes = SIZES | {"source": "table", "data": str(data), "pairs": 0, "split": "column", "arms": ("ours",), "fractions": (1.0,), "max_iterations": 4}
    mine = replace(load_settings("smoke"), **changes)
    assert check_preset(mine).ok, as_text(check_preset(mine))
    assert not check_preset(replace(mine, data=str(write_table(tmp_path / "small", BATCH - 1)))).ok  # there is no smaller one

    root = copy_tree(tmp_path / "clone")
    values = dict(read_ini()[1]["smoke"]) | {key: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for key, value in changes.items()}
    with (root / "settings.ini").open("a") as file:
        file.write("\n[mine]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([programs / "snakemake", "--cores", "2", "runs/mine/figures/retrieval_curve.png"], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert len(pd.read_csv(root / "runs/mine/figures/runs.csv")) == 1
