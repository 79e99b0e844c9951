"""Files of weights: any known RCAN file <-> our network, and VGG19's file.

    network = weights.load("RCAN_BIX4.pt")                     # rebuilt from the file alone, in eval mode
    print(weights.describe(network))                           # layout, scale, size, range, EMA or not
    weights.export(network, "rcan_x4.pth", layout="official")  # for programs that open the official files
    weights.export_onnx(network, "rcan_x4.onnx")
    vgg19 = weights.read_vgg19()                               # for losses.PerceptualLoss

The keys alone tell which of the layouts in `layouts.py` a file has. Wherever the network stands in a file, and whatever its keys begin
with, it is found when all of its tensors are there and no other is among them. EMA weights come first.
"""

import argparse
import contextlib
import copy
import datetime
import errno
import functools
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import socket
import statistics
import sys
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import files
import losses
import model
from layouts import LAYOUTS, MEAN_SHIFT, NATIVE, OFFICIAL, RCAN_IT, RCAN_IT_MARKS, Layout, Size, State, pattern


def read(path: str | os.PathLike) -> Any:
    """The content of a PyTorch or safetensors file, as plain types and tensors on the CPU; no code in it is run.

    NumPy's numbers and arrays come back as Python's numbers and lists. The checksums in PyTorch's files are compared, which PyTorch
    itself does not do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, damaged, something else, or holds code.
        OSError, RuntimeError, MemoryError: it can't be read now, for lack of permission or memory.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the path of a file of weights, such as a checkpoint in it")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such weights; train them with train.py, or give the path of a file with --model_path "
            "(in training, with --pretrained_model_path or --resume)"
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # the errors below name the file
            if path.suffix == ".safetensors" or file.read(9)[8:] == b"{":  # after the header's length
                return _read_safetensors(path)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise zipfile.BadZipFile(damaged)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make readers raise nearly anything
        of_the_machine = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if isinstance(error, OSError):
            of_the_machine = error.errno not in (None, errno.EINVAL)  # in a cut file, readers seek to where nothing is (EINVAL)
        if of_the_machine:  # the file itself may be whole
            raise
        raise ValueError(f"{path}: can't be read safely as weights ({_reason(error, path)})") from None


# What trainers keep beside the weights. A file may call each of these with arguments of its own, so they only make plain values.
# NumPy's own constructors are not among them: they trust a file on how memory is laid out.


class _Dtype:
    """In place of numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.byte_order, self.code = "=", code  # such as "<" and "f8"

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def values(self, shape: tuple[int, ...], data: bytes, order: Any = "C") -> np.ndarray:
        name = f"{self.byte_order}{self.code}"
        if not re.fullmatch(r"[<>=|][biufcSU]\d+", name):  # booleans, numbers and text; no objects
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r})")  # for `_reason`
        return np.ndarray(shape, name, data, order=order)


