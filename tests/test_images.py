"""What the notebook cannot test: hostile files, killed and simultaneous builds, real radiographs, properties."""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxrvlm import images
from cxrvlm.images import ImageError, ImageStore, read_image
from cxrvlm.settings import load_settings
from cxrvlm.studies import phantom_reference

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FEW = settings(deadline=None, max_examples=25, derandomize=True)
DEMO = load_settings("demo")


@pytest.fixture(autouse=True)
def one_thread():
    "Threads make such small images slower, not faster."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradient(width=60, height=80):
    "A gray picture without symmetry: dark at the upper left."
    return np.add.outer(np.linspace(0, 155, height), np.linspace(0, 100, width)).astype(np.uint8)


def encoded(array, format, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def bytes_of_broken_files():
    jpeg, png = encoded(gradient(), "jpeg"), encoded(gradient(), "png")
    return {
        "zero.png": b"",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "header.png": png[:20],
        "note.jpg": b"the radiograph follows by post\n",
        "scan.dcm": bytes(128) + b"DICM" + bytes(200),
        "dot.png": encoded(gradient(1, 1), "png"),
        "line.png": encoded(gradient(500, 3), "png"),
        "flat16.png": encoded(np.full((20, 20), 700, np.uint16), "png"),
        "nan.tif": encoded(np.full((20, 20), np.nan, np.float32), "tiff"),
        "infinite.tif": encoded(np.where(gradient() > 90, np.inf, 0).astype(np.float32), "tiff"),
        "negative.tif": encoded(np.where(gradient() > 90, -np.inf, 0).astype(np.float32), "tiff"),
    }


@pytest.mark.parametrize("name", [*bytes_of_broken_files(), "missing.png", "folder.png", "note.jpg/inside.png"])
def test_broken_file_is_named(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    for file, content in bytes_of_broken_files().items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(name, 32, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and caught.value.reason
    assert "Traceback" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("ref", ["", "a\0b", "x" * 5000, "phantom:", "phantom:x|Cardiomegaly"])
def test_absurd_reference(tmp_path, ref):
    with pytest.raises(ImageError):
        read_image(ref, 32, tmp_path)


@pytest.mark.parametrize("limit", [3000, 1000])  # Pillow warns above the limit and raises above twice the limit
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    (tmp_path / "big.png").write_bytes(encoded(gradient(), "png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match="pixels"):
        read_image("big.png", 32, tmp_path)


def test_unsupported_mode_is_named(tmp_path):
    Image.new("LAB", (20, 20)).save(tmp_path / "lab.tif")
    with pytest.raises(ImageError, match="lab.tif"):
        read_image("lab.tif", 32, tmp_path)


def saved(path, image, **options):
    image.save(path, **options)
    return read_image(path, 32).astype(int)


def test_modes(tmp_path):
    picture = Image.fromarray(gradient())
    expected = read_image_of(picture)
    assert (saved(tmp_path / "rgb.png", picture.convert("RGB")) == expected).all()
    assert (saved(tmp_path / "rgba.png", picture.convert("RGBA")) == expected).all()
    assert (saved(tmp_path / "la.png", picture.convert("LA")) == expected).all()
    assert (saved(tmp_path / "palette.png", picture.convert("P")) == expected).all()
    assert np.abs(saved(tmp_path / "cmyk.tif", picture.convert("CMYK")) - expected).max() <= 1
    assert np.abs(saved(tmp_path / "cmyk.jpg", picture.convert("CMYK"), quality=95) - expected).max() <= 4
    bits = saved(tmp_path / "bits.png", picture.point(lambda v: 255 * (v > 127)).convert("1"))
    assert bits.min() == 0 and bits.max() == 255


def read_image_of(picture):
    return np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("depth", [10, 12, 16])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_deep_images_use_their_own_range(tmp_path, depth, name):
    values = gradient().astype(np.float64)
    values = (values - values.min()) / np.ptp(values)
    Image.fromarray((values * (2**depth - 1)).astype(np.uint16)).save(tmp_path / name)
    stretched = Image.fromarray((255 * values).astype(np.float32))
    assert np.abs(read_image(name, 32, tmp_path) - read_image_of(stretched)).max() <= 2


def test_signed_and_float_images(tmp_path):
    values = gradient().astype(np.int32) * 7 - 1024  # as in Hounsfield units
    Image.fromarray(values).save(tmp_path / "signed.tif")
    Image.fromarray((values / 9999).astype(np.float32)).save(tmp_path / "float.tif")
    signed, floating = read_image("signed.tif", 32, tmp_path), read_image("float.tif", 32, tmp_path)
    assert signed.min() < 10 and signed.max() > 245
    assert np.abs(signed.astype(int) - floating).max() <= 1


def test_transparent_is_black(tmp_path):
    pixels = np.full((40, 40, 4), 255, np.uint8)
    pixels[:, 20:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    square = read_image("cut.png", 32, tmp_path)
    assert (square[:, :14] == 255).all() and (square[:, 18:] == 0).all()


@pytest.mark.parametrize("orientation, turned", [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)),
                                                 (8, lambda a: np.rot90(a))])
def test_exif_orientation(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    expected = read_image_of(Image.fromarray(np.ascontiguousarray(turned(gradient()))))
    assert (read_image("turned.png", 32, tmp_path) == expected).all()


def white_is_zero(values):
    "A TIFF whose zero is white, which Pillow writes for 8 bits only."
    kind = 3 if values.dtype.kind == "f" else 1
    tags = {256: values.shape[1], 257: values.shape[0], 258: values.itemsize * 8, 259: 1, 262: 0, 273: 8, 277: 1, 278: values.shape[0], 279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4 if value > 65535 else 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["u1", "<u2", "<f4"])
def test_white_is_zero_in_any_depth(tmp_path, kind):
    values = gradient().astype(float) / 255
    full = 1 if kind == "<f4" else np.iinfo(kind).max
    (tmp_path / "white.tif").write_bytes(white_is_zero((full * (1 - values)).astype(kind)))
    stretched = Image.fromarray((255 * (values if kind == "u1" else values / values.max())).astype(np.float32))
    assert np.abs(read_image("white.tif", 32, tmp_path) - read_image_of(stretched)).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_a_picture_of_one_value_is_none(tmp_path, mode):
    Image.new(mode, (20, 20)).save(tmp_path / "black.tif")
    with pytest.raises(ImageError, match="black.tif: its pixels are all equal"):
        read_image("black.tif", 32, tmp_path)


def test_a_picture_that_is_wholly_transparent_is_none(tmp_path):
    pixels = np.dstack([gradient()] * 3 + [np.zeros_like(gradient())])
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    with pytest.raises(ImageError, match="all equal"):
        read_image("clear.png", 32, tmp_path)


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.webp", "film.tif"])
def test_several_pictures_in_one_file_are_not_guessed_at(tmp_path, name):
    picture = Image.fromarray(gradient())
    picture.save(tmp_path / name, save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])
    with pytest.raises(ImageError, match="it has 3 pages, frames or layers; save the one that is meant"):
        read_image(name, 32, tmp_path)
    picture.save(tmp_path / f"one-{name}", save_all=True)
    assert np.abs(read_image(f"one-{name}", 32, tmp_path) - read_image_of(picture)).max() <= 16  # WebP is lossy


def test_of_a_phones_two_pictures_the_first_is_meant(tmp_path):
    picture = Image.fromarray(gradient())
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[picture.rotate(90)], quality=95)
    assert np.abs(read_image("phone.jpg", 32, tmp_path) - read_image_of(picture)).max() <= 4


def deep_colours(values):
    "A PNG of 16 bits a colour, which Pillow does not write."
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_read_and_of_12_in_16_refused(tmp_path):
    (tmp_path / "full.png").write_bytes(deep_colours(gradient().astype(int) * 257))
    assert np.abs(read_image("full.png", 32, tmp_path) - read_image_of(Image.fromarray(gradient()))).max() <= 1
    (tmp_path / "dark.png").write_bytes(deep_colours(gradient().astype(int) * 16))
    with pytest.raises(ImageError, match="leave bits of their 16 unused"):
        read_image("dark.png", 32, tmp_path)


@FEW
@given(st.integers(8, 90), st.integers(8, 90), st.integers(0, 255), st.integers(8, 70))
def test_even_image_stays_even(width, height, value, size):
    square = images.to_square(Image.new("L", (width, height), value), size)
    assert square.shape == (size, size) and square.dtype == np.uint8 and (square == value).all()


@FEW
@given(st.sampled_from(["png", "jpeg", "tiff", "bmp"]), st.integers(0, 2**31), st.integers(1, 20))
def test_damaged_file_gives_an_image_or_an_image_error(tmp_path_factory, format, seed, hits):
    rng = np.random.default_rng(seed)
    content = bytearray(encoded(gradient(), format))
    for place in rng.integers(0, len(content), hits):
        content[place] = rng.integers(256)
    path = tmp_path_factory.mktemp("damaged") / "image"
    path.write_bytes(content[: rng.integers(len(content) // 2, len(content) + 1)])
    try:
        square = read_image(path, 32)
        assert square.shape == (32, 32) and square.dtype == np.uint8
    except ImageError as error:
        assert str(path) in str(error)


# The store


def make_files(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return sorted(path.name for path in folder.iterdir())


def python(*arguments):
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SLOW_BUILD = """
import sys, time
from pathlib import Path
from cxrvlm import images
read, root, log = images.read_image, Path(sys.argv[1]), Path(sys.argv[3])
def slow(ref, *rest):
    time.sleep(0.01)
    with log.open("a") as file:
        file.write(ref + chr(10))
    while len(sys.argv) > 4 and len(log.read_text().splitlines()) > int(sys.argv[4]):
        time.sleep(1)  # enough: it waits to be killed
    return read(ref, *rest)
images.read_image, images.CHUNK = slow, 8
refs = [path.name for path in sorted(root.iterdir(), reverse=True)]
print(images.ImageStore.build(refs, sys.argv[2], 16, root=root).folder)
"""


def test_killed_build_goes_on(tmp_path):
    names = make_files(tmp_path / "files", 48)
    script, log = tmp_path / "build.py", tmp_path / "log"
    script.write_text(SLOW_BUILD)
    first = python(script, tmp_path / "files", tmp_path / "stores", log, 20)
    while first.poll() is None:
        done = list((tmp_path / "stores").glob("*/done.npy"))
        if done and np.load(done[0]).sum() >= 16:
            break
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    kept = int(np.load(done[0]).sum())
    assert 16 <= kept < 48 and not list((tmp_path / "stores").glob("*/index.json"))
    with pytest.raises(ImageError, match="no finished store"):
        ImageStore.open(tmp_path / "stores")

    log.unlink()
    second = python(script, tmp_path / "files", tmp_path / "stores", log)
    assert second.wait() == 0, second.communicate()[1]
    assert len(log.read_text().splitlines()) == 48 - kept  # what was noted as done is not decoded again
    whole = ImageStore.build(names, tmp_path / "whole", 16, root=tmp_path / "files")
    resumed = ImageStore.open(tmp_path / "stores")
    assert (resumed.pixels == whole.pixels).all() and resumed.rows == whole.rows
    assert resumed.fingerprint == whole.fingerprint


def test_two_processes_build_one_store(tmp_path):
    names = make_files(tmp_path / "files", 40)
    script, log = tmp_path / "build.py", tmp_path / "log"
    script.write_text(SLOW_BUILD)
    both = [python(script, tmp_path / "files", tmp_path / "stores", log) for _ in range(2)]
    folders = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], folders
    assert folders[0][0] == folders[1][0]
    assert sorted(log.read_text().split()) == names  # every image was decoded by exactly one of them


def test_script_without_main_guard_uses_workers(tmp_path):
    count = images.MANY + 10
    make_files(tmp_path / "files", count)
    (tmp_path / "files" / "zero.png").write_bytes(b"")
    script = tmp_path / "build.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom cxrvlm.images import ImageStore\nroot = Path(sys.argv[1])\n"
        "store = ImageStore.build([p.name for p in root.iterdir()], sys.argv[2], 16, root=root, workers=2)\n"
        "print(len(store), store.failed.ref.tolist(), 'torch' in sys.modules)\n"
    )
    process = python(script, tmp_path / "files", tmp_path / "stores")
    output, errors = process.communicate()
    assert output.split(maxsplit=1) == [str(count), "['zero.png'] False\n"], errors
    assert f"{count + 1}/{count + 1}" in errors  # the progress bar
    store = ImageStore.open(tmp_path / "stores")
    for name in ["000.png", "133.png", f"{count - 1}.png"]:
        assert (store[name] == read_image(name, 16, tmp_path / "files")).all()


def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "import sys\nfrom cxrvlm.images import ImageStore\n"
        "ImageStore.build([f'phantom:{seed}' for seed in range(20000)], sys.argv[1], 64, workers=2)\n"
    )
    process = python(script, tmp_path / "stores")
    while process.poll() is None and not any(np.load(f).any() for f in tmp_path.glob("stores/*/done.npy")):
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=600)[1]


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was decoded again")
    return lambda: monkeypatch.setattr(images, "read_image", refuse)


def test_finished_store_is_reused(tmp_path, no_decoding):
    names = make_files(tmp_path / "files", 12)
    store = ImageStore.build([*names, "none.png"], tmp_path / "stores", 16, root=tmp_path / "files")
    times = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    no_decoding()
    again = ImageStore.build(["none.png", *reversed(names)], tmp_path / "stores", 16, root=tmp_path / "files")
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == times
    assert again.failed.equals(store.failed) and again.failed.ref.tolist() == ["none.png"]
    with pytest.raises(AssertionError):
        ImageStore.build(names, tmp_path / "stores", 17, root=tmp_path / "files")
    with pytest.raises(AssertionError):
        ImageStore.build([*names, "new.png"], tmp_path / "stores", 16, root=tmp_path / "files")
    fewer = ImageStore.build(names[:5], tmp_path / "stores", 16, root=tmp_path / "files")
    assert len(fewer) == 5 and (fewer[names[4]] == store[names[4]]).all()


def shade(path, value):
    "A picture that is mostly of one gray, written anew."
    pixels = np.full((24, 24), value, np.uint8)
    pixels[0, 0] = 255 - value
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(0, value * 10**9))  # as coarse a clock as some disks have


def middle(store, name):
    return int(store[name][8, 8])


@pytest.mark.parametrize("broken", [lambda path: path.write_bytes(path.read_bytes()[:60]), Path.unlink, lambda path: path.write_bytes(b"")])
def test_what_is_mended_is_read_by_the_next_build(tmp_path, broken):
    names = make_files(tmp_path / "files", 4)
    whole = (tmp_path / "files" / names[0]).read_bytes()
    broken(tmp_path / "files" / names[0])
    first = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    assert first.failed.ref.tolist() == [names[0]]
    (tmp_path / "files" / names[0]).write_bytes(whole)
    again = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    assert again.failed.empty and again.contents != first.contents
    assert (again[names[0]] == read_image(names[0], 16, tmp_path / "files")).all()
    assert again.contents == ImageStore.build(names, tmp_path / "other", 16, root=tmp_path / "files").contents


def test_a_file_that_was_replaced_is_read_again_and_who_reads_the_old_one_keeps_it(tmp_path):
    for name, value in (("a.png", 10), ("b.png", 20), ("c.png", 30)):
        shade(tmp_path / name, value)
    names = ["a.png", "b.png"]
    old = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path)
    shade(tmp_path / "a.png", 200)
    (tmp_path / "b.png").unlink()
    new = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path)
    assert (middle(old, "a.png"), middle(new, "a.png"), middle(new, "b.png")) == (10, 200, 20) and new.folder == old.folder
    assert new.contents != old.contents
    shade(tmp_path / "a.png", 100)
    grown = ImageStore.build([*names, "c.png"], tmp_path / "stores", 16, root=tmp_path)
    assert [middle(grown, name) for name in ("a.png", "b.png", "c.png")] == [100, 20, 30]


