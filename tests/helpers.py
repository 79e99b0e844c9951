"""Small drawn images and tiny networks for the tests."""

import base64
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import image_files
import imgproc
import model

REPOSITORY = Path(__file__).resolve().parent.parent
# PyTorch's compiler needs g++, and writes vector code for bf16 even where ATEN_CPU_CAPABILITY=default forbids it
COMPILES = bool(shutil.which("g++")) and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
TINY = {"channels": 8, "reduction": 4, "num_rg": 2, "num_rcab": 2}


def drawn_image(height: int, width: int, seed: int = 0) -> imgproc.RGB:
    """A smooth image with edges, another one for each seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None]
    phase, fx, fy = random.uniform(0, 6, 3), random.uniform(0.02, 0.4, 3), random.uniform(0.02, 0.4, 3)
    waves = np.sin(fx * x + fy * y + phase) * 60 + 128
    edges = 50 * ((x * random.uniform(0.5, 2) + y) // random.integers(7, 19) % 2)
    return np.clip(waves + edges, 0, 255).astype(np.uint8)


def noise_image(height: int, width: int, seed: int = 0) -> imgproc.RGB:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_set(folder: Path, sizes, seed: int = 0) -> Path:
    """A set of drawn images of these (height, width), named a, b, c …"""
    for index, (height, width) in enumerate(sizes):
        image_files.write_image(folder / "GT" / f"{chr(97 + index)}.png", drawn_image(height, width, seed + index))
    return folder


def tiny(upscale_factor: int = 2, attention: str = "channel", **changes) -> model.RCAN:
    """A small network with random weights that matter: attention and mean differ from neutral."""
    torch.manual_seed(upscale_factor)
    return model.RCAN(upscale_factor, **{**TINY, **changes}, attention=attention, mean=(0.4, 0.5, 0.6)).eval()


class Enlarge(nn.Module):
    """Nearest neighbour, plus a constant."""

    def __init__(self, offset=0.0, factor=2):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))
        self.factor = factor

    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=self.factor) + self.offset


class Page(HTMLParser):
    """What a report.html shows: its text, and by the name of each figure {label: pixels}; every address in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text, self.figures, self.addresses, self._inside = "", {}, [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href", "srcset", "action", "data") if name in found]
        if tag == "img":
            data = base64.b64decode(found["src"].partition("base64,")[2])
            name, figure = list(self.figures.items())[-1]
            figure[found["alt"]] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert figure[found["alt"]].shape[:2] == (int(found["height"]), int(found["width"])), name

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "h2":
            self.figures[data] = {}
        if self._inside not in ("style", "script"):
            self.text += data
