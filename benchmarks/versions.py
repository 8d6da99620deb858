"""The two versions of the package, and the few functions through which the lines call them.

What differs between the versions stands here and nowhere else: after a change of the package's interface adjust this file.
"""
import importlib
import sys
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from subprocess import run
from unittest.mock import patch

import timm
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from filelock import FileLock

COMMIT = "07c8bb8"  # before the work on speed
ROOT = Path(__file__).resolve().parents[1]


class ReferenceMissing(RuntimeError):
    "The commit that ours is compared with cannot be had."


@dataclass(frozen=True)
class Version:
    "A version of the package: `version.losses` is its module of that name."
    package: str
    ini: Path  # its settings

    def __getattr__(self, module: str):
        if module.startswith("_"):
            raise AttributeError(module)
        return importlib.import_module(f"{self.package}.{module}")


OURS = Version("cxrvlm", ROOT / "settings.ini")


def reference_tree() -> Path:
    "The files of the reference: a git worktree below build/, made by the first call."
    folder = ROOT / "build" / COMMIT
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "cxrvlm").is_dir():
            made = run(["git", "worktree", "add", "--force", "--detach", folder, COMMIT], cwd=ROOT, capture_output=True, text=True)
            if made.returncode:
                raise ReferenceMissing(f"git cannot give {folder} the files of commit {COMMIT}: {made.stderr.strip()}. In a shallow "
                                       f"clone run `git fetch --unshallow`; without git copy cxrvlm/ and settings.ini of that commit there")
    return folder


@cache
def reference() -> Version:
    "The package as it was, under another name, so that both can be used at once."
    folder, name = reference_tree(), f"cxrvlm_{COMMIT}"
    parts = {"submodule_search_locations": [str(folder / "cxrvlm")]}
    spec = importlib.util.spec_from_file_location(name, folder / "cxrvlm" / "__init__.py", **parts)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return Version(name, folder / "settings.ini")


# Settings


def settings_of(version: Version, device: str, preset: str, **changes):
    "The settings of a preset with some changes, on this device."
    settings = version.settings
    if "device" in settings.Settings.model_fields:  # before, accelerate found the device
        changes["device"] = device
    if "text_pooling" in settings.Settings.model_fields:  # the reference knows no other
        changes["text_pooling"] = "cls"
    return settings.replace(settings.load_settings(preset, version.ini), **changes)


def without_augmentation(version: Version, settings):
    "Table 2 with nothing in it."
    keys = [key for key in type(settings).model_fields if key.startswith(("vlm_", "simclr_"))]
    off = {key: 0 for key in keys if key.split("_", 1)[1] in ("translation", "rotation", "brightness", "shear", "scaling", "flip", "noise", "noise_p", "blur_p")}
    return version.settings.replace(settings, **off)


def arm_of(version: Version, name: str):
    "An arm, from generic weights: stage 1 changes what a step learns, and not what it costs."
    return version.settings.load_arm(name, version.ini).model_copy(update={"image_init": "generic", "text_init": "generic"})


# Data


@cache
def scratch() -> tempfile.TemporaryDirectory:
    "A folder that goes when the process ends."
    return tempfile.TemporaryDirectory(prefix="cxrvlm-benchmarks-")


@cache
def all_studies(source: str, pairs: int):
    "The studies of a source, as our version reads them. Both versions get the same."
    return OURS.data.load_studies(settings_of(OURS, "cpu", "demo", source=source, pairs=pairs))[0]


@dataclass
class Inputs:
    "What a version trains on."
    studies: object  # training pairs
    store: object  # their pixels, each version's own
    tokenizer: object  # one for both


@cache
def make_tokenizer(source: str, pairs: int, vocab_size: int):
    settings = settings_of(OURS, "cpu", "demo", source=source, pairs=pairs, vocab_size=vocab_size)
    return OURS.data.make_tokenizer(settings, all_studies(source, pairs))


def inputs_of(version: Version, settings, count: int) -> Inputs:  # fewer than 256, so that no worker process must import the reference
    "The first training pairs, as this version stores them."
    studies = all_studies(settings.source, settings.pairs)
    studies = studies[studies.split == "train"].head(count)
    store = version.data.open_store(settings, studies, Path(scratch().name) / version.package)
    return Inputs(studies, store, make_tokenizer(settings.source, settings.pairs, settings.vocab_size))


