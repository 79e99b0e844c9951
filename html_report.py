"""A page to compare images: one HTML file with tables, and for each image a before/after slider with zoom.

    report = Report("rcan_light_x4 on Set5", lines=["…"], tables=[rows], count=5)
    report.add("baby", "+1.94 dB", [("bicubic", bicubic), ("RCAN", sr), ("GT", gt)])  # shows the first two; others can be chosen
    notes = report.write(folder / "report.html")

The images are in the page, which loads nothing from elsewhere. Small ones are PNG, exact in every pixel; where that would make the page
too large, WebP. Of very large ones, the page shows the middle. It says all of this itself.
"""

import base64
import html
import string
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import files
import imgproc
from image_files import Photo, encode_photo
from imgproc import RGB

MAX_BYTES = 60_000_000  # of the page; browsers open larger ones slowly
MAX_PIXELS = 4_000_000  # of an image that is shown whole
MAX_SIDE = 16_000  # of an image that is shown whole; WebP ends at 16,383
SIDE = 2000  # of the middle that is shown of larger ones
PNG_PIXELS = 1_000_000  # of an image that is stored as PNG
PNG_BYTES = 3  # base64 of a photograph's pixel as PNG, at most about
QUALITY = 92  # of WebP


class Report:
    """Collects encoded images, a few MB each, until the page is full, and writes the page."""

    def __init__(self, title: str, lines: Sequence[str] = (), tables: Sequence[Sequence[Sequence[str]]] = (), count: int = 1) -> None:
        """
        Args:
            lines: paragraphs above the tables.
            tables: rows of cells; the first row is the header, and a cell in two asterisks is bold.
            count: images that will be added; they are exact where all of them fit so.
        """
        self.title, self.lines, self.tables = title, lines, tables
        self.share = MAX_BYTES / max(1, count)  # bytes that each image may take
        self.notes: list[str] = []  # paragraphs below the tables
        self.left_out: list[str] = []
        self._figures: list[tuple[float, str]] = []
        self._bytes, self._approximate = 0, False

    def add(self, name: str, note: str, images: Sequence[tuple[str, RGB]], rank: float = 0, icc_profile: bytes | None = None) -> None:
        """Add an image, or note that it is left out, if the page is full.

        Args:
            images: with their labels; uint8 (H, W, 3), all of one size. The first two are shown at the start.
            rank: figures are sorted by this, and then stand in the order in which they were added.
        """
        if self.left_out:  # the page stays sorted: no later image takes the place of an earlier one
            self.left_out.append(name)
            return
        size = images[0][1].shape[:2]
        _, window = _middles(size, size)
        shown = [(label, image[window]) for label, image in images]
        height, width = shown[0][1].shape[:2]
        if (height, width) != size:
            note += f"; the middle {width}x{height} of {size[1]}x{size[0]} pixels"
        exact = height * width <= PNG_PIXELS and len(shown) * height * width * PNG_BYTES <= self.share
        frame = f'<img width="{width}" height="{height}" decoding="async" loading="lazy"'
        parts = "".join(f'{frame} alt="{_text(label)}" src="{_uri(image, exact, icc_profile)}">' for label, image in shown)
        figure = f'<figure><h2>{_text(name)}</h2><p>{_text(note)}</p><div class="view">{parts}</div></figure>\n'
        if self._bytes + len(figure) > MAX_BYTES:
            self.left_out.append(name)
            return
        self._bytes += len(figure)
        self._approximate |= not exact
        self._figures.append((rank, figure))

    def add_enlarged(self, name: str, photo: Photo, result: Photo, rank: float = 0) -> None:
        """Add a photo, enlarged by bicubic, beside its upscaled result."""
        before, after, note = beside_bicubic(photo, result)
        self.add(name, note, [("bicubic", before), ("upscaled", after)], rank, None if photo.gray else photo.icc_profile)

    def write(self, path: Path) -> list[str]:
        """Write the page; sentences on what it does not show, beside `notes`."""
        notes = []
        if self._approximate:
            notes.append(f"Some images are stored as WebP of quality {QUALITY}, which changes pixels a little; the files are exact.")
        if self.left_out:
            notes.append(f"Left out, as the page would exceed {MAX_BYTES / 1e6:.0f} MB: {', '.join(self.left_out)}.")
        parts = [f"<p>{_text(line)}</p>" for line in self.lines] + [_table(rows) for rows in self.tables]
        parts += [f'<p class="note">{_text(note)}</p>' for note in (*self.notes, *notes)]
        parts += [figure for _, figure in sorted(self._figures, key=lambda found: found[0])]
        files.write_text(path, string.Template(_PAGE).substitute(title=_text(self.title), body="\n".join(parts)))
        return notes


