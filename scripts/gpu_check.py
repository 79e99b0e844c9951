"""What to run first on any GPU: everything here that no CPU can prove, and the benchmark, in under ten minutes.

    python scripts/gpu_check.py                                # writes results/gpu_check.md
    python scripts/gpu_check.py --only graph profile           # some of the checks

Each check runs in a process of its own, with a time limit, so one that fails, hangs or breaks CUDA does not end the others. The
report holds what each has printed. Please send it with a question about a GPU. `--device cpu` tries the checks themselves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

import files
import graphs
import model
import utils
import weights
from config import Config
from reports import markdown_table, provenance
from runtime import Runtime, run_script, start_runtime
from train import PixelStep
from upscaling import upscale

HOME = Path(__file__).resolve().parent.parent
TINY = {"model_arch_name": "rcan_light_x2", "upscale_factor": 2, "channels": 16, "reduction": 4, "num_rg": 2, "num_rcab": 2}
SECONDS = 600  # for all checks together
NOT_REACHED = "not reached"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    only: tuple[str, ...] = ()  # run these checks; empty: all
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: to try the checks themselves
    output: str = "results/gpu_check.md"  # write the report here
    here: bool = False  # run one check in this process, without a report


def main(argv: Sequence[str] | None = None) -> None:
    """Run the checks one after the other, print and write what each has found."""
    config = tyro.cli(CheckConfig, args=argv, use_underscores=True)
    if unknown := sorted(set(config.only) - CHECKS.keys()):
        raise ValueError(f"only={unknown[0]!r} is unknown; known are {', '.join(CHECKS)}")
    if config.device == "cpu" and (unfit := [name for name in config.only if CHECKS[name].needs_gpu]):
        raise ValueError(f"only={unfit[0]!r} needs a GPU; leave it out")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no GPU that it can use; python scripts/doctor.py says more")
    if config.here:
        device = torch.device(config.device)
        start_runtime(alone=True)  # sets cuDNN and TF32 as training does
        for name in config.only:
            CHECKS[name].run(device)
        return
    files.check_folder(Path(config.output).parent)
    end, rows, details = time.monotonic() + SECONDS, [["check", "result", "seconds"]], []
    facts = "\n".join(f"- {name}: {value}" for name, value in provenance().items())
    for name in config.only or [name for name, check in CHECKS.items() if config.device == "cuda" or not check.needs_gpu]:
        start = time.monotonic()
        limit = min(CHECKS[name].seconds, end - start)
        result, said = NOT_REACHED, ""
        if limit > 5:
            result, said = _in_a_process(name, config.device, limit)
        rows.append([name, result, f"{time.monotonic() - start:.0f}"])
        details.append(f"## {name}: {result}\n\n{CHECKS[name].run.__doc__}\n\n```\n{said.strip()[-3000:]}\n```\n")
        files.write_text(Path(config.output), f"# GPU check\n\n{facts}\n\n{markdown_table(rows)}\n\n" + "\n".join(details))
        print(f"{name}: {result}\n{said.strip()[-1000:]}\n", flush=True)
    print(f"{Path(config.output).absolute()}")
    if late := [name for name, result, _ in rows[1:] if result == NOT_REACHED]:
        print(f"not reached within {SECONDS} s; run them alone: --only {' '.join(late)}")
    if bad := [name for name, result, _ in rows[1:] if result not in ("passed", NOT_REACHED)]:
        raise ValueError(f"{len(bad)} of {len(rows) - 1} checks did not pass: {', '.join(bad)}")


def _in_a_process(name: str, device: str, limit: float) -> tuple[str, str]:
    command = [sys.executable, __file__, "--here", "--device", device, "--only", name]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        # A session of its own, so that the processes which the check has started end with it
        process = subprocess.Popen(command, cwd=HOME, stdout=said, stderr=subprocess.STDOUT, start_new_session=os.name == "posix")
        try:
            code = process.wait(limit)
            result = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s"
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        said.seek(0)
        return result, said.read()


def _run(*command: str, **variables: str) -> None:
    """A command of this repository, whose failure is ours."""
    print("$", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=HOME, env={**os.environ, **variables}, check=True)


# The checks


def device_and_precisions(device: torch.device) -> None:
    """A convolution and its gradient in each precision."""
    if device.type == "cuda":
        print(torch.cuda.get_device_properties(device), torch.cuda.get_arch_list(), f"CUDA {torch.version.cuda}")
    for name, dtype in utils.PRECISIONS.items():
        x = torch.rand(2, 8, 16, 16, device=device, dtype=dtype, requires_grad=True)
        torch.nn.Conv2d(8, 8, 3, padding=1, device=device, dtype=dtype)(x).sum().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all()), name


def doctor(_: torch.device) -> None:
    """scripts/doctor.py."""
    _run("scripts/doctor.py")


def tests(_: torch.device) -> None:
    """The fast tests."""
    _run("-m", "pytest", "-q", "-n", "4")


def waiting(device: torch.device) -> None:
    """No update waits for the device, with any precision, layout, accumulation or recomputation."""
    for precision in ("fp32", "bf16", *(["fp16"] if device.type == "cuda" else [])):
        for changes in ({}, {"channels_last": False}, {"accumulation_steps": 2}, {"activation_checkpointing": True}, {"optimizer": "muon"}):
            step, ema = _step(device, precision, **changes)
            batches = [_batch(device, number) for number in range(23)]
            for number, batch in enumerate(batches):
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
                terms = step(*batch)
                ema.update(step.generator, number + 1, terms["optimizer/skipped"])
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            step.check()


def skipping(device: torch.device) -> None:
    """A batch of NaN changes neither weights nor moments, with Adam and Muon."""
    for optimizer in ("adam", "muon"):
        for precision in ("fp32", "bf16", *(["fp16"] if device.type == "cuda" else [])):
            step, _ = _step(device, precision, optimizer=optimizer)
            for number in range(3):
                step(*_batch(device, number))
            before = _state(step)
            lr, gt = _batch(device, 3)
            assert step(lr * math.nan, gt)["optimizer/skipped"] == 1
            assert not _differences(before, _state(step)), (optimizer, precision)


def resuming(device: torch.device) -> None:
    """A run that stops and goes on ends as the run that does not stop; it also goes on on the CPU, and in another layout."""
    with tempfile.TemporaryDirectory() as folder:
        for name, updates in (("whole", (8,)), ("parted", (4, 8))):
            for number in updates:
                _train(folder, name, number, device)
        whole, parted = (weights.read(Path(folder) / name / "last.pth.tar") for name in ("whole", "parted"))
        different = [name for name in whole["state_dict"] if not torch.equal(whole["state_dict"][name], parted["state_dict"][name])]
        print(f"{len(different)} of {len(whole['state_dict'])} tensors differ after a resume")
        _train(folder, "parted", 10, torch.device("cpu"))
        _train(folder, "parted", 12, device, "--channels_last", "False")
        assert not different, different[:3]


def kills(_: torch.device) -> None:
    """Killed runs end as the run that nobody killed."""
    _run("-m", "pytest", "-q", "-m", "", "tests/test_kills.py", "--kills", "2", RCAN_KILLS_ON="0")


def repeating(device: torch.device) -> None:
    """Two runs of 20 updates in bf16 are equal, bit for bit; compiled, differences are counted."""
    for compiled in (False, True) if device.type == "cuda" else (False,):
        states = []
        for _ in range(2):
            step, _ = _step(device, "bf16", compile=compiled)
            for number in range(20):
                step(*_batch(device, number))
            states.append(_state(step))
        different = _differences(*states)
        print(f"compile={compiled}: {len(different)} of {len(states[0])} tensors differ")
        assert compiled or not different


def memory(device: torch.device) -> None:
    """A 1080p image in a twentieth of the memory, and in all of it, is the same."""
    network = model.rcan_light_x4().eval().to(device)
    lr = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    expected = upscale(network, lr)
    torch.cuda.set_per_process_memory_fraction(0.05)
    off = abs(upscale(network, lr).astype(np.int16) - expected)
    print(f"{np.mean(off > 0):.4%} of the values differ, by up to {off.max()}")
    assert off.max() <= 1


def processes(device: torch.device) -> None:
    """torchrun with two processes, on one card where there is no second."""
    with tempfile.TemporaryDirectory() as folder:
        _train(folder, "two", 6, device, launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2"))


def profile(device: torch.device) -> None:
    """Launches, and the time of GPU and CPU, of an update of the full network."""
    torch.cuda.synchronize()
    for precision, channels_last in (("bf16", True), ("fp32", True), ("fp32", False)):
        step, _ = _step(device, precision, **FULL, channels_last=channels_last)
        print(f"{precision}, channels_last={channels_last}: {_milliseconds(step, device, 20):.1f} ms an update")
        with torch.profiler.profile() as found:
            step(*_batch(device, 0, **FULL_BATCH))
            torch.cuda.synchronize()
        events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        print(f"    {len(events)} kernels and copies, {sum(event.device_time_total for event in events) / 1e3:.1f} ms on the GPU")


def graph(device: torch.device) -> None:
    """50 updates by a CUDA graph equal plain ones, bit for bit; and how fast both are."""
    for precision in ("fp32", "bf16", *(["fp16"] if device.type == "cuda" else [])):
        plain, _ = _step(device, precision, accumulation_steps=2)
        graphed, _ = _step(device, precision, accumulation_steps=2)
        _use_graph(graphed, device)
        for number in range(50):
            plain(*_batch(device, number))
            graphed(*_batch(device, number))
        assert graphed.graph, "the graph was not used"
        different = _differences(_state(plain), _state(graphed))
        print(f"{precision}: {len(different)} tensors differ")
        assert not different, different[:3]
    if device.type == "cuda":
        for compiled in (False, True):
            for with_graph in (False, True):
                step, _ = _step(device, "bf16", **FULL, compile=compiled)
                if with_graph:
                    _use_graph(step, device)
                print(
                    f"rcan_x4, bf16, compile={compiled}, graph={with_graph}: {_milliseconds(step, device, 20):.1f} ms an update", flush=True
                )


def benchmark(_: torch.device) -> None:
    """scripts/benchmark.py: upscaling and training of the full network."""
    _run("scripts/benchmark.py", "--parts", "forward", "train", "--model_arch_name", "rcan_x4", "--runs", "3")


class Check(NamedTuple):
    run: Callable[[torch.device], None]
    seconds: float  # at most
    needs_gpu: bool = False


CHECKS = {
    "device": Check(device_and_precisions, 60), "doctor": Check(doctor, 60), "waiting": Check(waiting, 60),
    "skipping": Check(skipping, 60), "graph": Check(graph, 120), "repeating": Check(repeating, 90), "resuming": Check(resuming, 90),
    "memory": Check(memory, 60, needs_gpu=True),
    "processes": Check(processes, 60), "profile": Check(profile, 60, needs_gpu=True), "benchmark": Check(benchmark, 120),
    "tests": Check(tests, 120), "kills": Check(kills, 120),
}  # fmt: skip


# What they share

FULL: dict[str, Any] = {**dict.fromkeys(TINY), "model_arch_name": "rcan_x4", "upscale_factor": 4}
FULL_BATCH = {"count": 16, "side": 48, "scale": 4}


def _step(device: torch.device, precision: str, **changes: Any) -> tuple[PixelStep, utils.EMA]:
    torch.manual_seed(0)
    settings = {**TINY, "learning_rate": 1e-3, **changes}
    step = PixelStep(Config(**settings), Runtime(device), precision)
    return step, utils.EMA(step.generator, 0.999)


def _batch(device: torch.device, number: int, count: int = 4, side: int = 16, scale: int = 2) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    lr, gt = (torch.rand(count, 3, size, size, generator=random).to(device) for size in (side, scale * side))
    return lr.to(memory_format=torch.channels_last), gt.to(memory_format=torch.channels_last)


def _state(step: PixelStep) -> dict[str, Tensor]:
    moments = {f"{index} {name}": value for index, part in enumerate(step.optimizer.state.values()) for name, value in part.items()}
    return {name: tensor.clone() for name, tensor in {**step.generator.state_dict(), **moments}.items()}


def _differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def _use_graph(step: PixelStep, device: torch.device) -> None:
    record = None if device.type == "cuda" else lambda work: work
    step.graph = graphs.GraphedGradients(step.generator, step.criterion, step.scaler, step.dtype, step.config.accumulation_steps, record)


def _milliseconds(step: PixelStep, device: torch.device, updates: int) -> float:
    images = _batch(device, 0, **FULL_BATCH)
    for number in range(updates + 5):
        if number == 5:
            torch.cuda.synchronize()
            start = time.perf_counter()
        step(*images)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / updates * 1e3


def _train(folder: str, name: str, updates: int, device: torch.device, *more: str, launcher: Sequence[str] = ()) -> None:
    """A small run on scikit-image's photographs, up to this update; the learning rate does not depend on the end."""
    data = Path(folder) / "data"
    if not data.exists():
        _run("scripts/demo_data.py", "--output", str(data))
    settings = {
        **TINY, "train_sets": "DemoTrain", "valid_sets": "DemoTest", "small_images": "skip", "data_root": str(data), "batch_size": 4,
        "cache_dir": f"{folder}/cache", "results_dir": folder, "exp_name": name, "epochs": updates, "steps_per_epoch": 1,
        "lr_patch_size": 16, "precision": "bf16", "eval_every": 1000, "save_every": 1000, "learning_rate": 1e-3,
    }  # fmt: skip
    variables = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    _run(*launcher, "train.py", *(f"--{key}={value}" for key, value in settings.items()), *more, **variables)


if __name__ == "__main__":
    run_script(main)
