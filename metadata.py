"""What the file of a photo says beside pixels: EXIF, XMP, comments, and PNG's chunks of text and colour.

    found = read(file)                                                # of any format that image_files reads
    found.for_pillow("JPEG", size), found.png_chunks(size), found.tiff_tags()
    found.left_out("TIFF")                                            # a sentence on what that format doesn't hold here

The upscaled photo is upright and larger, so its orientation is 1, its size the new one, and the thumbnail of the old one is dropped.
"""

import contextlib
import importlib.util
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

FORMATS = ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF"]  # that Pillow may open; others may start programs, as EPS does
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")

# Bytes of a profile or text. Printers' profiles and image generators' text exceed Pillow's 1 MiB; still longer ones only fill the memory
LONGEST = 2**26
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = LONGEST

_JPEG_SEGMENT = 65_500  # bytes that a JPEG segment can hold
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_COLOUR = (b"cICP", b"gAMA", b"cHRM", b"sRGB", b"mDCV", b"cLLI")  # what a PNG's values mean, beside the colour profile
_CURVES = {8: "linear", 16: "PQ", 18: "HLG"}  # transfer functions by their numbers in ITU-T H.273
_SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # white, red, green, blue; times 100,000
_SRGB = ((1, 13), (1, 1))  # primaries and transfer function in cICP that equal sRGB, or nearly so

# Chunks that the image has in another form, or that are about its palette or its frames, which are counted
_CARRIED = (
    b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"pHYs", b"eXIf", b"bKGD", b"hIST", b"sPLT", b"sBIT", b"acTL", b"fcTL", b"fdAT",
)  # fmt: skip
# EXIF tags of the photo; the others of a TIFF describe how its pixels are stored
_DESCRIBING = {270, 271, 272, 274, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853, *range(40091, 40096)}
_STORING = {
    *range(254, 264), 266, 269, 273, *range(277, 285), 282, 283, 285, 292, 293, 296, 297, *range(317, 348), *range(512, 533), 700, 34675,
    50341, 59932,
}  # fmt: skip
_TEXT_TAGS = (270, 271, 272, 305, 306, 315, 316, 33432)  # that a TIFF file holds as text
_NOT_EXIF = {33723: "IPTC", 34377: "Photoshop's", 37724: "Photoshop's"}


