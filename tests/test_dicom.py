"""DICOM: pydicom's own files of every kind, and what a detector writes."""
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from cxrvlm.dicom import DicomError, is_dicom, read_dicom
from cxrvlm.images import ImageError, ImageStore, read_image
from cxrvlm.studies import load_table

FILES = {path.name: path for path in (Path(pydicom.__file__).parent / "data/test_files").glob("*.dcm")}
FEW = settings(deadline=None, max_examples=30, derandomize=True)


def gradient(low=0, high=4095, height=40, width=60):
    return np.linspace(low, high, height * width).reshape(height, width).round().astype(int)


def store(path, values, **tags):
    "Write 16-bit values as a DICOM file."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3"
    dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 16, 15
    dataset.PixelRepresentation = int(values.min() < 0)
    dataset.PixelData = values.astype(np.int16 if values.min() < 0 else np.uint16).tobytes()
    for name, value in ({"PhotometricInterpretation": "MONOCHROME2"} | tags).items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("name", sorted(FILES))
def test_pydicoms_own_files_give_a_picture_or_a_reason(name):
    "Compressed in all ways, big-endian, in colours, damaged, and no pictures at all."
    try:
        square = read_image(FILES[name], 32)
        assert square.shape == (32, 32) and square.dtype == np.uint8 and np.ptp(square) > 0
    except ImageError as error:
        assert name in str(error) and "Traceback" not in str(error) and len(error.reason) > 10
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(("name", "reason"), [
    ("rtplan.dcm", "without a picture"), ("test-SR.dcm", "without a picture"), ("SC_rgb_rle_2frame.dcm", "has 2 frames"),
    ("JPGExtended.dcm", "cannot read its compression, JPEG Extended"), ("MR_truncated.dcm", "cannot be decoded"), ("SC_rgb_small_odd.dcm", "3 x 3 px"),
])  # fmt: skip
def test_the_reason_is_a_sentence(name, reason):
    with pytest.raises(ImageError, match=reason):
        read_image(FILES[name], 32)


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_gdcm.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "examples_palette.dcm"])
def test_common_compressions_are_read(name):
    assert read_image(FILES[name], 32).std() > 5


