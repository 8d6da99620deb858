"""Hostile input: one row per case, and what becomes of it. `python tests/test_hostile.py` prints the table."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature import write_mimic
from PIL import Image

from cxrvlm.images import ImageStore
from cxrvlm.mimic import load_mimic
from cxrvlm.studies import load_table

GOOD = 30
HEADER = "image,study_id,patient_id,report,Cardiomegaly\n"


def picture() -> Image.Image:
    "A gray picture without symmetry."
    return Image.fromarray(np.add.outer(np.linspace(0, 155, 80), np.linspace(0, 100, 60)).astype(np.uint8))


def good_rows(folder: Path) -> str:
    "Thirty rows that are as they should be, and their images."
    for number in range(GOOD):
        picture().rotate(number).save(folder / f"{number}.png")
    return "".join(f"{n}.png,s{n},p{n},Small effusion number {n}.,{n % 2}\n" for n in range(GOOD))


def a_row(image: str = "odd.png", study: str = "odd", patient: str = "odd", report: str = "Clear.", label: str = "1") -> str:
    return f"{image},{study},{patient},{report},{label}\n"


# Images: what is written to the file of the odd row


def truncated_jpeg(path: Path):
    picture().save(path, "jpeg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path: Path):
    Image.new("1", (20_000, 20_000)).save(path)


def turned(path: Path):
    exif = Image.Exif()
    exif[274] = 6
    picture().save(path, "png", exif=exif)


def loop(path: Path):
    path.symlink_to(path.name)


def unreadable(path: Path):
    picture().save(path)
    path.chmod(0)


def deep(path: Path):
    Image.fromarray(np.asarray(picture()).astype(np.uint16) * 100).save(path)


def white_is_clear(path: Path):
    values = np.asarray(picture()).copy()
    values[60:] = 255
    Image.fromarray(values).save(path, transparency=255)


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated JPEG": (truncated_jpeg, r"excluded: it cannot be decoded .*[Tt]runcated"),
    "zero bytes": (lambda path: path.touch(), "excluded: the file is empty"),
    "text named .png": (lambda path: path.write_text("by post"), "excluded: neither Pillow nor pydicom"),
    "1 x 1": (lambda path: Image.new("L", (1, 1)).save(path), "excluded: it is 1 x 1 px"),
    "16 bit": (deep, "read"),
    "CMYK": (lambda path: picture().convert("CMYK").save(path, "jpeg"), "read"),
    "palette": (lambda path: picture().convert("P").save(path), "read"),
    "RGBA": (lambda path: picture().convert("RGBA").save(path), "read"),
    "EXIF-rotated": (turned, "read"),
    "decompression bomb": (bomb, "excluded: it has more than .* pixels"),
    "symlink loop": (loop, "excluded: it is a link that leads back to itself"),
    "a folder": (lambda path: path.mkdir(), "excluded: this is a folder, not an image"),
    "no permission to read": (unreadable, "excluded: there is no permission to read it"),
    "no file": (lambda path: None, "excluded: there is no such file"),
    "all black": (lambda path: Image.new("L", (80, 60)).save(path), "excluded: its pixels are all equal"),
    "all transparent": (lambda path: Image.new("RGBA", (80, 60)).save(path), "excluded: its pixels are all equal"),
    "gray, and its white is transparent": (white_is_clear, "excluded: its gray value 255 is transparent"),
    "two frames": (lambda path: picture().save(path, save_all=True, append_images=[picture().rotate(90)]), "excluded: it has 2 pages, frames or layers"),
    "half a DICOM": (lambda path: path.write_bytes(bytes(128) + b"DICM" + bytes(50)), "excluded: "),
}

# Rows: the odd row of a table
ROWS: dict[str, tuple[str, str]] = {
    "path outside the root": (a_row("../odd.png"), r"error: .*row 32: the image '\.\./odd\.png' lies outside"),
    "no image": (a_row(""), "excluded: no image"),
    "a row again": (a_row("0.png", "s0", "p0", "Small effusion number 0.", "0"), "excluded: the same row again"),
    "two reports of one image": (a_row("0.png", "s0", "p0", "Clear."), r"error: .*the image '0\.png' of the study 's0' stands twice \(row 2, row 32\)"),
    "a cell too many": (a_row(report="Clear, no effusion."), "error: .*row 32: 6 cells, and the header has 5"),
    "a cell too few": ("odd.png,odd,odd\n", "error: .*row 32: 3 cells, and the header has 5"),
    "an open quote": (a_row(report='"Clear.'), "error: .*cannot be read as a table"),
    "NUL bytes": (a_row(report="Small\0effusion."), "read: .*Small effusion"),
    "100,000 words": (a_row(report="effusion " * 100_000), "read"),
    "one letter": (a_row(report="A"), "read"),
    "one dot": (a_row(report="."), "excluded: no impression"),
    "marks of de-identification": (a_row(report="XXXX ___"), "excluded: no impression"),
    "empty report": (a_row(report=""), "excluded: no impression"),
    "only findings": (a_row(report='"FINDINGS: Clear."'), "excluded: no impression"),
    "a quoted newline": (a_row(report='"FINDINGS: Clear.\nIMPRESSION: Normal."'), "read: .*Normal"),
    "label 2": (a_row(label="2"), r"error: .*label Cardiomegaly: '2' in row 32"),
    "label x": (a_row(label="x"), r"error: .*label Cardiomegaly: 'x' in row 32"),
    "an id that has lost digits": (a_row(patient="1.2e+07"), r"error: .*patient_id: 1\.2e\+07 in row 32 has lost digits"),
    "no patient": (a_row(patient=""), "read: .*1 of 31 rows have no patient_id"),
    "a patient who is a word for nobody": (a_row(patient="nan"), r"error: .*patient_id: 1 cells hold 'nan' \(row 32\): leave a cell empty"),
    "a study that is a word for nothing": (a_row(study="N/A"), r"error: .*study_id: 1 cells hold 'N/A' \(row 32\)"),
    "an id with a sign that nobody sees": (a_row(patient="p0\u200b"), "read: .*patients p0 p1 p2"),
    "an id that a spreadsheet wrapped": (a_row(patient='"=""p0"""'), "read: .*patients p0 p1 p2"),
    "an id with the apostrophe of a spreadsheet's text": (a_row(patient="'p0"), "read: .*patients p0 p1 p2"),
    "a file named on a Mac": (a_row("Mu\u0308ller.png"), "read"),
    "a file named on a Mac, and its table elsewhere": (a_row("M\u00fcller.png"), "read"),
    "a second addendum": (a_row(report="FINDINGS: Clear. IMPRESSION: Normal. Addendum 2: There is an effusion."), r"read: .* Normal\.$"),
    "an addendum with its time": (a_row(report='"IMPRESSION: Normal.\nAddendum (2 Jan 2020 10:15): There is an effusion."'), r"read: .* Normal\.$"),
    "notes of somebody else": (a_row(report='"Findings: Clear.\nImpression: Normal.\nRadiographer notes: Patient rotated."'), r"read: .* Normal\.$"),
    "HTML escaped twice": (a_row(report="IMPRESSION: Scar &amp;lt; 5 mm &amp;amp; more."), "read: .* Scar < 5 mm & more"),
    "tags of a clinical document": (a_row(report="<text><title>IMPRESSION</title><paragraph>Normal.</paragraph></text>"), r"read: .* Normal\.$"),
    "a path from Windows": (a_row("im\\odd.png"), r"excluded: there is no such file; check the path, and write / instead of \\ in it"),
    "a dash for nobody": (a_row(patient="-"), r"error: .*patient_id: 1 cells hold '-' \(row 32\)"),
    "unknown for nobody": (a_row(patient="Unknown"), r"error: .*patient_id: 1 cells hold 'Unknown' \(row 32\)"),
    "a report for an id": (a_row(patient="Zyzzyva with small effusion left"), r"error: .*patient_id: 1 cells hold sentences \(row 32\)(?!.*Zyzzyva)"),
    "a report for an image": (a_row("Zyzzyva with small effusion left."), r"error: .*row 32: the image is no path but a picture, a text(?!.*Zyzzyva)"),
    "a path with blanks": (a_row("./odd with some more words here.png"), "excluded: there is no such file"),
    "RTF": (a_row(report=r"{\rtf1\ansi\deff0 Clear.\par}"), r"error: .*report: row 32: this is RTF"),
    "line breaks of HL7": (a_row(report=r"FINDINGS: Clear.\.br\IMPRESSION:\.br\Normal\.br\heart \T\ lungs."), "read: .*Normal heart & lung"),
    "a report that is a word for nothing": (a_row(report="None"), "excluded: no impression"),
    "a report that says n/a.": (a_row(report="n/a."), "excluded: no impression"),
    "a study of two patients": (a_row(study="s0"), r"error: .*study 's0' \(row 2, row 32\) belongs to 2 patients"),
    "an address for an image": (a_row("https://example.org/1.png"), "error: .*row 32: the image is no path"),
    "a picture for an image": (a_row('"data:image/png;base64,' + "A" * 2000 + '"'), "error: .*row 32: the image is no path but a picture.{0,120}$"),
    "a blank row before a fault": ("\n" + a_row("../odd.png"), "error: .*row 33: the image"),
    "two faults": (a_row("../odd.png") + a_row(label="2"), "error: .*2 faults: .*'2' in row 33.*row 32: the image"),
    "headings in one line": (a_row(report="FINDINGS: Clear. IMPRESSION: Normal."), "read: .*30 without headings.*Normal"),
    "a heading of another language": (a_row(report="LAUSUNTO: Ei nestettä."), r"read: .*1 look as if they held a heading that was not found \(row 32\)"),
    "HTML": (a_row(report="<b>Findings</b><br>Clear.<br><b>Impression</b><br>Normal &amp; clear."), "read: .*Normal & clear"),
}

