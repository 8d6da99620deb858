"""Backbones of timm whose channels come last, or that are made for images of one size."""
import pytest
import timm
import torch
from torch import nn

from cxrvlm.encoders import DualEncoder, ImageEncoder, build_backbone

TEXT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(("name", "size", "width", "regions"), [
    ("mambaout_femto", 64, 288, 4), ("mambaout_femto", 96, 288, 9), ("swin_tiny_patch4_window7_224", 64, 768, 4),
    ("sequencer2d_s", 64, 384, 16), ("test_vit", 64, 64, 16), ("test_vit", 96, 64, 36), ("mixer_s32_224", 64, 512, 4),
    ("hiera_tiny_224", 96, 768, 9), ("nest_tiny", 64, 384, 16), ("maxvit_pico_rw_256", 64, 256, 4), ("test_resnet", 64, 96, 4),
])  # fmt: skip
def test_regions_and_features(name, size, width, regions):
    encoder = ImageEncoder(f"timm:{name}", 16, size).eval()
    with torch.no_grad():
        features = encoder.features(torch.rand(1, 1, size, size))
    assert features.shape == (1, regions, width) and encoder.to_pooled.in_features == width


def test_a_region_is_where_it_was():
    "Of a model with its channels last: a change in one corner changes that corner's region most."
    encoder = ImageEncoder("timm:mambaout_femto", 16, 128).eval()
    plain = torch.full((1, 1, 128, 128), 0.5)
    for region, (row, column) in {0: (0, 0), 3: (0, 96), 12: (96, 0), 15: (96, 96)}.items():
        changed = plain.clone()
        changed[..., row : row + 32, column : column + 32] = torch.rand(32, 32)
        with torch.no_grad():
            difference = (encoder.features(changed) - encoder.features(plain)).norm(dim=2)[0]
        assert difference.argmax() == region


def test_what_cannot_take_the_size_says_so():
    with pytest.raises(ValueError, match="timm:crossvit_tiny_240 takes no images of image_size = 64 px .*choose another size"):
        ImageEncoder("timm:crossvit_tiny_240", 16, 64)
    with pytest.raises(ValueError, match="image_size = 65"):
        ImageEncoder("timm:test_vit", 16, 65)
    with pytest.raises(ValueError, match="Unknown model"):
        ImageEncoder("timm:resnet19", 16, 64)
    with pytest.raises(ValueError, match="is built for 64 x 64 px, not 96 x 96"):
        ImageEncoder("timm:test_vit", 16, 64)(torch.rand(1, 1, 96, 96))


def test_a_saved_model_keeps_its_size(tmp_path):
    from cxrvlm.text import train_tokenizer
    model = DualEncoder("timm:test_vit", TEXT, 16, [0], image_size=64).eval()
    model.tokenizer = train_tokenizer(["small effusion"], 100)
    model.save_pretrained(tmp_path)
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(DualEncoder.from_pretrained(tmp_path).eval().embed_images(image).pooled, model.embed_images(image).pooled)


@pytest.mark.parametrize("name", ["timm:test_resnet", "resnet18"])
@pytest.mark.parametrize("size", [64, 224])
def test_committed_results_keep_their_starting_points(name, size):
    "The backbone is drawn first and then the two projections, whatever the size: nothing else draws."
    torch.manual_seed(3)
    found = ImageEncoder(name, 16, size)
    torch.manual_seed(3)
    backbone = build_backbone(name) if name == "resnet18" else timm.create_model("test_resnet", features_only=True, out_indices=(-1,))
    projections = nn.Linear(found.to_pooled.in_features, 16), nn.Linear(found.to_pooled.in_features, 16)
    prefix = "backbone." if name == "resnet18" else "backbone.model."
    expected = {prefix + key: value for key, value in backbone.state_dict().items()}
    expected |= {f"{part}.{key}": value for part, layer in zip(("to_pooled", "to_local"), projections, strict=True) for key, value in layer.state_dict().items()}
    state = found.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