def test_a_file_that_was_replaced_by_a_broken_one_is_lost_and_said(tmp_path):
    names = make_files(tmp_path / "files", 3)
    ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    (tmp_path / "files" / names[1]).write_bytes(b"by post")
    store = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    assert store.failed.ref.tolist() == [names[1]] and len(store) == 2


def test_an_update_that_is_killed_goes_on(tmp_path, monkeypatch):
    names, read = [f"{n}.png" for n in range(6)], images.read_image
    for name in names:
        shade(tmp_path / name, 10)
    ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path)
    for name in names[:4]:
        shade(tmp_path / name, 200)

    def stop(ref, *rest):
        if ref == names[2]:
            raise KeyboardInterrupt
        return read(ref, *rest)
    monkeypatch.setattr(images, "CHUNK", 1)
    monkeypatch.setattr(images, "read_image", stop)
    with pytest.raises(KeyboardInterrupt):
        ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path)
    monkeypatch.setattr(images, "read_image", read)
    store = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path)
    assert [middle(store, name) for name in names] == [200] * 4 + [10] * 2


def test_a_store_of_before_is_looked_through_once(tmp_path, no_decoding):
    names = make_files(tmp_path / "files", 5)
    refs = [*names, phantom_reference(0, [])]
    store = ImageStore.build(refs, tmp_path / "stores", 16, root=tmp_path / "files")
    (store.folder / "seen.npy").unlink()
    (tmp_path / "files" / names[0]).unlink()  # an archive that is unmounted since: its row stays
    again = ImageStore.build(refs, tmp_path / "stores", 16, root=tmp_path / "files")
    assert (again.pixels == store.pixels).all() and again.failed.empty
    no_decoding()
    assert ImageStore.build(refs, tmp_path / "stores", 16, root=tmp_path / "files").contents == again.contents


