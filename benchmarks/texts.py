"""What is made once, or for each sample, on the CPU: rewordings, tokens, phantoms, and MIMIC-CXR-JPG's table."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .cases import NO_SLOWER, Case, Options, line
from .versions import OURS, ROOT, all_studies, make_tokenizer, reference, scratch, settings_of

STUDIES = 227_835  # of MIMIC-CXR


def demo_reports() -> list[str]:
    "Impressions of Open-i, in the order of the table."
    return all_studies("openi", 0).impression.tolist()


def long_report(words: int) -> str:
    "Some reports, one after the other, of so many words in all."
    return " ".join(" ".join(demo_reports()).split()[:words])


def reworder(version, texts: list[str], synonyms: str):
    "A function that rewords the texts, each from its own seed."
    return lambda: [version.eda.eda(text, np.random.default_rng(row), synonyms) for row, text in enumerate(texts)]


def equal_texts(found: list[str], expected: list[str]) -> str:
    "The same draws make the same words."
    wrong = [row for row, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {len(expected)} texts differ; the first is number {wrong[0]}"
    return f"{len(expected)} texts"


@line("eda-wordnet-1024", "cpu", words=1024, rounds=1)
@line("eda-wordnet-256", "cpu", words=256, rounds=5)
def eda_wordnet(options: Options, words: int, rounds: int) -> Case:
    "One text of so many words, in the paper's way."
    texts, theirs = [long_report(options.pick(words, words // 16))], reference()
    return Case("07c8bb8", reworder(theirs, texts, "wordnet"), {"ours": reworder(OURS, texts, "wordnet")},
                agree=equal_texts, targets={"ours": NO_SLOWER}, precision="-", rounds=rounds, warmup=0)


@line("eda-wordnet-growth", "cpu")
def eda_growth(options: Options) -> Case:
    "1,024 words beside 256: four times the time if it is linear."
    short, long = (reworder(OURS, [long_report(options.pick(words, words // 16))], "wordnet") for words in (256, 1024))
    return Case("our 256 words", short, {"1,024 words": long}, check=lambda: "not the same work", targets={"1,024 words": 6.0},
                precision="-", rounds=1, warmup=0)


def keep_their_findings(ours, texts: list[str]) -> str:
    "Ours keeps more than the reference did, so the texts differ by purpose: each is reworded and not empty, and some change."
    found = ours()
    assert len(found) == len(texts) and all(text.strip() for text in found), "a report was lost"
    assert any(a != b for a, b in zip(found, texts, strict=True)), "nothing was reworded"
    return "not the same words: since 07c8bb8 contrasts are kept"


@line("eda-radiology", "cpu")
def eda_radiology(options: Options) -> Case:
    "Reports of the demo, with our own synonyms."
    texts, theirs = demo_reports()[: options.pick(200, 20)], reference()
    ours = reworder(OURS, texts, "radiology")
    return Case("07c8bb8", reworder(theirs, texts, "radiology"), {"ours": ours}, check=lambda: keep_their_findings(ours, texts),
                targets={"ours": NO_SLOWER}, precision="-", rounds=5, per=len(texts), unit="a report")


def equal_arrays(found: list, expected: list) -> str:
    "Every number the same."
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), "the arrays differ"
    return f"{len(expected)} arrays"


@line("phantom", "cpu")
def phantom(options: Options) -> Case:
    "Drawing, at the size of the preset openi."
    refs, size, theirs = all_studies("openi", 0).image.tolist()[: options.pick(20, 3)], options.pick(224, 32), reference()
    draw = {v: (lambda v=v: [v.phantom.render_reference(ref, size) for ref in refs]) for v in (theirs, OURS)}
    return Case("07c8bb8", draw[theirs], {"ours": draw[OURS]}, agree=equal_arrays, targets={"ours": NO_SLOWER}, precision="-", rounds=7,
                per=len(refs), unit="a phantom")


@line("tokenize", "cpu")
def tokenize(options: Options) -> Case:
    "Batches of 20 reports of the demo."
    settings, texts, theirs = settings_of(OURS, "cpu", "demo"), demo_reports()[: options.pick(2000, 40)], reference()
    tokenizer = make_tokenizer(settings.source, settings.pairs, settings.vocab_size)

    def tokens(version):
        parts = (texts[start : start + 20] for start in range(0, len(texts), 20))
        return [np.asarray(part) for batch in parts for part in version.text.tokenize(tokenizer, batch, settings.max_tokens).values()]

    return Case("07c8bb8", lambda: tokens(theirs), {"ours": lambda: tokens(OURS)}, agree=equal_arrays, targets={"ours": NO_SLOWER},
                precision="-", rounds=7, per=len(texts) / 20, unit="a batch")


def equal_tables(found: tuple, expected: tuple) -> str:
    "The same studies and exclusions."
    for ours, theirs in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(ours, theirs)
    return f"{len(expected[0]):,} pairs, {len(expected[1]):,} exclusions"


@line("load_mimic", "cpu")
def load_mimic(options: Options) -> Case:
    "5,000 made-up studies without images; with --full as many as MIMIC has, which takes a minute to write."
    sys.path.insert(0, str(ROOT / "tests"))
    from miniature import write_mimic
    count, theirs = STUDIES if options.full else options.pick(5000, 90), reference()
    folder = Path(scratch().name) / f"mimic-{count}"
    if not folder.exists():
        write_mimic(folder, count, images=False)
    return Case("07c8bb8", lambda: theirs.mimic.load_mimic(folder), {"ours": lambda: OURS.mimic.load_mimic(folder)}, agree=equal_tables,
                targets={"ours": NO_SLOWER}, precision="-", threads=torch.get_num_threads(), rounds=1 if options.full else 3, warmup=0,
                memory=options.full, per=count, unit="a study")
