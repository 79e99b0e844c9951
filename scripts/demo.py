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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro

import files
import html_report
from config import released_weights
from config_inference import InferenceConfig
from image_files import IMAGE_SUFFIXES, image_size, read_photo, write_photo
from imgproc import RGB
from inference import Enlargers, upscale_photo
from runtime import run_script, start_runtime

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


def kinds(scale: int) -> list[str]:
    """The weights to choose from at a scale; "auto" chooses by what an image is."""
    return ["auto", *(kind for kind in ("clean", "photo") if released_weights(scale, kind).is_file())]


def enlarge_file(
    path: Path, scale: int, kind: str, tell: Callable[[float, str], object], *, folder: Path, device: torch.device, config: DemoConfig
) -> tuple[RGB, RGB, Path, list[str]]:
    """What `python inference.py` makes of a file: bicubic and the result to compare, the path of the result, and notes.

    Args:
        kind: one of `kinds(scale)`.
        tell: called with the share that is done and what happens next.
        folder: where the result goes, into a folder of its own.

    Raises:
        ValueError, OSError: the image can't be read or is too large, or there are no such weights.
    """
    height, width = image_size(path)
    if height * width * scale**2 > config.max_megapixels * 1e6:
        raise ValueError(
            f"{path}: {width}x{height} at x{scale} would be {height * width * scale**2 / 1e6:.1f} megapixels, over "
            f"max_megapixels={config.max_megapixels:g}: choose a lower scale or a smaller image, or start the page with another limit"
        )
    tell(0.05, "reading")
    photo = read_photo(path)
    settings = InferenceConfig(images=(str(path),), upscale_factor=scale, weights=kind)  # type: ignore[arg-type]  # from the browser
    done: list[float] = []  # pixels

    def advance(pixels: float) -> None:
        done.append(pixels)
        tell(0.1 + 0.7 * min(1, sum(done) / (height * width)), f"enlarging to {width * scale}x{height * scale}")

    advance(0)
    result, notes = upscale_photo(photo, ".png", Enlargers(settings, device), advance, settings)
    tell(0.85, "writing")
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{path.stem}_x{scale}.png"
    write_photo(target, result)
    before, after, note = html_report.beside_bicubic(photo, result)
    why = notes[0].partition(", ")[2].partition(";")[0]  # without the size, which `note` has, and advice for the command line
    return before, after, target, [note, *([why] if why else []), *notes[1:]]


# The page


def build_page(enlarge: Callable[[Path, int, str, Callable[[float, str], object]], tuple[RGB, RGB, Path, list[str]]]) -> Any:
    """The page as gradio's Blocks; `enlarge` is `enlarge_file` but for its settings."""
    import gradio  # only here, as it is not among the requirements of the other scripts

    scales = [scale for scale in (2, 3, 4, 8) if len(kinds(scale)) > 1]
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
                name = gradio.Dropdown(kinds(first), label="Weights", info="auto: by what the image is")
                button = gradio.Button("Enlarge", variant="primary")
                download = gradio.DownloadButton("Download", interactive=False)
                notes = gradio.Markdown()
            with gradio.Column(scale=2, min_width=320):
                slider = gradio.ImageSlider(
                    label="Bicubic on the left, the network on the right", format="png", interactive=False, max_height=600,
                    buttons=["fullscreen"],
                )  # fmt: skip
        scale.change(lambda value: gradio.Dropdown(kinds(value), value="auto"), scale, name)
        button.click(answer, [file, scale, name], [slider, download, notes], show_progress_on=slider)
    return page


if __name__ == "__main__":
    run_script(main)