# Training


def output_stride(stride: int):
    "Within it timm's encoders are built with this stride; 0: with their own. No preset has a key for it."
    make = partial(timm.create_model, output_stride=stride) if stride else timm.create_model
    return patch.object(timm, "create_model", make)


def start(version: Version, settings):
    "The device and precision of the settings. Accelerate knows one precision a process, and is told to forget the last."
    AcceleratorState._reset_state(reset_partial_state=True)
    return version.training.start_device(settings)


def batches_of(version: Version, dataset, settings, device="cpu"):
    "The batches of a training run. Ours arrive on the device and are augmented there; the reference's are sent by its `train_step`."
    where = {"device": device} if version == OURS else {}
    return version.training.load_batches(dataset, settings, 0, **where)


def augmentation_of(version: Version, settings, stage: str):
    "Table 2 as the version has it."
    return (version.augment if version == OURS else version.images).augmentation(settings, stage)


class Trainer:
    "A training run of one version: each call is a step, loading included."

    def __init__(self, version: Version, settings, objective, dataset):
        self.version, self.settings, self.dataset = version, settings, dataset
        self.accelerator = start(version, settings)
        self.objective = objective.to(self.accelerator.device).train()
        self.optimizer = version.training.build_optimizer(self.objective, settings)
        self.batches = batches_of(version, dataset, settings, self.accelerator.device)
        self.steps = 0

    def __call__(self, batch: dict | None = None) -> dict[str, float]:
        batch = next(self.batches) if batch is None else batch
        self.steps += 1
        return self.version.training.train_step(self.objective, batch, self.optimizer, self.accelerator, 0, self.steps - 1)


def pair_trainer(version: Version, settings, arm, inputs: Inputs, stride: int = 0) -> Trainer:
    "Stage 2."
    with output_stride(stride):
        objective = version.declip.build_objective(settings, arm, inputs.tokenizer, 0, len(inputs.studies))
    return Trainer(version, settings, objective, version.declip.training_set(inputs.studies, inputs.store, inputs.tokenizer, settings, arm))


def view_trainer(version: Version, settings, inputs: Inputs) -> Trainer:
    "Stage 1 of the images. `settings` are those of that stage."
    views = version.simclr.ImageViews(inputs.studies, inputs.store, augmentation_of(version, settings, "simclr"))
    return Trainer(version, settings, version.simclr.build_objective(settings, 0), views)


def plain_batches(version: Version, settings, arm, inputs: Inputs, count: int) -> list[dict]:
    "Batches for either version's objective, without augmentation (the crops, masks and rewordings of DeCLIP stay), on the CPU."
    settings = without_augmentation(version, settings)
    dataset = version.declip.training_set(inputs.studies, inputs.store, inputs.tokenizer, settings, arm)
    numbers = {name: number for number, name in enumerate(inputs.studies.study_id)}  # by which ours calls the studies
    batches = islice(batches_of(version, dataset, settings), count)
    return [batch | {"study": torch.tensor([numbers[name] for name in batch["study_id"]])} for batch in batches]


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    "The target starts where the source starts."
    ours, theirs = (dict(module.named_parameters()) for module in (target, source))
    assert ours.keys() == theirs.keys(), f"parameters of other names: {sorted(ours.keys() ^ theirs.keys())}"
    with torch.no_grad():
        for name, parameter in theirs.items():
            ours[name].copy_(parameter)


def loss_and_gradients(trainer: Trainer, batches: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    "Of the last batch, without dropout; the ones before it fill DeCLIP's queue."
    objective, accelerator = trainer.objective.train(), trainer.accelerator
    objective.model.text_encoder.eval()  # BERT has dropout, and no BatchNorm
    batches = [send_to_device(batch, accelerator.device) for batch in batches]
    with torch.no_grad(), accelerator.autocast():
        for batch in batches[:-1]:
            objective(batch)
    with accelerator.autocast():
        loss = sum(objective(batches[-1]).values())
    loss.backward()
    gradients = {name: p.grad.float() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    objective.train()
    return loss.detach().float(), gradients
