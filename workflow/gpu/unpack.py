"""Bring the results of a visit home: `make gpu-unpack FILES=FOLDER`, where FOLDER holds what `visit.py` wrote to OUT.

New rows go to results/<preset>/runs.csv, and what belongs to them to placements.csv.gz and downstream.csv beside it. A row
that is there already, with the same arm, fraction, seed, digest and data, is never touched. The log and the benchmarks are
kept as results/gpu/<time of the visit>.log and .json, all records below runs/gpu.
"""
import argparse
import re
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import pandas as pd

from cxrvlm.results import read_beside, read_results
from sweep import ROOT

MORE = "digest", "data"  # what a run is known by, beside arm, fraction and seed


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


def read_rows(table: Path) -> pd.DataFrame:
    "A table as it is written: a digest of digits, and one e, is no number."
    return pd.read_csv(table, dtype=str, keep_default_na=False) if table.is_file() else pd.DataFrame()


def which(rows: pd.DataFrame, *more: str) -> pd.MultiIndex:
    "Arm, fraction, seed (and more) of each row, alike whether they come from a CSV or from a record."
    keys = {"arm": rows.arm, "fraction": rows.fraction.astype(float), "seed": rows.seed.astype(int)}
    return pd.MultiIndex.from_frame(pd.DataFrame(keys | {name: rows[name] for name in more}))


def append(table: Path, rows: pd.DataFrame, form: str = "{}") -> None:
    "Write rows below those of a table, whose text stays as it is; new columns come last."
    rows = rows.apply(lambda column: column.map(form.format if column.dtype.kind == "f" else str, na_action="ignore"))
    packed = {"method": "gzip", "mtime": 0} if table.suffix == ".gz" else None
    table.parent.mkdir(parents=True, exist_ok=True)
    pd.concat([read_rows(table), rows], ignore_index=True).to_csv(table, index=False, compression=packed)


def append_left(table: Path, rows: pd.DataFrame) -> None:
    "Add what runs left, except of a run that the table has: it is of other settings, and the table cannot tell them apart."
    if table.is_file():
        twice = which(rows).isin(which(read_rows(table)))
        if twice.any():
            warnings.warn(f"{table} has some of these runs, with other settings, and keeps them: make it anew from runs/", stacklevel=2)
        rows = rows[~twice]
    if len(rows):
        append(table, rows, "{:.4f}")


def merge(preset: str, rows: pd.DataFrame, records: Path, results: Path) -> int:  # rows that were new
    "Add the runs of a preset to its tables."
    table = results / preset / "runs.csv"
    if table.is_file():
        rows = rows[~which(rows, *MORE).isin(which(read_rows(table), *MORE))]
    if rows.empty:
        return 0
    for name, file in (("placements.csv", "placements.csv.gz"), ("downstream.csv", "downstream.csv")):
        left = read_beside(records / preset, name) if any((records / preset).rglob("result.json")) else pd.DataFrame()
        if len(left):
            append_left(results / preset / file, left[which(left).isin(which(rows))])
    append(table, rows)
    return len(rows)


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
    parts = [pd.read_csv(files["runs.csv"], dtype=dict.fromkeys((*MORE, "commit"), str))] if "runs.csv" in files else []
    parts += [read_results(records)] if any(records.rglob("result.json")) else []
    for name, suffix in (("visit.log", "log"), ("benchmarks.json", "json")):
        if name in files:
            (root / "results/gpu").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], root / "results/gpu" / f"{stamp}.{suffix}")
    rows = same_commit(pd.concat(parts).drop_duplicates(["preset", "arm", "fraction", "seed", *MORE])) if parts else pd.DataFrame({"preset": []})
    for preset, own in rows.groupby("preset"):
        own = own.dropna(axis=1, how="all")
        print(f"{preset}: {merge(preset, own, records, root / 'results')} new of {len(own)} runs")
    print(f"log: results/gpu/{stamp}.log" if log else "there is no visit.log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of a visit, or folders with them")
    sys.exit(main(parser.parse_args().files))
