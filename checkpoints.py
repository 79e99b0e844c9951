"""Checkpoints of a training run: what they hold, writing them whole, finding the newest whole one, checking and restoring it.

    results/<exp_name>/last.pth.tar              the newest
    results/<exp_name>/update_0001000.pth.tar    the ones before it, keep_last of them
    results/<exp_name>/best.pth.tar              the best scores

Each holds the whole state of a run, in plain types. `weights.read` compares the checksum of every tensor when it reads one.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import files
import weights
from config import BEST, LAST, Config, released_weights

_NEEDED = ("state_dict", "ema_state_dict", "optimizer", "scheduler", "scaler", "update", "meter", "data", "config", "random_states")
_FROM_WEIGHTS = "to start from its weights, set pretrained_model_path"


@dataclass
class Progress:
    """How far a run has come; saved as it is in each checkpoint."""

    update: int = 0  # updates done
    evaluated: int = 0  # the update after which the last evaluation was
    seconds: float = 0.0  # spent in the loop, over all attempts
    best_psnr: float = -math.inf
    best_ssim: float = -math.inf


# Writing


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        ValueError: a tensor in it is not finite; nothing is written.
        OSError: it cannot be written; an older file of this name is untouched.
    """
    files.write_whole(path, _serialised(path, state))


def save_last(folder: Path, state: Mapping[str, Any], before: int | None, keep_last: int) -> None:
    """Write last.pth.tar; the one before it becomes update_<number>.pth.tar, and the newest `keep_last` of those stay.

    Args:
        before: the update of the present last.pth.tar, or None if it is damaged or of another run; it is then kept under another name.

    Raises:
        ValueError, OSError: as `save`.
    """
    last = folder / LAST
    data = _serialised(last, state)
    with files.replacing(last) as part:
        part.write_bytes(data)
        files.sync(part)  # before the old one moves, so that a whole checkpoint is on the disk at any moment
        if last.exists():
            if before is None:
                last.replace(_unused(folder, "damaged_last"))
            elif keep_last and before != state["update"]:
                last.replace(folder / f"update_{before:07d}.pth.tar")
    earlier = [path for path in numbered(folder) if _number(path) <= state["update"]]  # later ones belong to a run that was rewound
    for old in earlier[keep_last:]:
        old.unlink(missing_ok=True)


def _unused(folder: Path, name: str) -> Path:
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := folder / f"{name}{ending}.pth.tar").exists())


def _serialised(path: Path, state: Mapping[str, Any]) -> memoryview:
    if name := _not_finite(state):
        raise ValueError(f"{path}: not written, as {name} is not finite; an older file of this name is untouched")
    buffer = io.BytesIO()  # in memory first, as PyTorch's own writer hides what the disk refused
    torch.save(state, buffer)
    return buffer.getbuffer()


def _not_finite(state: Any) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    named = [(name, torch.isfinite(tensor).all()) for name, tensor in _tensors(state) if tensor.is_floating_point()]
    for device in {flag.device for _, flag in named}:  # one answer a device, as each makes it wait
        here = [(name, flag) for name, flag in named if flag.device == device]
        if not all(sound := torch.stack([flag for _, flag in here]).tolist()):
            return here[sound.index(False)][0]
    return None


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(member, f"{name}.{key}" if name else str(key))


# Finding


def check_folder(folder: Path) -> None:
    """Make sure, before hours of work, that no folder has the name of a file of the run.

    Raises:
        ValueError: one has.
    """
    for path in (folder / name for name in (LAST, BEST, "config.json", "log.jsonl")):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, but the run needs a file there; rename it, or set another exp_name")


