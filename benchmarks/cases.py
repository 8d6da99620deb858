"""A line of the table: two pieces of code that do the same, a check of that, and how long each takes."""
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    "What the command line says."
    device: str = "cpu"
    quick: bool = False  # tiny shapes and one round, to see that every line runs
    full: bool = False  # the paper's size also where that takes many minutes
    rounds: int = 0  # 0: what each line thinks right
    threads: int = 0  # at most so many on a CPU; 0: what each line asks for
    clock: str = "wall"  # or cpu: the seconds of this process, where other work disturbs the wall clock

    def pick(self, normal, quick):
        "The size for this run."
        return quick if self.quick else normal


@dataclass
class Case:
    "One line, ready to be timed. Every function makes one repetition; what it returns goes to `agree`."
    against: str  # what the reference is
    reference: Callable | float  # or the seconds that are allowed
    ours: dict[str, Callable]  # one row of the table for each
    check: Callable[[], str] | None = None  # made first; says what agrees, or raises an AssertionError
    agree: Callable[[object, object], str] | None = None  # given the first results of ours and of the reference
    targets: dict[str, float] = field(default_factory=dict)  # ours / reference, at most
    memory_targets: dict[str, float] = field(default_factory=dict)
    memory: bool = False  # measure that too
    precision: str = "float32"  # of the reference, and of ours where its name does not say another
    threads: int = 1
    rounds: int = 20
    warmup: int = 1
    per: float = 1  # units in a repetition; the seconds are divided by them
    unit: str = ""  # e.g. "per million pairs"


@dataclass(frozen=True)
class Line:
    "A name, and how its case is built."
    name: str
    build: Callable[[Options], Case]
    devices: tuple[str, ...]


LINES: dict[str, Line] = {}
NO_SLOWER = 1.05  # two timings of the same code differ by that much


def line(name: str, *devices: str, **arguments) -> Callable:
    "Give the table a line: its case is what the decorated function returns. The lowest decorator of a function comes first."
    def register(function):
        LINES[name] = Line(name, partial(function, **arguments), devices or ("cpu", "cuda"))
        return function
    return register


def first_results(case: Case) -> str:
    "Let the reference and ours agree, before anything is timed."
    said = [case.check()] if case.check else []
    if case.agree:
        expected = case.reference()
        said += [case.agree(function(), expected) for function in case.ours.values()]
    return "; ".join(dict.fromkeys(said))


def candidates(case: Case) -> dict[str, Callable]:  # "" is the reference
    "Who is timed."
    return ({"": case.reference} if callable(case.reference) else {}) | case.ours


def wait_for(device: str) -> None:
    "A GPU's work is done when this returns."
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(case: Case, options: Options) -> dict[str, list[float]]:  # "" is the reference
    "Seconds of each repetition. In each round everybody has a turn, so that what disturbs one disturbs all."
    now = time.perf_counter if options.clock == "wall" else time.process_time
    everybody, rounds = candidates(case), options.rounds or options.pick(case.rounds, 1)
    warmup = options.pick(case.warmup, 0)
    seconds = {name: [] for name in everybody} if "" in everybody else {"": [case.reference]} | {name: [] for name in everybody}
    for number in range(warmup + rounds):
        for name, function in everybody.items():
            wait_for(options.device)
            start = now()
            function()
            wait_for(options.device)
            if number >= warmup:
                seconds[name].append((now() - start) / case.per)
    return seconds


def resident(key: str) -> float:
    "VmRSS (now) or VmHWM (the most since the last reset) of this process in MiB."
    (found,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key)]
    return int(found.split()[1]) / 1024


def extra_memory(function: Callable, device: str = "cpu") -> float:  # MiB
    "The most memory that a function needs at once, beyond what was in use. On a CPU it needs Linux."
    if device == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait_for(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def time_case(case: Case, options: Options) -> list[dict]:  # a row for each of `ours`
    "Check, then time."
    threads = min(case.threads, options.pick(options.threads or case.threads, 1))
    torch.set_num_threads(threads)
    checked = first_results(case)
    seconds = take_turns(case, options)
    memory = {}
    if case.memory and (options.device == "cuda" or Path("/proc/self/clear_refs").exists()):
        memory = {name: extra_memory(function, options.device) for name, function in candidates(case).items()}
    targets, memory_targets = options.pick((case.targets, case.memory_targets), ({}, {}))  # tiny shapes meet no target
    rows = []
    for name in case.ours:
        row = {"variant": name, "against": case.against, "precision": case.precision, "threads": threads, "unit": case.unit}
        row |= {"ours": statistics.median(seconds[name]), "reference": statistics.median(seconds[""]), "checked": checked}
        row |= {"ratio": row["ours"] / row["reference"], "target": targets.get(name), "rounds": len(seconds[name])}
        row |= {"all_ours": seconds[name], "all_reference": seconds[""], "load": os.getloadavg()[0]}
        if memory:
            row |= {"MiB_ours": memory[name], "MiB_reference": memory[""], "memory_ratio": memory[name] / max(memory[""], 1e-9)}
            row["memory_target"] = memory_targets.get(name)
        rows.append(row)
    return rows


# Checks


def same(what: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    "Two tensors are equal, up to a share of the largest entry."
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    assert ours.shape == reference.shape, f"{what}: {list(ours.shape)} and {list(reference.shape)}"
    difference, largest = (ours - reference).abs().max().item(), reference.abs().max().item()
    assert difference <= tolerance * largest, f"{what}: they differ by {difference:.3g}, where the largest is {largest:.3g}"


def same_gradients(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    "Every parameter has the same gradient. One that is zero by rights is compared with the largest of all."
    assert ours.keys() == reference.keys(), f"gradients of other parameters: {sorted(ours.keys() ^ reference.keys())}"
    largest = max(gradient.abs().max().item() for gradient in reference.values())
    for name, expected in reference.items():
        difference = (ours[name].double() - expected.double()).abs().max().item()
        bound = tolerance * (expected.abs().max().item() + 0.01 * largest)
        assert difference <= bound, f"gradient of {name}: it differs by {difference:.3g}, allowed are {bound:.3g}"


def same_direction(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], least: float) -> None:
    "All gradients together point the same way: what one can ask of bf16."
    assert ours.keys() == reference.keys(), f"gradients of other parameters: {sorted(ours.keys() ^ reference.keys())}"
    a, b = (torch.cat([part[name].double().flatten() for name in reference]) for part in (ours, reference))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    assert cosine >= least, f"gradients: their cosine is {cosine:.4f}, at least {least} is asked for"
