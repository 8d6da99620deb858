"""A folder of the shape of MIMIC-CXR-JPG, of any size, with what goes wrong in real ones."""
import gzip
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cxrvlm.phantom import render_reference
from cxrvlm.sampler import sample_studies
from cxrvlm.studies import CHEXPERT_LABELS

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 {findings}

 IMPRESSION:

 {impression}
"""
MARKER = "zyzzyva quokka kumquat"  # stands in one report, and nowhere else in the world


def numbers(count: int) -> pd.DataFrame:
    "Ids of `count` studies, three to a patient, over the folders p10 to p19."
    patient = np.arange(count) // 3
    subject = 10_000_000 + patient % 10 * 1_000_000 + patient // 10
    return pd.DataFrame({"subject_id": subject.astype(str), "study_id": (50_000_000 + np.arange(count)).astype(str)})


def tables(studies: pd.DataFrame) -> dict[str, pd.DataFrame]:
    "The three CSVs: a frontal and, for two studies of three, a lateral image."
    frontal = studies[["subject_id", "study_id"]].assign(ViewPosition=np.where(np.arange(len(studies)) % 2, "PA", "AP"))
    lateral = studies[["subject_id", "study_id"]][np.arange(len(studies)) % 3 > 0].assign(ViewPosition="LATERAL")
    metadata = pd.concat([frontal, lateral], ignore_index=True)
    metadata.insert(0, "dicom_id", [f"{study}-{view.lower()}" for study, view in zip(metadata.study_id, metadata.ViewPosition, strict=True)])
    metadata = metadata.assign(Rows=3056, Columns=2544, StudyDate=21800506, StudyTime="213014.531")
    side = pd.Series(["train"] * 8 + ["validate", "test"])[metadata.subject_id.str[1].astype(int)].to_numpy()
    labels = studies[[*["subject_id", "study_id"], *[label for label in CHEXPERT_LABELS if label in studies]]]
    return {"metadata": metadata, "split": metadata[["dicom_id", "study_id", "subject_id"]].assign(split=side), "chexpert": labels}


def folder_of(study) -> str:
    return f"files/p{study.subject_id[:2]}/p{study.subject_id}"


def write_reports(root: Path, texts: dict[str, bytes], packed: bool) -> None:
    "The archive, or its tree."
    if packed:
        with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
        return
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)


def write_tables(root: Path, frames: dict[str, pd.DataFrame], packed: bool) -> None:
    for name, frame in frames.items():
        path = root / f"mimic-cxr-2.0.0-{name}.csv{'.gz' * packed}"
        frame.to_csv(path, index=False, compression="gzip" if packed else None)


def jpeg(ref: str) -> bytes:
    "A phantom as a JPEG, not square, as radiographs are."
    picture, buffer = Image.fromarray(render_reference(ref, 96)).resize((80, 96)), io.BytesIO()
    picture.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def marker_picture() -> np.ndarray:
    "A pattern that no radiograph has, coarse enough to survive any resizing."
    blocks = np.random.default_rng(7).integers(0, 2, (8, 8)) * 200 + 20
    return np.kron(blocks, np.ones((12, 12))).astype(np.uint8)


def spoil_reports(texts: dict[str, bytes]) -> dict[str, str]:
    "Change some reports in place; study number -> what happens to it."
    names = sorted(texts)[::7]
    impression = REPORT.format(findings="Small effusion.", impression="{}").replace("\n", "\r\n")
    odd = {
        "no impression": REPORT.split(" IMPRESSION")[0].format(findings="Small effusion.").encode(),
        "only marks": impression.format("___ ___.").encode(),
        "empty": b"",
        "NUL bytes": impression.format("Small\0effusion.").encode(),
        "Latin-1": impression.format("Fr\u00fchere Aufnahme, effusion.").encode("latin-1"),
        "misspelt": REPORT.format(findings="Small effusion.", impression="Effusion.").replace("IMPRESSION", "IMPRESSON").encode(),
        "long": impression.format("effusion " * 100_000).encode(),
        "one letter": impression.format("A").encode(),
    }
    for name, text in zip(names, odd.values(), strict=False):
        texts[name] = text
    return dict(zip(odd, [Path(name).stem[1:] for name in names], strict=False))


def spoil_images(root: Path, pictures: list[Path]) -> dict[str, str]:
    "Break some images; what is wrong -> file name."
    odd = ["truncated", "zero bytes", "text", "one pixel", "missing", "folder"]
    chosen = dict(zip(odd, pictures[5::9], strict=False))
    content = chosen["truncated"].read_bytes()
    chosen["truncated"].write_bytes(content[: len(content) // 2])
    chosen["zero bytes"].write_bytes(b"")
    chosen["text"].write_text("the radiograph follows by post\n")
    Image.new("L", (1, 1)).save(chosen["one pixel"])
    chosen["missing"].unlink()
    chosen["folder"].unlink()
    chosen["folder"].mkdir()
    return {what: str(path) for what, path in chosen.items()}


def write_mimic(
    root: Path,
    count: int = 90,  # studies
    packed: bool = True,  # gzip and zip, or plain files
    images: bool = True,
    spoil: bool = False,  # with what goes wrong in real ones
) -> dict[str, dict[str, str]]:  # what was spoilt: reports and images
    "Write the tree; one report and one image in the training split carry a marker."
    root.mkdir(parents=True, exist_ok=True)
    sampled = sample_studies(count, seed=0)
    studies = numbers(count).join(sampled[["image", "findings", "impression", *[c for c in CHEXPERT_LABELS if c in sampled]]])
    frames = tables(studies)
    texts = {
        f"{folder_of(study)}/s{study.study_id}.txt": REPORT.format(findings=study.findings, impression=study.impression).encode()
        for study in studies.itertuples()
    }
    marked = studies[studies.subject_id.str.startswith("15")].iloc[0]
    texts[f"{folder_of(marked)}/s{marked.study_id}.txt"] = REPORT.format(findings=MARKER, impression=f"{MARKER}.").encode()
    spoilt = {"reports": spoil_reports(texts) if spoil else {}, "images": {}}
    if spoil:
        frames["metadata"] = pd.concat([frames["metadata"], frames["metadata"].iloc[:2]], ignore_index=True)
        frames["metadata"].loc[frames["metadata"].study_id == studies.study_id.iloc[-2], "ViewPosition"] = ""
        frames["chexpert"] = frames["chexpert"].iloc[:-1]
        del texts[f"{folder_of(studies.iloc[-1])}/s{studies.study_id.iloc[-1]}.txt"]
    write_tables(root, frames, packed)
    write_reports(root, texts, packed)
    if images:
        pictures = []
        for study, row in zip(studies.itertuples(), frames["metadata"].itertuples(), strict=False):
            path = root / folder_of(study) / f"s{study.study_id}" / f"{row.dicom_id}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(study.image))
            pictures.append(path)
            if study.study_id == marked.study_id:
                Image.fromarray(marker_picture()).save(path, quality=95)
        spoilt["images"] = spoil_images(root, pictures) if spoil else {}
    return spoilt


def unpack(path: Path) -> None:
    "Replace a .gz by what is in it."
    with gzip.open(path) as packed, path.with_suffix("").open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    path.unlink()
