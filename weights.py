"""Files of RCAN weights <-> our network: recognise, load exactly, export.

    network = weights.load("results/rcan_x4/best.pth.tar")     # rebuilt from the file alone, in eval mode
    weights.export(network, "rcan_x4.pth.tar")                 # the generator alone

The native layout is the one of `model.RCAN`'s own names. A file is a bare state_dict, or a checkpoint of `train.py`, whose
averaged weights (EMA) are preferred.
"""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model


def read(path: str | os.PathLike) -> Any:
    """What a file of PyTorch's holds, as plain types and tensors on the CPU; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, something else, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights; train them with train.py, or give the path of a file with --model_path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError) as error:
        reason = "it is empty" if not path.stat().st_size else str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{path}: not a file of weights that can be read safely ({reason}); copy or download it again") from None


def load(path: str | os.PathLike) -> model.RCAN:
    """The network that a file holds, rebuilt from the file alone, in eval mode; averaged weights are preferred.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no RCAN, or any tensor is missing, unexpected or of another shape. All are listed.
    """
    state, kind = _state(read(path), path)
    network = build(state, path)
    network.source = f"{path}, {kind}"
    return network


def describe(network: model.RCAN) -> str:
    """One line on what `load` found."""
    arguments = network.arguments
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return (
        f"RCAN x{network.upscale_factor}, {arguments['num_rg']} groups of {arguments['num_rcab']} blocks, "
        f"{arguments['channels']} channels, {arguments['attention']} attention, {size:.2f} M parameters; from {network.source}"
    )


def build(state: Mapping[str, Tensor], source: str | os.PathLike) -> model.RCAN:
    """A network with these weights, its size read off their names and shapes; in eval mode.

    Raises:
        ValueError: not RCAN's names, or any tensor is missing, unexpected or of another shape.
    """
    try:
        network = model.RCAN(**_arguments(state))
    except (KeyError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{source}: holds no RCAN in the native layout (conv1.…, trunk.…, upsampling.…, conv3.…): {error}") from None
    _check_keys(network, state, source)
    network.load_state_dict(state)
    return network.eval().to(memory_format=torch.channels_last)  # as in training, so that scores agree to the last digit


def transfer(network: model.RCAN, path: str | os.PathLike) -> str:
    """Start `network` from a file of weights: all of them, but for the upsampler of another scale, and what CBAM adds.

    Returns:
        Which weights were taken and which were not, a line each.

    Raises:
        ValueError: anything else doesn't fit; nothing is loaded then.
    """
    source = load(path)
    given, wanted = source.state_dict(), network.state_dict()
    new_upsampler = source.upscale_factor != network.upscale_factor

    def replaceable(name: str) -> bool:  # may stay as it was made
        return (new_upsampler and name.startswith("upsampling.")) or (name not in given and ".spatial_attention_layer." in name)

    taken = {name: tensor for name, tensor in given.items() if not replaceable(name)}
    kept = {name: tensor for name, tensor in wanted.items() if name not in taken}
    misfits = sorted(name for name in taken if not _same(taken[name], wanted.get(name)))
    misfits += sorted(name for name in kept if not replaceable(name))
    if misfits:
        raise ValueError(
            f"{path}: {len(misfits)} weights don't fit the network to train, first {misfits[0]}; "
            f"the file is {source.arguments}, the network {network.arguments}"
        )
    network.load_state_dict({**kept, **taken})
    dropped = sorted(given.keys() - taken.keys())
    lines = [f"started from {path} (x{source.upscale_factor}): {len(taken)} of its {len(given)} tensors taken, of {_summary(taken)}"]
    lines += [f"    new, not in the file or of another scale: {', '.join(sorted(kept))}"] if kept else []
    lines += [f"    left out of the file: {', '.join(dropped)}"] if dropped else []
    return "\n".join(lines)


def export(network: model.RCAN, path: str | os.PathLike, layout: str = "native") -> None:
    """Write the generator alone, as a checkpoint that `load` and `torch.load(weights_only=True)["state_dict"]` read.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; known are {', '.join(map(repr, LAYOUTS))}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    try:
        torch.save({"state_dict": state, "arguments": network.arguments}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


LAYOUTS = ("native",)


def _state(found: Any, source: str | os.PathLike) -> tuple[Mapping[str, Tensor], str]:
    """The weights in a file, and which they are: averaged ones before others, a bare state_dict last."""
    for key, kind in (("ema_state_dict", "averaged weights (EMA)"), ("state_dict", "weights as trained")):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            return found[key], kind
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        return found, "weights as trained"
    raise ValueError(f"{source}: holds no weights, but {type(found).__name__}; a state_dict or a checkpoint of train.py is needed")


def _arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """RCAN's arguments, read off the names and shapes."""
    squeeze = "trunk.0.residual_group.0.residual_channel_attention_block.3.channel_attention_layer.1.weight"
    channels = state["conv1.weight"].shape[0]
    factors = [state[name].shape[0] // channels for name in state if name.startswith("upsampling.") and name.endswith(".weight")]
    return {
        "upscale_factor": 3 if factors == [9] else 2 ** len(factors),
        "channels": channels,
        "reduction": channels // state[squeeze].shape[0],
        "num_rg": _count(state, "trunk.", 1),
        "num_rcab": _count({name: 0 for name in state if ".residual_channel_attention_block." in name}, "trunk.0.residual_group.", 3),
        "attention": "cbam" if any(".spatial_attention_layer." in name for name in state) else "channel",
        "mean": tuple(state["mean"].flatten().tolist()),
    }


def _count(state: Mapping[str, Any], prefix: str, position: int) -> int:
    return len({name.split(".")[position] for name in state if name.startswith(prefix)})


def _check_keys(network: model.RCAN, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    wanted = network.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if not _same(state[name], wanted[name])
    ]
    if problems:
        raise ValueError(f"{source}: {len(problems)} tensors don't fit {network.arguments}: {'; '.join(sorted(problems))}")


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape


def _summary(names: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