class _Array(list):
    """In place of numpy.ndarray."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self[:] = np.atleast_1d(dtype.values(shape, data, "F" if is_fortran else "C")).tolist()


_NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")  # NumPy 2 and 1
_PATHS = {"PosixPath": PurePosixPath, "PurePosixPath": PurePosixPath, "WindowsPath": PureWindowsPath, "PureWindowsPath": PureWindowsPath}
_HARMLESS: list[Any] = [
    *(bool, int, float, str, bytes, list, tuple, dict, frozenset, range, slice),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(argparse.Namespace, types.SimpleNamespace),
    (lambda *_: {}, "collections.defaultdict"),
    (str, "torch.torch_version.TorchVersion"),
    *((kind, f"{module}.{name}") for name, kind in _PATHS.items() for module in ("pathlib", "pathlib._local")),
    *((_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray")),
    *((_Array, f"{module}._reconstruct") for module in _NUMPY),
    *((lambda dtype, data: dtype.values((), data).item(), f"{module}.scalar") for module in _NUMPY),
]
_METADATA = "rcan"  # our record in a safetensors file


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        recorded = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        return {**recorded, "state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (not a dict)


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page, which some download links give to programs; download it with a browser"
    if "TorchScript" in text:
        return "it is a TorchScript program; save its state_dict() instead"
    if found := re.search(r"(?:GLOBAL|but got|function) (<.*?>|\S+)", text):
        return f"it holds code or objects beside the weights, such as {found[1].rstrip('.,')}; save a state dict of tensors alone"
    if "Unsupported operand" in text and start.startswith(b"\x80"):
        return "it is another program's pickle, which may hold code; save a state dict with torch.save"
    if isinstance(error, safetensors.SafetensorError):
        return f"it is no whole safetensors file: {text[:160]}; copy or download it again"
    return f"it is {'damaged or cut off' if start.startswith((b'pk', bytes([128]))) else 'no PyTorch file'}; copy or download it again"


def load(path: str | os.PathLike) -> model.RCAN:
    """The network in a file, rebuilt from the file alone, in eval mode; EMA weights are preferred.

    The result takes and gives [0, 1] whatever range the file's own program works on. Its `source` is a line on what was
    recognised; its `degradation` is what it was trained for ("BI", "BD", "DN", …), or None where the file doesn't record it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no RCAN, or several, or any tensor is missing, unexpected, of another shape or not finite.
    """
    found = read(path)
    with _naming(path):
        network = _find(found)
    network.source = f"{path}, {network.source}"
    if isinstance(found, Mapping):  # our checkpoints hold the settings, our exports the degradation
        settings = found.get("config")
        recorded = found.get("degradation", settings.get("degradation") if isinstance(settings, Mapping) else None)
        network.degradation = recorded if isinstance(recorded, str) else None
    return network


def describe(network: model.RCAN) -> str:
    """One line on what `load` found."""
    arguments = network.arguments
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    trained_for = f", trained for {network.degradation}" if network.degradation else ""
    return (
        f"RCAN x{network.upscale_factor}, {arguments['num_rg']} groups of {arguments['num_rcab']} blocks, "
        f"{arguments['channels']} channels, {arguments['attention']} attention, "
        f"{'pointwise upsampler, ' if network.folds_upsampler else ''}{size:.2f} M parameters{trained_for}; from {network.source}"
    )


def build(state: Mapping[str, Tensor], source: str | os.PathLike = "these weights") -> model.RCAN:
    """A network with these weights, of any known layout; keys and shapes tell its size. In eval mode.

    Raises:
        ValueError: no known layout, or any tensor is missing, unexpected, of another shape or not finite; `source` is named.
    """
    with _naming(source):
        return _build(state)


def transfer(network: model.RCAN, path: str | os.PathLike) -> str:
    """Start `network` from a file: all weights but the upsampler of another scale, and what CBAM adds to plain RCAN.

    Returns:
        A line on what was taken, and one each on what is new in the network and what was left out of the file.

    Raises:
        ValueError: anything else doesn't fit; nothing is loaded then.
    """
    source = load(path)
    if network.folds_upsampler and not source.folds_upsampler:
        raise ValueError(f"{path}: its upsampler is not pointwise: set pointwise_upsampler=False, or choose another file")
    given, wanted = source.state_dict(), network.state_dict()

    def may_differ(name: str) -> bool:
        of_cbam = ".spatial_attention_layer." in name or (name == "cbam_average" and source.arguments["attention"] == "channel")
        of_upsampler = source.upscale_factor != network.upscale_factor and name.startswith("upsampling.")
        return of_upsampler or (name not in given and of_cbam)

    taken = {name: tensor for name, tensor in given.items() if not may_differ(name)}
    kept = {name: tensor for name, tensor in wanted.items() if name not in taken}
    misfits = sorted(name for name, tensor in taken.items() if name not in wanted or wanted[name].shape != tensor.shape)
    misfits += sorted(name for name in kept if not may_differ(name))
    if misfits:
        differences = [
            f"{name} is {source.arguments[name]!r} in the file, {value!r} in the network"
            for name, value in network.arguments.items()
            if source.arguments[name] != value and name not in ("mean", "upscale_factor")
        ]
        raise ValueError(
            f"{path}: {len(misfits)} weights don't fit the network to train, first {misfits[0]}; "
            f"{'; '.join(differences)}; set these as in the file, or choose another file"
        )
    network.load_state_dict({**kept, **taken})
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in taken))
    dropped = sorted(given.keys() - taken.keys())
    lines = [f"started from {source.source} (x{source.upscale_factor}): {len(taken)} of its {len(given)} tensors, of {parts}"]
    lines += [f"    new, not in the file or of another scale: {_listed(sorted(kept))}"] if kept else []
    lines += [f"    left out of the file: {_listed(dropped)}"] if dropped else []
    return "\n".join(lines)


# VGG19


class PublishedFile(NamedTuple):
    address: str
    sha256_prefix: str
    folder: str  # where scripts/download.py puts it

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]


VGG19 = PublishedFile("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth", "dcbb9e9d", "pretrained")
_GET_VGG19 = (
    f"put {VGG19.name} (575 MB) from {VGG19.address} into {VGG19.folder}/ (python scripts/download.py --items vgg19), "
    "or name it with vgg19_weights_path, or train without it, perceptual_weight=0"
)


def find_vgg19(path: str = "") -> Path:
    """VGG19's file: the given one, else `VGG19.folder`'s, else the one in torchvision's cache, downloaded where absent.

    Raises:
        OSError: it is absent, and the download fails.
    """
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"vgg19_weights_path={path!r}: no such file; {_GET_VGG19}")
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG19.name
    for present in (Path(VGG19.folder) / VGG19.name, cached):
        if present.is_file():
            return present
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading VGG19 (575 MB) from {VGG19.address} to {cached}", file=sys.stderr)
        patience, before = 30.0, socket.getdefaulttimeout()  # seconds without a byte; torch.hub sets no limit
        socket.setdefaulttimeout(patience)
        try:
            torch.hub.download_url_to_file(VGG19.address, str(cached), hash_prefix=VGG19.sha256_prefix)
        finally:
            socket.setdefaulttimeout(before)
    except (OSError, RuntimeError, HTTPException) as error:  # no network; another file; a proxy's answer
        raise OSError(f"VGG19's weights are absent and could not be downloaded ({error}): {_GET_VGG19}") from None
    return cached


def read_vgg19(path: str = "") -> State:
    """VGG19's convolutions, "features.0.weight" …, in fp32 on the CPU; "random": never trained, always the same, for tests only.

    Raises:
        OSError: the file is absent, and the download fails.
        ValueError: the file is damaged or something else.
    """
    if path == "random":
        return dict(_random_vgg19())
    file = find_vgg19(path)
    try:
        state = read(file)
    except ValueError as error:
        raise ValueError(f"{error}; {_GET_VGG19}") from None
    promised = re.search(r"-([0-9a-f]{8})\.pth$", file.name)  # torchvision's names end in the beginning of the sha256
    digest = hashlib.sha256(np.memmap(file, mode="r").data).hexdigest() if promised else ""
    if promised and not digest.startswith(promised[1]):
        raise ValueError(f"{file}: is damaged, as its sha256 begins with {digest[:8]} and not {promised[1]}; {_GET_VGG19}")
    found = {name: state.get(name) if isinstance(state, Mapping) else None for name in losses.VGG19_SHAPES}
    misfits = [name for name, tensor in found.items() if getattr(tensor, "shape", None) != losses.VGG19_SHAPES[name]]
    if misfits:
        raise ValueError(
            f"{file}: these are not VGG19's weights, {len(misfits)} are absent or of another shape, first {misfits[0]}; {_GET_VGG19}"
        )
    return {name: tensor.detach().float() for name, tensor in found.items() if isinstance(tensor, Tensor)}


@functools.cache
def _random_vgg19() -> State:
    """Kaiming's normal initialisation, so that deep features don't vanish."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / (shape[1] * 9)) ** 0.5 if len(shape) == 4 else torch.zeros(shape)
        for name, shape in losses.VGG19_SHAPES.items()
    }


