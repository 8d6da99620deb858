"""What only a GPU can show; `make gpu-test` runs these."""
import pytest
import torch

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
    settings = replace(load_settings("smoke"), precision="auto", batch_size=6, train_iterations=50, max_iterations=200, patience=4)
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


def test_declip_learns_in_bf16_and_resumes(tmp_path):
    settings = replace(load_settings("smoke"), batch_size=6, train_iterations=50, max_iterations=200, patience=4, declip_queue=30)
    arm = load_arm("ours").model_copy(update={"image_init": "generic", "text_init": "generic"})
    studies, _ = load_studies(settings)
    store, tokenizer = open_store(settings, studies, tmp_path), make_tokenizer(settings, studies)
    pairs = studies[studies.split == "train"]
    valid = ImageTextPairs(pairs, store, tokenizer, settings.max_tokens)
    for stop in (100, 200):  # the second goes on from the first one's checkpoint
        objective = build_objective(settings, arm, tokenizer, 0, len(pairs))
        pairs_set = training_set(pairs, store, tokenizer, settings, arm)
        progress = train(objective, pairs_set, valid, replace(settings, max_iterations=stop), 0, tmp_path / "run")
    assert objective.queue.full and objective.queue.keys.is_cuda and objective.queue.words[0].is_cuda
    assert len(objective.neighbour_table()) > 0
    first, last = progress.history[0], progress.history[-1]
    assert last["step"] == 200 and last["valid"] < first["valid"] and last["train_nn_gloria"] > 0


def test_stage_1_learns_in_bf16(tmp_path):
    settings = load_settings("smoke")
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
