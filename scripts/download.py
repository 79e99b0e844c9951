"""Fetch published data sets and weights, check them, and lay them out as the other scripts expect:

python scripts/download.py                                  # list what is known, where from, and what is there
python scripts/download.py --items DIV2K Set5 Set14 vgg19   # fetch; the same command goes on after an interruption
python scripts/download.py --items Flickr2K --archive ~/Downloads/Flickr2K.zip      # check and unpack what you fetched yourself

Addresses, sizes and checksums are those that other repositories list (TensorFlow Datasets, torchSR, Real-ESRGAN, torchvision);
none of the addresses could be tried when this was written. Data sets have terms of their own, mostly research only.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import files
import image_files
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    items: tuple[str, ...] = ()  # what to fetch; empty: list everything that is known, and whether it is there
    data_root: str = "data"  # where the sets go
    weights_dir: str = "pretrained"  # where weights go
    downloads_dir: str = ""  # where archives and unfinished downloads lie; empty: <data_root>/downloads
    archive: str = ""  # a file that you fetched yourself, to be checked and unpacked for --items; it is left as it is
    mirror: str = ""  # take each file from <mirror>/<its name>; the published checksums hold all the same
    keep_archives: bool = False  # keep downloaded archives after they were unpacked
    retries: int = 5  # tries in a row that bring nothing new, after which a download is given up
    wait: float = 2.0  # before the second try, doubled for each further one, seconds
    timeout: float = 30.0  # how long a server may stay silent, seconds

    @property
    def downloads(self) -> Path:
        return Path(self.downloads_dir or Path(self.data_root) / "downloads").absolute()


# What there is


@dataclass(frozen=True)
class Source:
    """A published file; `checksum` is "md5:…" or "sha256:…", empty where none is published; `size` is in bytes."""

    file: str
    url: str
    checksum: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Folder:
    """A folder of images below data_root, how many belong there, and the archive's members that go into it."""

    path: str
    images: int | None
    members: str  # a regular expression for the whole name


@dataclass(frozen=True)
class Item:
    """Something to fetch: folders of images from an archive or, without folders, one file of weights.

    `by_hand` says where a person finds it, for items without a source, and where a source fails.
    """

    source: Source | None
    folders: tuple[Folder, ...] = ()
    by_hand: str = ""


ANY = r"(?:.*/)?"  # folders around the one that matters, which differ between copies of a set
IMAGE = r'(?!(?i:con|prn|aux|nul|com\d|lpt\d)\.)[^/.:*?"<>|][^/:*?"<>|]*\.(?i:png|jpg|jpeg|bmp)'  # not hidden, a file everywhere
DIV2K_HOME = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
EDSR_HOME = "https://cv.snu.ac.kr/research/EDSR"
COPIES = "https://huggingface.co/datasets/goodfellowliu"
SHARED_FOLDERS = (  # which RCAN-PyTorch's documentation links
    "https://drive.google.com/drive/folders/1A6lzGeQrFMxPqJehK9s37ce-tPDj20mD or "
    "https://pan.baidu.com/s/1o-8Ty_7q6DiS3ykLU09IVg (code llot)"
)
BENCHMARK = Source("benchmark.tar", f"{EDSR_HOME}/benchmark.tar", "md5:4ace41d33c2384b97e6b320cd0afd6ba")


def _div2k(file: str, target: str, images: int, checksum: str, size: int | None = None) -> Item:
    inside = re.sub(r"_(X\d)$", r"/\1", file)  # DIV2K_train_LR_bicubic_X2.zip holds DIV2K_train_LR_bicubic/X2/0001x2.png
    source = Source(f"{file}.zip", f"{DIV2K_HOME}/{file}.zip", checksum, size)
    return Item(source, (Folder(target, images, f"{ANY}{inside}/{IMAGE}"),), by_hand=f"{DIV2K_HOME}/ or {COPIES}/DIV2K")


