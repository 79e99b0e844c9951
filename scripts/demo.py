"""Open a local page that enlarges an image of yours: drop it, choose the scale and the weights, compare, download:

    pip install -r requirements-demo.txt
    python scripts/demo.py --open True

The page is for this machine alone (127.0.0.1), and images do not leave it. Its temporary files are deleted when it ends, at Ctrl-C.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import importlib.util
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import tyro

import files
import html_report
import model
import utils
import weights
from config import released_weights
from image_files import IMAGE_SUFFIXES, check_writable, image_size, read_photo, write_photo
from imgproc import RGB
from inference import enlarge_photo
from runtime import run_script, start_runtime
from upscaling import upscale

MAX_UPLOAD = "200mb"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    port: int = 7860  # of the page
    open: bool = False  # open the page in a browser
    max_megapixels: float = 200  # refuse images whose result would be larger: 12 megapixels at x4 become 192

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be 1 to 65535")
        if not self.max_megapixels > 0:
            raise ValueError(f"max_megapixels={self.max_megapixels} must be greater than 0")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until a signal ends it."""
    config = tyro.cli(DemoConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: run pip install -r requirements-demo.txt")
    with tempfile.TemporaryDirectory(prefix="rcan_demo_") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # read when gradio is imported
        page = build_page(partial(enlarge_file, folder=Path(folder), device=start_runtime(alone=True).device, config=config))
        try:
            page.launch(
                server_name="127.0.0.1", server_port=config.port, share=False, inbrowser=config.open, max_file_size=MAX_UPLOAD,
                footer_links=[], prevent_thread_lock=True, quiet=True,
            )  # fmt: skip
        except OSError:
            raise ValueError(f"port={config.port}: another program uses it; choose another --port") from None
        try:
            print(f"http://127.0.0.1:{config.port} enlarges images; Ctrl-C ends it", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)


# Images


def weights_of(scale: int) -> list[str]:
    """The names of this repository's weights for a scale, the usual ones first."""
    usual = released_weights(scale)
    return sorted((path.name for path in usual.parent.glob(f"rcan_*_x{scale}.pth.tar")), key=lambda name: (name != usual.name, name))


@lru_cache(maxsize=1)
def load_network(path: Path, device: torch.device) -> model.RCAN:
    return weights.load(path).to(device)


def enlarge_file(
    path: Path, scale: int, name: str, tell: Callable[[float, str], object], *, folder: Path, device: torch.device, config: DemoConfig
) -> tuple[RGB, RGB, Path, list[str]]:
    """What `python inference.py` makes of a file: bicubic and the result to compare, the path of the result, and notes.

    Args:
        name: one of `weights_of(scale)`.
        tell: called with the share that is done and what happens next.
        folder: where the result goes, into a folder of its own.

    Raises:
        ValueError, OSError: the image can't be read or is too large, or there are no such weights.
    """
    if name not in weights_of(scale):  # it comes from the browser
        raise ValueError(f"{name}: no weights for x{scale}; choose one of {', '.join(weights_of(scale))}")
    height, width = image_size(path)
    if height * width * scale**2 > config.max_megapixels * 1e6:
        raise ValueError(
            f"{path}: {width}x{height} at x{scale} would be {height * width * scale**2 / 1e6:.1f} megapixels, over "
            f"max_megapixels={config.max_megapixels:g}: choose a lower scale or a smaller image, or start the page with another limit"
        )
    tell(0.05, "reading")
    photo = read_photo(path)
    network = load_network(released_weights(scale).with_name(name), device)
    size = (height * scale, width * scale)
    notes = [f"note: {note}" for note in (*photo.notes, *check_writable(photo, ".png", size))]
    parts: list[float] = []  # of the image that are done; with alpha, twice as many

    def advance(part: float) -> None:
        parts.append(part)
        tell(0.1 + 0.7 * min(1, sum(parts) / (1 if photo.transparency is None else 2)), f"enlarging to {size[1]}x{size[0]}")

    advance(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = enlarge_photo(photo, partial(upscale, network, precision=utils.choose_precision("auto", device), progress=advance), size)
    notes += [f"warning: {warning.message}" for warning in caught]
    tell(0.85, "writing")
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{path.stem}_x{scale}.png"
    write_photo(target, result)
    before, after, note = html_report.beside_bicubic(photo, result)
    return before, after, target, [note, *notes]


# The page


def build_page(enlarge: Callable[[Path, int, str, Callable[[float, str], object]], tuple[RGB, RGB, Path, list[str]]]) -> Any:
    """The page as gradio's Blocks; `enlarge` is `enlarge_file` but for its settings."""
    import gradio  # only here, as it is not among the requirements of the other scripts

    scales = [scale for scale in (2, 3, 4, 8) if weights_of(scale)]
    if not scales:
        raise ValueError(f"{released_weights(4).parent}: no weights; restore the folder with git checkout")
    first = 4 if 4 in scales else scales[0]

    def answer(file: str | None, scale: int, name: str, progress: Any = gradio.Progress()) -> Any:  # noqa: B008 (gradio's way)
        if file is None:
            raise gradio.Error("choose an image first", print_exception=False)
        path = Path(file)
        try:
            before, after, target, notes = enlarge(path, scale, name, progress)
        except (ValueError, OSError, MemoryError) as error:
            words = files.explain(error) if isinstance(error, OSError) else str(error) or "too little memory: choose a smaller image"
            raise gradio.Error(words.replace(str(path), path.name), duration=None, print_exception=False) from None
        return (before, after), gradio.DownloadButton(f"Download {target.name}", value=target, interactive=True), "\n\n".join(notes)

    with gradio.Blocks(title="RCAN", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown("# Enlarge an image\nIt is computed on this machine, and does not leave it.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label="Image", file_types=[*IMAGE_SUFFIXES])
                scale = gradio.Radio([(f"x{value}", value) for value in scales], value=first, label="Scale")
                name = gradio.Dropdown(weights_of(first), label="Weights")
                button = gradio.Button("Enlarge", variant="primary")
                download = gradio.DownloadButton("Download", interactive=False)
                notes = gradio.Markdown()
            with gradio.Column(scale=2, min_width=320):
                slider = gradio.ImageSlider(
                    label="Bicubic on the left, the network on the right", format="png", interactive=False, max_height=600,
                    buttons=["fullscreen"],
                )  # fmt: skip
        scale.change(lambda value: gradio.Dropdown(weights_of(value), value=weights_of(value)[0]), scale, name)
        button.click(answer, [file, scale, name], [slider, download, notes], show_progress_on=slider)
    return page


if __name__ == "__main__":
    run_script(main)
