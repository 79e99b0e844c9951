"""Write weights for other programs:

    python scripts/export.py --model_path results/rcan_x4/best.pth.tar --layout official --output rcan_x4.pth      # chaiNNer, ComfyUI
    python scripts/export.py --model_path results/rcan_x4/best.pth.tar --layout onnx --output rcan_x4.onnx

The file is read back and compared before success is reported.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import weights
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model_path: str  # weights of any known layout
    layout: Literal["official", "basicsr", "native", "onnx"]  # whose names and range the file is to have
    output: str  # the file to write: .pth, .pt or .safetensors; also .pth.tar for native; .onnx for onnx
    overwrite: bool = False  # whether an existing file may be replaced


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a file of weights, and check the result against the network that was read."""
    config = tyro.cli(ExportConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output}: already there; choose another --output, or set --overwrite True")
    if output.exists() and output.samefile(config.model_path):
        raise ValueError(f"{output}: is the file that is read, and may hold more than its weights; choose another --output")
    network = weights.load(config.model_path)
    print(weights.describe(network))
    part = output.with_name(f".{os.getpid()}.unchecked.{output.name}")
    try:
        difference = export_and_compare(network, part, config.layout)
        if difference is not None and difference > (allowed := 1e-4 if config.layout == "onnx" else 1e-5):
            raise ValueError(
                f"{output}: not written, as it would differ by {difference:.1e} of the range, over {allowed}; please report this"
            )
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    compared = "not compared, as onnxruntime is missing" if difference is None else f"differs by at most {difference:.1e} of the range"
    print(f"{output.absolute()}: {config.layout} layout, {output.stat().st_size / 1e6:.2f} MB; {compared}")


def export_and_compare(network: model.RCAN, path: Path, layout: str) -> float | None:
    """Write the file, read it back, and return the largest difference between the pictures of both; None if it can't be known."""
    if layout == "onnx":
        weights.export_onnx(network, path)
        return onnx_difference(network, path)
    weights.export(network, path, layout)
    return torch_difference(network, weights.load(path))


SIZES = ((1, 3, 24, 31), (2, 3, 17, 16), (1, 3, 48, 20))  # (N, C, h, w), none of which the exporter has seen


@torch.inference_mode()
def torch_difference(network: model.RCAN, other: model.RCAN) -> float:
    """Largest difference between the pictures of two networks, for inputs in [0, 1]."""
    return max(float((network(x) - other(x)).abs().max()) for x in map(_noise, SIZES))


@torch.inference_mode()
def onnx_difference(network: model.RCAN, path: Path) -> float | None:
    """Largest difference between a network's pictures and those of an ONNX file in onnxruntime; None without that package."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pairs = ((network(x).numpy(), session.run(["sr"], {"lr": x.numpy()})[0]) for x in map(_noise, SIZES))
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    run_script(main)