def _benchmark(name: str, images: int) -> Item:
    places = ("HR", "LR_bicubic/X2", "LR_bicubic/X3", "LR_bicubic/X4")
    folders = tuple(Folder(f"{name}/{place}", images, f"{ANY}{name}/{place}/{IMAGE}") for place in places)
    return Item(BENCHMARK, folders, by_hand="the links in https://github.com/sanghyun-son/EDSR-PyTorch")


def _bsds(target: str, images: int, part: str) -> Folder:
    return Folder(target, images, f"{ANY}data/images/{part}/{IMAGE}")


def _rcan(scale: int) -> Item:
    file = f"rcan_x{scale}.pt"
    return Item(Source(file, f"https://github.com/Coloquinte/torchSR/releases/download/v1.0.3/{file}"))


ITEMS = {
    "DIV2K": _div2k(
        "DIV2K_train_HR", "DIV2K/GT", 800, "sha256:9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335", 3_530_603_713
    ),
    "DIV2K_valid": _div2k(
        "DIV2K_valid_HR", "DIV2K_valid/GT", 100, "sha256:20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc", 448_993_893
    ),
    "DIV2K_LR_X2": _div2k(
        "DIV2K_train_LR_bicubic_X2", "DIV2K/LR_bicubic/X2", 800,
        "sha256:a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850", 925_390_592,
    ),
    "DIV2K_LR_X3": _div2k("DIV2K_train_LR_bicubic_X3", "DIV2K/LR_bicubic/X3", 800, "md5:ad80b9fe40c049a07a8a6c51bfab3b6d"),
    "DIV2K_LR_X4": _div2k("DIV2K_train_LR_bicubic_X4", "DIV2K/LR_bicubic/X4", 800, "md5:76c43ec4155851901ebbe8339846d93d"),
    "DIV2K_valid_LR_X2": _div2k(
        "DIV2K_valid_LR_bicubic_X2", "DIV2K_valid/LR_bicubic/X2", 100,
        "sha256:60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57", 117_763_600,
    ),
    "DIV2K_valid_LR_X3": _div2k("DIV2K_valid_LR_bicubic_X3", "DIV2K_valid/LR_bicubic/X3", 100, "md5:18b1d310f9f88c13618c287927b29898"),
    "DIV2K_valid_LR_X4": _div2k("DIV2K_valid_LR_bicubic_X4", "DIV2K_valid/LR_bicubic/X4", 100, "md5:21962de700c8d368c6ff83314480eff0"),
    "Flickr2K": Item(  # Flickr2K/Flickr2K_HR/000001.png, beside LR images; copies have Flickr2K/000001.png
        Source("Flickr2K.tar", f"{EDSR_HOME}/Flickr2K.tar", "md5:5d3f39443d5e9489bff8963f8f26cb03"),
        (Folder("Flickr2K/GT", 2650, f"{ANY}Flickr2K(?:_HR)?/{IMAGE}"),),
        by_hand=f"{COPIES}/Flickr2K",
    ),
    "BSDS500": Item(  # the 100 validation images are BSDS300's test images, which super-resolution calls B100
        Source("BSDS500-master.zip", "https://github.com/BIDS/BSDS500/archive/refs/heads/master.zip"),
        (_bsds("BSDS200/GT", 200, "train"), _bsds("BSDS_test200/GT", 200, "test"), _bsds("B100/GT", 100, "val")),
        by_hand="https://github.com/BIDS/BSDS500",
    ),
    "Set5": _benchmark("Set5", 5),
    "Set14": _benchmark("Set14", 14),
    "B100": _benchmark("B100", 100),
    "Urban100": _benchmark("Urban100", 100),
    "T91": Item(None, (Folder("T91/GT", 91, f"{ANY}{IMAGE}"),), by_hand=SHARED_FOLDERS),
    "OST": Item(  # its archives hold annotations too, as images
        None,
        (Folder("OST/GT", None, f"{ANY}(?:OutdoorSceneTrain_v2/[^/]+|OST)/{IMAGE}"),),
        by_hand="https://github.com/xinntao/SFTGAN#ost-dataset (OutdoorSceneTrain_v2), "
        f"https://openmmlab.oss-cn-hangzhou.aliyuncs.com/datasets/OST_dataset.zip, {COPIES}/OST or {SHARED_FOLDERS}",
    ),
    "Manga109": Item(
        None, (Folder("Manga109/GT", 109, f"{ANY}{IMAGE}"),), by_hand="http://www.manga109.org/en/, on request"
    ),
    "DIV8K": Item(None, (Folder("DIV8K/GT", None, f"{ANY}{IMAGE}"),), by_hand=f"its authors, on request, or {SHARED_FOLDERS}"),
    "vgg19": Item(  # torchvision's, trained on ImageNet
        Source(
            "vgg19-dcbb9e9d.pth",
            "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
            "sha256:dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
            574_673_361,
        )
    ),
    "rcan_x2": _rcan(2),
    "rcan_x3": _rcan(3),
    "rcan_x4": _rcan(4),
    "rcan_x8": _rcan(8),
    "rcan_native": Item(  # names as in model.RCAN
        None,
        by_hand="https://drive.google.com/drive/folders/17ju2HN7Y6pyPK2CC_AqnAfTOe9_3hCQ8 or "
        "https://pan.baidu.com/s/1yNs4rqIb004-NKEdKBJtYg (code llot)",
    ),
}  # fmt: skip


