"""Baselines: files of the published names and shapes with random values, against the published models written out."""
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from transformers import BertForMaskedLM

from cxrvlm import weights as weights_module
from cxrvlm.baselines import (
    BIOVIL_IMAGE,
    Baseline,
    BioViLImageEncoder,
    Prepared,
    biovil_pixels,
    clip_pixels,
    load_biovil_image,
    load_model,
    resize,
)
from cxrvlm.data import load_studies, make_tokenizer, open_store
from cxrvlm.downstream import downstream_metrics
from cxrvlm.encoders import build_clip
from cxrvlm.initialisation import build_model, read_config
from cxrvlm.settings import load_arm, load_settings, replace
from cxrvlm.text import tokenize
from cxrvlm.vlm import embed_pairs
from cxrvlm.weights import WeightsError

VOCABULARY = Path(__file__).resolve().parents[2] / "shared/data/vocab/BiomedVLP-CXR-BERT-specialized"
PROJECTOR = {
    "0.weight": (128, 2048, 1, 1), "1.weight": (128,), "1.bias": (128,),
    "1.running_mean": (128,), "1.running_var": (128,), "1.num_batches_tracked": (),
    "3.weight": (128, 128, 1, 1), "3.bias": (128,),
}
HEAD = {
    "dense_to_hidden.weight": (128, 768), "dense_to_hidden.bias": (128,), "LayerNorm.weight": (128,),
    "LayerNorm.bias": (128,), "dense_to_output.weight": (128, 128), "dense_to_output.bias": (128,),
}


