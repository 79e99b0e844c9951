"""Measure this machine: speed beside other programs and beside the hardware's limit, start-up, and what fits into memory:

    python scripts/benchmark.py --parts forward train --batch_size 16 --lr_patch_size 48
    python scripts/benchmark.py --parts memory --image_sizes 1280x720 4000x3000 --batch_sizes 1 4 16

Contestants take turns, so that other programs of the machine slow all alike; the best and the median of `runs` are reported. The
limit is measured in the same turns: the fastest convolution or matrix product, a copy of the same bytes, or a start of Python with
PyTorch. Rates and shares are of the best times. Other programs compute the same random weights, and their largest difference from
our network in fp32 stands beside their time. Results go to a JSON file and, as Markdown, to the screen.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import copy
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any, Literal

import numpy as np
import PIL.Image
import skimage.data
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dataset
import files
import image_files
import imgproc
import model
import utils
import weights
from config import ModelName, released_weights
from reports import markdown_table, provenance, to_json
from runtime import REPOSITORY, missing_compiler, run_script, start_runtime
from store import PairStore
from upscaling import upscale

PEERS = ("spandrel", "torchsr", "onnxruntime", "openvino")
Part = Literal["forward", "train", "loader", "start", "memory"]
Works = list[tuple[str, str, Callable[[], np.ndarray]]]  # name, precision, and what returns the SR image


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    parts: tuple[Part, ...] = ("forward", "train", "loader", "start", "memory")  # what to measure
    model_arch_name: ModelName = "rcan_light_x4"  # the network
    runs: int = 5  # turns of each contestant, after one that is not counted
    output: str = "results/benchmark.json"  # write every row here, with hardware and versions
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")  # fp16 on a GPU only: CPUs imitate it, in minutes

    image: int = 64  # side of the image in forward, LR pixels
    batch_size: int = 16  # patches in an update, in train and loader
    lr_patch_size: int = 48  # side of their LR patches, LR pixels
    compile: bool = True  # time train.py with compile=True too, which takes minutes to start

    # Memory
    image_sizes: tuple[str, ...] = ("320x180", "640x360")  # width x height of LR images
    batch_sizes: tuple[int, ...] = (1, 4)  # patches that an update computes at a time: batch_size / accumulation_steps
    lr_patch_sizes: tuple[int, ...] = (48,)  # side of the LR patches, LR pixels

    def __post_init__(self) -> None:
        if min(self.runs, self.image, self.batch_size, self.lr_patch_size, *self.batch_sizes, *self.lr_patch_sizes) < 1:
            raise ValueError("runs and sizes must be at least 1")
        for size in self.image_sizes:
            if not all(part.isdecimal() and int(part) for part in size.split("x")) or size.count("x") != 1:
                raise ValueError(f"image_sizes={size!r} is not width x height, as in 1280x720")


@dataclass
class Row:
    """A contestant, and what was found."""

    part: str
    name: str
    precision: str = ""
    work: Callable[[], Sequence[float]] | None = None  # a turn: the seconds of each repetition
    amount: float = 0  # of work in a repetition
    unit: str = ""  # of amount a second
    is_limit: bool = False
    difference: float | None = None  # largest, from our network in fp32, on [0, 1]
    gib: float | None = None  # peak memory
    note: str = ""  # why there are no figures
    seconds: list[float] = field(default_factory=list)

    def figures(self, limits: dict[tuple[str, str], float]) -> dict[str, Any]:
        """What the JSON file holds; `limits` are rates by precision and unit."""
        best = min(self.seconds, default=None)
        rate = self.amount / best if best and self.amount else None
        limit = limits.get((self.precision, self.unit))
        return {
            "part": self.part, "name": self.name, "precision": self.precision, "seconds_best": best,
            "seconds_median": statistics.median(self.seconds) if self.seconds else None, "rate": rate, "unit": self.unit,
            "share_of_limit": rate / limit if rate and limit else None, "largest_difference": self.difference, "peak_gib": self.gib,
            "note": self.note,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each part, print its table, and write all rows."""
    config = tyro.cli(BenchmarkConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    output = Path(config.output)
    files.check_folder(output.parent)
    device = start_runtime(alone=True).device
    machine = describe_machine(device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    measured, found = {"forward": forward, "train": train, "loader": loader, "start": start, "memory": memory}, []
    with tempfile.TemporaryDirectory() as folder:
        for part in config.parts:
            rows = measured[part](config, Path(folder) / part, device)
            limits: dict[tuple[str, str], float] = {}
            for row in rows:
                if row.is_limit:
                    key = row.precision, row.unit
                    limits[key] = max(limits.get(key, 0), row.amount / min(row.seconds))
            figures = [row.figures(limits) for row in rows]
            print(f"\n{part}\n\n{table(figures)}", flush=True)
            found += figures
    print(f"\n{'replaces' if output.exists() else 'in'} {output}")
    files.write_text(output, to_json({"machine": machine, "config": vars(config), "rows": found}, indent=2) + "\n")


def describe_machine(device: torch.device) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8", errors="replace").splitlines() if cpu.is_file() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    versions = {}
    for name in ("torchvision", "pillow", *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in told.get("flags", "").split()],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        **provenance(),
        **versions,
    }


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, without the columns that are empty in all of them."""
    formats = {
        "precision": "{}", "seconds_best": "{:.4g}", "seconds_median": "{:.4g}", "rate": "{:,.4g}", "unit": "{}",
        "share_of_limit": "{:.0%}", "largest_difference": "{:.1e}", "peak_gib": "{:.2f}", "note": "{}",
    }  # fmt: skip
    used = {name: text for name, text in formats.items() if any(row[name] not in (None, "") for row in figures)}
    body = [[row["name"], *("–" if row[key] is None else text.format(row[key]) for key, text in used.items())] for row in figures]
    return markdown_table([["", *(name.replace("_", " ") for name in used)], *body])


# Measuring


def take_turns(rows: Sequence[Row], runs: int) -> list[Row]:
    """Fill in the seconds of rows that have work, after a turn that is not counted."""
    contestants = [row for row in rows if row.work]
    for turn in range(runs + 1):
        for row in contestants:
            assert row.work
            seconds = row.work()
            row.seconds += seconds if turn else []
    return list(rows)


def timed(work: Callable[[], object], device: torch.device, repetitions: int = 1) -> Callable[[], list[float]]:
    """A turn that does the work, waits for the device, and returns the mean seconds of a repetition."""

    def turn() -> list[float]:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(repetitions):
            work()
        _wait(device)
        return [(time.perf_counter() - begin) / repetitions]

    return turn


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_gigaflops(network: nn.Module, shape: Sequence[int]) -> float:
    """Of a forward, two for each multiplication with its addition; nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).to("meta", torch.float32)(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 1e9


def limits(part: str, channels: int, shape: Sequence[int], precisions: Sequence[str], device: torch.device) -> list[Row]:
    """The network's own 3x3 convolution alone, in both memory layouts, and a product of square matrices."""
    rows = []
    for precision in precisions:
        dtype, side, repetitions = utils.PRECISIONS[precision], 2048, 10
        for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            convolution = nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype).to(memory_format=layout)
            x = torch.rand(shape[0], channels, *shape[2:]).to(device, dtype).to(memory_format=layout)
            work = timed(torch.inference_mode()(partial(convolution, x)), device, repetitions)
            amount, title = count_gigaflops(convolution, x.shape), f"limit: 3x3 convolution of {channels} channels, {name}"
            rows.append(Row(part, title, precision, work, amount, "GFLOP/s", True))
        matrix = torch.rand(side, side).to(device, dtype)
        work = timed(partial(torch.mm, matrix, matrix), device)
        rows.append(Row(part, f"limit: product of {side}x{side} matrices", precision, work, 2 * side**3 / 1e9, "GFLOP/s", True))
    return rows