# The script


def main(argv: Sequence[str] | None = None) -> None:
    """List all items, or fetch those that were asked for; what is complete already is left alone, without a request.

    Raises:
        ValueError: an unknown item, a file other than the published one, a refused archive, a user's file in the way.
        OSError: a download that doesn't come through, too little room, or an item that must be fetched by hand.
    """
    config = tyro.cli(DownloadConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    _check_settings(config)
    if not config.items:
        print("\n".join(overview(config)))
        return
    missing = [name for name in dict.fromkeys(config.items) if not _is_there(name, config)]
    notes = {name: "already there" for name in config.items if name not in missing}
    try:
        _get(missing, notes, config)
    finally:
        for name, note in notes.items():
            print(f"{name}: {_where(name, config)}{f'; {note}' if note else ''}")
    by_hand = [name for name in missing if name not in notes]
    if by_hand:
        raise FileNotFoundError("\n".join(_by_hand(name, config) for name in by_hand))


def _get(names: Sequence[str], notes: dict[str, str], config: DownloadConfig) -> None:
    """Fetch or unpack items, and note what is worth saying about each that came; those to be fetched by hand are passed over."""
    if config.archive:
        for name in names:
            notes[name] = _take_given(Path(config.archive), name, config)
        return
    for source in dict.fromkeys(ITEMS[name].source for name in names if ITEMS[name].source):
        together = [name for name in names if ITEMS[name].source == source]
        notes |= dict.fromkeys(together, _fetch(source, together, config))


def overview(config: DownloadConfig) -> list[str]:
    """Two lines for each item: whether it is there and where it belongs; where it comes from, its size and checksum."""
    lines = []
    for name, item in ITEMS.items():
        state = "there" if _is_there(name, config, thorough=False) else "missing" if item.source else "missing, fetch by hand"
        lines.append(f"{name}: {state}; {_where(name, config)}")
        if item.source:
            size = f"{item.source.size:,} bytes" if item.source.size else "size unknown"
            lines.append(f"    {_address(item.source, config)}, {size}, {item.source.checksum or 'no checksum published'}")
        else:
            lines.append(f"    {item.by_hand}")
    return [*lines, "Fetch with --items, as in --items DIV2K Set5; none of these addresses could be tried when they were listed."]


def _check_settings(config: DownloadConfig) -> None:
    unknown = [name for name in config.items if name not in ITEMS]
    if unknown:
        raise ValueError(f"items: {unknown[0]!r} is unknown; known are {', '.join(ITEMS)}")
    if config.archive and not config.items:
        raise ValueError(f"archive={config.archive!r} needs --items, to say what it holds")
    if config.archive and not Path(config.archive).is_file():
        raise FileNotFoundError(f"{Path(config.archive).absolute()}: no such file; --archive names one that you downloaded")
    if config.mirror and urlsplit(config.mirror).scheme not in ("http", "https"):
        raise ValueError(f"mirror={config.mirror!r} must begin with https:// or http://")
    if config.retries < 1 or config.wait < 0 or config.timeout <= 0:
        raise ValueError(f"retries={config.retries}, wait={config.wait}, timeout={config.timeout} must be at least 1, at least 0, above 0")


# Where things belong


def _path(config: DownloadConfig, folder: Folder) -> Path:
    """Where the folder's images are: its own place, or where the set's originals lie complete under another known name."""
    place = Path(config.data_root).absolute() / folder.path
    if _complete(place, folder):
        return place
    return next((other for other in _siblings(place) if _complete(other, folder)), place)


def _siblings(place: Path) -> list[Path]:
    """The other folders that `dataset.find_pairs` takes originals from, for a folder of originals."""
    return [place.with_name(name) for name in dataset.GT_FOLDERS if name != place.name] if place.name in dataset.GT_FOLDERS else []


def _complete(path: Path, folder: Folder) -> bool:
    count = _count(path)
    return count > 0 and folder.images in (None, count)


def _count(path: Path) -> int:
    return len(image_files.list_images(path)) if path.is_dir() else 0


def _wanted(item: Item, config: DownloadConfig) -> list[Folder]:
    """The folders that are not complete; LR images are not wanted beside originals that lie elsewhere, with names of their own."""
    moved = {
        folder.path.split("/")[0] for folder in item.folders if _path(config, folder) != Path(config.data_root).absolute() / folder.path
    }
    return [folder for folder in item.folders if folder.path.split("/")[0] not in moved and not _complete(_path(config, folder), folder)]


def _weights(name: str, config: DownloadConfig) -> Path:
    source = ITEMS[name].source
    return Path(config.weights_dir).absolute() / (source.file if source else name)


def _is_there(name: str, config: DownloadConfig, thorough: bool = True) -> bool:
    """Whether an item is complete; a file of weights with a published checksum is read for that if `thorough`."""
    item = ITEMS[name]
    if item.folders:
        return not _wanted(item, config)
    path = _weights(name, config)
    if item.source is None:
        return path.is_dir() and any(path.iterdir())
    if thorough and path.is_file():
        _refuse_other(path, item.source)
    return path.is_file()


def _where(name: str, config: DownloadConfig) -> str:
    item = ITEMS[name]
    if not item.folders:
        path = _weights(name, config)
        return f"{path}, {path.stat().st_size:,} bytes" if path.is_file() else str(path)
    wanted = _wanted(item, config)
    paths = [_path(config, folder) for folder in item.folders]
    needed = [f" of {folder.images or 'an unknown number'}" if folder in wanted else "" for folder in item.folders]
    return ", ".join(f"{_count(path)}{of} images in {path}" for path, of in zip(paths, needed, strict=True) if _count(path) or of)


def _by_hand(name: str, config: DownloadConfig) -> str:
    item = ITEMS[name]
    start = f"{name}: can't be fetched from here; get it by hand from {item.by_hand}"
    if not item.folders:
        return f"{start}, and put the files into {_weights(name, config)}"
    number = f"its {item.folders[0].images} images" if item.folders[0].images else "its images"
    place = Path(config.data_root).absolute() / item.folders[0].path
    return f"{start}, and put {number} into {place}, or name the archive: --items {name} --archive FILE"


# Fetching


def _fetch(source: Source, names: Sequence[str], config: DownloadConfig) -> str:
    """Download a file, check it, and install it for each item of these names; returns what is worth noting about the file."""
    kept = config.downloads / source.file
    if kept.is_file():
        _refuse_other(kept, source)
        _install(kept, names, config)
        return _unchecked(kept, source)
    config.downloads.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}.part")
    download(_address(source, config), part, source.size, retries=config.retries, wait=config.wait, timeout=config.timeout)
    problem = _problem(part, source)
    if problem:
        _discard(part)
        raise ValueError(
            f"{kept}: {problem}; the file was removed, and nothing of it was used: run again to fetch it anew, "
            f"or get it by hand{f' from {_hint(source)}' if _hint(source) else ''} and name it with --archive"
        )
    note = _unchecked(part, source)
    try:
        _install(part, names, config)
    except BadArchive as error:
        if source.checksum:  # then the file is the published one, and fetching it again would change nothing
            raise
        _discard(part)
        raise BadArchive(f"{error}; the download was removed") from None
    if config.keep_archives and ITEMS[names[0]].folders:
        os.replace(part, kept)
    _discard(part)
    return note