def random_like(state: dict, scale: float = 0.03) -> dict:
    "Random values of the same names and shapes; spreads and the weights of norms are near 1."
    pool, values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * scale, {}
    for place, (key, value) in enumerate(state.items()):
        drawn = pool.roll(1009 * place).repeat(value.numel() // len(pool) + 1)[: value.numel()].reshape(value.shape)
        near_one = key.endswith("running_var") or value.ndim == 1 and key.endswith("weight")
        values[key] = torch.tensor(place) if "num_batches" in key else (drawn + near_one).contiguous().clone()
    return values


@pytest.fixture(scope="module")
def biovil_image() -> dict:
    "BioViL's image file: hi-ml's names, true shapes."
    with torch.device("meta"):
        resnet = torchvision.models.resnet50().state_dict()  # with fc, as hi-ml's model has it
        projector = {f"projector.model.{key}": torch.empty(shape) for key, shape in PROJECTOR.items()}
    return random_like({f"encoder.encoder.{key}": value for key, value in resnet.items()} | projector)


@pytest.fixture(scope="module")
def home(tmp_path_factory, biovil_image) -> Path:
    "A folder of weights with both baselines, of the true widths."
    if not VOCABULARY.is_dir():
        pytest.skip(f"{VOCABULARY} is not on this machine")
    folder = tmp_path_factory.mktemp("weights")
    place = shutil.copytree(VOCABULARY, folder / "BiomedVLP-CXR-BERT-specialized", copy_function=shutil.copyfile)
    config = json.loads((place / "config.json").read_text()) | {"num_hidden_layers": 2}  # of 12: the others are alike
    (place / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        bert = BertForMaskedLM(read_config(place)).state_dict()
        bert |= {f"cls_projection_head.{key}": torch.empty(shape) for key, shape in HEAD.items()}
        clip = {key: value for key, value in build_clip(224).state_dict().items() if key != "attn_mask"}
    state = random_like(bert)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    torch.save(state | {"bert.embeddings.position_ids": torch.arange(512)[None]}, place / "pytorch_model.bin")
    torch.save(biovil_image, place / BIOVIL_IMAGE)
    (folder / "resnet50_clip.openai").mkdir()
    safetensors.torch.save_file(random_like(clip), folder / "resnet50_clip.openai/open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "Studies, their pixels, and a small model of ours."
    settings = replace(load_settings("smoke"), image_encoder="timm:test_resnet", bootstrap=10)
    studies, _ = load_studies(settings)
    model = build_model(settings, load_arm("baseline"), make_tokenizer(settings, studies), seed=0)
    return settings, studies, open_store(settings, studies, tmp_path_factory.mktemp("store")), model.eval()


def phantoms(smoke, count: int) -> torch.Tensor:
    "Their pixels, 0..1."
    _, studies, store, _ = smoke
    return store.batch(studies.image[:count].tolist()).float() / 255


# --- the published models, written out ---


@torch.no_grad()
def test_biovil_is_the_published_model(home, biovil_image, smoke):
    model = load_model("biovil", replace(smoke[0], weights=str(home)))
    images = phantoms(smoke, 1)
    resnet = torchvision.models.resnet50()
    named = {key.removeprefix("encoder.encoder."): value for key, value in biovil_image.items()}
    resnet.load_state_dict({key: named[key] for key in resnet.state_dict()})
    resnet.fc, resnet.avgpool = torch.nn.Identity(), torch.nn.Identity()
    p = {key: biovil_image[f"projector.model.{key}"] for key in PROJECTOR}
    maps = resnet.eval()(biovil_pixels(images).repeat(1, 3, 1, 1)).unflatten(1, (2048, 15, 15))
    norm = (p[f"1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    hidden = F.batch_norm(F.conv2d(maps, p["0.weight"]), *norm)
    places = F.conv2d(hidden.relu(), p["3.weight"], p["3.bias"])
    embedding = model.embed_images(images)
    assert torch.allclose(embedding.pooled, places.mean((2, 3)), rtol=1e-3, atol=1e-4) and embedding.pooled.std() > 1e-3
    assert torch.allclose(embedding.local, places.flatten(2).mT, rtol=1e-3, atol=1e-4) and embedding.mask.all()
    assert torch.allclose(model.image_encoder.features(images).mean(1), maps.mean((2, 3)), rtol=1e-3, atol=1e-4)

    state = torch.load(home / "BiomedVLP-CXR-BERT-specialized/pytorch_model.bin", weights_only=True)
    bert = BertForMaskedLM(read_config(home / "BiomedVLP-CXR-BERT-specialized")).eval()
    bert.load_state_dict({key: value for key, value in state.items() if key in bert.state_dict()})
    tokens = tokenize(model.tokenizer, ["Edema remains visible", "There is no evidence of edema"], 32)
    h = {key: state[f"cls_projection_head.{key}"] for key in HEAD}
    cls = bert.bert(**tokens).last_hidden_state[:, 0]
    cls = F.gelu(F.linear(cls, h["dense_to_hidden.weight"], h["dense_to_hidden.bias"]))
    cls = F.layer_norm(cls, [128], h["LayerNorm.weight"], h["LayerNorm.bias"], 1e-12)
    expected = F.linear(cls, h["dense_to_output.weight"], h["dense_to_output.bias"])
    pooled = model.embed_texts(tokens).pooled
    assert torch.allclose(pooled, expected, rtol=1e-3, atol=1e-4)
    assert pooled.std() > 1e-3


@torch.no_grad()
def test_clip_is_the_published_model(home, smoke):
    model = load_model("clip", replace(smoke[0], weights=str(home)))  # whatever the size of the preset's images
    with torch.device("meta"):  # weights come from the file
        clip = open_clip.CLIP(**open_clip.get_model_config("RN50"), quick_gelu=True).eval()
    state = safetensors.torch.load_file(home / "resnet50_clip.openai/open_clip_model.safetensors")
    clip.load_state_dict(state, assign=True)
    clip.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    images, texts = phantoms(smoke, 1), ["Edema remains visible", "There is no evidence of edema"]
    constants = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = (torch.tensor(value)[:, None, None] for value in constants)
    pooled = model.embed_images(images).pooled
    expected = clip.encode_image((clip_pixels(images) - mean) / std)
    assert torch.allclose(pooled, expected, rtol=1e-3, atol=1e-4) and pooled.std() > 1e-4
    pooled = model.embed_texts(tokenize(model.tokenizer, texts, 77)).pooled
    assert torch.allclose(pooled, clip.encode_text(open_clip.get_tokenizer("RN50")(texts)), rtol=1e-3, atol=1e-4)


# --- every key ---


@pytest.mark.parametrize("fault", ["missing", "unknown", "of another shape"])
@pytest.mark.parametrize("key", [
    "encoder.encoder.conv1.weight", "encoder.encoder.layer3.5.bn2.running_var", "projector.model.0.weight",
    "projector.model.1.num_batches_tracked", "projector.model.3.bias",
])
def test_every_key_is_accounted_for(biovil_image, encoder, fault, key):
    state = dict(biovil_image)
    if fault == "missing":
        del state[key]
    elif fault == "unknown":
        state[f"{key}.more"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(7)
    named = re.escape(key.split(".", 2)[2])
    with pytest.raises(WeightsError, match=f"not BioViL's image model.*{fault}: .*{named}"):
        load_biovil_image(encoder, state)


@pytest.fixture(scope="module")
def encoder() -> BioViLImageEncoder:
    "Without weights."
    return BioViLImageEncoder()


@pytest.mark.parametrize("state", [{}, {"state_dict": {}}, torchvision.models.resnet18().state_dict()])
def test_other_files_are_refused(encoder, state):
    before = encoder.projector[0].weight.clone()
    with pytest.raises(WeightsError, match="missing: backbone.bn1.bias"):
        load_biovil_image(encoder, state)
    assert torch.equal(encoder.projector[0].weight, before)


def test_every_weight_comes_from_the_file(biovil_image, encoder):
    load_biovil_image(encoder, biovil_image)
    for key, value in encoder.state_dict().items():
        published = key.replace("backbone.", "encoder.encoder.").replace("projector.", "projector.model.")
        assert torch.equal(value, biovil_image[published]), key
    assert len(encoder.state_dict()) == len(biovil_image) - 2  # the classes of ImageNet


# --- pixels ---


@pytest.mark.parametrize("side", [96, 224, 480, 512, 1024])
def test_pixels_have_the_published_size(side):
    images = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0)) * 0.3
    for prepare, size in ((clip_pixels, 224), (biovil_pixels, 480)):
        pixels = prepare(images)
        assert pixels.shape == (2, 1, size, size) and 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.allclose(pixels[:1], biovil_pixels(images[:1] * 2 + 0.1), atol=1e-4)  # exposure is without effect


def test_resizing_is_pillows():
    image = torch.rand(1, 1, 300, 300, generator=torch.Generator().manual_seed(0))
    for mode, filter in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        for side in (224, 512):
            pillow = np.array(Image.fromarray(image[0, 0].numpy()).resize((side, side), filter)).clip(0, 1)
            assert np.allclose(resize(image, side, mode)[0, 0], pillow, atol=1e-4)


def test_an_even_image_is_finite():
    assert biovil_pixels(torch.full((1, 1, 96, 96), 0.5)).isfinite().all()


# --- where files are ---


REPOS = {"biovil": "microsoft/BiomedVLP-CXR-BERT-specialized", "clip": "timm/resnet50_clip.openai"}


@pytest.mark.parametrize(("name", "repo"), REPOS.items())
def test_missing_weights_are_named_with_where_to_put_them(tmp_path, monkeypatch, smoke, name, repo):
    monkeypatch.setattr(weights_module, "reachable", lambda url: False)
    monkeypatch.setattr(weights_module, "try_to_load_from_cache", lambda *names: None)
    with pytest.raises(WeightsError, match=f"hf download {repo} --local-dir .*{tmp_path.name}"):
        load_model(name, replace(smoke[0], weights=str(tmp_path)))


def test_half_a_download_is_named(tmp_path, smoke):
    (tmp_path / "BiomedVLP-CXR-BERT-specialized").mkdir()
    (tmp_path / "resnet50_clip.openai").mkdir()
    with pytest.raises(WeightsError, match=f"image weights are not in .*hf download .* {BIOVIL_IMAGE} --local-dir"):
        load_model("biovil", replace(smoke[0], weights=str(tmp_path)))
    with pytest.raises(WeightsError, match="has none of the files"):
        load_model("clip", replace(smoke[0], weights=str(tmp_path)))


class Trap:
    "Runs code where a file is unpickled."

    def __reduce__(self):
        return (pytest.fail, ("code of a weights file was run",))


def test_a_weights_file_cannot_run_code(tmp_path, smoke):
    place = tmp_path / "BiomedVLP-CXR-BERT-specialized"
    place.mkdir()
    torch.save({"projector.model.3.bias": Trap()}, place / BIOVIL_IMAGE)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_model("biovil", replace(smoke[0], weights=str(tmp_path)))


# --- one function for all ---


@torch.no_grad()
def test_a_saved_model_is_read_and_does_not_train(tmp_path, smoke):
    settings, images, model = smoke[0], phantoms(smoke, 2), smoke[3]
    model.save_pretrained(tmp_path / "model")
    again = load_model(str(tmp_path / "model"), settings)
    assert not again.training and torch.equal(again.embed_images(images).pooled, model.embed_images(images).pooled)
    before, after = (each.embed_texts(tokenize(each.tokenizer, ["no edema"], 32)).pooled for each in (model, again))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors and is no saved model: copy it"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "cannot be read as a model"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as a model"),
    (lambda folder: (folder / "config.json").write_text("{}"), "cannot be read as a model"),
    (lambda folder: (folder / "config.json").write_text('{"image_encoder": "vgg"}'), "cannot be read as a model"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read as a model"),
])
def test_a_spoiled_model_is_named(tmp_path, smoke, spoil, complaint):
    smoke[3].save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(WeightsError, match=complaint):
        load_model(tmp_path / "model", smoke[0])


@pytest.mark.parametrize("name", ["", "CLIP", "microsoft/BiomedVLP-BioViL-T", "../nowhere", "settings.ini"])
def test_a_name_that_is_no_model(smoke, name):
    with pytest.raises(WeightsError, match="there is no model|is no saved model"):
        load_model(name, smoke[0])


def test_a_baseline_takes_part_in_every_evaluation(smoke):
    settings, studies, store, ours = smoke
    prepared = Prepared(ours.image_encoder, partial(resize, side=64, mode="bilinear"))
    baseline = Baseline(prepared, ours.text_encoder, ours.tokenizer)
    images, texts = embed_pairs(baseline, studies[:6], store, settings.max_tokens, local=True)
    assert images.local.shape[:2] == (6, 4) and texts.pooled.shape == images.pooled.shape == (6, settings.embed_dim)
    metrics, tables = downstream_metrics(baseline, studies, store, settings)
    assert metrics["zero_shot_labels"] > 3 and set(tables) == {"zero_shot", "probe"}
