"""Checkpoints of a training: written whole, verified when they are read, and the newest that is whole is the one to go on from.

    results/<exp_name>/last.pth.tar              the newest
    results/<exp_name>/update_0001000.pth.tar    the ones before it, keep_last of them
    results/<exp_name>/best.pth.tar              of the best scores

All three hold the whole state of a run. Each tensor in them has a checksum, as PyTorch's files do, which `weights.read` compares.
"""

import io
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import files
import weights

LAST, BEST = "last.pth.tar", "best.pth.tar"


def check_folder(folder: Path) -> None:
    """Make sure, before hours of work, that no folder is where a run's files will be.

    Raises:
        ValueError: one is.
    """
    for path in (folder / name for name in (LAST, BEST, "config.json", "log.jsonl")):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, where a file of the run belongs; rename it, or set another exp_name")


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        ValueError: a tensor in it is not finite; nothing is written then.
        OSError: it can't be written; an older file of this name is untouched.
    """
    files.write_whole(path, _serialised(path, state))


def save_last(folder: Path, state: Mapping[str, Any], before: int | None, keep_last: int) -> None:
    """Write last.pth.tar; the one before it becomes a numbered one, and of these only the newest `keep_last` stay.

    Args:
        before: after which update the present last.pth.tar was written, or None where it is none of this run's, or damaged.

    Raises:
        ValueError, OSError: as `save`.
    """
    last = folder / LAST

    def make_room() -> None:
        if not last.exists():
            return
        if before is None:
            last.replace(_unused(folder, "damaged_last"))
        elif keep_last and before != state["update"]:
            last.replace(folder / f"update_{before:07d}.pth.tar")

    files.write_whole(last, _serialised(last, state), make_room)
    earlier = [path for path in numbered(folder) if _number(path) <= state["update"]]  # later ones are those of a run gone back on
    for old in earlier[keep_last:]:
        old.unlink(missing_ok=True)


def _unused(folder: Path, name: str) -> Path:
    """A name for what can't be read and is kept."""
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := folder / f"{name}{ending}.pth.tar").exists())


def numbered(folder: Path) -> list[Path]:
    """The older checkpoints of a run, newest first."""
    names = (path for path in folder.glob("update_*.pth.tar") if path.name[7:-8].isdecimal())
    return sorted(names, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name[7:-8])


def present(folder: Path) -> list[Path]:
    """All checkpoints of a run, in the order in which they are tried."""
    return [path for path in (folder / LAST, *numbered(folder), folder / BEST) if path.exists()]


def read_newest(paths: list[Path]) -> tuple[Path, Any, list[str]]:
    """The first checkpoint if it can be read, else the newest that can, with its path, and what is wrong with others.

    Raises:
        ValueError: none can be read.
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
        return *max(whole, key=lambda pair: pair[1].get("update", -1) if isinstance(pair[1], Mapping) else -1), problems
    others = f", and no other checkpoint in {paths[0].parent} can either" if len(paths) > 1 else ""
    raise ValueError(f"{problems[0]}{others}; bring a copy back, or set another exp_name to start anew")


def _serialised(path: Path, state: Mapping[str, Any]) -> memoryview:
    if name := _not_finite(state):
        raise ValueError(f"{path}: not written, as {name} is not finite; an older file of this name is untouched")
    buffer = io.BytesIO()  # first in memory, as PyTorch's own writer doesn't say what a disk refused
    torch.save(state, buffer)
    return buffer.getbuffer()


def _not_finite(state: Any) -> str | None:
    """The first tensor in it that holds NaN or infinity."""
    return next((name for name, tensor in _tensors(state) if tensor.is_floating_point() and not torch.isfinite(tensor).all()), None)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield from _tensors(member, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            yield from _tensors(member, f"{name}.{index}")