def _address(source: Source, config: DownloadConfig) -> str:
    return f"{config.mirror.rstrip('/')}/{quote(source.file)}" if config.mirror else source.url


def _refuse_other(path: Path, source: Source) -> None:
    problem = _problem(path, source)
    if problem:
        raise ValueError(f"{path}: is in the way, as {problem}; remove or rename it")


def _unchecked(path: Path, source: Source) -> str:
    """What a person may want to write down about a file that nobody published a checksum of."""
    return "" if source.checksum else f"no checksum is published for {source.file}, its sha256 is {_digest(path, 'sha256')}"


def _hint(source: Source) -> str:
    return next((item.by_hand for item in ITEMS.values() if item.source == source and item.by_hand), "")


def _problem(path: Path, source: Source) -> str:
    """What shows that a file isn't the published one, or nothing."""
    kind = _kind(path)
    if kind == "a web page" or (kind != "an archive" and not source.file.endswith((".pt", ".pth"))):
        return f"it is {kind}, not {source.file}"
    if source.size not in (None, path.stat().st_size):
        return f"its size is {path.stat().st_size:,} bytes, but the published one {source.size:,}"
    if source.checksum:
        algorithm, published = source.checksum.split(":")
        digest = _digest(path, algorithm)
        if not digest.startswith(published):  # torch names files after a part of it
            return f"its {algorithm} is {digest}, but the published one {published}"
    return ""


