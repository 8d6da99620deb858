"""What only a GPU can show; `make gpu-test` runs these."""
import shutil

import pytest
import torch

from cxrvlm import training
from cxrvlm.augment import augmentation
from cxrvlm.cxrbert import ReportSections, TextAdaptationObjective, build_head, text_metrics
from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.declip import build_objective, training_set
from cxrvlm.encoders import Embedding
from cxrvlm.initialisation import build_model, load_masked_lm
from cxrvlm.matching import local_matrix
from cxrvlm.retrieval import retrieval_metrics
from cxrvlm.settings import in_stage, load_arm, load_settings, replace
from cxrvlm.simclr import ImageViews
from cxrvlm.simclr import build_objective as build_simclr
from cxrvlm.training import start_device, train
from cxrvlm.vlm import ContrastiveObjective, ImageTextPairs, embed_pairs

pytestmark = pytest.mark.gpu
SMOKE = replace(load_settings("smoke"), device="cuda")  # the preset takes a CPU


def test_metrics_on_the_gpu_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(500, 64, generator=generator) for _ in range(2))
    labels = [f"report {i % 100}" for i in range(500)]
    assert retrieval_metrics(images.cuda(), texts.cuda(), labels) == retrieval_metrics(images, texts, labels)


def test_local_matching_on_the_gpu_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    regions, words = (torch.randn(200, n, 64, generator=generator) for n in (16, 12))
    mask = torch.arange(12) < torch.randint(1, 13, (200, 1), generator=generator)
    pairs = Embedding(regions.mean(1), regions, torch.ones(200, 16, dtype=torch.bool)), Embedding(words.mean(1), words, mask)
    torch.testing.assert_close(local_matrix(*pairs, device="cuda"), local_matrix(*pairs), rtol=0, atol=1e-4)


def test_a_run_in_bf16_learns_and_can_be_evaluated(tmp_path):
    settings = replace(SMOKE, batch_size=6, train_iterations=50, max_iterations=200, patience=4)
    assert start_device(settings).device.type == "cuda"
    studies, _ = load_studies(settings)
    store, tokenizer = open_store(settings, studies, tmp_path), make_tokenizer(settings, studies)
    pairs = studies[studies.split == "train"]
    sets = [ImageTextPairs(pairs, store, tokenizer, settings.max_tokens, t) for t in (augmentation(settings, "vlm"), None)]
    objective = ContrastiveObjective(build_model(settings, load_arm("baseline"), tokenizer, 0), settings)
    progress = train(objective, *sets, settings, 0, tmp_path / "run")
    assert progress.history[-1]["train"] < progress.history[0]["train"]
    for embedding in embed_pairs(objective.model, pairs, store, settings.max_tokens):
        assert embedding.pooled.dtype == torch.float32 and embedding.pooled.isfinite().all()


def train_declip(folder, settings):  # the objective and the progress
    "All terms of equation 5, from generic weights; it goes on from a checkpoint if there is one."
    arm = load_arm("ours").model_copy(update={"image_init": "generic", "text_init": "generic"})
    studies, _ = load_studies(settings)
    store, tokenizer = open_store(settings, studies, folder), make_tokenizer(settings, studies)
    pairs = studies[studies.split == "train"]
    objective = build_objective(settings, arm, tokenizer, 0, len(pairs))
    sets = training_set(pairs, store, tokenizer, settings, arm), ImageTextPairs(pairs, store, tokenizer, settings.max_tokens)
    return objective, train(objective, *sets, settings, 0, folder / "run")


def test_declip_learns_in_bf16(tmp_path):
    settings = replace(SMOKE, batch_size=6, train_iterations=50, max_iterations=200, patience=4, declip_queue=30)
    objective, progress = train_declip(tmp_path, settings)
    assert objective.queue.full and objective.queue.keys.is_cuda and objective.queue.words.is_cuda
    assert (objective.queue.neighbour >= 0).any()
    # Judged by the training loss, for which BatchNorm has the statistics of the batch. For the validation loss it has running
    # ones, of whole images and crops together and with batches of six: with these the loss may rise while the model learns.
    first, last = progress.history[0], progress.history[-1]
    assert last["step"] == 200 and last["train"] < first["train"] and last["train_nn_gloria"] > 0


def test_declip_resumes_in_bf16(tmp_path, monkeypatch):
    settings = replace(SMOKE, batch_size=6, train_iterations=4, max_iterations=16, patience=9, declip_queue=30)
    save = training.save_checkpoint

    def keep(folder, objective, optimizer, progress, *more):  # what a run leaves that is killed after 12 steps
        save(folder, objective, optimizer, progress, *more)
        if progress.step == 12 and not (tmp_path / "killed").exists():
            shutil.copytree(folder, tmp_path / "killed/run/checkpoint")

    monkeypatch.setattr(training, "save_checkpoint", keep)
    _, undisturbed = train_declip(tmp_path / "whole", settings)
    objective, resumed = train_declip(tmp_path / "killed", settings)
    assert objective.queue.full and objective.queue.keys.is_cuda
    assert resumed.history[:3] == undisturbed.history[:3] and resumed.step == 16
    # A GPU adds up in another order each time. Noise of 0.1% on all gradients made 0.2% after four steps, a lost optimiser 4%.
    assert resumed.history[3] == pytest.approx(undisturbed.history[3], rel=0.02)


def test_stage_1_learns_in_bf16(tmp_path):
    settings = SMOKE
    studies, _ = load_studies(settings)
    store, tokenizer = open_store(settings, studies, tmp_path), make_tokenizer(settings, studies)
    training = studies[studies.split == "train"]
    image = in_stage(replace(settings, simclr_batch_size=16, simclr_train_iterations=20, simclr_max_iterations=100), "simclr")
    text = in_stage(replace(settings, cxrbert_batch_size=16, cxrbert_train_iterations=20, cxrbert_max_iterations=100), "cxrbert")
    masked_lm, _ = load_masked_lm(text, "random", tokenizer, seed=0)
    parts = {
        "image": (image, build_simclr(image, seed=0), ImageViews(training, store, augmentation(image, "simclr"))),
        "text": (
            text,
            TextAdaptationObjective(masked_lm, build_head(text.text_hidden, text.cxrbert_head, seed=0), text),
            ReportSections(training, tokenizer, text),
        ),
    }
    for name, (stage, objective, views) in parts.items():
        progress = train(objective, views, views, stage, 0, tmp_path / name)
        assert progress.history[-1]["train"] < progress.history[0]["train"], name
    metrics = text_metrics(masked_lm, tokenizer, training, text)
    assert metrics["mlm_loss"] < 6 and all(value == value for value in metrics.values())