def test_one_picture_in_five_encodings():
    expected = np.asarray(read_dicom(FILES["MR_small.dcm"]))
    for name in ("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        assert np.array_equal(np.asarray(read_dicom(FILES[name])), expected), name


def test_the_name_does_not_matter(tmp_path):
    store(tmp_path / "IM0001", gradient())
    (tmp_path / "a.dcm").write_bytes(b"DICM" * 50)
    assert is_dicom(tmp_path / "IM0001")
    assert np.ptp(read_image("IM0001", 32, tmp_path).astype(int)) > 250
    with pytest.raises(ImageError):
        read_image("a.dcm", 32, tmp_path)


def test_monochrome1_is_the_negative(tmp_path):
    values = gradient()
    plain, turned = (np.asarray(read_dicom(store(tmp_path / kind, values, PhotometricInterpretation=kind))) for kind in ("MONOCHROME2", "MONOCHROME1"))
    assert np.array_equal(plain, -turned)


def test_padding_is_black_and_takes_no_part_in_the_range(tmp_path):
    values = gradient(1000, 1400)
    values[:4] = 65535
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        square = read_image(store(tmp_path / kind, values, PixelPaddingValue=65535, PhotometricInterpretation=kind), 40)
        assert square[:3].max() == 0 and square[6:].max() > 230


SHORT = {"PixelPaddingValue": (0x0028, 0x0120), "PixelPaddingRangeLimit": (0x0028, 0x0121)}


@pytest.mark.parametrize(("low", "bits", "padded", "written"), [
    (-500, 16, [-2000], {"PixelPaddingValue": ("US", 63536)}),
    (-500, 16, [-2000], {"PixelPaddingValue": ("SS", -2000)}),
    (0, 16, [65535], {"PixelPaddingValue": ("SS", -1)}),
    (0, 16, [65530, 65535], {"PixelPaddingValue": ("US", 65535), "PixelPaddingRangeLimit": ("US", 65500)}),
    (0, 16, [65530, 65535], {"PixelPaddingValue": ("SS", -36), "PixelPaddingRangeLimit": ("SS", -1)}),
    (-500, 16, [-2000, -1024], {"PixelPaddingValue": ("US", 63536), "PixelPaddingRangeLimit": ("US", 64512)}),
    (0, 12, [65535], {"PixelPaddingValue": ("US", 65535)}),  # more bits than a measurement has
    (-500, 12, [-2000], {"PixelPaddingValue": ("US", 63536)}),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_of_either_sign_and_as_a_range(tmp_path, low, bits, padded, written, kind):
    values = gradient(low, low + 2000)
    values[:6], values[6:12] = padded[0], padded[-1]
    path = store(tmp_path / "x", values, BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation=kind)
    dataset = pydicom.dcmread(path)
    for name, (vr, value) in written.items():
        dataset.add_new(SHORT[name], vr, value)
    dataset.save_as(path)
    measured = values[12:]
    values[:12] = measured.min() if kind == "MONOCHROME2" else measured.max()
    plain = store(tmp_path / "y", values, PhotometricInterpretation=kind)
    assert np.array_equal(read_image(path, 40), read_image(plain, 40))


def test_what_is_no_padding_stays(tmp_path):
    "A limit without a value says nothing, and neither does an empty value."
    plain = read_image(store(tmp_path / "y", gradient()), 32)
    for tags in ({"PixelPaddingRangeLimit": 3000}, {"PixelPaddingValue": None}, {"PixelPaddingValue": None, "PixelPaddingRangeLimit": 3000}):
        assert np.array_equal(read_image(store(tmp_path / "x", gradient(), **tags), 32), plain)


def table_of(bits=8, entries=4096, **changes):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [entries, 0, bits], np.linspace(0, 2**bits - 1, entries).astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    for name, value in changes.items():
        item[name].value = value
    return item


EMPTY = {
    "slope and intercept": {"RescaleSlope": None, "RescaleIntercept": None},
    "slope": {"RescaleSlope": None, "RescaleIntercept": -1024},
    "intercept": {"RescaleSlope": 2, "RescaleIntercept": None},
    "VOI function": {"WindowCenter": 2047.5, "WindowWidth": 4096, "VOILUTFunction": None},
    "window": {"WindowCenter": None, "WindowWidth": None},
    "width": {"WindowCenter": 100, "WindowWidth": None},
    "VOI sequence": {"VOILUTSequence": []},
    "VOI item": {"VOILUTSequence": [pydicom.Dataset()]},
    "VOI descriptor": {"VOILUTSequence": [table_of(LUTDescriptor=None)]},
    "VOI data": {"VOILUTSequence": [table_of(LUTData=b"")]},
    "modality sequence": {"ModalityLUTSequence": []},
    "modality item": {"ModalityLUTSequence": [pydicom.Dataset()]},
    "frames": {"NumberOfFrames": None},
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_element_says_nothing(tmp_path, name):
    plain, odd = (read_image(store(tmp_path / "x", gradient(), **tags), 32).astype(int) for tags in ({}, EMPTY[name]))
    assert np.abs(plain - odd).max() <= 1


@pytest.mark.parametrize(("name", "value"), [("RescaleSlope", "1,0"), ("RescaleIntercept", "-1024,5"), ("RescaleSlope", "1\\2"), ("RescaleSlope", "nan"), ("RescaleSlope", "Meyer"),
                                             ("WindowCenter", "2047,5"), ("WindowWidth", "inf"), ("NumberOfFrames", "1,0")])
def test_an_element_that_is_no_number_is_named_and_not_quoted(tmp_path, name, value):
    tags = {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 2047, "WindowWidth": 4096}
    path = store(tmp_path / "x", gradient(), **tags)
    tag, dataset = pydicom.tag.Tag(name), pydicom.dcmread(path)
    raw = (value + " " * (len(value) % 2)).encode()
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, pydicom.datadict.dictionary_VR(tag), len(raw), raw, 0, False, True)
    dataset.save_as(path)
    with pytest.raises(ImageError, match=f"x: its element {name} is not (one|a) number, written with a point") as error:
        read_image(path, 32)
    assert value not in str(error.value)


@pytest.mark.parametrize(("kind", "shape", "reason"), [("MONOCHROME1", "INVERSE", ""), ("MONOCHROME2", "IDENTITY", ""), ("MONOCHROME1", "IDENTITY", "low numbers are white"), ("MONOCHROME2", "INVERSE", "low numbers are white")])
def test_elements_that_contradict_each_other_are_not_guessed_at(tmp_path, kind, shape, reason):
    path = store(tmp_path / "x", gradient(), PhotometricInterpretation=kind, PresentationLUTShape=shape)
    if reason:
        with pytest.raises(ImageError, match=reason):
            read_image(path, 32)
    else:
        assert (read_image(path, 32).astype(int)[0, 0] > 128) == (kind == "MONOCHROME1")


@pytest.mark.parametrize("name", ["PixelSpacing", "LossyImageCompressionRatio"])
def test_an_element_that_no_picture_needs_may_be_anything(tmp_path, name):
    path = store(tmp_path / "x", gradient())
    tag, dataset = pydicom.tag.Tag(name), pydicom.dcmread(path)
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, "DS", 4, b"0,14", 0, False, True)
    dataset.save_as(path)
    assert read_image(path, 32).any()


@pytest.mark.parametrize("kind, used", [("1.2.840.10008.5.1.4.1.1.12.1", False), ("1.2.840.10008.5.1.4.1.1.12.2", False), ("1.2.840.10008.5.1.4.1.1.1", True)])
def test_angiographys_table_is_of_doses(tmp_path, kind, used):
    "DICOM's XA and XRF: their Modality LUT is not for display."
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 16])
    table.add_new("LUTData", "OW", (np.linspace(0, 1, 4096) ** 4 * 60000).astype(np.uint16).tobytes())
    table.ModalityLUTType = "US"
    plain, other = (read_image(store(tmp_path / "x", gradient(), SOPClassUID=kind, **tags), 32).astype(int) for tags in ({}, {"ModalityLUTSequence": [table]}))
    assert (np.abs(plain - other).max() > 50) == used


