"""Exact AUROC over all pairs at the size of the paper's test split, and the linear probe."""
import numpy as np
import pandas as pd
import torch

from .cases import NO_SLOWER, Case, Options, line
from .versions import OURS, reference

PAPER = 17_652  # studies in the paper's test split


def make_embeddings(N: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Images, and reports that lie near theirs."
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, N, 128, generator=generator)
    return images.to(device), (0.1 * images + noise).to(device)


def equal(found: float, expected: float) -> str:
    "AUROC is exact: not one pair may be counted otherwise."
    assert found == expected, f"AUROC {found!r} and {expected!r}"
    return f"AUROC {expected:.6f}"


@line("auroc")
def auroc(options: Options) -> Case:
    "Beside the reference's, which is exact too."
    pairs, theirs = make_embeddings(options.pick(PAPER, 300), options.device), reference()
    return Case("07c8bb8", lambda: theirs.retrieval.retrieval_auroc(*pairs), {"ours": lambda: OURS.retrieval.retrieval_auroc(*pairs)},
                agree=equal, targets={"ours": NO_SLOWER}, precision="float64", threads=2, rounds=1, warmup=0)


def product(images: torch.Tensor, texts: torch.Tensor, rows: int = 512) -> float:
    "All cosines in float64, none of them kept."
    images, texts = (torch.nn.functional.normalize(x.double(), dim=1) for x in (images, texts))
    return sum((part @ texts.T)[0, 0].item() for part in images.split(rows))


@line("auroc/product", "cuda")
def beside_product(options: Options) -> Case:
    "AUROC beside the matrix product that it cannot do without."
    pairs = make_embeddings(options.pick(PAPER, 300), options.device)
    return Case("the bare product", lambda: product(*pairs), {"ours": lambda: OURS.retrieval.retrieval_auroc(*pairs)},
                check=lambda: "not the same work; see auroc", targets={"ours": 3.0}, precision="float64", rounds=3)


def make_features(N: int, D: int, L: int):
    "Correlated features, as those after a ReLU are, L labels of 1% to 30%, and patients with some three studies each."
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(N, D)) @ rng.normal(size=(D, D)) / D**0.5, 0).astype(np.float32)
    w, shares = rng.normal(size=(D, L)) / D**0.5, np.geomspace(0.3, 0.01 if N > 5000 else 0.1, L)
    score = (x - x.mean(0)) @ w * 2 + rng.normal(size=(N, L))
    labels = pd.DataFrame((score > np.quantile(score, 1 - shares, axis=0).diagonal()).astype(float)).rename(columns=str)
    return x, labels, rng.integers(0, max(20, N // 3), N)


def equal_scores(found: pd.DataFrame, expected: pd.DataFrame) -> str:
    "The same labels, and every score to a thousandth."
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=0, atol=1e-3)
    return f"scores to 0.001 (mean AUROC {expected.auroc.mean():.3f})"


@line("probe", "cpu")
def probe(options: Options) -> Case:
    "2,000 studies with 256 features and 4 labels; with --full the paper's 17,652 with 2,048 and 12, which should take less than 120 s."
    size = (PAPER, 2048, 12) if options.full else options.pick((2000, 256, 4), (200, 16, 2))
    inputs, theirs, resamples = make_features(*size), reference(), options.pick(1000 if options.full else 200, 20)
    return Case(
        "07c8bb8", lambda: theirs.downstream.linear_probe(*inputs, resamples=resamples),
        {"ours": lambda: OURS.downstream.linear_probe(*inputs, resamples=resamples)},
        agree=equal_scores, targets={"ours": NO_SLOWER}, threads=2, rounds=1 if options.full else 3, warmup=0,
    )