# Files: the whole table's bytes, made from the good rows
Make = Callable[[str], bytes]
FILES: dict[str, tuple[Make, str]] = {
    "empty": (lambda rows: b"", "error: .*is empty"),
    "blank": (lambda rows: b" \n\n", "error: .*is empty"),
    "only a header": (lambda rows: HEADER.encode(), "error: .*no rows"),
    "BOM": (lambda rows: (HEADER + rows).encode("utf-8-sig"), "read"),
    "semicolons": (lambda rows: (HEADER + rows).replace(",", ";").encode(), "read"),
    "tabs": (lambda rows: (HEADER + rows).replace(",", "\t").encode(), "read"),
    "CRLF": (lambda rows: (HEADER + rows).replace("\n", "\r\n").encode(), "read"),
    "Latin-1": (lambda rows: (HEADER + rows + a_row(report="Früher.")).encode("latin-1"), "error: .*line 32: byte 0xfc is no utf-8"),
    "UTF-16": (lambda rows: (HEADER + rows).encode("utf-16"), "error: .*line 1: byte 0xff is no utf-8: .*may be utf-16"),
    "a missing column": (lambda rows: (HEADER + rows).replace("report", "verdict").encode(), "error: .*lacks a column report, findings or impression"),
    "a column nearly named": (lambda rows: (HEADER + rows).replace("patient_id", "patientid").encode(), "error: .*'patientid' and no 'patient_id'"),
    "another name for a column": (lambda rows: (HEADER + rows).replace("image", "path").encode(), "error: .*'path' and no 'image'"),
    "two columns of one name": (lambda rows: (HEADER + rows).replace("study_id", "Patient ID").encode(), "error: .*two columns named 'patient_id'"),
    "ids as floats": (lambda rows: re.sub(r",p(\d+),", r",\1.0,", HEADER + rows).encode(), "read: .*ids are written as numbers.*patients 0 1 2"),
    "leading zeros": (lambda rows: re.sub(r",p(\d+),", r",00\1,", HEADER + rows).encode(), "read: .*patients 000 001 002"),
    "hexadecimal ids": (lambda rows: re.sub(r",p(\d+),", lambda m: f",{'4e074085' if m[1] == '0' else 'a1b2c3' + m[1].zfill(2)},", HEADER + rows).encode(), "read: .*patients 4e074085"),
    "ids that end in zeros": (lambda rows: re.sub(r",p(\d+),", lambda m: f",{123456789012345 + int(m[1])}000,", HEADER + rows).encode(), "error: .*lost digits"),
    "ids that became dates": (lambda rows: re.sub(r",p(\d+),", lambda m: ",2-Jan," if m[1] == "1" else f",{int(m[1]) % 6 + 1}-{13 + int(m[1])},", HEADER + rows).encode(), "error: .*patient_id: 2-Jan in row 3 may be an id that a spreadsheet made a date"),
    "ids that are no whole numbers": (lambda rows: re.sub(r",p(\d+),", lambda m: f",{int(m[1]) / 10 + 3},", HEADER + rows).encode(), "error: .*patient_id: 3.1 in row 3.* is a number with decimals"),
    "ids with a point": (lambda rows: re.sub(r",p(\d+),", r",3.\1,", HEADER + rows).encode(), "read: .*patients 3.0 3.1 3.2"),
    "ids with and without zeros": (lambda rows: (HEADER + rows).replace(",p3,", ",0050772,").replace(",p4,", ",50772,").encode(), "read: .*ids that differ only in zeros.*: 0050772, 50772"),
    "a blank that does not break, before the colon": (lambda rows: (HEADER + rows + a_row(report="FINDINGS\u00a0: Clear. IMPRESSION\u2009: Normal.")).encode(), r"read: .* Normal\.$"),
    "headings that nobody knows": (lambda rows: (HEADER + rows + a_row(report="INDICATION: Cough. OUTCOME: normal.")).encode(), "excluded: no impression"),
    "answers for ids": (lambda rows: re.sub(r",p(\d+),", lambda m: f",{int(m[1]) % 2 == 0},", HEADER + rows).encode(), "error: .*patient_id: True in row 2.* is an answer, and no id"),
    "an id that lost a letter": (lambda rows: (HEADER + rows).replace(",p3,", ",M\ufffdller,").encode(), "error: .*patient_id: M\ufffdller in row 5 has lost a letter"),
    "ids with and without commas": (lambda rows: re.sub(r",p(\d+),", lambda m: ',"1,234",' if m[1] == "1" else ",1234," if m[1] == "2" else f",{m[1]},", HEADER + rows).encode(), "error: .*patient_id: 1,234 in row 3 is there without its commas too"),
    "JSON": (lambda rows: b'[{"image": "a.png", "report": "Small effusion."}]', "error: .*is JSON, and no table.{0,60}$"),
    "an Excel workbook": (lambda rows: b"PK\x03\x04" + bytes(50), "error: .*is an Excel workbook or another zip"),
    "no header": (lambda rows: rows.encode(), "error: .*lacks the column image; it has 5 cells in its first row, none of them a name we know$"),
    "visits of a patient": (lambda rows: re.sub(r",s\d+,", ",1,", HEADER + rows).encode(), "error: .*study '1' .*belongs to 30 patients"),
    "an image twice, no study_id": (lambda rows: re.sub(r"(?m)^([^,]+),[^,]+,", r"\1,", HEADER + rows + a_row("0.png", patient="p0", report="Clear.")).encode(), r"error: .*the image '0\.png' stands twice \(row 2, row 32\)"),
    "Windows-1252": (lambda rows: (HEADER + rows + a_row(report="It\u2019s clear.")).encode("cp1252"), "error: .*byte 0x92 is no utf-8: .*may be cp1252"),
    "a PNG": (lambda rows: b"\x89PNG\r\n\x1a\n" + bytes(50), "error: .*byte 0x89 is no utf-8: this is no text"),
}


