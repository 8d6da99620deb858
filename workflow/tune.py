"""Temperature and rates, chosen on the validation split with the same tries for every arm.

    python workflow/tune.py bench              # adds rows to results/bench/tuning.csv, and goes on where it was stopped

Stage 1 of the seed must be there: `snakemake -c2 runs/bench/stage1/simclr/5/adaptation.json` and
`runs/bench/stage1/random-adapted/5/adaptation.json`. The seed is none of the sweep's, so that nothing is chosen on a run
that is compared later. The loss of two temperatures cannot be compared, so the AUROC of the validation pairs decides.
"""
import argparse
import shutil
from pathlib import Path

import pandas as pd

from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.declip import build_objective, training_set
from cxrvlm.initialisation import tokenizer_source
from cxrvlm.matching import all_metrics
from cxrvlm.results import provenance
from cxrvlm.settings import from_root, in_arm, load_arm, load_settings
from cxrvlm.studies import nested_fraction, pair_texts
from cxrvlm.training import start_device, train, write_atomically
from cxrvlm.vlm import ImageTextPairs, embed_pairs

ARMS = ("baseline", "adapted", "combined", "ours")
TRIES = ({}, {"tau": "0.1"}, {"tau": "0.5"}, {"lr": "3e-4", "lr_text": "3e-4"})  # beside the preset's own values
SEED, FRACTION = 5, 0.05


def attempt(preset: str, arm: str, changes: dict[str, str], runs: Path) -> dict:  # a row of the table
    "Train with these changes, and measure on the validation split."
    way = load_arm(arm).model_copy(update={"changes": tuple(sorted(changes.items()))})
    settings = in_arm(load_settings(preset), way)
    studies, _ = load_studies(settings)
    store = open_store(settings, studies, runs / preset / "data")
    tokenizer = make_tokenizer(settings, studies, tokenizer_source(settings, way))
    pairs, valid = nested_fraction(studies[studies.split == "train"], FRACTION, SEED, settings.batch_size), studies[studies.split == "validation"]
    objective = build_objective(settings, way, tokenizer, SEED, len(pairs), runs / preset / "stage1")
    sets = training_set(pairs, store, tokenizer, settings, way, SEED), ImageTextPairs(valid, store, tokenizer, settings.max_tokens)
    folder = runs / preset / "tuning" / "-".join([arm, *(f"{key}={value}" for key, value in changes.items())])
    progress = train(objective, *sets, settings, SEED, folder, str(changes))
    images, texts = embed_pairs(objective.model, valid, store, settings.max_tokens, local="local" in way.matchings)
    metrics = all_metrics(images, texts, pair_texts(valid).tolist(), way.matchings, settings)
    shutil.rmtree(folder / "checkpoint")
    row = {"arm": arm, "tau": settings.tau, "lr": settings.lr, "lr_text": settings.lr_text, "fraction": FRACTION, "seed": SEED}
    row |= {name: value for name, value in metrics.items() if name.removeprefix("local_") in ("auroc", "auroc_masked", "t2i_recall@10")}
    return row | {"best_step": progress.best_step, "seconds": round(progress.seconds, 1), "commit": provenance(start_device(settings))["commit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose temperature and rates on the validation split.")
    parser.add_argument("preset")
    parser.add_argument("--runs", type=Path, default=from_root("runs"))
    parser.add_argument("--arms", nargs="+", default=ARMS)
    given = parser.parse_args()
    path = from_root("results") / given.preset / "tuning.csv"
    for changes in TRIES:
        for arm in given.arms:
            known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["arm", "tau", "lr", "lr_text"])
            settings = load_settings(given.preset).model_dump() | {key: float(value) for key, value in changes.items()}
            if ((known.arm == arm) & (known.tau == settings["tau"]) & (known.lr == settings["lr"]) & (known.lr_text == settings["lr_text"])).any():
                continue
            row = pd.DataFrame([attempt(given.preset, arm, changes, given.runs)])
            print(row.round(4).to_string(index=False), flush=True)
            known = pd.concat([pd.read_csv(path), row]) if path.is_file() else row  # another process may have added its own
            write_atomically(path, lambda file, known=known: known.to_csv(file, index=False))


if __name__ == "__main__":
    main()