# Export


def export(network: model.RCAN, path: str | os.PathLike, layout: str = "native") -> None:
    """Write the generator alone, in the format of the path's ending: .pth.tar, .pth, .pt, or .safetensors.

    "native" is a checkpoint {"state_dict", "arguments", "degradation"}. "official" is a bare state dict on [0, 255], which the
    official code, EDSR-PyTorch, torchSR and spandrel (so chaiNNer and ComfyUI) open; "basicsr" is {"params": state dict}. A round
    trip returns every value, except for the last bit of about 1 % of those in the first and the last convolution.

    Raises:
        ValueError: an unknown layout or ending, or a network that the layout can't describe; nothing is written then.
    """
    path = Path(path)
    writable = [name for name, known in LAYOUTS.items() if known.from_native]
    if layout not in writable:
        raise ValueError(f"layout={layout!r} is unknown; known are {', '.join(map(repr, writable))}")
    check_ending(path, layout)
    state = _to_layout(network, LAYOUTS[layout])
    recorded = {"arguments": network.arguments, "degradation": network.degradation}
    if path.suffix == ".safetensors":
        files.write_whole(path, safetensors.torch.save(state, {"format": "pt", _METADATA: json.dumps(recorded)}))
    else:
        buffer = io.BytesIO()
        torch.save({"native": {"state_dict": state, **recorded}, "basicsr": {"params": state}}.get(layout, state), buffer)
        files.write_whole(path, buffer.getbuffer())


