"""A training step of the demo, loading and augmentation included, beside that of the reference's commit."""
import torch

from .cases import Case, Options, line, same, same_direction, same_gradients
from .versions import (
    OURS,
    Trainer,
    arm_of,
    copy_weights,
    inputs_of,
    loss_and_gradients,
    pair_trainer,
    plain_batches,
    reference,
    settings_of,
)

QUEUE = 200  # of DeCLIP's neighbours, so that it is full soon; its size hardly counts
QUICK = {"image_size": 32, "text_layers": 1, "text_hidden": 32, "batch_size": 4}


def has_amx() -> bool:
    "Does this CPU multiply matrices of bfloat16 in hardware?"
    return torch.cpu._is_amx_tile_supported()


def check_steps(reference: Trainer, ours: dict[str, Trainer], batches: list[dict], direction: float | None = 0.95) -> str:
    "The same weights and batches give the same loss and gradients; in bf16 the same direction of the gradients, to this cosine, or (None) the loss alone."
    loss, gradients = loss_and_gradients(reference, batches)
    for name, trainer in ours.items():
        own_loss, own_gradients = loss_and_gradients(trainer, batches)
        if trainer.accelerator.mixed_precision == "bf16":
            same(f"loss in {name}", own_loss, loss, 0.02)
            if direction is not None:
                same_direction(own_gradients, gradients, direction)
        else:
            same(f"loss in {name}", own_loss, loss, 1e-5)
            same_gradients(own_gradients, gradients, 1e-3)
    return f"loss and {len(gradients)} gradients"


def two_versions(options: Options, preset: str, arm: str, count: int, precisions: dict[str, str], stride: int = 0, **changes):
    "A trainer of the reference in float32, those of ours by name, and batches that fill the queue and one more."
    trainers, theirs = {}, reference()
    wanted = {"": (theirs, "float32")} | {name: (OURS, precision) for name, precision in precisions.items()}
    for name, (version, precision) in wanted.items():
        settings = settings_of(version, options.device, preset, precision=precision, **changes)
        trainers[name] = pair_trainer(version, settings, arm_of(version, arm), inputs_of(version, settings, count), stride)
        copy_weights(trainers[""].objective, trainers[name].objective)
    first, settings = trainers.pop(""), settings_of(theirs, options.device, preset, **changes)
    needed = 1 + (settings.declip_queue // settings.batch_size if arm_of(theirs, arm).declip else 0)
    return first, trainers, plain_batches(theirs, settings, arm_of(theirs, arm), inputs_of(theirs, settings, count), needed)


@line("step-64px-ours", arm="ours", image_size=64, stride=16)
@line("step-64px-combined", arm="combined", image_size=64, stride=16)
@line("step-64px-baseline", arm="baseline", image_size=64, stride=16)
@line("step-ours", arm="ours")
@line("step-combined", arm="combined")
@line("step-baseline", arm="baseline")
def step(options: Options, arm: str, stride: int = 0, image_size: int = 96) -> Case:
    "The demo's step; or the same at 64 px with a stride of 16, which leaves 4 x 4 regions."
    changes = {"image_size": image_size, "declip_queue": options.pick(QUEUE, 8)} | options.pick({}, QUICK)
    precisions = {"float32": "float32", "bf16": "bf16"}
    first, trainers, batches = two_versions(options, "demo", arm, options.pick(QUEUE, 12), precisions, stride, **changes)
    targets = {"float32": 0.62} | ({"bf16": 0.42} if has_amx() else {})
    return Case(
        "07c8bb8 in float32", first, trainers, check=lambda: check_steps(first, trainers, batches),
        targets=targets if options.device == "cpu" else {}, threads=first.settings.threads, warmup=2,
    )


@line("ours/baseline-64px", image_size=64, stride=16)
@line("ours/baseline", image_size=96)
def beside_baseline(options: Options, image_size: int, stride: int = 0) -> Case:
    "What DeCLIP and the local loss cost: two arms of our own version."
    changes = {"image_size": image_size, "declip_queue": options.pick(QUEUE, 8)} | options.pick({}, QUICK)
    settings = settings_of(OURS, options.device, "demo", precision="float32", **changes)
    inputs = inputs_of(OURS, settings, options.pick(QUEUE, 12))
    baseline, ours = (pair_trainer(OURS, settings, arm_of(OURS, arm), inputs, stride) for arm in ("baseline", "ours"))
    return Case(
        "our baseline's step", baseline, {"ours": ours}, check=lambda: "not the same work", threads=settings.threads,
        targets={"ours": 2.3} if options.device == "cuda" else {}, warmup=2 + settings.declip_queue // settings.batch_size,
    )