def of_one_size(path, pixel, time=10**18):
    "A picture as BMP, whose size does not tell what is on it, with a time that somebody set."
    pixels = np.full((24, 24), 40, np.uint8)
    pixels[8:, 8:] = pixel
    Image.fromarray(pixels).save(path.with_suffix(".new"), "bmp")
    os.utime(path.with_suffix(".new"), ns=(0, time))
    os.replace(path.with_suffix(".new"), path)


def test_a_file_of_the_same_size_and_time_is_another_file(tmp_path):
    for name in ("a.bmp", "b.bmp"):
        of_one_size(tmp_path / name, 200)
    old = ImageStore.build(["a.bmp", "b.bmp"], tmp_path / "stores", 24, root=tmp_path)
    look = os.stat(tmp_path / "a.bmp")
    of_one_size(tmp_path / "a.bmp", 90)
    assert (look.st_size, look.st_mtime_ns) == (os.stat(tmp_path / "a.bmp").st_size, os.stat(tmp_path / "a.bmp").st_mtime_ns)
    assert images.changed_files(old.folder, ["a.bmp", "b.bmp"], tmp_path)[0].tolist() == [True, False]
    grown = ImageStore.build(["a.bmp", "b.bmp", "phantom:1"], tmp_path / "stores", 24, root=tmp_path)  # carries rows over
    new = ImageStore.build(["a.bmp", "b.bmp"], tmp_path / "stores", 24, root=tmp_path)
    assert [middle(store, "a.bmp") for store in (old, new, grown)] == [200, 90, 90] and new.contents != old.contents


