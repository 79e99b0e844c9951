"""Files of weights: any known RCAN file <-> our network, and VGG19's file.

    network = weights.load("RCAN_BIX4.pt")                     # rebuilt from the file alone, in eval mode
    print(weights.describe(network))                           # layout, scale, size, range, EMA or not
    weights.export(network, "rcan_x4.pth", layout="official")  # for programs that open the official files
    weights.export_onnx(network, "rcan_x4.onnx")
    vgg19 = weights.read_vgg19()                               # for losses.PerceptualLoss

The keys alone tell which of the layouts in `layouts.py` a file has. Checkpoints, EMA copies and the prefixes of DataParallel or
torch.compile around the weights are removed.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import socket
import statistics
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
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

    The checksums in PyTorch's files are compared, which PyTorch itself does not do.

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
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN_NUMBERS), open(path, "rb") as file:
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


# NumPy's scalars, which many checkpoints hold as their best PSNR
_PLAIN_NUMBERS: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]
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
    if found := re.search(r"GLOBAL (\S+)", text):
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
        ValueError: it holds no RCAN, or any tensor is missing, unexpected, of another shape or not finite. All are listed.
    """
    found = read(path)
    with _naming(path):
        state, kind = _unwrap(found)
        network = _build(state)
    network.source = f"{path}, {network.source}, {kind}"
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
        f"{arguments['channels']} channels, {arguments['attention']} attention, {size:.2f} M parameters{trained_for}; from {network.source}"
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
    lines += [f"    new, not in the file or of another scale: {', '.join(sorted(kept))}"] if kept else []
    lines += [f"    left out of the file: {', '.join(dropped)}"] if dropped else []
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


def _unwrap(found: Any) -> tuple[State, str]:
    """The weights in a file's content, and which they are; EMA weights come before others."""
    candidates = sorted(_candidates(found), key=lambda candidate: _rank(candidate[0]))  # stable
    if not candidates:
        raise ValueError(_unknown(found))
    path, state = candidates[0]
    rivals = [".".join(other) for other, _ in candidates if _rank(other) == _rank(path)]
    if _rank(path) == _UNKNOWN and len(rivals) > 1:
        raise ValueError(f"holds several networks, {', '.join(rivals)}; save the state dict of one")
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"holds {', '.join(strange)} among its weights, which are no tensors")
    stripped, is_ema = _strip(dict(state))
    key = ".".join(path) if _rank(path) == 0 else "n_averaged"
    return stripped, f"EMA weights ({key})" if is_ema or _rank(path) == 0 else "weights as trained"


_EMA = re.compile(r"(?:^|[_.-])ema(?:$|[_.-])", re.IGNORECASE)
_KEYS = ("state_dict", "model_state_dict", "params", "model", "net", "netG", "net_g", "generator", "network")
_UNKNOWN = 3


def _rank(path: tuple[str, ...]) -> int:
    """0 for EMA weights, then those under a known key, those that are the file itself, and others."""
    if any(map(_EMA.search, path)):
        return 0
    return (1 if set(path) <= set(_KEYS) else _UNKNOWN) if path else 2


def _candidates(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping inside that names an RCAN's tensors, with the keys that lead to it."""
    if not isinstance(found, Mapping) or len(path) > 4:
        return
    tensors = {name for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if any(_MARKS.search(name) for name in tensors):
        yield path, found
        for key in {name.split(".")[0] for name in tensors}:  # several networks in one flat mapping, as netG.… and netD.…
            if key in _KEYS or _EMA.search(key):
                yield (*path, key), {name.removeprefix(f"{key}."): found[name] for name in tensors if name.startswith(f"{key}.")}
    for key, value in found.items():
        yield from _candidates(value, (*path, str(key)))


_MARKS = re.compile("|".join(rf"(?:^|\.){layout.mark}" for layout in LAYOUTS.values()))


def _unknown(found: Any) -> str:
    """What is there instead of an RCAN."""
    names = list(map(str, found)) if isinstance(found, Mapping) else [type(found).__name__]
    shown = (", ".join(names[:6]) or "nothing") + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"holds no RCAN of a known layout ({', '.join(LAYOUTS)}), but {shown}; the README lists the files that can be opened"


def _strip(state: State) -> tuple[State, bool]:
    """The state dict without prefixes of DataParallel, torch.compile, EMA wrappers and trainers, and whether it is an EMA's."""
    names = {name: _WRAPPERS.sub("", name) for name in state if name.rpartition(".")[2] != "n_averaged"}
    is_ema = len(names) < len(state)
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names.values())), None):
        names = {name: _WRAPPERS.sub("", short.removeprefix(prefix)) for name, short in names.items()}
    stripped: State = {}
    for name, short in names.items():
        if short in stripped:
            raise ValueError(f"holds {short} twice, with and without a prefix; save one network's state dict")
        stripped[short] = state[name]
    return stripped, is_ema


_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
_PREFIXES = ("netG.", "net_g.", "generator.", "model.", "net.", "network.")

# From a state dict of any layout to a network


def _build(state: Mapping[str, Tensor]) -> model.RCAN:
    layout = _recognise(state)
    size = _count(layout, state)
    names = layout.names(size)
    network = _allocate(layout, size, state, names)
    _check_tensors(network, layout, state, names)
    to_native = {theirs: ours for ours, theirs in names.items()}
    wide = {to_native.get(name, name): tensor.detach().to(torch.float64) for name, tensor in state.items()}
    converted = {name: tensor.to(torch.float32) for name, tensor in layout.to_native(wide).items()}
    _refuse(
        (f"{names.get(name, name)} is too large for float32" for name, tensor in converted.items() if not tensor.isfinite().all()), layout
    )
    network.load_state_dict(converted)
    network.arguments["mean"] = tuple(network.mean.flatten().tolist())
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()} - {"float32"})
    network.source = layout.title(state) + (f", stored as {' and '.join(stored)}" if stored else "")
    return network.eval().to(memory_format=torch.channels_last)  # as in training, so that scores agree to the last digit


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
        missing = layout.upsampler if blocks else layout.first
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
    wanted = {*layout.names(size).values(), *further}
    _refuse([f"missing {name}" for name in wanted - state.keys()] + [f"unexpected {name}" for name in state.keys() - wanted], layout)
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
        raise ValueError(f"upsampler of unknown shape, {upsampler} for {channels} channels; known are x2, x3, x4 and x8")
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
            problems.append(f"{name} is {tuple(tensor.shape)}, not {shapes[name]}")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            problems.append(f"{name} is {kind}, not dense floating point")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} is not finite")
    _refuse(problems, layout)


def _refuse(problems: Iterable[str], layout: Layout) -> None:
    if problems := sorted(problems):
        raise ValueError(
            f"{len(problems)} tensors don't fit an RCAN in the {layout.program} layout, none was loaded: {'; '.join(problems)}; "
            "choose another file, or save the whole network's state dict again"
        )
