"""Write weights for other programs:

    python scripts/export.py --model_path results/rcan_x4/best.pth.tar --layout official --output rcan_x4.pth      # chaiNNer, ComfyUI
    python scripts/export.py --model_path results/rcan_x4/best.pth.tar --layout onnx --output rcan_x4.onnx

The exported file is loaded again and compared with the network before it takes its place.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

import files
import model
import weights
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model_path: str  # weights of any known layout
    layout: Literal["official", "basicsr", "native", "onnx"]  # the names and the value range of the exported file
    output: str  # the file to write: .pth, .pt or .safetensors; also .pth.tar for native; .onnx for onnx
    overwrite: bool = False  # replace an existing file


ALLOWED = {"onnx": 1e-4}  # largest difference between the outputs of both, on [0, 1]
SIZES = ((1, 3, 24, 31), (2, 3, 17, 16), (1, 3, 48, 20))  # (N, C, h, w) of the compared inputs; the exporter has seen none of them


def main(argv: Sequence[str] | None = None) -> None:
    """Export a file of weights and compare the result with the network."""
    config = tyro.cli(ExportConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    output = Path(config.output)
    weights.check_ending(output, config.layout)
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output}: already there; choose another --output, or set --overwrite True")
    if output.exists() and output.samefile(config.model_path):
        raise ValueError(f"{output}: is the input file, and may hold more than its weights; choose another --output")
    network = weights.load(config.model_path)
    print(weights.describe(network))
    with tempfile.TemporaryDirectory() as folder:  # a file that differs never reaches the output
        trial = Path(folder) / output.name
        if config.layout == "onnx":
            weights.export_onnx(network, trial)
        else:
            weights.export(network, trial, config.layout)
        difference = largest_difference(network, trial)
        if difference is not None and difference > (allowed := ALLOWED.get(config.layout, 1e-5)):
            raise ValueError(f"{output}: not written, as its output differs by {difference:.1e} of the range, over {allowed}; report this")
        files.write_whole(output, trial.read_bytes())
    compared = "not compared, as onnxruntime is missing" if difference is None else f"differs by at most {difference:.1e} of the range"
    print(f"{output.absolute()}: {config.layout} layout, {output.stat().st_size / 1e6:.2f} MB; {compared}")


@torch.inference_mode()
def largest_difference(network: model.RCAN, path: Path) -> float | None:
    """Largest difference between the outputs of a network and of an exported file, on [0, 1]; None for ONNX without onnxruntime."""
    inputs = [torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in SIZES]
    if not path.name.endswith(".onnx"):
        other = weights.load(path)
        return max(float((network(x) - other(x)).abs().max()) for x in inputs)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return max(float(np.abs(network(x).numpy() - session.run(["sr"], {"lr": x.numpy()})[0]).max()) for x in inputs)


if __name__ == "__main__":
    run_script(main)