# Forward


def forward(config: BenchmarkConfig, folder: Path, device: torch.device) -> list[Row]:
    """Upscale an image, by our network alone, by `upscale`, and by other programs with the same weights."""
    torch.manual_seed(0)
    network = model.ARCHITECTURES[config.model_arch_name]().eval().to(device)
    lr = make_image(config.image, config.image)
    x = torch.from_numpy(lr.transpose(2, 0, 1).copy())[None].float().div(255).to(device)  # (1, 3, h, w) in [0, 1]
    amount, part = count_gigaflops(network, x.shape), "forward"
    with torch.inference_mode():
        reference = network(x).clamp(0, 1).cpu().numpy()
    works = _in_torch("our network", network, x, config)
    works += [(f"upscale, {name}", name, partial(upscale, network, lr, precision=name)) for name in config.precisions]
    notes = []
    for program, build in zip(PEERS, (_spandrel, _torchsr, _onnxruntime, _openvino), strict=True):
        try:
            works += build(network, x, folder, config)
        except (ImportError, ValueError) as error:
            notes.append(absent(part, program, error))
    rows = limits(part, network.arguments["channels"], x.shape, config.precisions, device)
    for name, precision, work in works:
        sr = work()  # (1, 3, H, W) in [0, 1], but uint8 (H, W, 3) of `upscale`
        sr = sr.transpose(2, 0, 1)[None] / 255 if sr.ndim == 3 else sr
        difference = float(abs(sr.astype(np.float32).clip(0, 1) - reference).max())
        rows.append(Row(part, name, precision, timed(work, device), amount, "GFLOP/s", difference=difference))
    return take_turns(rows + notes, config.runs)