_STATE_DICTS = (".pth", ".pt", ".safetensors")
_ENDINGS = {"native": (".pth.tar", *_STATE_DICTS), "official": _STATE_DICTS, "basicsr": _STATE_DICTS, "onnx": (".onnx",)}


def check_ending(path: str | os.PathLike, layout: str) -> None:
    """Refuse a path that does not end as files in the layout do, with a ValueError."""
    endings = _ENDINGS[layout]
    if not Path(path).name.endswith(endings):
        raise ValueError(f"{path}: unknown ending; files in the {layout} layout end in {', '.join(endings)}")


def _to_layout(network: model.RCAN, layout: Layout) -> State:
    arguments = network.arguments
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    if layout is NATIVE:
        return state
    if arguments["attention"] != "channel" or network.marks():
        kind = f"{arguments['attention']} attention and {arguments['activation']}"
        raise ValueError(f"layout={layout.program!r} only describes the paper's network, not one with {kind}: use 'native' or 'onnx'")
    names = layout.names(Size(arguments["num_rg"], arguments["num_rcab"], len(network.upsampling), cbam=False))
    wide = {name: tensor.to(torch.float64) if name.startswith("conv") else tensor for name, tensor in state.items()}
    assert layout.from_native is not None
    return {names.get(name, name): tensor.to(torch.float32).contiguous() for name, tensor in layout.from_native(wide).items()}


def export_onnx(network: model.RCAN, path: str | os.PathLike) -> None:
    """Write an ONNX file: `lr` (N, 3, h, w) -> `sr` (N, 3, scale h, scale w), float32 RGB in [0, 1], with N, h and w free.

    The file's metadata says so too, with the scale, what the weights were trained for and the network's arguments as JSON. Opset
    18, or 17 with PyTorch before 2.9. Needs the packages onnx and onnxscript.

    Raises:
        ValueError: these are missing, or another ending than .onnx; nothing is written then.
    """
    path = Path(path)
    check_ending(path, "onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import onnx

    metadata = {
        "upscale_factor": str(network.upscale_factor),
        "input": "lr",
        "output": "sr",
        "layout": "NCHW",
        "colour_order": "RGB",
        "value_range": "[0, 1]",
        "degradation": network.degradation or "unknown",
        "arguments": json.dumps(network.arguments),
    }
    plain = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    free = {0: "batch", 2: "height", 3: "width"}
    options: dict[str, Any] = {"input_names": ["lr"], "output_names": ["sr"]}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9):
        dimensions = {axis: torch.export.Dim(name) for axis, name in free.items()}
        options |= {"dynamo": True, "opset_version": 18, "dynamic_shapes": (dimensions,), "external_data": False}
    else:  # whose new exporter fails on this network
        options |= {"dynamo": False, "opset_version": 17, "dynamic_axes": {"lr": free, "sr": free}}
    with files.replacing(path) as part, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(plain, (torch.rand(2, 3, 12, 10),), str(part), **options)
        exported = onnx.load(part)
        for node in exported.graph.node:
            node.ClearField("metadata_props")  # stack traces, with this machine's paths
        onnx.helper.set_model_props(exported, metadata)
        onnx.save(exported, part)


