"""What only a GPU can show; `make gpu-test` runs these."""
import pytest
import torch

from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.images import augmentation
from cxrvlm.initialisation import build_model
from cxrvlm.retrieval import retrieval_metrics
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.training import start_device, train
from cxrvlm.vlm import ContrastiveObjective, ImageTextPairs, embed_pairs

pytestmark = pytest.mark.gpu


def test_metrics_on_the_gpu_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(500, 64, generator=generator) for _ in range(2))
    labels = [f"report {i % 100}" for i in range(500)]
    assert retrieval_metrics(images.cuda(), texts.cuda(), labels) == retrieval_metrics(images, texts, labels)


def test_a_run_in_bf16_learns_and_can_be_evaluated(tmp_path):
    settings = replace(load_settings("smoke"), precision="auto", batch_size=6, train_iterations=50, max_iterations=200, patience=4)
    assert start_device(settings).device.type == "cuda"
    studies, _ = load_studies(settings)
    store, tokenizer = open_store(settings, studies, tmp_path), make_tokenizer(settings, studies)
    pairs = studies[studies.split == "train"]
    sets = [ImageTextPairs(pairs, store, tokenizer, settings.max_tokens, t) for t in (augmentation(settings, "vlm"), None)]
    objective = ContrastiveObjective(build_model(settings, load_arm("baseline"), tokenizer, 0), settings.tau)
    progress = train(objective, *sets, settings, 0, tmp_path / "run")
    assert progress.history[-1]["train"] < progress.history[0]["train"]
    images, texts = embed_pairs(objective.model, pairs, store, settings.max_tokens)
    assert images.dtype == torch.float32 and images.isfinite().all() and texts.isfinite().all()