@pytest.mark.parametrize("moved", [lambda path: path.chmod(0o600), lambda path: of_one_size(path, 200), lambda path: os.link(path, path.with_suffix(".link"))])
def test_a_file_with_the_same_bytes_is_noted_and_not_decoded_again(tmp_path, no_decoding, monkeypatch, moved):
    of_one_size(tmp_path / "a.bmp", 200)
    old = ImageStore.build(["a.bmp"], tmp_path / "stores", 24, root=tmp_path)
    moved(tmp_path / "a.bmp")
    no_decoding()
    assert not images.changed_files(old.folder, ["a.bmp"], tmp_path)[0].any()
    assert ImageStore.build(["a.bmp"], tmp_path / "stores", 24, root=tmp_path).contents == old.contents
    monkeypatch.setattr(images, "file_sha", lambda *_: pytest.fail("a file was read that is known"))
    ImageStore.build(["a.bmp"], tmp_path / "stores", 24, root=tmp_path)


def test_notes_of_before_are_completed_once_without_decoding(tmp_path, no_decoding, monkeypatch):
    names = make_files(tmp_path / "files", 5)
    store = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    np.save(store.folder / "seen.npy", np.load(store.folder / "seen.npy")[["size", "time", "sha"]].astype([("size", "i8"), ("time", "i8"), ("sha", "u1", 32)]))
    no_decoding()
    assert ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files").contents == store.contents
    assert (np.load(store.folder / "seen.npy") == store.seen).all()