def outcome(load: Callable[[], tuple[pd.DataFrame, pd.DataFrame]], store: Path) -> str:
    "What becomes of a table: an error, an exclusion, or studies that can be trained on."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            studies, exclusions = load()
            images = ImageStore.build(studies.image.tolist(), store, 32)
        except ValueError as error:
            return f"error: {' '.join(str(error).split())}"
    reasons = [*exclusions.reason, *images.failed.reason]
    if reasons:
        assert len(studies) - len(images.failed) >= GOOD
        return f"excluded: {'; '.join(reasons)}"
    text = "; ".join(str(warning.message) for warning in told if warning.category is UserWarning)
    return f"read: {text} patients {' '.join(studies.patient_id[:3])} ... {studies.impression.iloc[-1][:20]}"


def try_image(folder: Path, name: str) -> str:
    (folder / "mine.csv").write_text(HEADER + good_rows(folder) + a_row())
    IMAGES[name][0](folder / "odd.png")
    return outcome(lambda: load_table(folder / "mine.csv"), folder / "store")


def try_row(folder: Path, name: str) -> str:
    for file in ("odd.png", "Mu\u0308ller.png"):
        picture().save(folder / file)
    (folder / "mine.csv").write_text(HEADER + good_rows(folder) + ROWS[name][0])
    return outcome(lambda: load_table(folder / "mine.csv"), folder / "store")


