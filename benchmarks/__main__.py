"""`python -m benchmarks --help` says what can be chosen."""
import argparse
import gc
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

GROUPS = ("steps", "loops", "large", "pipeline", "local", "evaluation", "texts")  # each gives the table its lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours beside its reference, in one process, in turn, on the same inputs.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the lines and targets of the GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="lines whose name begins so; --list names them")
    parser.add_argument("--list", action="store_true", help="name the lines and stop")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="repetitions of each; 0: as many as the line wants")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all numbers there, after each line")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: only whether all agree")
    parser.add_argument("--full", action="store_true", help="the paper's size for the probe and MIMIC too: many minutes more")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="at most so many for a line; 1 where other work is running")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: of this process; for a machine that is not quiet")
    return parser.parse_args(arguments)


def chosen(lines: dict, device: str, only: list[str] | None) -> list:
    "The lines to run, in the order of the table."
    found = [line for line in lines.values() if device in line.devices]
    if only:
        for name in only:
            if not any(line.name.startswith(name) for line in found):
                sys.exit(f"there is no line {name} for {device}; there are: {', '.join(line.name for line in found)}")
        found = [line for line in found if line.name.startswith(tuple(only))]
    return found


def measure(line, options) -> list[dict]:
    "The rows of a line. Whatever goes wrong is a row too, and the other lines go on."
    from .cases import time_case
    from .loops import NotInstalled
    try:
        rows = time_case(line.build(options), options)
    except NotInstalled as error:
        rows = [{"fault": str(error), "skipped": True}]
    except Exception as error:  # a failed check, or a line that cannot run
        traceback.print_exc()
        rows = [{"fault": f"{type(error).__name__}: {error}"}]
    gc.collect()
    return [{"line": line.name} | row for row in rows]


def main(arguments: list[str] | None = None) -> int:  # lines that failed
    "Run the lines, print the table as it grows, and count the failures."
    choice = parse(arguments)
    if choice.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU
    os.environ.setdefault("TQDM_DISABLE", "1")
    load = os.getloadavg()[0]  # before we make some ourselves
    from . import report
    from .cases import LINES, Options
    for group in GROUPS:
        import_module(f".{group}", __package__)
    lines = chosen(LINES, choice.device, choice.only)
    if choice.list:
        print(*(line.name for line in lines), sep="\n")
        return 0
    options = Options(choice.device, choice.quick, choice.full, choice.rounds, choice.threads, choice.clock)
    found, rows, begin = report.machine(options.device, options.clock) | {"load": load}, [], time.perf_counter()
    report.warn_if_busy(load)
    print(report.header(found), report.table_head(), sep="\n\n", flush=True)
    for number, line in enumerate(lines, 1):
        start = time.perf_counter()
        print(f"[{number}/{len(lines)}] {line.name} ...", file=sys.stderr, flush=True)
        rows += (new := measure(line, options))
        print(*(f"| {' | '.join(cells)} |" for row in new for cells in report.table_rows(row)), sep="\n", flush=True)
        report.write(choice.json, found | {"seconds": time.perf_counter() - begin}, rows)
        print(f"[{number}/{len(lines)}] {line.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    failed = [row["line"] for row in rows if "fault" in row and not row.get("skipped")]
    print(f"\n{len(lines)} lines in {(time.perf_counter() - begin) / 60:.1f} minutes, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