def test_phantoms_have_no_bytes(tmp_path):
    assert ImageStore.build([phantom_reference(0, [])], tmp_path, 16).contents == ""


def test_looking_is_all_that_a_finished_store_costs(tmp_path, monkeypatch):
    names = make_files(tmp_path / "files", 12)
    ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")

    def refuse(*_):
        raise AssertionError("a file was read")
    monkeypatch.setattr(images.hashlib, "file_digest", refuse)
    monkeypatch.setattr(images, "read_image", refuse)
    assert len(ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")) == 12


def test_failed_and_unknown_references_are_refused(tmp_path):
    names = make_files(tmp_path / "files", 3)
    (tmp_path / "files" / "half.png").write_bytes((tmp_path / "files" / names[0]).read_bytes()[:60])
    store = ImageStore.build([*names, "half.png"], tmp_path / "stores", 16, root=tmp_path / "files")
    assert len(store) == 3 and store.failed.ref.tolist() == ["half.png"]
    for ref, words in [("half.png", "cannot be decoded|no such format"), ("other.png", "not in the store")]:
        with pytest.raises(ImageError, match=words):
            store[ref]
        with pytest.raises(ImageError, match=ref):
            store.batch([names[0], ref])


def test_batch_order_and_pickling(tmp_path):
    names = make_files(tmp_path / "files", 6)
    store = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    order = [names[4], names[0], names[4]]
    batch = store.batch(order)
    assert batch.dtype == torch.uint8 and batch.shape == (3, 1, 16, 16)
    assert all((batch[i, 0].numpy() == store[ref]).all() for i, ref in enumerate(order))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000 and (pickle.loads(pickled).batch(order) == batch).all()
    batch[:] = 0  # a copy: the store stays as it is
    assert store[names[4]].any()


def test_damaged_stores_are_named(tmp_path):
    names = make_files(tmp_path / "files", 4)
    with pytest.raises(ImageError, match="no images"):
        ImageStore.build([], tmp_path / "stores", 16)
    store = ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    with (store.folder / "pixels.npy").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ImageError, match="damaged.*delete"):
        ImageStore.open(tmp_path / "stores")
    (store.folder / "index.json").write_text("{")
    with pytest.raises(ImageError, match="damaged.*delete"):
        ImageStore.build(names, tmp_path / "stores", 16, root=tmp_path / "files")
    ImageStore.build(names, tmp_path / "two", 16, root=tmp_path / "files")
    ImageStore.build(names, tmp_path / "two", 18, root=tmp_path / "files")
    with pytest.raises(ImageError, match="several"):
        ImageStore.open(tmp_path / "two")


