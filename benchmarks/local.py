"""The local similarity forward and backward, and retrieval by it, beside the einsum that builds every context vector."""
import torch
from torch.nn.functional import cosine_similarity, normalize

from .cases import Case, Options, extra_memory, line, same
from .versions import OURS

PAPER = 17_652  # studies in the paper's test split
LARGE = {"B": 48, "W": 97, "M": 361, "E": 768}
SMALL = {"B": 20, "W": 64, "M": 256, "E": 128}


def with_contexts(regions, words, word_mask, tau2=0.25, tau3=0.2):
    "Equations 2 and 3 as they stand: every context vector [B, C, W, E] is built."
    v, t = normalize(regions, dim=-1), normalize(words, dim=-1)
    attention = (torch.einsum("bme,cwe->bcwm", v, t) / tau2).softmax(-1)
    contexts = torch.einsum("bcwm,bme->bcwe", attention, v)
    fits = torch.einsum("bcwe,cwe->bcw", contexts, t)
    return tau3 * (fits / tau3).masked_fill(~word_mask, -torch.inf).logsumexp(-1)


def make_batch(B, W, M, E, device="cpu", dtype=torch.float32):
    "Random regions and words that want gradients, a mask of full length and one with lengths uniform in 5..W."
    generator = torch.Generator().manual_seed(0)
    regions, words = (torch.randn(B, n, E, generator=generator).to(device, dtype).requires_grad_() for n in (M, W))
    lengths = torch.randint(5, W + 1, (B,), generator=generator)
    full = torch.ones(B, W, dtype=torch.bool)
    return regions, words, full.to(device), (torch.arange(W) < lengths[:, None]).to(device)


def passes(function, regions, words, mask):
    "A function that goes forward and backward through a contrastive loss; the gradients stay in the two tensors."
    def both():
        regions.grad = words.grad = None
        similarity = function(regions, words, mask)
        OURS.losses.contrastive_loss(similarity.float()).backward()
        return similarity.detach()
    return both


def check_local(shape: dict[str, int], device: str, dtype: torch.dtype) -> str:
    "The same similarities and gradients, of 12 pairs at most; in bf16 as far as the reference is right there."
    regions, words, *both = make_batch(**shape | {"B": min(12, shape["B"])}, device=device, dtype=dtype)
    masks = dict(zip(("full", "ragged"), both, strict=True))
    half = regions.dtype == torch.bfloat16
    for name, mask in masks.items():
        results = []
        for function in (with_contexts, OURS.losses.local_similarity):
            similarity = passes(function, regions, words, mask)()
            results.append((similarity, regions.grad.clone(), words.grad.clone()))
        for what, expected, found in zip(("similarity", "gradient of the regions", "gradient of the words"), *results, strict=True):
            if half and what != "similarity":
                cosine = cosine_similarity(expected.double().flatten(), found.double().flatten(), dim=0)
                assert cosine > 0.98, f"{what}, {name}: their cosine is {cosine:.3f}"
            else:
                same(f"{what}, {name}", found, expected, 0.03 if half else 1e-4)
    return "similarities and gradients"


def local_case(shape: dict[str, int], device: str, dtype: torch.dtype, **options) -> Case:
    "Reports of full length, and of 5 to W words; the reference computes all W either way."
    regions, words, full, ragged = make_batch(**shape, device=device, dtype=dtype)
    masks = {"full": full, "ragged": ragged}
    ours = {name: passes(OURS.losses.local_similarity, regions, words, mask) for name, mask in masks.items()}
    return Case("einsum with contexts, full", passes(with_contexts, regions, words, full), ours, lambda: check_local(shape, device, dtype),
                precision=str(dtype).removeprefix("torch."), threads=2, memory=True, **options)


@line("local-small-bf16", "cuda", shape=SMALL, dtype=torch.bfloat16)
@line("local-small", shape=SMALL)
@line("local-large-bf16", "cuda", shape=LARGE, dtype=torch.bfloat16)
@line("local-large", shape=LARGE)
def local(options: Options, shape: dict[str, int], dtype: torch.dtype = torch.float32) -> Case:
    "B images with B reports of W words, M regions, E dimensions."
    large, on_cpu = shape is LARGE, options.device == "cpu"
    if on_cpu:
        targets = {"full": 0.4, "ragged": 0.2} if large else {"full": 0.6, "ragged": 0.6}
        memory = {"full": 0.15, "ragged": 0.15} if large else {}
    else:
        targets = dict.fromkeys(("full", "ragged"), 0.5 if large else 1.0)
        memory = dict.fromkeys(("full", "ragged"), 0.2) if large else {}
    shape = options.pick(shape, {"B": 6, "W": 12, "M": 9, "E": 16})
    return local_case(shape, options.device, dtype, targets=targets, memory_targets=memory, rounds=3 if large and on_cpu else 10, warmup=0)