def _in_torch(name: str, network: nn.Module, x: Tensor, config: BenchmarkConfig) -> Works:
    works: Works = []
    for layout in (torch.contiguous_format, torch.channels_last):
        arranged = copy.deepcopy(network).eval().to(x.device).to(memory_format=layout)
        for precision in config.precisions:

            @torch.inference_mode()
            def work(arranged: nn.Module = arranged, layout: torch.memory_format = layout, precision: str = precision) -> np.ndarray:
                with torch.autocast(x.device.type, utils.PRECISIONS[precision], enabled=precision != "fp32"):
                    return arranged(x.clone(memory_format=layout)).float().cpu().numpy()  # a clone, as spandrel's changes its input

            works.append((f"{name}, {str(layout).removeprefix('torch.').removesuffix('_format')}, {precision}", precision, work))
    return works


def _spandrel(network: model.RCAN, x: Tensor, folder: Path, config: BenchmarkConfig) -> Works:
    spandrel = importlib.import_module("spandrel")
    path = folder / "spandrel.pth"
    weights.export(network, path, "official")
    return _in_torch("spandrel", spandrel.ModelLoader().load_from_file(path).model, x, config)


def _torchsr(network: model.RCAN, x: Tensor, folder: Path, config: BenchmarkConfig) -> Works:
    return _in_torch("torchSR", build_torchsr(network, folder), x, config)


def build_torchsr(network: model.RCAN, folder: Path) -> nn.Module:
    """torchSR's network with our weights."""
    module = importlib.import_module("torchsr.models.rcan")
    sizes = {"n_resgroups": "num_rg", "n_resblocks": "num_rcab", "n_feats": "channels", "reduction": "reduction", "scale": "upscale_factor"}
    theirs = module.RCAN(**{name: network.arguments[ours] for name, ours in sizes.items()})
    weights.export(network, folder / "torchsr.pth", "official")
    theirs.load_state_dict(weights.read(folder / "torchsr.pth"))
    return theirs


def _onnxruntime(network: model.RCAN, x: Tensor, folder: Path, config: BenchmarkConfig) -> Works:
    runtime = importlib.import_module("onnxruntime")
    weights.export_onnx(network, folder / "onnxruntime.onnx")
    wanted = ("CUDAExecutionProvider",) * (x.device.type == "cuda") + ("CPUExecutionProvider",)
    session = runtime.InferenceSession(folder / "onnxruntime.onnx", providers=[p for p in wanted if p in runtime.get_available_providers()])
    where = session.get_providers()[0].removesuffix("ExecutionProvider")
    return [(f"ONNX Runtime, {where}, fp32", "fp32", lambda: session.run(["sr"], {"lr": x.cpu().numpy()})[0])]


def _openvino(network: model.RCAN, x: Tensor, folder: Path, config: BenchmarkConfig) -> Works:
    openvino = importlib.import_module("openvino")
    weights.export_onnx(network, folder / "openvino.onnx")
    found: Works = []
    for precision in config.precisions:
        hint = precision.replace("fp", "f")  # f32, bf16, f16
        compiled = openvino.Core().compile_model(folder / "openvino.onnx", "CPU", {"INFERENCE_PRECISION_HINT": hint})
        found.append((f"OpenVINO, CPU, {precision}", precision, partial(lambda run: run(x.cpu().numpy())["sr"].copy(), compiled)))
    return found


