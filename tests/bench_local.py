"""Time and memory of the local similarity, beside the einsum that builds every context vector.

    python tests/bench_local.py                              # B=48 W=97 M=361 E=768 on 2 cores, as in issue 4
    python tests/bench_local.py 4 --B 20 --E 128             # 4 rounds of something else
    python tests/bench_local.py --device cuda --dtype bfloat16

Each candidate runs once in each round; the best of all rounds counts. Other programs on the machine disturb it.
"""
import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from cxrvlm.losses import contrastive_loss, local_similarity


def with_contexts(regions, words, word_mask, tau2=0.25, tau3=0.2):
    "Equations 2 and 3 as they stand: every context vector [B, C, W, E] is built."
    v, t = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    attention = (torch.einsum("bme,cwe->bcwm", v, t) / tau2).softmax(-1)
    contexts = torch.einsum("bcwm,bme->bcwe", attention, v)
    fits = torch.einsum("bcwe,cwe->bcw", contexts, t)
    return tau3 * (fits / tau3).masked_fill(~word_mask, -torch.inf).logsumexp(-1)


def memory(key: str) -> float:
    "VmRSS (now) or VmHWM (the most since the last reset) of this process in MiB."
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024


def measure(function: Callable, regions, words, word_mask) -> dict[str, float]:
    "Seconds and extra MiB of one forward and backward pass of a contrastive loss, gradients included."
    regions.grad = words.grad = None
    if regions.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = memory("VmRSS")
    start = time.perf_counter()
    contrastive_loss(function(regions, words, word_mask).float()).backward()
    if regions.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if regions.is_cuda else memory("VmHWM") - before
    return {"s": seconds, "MiB": extra}


def make_batch(B, W, M, E, device="cpu", dtype=torch.float32):
    "Random regions and words that want gradients, a mask of full length and one with lengths uniform in 5..W."
    generator = torch.Generator().manual_seed(0)
    regions, words = (torch.randn(B, n, E, generator=generator).to(device, dtype).requires_grad_() for n in (M, W))
    lengths = torch.randint(5, W + 1, (B,), generator=generator)
    full = torch.ones(B, W, dtype=torch.bool)
    return regions, words, full.to(device), (torch.arange(W) < lengths[:, None]).to(device)


def compare(rounds: int, B: int, W: int, M: int, E: int, device="cpu", dtype=torch.float32) -> dict[str, dict[str, float]]:
    "The best of several alternating rounds for each candidate."
    regions, words, full, ragged = make_batch(B, W, M, E, device, dtype)
    candidates = {
        "every context, full length": (with_contexts, full),
        "local_similarity, full length": (local_similarity, full),
        "local_similarity, 5..W words": (local_similarity, ragged),
    }
    best = {name: {"s": float("inf"), "MiB": float("inf")} for name in candidates}
    for _ in range(rounds):
        for name, (function, mask) in candidates.items():
            got = measure(function, regions, words, mask)
            best[name] = {key: min(best[name][key], got[key]) for key in got}
    reference = best["every context, full length"]
    return {name: row | {f"{key} ratio": row[key] / reference[key] for key in reference} for name, row in best.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    for name, value in {"B": 48, "W": 97, "M": 361, "E": 768, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = compare(args.rounds, args.B, args.W, args.M, args.E, args.device, getattr(torch, args.dtype))
    if args.json:
        print(json.dumps(table))
    else:
        for name, row in table.items():
            print(f"{name:30s} {row['s']:7.3f} s  {row['MiB']:6.0f} MiB  time x {row['s ratio']:.2f}  memory x {row['MiB ratio']:.2f}")
