"""Validation, the best weights and the test use running statistics of plain training images, whatever training saw."""
import pytest
import torch
from torch import nn

from cxrvlm.augment import augmentation
from cxrvlm.cxrbert import ReportSections, TextAdaptationObjective, build_head
from cxrvlm.declip import build_objective, training_set
from cxrvlm.encoders import ImageEncoder
from cxrvlm.images import to_float
from cxrvlm.initialisation import load_masked_lm
from cxrvlm.settings import USED, SettingsError, in_stage, load_arm, load_settings, replace, stage_digest
from cxrvlm.simclr import ImageViews
from cxrvlm.simclr import build_objective as build_simclr
from cxrvlm.training import normalise_plainly, plain_images, start_device, train, validate
from cxrvlm.vlm import ImageTextPairs
from prepared import prepare

STILL = {"lr": 1e-30, "lr_text": 1e-30}  # Adam's steps are then far below the rounding of any weight
SETTINGS = replace(load_settings("smoke"), batchnorm_images=16, valid_iterations=3, image_encoder="timm:test_resnet")
GENERIC = {"image_init": "generic", "text_init": "generic"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(SETTINGS, tmp_path_factory.mktemp("data"))


def trained(data, arm, folder, **changes):
    "An objective after a short training on the first pairs, with the rest to validate, and how it went."
    studies, store, tokenizer = data
    settings, arm = replace(SETTINGS, **changes), load_arm(arm).model_copy(update=GENERIC)
    pairs, rest = studies.head(36), studies.iloc[36:]
    objective = build_objective(settings, arm, tokenizer, 0, len(pairs))
    valid_set = ImageTextPairs(rest, store, tokenizer, settings.max_tokens)
    progress = train(objective, training_set(pairs, store, tokenizer, settings, arm), valid_set, settings, 0, folder)
    return objective, progress, valid_set, pairs, settings


def statistics(objective: nn.Module) -> dict[str, torch.Tensor]:
    "All that batch normalisation keeps."
    return {key: value.clone() for key, value in objective.state_dict().items() if "running_" in key or "num_batches" in key}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_training_with_and_without_crops_leaves_the_same_statistics(data, tmp_path):
    "At the same weights. Without the rule they differ, so this could fail."
    left = {n: [statistics(trained(data, arm, tmp_path / f"{arm}{n}", batchnorm_images=n, **STILL)[0].model) for arm in ("baseline", "ours")] for n in (16, 0)}
    assert len(left[16][0]) > 30 and same(*left[16]) and not same(*left[0])


@pytest.mark.parametrize("arm", ["baseline", "ours"])
def test_statistics_depend_on_weights_and_plain_images_only(data, tmp_path, arm):
    "After real training: measured again, after they have been spoilt, they are the same; and those of the first layer are what they should be."
    objective, progress, valid_set, pairs, settings = trained(data, arm, tmp_path)
    left, accelerator = statistics(objective), start_device(settings)
    assert validate(objective, valid_set, settings, accelerator) == {key.removeprefix("valid_"): value for key, value in progress.history[progress.best_step // 4 - 1].items() if key.startswith("valid_")}
    for key, value in statistics(objective).items():
        objective.state_dict()[key].copy_(torch.full_like(value, 7))
    store = valid_set.store
    plain = ImageTextPairs(pairs, store, valid_set.tokenizer, 32)
    normalise_plainly(objective, plain, settings, accelerator)
    assert same(statistics(objective), left)
    encoder = objective.model.image_encoder
    first = next(layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d))
    seen = []
    first.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        (part,) = plain_images(plain.refs, 16)
        encoder.train()(to_float(store.batch(part)))
    values = seen[0].double().transpose(0, 1).flatten(1)
    assert len(part) == 16 and torch.allclose(next(value for key, value in left.items() if key.endswith("running_var")).double(), values.var(1), rtol=1e-4)
    assert torch.allclose(next(value for key, value in left.items() if key.endswith("running_mean")).double(), values.mean(1), atol=1e-5)


def test_the_layers_go_on_as_they_were(data):
    "Momentum, mode and weights."
    studies, store, tokenizer = data
    objective = build_objective(SETTINGS, load_arm("baseline"), tokenizer, 0, len(studies)).train()
    norms = [layer for layer in objective.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = {key: value.clone() for key, value in objective.named_parameters()}
    before = [(layer.momentum, layer.training) for layer in norms]
    normalise_plainly(objective, ImageTextPairs(studies, store, tokenizer, 32), SETTINGS, start_device(SETTINGS))
    assert before == [(layer.momentum, layer.training) for layer in norms] and all(training for _, training in before)
    assert all(torch.equal(value, weights[key]) for key, value in objective.named_parameters())


def test_simclr_leaves_statistics_of_plain_images(data, tmp_path):
    "And not of its views, which are turned, blurred and noisy."
    studies, store, _ = data
    stage = replace(in_stage(SETTINGS, "simclr"), **STILL)
    left = {}
    for count in (16, 0):
        objective, settings = build_simclr(stage, 0), replace(stage, batchnorm_images=count)
        views = ImageViews(studies, store, augmentation(stage, "simclr"))
        train(objective, views, views, settings, 0, tmp_path / str(count))
        left[count] = statistics(objective)
    fresh = build_simclr(stage, 0)
    normalise_plainly(fresh, views, stage, start_device(stage))
    assert same(statistics(fresh), left[16]) and not same(left[0], left[16])


def test_an_encoder_without_batch_normalisation_and_one_for_text_train_as_before(data, tmp_path):
    studies, store, tokenizer = data
    vit = ImageEncoder("timm:test_vit", 16, 64)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    normalise_plainly(vit, ImageTextPairs(studies, store, tokenizer, 32), SETTINGS, start_device(SETTINGS))
    assert same(state, vit.state_dict())
    stage = in_stage(SETTINGS, "cxrbert")
    history = []
    for count in (16, 0):
        masked_lm, _ = load_masked_lm(stage, "random", tokenizer, 0)
        objective = TextAdaptationObjective(masked_lm, build_head(stage.text_hidden, stage.cxrbert_head, 0), stage)
        sections = ReportSections(studies, tokenizer, stage)
        history.append(train(objective, sections, sections, replace(stage, batchnorm_images=count), 0, tmp_path / str(count)).history)
    assert history[0] == history[1]


@pytest.mark.parametrize(("images", "count", "sizes"), [(200, 1000, [50, 50, 50, 50]), (65, 65, [33, 32]), (200, 64, [64]), (3, 2, [2])])
def test_plain_images_are_different_ones_in_equal_parts_and_always_the_same(images, count, sizes):
    refs = [f"image {i}" for i in range(images)]
    parts = plain_images(refs + refs, count)
    chosen = [ref for part in parts for ref in part]
    assert [len(part) for part in parts] == sizes and len(set(chosen)) == len(chosen) and set(chosen) <= set(refs)
    assert parts == plain_images(refs + refs, count)


def test_one_image_is_refused_and_only_images_are_concerned():
    with pytest.raises(SettingsError, match="batchnorm_images = 1: one image has no spread"):
        replace(SETTINGS, batchnorm_images=1)
    assert "batchnorm_images" in USED["simclr"] - USED["cxrbert"]
    changed = replace(SETTINGS, batchnorm_images=0)
    assert stage_digest(changed, "simclr") != stage_digest(SETTINGS, "simclr") and stage_digest(changed, "cxrbert") == stage_digest(SETTINGS, "cxrbert")
