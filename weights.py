"""Files of RCAN weights <-> our network: recognise, convert exactly, export.

    network = weights.load("RCAN_BIX4.pt")                     # rebuilt from the file alone, in eval mode
    print(weights.describe(network))                           # layout, scale, size, range, averaged or not
    weights.export(network, "rcan_x4.pth", layout="official")  # for programs that open the official files
    weights.export_onnx(network, "rcan_x4.onnx")

Which of the layouts of `layouts.py` a file has is seen from its names alone. What surrounds the weights in a file (a checkpoint, an
averaged copy, the prefixes of DataParallel or torch.compile) is taken off.
"""

import contextlib
import copy
import errno
import importlib.util
import io
import json
import os
import pickle
import re
import statistics
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import files
import model
from layouts import LAYOUTS, MEAN_SHIFT, NATIVE, OFFICIAL, RCAN_IT, RCAN_IT_MARKS, Layout, Size, State, pattern

# Files


def read(path: str | os.PathLike) -> Any:
    """What a file of PyTorch's or safetensors' holds, as plain types and tensors on the CPU; no code in it is run.

    The checksums that PyTorch's files have are compared, which PyTorch itself does not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is a folder, empty, damaged, something else, or holds code.
        OSError, RuntimeError, MemoryError: it can't be read now, as without permission or memory; nothing is known of the file then.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, where a file of weights is needed; give the path of a file, as of best.pth.tar")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such weights; train them with train.py, or give the path of a file with --model_path "
            "(in training, with --pretrained_model_path or --resume)"
        )
    if not path.stat().st_size:
        raise ValueError(f"{path}: not a file of weights that can be read safely (it is empty; copy or download it again)")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN_NUMBERS):
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            _check_sums(path)
            return _read_safetensors(path) if _is_safetensors(path) else torch.load(path, map_location="cpu", weights_only=True)
    except _READING_ERRORS as error:
        if _of_the_machine(error):
            raise
        raise ValueError(f"{path}: not a file of weights that can be read safely ({_reason(error, path)})") from None


# NumPy's scalars, which many checkpoints hold as their best PSNR
_PLAIN_NUMBERS = [np.float64(0).__reduce__()[0], np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]

_READING_ERRORS = (
    RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, NotImplementedError,
)  # fmt: skip


def _of_the_machine(error: Exception) -> bool:
    """Whether a file may be whole though reading it has failed; a cut one makes readers seek to where nothing is (EINVAL)."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_sums(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"  # after the header's length


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        recorded = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        return {**recorded, "state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (not a dict)


_METADATA = "rcan"  # what we record in a safetensors file


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page, as a download link gives that wants a browser; download it with one"
    if "TorchScript" in text:
        return "it is a TorchScript program; save its state_dict() instead"
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it holds code or objects beside the weights, as {found[1].rstrip('.,')}; save a state_dict of tensors alone"
    if "Unsupported operand" in text and start.startswith(b"\x80"):
        return "it is a pickle of another program, which may hold code; save a state_dict with torch.save"
    if isinstance(error, safetensors.SafetensorError):
        return f"it is no whole safetensors file: {text[:160]}; copy or download it again"
    known = start.startswith((b"pk", b"\x80"))
    return f"it is {'damaged or cut off' if known else 'no file of PyTorch'}; copy or download it again"


def load(path: str | os.PathLike) -> model.RCAN:
    """The network that a file holds, rebuilt from the file alone, in eval mode; averaged weights are preferred.

    The result takes and gives [0, 1] whatever range the file's own program works on; it has `source`, a line on what was
    recognised, and `degradation`, what it was trained for ("BI", "BD", "DN", or None where the file doesn't say).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no RCAN, or any tensor is missing, unexpected, of another shape or not finite. All are listed.
    """
    found = read(path)
    state, kind = _unwrap(found, path)
    network = build(state, path)
    network.source = f"{path}, {network.source}, {kind}"
    network.degradation = _recorded_degradation(found)
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
    """A network with these weights, of any known layout, its size read off their names and shapes; in eval mode.

    Raises:
        ValueError: no known layout, or any tensor is missing, unexpected, of another shape or not finite.
    """
    layout = _recognise(state, source)
    size = _count(layout, state, source)
    names = layout.names(size)
    _check_names(layout, state, names, source)
    network = _allocate(layout, size, state, names, source)
    _check_tensors(network, layout, state, names, source)
    to_native = {theirs: ours for ours, theirs in names.items()}
    wide = {to_native.get(name, name): tensor.detach().to(torch.float64) for name, tensor in state.items()}
    try:
        converted = {name: tensor.to(torch.float32) for name, tensor in layout.to_native(wide).items()}
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _raise_problems([f"{name} is too large for float32" for name, value in converted.items() if not value.isfinite().all()], layout, source)
    network.load_state_dict(converted)
    network.arguments["mean"] = tuple(network.mean.flatten().tolist())
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()} - {"float32"})
    network.source = layout.title(state) + (f", stored as {' and '.join(stored)}" if stored else "")
    network.degradation = None
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
        of_cbam = ".spatial_attention_layer." in name or (name == "cbam_average" and source.arguments["attention"] == "channel")
        return (new_upsampler and name.startswith("upsampling.")) or (name not in given and of_cbam)

    taken = {name: tensor for name, tensor in given.items() if not replaceable(name)}
    kept = {name: tensor for name, tensor in wanted.items() if name not in taken}
    misfits = sorted(name for name in taken if not _same(taken[name], wanted.get(name)))
    misfits += sorted(name for name in kept if not replaceable(name))
    if misfits:
        raise ValueError(
            f"{path}: {len(misfits)} weights don't fit the network to train, first {misfits[0]}; "
            f"{_differences(source, network)}; set these as in the file, or take other weights"
        )
    network.load_state_dict({**kept, **taken})
    dropped = sorted(given.keys() - taken.keys())
    lines = [f"started from {source.source} (x{source.upscale_factor}): {len(taken)} of its {len(given)} tensors, of {_summary(taken)}"]
    lines += [f"    new, not in the file or of another scale: {', '.join(sorted(kept))}"] if kept else []
    lines += [f"    left out of the file: {', '.join(dropped)}"] if dropped else []
    return "\n".join(lines)