def test_a_table_of_bytes_is_looked_up_for_more_than_bytes(tmp_path):
    plain, looked_up = (read_image(store(tmp_path / "x", gradient(), **tags), 32).astype(int) for tags in ({}, {"VOILUTSequence": [table_of()]}))
    assert np.abs(plain - looked_up).max() <= 1


def in_colours(path, values, bits, photometric="RGB", **tags):
    "Gray values in three channels, of 8 or 16 bits."
    store(path, np.zeros(values.shape[:2], int))
    dataset = pydicom.dcmread(path)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3 if values.ndim == 3 else 1), photometric
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = values.itemsize * 8, bits, bits - 1
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
        dataset[name].VR = "OW" if name.endswith("Data") else "US"
    dataset.save_as(path)
    return read_image(path, 32).astype(int)


@pytest.mark.parametrize(("bits", "says", "kind"), [(12, 12, "<u2"), (12, 16, "<u2"), (16, 16, "<u2"), (10, 10, "<u2"), (8, 8, "<u2"), (8, 8, "u1"), (6, 6, "u1")])
def test_colours_of_fewer_bits_than_there_is_room_for(tmp_path, bits, says, kind):
    values = gradient(0, 2**bits - 1)[..., None].repeat(3, axis=2).astype(kind)
    expected = in_colours(tmp_path / "x", gradient(0, 255)[..., None].repeat(3, axis=2).astype("u1"), 8)
    assert np.abs(in_colours(tmp_path / "y", values, says) - expected).max() <= 255 / 2**bits + 1


@pytest.mark.parametrize(("entries", "bits", "kind"), [(256, 8, "u1"), (256, 8, "<u2"), (256, 16, "<u2"), (256, 12, "<u2"), (4096, 8, "u1"), (4096, 16, "<u2")])
def test_palettes(tmp_path, entries, bits, kind):
    colours = np.linspace(0, 2**bits - 1, entries).astype(kind).tobytes()
    tags = {f"{c}PaletteColorLookupTableDescriptor": [entries, 0, bits] for c in ("Red", "Green", "Blue")}
    tags |= {f"{c}PaletteColorLookupTableData": colours for c in ("Red", "Green", "Blue")}
    expected = in_colours(tmp_path / "x", gradient(0, 255)[..., None].repeat(3, axis=2).astype("u1"), 8)
    places = gradient(0, entries - 1).astype("u1" if entries <= 256 else "<u2")
    found = in_colours(tmp_path / "y", places, 8 if entries <= 256 else 12, "PALETTE COLOR", **tags)
    assert np.abs(found - expected).max() <= 2


