"""Find a text or a picture in everything that a run leaves: any file, any notebook output, any event of TensorBoard."""
import base64
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.signal import fftconvolve

RAW = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff")  # how PNG and JPEG begin
CODED = re.compile(rb"(?:iVBORw0KGgo|/9j/)[A-Za-z0-9+/=\\n\s]+")  # the same in base64
LIMIT = 0.8  # correlation: a picture of something else has less


def pictures(content: bytes) -> list[np.ndarray]:
    "All PNGs and JPEGs in some bytes, as they are or in base64; gray."
    coded = [base64.b64decode(re.sub(rb"\\n|\s", b"", match[0]) + b"==") for match in CODED.finditer(content)]
    raw = [content[match.start() :] for match in RAW.finditer(content)]
    found = []
    for part in coded + raw:
        try:
            found.append(np.asarray(Image.open(io.BytesIO(part)).convert("L"), dtype=float))
        except OSError:
            pass  # bytes that begin like a picture
    return found


def likeness(image: np.ndarray, pattern: np.ndarray) -> float:
    "The highest correlation of the pattern with any place of the image, over sizes of the pattern from 16 to 400 px."
    best = 0.0
    for shrink in (1, 3):
        small = np.asarray(Image.fromarray(image).reduce(shrink)) if min(image.shape) > 60 * shrink else image
        for side in np.unique(np.geomspace(16, min(*small.shape, 160), 18).astype(int)) if min(small.shape) >= 16 else []:
            template = np.asarray(Image.fromarray(pattern.astype(float)).resize((side, side)))
            template = (template - template.mean()) / template.std()
            ones, n = np.ones((side, side)), side**2
            mean = fftconvolve(small, ones, "valid") / n
            spread = np.sqrt(np.maximum(fftconvolve(small**2, ones, "valid") / n - mean**2, 1))
            best = max(best, (fftconvolve(small, template[::-1, ::-1], "valid") / n / spread).max())
    return best


def files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and ".git" not in path.parts]


def files_with_text(folder: Path, text: str) -> list[Path]:
    "Files in which one of the words stands."
    words = [word.encode() for word in text.split()]
    return [path for path in files_below(folder) if any(word in path.read_bytes().lower() for word in words)]


def files_with_picture(folder: Path, pattern: np.ndarray) -> list[Path]:
    "Files in which a picture holds the pattern."
    return [path for path in files_below(folder) if any(likeness(image, pattern) > LIMIT for image in pictures(path.read_bytes()))]
