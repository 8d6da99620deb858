"""How long the table of MIMIC-CXR-JPG takes at full size: python tests/bench_mimic.py

227,835 studies with reports of the usual length, made up; no images. It writes about 150 MB to a temporary folder.
"""
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STUDIES = 227_835

if sys.argv[1:2] == ["load"]:
    from cxrvlm.mimic import load_mimic

    start = time.perf_counter()
    studies, exclusions = load_mimic(Path(sys.argv[2]))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(studies):,} pairs, {len(exclusions):,} excluded, {time.perf_counter() - start:.0f} s, {used:.1f} GB")
else:
    from miniature import write_mimic

    for packed in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            write_mimic(Path(folder), STUDIES, packed, images=False)
            print("packed" if packed else "tree", flush=True)
            subprocess.run([sys.executable, __file__, "load", folder], check=True)