@dataclass(frozen=True)
class Metadata:
    """What to carry into the upscaled photo.

    Args:
        exif: as Pillow takes it, upright, without the thumbnail; empty: none.
        xmp: Adobe's XML, upright.
        comment: of JPEG and GIF.
        chunks: of PNG, text and colour, as (type, content).
        lost: what can't be carried into any format, in words.
    """

    exif: bytes = b""
    xmp: bytes = b""
    comment: bytes = b""
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    lost: tuple[str, ...] = ()

    def for_pillow(self, kind: str, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments of `Image.save` for a photo of (height, width), except for PNG, which takes `png_chunks`."""
        if kind not in ("JPEG", "WEBP"):
            return {}
        parts: dict[str, Any] = {"exif": self._resized(size), "xmp": self.xmp, "comment": self.comment if kind == "JPEG" else b""}
        return {name: part for name, part in parts.items() if part and (kind != "JPEG" or len(part) <= _JPEG_SEGMENT)}

    def png_chunks(self, size: tuple[int, int]) -> list[tuple[bytes, bytes]]:
        """Chunks for a PNG of (height, width), to stand before its pixels."""
        chunks = list(self.chunks)
        if self.exif:
            chunks.append((b"eXIf", self._resized(size).removeprefix(b"Exif\0\0")))
        if self.xmp:
            chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + self.xmp))
        if self.comment:
            chunks.append((b"tEXt", b"Comment\0" + self.comment.replace(b"\0", b"")))
        return chunks

    def tiff_tags(self) -> list[tuple[int, int, int, bytes, bool]]:
        """Tags as tifffile takes them: the EXIF texts of the main directory, and XMP."""
        exif = _parse(self.exif)
        texts = [(number, str(exif[number]).encode() + b"\0") for number in _TEXT_TAGS if exif.get(number)]
        tags = [(number, 2, len(text), text, True) for number, text in texts]
        return [*tags, (700, 1, len(self.xmp), self.xmp, True)] if self.xmp else tags

    def left_out(self, kind: str) -> list[str]:
        """What a file of this kind won't hold of this photo, as sentences."""
        exif, missing = _parse(self.exif), list(self.lost)
        if kind == "TIFF":
            missing += ["the camera's settings (EXIF)"] if exif.get_ifd(ExifTags.IFD.Exif) else []
            missing += ["the place (GPS)"] if exif.get_ifd(ExifTags.IFD.GPSInfo) else []
        elif kind == "BMP" or (kind == "JPEG" and len(self.exif) > _JPEG_SEGMENT):
            missing += ["EXIF"] if self.exif else []
        if kind == "BMP" or (kind == "JPEG" and len(self.xmp) > _JPEG_SEGMENT):
            missing += ["XMP"] if self.xmp else []
        if self.comment and (kind not in ("PNG", "JPEG") or (kind == "JPEG" and len(self.comment) > _JPEG_SEGMENT)):
            missing.append("the comment")
        if kind != "PNG":
            missing += [f"the text {keyword!r}" for keyword in self._keywords()]
        sentences = [f"left out of the {kind} file: {', '.join(missing)}"] if missing else []
        colours = [] if kind == "PNG" else self._unusual_colours()
        with contextlib.suppress(KeyError):  # of Pillow before 13, where there is no such part
            if kind in ("TIFF", "BMP") and exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03":
                colours.append("Adobe RGB by EXIF alone")
        remedy = f"which {kind} can't say, so they will look wrong: choose --output_format png"
        return sentences + [f"its colours are {each}, {remedy}" for each in colours]

    def _resized(self, size: tuple[int, int]) -> bytes:
        exif = _parse(self.exif)
        settings = exif.get_ifd(ExifTags.IFD.Exif)
        for directory, width, height in ((exif, 256, 257), (settings, 40962, 40963)):
            for number, value in ((width, size[1]), (height, size[0])):
                if number in directory:
                    directory[number] = value
        return exif.tobytes() if self.exif else b""

    def _keywords(self) -> list[str]:
        return [content.split(b"\0")[0].decode("latin-1") for kind, content in self.chunks if kind in _TEXT]

    def _unusual_colours(self) -> list[str]:
        chunks = dict(self.chunks)
        if len(code := chunks.get(b"cICP", b"")) == 4:
            return [] if (code[0], code[1]) in _SRGB else [f"{_CURVES.get(code[1], 'not sRGB')} by its cICP chunk"]
        gamma = int.from_bytes(chunks.get(b"gAMA", b"")[:4], "big") / 100_000
        if b"sRGB" in chunks:
            return []
        found = [f"of gamma {gamma:.3g} by its gAMA chunk"] if gamma and abs(gamma - 1 / 2.2) > 0.01 else []
        primaries = struct.unpack(">8I", chunks[b"cHRM"]) if len(chunks.get(b"cHRM", b"")) == 32 else _SRGB_PRIMARIES
        is_srgb = all(abs(one - other) < 1000 for one, other in zip(primaries, _SRGB_PRIMARIES, strict=True))
        return found if is_srgb else [*found, "of other primaries by its cHRM chunk"]


def read(file: BinaryIO) -> Metadata:
    """The metadata of an image file; what is damaged is named in `lost`, as its pixels may be sound."""
    file.seek(0)
    start = file.read(8)
    if start == b"\x89PNG\r\n\x1a\n":
        return _read_png(file)
    if start[:4] in TiffImagePlugin.PREFIXES:
        return _read_tiff(file)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        info, applications = image.info, getattr(image, "applist", [])
        exif, lost = _upright(info.get("exif", b""))
        if "photoshop" in info:
            lost += ("IPTC and Photoshop's data",)
        if any(content.startswith(b"http://ns.adobe.com/xmp/extension/") for _, content in applications):
            lost += ("the second part of XMP",)
        comment = info.get("comment", b"")
        return Metadata(exif, _upright_xmp(info.get("xmp") or b""), comment if isinstance(comment, bytes) else b"", lost=lost)


def _read_tiff(file: BinaryIO) -> Metadata:
    file.seek(0)
    exif = Image.Exif()
    try:
        exif.load_from_fp(file)
        others = {number: _NOT_EXIF.get(number, f"TIFF tag {number}") for number in exif if number not in _DESCRIBING | _STORING}
        xmp = exif.get(700, b"")
        for number in set(exif) - _DESCRIBING:
            del exif[number]
        kept, lost = _upright(exif.tobytes() if len(exif) > (274 in exif) else b"")
    except Exception:  # damaged tags make Pillow raise nearly anything
        return Metadata(lost=("damaged TIFF tags",))
    return Metadata(kept, _upright_xmp(xmp if isinstance(xmp, bytes) else b""), lost=(*lost, *sorted(set(others.values()))))


def _read_png(file: BinaryIO) -> Metadata:
    exif, xmp, kept, kinds = b"", b"", list[tuple[bytes, bytes]](), _png_kinds(file)
    lost = tuple(sorted(f"the {kind.decode('latin-1')} chunk" for kind in kinds - {*_TEXT, *_COLOUR, *_CARRIED}))
    colour = _COLOUR if b"iCCP" not in kinds else ()  # which counts more
    for kind, content in png_chunks(file, (*_TEXT, *colour, b"eXIf")):
        if kind == b"eXIf":
            exif, damaged = _upright(content)
            lost += damaged
        elif content.startswith(b"XML:com.adobe.xmp\0"):
            xmp = _upright_xmp(_text_of(content))
        elif content.startswith(b"Raw profile type "):  # ImageMagick's older way, whose orientation would turn the photo again
            lost += (content.split(b"\0")[0].decode("latin-1"),)
        else:
            kept.append((kind, content))
    return Metadata(exif, xmp, chunks=tuple(kept), lost=lost)


def png_chunks(file: BinaryIO, kinds: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of some kinds, from the start of a PNG to its end or to where it is damaged."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        if kind in kinds and length <= LONGEST:
            content = file.read(length)
            if len(content) == length and zlib.crc32(kind + content) == int.from_bytes(file.read(4), "big"):
                yield kind, content
        else:
            file.seek(length + 4, 1)


def _png_kinds(file: BinaryIO) -> set[bytes]:
    """The kinds of chunks in a PNG."""
    kinds = set()
    file.seek(8)
    while len(header := file.read(8)) == 8:
        kinds.add(header[4:])
        file.seek(int.from_bytes(header[:4], "big") + 4, 1)
    return kinds


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _text_of(content: bytes) -> bytes:
    """The text of an iTXt chunk: keyword, compression flag and method, language, translated keyword, text."""
    _, _, rest = content.partition(b"\0")
    text = rest[2:].split(b"\0", 2)[-1]
    return zlib.decompressobj().decompress(text, LONGEST) if rest[:1] == b"\1" else text


def _parse(exif: bytes) -> Image.Exif:
    parsed = Image.Exif()
    if exif:
        parsed.load(exif)
    return parsed


def _upright(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """EXIF whose orientation is 1, written anew without the thumbnail; and what is lost."""
    try:
        exif = _parse(content)
        if 274 in exif:
            exif[274] = 1
        if content and not len(exif):
            return b"", ("damaged EXIF",)
        return (exif.tobytes() if content else b""), ()
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        return b"", ("damaged EXIF",)


def _upright_xmp(xmp: bytes | str) -> bytes:
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return re.sub(rb"""(tiff:Orientation\s*(?:=\s*["']|>\s*))[0-9]""", rb"\g<1>1", xmp)