def keep_existing(page: Path | None, existing: str) -> Path | None:
    """The page to write, or None: `existing` is "refuse", "skip" or "overwrite".

    Raises:
        ValueError: it is already there, and `existing` is "refuse".
    """
    if page is None or not page.exists() or existing == "overwrite":
        return page
    if existing == "refuse":
        raise ValueError(f"{page}: is already there; set --existing skip to keep it, or --existing overwrite to replace it")
    print(f"note: {page}: is already there and stays as it is; it shows nothing of this run", file=sys.stderr)
    return None


def beside_bicubic(photo: Photo, result: Photo) -> tuple[RGB, RGB, str]:
    """A photo enlarged by bicubic, and its upscaled result, in 8 bits, on white; of large ones, the middle; and a note that says so."""
    size = result.pixels.shape[:2]
    small, large = _middles(photo.pixels.shape[:2], size)
    after = _on_white(_crop(result, large))
    before = imgproc.imresize_to(_on_white(_crop(photo, small)), *after.shape[:2])
    note = f"{photo.pixels.shape[1]}x{photo.pixels.shape[0]} to {size[1]}x{size[0]} pixels"
    note += f"; the middle {after.shape[1]}x{after.shape[0]}" if after.shape[:2] != size else ""
    note += "; transparent parts on white" if photo.transparency is not None else ""
    return before, after, note


Window = tuple[slice, slice]


def _middles(small: Sequence[int], large: Sequence[int]) -> tuple[Window, Window]:
    """What is shown of an image, in an image of (height, width) `small` and in its enlargement to `large`."""
    whole = large[0] * large[1] <= MAX_PIXELS and max(large) <= MAX_SIDE
    windows = []
    for size, new_size in zip(small, large, strict=True):
        factor = new_size / size
        length = size if whole else min(size, max(1, int(SIDE / factor)))
        start = (size - length) // 2 // 10 * 10  # so that both start at the same point, also where the factor has a decimal
        windows.append((slice(start, start + length), slice(round(start * factor), round((start + length) * factor))))
    return (windows[0][0], windows[1][0]), (windows[0][1], windows[1][1])


def _crop(photo: Photo, window: Window) -> Photo:
    return replace(photo, pixels=photo.pixels[window], alpha=None if photo.alpha is None else photo.alpha[window])


def _on_white(photo: Photo) -> RGB:
    """The photo as it looks on white paper, uint8 (H, W, 3)."""
    if photo.bits == 8 and photo.alpha is None:
        return photo.pixels
    peak = np.float32(np.iinfo(photo.pixels.dtype).max)
    opacity = 1 if photo.alpha is None else photo.alpha[:, :, None] / peak
    return np.round(255 * (1 - opacity * (1 - photo.pixels / peak))).astype(np.uint8)


def _uri(image: RGB, exact: bool, icc_profile: bytes | None) -> str:
    encoded = encode_photo(Photo(image, icc_profile=icc_profile), ".png" if exact else ".webp", QUALITY)
    return f"data:image/{'png' if exact else 'webp'};base64,{base64.b64encode(encoded).decode()}"


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "backslashreplace").decode())  # some file names are no UTF-8