def absent(part: str, program: str, error: Exception) -> Row:
    """A program that is not installed, or whose weights ours can't become, as CBAM's."""
    return Row(part, program, note=f"not installed: pip install {error.name}" if isinstance(error, ImportError) else str(error))


def make_image(height: int, width: int) -> imgproc.RGB:
    """A photograph of scikit-image, repeated to this size."""
    photograph = skimage.data.retina()
    repeats = (-(-height // photograph.shape[0]), -(-width // photograph.shape[1]), 1)
    return np.ascontiguousarray(np.tile(photograph, repeats)[:height, :width])


# Training


def train(config: BenchmarkConfig, folder: Path, device: torch.device) -> list[Row]:
    """An update of train.py, as its log times it (with data, EMA and guard), and of a plain loop with our and torchSR's network."""
    network = model.ARCHITECTURES[config.model_arch_name]()
    shape = (config.batch_size, 3, config.lr_patch_size, config.lr_patch_size)
    amount, part = 3 * count_gigaflops(network, shape), "train"  # backward: the gradients of inputs and of weights
    numbers = itertools.count()
    rows = limits(part, network.arguments["channels"], shape, config.precisions, device)
    lacking = missing_compiler(device)
    for precision, compiled in itertools.product(config.precisions, ("False", "True") if config.compile else ("False",)):
        name = f"train.py, {precision}, compile={compiled}"
        if compiled == "True" and lacking:
            rows.append(Row(part, name, precision, note=lacking))
            continue

        def turn(precision: str = precision, compiled: str = compiled) -> list[float]:
            settings = {"batch_size": config.batch_size, "lr_patch_size": config.lr_patch_size, "precision": precision, "compile": compiled}
            log = run_training(config, folder, f"{next(numbers)}", updates=4, **settings)
            return [1 / line["time/updates_per_second"] for line in log[2:]]  # the first one compiles

        rows.append(Row(part, name, precision, turn, amount, "GFLOP/s"))
    theirs: nn.Module | None = None
    try:
        theirs = build_torchsr(network, folder)
    except (ImportError, ValueError) as error:
        rows.append(absent(part, "torchsr", error))
    for precision in config.precisions:
        for name, candidate in (("our network", network), ("torchSR", theirs)):
            if candidate is not None:
                work = timed(_plain_update(candidate, shape, config, precision, device), device)
                rows.append(Row(part, f"plain loop, {name}, {precision}", precision, work, amount, "GFLOP/s"))
    return take_turns(rows, config.runs)


def _plain_update(
    network: nn.Module, shape: Sequence[int], config: BenchmarkConfig, precision: str, device: torch.device
) -> Callable[[], None]:
    """Adam and L1 under autocast, on one batch in memory; no clipping, EMA, guard, scaler or log."""
    network = copy.deepcopy(network).train().to(device)
    scale = int(config.model_arch_name.rsplit("x", 1)[1])
    lr, gt = torch.rand(*shape, device=device), torch.rand(*shape[:2], *(side * scale for side in shape[2:]), device=device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, utils.PRECISIONS[precision], enabled=precision != "fp32"):
            sr = network(lr.clone())
        nn.functional.l1_loss(sr.float(), gt).backward()
        optimizer.step()

    return update


def training_command(config: BenchmarkConfig, folder: Path, name: str, updates: int, **settings: Any) -> list[str]:
    """A run of train.py on the photographs of scikit-image, which logs every update."""
    data = folder.parent / "data"  # for all parts
    if not data.exists():
        subprocess.run([sys.executable, str(REPOSITORY / "scripts" / "demo_data.py"), "--output", str(data)], check=True)
    chosen = {
        "model_arch_name": config.model_arch_name, "upscale_factor": config.model_arch_name.rsplit("x", 1)[1], "exp_name": name,
        "data_root": data, "cache_dir": folder.parent / "cache", "results_dir": folder / "results", "train_sets": "DemoTrain",
        "small_images": "skip", "epochs": 1, "steps_per_epoch": updates, "log_every": 1, "best_metric": "newest", **settings,
    }  # fmt: skip
    options = [str(word) for setting, value in chosen.items() for word in (f"--{setting}", value)]
    return [sys.executable, str(REPOSITORY / "train.py"), *options, "--valid_sets"]


def run_training(config: BenchmarkConfig, folder: Path, name: str, updates: int, **settings: Any) -> list[dict[str, Any]]:
    """The log lines of each update; ValueError with what the run said if it fails."""
    run_command(training_command(config, folder, name, updates, **settings))
    lines = (folder / "results" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "time/updates_per_second" in line]


# The peak of a child is at least what its parent took when it forked, so a small process starts the command
_STARTER = """
import json, subprocess, sys, time
begin = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds, peak = time.perf_counter() - begin, None
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
except ImportError:
    pass
print(json.dumps([code, seconds, peak]))
"""


def run_command(words: Sequence[str], log: Path | None = None) -> tuple[float, float | None]:
    """Seconds of a whole command, or until its run log has a loss, and the GiB of its largest process.

    Raises:
        ValueError: it failed, with the end of what it said.
    """
    begin, ready = time.perf_counter(), None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, *words]
        with subprocess.Popen(starter, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            while log and process.poll() is None and ready is None:
                if log.is_file() and "loss/" in log.read_text(encoding="utf-8"):
                    ready = time.perf_counter() - begin
                time.sleep(0.005)
            told, _ = process.communicate()
        said.seek(0)
        last = said.read().strip().splitlines()[-1:]
    code, seconds, peak = json.loads(told) if told else (process.returncode, 0.0, None)
    if code:
        raise ValueError(f"{Path(words[1]).name} ended with {code}: {' '.join(last) or 'killed, as for lack of memory'}")
    return ready or seconds, peak


# Data


def loader(config: BenchmarkConfig, folder: Path, device: torch.device) -> list[Row]:
    """Batches from the store, and bicubic, in one process; the limit copies the bytes that come out."""
    part, cpu = "loader", torch.device("cpu")
    for index in range(8):
        image = np.random.default_rng(index).integers(0, 256, (480, 480, 3), dtype=np.uint8)
        image_files.write_image(folder / "Set" / "GT" / f"{index}.png", image)
    scale = int(config.model_arch_name.rsplit("x", 1)[1])
    pairs = {"Set": dataset.find_pairs(folder / "Set", scale)}
    store = PairStore.open_or_build(pairs, scale, "BI", folder / "cache", progress=False)
    batches = dataset.TrainBatches(store, config.batch_size, config.lr_patch_size, seed=0)
    batch = [np.asarray(value) for value in batches[0].values()]
    image = np.random.default_rng(0).integers(0, 256, (1404, 2040, 3), dtype=np.uint8)
    small, pixels, unit = imgproc.imresize(image, 1 / 4), image.shape[0] * image.shape[1] / 1e6, "input megapixels/s"
    read = timed(lambda: [batches[update] for update in range(20)], cpu)
    side, drawn = config.lr_patch_size, 20 * config.batch_size
    shrink = partial(PIL.Image.fromarray(image).resize, (small.shape[1], small.shape[0]), PIL.Image.Resampling.BICUBIC)
    theirs = np.asarray(shrink())
    rows = [
        Row(part, "limit: copy a batch", "", timed(lambda: [[a.copy() for a in batch] for _ in range(20)], cpu), drawn, "pairs/s", True),
        Row(part, f"pairs of GT {side * scale} and LR {side} from the store", "", read, drawn, "pairs/s"),
        Row(part, "limit: copy the image", "", timed(image.copy, cpu), pixels, unit, True),
        Row(part, "imresize 2040x1404 at 1/4, MATLAB's", "", timed(partial(imgproc.imresize, image, 1 / 4), cpu), pixels, unit),
        Row(part, "Pillow's bicubic, not MATLAB's", "", timed(shrink, cpu), pixels, unit),
    ]
    rows[-1].difference = float(abs(theirs.astype(np.float32) - small).max() / 255)
    return take_turns(rows, config.runs)


# Starting

_SPANDREL = """
import sys, numpy, torch
from PIL import Image
from spandrel import ModelLoader
network = ModelLoader().load_from_file(sys.argv[1]).eval()
lr = torch.from_numpy(numpy.array(Image.open(sys.argv[2]).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
with torch.inference_mode():
    sr = network(lr.to(network.device))[0].permute(1, 2, 0).clamp(0, 1).mul(255).round().byte().cpu().numpy()
Image.fromarray(sr).save(sys.argv[3])
"""


def start(config: BenchmarkConfig, folder: Path, device: torch.device) -> list[Row]:
    """Whole commands, from nothing to their end or to the first update, with the memory of the largest process."""
    part, python, numbers = "start", sys.executable, itertools.count()
    photo = folder / "photo.png"
    image_files.write_image(photo, skimage.data.chelsea())  # 451x300
    released = released_weights(4)
    weights.export(weights.load(released), folder / "light.pth", "official")
    (folder / "peer.py").write_text(_SPANDREL, encoding="utf-8")
    rows: list[Row] = []

    def add(name: str, words: Sequence[str | Path], is_limit: bool = False, updates: bool = False) -> None:
        def turn() -> list[float]:
            number = f"{next(numbers)}"
            more = training_command(config, folder, number, 1, **sizes) if updates else []
            log = folder / "results" / number / "log.jsonl" if updates else None
            seconds, row.gib = run_command([*map(str, words), *more], log)
            return [seconds]

        row = Row(part, name, "", turn, 1, "starts/s", is_limit)
        rows.append(row)

    sizes = {"batch_size": config.batch_size, "lr_patch_size": config.lr_patch_size}
    training, inference = REPOSITORY / "train.py", REPOSITORY / "inference.py"
    results: list[str | Path] = ["--input", photo, "--output", folder / "ours.png", "--existing", "overwrite"]
    add("limit: Python imports torch", [python, "-c", "import torch"], is_limit=True)
    add("train.py --help", [python, training, "--help"])
    add("inference.py --help", [python, inference, "--help"])
    add("inference.py, 451x300, rcan_light_x4", [python, inference, "--model_path", released, *results])
    if importlib.util.find_spec("spandrel"):
        add("spandrel's ten lines, the same", [python, folder / "peer.py", folder / "light.pth", photo, folder / "peer.png"])
    else:
        rows.append(Row(part, "spandrel", note="not installed: pip install spandrel"))
    run_training(config, folder, "store", 1, batch_size=1, lr_patch_size=8)  # builds the store
    add(f"train.py, {config.model_arch_name}, to the log line of the first update", [], updates=True)
    return take_turns(rows, config.runs)


# Memory


def memory(config: BenchmarkConfig, folder: Path, device: torch.device) -> list[Row]:
    """Peak memory of upscaling and of an update, each in a process of its own: of the whole process, or allocated on the GPU."""
    rows = []
    for size, precision in itertools.product(config.image_sizes, config.precisions):
        row = Row("memory", f"upscale {size}", precision)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                seconds, row.gib = pool.submit(upscale_alone, config.model_arch_name, size, precision).result()
                row.seconds = [seconds]
            except BrokenProcessPool:
                row.note = "killed, as for lack of memory"
            except ValueError as error:
                row.note = str(error)
        rows.append(row)
    updates = itertools.product(config.lr_patch_sizes, config.batch_sizes, config.precisions, ("False", "True"))
    for number, (side, batch, precision, checkpointing) in enumerate(updates):
        row = Row("memory", f"update, {batch} x {side}{', checkpointing' * (checkpointing == 'True')}", precision)
        settings = {"batch_size": batch, "lr_patch_size": side, "precision": precision, "activation_checkpointing": checkpointing}
        try:
            *_, last = run_training(config, folder, f"{number}", 2, **settings)  # the second one has Adam's moments
            row.seconds, row.gib = [1 / last["time/updates_per_second"]], last["memory/peak_gib"]
        except ValueError as error:
            row.note = str(error)
        rows.append(row)
    return rows


def upscale_alone(model_arch_name: str, size: str, precision: str) -> tuple[float, float | None]:
    """Seconds and GiB."""
    device = start_runtime(alone=True).device
    torch.manual_seed(0)
    network = model.ARCHITECTURES[model_arch_name]().eval().to(device)
    width, height = map(int, size.split("x"))
    lr = make_image(height, width)
    upscale(network, lr[:32, :32], precision=precision)  # the first call is slower
    utils.reset_peak_memory(device)
    (seconds,) = timed(partial(upscale, network, lr, precision=precision), device)()
    return seconds, utils.peak_memory(device)


if __name__ == "__main__":
    run_script(main)
