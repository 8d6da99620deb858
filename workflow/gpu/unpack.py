"""Bring the results of a visit home: `make gpu-unpack FILES=FOLDER`, where FOLDER holds what `visit.py` wrote to OUT.

Rows go to results/<preset>/runs.csv, and what belongs to them to placements.csv.gz and downstream.csv beside it, as with
`make results` (nbs/17d_committed.ipynb), which also says what it replaced and what it ignored. The log and the benchmarks are
kept as results/gpu/<time of the visit>.log and .json, all records below runs/gpu.
"""
import argparse
import re
import shutil
import sys
import tarfile
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from cxrvlm.committed import MANY, SAME, merge_results, write_table
from cxrvlm.results import read_beside, read_results, read_runs
from sweep import ROOT


def gather(given: list[Path]) -> dict[str, Path]:
    "The files of a visit by their names; folders are looked through."
    files = [file for path in given for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    if not files:
        raise SystemExit(f"there is nothing in {', '.join(map(str, given))}: give the folder with visit.log and runs.csv")
    return {file.name: file for file in files}


def extract(archive: Path, folder: Path) -> None:
    "The records of the runs; of an archive whose end is missing, those before it."
    try:
        with tarfile.open(archive, "r:gz", ignore_zeros=True) as content:
            for member in content:
                name = tarfile.data_filter(member, folder).name  # refuses what would land elsewhere
                record = content.extractfile(member).read()  # in whole, before anything is written
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(record)
    except (EOFError, tarfile.ReadError, OSError) as error:
        warnings.warn(f"{archive} ends in the middle ({error}): what came before is kept", stacklevel=2)


def same_commit(rows: pd.DataFrame) -> pd.DataFrame:
    "The commit as git would have said it: the bare machine only knew the version of the package."
    names = rows.commit.astype(str).str.replace(r"^cxrvlm \S*\+g(\w+)", r"\1", regex=True)
    return rows.assign(commit=names.str.replace(".changed", " with changes", regex=False))


def hand_over(preset: str, rows: pd.DataFrame, records: Path, results: Path) -> list[str]:  # what was done, in words
    "Give the runs of a preset, and what lies beside them, to the committed tables."
    with TemporaryDirectory() as folder:
        write_table(rows, Path(folder) / "runs.csv")
        for name in ("placements.csv.gz", "downstream.csv") if any(records.rglob("result.json")) else ():
            beside = read_beside(records, name.removesuffix(".gz"))
            if len(beside):
                write_table(beside, Path(folder) / name, MANY[name])
        return merge_results(preset, folder, results)


def main(given: list[Path], root: Path = ROOT) -> None:
    files = gather(given)
    log = files["visit.log"].read_text() if "visit.log" in files else ""
    found = re.search(r"visit of (\d+)-(\d+)-(\d+) (\d+):(\d+)", log)
    stamp = "{}{}{}-{}{}".format(*found.groups()) if found else "unknown"
    records = root / "runs/gpu" / stamp
    records.mkdir(parents=True, exist_ok=True)
    for name in sorted(files):
        if name.endswith(".tar.gz"):
            extract(files[name], records)
    parts = [read_runs(files["runs.csv"])] if "runs.csv" in files else []
    parts += [read_results(records)] if any(records.rglob("result.json")) else []
    for name, suffix in (("visit.log", "log"), ("benchmarks.json", "json")):
        if name in files:
            (root / "results/gpu").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], root / "results/gpu" / f"{stamp}.{suffix}")
    rows = same_commit(pd.concat(parts).drop_duplicates(SAME)) if parts else pd.DataFrame({"preset": []})
    for preset, own in rows.groupby("preset"):
        print(*hand_over(preset, own.dropna(axis=1, how="all"), records / preset, root / "results" / preset), sep="\n")
    print(f"log: results/gpu/{stamp}.log" if log else "there is no visit.log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of a visit, or folders with them")
    sys.exit(main(parser.parse_args().files))
