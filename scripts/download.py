"""Fetch published data sets and weights, check them, and lay them out as the other scripts expect:

python scripts/download.py                                  # list all items, their sources, and what is here already
python scripts/download.py --items DIV2K Set5 Set14 vgg19   # fetch; the same command goes on after an interruption
python scripts/download.py --items Flickr2K --archive ~/Downloads/Flickr2K.zip      # check and unpack what you fetched yourself

Addresses, sizes and checksums are those that other repositories list (TensorFlow Datasets, torchSR, Real-ESRGAN, torchvision);
nobody has tried them from here. Data sets have terms of their own, mostly research only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import contextlib
import gzip
import hashlib
import lzma
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import tyro
from tqdm import tqdm

import dataset
import files
import image_files
from runtime import run_script
from weights import VGG19


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    items: tuple[str, ...] = ()  # what to fetch; empty: list all items and whether they are here
    data_root: str = "data"  # folder of the data sets; archives and unfinished downloads lie in its folder downloads
    weights_dir: str = "pretrained"  # folder of the weights
    archive: str = ""  # a file that you fetched yourself, to be checked and unpacked for --items; it stays as it is
    mirror: str = ""  # fetch each file from <mirror>/<its name>; the published checksums still hold
    keep_archives: bool = False  # keep downloaded archives after unpacking


# What there is


@dataclass(frozen=True)
class Folder:
    """A folder of images below data_root, how many belong there (None: unknown), and which of an archive's members go there.

    Patterns, separated by "|", hold from the right: "Set5/HR/*" matches "benchmark/Set5/HR/baby.png".
    """

    path: str
    images: int | None
    patterns: str

    def find(self, root: Path) -> tuple[Path, int]:
        """Where its images are, and how many; GT images may lie in any of the folders in which training looks for them."""
        own = root / self.path
        places = [own.with_name(name) for name in dataset.GT_FOLDERS] if own.name in dataset.GT_FOLDERS else [own]
        counts = {place: len(image_files.list_images(place)) if place.is_dir() else 0 for place in places}
        return next(((place, count) for place, count in counts.items() if count), (own, 0))

    def is_complete(self, root: Path) -> bool:
        _, count = self.find(root)
        return count > 0 and self.images in (None, count)


@dataclass(frozen=True)
class Item:
    """Folders of images in an archive or, without folders, a file of weights; without an address, a person must fetch it."""

    url: str = ""
    checksum: str = ""  # "md5:…" or "sha256:…"; empty where none is published
    size: int | None = None  # of the file, bytes
    folders: tuple[Folder, ...] = ()
    by_hand: str = ""  # where a person finds it

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def _div2k(split: str, kind: str, checksum: str, size: int | None = None) -> Item:
    """`kind` is HR or LR_bicubic_X<scale>; DIV2K_train_LR_bicubic_X2.zip holds DIV2K_train_LR_bicubic/X2/0001x2.png."""
    file = f"DIV2K_{split}_{kind}"
    place = ("DIV2K/" if split == "train" else "DIV2K_valid/") + ("GT" if kind == "HR" else kind.replace("_X", "/X"))
    folder = Folder(place, 800 if split == "train" else 100, f"{file.replace('_X', '/X')}/*")
    return Item(f"{DIV2K_HOME}/{file}.zip", checksum, size, (folder,), f"{DIV2K_HOME}/ or {COPIES}/DIV2K")


def _benchmark(name: str, images: int) -> Item:
    checksum, folder = "md5:4ace41d33c2384b97e6b320cd0afd6ba", Folder(f"{name}/GT", images, f"{name}/HR/*")
    return Item(f"{EDSR_HOME}/benchmark.tar", checksum, None, (folder,), "the links in https://github.com/sanghyun-son/EDSR-PyTorch")


def _rcan(scale: int) -> Item:
    return Item(f"https://github.com/Coloquinte/torchSR/releases/download/v1.0.3/rcan_x{scale}.pt")


DIV2K_HOME = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
EDSR_HOME = "https://cv.snu.ac.kr/research/EDSR"
COPIES = "https://huggingface.co/datasets/goodfellowliu"
SHARED_FOLDERS = (  # which RCAN-PyTorch's documentation links
    "https://drive.google.com/drive/folders/1A6lzGeQrFMxPqJehK9s37ce-tPDj20mD or "
    "https://pan.baidu.com/s/1o-8Ty_7q6DiS3ykLU09IVg (code llot)"
)
# fmt: off
ITEMS = {
    "DIV2K": _div2k("train", "HR", "sha256:9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335", 3_530_603_713),
    "DIV2K_valid": _div2k("valid", "HR", "sha256:20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc", 448_993_893),
    "DIV2K_LR_X2": _div2k(
        "train", "LR_bicubic_X2", "sha256:a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850", 925_390_592),
    "DIV2K_LR_X3": _div2k("train", "LR_bicubic_X3", "md5:ad80b9fe40c049a07a8a6c51bfab3b6d"),
    "DIV2K_LR_X4": _div2k("train", "LR_bicubic_X4", "md5:76c43ec4155851901ebbe8339846d93d"),
    "DIV2K_valid_LR_X2": _div2k(
        "valid", "LR_bicubic_X2", "sha256:60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57", 117_763_600),
    "DIV2K_valid_LR_X3": _div2k("valid", "LR_bicubic_X3", "md5:18b1d310f9f88c13618c287927b29898"),
    "DIV2K_valid_LR_X4": _div2k("valid", "LR_bicubic_X4", "md5:21962de700c8d368c6ff83314480eff0"),
    "Flickr2K": Item(f"{EDSR_HOME}/Flickr2K.tar", "md5:5d3f39443d5e9489bff8963f8f26cb03", None,  # copies lack the folder Flickr2K_HR
        (Folder("Flickr2K/GT", 2650, "Flickr2K_HR/*|Flickr2K/*"),), f"{COPIES}/Flickr2K"),
    "BSDS500": Item("https://github.com/BIDS/BSDS500/archive/refs/heads/master.zip", folders=(
        Folder("BSDS200/GT", 200, "data/images/train/*"), Folder("BSDS_test200/GT", 200, "data/images/test/*"),
        Folder("B100/GT", 100, "data/images/val/*"),  # these are BSDS300's test images, which super-resolution calls B100
    ), by_hand="https://github.com/BIDS/BSDS500"),
    "Set5": _benchmark("Set5", 5), "Set14": _benchmark("Set14", 14),
    "B100": _benchmark("B100", 100), "Urban100": _benchmark("Urban100", 100),
    "T91": Item(folders=(Folder("T91/GT", 91, "*"),), by_hand=SHARED_FOLDERS),
    "OST": Item(folders=(Folder("OST/GT", None, "OutdoorSceneTrain_v2/*/*|OST/*"),),  # beside annotations, which are images too
        by_hand="https://github.com/xinntao/SFTGAN#ost-dataset (OutdoorSceneTrain_v2), "
        f"https://openmmlab.oss-cn-hangzhou.aliyuncs.com/datasets/OST_dataset.zip, {COPIES}/OST or {SHARED_FOLDERS}"),
    "Manga109": Item(folders=(Folder("Manga109/GT", 109, "*"),), by_hand="http://www.manga109.org/en/, on request"),
    "DIV8K": Item(folders=(Folder("DIV8K/GT", None, "*"),), by_hand=f"its authors, on request, or {SHARED_FOLDERS}"),
    "vgg19": Item(VGG19.address, "sha256:dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44", 574_673_361),
    "rcan_x2": _rcan(2), "rcan_x3": _rcan(3), "rcan_x4": _rcan(4), "rcan_x8": _rcan(8),
    "rcan_native": Item(by_hand="https://drive.google.com/drive/folders/17ju2HN7Y6pyPK2CC_AqnAfTOe9_3hCQ8 or "  # keys as in model.RCAN
        "https://pan.baidu.com/s/1yNs4rqIb004-NKEdKBJtYg (code llot)"),
}
# fmt: on


# The script


def main(argv: Sequence[str] | None = None) -> None:
    """List all items, or fetch the given ones; an item that is complete needs no request.

    Raises:
        ValueError: an unknown item, a file other than the published one, a refused archive, a user's file in the way.
        OSError: a download that fails, too little room, or an item that a person must fetch.
    """
    config = tyro.cli(DownloadConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    unknown = [name for name in config.items if name not in ITEMS]
    if unknown:
        raise ValueError(f"items: {unknown[0]!r} is unknown; known are {', '.join(ITEMS)}")
    if config.archive and not config.items:
        raise ValueError(f"archive={config.archive!r} needs --items, to say what it holds")
    if config.mirror and not config.mirror.startswith(("http://", "https://")):
        raise ValueError(f"mirror={config.mirror!r} must begin with https:// or http://")
    if not config.items:
        for name, item in ITEMS.items():
            size = f"{item.size:,} bytes" if item.size else "size unknown"
            source = f"{_address(item, config)}, {size}, {item.checksum or 'no checksum published'}; " if item.url else ""
            print(f"{name}: {_state(name, config)}\n    {source}{item.by_hand and f'by hand: {item.by_hand}'}")
        return
    root = Path(config.data_root).absolute()
    with files.FolderLock(root / "downloads"):
        by_hand = _get(config, root)
    if by_hand:
        raise FileNotFoundError("\n".join(by_hand))


def _get(config: DownloadConfig, root: Path) -> list[str]:
    """Fetch and unpack what is missing; returns a line for each item that a person must fetch."""
    by_hand: list[str] = []
    notes: dict[Path, str] = {}  # on each fetched file, as some items share an archive
    temporary: list[Path] = []
    for name in dict.fromkeys(config.items):
        item, weights = ITEMS[name], _weights(name, config)
        missing = [folder for folder in item.folders if not folder.is_complete(root)]
        for folder in missing:  # before gigabytes are fetched
            place, count = folder.find(root)
            if place.is_dir() and any(place.iterdir()):
                raise ValueError(f"{place}: its {count} images are in the way of the {folder.images or 'images'} of {name}; move it away")
        if (item.folders and not missing) or any(weights.glob("*")):
            note = "it was here already"
        elif config.archive and (missing or (item.url and not weights.is_file())):
            path = Path(config.archive).absolute()
            published = path.name == item.file or not missing  # another archive of the set may come from elsewhere
            note = _check(path, item if published else Item())
            if not missing:
                with files.replacing(weights) as part:
                    shutil.copyfile(path, part)
        elif item.url:
            path = root / "downloads" / item.file if missing else weights
            if missing and not path.is_file():
                temporary.append(path)
            note = notes[path] = notes.get(path) or _fetch(item, path, config)
        else:
            how = f"{root / item.folders[0].path}, or name its archive: --items {name} --archive FILE" if missing else f"{weights}"
            by_hand.append(f"{name}: fetch it by hand from {item.by_hand}, and put its files into {how}")
            continue
        if missing:
            unpack(path, missing, root)
        print(f"{name}: {_state(name, config)}; {note}")
    for path in () if config.keep_archives else temporary:
        path.unlink()
    return by_hand


def _state(name: str, config: DownloadConfig) -> str:
    """How much of an item is here, and where."""
    path, folders = _weights(name, config), ITEMS[name].folders
    found = [(folder.images or "an unknown number of", *folder.find(Path(config.data_root).absolute())) for folder in folders]
    if found:
        return ", ".join(f"{count} of {images} images in {place}" for images, place, count in found)
    return f"{path}, {path.stat().st_size:,} bytes" if path.is_file() else f"{path}, {'here' if path.exists() else 'missing'}"


def _weights(name: str, config: DownloadConfig) -> Path:
    return Path(config.weights_dir).absolute() / (ITEMS[name].file or name)


def _address(item: Item, config: DownloadConfig) -> str:
    return f"{config.mirror.rstrip('/')}/{item.file}" if config.mirror else item.url


# Downloading

CHUNK = 2**20  # bytes held in memory at a time
ATTEMPTS = 5  # in a row that bring nothing new, after which a download is given up
WAIT = 2.0  # before the second attempt, doubled for each further one, seconds
TIMEOUT = 30.0  # how long a server may stay silent, seconds
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may differ a little later
_REMEDY = "run again to go on, name another server with --mirror, or fetch the file in a browser and name it with --archive"


def _fetch(item: Item, path: Path, config: DownloadConfig) -> str:
    """Download a file to `path`, unless it is there, and check it; returns its checksum."""
    if path.is_file():
        return _check(path, item)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, url = path.with_name(f"{path.name}.part"), _address(item, config)
    download(url, part, item.size)
    try:
        note = _check(part, item)
    except ValueError as error:
        _discard(part)  # else the next attempt would go on from a wrong file
        raise ValueError(f"{error}; the download was removed") from None
    os.replace(part, path)
    _discard(part)
    return note


def _check(path: Path, item: Item) -> str:
    """Refuse a file that is not the published one, with a ValueError; returns its checksum."""
    algorithm, published = item.checksum.split(":") if item.checksum else ("sha256", "")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        is_page = file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html"))
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if is_page or (published and found != published):
        problem = "it is a web page" if is_page else f"its {algorithm} is {found}, but the published one is {published}"
        raise ValueError(f"{path}: {problem}; remove it and {_REMEDY}")
    return f"{algorithm} {found}, {'as published' if published else 'not compared with a published one'}"


def download(url: str, part: Path, size: int | None = None) -> None:
    """Bring what `url` serves into the file `part`, going on where an earlier attempt or call stopped.

    Beside it, <part>.version holds the server's ETag or date, so that parts of two versions are never joined. `size` is that of the
    published file, in bytes, or None where it is unknown.

    Raises:
        ValueError: a file of another size, or a redirect from https to anything else.
        OSError: the server is out of reach, lacks the file or breaks off again and again, or the disk is full.
    """
    failures, farthest = 0, _length(part)
    while True:
        try:
            return _receive(url, part, size)
        except HTTPError as error:
            error.close()
            problem = f"the server answers {error.code} {error.reason}"
            if error.code not in TRANSIENT:
                raise FileNotFoundError(f"{url}: {problem}; {_REMEDY}") from None
        except (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _length(part) > farthest else failures + 1
        farthest = max(farthest, _length(part))
        if failures == ATTEMPTS:
            raise ConnectionError(f"{url}: {problem}; given up after {failures} attempts, {_length(part):,} bytes are kept; {_REMEDY}")
        tqdm.write(f"{url}: {problem}; trying again")
        time.sleep(WAIT * 2 ** (failures - 1))


def _receive(url: str, part: Path, size: int | None) -> None:
    """One attempt: ask for the bytes that are missing, and append them."""
    memory = part.with_name(f"{part.name}.version")
    known = memory.read_text(encoding="utf-8") if memory.is_file() else ""
    have = _length(part) if known else 0  # a part of unknown version is fetched again
    headers = {"User-Agent": "RCAN-PyTorch/scripts/download.py", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known}
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        return  # nothing is missing, only the check was interrupted
    with answer:
        if url.startswith("https:") and not answer.url.startswith("https:"):
            raise ValueError(f"{url}: leads to {answer.url}, which is not safe; {_REMEDY}")
        tag = answer.headers.get("ETag", "")
        version = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")  # what If-Range takes
        if answer.status != 206:  # the whole file, whatever was asked for
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-") or version not in ("", known):
            _discard(part)
            raise ConnectionError("the server goes on elsewhere than where the part ends")
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else size
        if size is not None and total != size:
            _discard(part)
            raise ValueError(f"{url}: offers {total:,} bytes, but the published file has {size:,}; {_REMEDY}")
        _check_room(part.parent, (total or have) - have, url)
        if not have:
            part.unlink(missing_ok=True)  # before another version is remembered
            memory.write_text(version, encoding="utf-8")
        bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, leave=False)
        with open(part, "ab") as file, bar:
            while chunk := answer.read1(CHUNK):
                have += len(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off at {have:,} of {total:,} bytes")


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.version").unlink(missing_ok=True)


def _check_room(folder: Path, needed: int, what: object) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: too little room for {what}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")


# Unpacking

HIGHEST_RATIO = 20  # images hardly compress; an archive that unpacks to more than this is none of images


def unpack(path: Path, folders: Sequence[Folder], root: Path) -> None:
    """Write the images of `folders` out of an archive; each folder takes its place, whole, when all are written.

    Raises:
        ValueError: a damaged archive, one with a dangerous member, one that grows too large, or another number of images.
        OSError: too little room.
    """
    try:
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive, contextlib.ExitStack() as stack:
            plan, size = _plan(path, archive, folders)
            root.mkdir(parents=True, exist_ok=True)
            _check_room(root, size, f"the images of {path}")
            for folder in folders:
                files.remove_leftovers((root / folder.path).parent)
            parts = {folder: stack.enter_context(files.replacing(root / folder.path)) for folder in folders}
            for part in parts.values():
                part.mkdir()
            for (folder, _), (name, open_member) in tqdm(plan.items(), f"unpacking {path.name}", unit="image", leave=False):
                with open_member() as source, open(parts[folder] / name, "xb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: damaged, or no zip or tar file ({error}); nothing was unpacked: remove it, and get it again") from None


Plan = dict[tuple[Folder, str], tuple[str, Callable[[], Any]]]  # folder, name in lower case: name, what opens the member


def _plan(path: Path, archive: zipfile.ZipFile | tarfile.TarFile, folders: Sequence[Folder]) -> tuple[Plan, int]:
    """Which members go where, and their size in bytes.

    Of a member's name, only the last part is used. So nothing can be written elsewhere, from zip and tar files alike and on every
    Python (tarfile's filters need 3.10.12 or 3.11.4); names that point elsewhere are refused all the same.
    """
    plan: Plan = {}
    total, limit = 0, HIGHEST_RATIO * path.stat().st_size + 2**20
    for member, size, is_plain, open_member in _members(archive):
        place, problem = PurePosixPath(member), ""
        folder = next((folder for folder in folders if any(map(place.match, folder.patterns.split("|")))), None)
        if place.is_absolute() or ".." in place.parts or re.search(r"[\\:\x00-\x1f]", member):
            problem = "has a name that may point out of the folder"
        elif folder and place.suffix.lower() in image_files.IMAGE_SUFFIXES and not place.name.startswith("."):
            key = folder, place.name.lower()  # one file on systems that ignore case
            total += size
            problem = "" if is_plain else "is a folder, a link, a device or encrypted"
            problem = "is there twice" if key in plan else problem
            problem = f"lets it grow to over {total:,} bytes" if total > limit else problem
            plan[key] = place.name, open_member
        if problem:
            raise ValueError(f"{path}: refused, as its member {member!r} {problem}; nothing was unpacked")
    for folder in folders:
        count = sum(folder == other for other, _ in plan)
        if not count or folder.images not in (None, count):
            raise ValueError(f"{path}: holds {count} of the {folder.images or 'some'} images for {folder.path}; nothing was unpacked")
    return plan, total


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[tuple[str, int, bool, Callable[[], Any]]]:
    """Of each member, the name, the size, whether it is a plain file, and what opens it."""
    if isinstance(archive, tarfile.TarFile):
        for entry in archive:
            yield entry.name, entry.size, entry.isreg(), partial(archive.extractfile, entry)
    else:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # zero where the archive was not made on Unix
            is_plain = kind in (0, stat.S_IFREG) and not info.is_dir() and not info.flag_bits & 1  # the flag of encrypted members
            yield info.orig_filename, info.file_size, is_plain, partial(archive.open, info)  # zipfile mends its own `filename`


if __name__ == "__main__":
    run_script(main)