# Recognising


def _unwrap(found: Any, source: str | os.PathLike) -> tuple[State, str]:
    """The weights in a file, and which they are: averaged ones before others."""
    candidates = sorted(_candidates(found), key=lambda candidate: _rank(candidate[0]))  # stable
    if not candidates:
        raise ValueError(f"{source}: holds no RCAN of a known layout ({', '.join(LAYOUTS)}), but {_contents(found)}; {_SEE}")
    path, state = candidates[0]
    rivals = [".".join(other) for other, _ in candidates if _rank(other) == _rank(path)]
    if _rank(path) == _UNKNOWN and len(rivals) > 1:
        raise ValueError(f"{source}: holds several networks, {', '.join(rivals)}; save the state_dict of one")
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{source}: holds {', '.join(strange)} among its weights, which are no tensors")
    stripped, averaged = _strip(dict(state), source)
    key = ".".join(path) if _rank(path) == 0 else "n_averaged"
    return stripped, f"averaged weights (EMA, {key})" if averaged or _rank(path) == 0 else "weights as trained"


_SEE = "the README lists the files that can be opened"
_EMA = re.compile(r"(?:^|[_.-])ema(?:$|[_.-])", re.IGNORECASE)
_KEYS = ("state_dict", "model_state_dict", "params", "model", "net", "netG", "net_g", "generator", "network")
_UNKNOWN = 3


def _rank(path: tuple[str, ...]) -> int:
    """0 for averaged weights, then those under a known name, those that are the file itself, and others."""
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


def _contents(found: Any) -> str:
    """What is there instead, for a message."""
    if not isinstance(found, Mapping):
        return type(found).__name__
    names = list(map(str, found))
    return (", ".join(names[:6]) or "nothing") + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _strip(state: State, source: str | os.PathLike) -> tuple[State, bool]:
    """Names without what DataParallel, torch.compile, EMA wrappers and trainers put before or between them."""
    averaged = state.pop("n_averaged", None) is not None
    names = {name: _WRAPPERS.sub("", name) for name in state}
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names.values())), None):
        names = {name: _WRAPPERS.sub("", short.removeprefix(prefix)) for name, short in names.items()}
    if len(set(names.values())) < len(names):
        twice = next(short for short in names.values() if list(names.values()).count(short) > 1)
        raise ValueError(f"{source}: holds {twice} twice, with and without a prefix; save one network's state_dict")
    stripped = {names[name]: tensor for name, tensor in state.items()}
    averaged = stripped.pop("n_averaged", None) is not None or averaged
    return stripped, averaged


_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
_PREFIXES = ("netG.", "net_g.", "generator.", "model.", "net.", "network.")


def _recorded_degradation(found: Any) -> str | None:
    """What a checkpoint of ours, or a file that was exported from one, says."""
    if not isinstance(found, Mapping):
        return None
    settings = found.get("config")
    value = found.get("degradation", settings.get("degradation") if isinstance(settings, Mapping) else None)
    return value if isinstance(value, str) else None