# The weights in a file


@contextlib.contextmanager
def _naming(source: str | os.PathLike) -> Iterator[None]:
    """Put the file's name before what is wrong with its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


class _Family(NamedTuple):
    """Entries of one mapping that may be a network's: those whose names begin with the same prefix."""

    key: str  # where they stand in the file, with the prefix; empty for the file itself
    ema: str  # the key that shows that they are EMA weights; empty where none does
    state: State  # without the prefix
    beside: list[str]  # the mapping's other entries, as far as their names tell


def _find(found: Any) -> model.RCAN:
    """The network in a file's content: the family that a layout fits exactly.

    Where there are EMA weights, no others are taken, even if the EMA weights fit no layout. Networks that differ are refused.
    """
    families = list(_families(found))
    if not families:
        raise ValueError(_unknown(found))
    fitting: list[tuple[_Family, model.RCAN]] = []
    errors: dict[int, str] = {}
    for family in [family for family in families if family.ema] or families:
        try:
            fitting.append((family, _build(family.state)))
        except ValueError as error:
            errors.setdefault(len(family.state), f"{family.key}: {error}".removeprefix(": "))
    if not fitting:
        raise ValueError(errors[max(errors)])  # the largest is most likely the one that was meant
    (chosen, network), *others = fitting
    if not all(_equal(network, other) for _, other in others):
        keys = [family.key or "the file itself" for family, _ in fitting]
        raise ValueError(f"holds several networks, {_listed(keys)}; save the state dict of one")
    network.source += f", EMA weights ({chosen.ema})" if chosen.ema else ", weights as trained"
    network.source += f", without {_listed(chosen.beside)}" if chosen.beside else ""
    return network


def _families(found: Any, path: tuple[str, ...] = ()) -> Iterator[_Family]:
    """A family for every prefix before a layout's mark, in every mapping and list inside; an entry belongs to its longest prefix."""
    inside = found.items() if isinstance(found, Mapping) else enumerate(found) if isinstance(found, list | tuple) else ()
    entries = {str(key): value for key, value in inside}
    counters = {name for name in entries if name.rpartition(".")[2] == "n_averaged"}
    averages = tuple(counter.removesuffix("n_averaged") + "module." for counter in counters)  # AveragedModel's
    of_networks = (name for name, value in entries.items() if name not in counters and (isinstance(value, Tensor) or "." in name))
    names = {name: _WRAPPERS.sub("", name) for name in of_networks}
    marks = [_MARKS.search(short) for name, short in names.items() if isinstance(entries[name], Tensor)]
    prefixes = list(dict.fromkeys(mark.string[: mark.start()] for mark in marks if mark))
    for prefix in prefixes:
        longer = tuple(other for other in prefixes if len(other) > len(prefix))
        state: State = {}
        beside: dict[str, None] = {}
        for name, short in names.items():
            if short.startswith(prefix) and not short.startswith(longer):
                cut = short.removeprefix(prefix)
                state[name if cut in state else cut] = entries[name]  # the second of a name is refused as unexpected
            else:
                beside[".".join(short.split(".")[: prefix.count(".") or 1])] = None
        key = ".".join(filter(None, (*path, prefix.removesuffix("."))))
        is_average = any(name.startswith(averages) and short.startswith(prefix) for name, short in names.items())
        yield _Family(key, key if _EMA.search(key) else "n_averaged" if is_average else "", state, list(beside))
    if len(path) < 4:  # a file may hold itself
        for name, value in entries.items():
            yield from _families(value, (*path, name))