def test_full_disk_is_foreseen(tmp_path):
    with pytest.raises(ImageError, match="GB are needed"):
        images.prepare(tmp_path, 10**12, 512)


def test_index_is_readable_by_others(tmp_path):
    refs = [phantom_reference(seed, ["Cardiomegaly"]) for seed in range(3)]
    store = ImageStore.build(refs, tmp_path, 32)
    index = json.loads((store.folder / "index.json").read_text())
    assert index["refs"] == sorted(refs) and index["size"] == 32 and len(index["fingerprint"]) == 64
    assert all((store[ref] == read_image(ref, 32)).all() for ref in refs)


@pytest.mark.parametrize("folder, pattern, count", [("nih/images", "*.jp*g", 1000), ("openi_png", "*.png", 13)])
def test_real_radiographs(tmp_path, folder, pattern, count):
    root = DATA / folder
    if not root.is_dir():
        pytest.skip(f"{root} is absent")
    names = sorted(path.name for path in root.glob(pattern))
    store = ImageStore.build(names, tmp_path, 96, root=root, workers=1)
    assert len(store) == len(names) == count and store.failed.empty
    assert (store.pixels.std(axis=(1, 2)) > 5).all()
    assert (store[names[-1]] == read_image(names[-1], 96, root)).all()


# Augmentations


def test_a_message_never_quotes_what_stands_in_a_dicom_file(tmp_path):
    "An anonymiser may have put a name anywhere."
    for keyword in ("NumberOfFrames", "PhotometricInterpretation", "RescaleSlope", "Modality"):
        dataset = pydicom.dcmread(pydicom.examples.get_path("ct"))
        text = dataset.to_json_dict()
        tag = f"{pydicom.datadict.tag_for_keyword(keyword):08X}"
        text[tag] = {"vr": "LO", "Value": ["ZYZZYVA^QUOKKA"]}
        spoiled = pydicom.Dataset.from_json(text)
        if keyword == "Modality":
            del spoiled.PixelData
        spoiled.file_meta = dataset.file_meta
        spoiled.save_as(tmp_path / "x.dcm", enforce_file_format=True)
        with pytest.raises(ImageError) as caught:
            read_image("x.dcm", 32, tmp_path)
        assert "ZYZZYVA" not in str(caught.value) and "QUOKKA" not in str(caught.value), keyword


def test_signed_bytes_are_refused(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "x.tif", tiffinfo={339: 2})
    with pytest.raises(ImageError, match="its 8 bits have a sign"):
        read_image("x.tif", 32, tmp_path)