def _recognise(state: Mapping[str, Tensor], source: str | os.PathLike) -> Layout:
    if "head.1.weight" in state:
        raise ValueError(
            f"{source}: an RCAN that first folds pixels into channels (head.1, traiNNer's unshuffle), which is another network"
        )
    fitting = [layout for layout in LAYOUTS.values() if any(re.match(layout.mark, name) for name in state)]
    if len(fitting) != 1:
        raise ValueError(f"{source}: holds no RCAN of a known layout ({', '.join(LAYOUTS)}), but {_contents(state)}; {_SEE}")
    return fitting[0]


def _count(layout: Layout, state: Mapping[str, Tensor], source: str | os.PathLike) -> Size:
    blocks = [tuple(map(int, found.groups())) for found in _matches(layout.first, state)]
    upsamplers = len(list(_matches(layout.upsampler, state)))
    if not blocks or not upsamplers:
        missing = layout.upsampler if blocks else layout.first
        raise ValueError(f"{source}: holds no whole RCAN in the {layout.program} layout: no {missing}.weight is in it")
    groups, rows = 1 + max(g for g, _ in blocks), 1 + max(b for _, b in blocks)
    if groups * rows > len(state):  # far fewer tensors than that many blocks have; not worth a list of what is missing
        raise ValueError(f"{source}: its names count up to {groups} groups of {rows} blocks, but it holds {len(state)} tensors only")
    return Size(groups, rows, upsamplers, bool(layout.spatial) and any(_matches(layout.spatial, state)))


def _matches(template: str, state: Mapping[str, Tensor]) -> Iterator[re.Match[str]]:
    return filter(None, (re.fullmatch(pattern(template) + r"\.weight", name) for name in state))


def _further_names(layout: Layout, state: Mapping[str, Tensor]) -> list[str]:
    """What belongs into a file beside convolutions."""
    if layout is NATIVE:
        return ["mean", *(mark for mark in model.MARKS if mark in state)]
    if layout is OFFICIAL and not any(name in state for name in MEAN_SHIFT):
        return []  # as traiNNer writes it
    return list(MEAN_SHIFT) if layout in (OFFICIAL, RCAN_IT) else []


def _check_names(layout: Layout, state: Mapping[str, Tensor], names: Mapping[str, str], source: str | os.PathLike) -> None:
    wanted = {*names.values(), *_further_names(layout, state)}
    problems = [f"missing {name}" for name in wanted - state.keys()] + [f"unexpected {name}" for name in state.keys() - wanted]
    _raise_problems(problems, layout, source)


def _allocate(layout: Layout, size: Size, state: Mapping[str, Tensor], names: Mapping[str, str], source: str | os.PathLike) -> model.RCAN:
    rows = {ours.removesuffix(".weight"): (state[theirs].shape or (0,))[0] for ours, theirs in names.items() if ours.endswith(".weight")}
    channels = _usual(rows, "conv1", "conv2", NATIVE.first)  # of many, so that one of another shape is named and not all others
    squeezed = _usual(rows, NATIVE.squeeze)
    upsampler = {names[f"{name}.weight"]: rows[name] for name in (NATIVE.upsampler.format(u=u) for u in range(size.upsamplers))}
    steps = tuple(count // channels if count % channels == 0 else None for count in upsampler.values())
    if steps not in _SCALES:
        raise ValueError(f"{source}: upsampler of unknown shape, {upsampler} for {channels} channels; known are x2, x3, x4 and x8")
    marks = RCAN_IT_MARKS if layout is RCAN_IT else model.MARKS.keys() & state.keys()
    return model.RCAN(
        _SCALES[steps],
        channels,
        reduction=channels // min(squeezed, channels),
        num_rg=size.groups,
        num_rcab=size.blocks,
        **{"attention": "cbam" if size.cbam else "channel", **dict(model.MARKS[mark] for mark in marks)},
    )


def _usual(rows: Mapping[str, int], *templates: str) -> int:
    known = [pattern(template) for template in templates]
    return max(1, statistics.mode(count for name, count in rows.items() if any(re.fullmatch(each, name) for each in known)))


_SCALES = {(4,): 2, (9,): 3, (4, 4): 4, (4, 4, 4): 8}


def _check_tensors(
    network: model.RCAN, layout: Layout, state: Mapping[str, Tensor], names: Mapping[str, str], source: str | os.PathLike
) -> None:
    ours = network.state_dict()
    shapes = {theirs: ours[name].shape for name, theirs in names.items()}
    shapes |= {name: (3,) if name.endswith(".bias") else (3, 3, 1, 1) for name in MEAN_SHIFT}
    shapes |= {name: ours[name].shape for name in ("mean", *network.marks())}
    problems = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(shapes[name])}" for name, tensor in state.items() if tensor.shape != shapes[name]
    ]
    odd = [name for name, tensor in state.items() if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta]
    problems += [f"{name} is {_kind(state[name])}, not dense floating point" for name in odd]
    problems += [f"{name} is not finite" for name, tensor in state.items() if name not in odd and not torch.isfinite(tensor).all()]
    _raise_problems(problems, layout, source)


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
    return ("without values" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")) + layout


def _raise_problems(problems: list[str], layout: Layout, source: str | os.PathLike) -> None:
    if problems:
        listed = "; ".join(sorted(problems))
        raise ValueError(
            f"{source}: {len(problems)} tensors don't fit an RCAN in the {layout.program} layout, none was loaded: {listed}; "
            "take another file, or save the whole network's state_dict anew"
        )


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape


def _summary(names: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names))