def _kind(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(512).lstrip()
    if head.lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    if _is_zip(path) or tarfile.is_tarfile(path):
        return "an archive"
    return "neither a zip nor a tar file"


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:  # by its beginning: a tar file may end in a zip file
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file, _bar(f"checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _take_given(path: Path, name: str, config: DownloadConfig) -> str:
    """Install a file that a person fetched; it must be the published one if it has its name."""
    item = ITEMS[name]
    if not item.folders and item.source is None:
        raise ValueError(f"{path}: {name} needs no unpacking; put the file into {_weights(name, config)}")
    problem = _problem(path, item.source) if item.source else ""
    if problem and (path.name == item.source.file or not item.folders):
        raise ValueError(f"{path}: {problem}; nothing of it was used: get it again, or give another archive of the set another name")
    _install(path, [name], config)
    if item.source and item.source.checksum and not problem:
        return "the file has the published checksum"
    return f"{path.name} couldn't be compared with a published file, its sha256 is {_digest(path, 'sha256')}"


def _install(path: Path, names: Sequence[str], config: DownloadConfig) -> None:
    for name in names:
        if ITEMS[name].folders:
            unpack(path, name, _wanted(ITEMS[name], config), Path(config.data_root).absolute())
        else:
            _copy_whole(path, _weights(name, config))


# Downloading

CHUNK = 2**20  # bytes held in memory at a time
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # answers that may differ a little later


class _Broken(Exception):
    """A try that ended too early, though another one may get further."""


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, and from https only to https."""

    def redirect_request(self, request: Request, answer: Any, code: int, message: str, headers: Any, url: str) -> Request | None:
        before, after = urlsplit(request.full_url).scheme, urlsplit(url).scheme
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            answer.close()
            raise ValueError(f"{request.full_url}: redirects to {url}, which is not followed; only https, and http from http, is")
        return super().redirect_request(request, answer, code, message, headers, url)


def download(url: str, part: Path, size: int | None = None, *, retries: int = 5, wait: float = 2.0, timeout: float = 30.0) -> None:
    """Bring what `url` serves into the file `part`, going on where an earlier try or call stopped.

    Beside it, <part>.json remembers what the server said about the file, so that two versions are never joined.

    Args:
        size: of the published file, bytes, or None where it is unknown.
        retries: tries in a row that get no further, after which it is given up.
        wait: before the second try, doubled for each further one, seconds.

    Raises:
        ValueError: a file of another size, or a redirect to where nothing should be fetched from.
        OSError: the server can't be reached, doesn't have the file or breaks off again and again, or the disk is full.
    """
    failures, farthest = 0, _length(part)
    while True:
        try:
            return _go_on(url, part, size, timeout)
        except HTTPError as error:
            error.close()
            if error.code not in TRANSIENT:
                raise FileNotFoundError(f"{url}: the server answers {error.code} {error.reason}; {_OTHERWISE}") from None
            problem = f"the server answers {error.code} {error.reason}"
        except (_Broken, URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _length(part) > farthest else failures + 1
        farthest = max(farthest, _length(part))
        if failures >= retries:
            raise ConnectionError(f"{url}: {problem}; given up after {failures} tries, {_length(part):,} bytes are kept; {_OTHERWISE}")
        tqdm.write(f"{url}: {problem}; trying again")
        time.sleep(wait * 2 ** (failures - 1))


_OTHERWISE = "run again to go on, name another server with --mirror, or fetch it in a browser and name the file with --archive"


def _go_on(url: str, part: Path, size: int | None, timeout: float) -> None:
    """One try: ask for what is missing, and append it."""
    have, known = _remembered(part, url)
    if have and have == known.get("size"):
        return  # it was complete, but its checking or unpacking was interrupted
    headers = {"User-Agent": "RCAN-PyTorch/scripts/download.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known.get("version"):
            headers["If-Range"] = known["version"]
    try:
        answer = build_opener(_Redirects).open(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        if have != (_total(error.headers.get("Content-Range")) or known.get("size") or size):
            _discard(part)
            raise _Broken("the part that is here fits no longer") from None
        answer = None  # nothing is missing
    if answer is not None:
        with answer:
            have = _receive(answer, url, part, have, known, size)
    _remember(part, {**_remembered(part, url)[1], "url": url, "size": have})


def _receive(answer: http.client.HTTPResponse, url: str, part: Path, have: int, known: dict[str, Any], size: int | None) -> int:
    """Write the answer's body to `part`, from where the answer starts; returns the file's length, which is complete then."""
    version = _version(answer.headers)
    if answer.status == 206:
        total = _total(answer.headers.get("Content-Range"))
        elsewhere = not (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if elsewhere or version not in ("", known.get("version", "")) or total not in (None, known.get("size") or total):
            _discard(part)
            raise _Broken("the server goes on elsewhere than where the file stopped")
        version = known.get("version", "")
    else:  # the whole file, whatever was asked for
        have, total = 0, int(answer.headers["Content-Length"]) if answer.headers.get("Content-Length", "").isdigit() else None
    if size is not None and total not in (None, size):
        _discard(part)
        raise ValueError(f"{url}: offers {total:,} bytes, but the published file has {size:,}, so this is another one; {_OTHERWISE}")
    total = total or size
    _check_room(part.parent, (total or have) - have, f"{total or 0:,} bytes of {url}")
    if not have:
        part.unlink(missing_ok=True)  # before another version is remembered
    _remember(part, {"url": url, "version": version, "size": total})
    have = _append(answer, part, have, total)
    if total is not None and have < total:
        raise _Broken(f"the connection broke off at {have:,} of {total:,} bytes")
    return have


def _append(answer: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> int:
    with open(part, "ab") as file, _bar(part.name.removesuffix(".part"), total, have) as bar:
        while chunk := answer.read1(CHUNK):
            have += len(chunk)
            if total is not None and have > total:
                raise _Broken(f"the server sends more than the {total:,} bytes that were expected")
            file.write(chunk)
            bar.update(len(chunk))
    return have


def _version(headers: Any) -> str:
    """What tells two versions of a file apart, in a form that If-Range takes; may be empty."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _total(content_range: str | None) -> int | None:
    match = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", content_range or "")
    return int(match[1]) if match else None


def _memory(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _remember(part: Path, known: dict[str, Any]) -> None:
    files.write_text(_memory(part), json.dumps(known))


def _remembered(part: Path, url: str) -> tuple[int, dict[str, Any]]:
    """How many bytes of `url` are here, and what was said about it; what is from elsewhere or of unknown origin counts nothing."""
    try:
        known = json.loads(_memory(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict) or known.get("url") != url:
        return 0, {}
    return _length(part), known


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _memory(part).unlink(missing_ok=True)


def _check_room(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: too little room for {what}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")


def _bar(name: str, total: int | None, initial: int = 0) -> tqdm:
    return tqdm(desc=name, total=total, initial=initial, unit="B", unit_scale=True, unit_divisor=1024, leave=False, dynamic_ncols=True)


# Unpacking

MOST_MEMBERS = 1_000_000
HIGHEST_RATIO = 20  # images hardly compress; what unpacks to more than this is no archive of images


class BadArchive(ValueError):
    """An archive that is damaged, holds what no honest one does, or other images than expected."""


@dataclass(frozen=True)
class Member:
    """A file in an archive; `irregular` says what else it is than a plain file."""

    name: str
    size: int
    irregular: str
    handle: Any


def unpack(path: Path, name: str, folders: Sequence[Folder], root: Path) -> None:
    """Take the images of `folders` out of an archive, and put them into place below `root` when all are written.

    Names are checked before anything is written, and again nothing but the names' last part is used. Nothing is overwritten:
    a file that is there with the same size stays.

    Raises:
        BadArchive: a member that would leave the folder, is a link or device, or clashes with another; a damaged archive, one
            that grows too large, or one with another number of images.
        ValueError: a file that is in the way.
        OSError: too little room.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _opened(path) as (members, open_member):
        plan = _plan(path, members, folders)
        _check_counts(path, plan, folders, root)
        missing = {target: member for target, member in plan.items() if not _kept(root / target, member)}
        _check_room(root, sum(member.size for member in missing.values()), f"the images of {path}")
        _remove_leftovers(root, name)
        staging = root / f".{name}.unpacking-{os.getpid()}"
        try:
            for target, member in tqdm(missing.items(), f"unpacking {name}", unit="image", leave=False):
                (staging / target).parent.mkdir(parents=True, exist_ok=True)
                with open_member(member.handle) as stream:
                    _extract(path, stream, member, staging / target)
            for target, member in missing.items():
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                if not _kept(root / target, member):
                    _move(staging / target, root / target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[Member], Callable[[Any], IO[bytes]]]]:
    """The members of a zip or tar file, directories left out, and a function that opens one; all names are harmless."""
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                yield _listed(path, map(_of_zip, archive.infolist())), archive.open
        else:
            with tarfile.open(path) as archive:
                yield _listed(path, map(_of_tar, archive)), archive.extractfile
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise BadArchive(f"{path}: damaged, or no archive that can be read here ({error}); nothing of it was put into place") from None


def _of_zip(info: zipfile.ZipInfo) -> Member:
    kind = stat.S_IFMT(info.external_attr >> 16)  # zero where the archive was not made on Unix
    odd = "" if kind in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG) else "a link or device"
    name = info.orig_filename if "\\" in info.orig_filename or "\0" in info.orig_filename else info.filename  # zipfile mends both
    return Member(name, info.file_size, odd or ("encrypted" if info.flag_bits & 1 else ""), info)


def _of_tar(info: tarfile.TarInfo) -> Member:
    plain = info.isdir() or (info.isreg() and not info.issparse())
    return Member(info.name + "/" * info.isdir(), info.size, "" if plain else "a link, device or sparse file", info)


def _listed(path: Path, members: Iterable[Member]) -> list[Member]:
    """All members but directories; the archive is refused as soon as a name or the sum of sizes is out of order."""
    listed, total = [], 0
    for member in members:
        parts = member.name.split("/")
        if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", member.name) or re.search(r"[\\\x00-\x1f]", member.name):
            raise BadArchive(f"{path}: refused, as its member {member.name!r} points out of the folder; nothing was unpacked")
        total += member.size
        if member.size < 0 or total > HIGHEST_RATIO * path.stat().st_size + 2**20 or len(listed) >= MOST_MEMBERS:
            raise BadArchive(
                f"{path}: refused at its member {member.name!r}, as it would grow to over {total:,} bytes; nothing was unpacked"
            )
        if not member.name.endswith("/"):
            listed.append(member)
    return listed


def _plan(path: Path, members: Sequence[Member], folders: Sequence[Folder]) -> dict[str, Member]:
    """Where each wanted member goes, below the root."""
    plan: dict[str, Member] = {}
    taken: dict[str, str] = {}
    odd = {str(PurePosixPath(member.name)): member.irregular for member in members if member.irregular}
    for member in members:
        folder = next((folder for folder in folders if re.fullmatch(folder.members, member.name)), None)
        if folder is None:
            continue
        place = PurePosixPath(member.name)
        for name in filter(odd.get, map(str, (place, *place.parents))):
            raise BadArchive(f"{path}: refused, as its member {name!r} is {odd[name]}; nothing was unpacked")
        target = f"{folder.path}/{place.name}"
        if target.lower() in taken:
            raise BadArchive(f"{path}: refused, as {taken[target.lower()]!r} and {member.name!r} would be one file; nothing was unpacked")
        taken[target.lower()] = member.name
        plan[target] = member
    if not plan:
        first = repr(members[0].name) if members else "missing"
        raise BadArchive(f"{path}: none of its {len(members)} members is wanted here, the first is {first}; is it another archive?")
    return plan


def _check_counts(path: Path, plan: dict[str, Member], folders: Sequence[Folder], root: Path) -> None:
    for folder in folders:
        place = root / folder.path
        new = {target.rsplit("/", 1)[1] for target in plan if target.rsplit("/", 1)[0] == folder.path}
        if not new or folder.images not in (None, len(new)):
            raise BadArchive(
                f"{path}: holds {len(new)} images for {place}, but {folder.images or 'some'} belong there; nothing was unpacked"
            )
        strange = {file.name for file in (image_files.list_images(place) if place.is_dir() else [])} - new
        if strange and folder.images:
            raise ValueError(
                f"{place}: {min(strange)} and {len(strange) - 1} more are in the way of the {len(new)} images of {path}; move them"
            )
        for other in _siblings(place):
            if _count(other):
                raise ValueError(f"{other}: {_count(other)} images are in the way of the {len(new)} for {place}; move them")


def _kept(target: Path, member: Member) -> bool:
    """Whether the file is there already; another one there is not touched."""
    if not os.path.lexists(target):
        return False
    if not target.is_file() or target.stat().st_size != member.size:
        raise ValueError(f"{target}: is in the way, as it differs from the {member.size:,} bytes of {member.name}; move or rename it")
    return True


def _extract(path: Path, stream: IO[bytes], member: Member, target: Path) -> None:
    written = 0
    with open(target, "xb") as file:
        while written <= member.size and (chunk := stream.read(CHUNK)):
            written += len(chunk)
            file.write(chunk)
    if written != member.size:
        raise BadArchive(
            f"{path}: its member {member.name!r} is not of the {member.size:,} bytes that it announces; nothing was put into place"
        )


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a set's folder may be a link to another disk
            raise
        _copy_whole(source, target)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, source.stat().st_size, str(target))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _remove_leftovers(root: Path, name: str) -> None:
    """Delete what killed runs left; one that still runs has written within the last ten minutes."""
    for left in root.glob(f".{name}.unpacking-*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - newest > 600:
                shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
