"""Table 2's augmentations: draws that depend on their names alone, the numbers of the table, and the same picture as torchvision's."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from cxrvlm.augment import PARTS, augment, augmentation, draw
from cxrvlm.images import read_image, to_float
from cxrvlm.settings import load_settings, replace
from cxrvlm.studies import phantom_reference

DEMO = load_settings("demo")
PHANTOM = to_float(torch.from_numpy(read_image(phantom_reference(3, ["Cardiomegaly"]), 48)))[None, None]
OFF = dict(translation=0, rotation=0, brightness=0, shear=0, scaling=0, flip=0, noise=0, noise_p=0, blur_sigma=(), blur_p=0)
MANY = range(200)


def changed(stage, **values):
    return replace(DEMO, **{f"{stage}_{name}": value for name, value in (OFF | values).items()})


def many(image, transform):
    "Two hundred samples that start from one image."
    return augment(image.expand(len(MANY), -1, -1, -1), transform, 0, 0, MANY)


@pytest.mark.parametrize("stage", ["vlm", "simclr"])
def test_draws_depend_on_their_names_alone(stage):
    transform = augmentation(DEMO, stage)
    names = [(seed, step, sample) for seed in (0, 1) for step in (0, 7) for sample in ("a", "b", 2)]
    first = {name: augment(PHANTOM, transform, *name[:2], [name[2]]) for name in names}
    for name in np.random.default_rng(0).permutation(np.array(names, object)).tolist():
        torch.rand(3)
        assert torch.equal(augment(PHANTOM, augmentation(DEMO, stage), *name[:2], [name[2]]), first[tuple(name)])
    different = {image.numpy().tobytes() for image in first.values()}
    assert len(different) == len(names) and not torch.cuda.is_initialized()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["vlm", "simclr"]), st.integers(0, 2**40), st.integers(0, 10**7), st.permutations(range(5)))
def test_a_batch_is_its_samples_one_by_one(stage, seed, step, order):
    "Whatever the batch and its order, at a size that is computed in one block and at one that is not."
    transform = augmentation(DEMO, stage)
    images = torch.cat([PHANTOM * level for level in (0.2, 0.4, 0.6, 0.8, 1.0)])
    together = augment(images[order], transform, seed, step, order)
    alone = torch.cat([augment(images[i : i + 1], transform, seed, step, [i]) for i in order])
    torch.testing.assert_close(together, alone)
    assert together.isfinite().all() and 0 <= together.min() and together.max() <= 1


def test_blocks_are_without_effect(monkeypatch):
    transform = augmentation(DEMO, "simclr")
    whole = many(PHANTOM, transform)
    monkeypatch.setattr("cxrvlm.augment.CACHED", 7 * 48**2)
    assert torch.equal(many(PHANTOM, transform), whole)


@pytest.mark.parametrize("stage", ["vlm", "simclr"])
def test_zeros_turn_everything_off(stage):
    assert torch.equal(many(PHANTOM, augmentation(changed(stage), stage)), PHANTOM.expand(len(MANY), -1, -1, -1))
    without_noise = augmentation(changed(stage, noise=0.05), stage)  # its probability is 0
    assert torch.equal(augment(PHANTOM, without_noise, 0, 0, [0]), PHANTOM)


@pytest.mark.parametrize("values", [{"rotation": 40}, {"shear": 30}, {"scaling": 0.3}, {"translation": 100}, {"rotation": 180, "shear": 40, "flip": 1}])
def test_geometry_is_that_of_torchvision(values):
    "Each sample beside torchvision's affine with the numbers that were drawn, where the new image shows the old one."
    moving = augmentation(changed("simclr", **values), "simclr")
    names = range(20)
    ours = augment(PHANTOM.expand(20, -1, -1, -1), moving, 0, 0, names)
    covered = augment(torch.ones_like(PHANTOM).expand(20, -1, -1, -1), moving, 0, 0, names) > 0.999
    for u, mine, inside in zip(draw(0, 0, names).uniform, ours, covered, strict=True):
        u = dict(zip(PARTS, 2 * u - 1, strict=True))
        shift = [moving.translation / 512 * 48 * u[axis] for axis in "xy"]
        whole = [round(pixels) for pixels in shift]  # torchvision moves by whole pixels
        if any(abs(a - b) > 0.02 for a, b in zip(shift, whole, strict=True)):
            continue
        theirs = v2.functional.affine(
            PHANTOM, moving.rotation * u["rotation"], whole, 1 + moving.scaling * u["scaling"], [moving.shear * u["shear"], 0],
            interpolation=v2.InterpolationMode.BILINEAR, fill=0,
        )
        theirs = theirs.flip(3)[0] if moving.flip else theirs[0]
        assert (mine - theirs)[inside].abs().max() < 0.02 and inside.float().mean() > 0.3


def test_lengths_scale_with_the_image():
    def shifts(size):
        transform = augmentation(replace(changed("simclr", translation=64), image_size=size), "simclr")
        point = torch.zeros(1, 1, size, size)
        point[..., size // 2, size // 2] = 1
        moved = many(point, transform)[:, 0]
        places = (moved.sum(1) * torch.arange(size)).sum(1) - size // 2  # of the centre of mass, along x
        return places.abs().max().item()

    assert 0.95 * 32 <= shifts(256) <= 32.01 and 0.95 * 8 <= shifts(64) <= 8.01


def test_brightness_flip_and_noise_are_those_of_the_table():
    even = torch.full((1, 1, 48, 48), 0.5)
    levels = many(even, augmentation(changed("vlm", brightness=0.2), "vlm")).mean((1, 2, 3))
    assert 0.4 <= levels.min() < 0.41 and 0.59 < levels.max() <= 0.6
    flipped = many(PHANTOM, augmentation(changed("simclr", flip=0.5), "simclr"))
    same, mirrored = ((flipped - x).abs().amax((1, 2, 3)) < 1e-4 for x in (PHANTOM, PHANTOM.flip(-1)))
    assert (same ^ mirrored).all() and 70 < same.sum() < 130
    noisy = many(even, augmentation(changed("vlm", noise=0.05, noise_p=0.5), "vlm")).std((1, 2, 3))
    assert 70 < (noisy > 0).sum() < 130 and abs(noisy[noisy > 0].mean() - 0.05) < 0.001


def test_blur_is_torchvisions():
    "All three sigmas are drawn, about equally often, and each is torchvision's blur."
    blurring = augmentation(replace(changed("simclr", blur_sigma=(6, 12, 30), blur_p=0.75), image_size=48), "simclr")
    theirs = [PHANTOM[0]]
    for sigma in (6, 12, 30):
        reach = int(np.ceil(3 * sigma * 48 / 512))
        theirs.append(v2.functional.gaussian_blur(PHANTOM[0], [2 * reach + 1] * 2, [sigma * 48 / 512] * 2))
    found = [[bool((image - other).abs().max() < 1e-5) for other in theirs] for image in many(PHANTOM, blurring)]
    assert all(sum(row) == 1 for row in found)
    assert all(30 < count < 70 for count in np.sum(found, axis=0))


def test_unknown_stage():
    with pytest.raises(ValueError, match="'vlm' and 'simclr'"):
        augmentation(DEMO, "declip")