def _table(rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str, kind: str) -> str:
        return f"<{kind}{' class=strong' if text.startswith('**') else ''}>{_text(text.strip('*'))}</{kind}>"

    lines = ("".join(cell(text, "td" if number else "th") for text in row) for number, row in enumerate(rows))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


# In the page, a dollar stands for what string.Template fills in
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,"><title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fbfbfa; --text: #1d1f21; --dim: #666b70; --line: #d8dadd; --accent: #0b62c4 }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --text: #e4e6e8; --dim: #9aa0a6; --line: #3a3e42; --accent: #6cb0ff } }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; accent-color: var(--accent) }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.05rem; margin: 0 } p { margin: .5rem 0 }
.note, figure p { color: var(--dim) }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 2.5rem 0 0 } figure p { margin: 0 0 .5rem } .strong { font-weight: 600 }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin-bottom: .5rem; min-width: min(100%, 26rem) }
.bar input { flex: 1 1 6rem; min-width: 6rem; height: 2.25rem; margin: 0 } .bar select { max-width: 46% } .bar i { flex: 1 }
.bar hr { flex: 0 0 100%; margin: -.25rem 0; border: 0 }
.bar button, .bar select { font: inherit; min-height: 2.25rem; padding: 0 .6rem; border: 1px solid var(--line); border-radius: .4rem;
  background: transparent; color: inherit } .bar option { background: var(--back) } .bar button { min-width: 2.25rem }
.bar output { min-width: 3.2rem; text-align: center; color: var(--dim); font-variant-numeric: tabular-nums }
.view img { max-width: 100%; height: auto }
.live { position: relative; overflow: hidden; background: var(--line); cursor: ew-resize; user-select: none;
  touch-action: pan-y pinch-zoom }
