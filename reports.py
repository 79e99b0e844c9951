"""What a run reports: means since the last report, the run log, sample images, provenance, tables."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import files
import imgproc
from imgproc import RGB
from runtime import REPOSITORY, Runtime

SKIPPED = "optimizer/skipped"  # the term that is 1 for a skipped update


class Meter:
    """The terms of the updates since the last report, kept on the device, and where the time went."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.restart()

    def restart(self) -> None:
        self.names: list[str] = []
        self.updates: list[int] = []
        self.values: list[Tensor] = []  # (terms,) each
        self.passed = self.waited = 0.0  # seconds
        self.resumed_with = 0  # updates before a resume, whose time is not known

    def state_dict(self) -> dict[str, Any]:
        """The terms since the last report, so a resumed run reports the same means."""
        values = torch.stack(self.values).cpu() if self.values else torch.empty(0, len(self.names))
        gathered = self.runtime.gather((self.updates, values))
        values = torch.cat([part for _, part in gathered])  # (updates, terms)
        return {
            "names": self.names,
            "updates": [update for updates, _ in gathered for update in updates],
            "values": values.nan_to_num(0, 0, 0),  # checkpoints hold finite values only
            "kind": torch.where(values.isnan(), 1, torch.where(values.isinf(), 2, 0)).to(torch.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The main process takes the terms of all."""
        self.names = list(state["names"])
        if self.runtime.is_main:
            values = state["values"].clone()
            values[state["kind"] == 1], values[state["kind"] == 2] = math.nan, math.inf
            self.updates, self.values = list(state["updates"]), list(values.to(self.runtime.device))
            self.resumed_with = len(self.updates)

    def resume(self) -> None:
        self.resumed = time.perf_counter()

    def pause(self) -> None:
        """Evaluating and saving do not count into the updates per second."""
        self.passed += time.perf_counter() - self.resumed

    def timed(self, fetch: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = fetch()
        self.waited += time.perf_counter() - start
        return result

    def add(self, update: int, terms: Mapping[str, Tensor]) -> None:
        self.names = list(terms)
        self.updates.append(update)
        self.values.append(torch.stack([value.to(self.runtime.device, torch.float32) for value in terms.values()]))

    def take(self) -> tuple[dict[str, float | None], dict[int, list[str]]]:
        """The mean of each term over accepted updates and all processes; and, by skipped update, the terms that were not finite."""
        start = time.perf_counter()
        values = torch.stack(self.values).tolist()
        self.passed += time.perf_counter() - start  # on a GPU, this waits for what the updates have only launched
        gathered = self.runtime.gather((self.updates, values))
        rows = [(update, dict(zip(self.names, row, strict=True))) for updates, part in gathered
                for update, row in zip(updates, part, strict=True)]  # fmt: skip
        kept = [row for _, row in rows if not row[SKIPPED]]
        means: dict[str, float | None] = {name: math.fsum(row[name] for row in kept) / len(kept) if kept else None for name in self.names}
        means[SKIPPED] = math.fsum(row[SKIPPED] for _, row in rows) / len(rows)
        skipped: dict[int, list[str]] = {}
        for update, row in sorted(rows, key=lambda found: found[0]):
            if row[SKIPPED]:
                known = skipped.setdefault(update, [])
                known += [name for name, value in row.items() if not math.isfinite(value) and name not in known]
        done = len(self.updates) - self.resumed_with
        means |= {"time/updates_per_second": done / self.passed, "time/waiting": self.waited / self.passed}
        self.restart()
        return means, skipped


class RunLog:
    """A run's reports: a progress bar, log.jsonl with a JSON line for each, and TensorBoard; only in the main process.

    Opening it at update N drops the lines of an interrupted run after N, since those updates are done again.
    """

    def __init__(self, folder: Path, update: int, total_updates: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        _keep_lines_until(self._path, update)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder), purge_step=update + 1)
        self._bar = tqdm(total=total_updates, initial=update, unit="update", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        if self.enabled:
            self._bar.update()

    def write(self, update: int, values: Mapping[str, Any], shown: str = "") -> None:
        """One report: a line in the file, numbers to TensorBoard, `shown` beside the progress bar."""
        if not self.enabled:
            return
        try:
            self._file.write(to_json({"update": update, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a failing write does not name its file
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, update)
        if shown:
            self._bar.set_postfix_str(shown)

    def write_skipped(self, update: int, skipped: Mapping[int, tuple[Sequence[str], Sequence[str]]]) -> None:
        """Name each update that was skipped since the last report, with its terms that were not finite, and its images."""
        for number, (terms, images) in skipped.items():
            self.write(update, {"event": "skipped", "skipped": number + 1, "not_finite": list(terms), "images": list(images)})
        for number, (terms, images) in list(skipped.items())[:3]:
            why = f"{', '.join(terms)} not finite" if terms else "its loss is far above the running mean"
            distinct = list(dict.fromkeys(images))
            more = f" and {len(distinct) - 16} more" if len(distinct) > 16 else ""
            self.say(f"skipped update {number + 1}, {why}; its patches are from {', '.join(distinct[:16])}{more}")
        if len(skipped) > 3:
            self.say(f"update {update}: skipped {len(skipped) - 3} more since the last report; log.jsonl names them")

    def put_on_disk(self) -> None:
        """Wait until the disk has all lines, before a checkpoint counts them as logged."""
        if self.enabled:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error

    def image(self, update: int, name: str, image: RGB) -> None:
        if self.enabled:
            self._board.add_image(name, image, update, dataformats="HWC")

    def table(self, update: int, name: str, values: Mapping[str, Any]) -> None:
        """Names and values as a text in TensorBoard."""
        if self.enabled:
            rows = [[f"`{key}`", f"`{to_json(value)}`".replace("|", "\\|")] for key, value in values.items()]
            self._board.add_text(name, markdown_table([["name", "value"], *rows]), update)

    def say(self, text: str) -> None:
        if self.enabled:
            self._bar.write(text)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()


def _keep_lines_until(path: Path, update: int) -> None:
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _logged_update(line) <= update]
        if kept != lines:
            files.write_text(path, "".join(kept))


def _logged_update(line: str) -> float:
    """The update that a line reports, or infinity for a line that was cut off."""
    try:
        return json.loads(line)["update"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class SampleSheet:
    """The middle of the first three images of a set, as labelled rows of bicubic, SR and GT; `add` is an `on_image` of `evaluate`.

    The PSNR in a label is that of the whole image.
    """

    SIDE = 128  # GT pixels

    def __init__(self, names: Sequence[str], upscale_factor: int) -> None:
        self.names = names[:3]
        self.upscale_factor = upscale_factor
        self.rows: dict[str, RGB] = {}  # those of this process

    def add(self, name: str, lr: RGB, sr: RGB, gt: RGB) -> None:
        if name in self.names:
            panels = {"bicubic": imgproc.imresize(lr, self.upscale_factor), "SR": sr}
            labelled = {f"{label}  {imgproc.psnr(image, gt, self.upscale_factor):.2f} dB": image for label, image in panels.items()}
            labelled[f"GT  {name}"] = gt
            self.rows[name] = np.concatenate([draw_panel(self._middle(image), label) for label, image in labelled.items()], axis=1)

    def _middle(self, image: RGB) -> RGB:
        height, width = (min(self.SIDE, size) for size in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        canvas = np.full((self.SIDE, self.SIDE, 3), 255, np.uint8)  # white around a smaller image
        canvas[:height, :width] = image[top : top + height, left : left + width]
        return canvas

    def gather(self, runtime: Runtime) -> RGB | None:
        """The sheet with the rows of all processes; None without images."""
        rows = {name: row for part in runtime.gather(self.rows) for name, row in part.items()}
        return np.concatenate([rows[name] for name in sorted(rows)]) if rows else None


def draw_panel(crop: RGB, label: str, zoom: int = 2) -> RGB:
    """The enlarged crop in a white frame, below its label, of which the end is left out where it is too long."""
    enlarged = crop.repeat(zoom, 0).repeat(zoom, 1)
    height, width = enlarged.shape[:2]
    panel = np.full((26 + height + 4, width + 4, 3), 255, np.uint8)
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    text, end = label, len(label)
    while text and cv2.getTextSize(text, font, size, 1)[0][0] > width - 10:
        end -= 1
        text = f"{label[:end]}.." if end > 0 else ""
    cv2.putText(panel, text, (8, 18), font, size, (0, 0, 0), 1, cv2.LINE_AA)
    panel[26:-4, 2:-2] = enlarged
    return panel


def to_json(value: Any, indent: int | None = None) -> str:
    """As JSON, which has no infinity and no NaN: they become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(member) for name, member in value.items()}
        if isinstance(value, list | tuple):
            return [finite(member) for member in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


@cache  # a process keeps the answer of its start, even if the folder changes meanwhile
def provenance() -> dict[str, str]:
    """The command, the commit and the versions that made a result."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain str, which weights_only=True reads
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table; the first row is the header."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))