_EMA = re.compile(r"(?:^|[_.-])ema(?:$|[_.-])", re.IGNORECASE)
_MARKS = re.compile("|".join(rf"(?:^|(?<=\.)){layout.mark}" for layout in LAYOUTS.values()))
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _equal(first: model.RCAN, second: model.RCAN) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _listed(names: Iterable[str]) -> str:
    """At most ten names, and how many more there are."""
    first, more = (names := list(names))[:10], len(names) - 10
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _unknown(found: Any) -> str:
    """What is there instead of an RCAN."""
    names = list(map(str, found)) if isinstance(found, Mapping) else [type(found).__name__]
    return (
        f"holds no RCAN of a known layout ({', '.join(LAYOUTS)}), but {_listed(names) or 'nothing'}; "
        "the README lists the files that can be opened"
    )


# From a state dict of any layout to a network


def _build(state: Mapping[str, Tensor]) -> model.RCAN:
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"holds {_listed(strange)} among its weights, which are no tensors")
    quantised = [name for name, tensor in state.items() if tensor.dtype in _QUANTISED]
    if any(map(_MARKS.match, quantised)):  # not just a random number generator's state
        kind = str(state[quantised[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"holds quantised weights ({len(quantised)} tensors are {kind}, first {quantised[0]}); "
            "take the file from before they were quantised, in fp32, bf16 or fp16"
        )
    layout = _recognise(state)
    size = _count(layout, state)
    names = layout.names(size)
    network = _allocate(layout, size, state, names)
    _check_tensors(network, layout, state, names)
    to_native = {theirs: ours for ours, theirs in names.items()}
    wide = {to_native.get(name, name): tensor.detach().to(torch.float64) for name, tensor in state.items()}
    converted = {name: tensor.to(torch.float32) for name, tensor in layout.to_native(wide).items()}
    _refuse([("too large for float32", names.get(name, name)) for name, tensor in converted.items() if not tensor.isfinite().all()], layout)
    network.load_state_dict(converted)
    network.arguments["mean"] = tuple(network.mean.flatten().tolist())
    network.folds_upsampler = network.has_pointwise_upsampler()
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()} - {"float32"})
    network.source = layout.title(state) + (f", stored as {' and '.join(stored)}" if stored else "")
    return network.eval().to(memory_format=torch.channels_last)  # as in training, so that scores agree to the last digit


_QUANTISED = (torch.int8, torch.uint8, torch.qint8, torch.quint8)


def _recognise(state: Mapping[str, Tensor]) -> Layout:
    if "head.1.weight" in state:
        raise ValueError("an RCAN that first folds pixels into channels (head.1, traiNNer's unshuffle), which is another network")
    fitting = [layout for layout in LAYOUTS.values() if any(re.match(layout.mark, name) for name in state)]
    if len(fitting) != 1:
        raise ValueError(_unknown(state))
    return fitting[0]