def find(config: Config, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint to resume from, with its path; None for a new run.

    Raises:
        FileNotFoundError: `resume` names a file that does not exist.
        ValueError: no checkpoint is whole, or the newest contradicts the settings or lacks a part of the state.
    """
    folder = config.experiment_dir
    paths = present(folder)
    if not paths and config.resume not in ("auto", "never"):
        paths = [Path(config.resume)]
    if not paths:
        if config.start_epoch:
            raise ValueError(f"start_epoch={config.start_epoch}, but there is no {folder / LAST} to resume from: set start_epoch=0")
        return None
    path, checkpoint, problems = read_newest(paths)
    _check(config, checkpoint, path)
    if not problems and path.parent == folder and path.name != LAST:
        problems = [f"{folder / LAST} is missing"]
    for problem in problems:
        say(f"warning: {problem}; resuming from an older checkpoint instead")
    say(f"resuming from {path.absolute()}: update {checkpoint['update']}, epoch {checkpoint['epoch']}")
    return path, checkpoint


def present(folder: Path) -> list[Path]:
    """All checkpoints of a run, in the order in which they are tried."""
    return [path for path in (folder / LAST, *numbered(folder), folder / BEST) if path.exists()]


def numbered(folder: Path) -> list[Path]:
    """The older checkpoints of a run, newest first."""
    names = (path for path in folder.glob("update_*.pth.tar") if path.name[7:-8].isdecimal())
    return sorted(names, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name[7:-8])


def read_newest(paths: Sequence[Path]) -> tuple[Path, Any, list[str]]:
    """The first checkpoint if it is whole, else the newest whole one; with its path, and what is wrong with the others.

    Raises:
        ValueError: none is whole.
    """
    problems: list[str] = []
    whole: list[tuple[Path, Any]] = []
    for path in paths:
        if whole and (whole[0][0].name == LAST or path.name != BEST):  # the best one may be newer than the newest numbered one
            continue
        try:
            found = weights.read(path)
            if name := _not_finite(found):
                raise ValueError(f"{path}: {name} in it is not finite")
            whole.append((path, found))
        except ValueError as error:
            problems.append(str(error))
    if whole:
        path, found = max(whole, key=lambda pair: pair[1].get("update", -1) if isinstance(pair[1], Mapping) else -1)
        return path, found, problems
    others = f", nor can another checkpoint in {paths[0].parent} be read" if len(paths) > 1 else ""
    raise ValueError(f"{problems[0]}{others}; bring a copy back, or set another exp_name to start anew")


def weights_to_test(model_path: str | tuple[str, ...], folder: Path, exp_name: str, upscale_factor: int) -> tuple[Path, ...]:
    """The given weights, else the best or the last of the run in `folder`, else this repository's own.

    Raises:
        FileNotFoundError: `exp_name` was given, but names no run.
    """
    if model_path:
        return tuple(map(Path, (model_path,) if isinstance(model_path, str) else model_path))
    for path in (folder / name for name in (BEST, LAST)):
        if path.is_file():
            return (path,)
    if exp_name:
        raise FileNotFoundError(
            f"{folder.absolute()}: holds no {BEST} and no {LAST}; correct exp_name={exp_name!r}, or give weights with --model_path"
        )
    return (released_weights(upscale_factor),)


# Checking and restoring


def _check(config: Config, checkpoint: Any, path: Path) -> None:
    """Refuse a checkpoint that contradicts the settings."""
    missing = [name for name in _NEEDED if not isinstance(checkpoint, Mapping) or name not in checkpoint]
    if missing:
        raise ValueError(f"{path}: cannot be resumed, as it lacks {', '.join(missing)}; {_FROM_WEIGHTS}")
    if config.start_epoch not in (0, checkpoint["epoch"]):
        raise ValueError(f"start_epoch={config.start_epoch}, but {path} stopped in epoch {checkpoint['epoch']}: set start_epoch=0")
    defaults = {field.name: field.default for field in fields(config)}  # of settings that are younger than the checkpoint
    before, now = {**defaults, **checkpoint["config"]}, asdict(config)
    accepted = {"auto", before["resume"]} - {"never"}  # a run that was itself started from another file may go on
    if path.parent == config.experiment_dir and config.resume not in accepted:
        raise ValueError(f"resume={config.resume!r}, but {path} exists: set resume='auto' to resume it, or another exp_name")
    free = set(config.FREE_AT_RESUME)
    free |= {"epochs"} if config.schedule == "step" else set()  # the cosine depends on the end
    free |= {"precision"} if config.precision == "auto" else set()
    if "random" in (before.get("vgg19_weights_path"), now.get("vgg19_weights_path")):
        free -= {"vgg19_weights_path"}  # a random VGG19 is another loss
    changed = [name for name in now if name not in free and before[name] != now[name]]
    if changed:
        differences = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{path}: the run was started with other settings ({differences}): set them back, or set another exp_name")


def outdated_best(checkpoint: Mapping[str, Any], path: Path, folder: Path, validation: str) -> str:
    """Why the best scores in a checkpoint say nothing of the run's best.pth.tar, or an empty text.

    Args:
        path: of the checkpoint.
        folder: of the run.
        validation: a checksum of the images that decide now, the first of valid_sets.
    """
    if checkpoint["best_psnr"] == -math.inf:
        return ""
    if checkpoint.get("validation", validation) != validation:
        return "the first of valid_sets was another one, or its images have changed"
    if path.parent != folder or not (folder / BEST).is_file():
        return f"there is no {folder / BEST}"
    return ""


def restore(parts: Mapping[str, Any], checkpoint: Mapping[str, Any], path: Path, fingerprint: str) -> None:
    """Load each part's state, by name.

    Args:
        fingerprint: of the training images now, which must be those of the checkpoint.

    Raises:
        ValueError: the images have changed, or a part is missing or of another shape.
    """
    if not fingerprint.startswith(checkpoint["data"]):  # older checkpoints have a part of it
        raise ValueError(
            f"{path}: the training images have changed since the run was started (were {checkpoint['data']}, are {fingerprint}): "
            "bring the old ones back, or set another exp_name and pretrained_model_path"
        )
    missing = parts.keys() - checkpoint.keys()
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; {_FROM_WEIGHTS}")
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: its {name} is not what this version writes ({reason}); {_FROM_WEIGHTS}") from None
        if isinstance(part, torch.optim.Optimizer):
            _lay_out_moments(part)


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam's moments the strides of their weights: with another `channels_last` than before, fused Adam would mix them up."""
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