@FEW
@given(st.integers(200, 3800), st.integers(10, 2000), st.sampled_from([(1, 0), (2, -1024), (0.5, 3)]))
def test_a_window_is_a_ramp(tmp_path_factory, centre, width, line):
    "DICOM PS3.3, C.11.2.1.2, on rescaled values."
    values, (slope, intercept) = gradient(), line
    path = tmp_path_factory.mktemp("window") / "x"
    shown = np.asarray(read_dicom(store(path, values, WindowCenter=centre, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=intercept)))
    x = values * slope + intercept
    ramp = ((x - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    if np.ptp(shown) == 0:
        assert np.ptp(ramp) == 0
    else:
        scaled = (shown - shown.min()) / np.ptp(shown)
        assert np.allclose(scaled, (ramp - ramp.min()) / np.ptp(ramp), atol=2e-3)


@pytest.mark.parametrize("width", [0, -400])
def test_a_window_without_width_says_nothing(tmp_path, width):
    whole = read_image(store(tmp_path / "x", gradient()), 32)
    assert (read_image(store(tmp_path / "y", gradient(), WindowCenter=5, WindowWidth=width), 32) == whole).all()


def test_a_window_narrower_than_1(tmp_path):
    "The same picture in a unit 4,096 times as large."
    small = read_image(store(tmp_path / "x", gradient(), WindowCenter=0.25, WindowWidth=0.5, RescaleSlope=2**-12, RescaleIntercept=0), 32)
    large = read_image(store(tmp_path / "y", gradient(), WindowCenter=1024, WindowWidth=2048, VOILUTFunction="LINEAR_EXACT"), 32)
    assert np.ptp(small) > 200 and np.abs(small.astype(int) - large).max() <= 1


def test_floating_point_pixels_are_said(tmp_path):
    dataset = pydicom.dcmread(store(tmp_path / "x", gradient()))
    del dataset.PixelData
    dataset.FloatPixelData = gradient().astype("<f4").tobytes()
    dataset.save_as(tmp_path / "y")
    with pytest.raises(DicomError, match="floating-point"):
        read_dicom(tmp_path / "y")


def test_signed_values(tmp_path):
    square = read_image(store(tmp_path / "x", gradient(-1024, 3071)), 32).astype(int)
    assert square.min() < 10 and square.max() > 245 and (np.diff(square[:, 16]) >= 0).all()


@FEW
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_a_damaged_file_gives_an_image_or_an_image_error(tmp_path_factory, seed, hits):
    path = store(tmp_path_factory.mktemp("damaged") / "x.dcm", gradient())
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in rng.integers(132, 700, hits):
        content[place] = rng.integers(256)
    path.write_bytes(content[: rng.integers(len(content) // 2, len(content) + 1)])
    try:
        assert read_image(path, 32).shape == (32, 32)
    except ImageError as error:
        assert str(path) in str(error)


def test_a_table_of_dicom_files(tmp_path):
    "Wherever an image does: table, store."
    for number in range(30):
        store(tmp_path / f"{number}.dcm", np.roll(gradient(), number * 50), PhotometricInterpretation="MONOCHROME1")
    rows = "".join(f"{n}.dcm,p{n},Effusion {n}.\n" for n in range(30))
    (tmp_path / "mine.csv").write_text("image,patient_id,report\n" + rows)
    studies, _ = load_table(tmp_path / "mine.csv")
    built = ImageStore.build(studies.image.tolist(), tmp_path / "store", 32)
    assert len(built) == 30 and built.failed.empty


def test_a_missing_decoder_names_what_to_install(monkeypatch):
    from pydicom.pixels import decoders
    monkeypatch.setattr(decoders.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(DicomError, match=r"JPEG Lossless.*pip install 'cxrvlm\[dicom\]'"):
        read_dicom(FILES["SC_rgb_jpeg_gdcm.dcm"])
