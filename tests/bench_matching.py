"""What local matching costs: seconds per million image-report pairs, and hours for all pairs of 17,652 studies.

    python tests/bench_matching.py                    # 2 threads, and a GPU if there is one
    python tests/bench_matching.py demo --rounds 3    # only the demo's shapes

The best of all rounds counts. Only a part of the pairs is computed, by the function that computes them all.
No two reports are equal. Other programs on the machine disturb it.
"""
import argparse
import time

import torch

from cxrvlm.encoders import Embedding
from cxrvlm.matching import local_matrix

PAPER = 17_652  # studies in the paper's test split
SHAPES = {  # regions, longest and mean report, dimensions; images and reports for a CPU, and for a GPU
    "demo": {"M": 9, "W": 30, "mean": 15, "E": 128, "cpu": (2048, 4000), "cuda": (4096, PAPER)},
    "paper": {"M": 256, "W": 254, "mean": 45, "E": 128, "cpu": (128, 2000), "cuda": (1024, PAPER)},
}


def make_pairs(M: int, W: int, mean: int, E: int, images: int, reports: int) -> tuple[Embedding, Embedding]:
    "Random regions and words; lengths are geometric, W at most, with about the mean given."
    generator = torch.Generator().manual_seed(0)
    lengths = 1 - mean * torch.rand(reports, generator=generator).log()
    mask = torch.arange(W) < lengths.round().clamp(1, W)[:, None]
    regions, words = (torch.randn(n, k, E, generator=generator) for n, k in ((images, M), (reports, W)))
    everywhere = torch.ones(images, M, dtype=torch.bool)
    return Embedding(regions.mean(1), regions, everywhere), Embedding(words.mean(1), words, mask)


def seconds(function, rounds: int) -> float:
    "The best of some rounds; one more comes before, to warm up."
    best = float("inf")
    for timed in [False] + [True] * rounds:
        start = time.perf_counter()
        function()
        if timed:
            best = min(best, time.perf_counter() - start)
    return best


def measure(device: str, rounds: int, shape: dict) -> dict[str, float]:
    "Seconds per million pairs, and words per report."
    images, texts = make_pairs(*(shape[key] for key in ("M", "W", "mean", "E")), *shape[device])
    pairs = len(images.local) * len(texts.local) / 1e6
    return {
        "seconds": seconds(lambda: local_matrix(images, texts, device=device), rounds) / pairs,
        "words": texts.mask.sum(1).float().mean().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for name in args.shapes:
            shape, row = SHAPES[name], measure(device, args.rounds, SHAPES[name])
            hours = row["seconds"] * PAPER**2 / 1e6 / 3600
            print(f"{device} {name}: M={shape['M']} E={shape['E']}, {row['words']:.1f} of {shape['W']} words: "
                  f"{row['seconds']:.2f} s per million pairs, {PAPER:,}^2 pairs: {hours:.2f} h")