def _count(layout: Layout, state: Mapping[str, Tensor]) -> Size:
    """The size that the keys show, of a state dict that has just the keys of that size."""

    def numbers(template: str) -> list[tuple[int, ...]]:
        found = (re.fullmatch(pattern(template) + r"\.weight", name) for name in state)
        return [tuple(map(int, each.groups())) for each in found if each]

    blocks, upsamplers = numbers(layout.first), len(numbers(layout.upsampler))
    if not blocks or not upsamplers:
        missing = (layout.upsampler if blocks else layout.first).format(g=0, b=0, u=0)
        raise ValueError(f"holds no whole RCAN in the {layout.program} layout: no {missing}.weight is in it")
    groups, rows = 1 + max(g for g, _ in blocks), 1 + max(b for _, b in blocks)
    if groups * rows > len(state):  # don't list millions of missing tensors
        raise ValueError(f"its names count up to {groups} groups of {rows} blocks, but it holds {len(state)} tensors only")
    size = Size(groups, rows, upsamplers, bool(layout.spatial and numbers(layout.spatial)))
    further: Iterable[str] = ()  # beside convolutions
    if layout is NATIVE:
        further = ("mean", *(mark for mark in model.MARKS if mark in state))
    elif layout is RCAN_IT or (layout is OFFICIAL and any(name in state for name in MEAN_SHIFT)):  # traiNNer writes none
        further = MEAN_SHIFT
    wanted = dict.fromkeys([*layout.names(size).values(), *further])
    _refuse(
        [("missing", name) for name in wanted if name not in state] + [("unexpected", name) for name in state if name not in wanted],
        layout,
    )
    return size


def _allocate(layout: Layout, size: Size, state: Mapping[str, Tensor], names: Mapping[str, str]) -> model.RCAN:
    """A network of the size that most shapes show, so that a single tensor of another shape is named rather than all others."""
    rows = {ours.removesuffix(".weight"): (state[theirs].shape or (0,))[0] for ours, theirs in names.items() if ours.endswith(".weight")}

    def usual(*templates: str) -> int:
        known = re.compile("|".join(map(pattern, templates)))
        return max(1, statistics.mode(count for name, count in rows.items() if known.fullmatch(name)))

    channels, squeezed = usual("conv1", "conv2", NATIVE.first), usual(NATIVE.squeeze)
    upsampler = {names[f"{name}.weight"]: rows[name] for name in (NATIVE.upsampler.format(u=u) for u in range(size.upsamplers))}
    scale = _SCALES.get(tuple(count / channels for count in upsampler.values()))
    if scale is None:
        shown = _listed(f"{name} with {count}" for name, count in upsampler.items())
        raise ValueError(f"upsampler of unknown shape, {shown} for {channels} channels; known are x2, x3, x4 and x8")
    marks = RCAN_IT_MARKS if layout is RCAN_IT else model.MARKS.keys() & state.keys()
    arguments: dict[str, Any] = {"attention": "cbam" if size.cbam else "channel", **dict(model.MARKS[mark] for mark in marks)}
    return model.RCAN(scale, channels, channels // min(squeezed, channels), size.groups, size.blocks, **arguments)


_SCALES: dict[tuple[float, ...], int] = {(4,): 2, (9,): 3, (4, 4): 4, (4, 4, 4): 8}


def _check_tensors(network: model.RCAN, layout: Layout, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    ours = network.state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in names.items()}
    shapes |= {name: (3,) if name.endswith(".bias") else (3, 3, 1, 1) for name in MEAN_SHIFT}
    shapes |= {name: tuple(ours[name].shape) for name in ("mean", *network.marks())}
    problems = []
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            problems.append((f"{tuple(tensor.shape)}, not {shapes[name]}", name))
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            problems.append((f"{kind}, not dense floating point", name))
        elif not tensor.to(torch.float64).isfinite().all():  # fp8 itself can't say
            problems.append(("not finite", name))
    _refuse(problems, layout)


def _refuse(problems: list[tuple[str, str]], layout: Layout) -> None:
    """Raise if there are any: (what is wrong, the tensor's name). Up to ten are named, of more the first of each kind."""
    kinds: dict[str, list[str]] = {}
    for kind, name in problems:
        kinds.setdefault(kind, []).append(name)
    if problems:
        phrases = [
            f"{kind}: {', '.join(names) if len(problems) <= 10 else f'{len(names)}, first {names[0]}'}" for kind, names in kinds.items()
        ]
        more = f" and {len(phrases) - 10} other misfits" if len(phrases) > 10 else ""
        raise ValueError(
            f"{len({name for _, name in problems})} tensors don't fit an RCAN in the {layout.program} layout, none was loaded: "
            f"{'; '.join(phrases[:10])}{more}; choose another file, or save the whole network's state dict again"
        )