.live img { position: absolute; max-width: none; pointer-events: none } .live.near { cursor: grab; touch-action: none }
.live.near img { image-rendering: pixelated } .live.large { touch-action: none }
.line { position: absolute; top: 0; bottom: 0; width: 44px; margin-left: -22px; cursor: ew-resize; touch-action: none;
  background: linear-gradient(#fff, #fff) center / 2px 100% no-repeat; filter: drop-shadow(0 0 1.5px #000) }
.line::after { content: "\\2194"; position: absolute; top: 50%; left: 6px; width: 32px; height: 32px; margin-top: -16px; border-radius: 50%;
  background: #fff; color: #222; font: 20px/30px system-ui, sans-serif; text-align: center }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
</style></head><body>
<h1>$title</h1>
$body
<script>
"use strict";
const LEVELS = [1, 2, 3, 4, 6, 8, 12, 16];
function add(parent, kind, properties) { return parent.appendChild(Object.assign(document.createElement(kind), properties)); }
function compare(figure) {
  const view = figure.querySelector(".view"), images = [...view.children], bar = document.createElement("div");
  const width = Number(images[0].getAttribute("width")), height = Number(images[0].getAttribute("height"));
  let fit = 1, zoom = 0, x = 0, y = 0, tall = 0, shownWidth = 0, shownHeight = 0, split = 50, moving = null, known = 0;
  bar.className = "bar"; view.before(bar); view.className = "live"; view.tabIndex = 0;
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", "image: + and - zoom, 0 shows all of it, arrows move it");
  const [left, , right, , range] = ["select", "i", "select", "hr", "input"].map(kind => add(bar, kind, {}));
  [left, right].forEach((menu, side) => {
    menu.ariaLabel = side ? "image on the right" : "image on the left";
    images.forEach((image, index) => add(menu, "option", { value: index, textContent: image.alt, selected: index === side }));
    menu.onchange = draw;
  });
  Object.assign(range, { type: "range", min: 0, max: 100, step: 1, value: split, ariaLabel: "where the two images meet, percent" });
  range.oninput = () => { split = Number(range.value); draw(); };
  const buttons = [["\\u2212", "smaller", -1], ["+", "larger", 1], ["fit", "all of the image", 0]].map(([text, label, way]) =>
    add(bar, "button", { textContent: text, ariaLabel: label, title: label, type: "button", onclick: () => step(way) }));
  const level = document.createElement("output"), line = add(view, "div", { className: "line" });
  buttons[0].after(level);

  function measure() { shownWidth = Math.min(figure.clientWidth, width * zoom); shownHeight = Math.min(tall, height * zoom); }
  function draw() {
    x = Math.min(0, Math.max(shownWidth - width * zoom, x)); y = Math.min(0, Math.max(shownHeight - height * zoom, y));
    Object.assign(view.style, { width: shownWidth + "px", height: shownHeight + "px" }); bar.style.width = shownWidth + "px";
    view.classList.toggle("near", zoom > 1); view.classList.toggle("large", zoom > fit);
    const place = shownWidth * split / 100;
    images.forEach((image, index) => {
      image.hidden = index !== Number(left.value) && index !== Number(right.value);
      Object.assign(image.style, { left: x + "px", top: y + "px", width: width * zoom + "px", height: height * zoom + "px",
        zIndex: index === Number(right.value) ? 1 : 0,
        clipPath: index === Number(right.value) && left.value !== right.value ? "inset(0 0 0 " + (place - x) + "px)" : "none" });
    });
    line.style.left = place + "px"; line.style.zIndex = 2;
    range.value = split; level.textContent = Math.round(zoom * 100) + "\\u00a0%";
  }
  function zoomTo(wanted, atX, atY) {  // around a point in the view, or else its middle
    const ratio = wanted / zoom, pointX = (atX ?? shownWidth / 2) - x, pointY = (atY ?? shownHeight / 2) - y;
    zoom = wanted; measure();
    x = (atX ?? shownWidth / 2) - pointX * ratio; y = (atY ?? shownHeight / 2) - pointY * ratio; draw();
  }
  function step(way, atX, atY) {
    const levels = [fit, ...LEVELS.filter(value => value > fit)];
    zoomTo(way > 0 ? levels.find(value => value > zoom) || zoom : way < 0 ? levels.findLast(value => value < zoom) || fit : fit, atX, atY);
  }
  function resize() {
    if (innerWidth === known) return;  // on phones, the height changes whenever the address bar comes and goes
    known = innerWidth; tall = innerHeight * .75;
    const room = Math.min(figure.clientWidth / width, tall / height), whole = zoom === 0 || zoom === fit;
    fit = room < 1 ? room : Math.min(4, Math.floor(room));
    zoom = whole ? fit : Math.max(fit, zoom); measure(); draw();
  }
  view.onpointerdown = event => {
    if (!event.isPrimary || event.button) return;
    moving = { pans: zoom > fit && event.target !== line, x: event.clientX, y: event.clientY };
    view.setPointerCapture(event.pointerId); view.onpointermove(event);
  };
  view.onpointermove = event => {
    if (!moving || !event.isPrimary) return;
    if (moving.pans) { x += event.clientX - moving.x; y += event.clientY - moving.y; }
    else split = Math.round(Math.min(100, Math.max(0, 100 * (event.clientX - view.getBoundingClientRect().left) / shownWidth)));
    moving.x = event.clientX; moving.y = event.clientY; draw();
  };
  view.onpointerup = view.onpointercancel = () => { moving = null; };
  view.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = view.getBoundingClientRect();
    step(event.deltaY < 0 ? 1 : -1, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  figure.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const way = { "+": 1, "=": 1, "-": -1, "0": 0 }[event.key], shift = { ArrowLeft: [40, 0], ArrowRight: [-40, 0],
      ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (way !== undefined) step(way);
    else if (shift && event.target === view && zoom > fit) { x += shift[0]; y += shift[1]; draw(); }
    else return;
    event.preventDefault();
  };
  addEventListener("resize", resize); resize();
}
document.querySelectorAll("figure").forEach(compare);
</script>
</body></html>
"""