def memory_ratio(B: int, W: int, M: int, E: int) -> dict[str, float]:
    "Ours / reference, for full and ragged reports; tests/test_losses.py asks for it in a process of its own."
    case = local_case({"B": B, "W": W, "M": M, "E": E}, "cpu", torch.float32)
    most = extra_memory(case.reference)
    return {name: extra_memory(function) / most for name, function in case.ours.items()}


# Retrieval


def make_pairs(N: int, M: int, W: int, mean: int, E: int):
    "N images, and reports whose words lie near a region of their image; lengths are geometric, at most W, with about this mean."
    generator = torch.Generator().manual_seed(0)
    lengths = 1 - mean * torch.rand(N, generator=generator).log()
    mask = torch.arange(W) < lengths.round().clamp(1, W)[:, None]
    regions, noise = (torch.randn(N, n, E, generator=generator) for n in (M, W))
    seen = torch.randint(M, (N, W), generator=generator)
    words = 0.6 * regions.gather(1, seen[..., None].expand(-1, -1, E)) + noise
    everywhere = torch.ones(N, M, dtype=torch.bool)
    embedding = OURS.encoders.Embedding
    return embedding(regions.mean(1), regions, everywhere), embedding(words.mean(1), words, mask)


@torch.no_grad()
def all_contexts(images, texts, device: str) -> torch.Tensor:
    "The similarity of every image with every report by the einsum, some of each at a time; sorted by length there is little padding."
    order, found, tile = texts.mask.sum(1).argsort(), [], 16 if device == "cpu" else 64
    reports, masks = (part[order].split(tile) for part in (texts.local, texts.mask))
    for regions in images.local.split(tile):
        regions, parts = regions.to(device), []
        for words, mask in zip(reports, masks, strict=True):
            width = int(mask.sum(1).max())
            parts.append(with_contexts(regions, words[:, :width].to(device), mask[:, :width].to(device)))
        found.append(torch.cat(parts, 1).cpu())
    return torch.cat(found)[:, order.argsort()]


def agree_in_auroc(found: torch.Tensor, expected: torch.Tensor) -> str:
    "The retrieval's AUROC is the same to 1e-4, and each similarity to 1%."
    same("similarities", found, expected, 0.01)
    names = [str(row) for row in range(len(expected))]
    ours, theirs = (OURS.matching.matrix_metrics(matrix, names)["auroc"] for matrix in (found, expected))
    assert abs(ours - theirs) <= 1e-4, f"AUROC: {ours:.6f}, by the einsum {theirs:.6f}"
    return f"AUROC to 1e-4 ({theirs:.4f})"


@line("matching")
def matching(options: Options) -> Case:
    "M=256 regions, 46 words on the average, E=128."
    shape = {"N": 192 if options.device == "cpu" else 2048, "M": 256, "W": 254, "mean": 45, "E": 128}
    shape |= options.pick({}, {"N": 12, "M": 9, "W": 16, "mean": 6, "E": 16})
    images, texts = make_pairs(**shape)
    return Case(
        "einsum with contexts, sorted", lambda: all_contexts(images, texts, options.device),
        {"ours": lambda: OURS.matching.local_matrix(images, texts, device=options.device)}, agree=agree_in_auroc,
        targets={"ours": 0.3}, threads=2, rounds=2, warmup=0, per=shape["N"] ** 2 / 1e6, unit="a million pairs",
    )


@line("matching-paper", "cuda")
def matching_paper(options: Options) -> Case:
    "What all pairs of 17,652 studies would take, from the time of 1,024 images with all reports, beside five minutes."
    N, rows = options.pick((PAPER, 1024), (24, 8))
    images, texts = make_pairs(N, *options.pick((256, 254, 45, 128), (9, 16, 6, 16)))
    some = OURS.encoders.Embedding(images.pooled[:rows], images.local[:rows], images.mask[:rows])
    return Case("five minutes", 300.0, {"ours": lambda: OURS.matching.local_matrix(some, texts, device=options.device)},
                check=lambda: "see matching", targets={"ours": 1.0}, rounds=2, per=rows / N, unit="for all pairs")