# Export


def export(network: model.RCAN, path: str | os.PathLike, layout: str = "native") -> None:
    """Write the generator alone; the name's ending says how: .pth.tar, .pth, .pt, or .safetensors.

    "native" is a checkpoint {"state_dict", "arguments", "degradation"}. "official" is a bare state_dict on [0, 255], which the
    official code, EDSR-PyTorch, torchSR and spandrel (so chaiNNer and ComfyUI) open; "basicsr" is {"params": state_dict}. A round
    trip gives every value back, but for the last bit of under 1 % of those in the first and the last convolution.

    Raises:
        ValueError: an unknown layout or ending, or a network that the layout can't describe; nothing is written then.
    """
    path = Path(path)
    writable = [name for name, known in LAYOUTS.items() if known.from_native]
    if layout not in writable:
        raise ValueError(f"layout={layout!r} is unknown; known are {', '.join(map(repr, writable))}")
    endings = ENDINGS if layout == "native" else tuple(ending for ending in ENDINGS if ending != ".pth.tar")
    if not path.name.endswith(endings):
        raise ValueError(f"{path}: unknown ending; files in the {layout} layout end in {', '.join(endings)}")
    state = _to_layout(network, LAYOUTS[layout])
    recorded = {"arguments": network.arguments, "degradation": getattr(network, "degradation", None)}
    if path.suffix == ".safetensors":
        files.write_whole(path, safetensors.torch.save(state, {"format": "pt", _METADATA: json.dumps(recorded)}))
    else:
        buffer = io.BytesIO()
        torch.save({"native": {"state_dict": state, **recorded}, "basicsr": {"params": state}}.get(layout, state), buffer)
        files.write_whole(path, buffer.getbuffer())


def _differences(source: model.RCAN, network: model.RCAN) -> str:
    names = [
        name for name, value in network.arguments.items() if source.arguments[name] != value and name not in ("mean", "upscale_factor")
    ]
    return "; ".join(f"{name} is {source.arguments[name]!r} in the file, {network.arguments[name]!r} in the network" for name in names)


ENDINGS = (".pth.tar", ".pth", ".pt", ".safetensors")


def _to_layout(network: model.RCAN, layout: Layout) -> State:
    arguments = network.arguments
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    if layout is NATIVE:
        return state
    if arguments["attention"] != "channel" or network.marks():
        kind = f"{arguments['attention']} attention and {arguments['activation']}"
        raise ValueError(f"layout={layout.program!r} knows the paper's network only, not one with {kind}: use 'native' or 'onnx'")
    size = Size(arguments["num_rg"], arguments["num_rcab"], len(network.upsampling), cbam=False)
    names = layout.names(size)
    wide = {name: tensor.to(torch.float64) if name.startswith("conv") else tensor for name, tensor in state.items()}
    return {names.get(name, name): tensor.to(torch.float32).contiguous() for name, tensor in layout.from_native(wide).items()}


def export_onnx(network: model.RCAN, path: str | os.PathLike) -> None:
    """Write an ONNX file: `lr` (N, 3, h, w) -> `sr` (N, 3, scale h, scale w), float32 RGB in [0, 1], with N, h and w free.

    Opset 18, or 17 with PyTorch before 2.9. Needs the packages onnx and onnxscript.

    Raises:
        ValueError: they are missing, or another ending than .onnx; nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: unknown ending; files in the onnx layout end in .onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{path}: ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    plain = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    common = {"input_names": ["lr"], "output_names": ["sr"]}
    free = {0: "batch", 2: "height", 3: "width"}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9):
        dimensions = {axis: torch.export.Dim(name) for axis, name in free.items()}
        options = {"dynamo": True, "opset_version": 18, "dynamic_shapes": (dimensions,), "external_data": False}
    else:  # whose new exporter fails on this network
        options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"lr": free, "sr": free}}
    with _whole_file(path) as part, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(plain, (torch.rand(2, 3, 12, 10),), str(part), **common, **options)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; the file is moved to `path` when it is complete, and never left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
