"""What several tests train on."""
from pathlib import Path

from cxrvlm.data import load_studies, make_tokenizer, open_store


def prepare(settings, folder: Path, count: int | None = None) -> tuple:
    "The first training studies of a preset (all, if no count is given), their pixels, and the tokenizer of all."
    studies, _ = load_studies(settings)
    training = studies[studies.split == "train"].head(count or len(studies))
    return training, open_store(settings, training, folder), make_tokenizer(settings, studies)
