"""Loading and augmenting a batch of 20 at 512 px, by both columns of Table 2, beside torchvision one image at a time."""
from itertools import islice

import torch

from .cases import Case, Options, line, same
from .versions import (
    OURS,
    Trainer,
    arm_of,
    batches_of,
    inputs_of,
    pair_trainer,
    reference,
    settings_of,
    view_trainer,
    without_augmentation,
)

IMAGES = {"vlm": "images", "simclr": "views"}  # where they are in a batch


def trainer_of(version, stage: str, settings, count: int) -> Trainer:
    "A trainer whose batches are looked at."
    inputs = inputs_of(version, settings, count)
    if stage == "simclr":
        return view_trainer(version, settings, inputs)
    return pair_trainer(version, settings, arm_of(version, "baseline"), inputs)


def pictures(trainer: Trainer, stage: str, count: int) -> torch.Tensor:  # [N, 1, S, S]
    "The images of some batches from the start."
    batches = islice(batches_of(trainer.version, trainer.dataset, trainer.settings), count)
    return torch.cat([batch[IMAGES[stage]].flatten(0, -4) for batch in batches])


def check_pictures(options: Options, stage: str, theirs: Trainer, ours: Trainer) -> str:
    "Without augmentation both give the same; with it the same on the average over pixels, because the draws differ."
    count = options.pick(40, 4)
    plain = [trainer_of(t.version, stage, without_augmentation(t.version, t.settings), count) for t in (theirs, ours)]
    expected, found = (pictures(trainer, stage, 1) for trainer in plain)
    same("images without augmentation", found, expected, 1e-6)
    expected, found = (pictures(trainer, stage, options.pick(3, 2)) for trainer in (theirs, ours))
    for name, statistic in {"mean": torch.mean, "standard deviation": torch.std}.items():
        difference = abs(statistic(found) - statistic(expected)).item()
        assert difference < options.pick(0.02, 0.08), f"{name} of the augmented pixels: it differs by {difference:.3f}"
    return "pixels without augmentation; their mean and spread with it"


@line("pipeline-simclr", stage="simclr")
@line("pipeline-vlm", stage="vlm")
def pipeline(options: Options, stage: str) -> Case:
    "One process, a batch of 20: its reports are tokenised too (vlm), or each image gives two views (simclr)."
    changes = {"image_size": options.pick(512, 32), "image_encoder": "timm:test_resnet", "workers": 0, "threads": 1, "simclr_batch_size": 20}
    changes |= options.pick({}, {"batch_size": 4, "simclr_batch_size": 4})
    trainers = []
    for version in (reference(), OURS):
        settings = settings_of(version, options.device, "demo", **changes)
        settings = version.settings.in_stage(settings, "simclr") if stage == "simclr" else settings
        trainers.append(trainer_of(version, stage, settings, options.pick(40, 4)))
    theirs, ours = trainers
    return Case(
        "07c8bb8: torchvision one by one", lambda: next(theirs.batches), {"ours": lambda: next(ours.batches)}, lambda: check_pictures(options, stage, *trainers),
        targets={"ours": 0.33}, rounds=5, unit="a batch",
    )