def try_file(folder: Path, name: str) -> str:
    picture().save(folder / "odd.png")
    (folder / "mine.csv").write_bytes(FILES[name][0](good_rows(folder)))
    return outcome(lambda: load_table(folder / "mine.csv"), folder / "store")


# MIMIC-CXR: what is done to a whole folder of it


def change_csv(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def spoil(root: Path):
        path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
        change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
    return spoil


def cut(name: str, size: int) -> Callable[[Path], None]:
    def spoil(root: Path):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:size])
    return spoil


def add_entries(root: Path):
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "a") as archive:
        for name in ("/etc/passwd", "../../p10/p10000000/s50000000.txt", "C:\\x.txt"):
            archive.writestr(name, "IMPRESSION: Somebody else's.")


def damage_zip(root: Path):
    path = root / "mimic-cxr-reports.zip"
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def set_cell(column: str, value: str):
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[3, column] = value
        return table
    return change


MIMIC: dict[str, tuple[Callable[[Path], object], str]] = {
    "as it should be": (lambda root: None, "read"),
    "an absolute path in the zip": (add_entries, r"read: .*3 entries are no reports and are not read, e\.g\. '/etc/passwd'"),
    "a zip cut short": (cut("mimic-cxr-reports.zip", 3000), "error: .*mimic-cxr-reports.zip cannot be opened"),
    "a zip with damaged bytes": (damage_zip, r"error: .*mimic-cxr-reports.zip, files/p1.*s5.*\.txt: it cannot be unpacked"),
    "no reports": (lambda root: (root / "mimic-cxr-reports.zip").unlink(), "error: .*has neither mimic-cxr-reports.zip nor its tree"),
    "a table cut short": (cut("mimic-cxr-2.0.0-metadata.csv.gz", 300), "error: .*metadata.csv.gz cannot be read"),
    "a table missing": (lambda root: (root / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink(), "error: .*chexpert.csv.gz is not there"),
    "a column missing": (change_csv("metadata", lambda t: t.drop(columns="ViewPosition")), "error: .*metadata.csv.gz lacks ViewPosition"),
    "a label of 2": (change_csv("chexpert", set_cell("Edema", "2.0")), r"error: .*chexpert, row 5, Edema: '2\.0'"),
    "ids as floats": (change_csv("metadata", set_cell("subject_id", "10000000.0")), r"error: .*(subject_id '10000000\.0'|values of subject_id)"),
    "an image of two studies": (change_csv("metadata", set_cell("dicom_id", "50000000-ap")), "error: .*dicom_id 50000000-ap has 2 values of study_id"),
    "rows twice": (change_csv("metadata", lambda t: pd.concat([t, t])), "read"),
    "a study's labels twice": (change_csv("chexpert", lambda t: pd.concat([t, t])), "error: .*chexpert: study 50000000 stands twice"),
    "no frontal view": (change_csv("metadata", set_cell("ViewPosition", "LL")), r"excluded: no frontal image \(AP or PA\)"),
}


def try_mimic(folder: Path, name: str) -> str:
    shutil.copytree(MINIATURE, folder / "mimic")
    MIMIC[name][0](folder / "mimic")
    return outcome(lambda: load_mimic(folder / "mimic"), folder / "store")


MINIATURE = Path(tempfile.mkdtemp()) / "mimic"
KINDS = [(try_image, IMAGES), (try_row, ROWS), (try_file, FILES), (try_mimic, MIMIC)]
CASES = [pytest.param(attempt, name, cases[name][1], id=f"{attempt.__name__[4:]}: {name}") for attempt, cases in KINDS for name in cases]


@pytest.fixture(scope="module", autouse=True)
def miniature():
    write_mimic(MINIATURE, 36)
    yield
    shutil.rmtree(MINIATURE.parent, ignore_errors=True)


@pytest.mark.parametrize(("attempt", "name", "expected"), CASES)
def test_each_case_is_an_error_or_counted(attempt, name, expected, tmp_path):
    if name == "no permission to read" and os.geteuid() == 0:  # root may read everything: ask somebody else
        found = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", sys.executable, __file__, name], capture_output=True, text=True).stdout
    else:
        found = attempt(tmp_path, name)
    assert re.match(expected, found), found


# The disk


NAMES = [f"phantom:{n}|normal" for n in range(40)]


@pytest.fixture
def disk(tmp_path):
    "A file system of 1 MB, where the user may mount one."
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(disk):
    (disk / "other").write_bytes(bytes(800_000))
    with pytest.raises(ValueError, match="0.0 GB are needed|make room"):
        ImageStore.build(NAMES, disk / "store", 128)
    (disk / "other").unlink()
    assert len(ImageStore.build(NAMES, disk / "store", 128)) == 40


def test_a_disk_that_fills_while_a_store_is_written(disk):
    "The space is taken before the first image, so somebody else who fills the disk meanwhile cannot kill the process."
    program = (
        "import sys; from pathlib import Path; from cxrvlm import images\n"
        "disk, read, seen = Path(sys.argv[1]), images.read_image, []\n"
        "def fill_disk(*a):\n"
        "    if not seen:\n"
        "        seen.append(1)\n"
        "        try: (disk / 'other').write_bytes(bytes(2**20))\n"
        "        except OSError: pass\n"
        "    return read(*a)\n"
        "images.read_image = fill_disk\n"
        "try: print(len(images.ImageStore.build([f'phantom:{n}|normal' for n in range(40)], disk / 'store', 128)))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, disk], capture_output=True, text=True)
    assert done.returncode == 0 and "make room and start again" in done.stdout, done
    (disk / "other").unlink()
    assert len(ImageStore.build(NAMES, disk / "store", 128)) == 40


if __name__ == "__main__":
    if sys.argv[1:] in ([name] for name in IMAGES):
        with tempfile.TemporaryDirectory() as folder:
            print(try_image(Path(folder), sys.argv[1]))
    else:
        write_mimic(MINIATURE, 36)
        print("| case | what it gives |\n|---|---|")
        for attempt, cases in KINDS:
            for name in cases:
                with tempfile.TemporaryDirectory() as folder:
                    found = attempt(Path(folder), name).replace(folder, "FOLDER")[:160]
                print(f"| {attempt.__name__[4:]}: {name} | {found} |")
