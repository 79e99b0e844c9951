"""Downloads from a local server that misbehaves, archives that attack, and where everything ends up."""

import dataclasses
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request

import numpy as np
import pytest
from PIL import Image

import dataset
from helpers import REPOSITORY, noise_image
from runtime import run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))
download = importlib.import_module("download")


# A server with faults


class Server(ThreadingHTTPServer):
    """Serves `files`; each request takes the next of `faults`, and is noted as (path, Range, If-Range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.etag = {}, [], [], '"one"'
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address):
        pass  # clients may leave

    @property
    def ranges(self):
        return [wanted for _, wanted, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        server.requests.append((self.path.lstrip("/"), wanted, version))
        fault = server.faults.pop(0) if server.faults else {}
        data = server.files.get(self.path.lstrip("/"))
        if "status" in fault or data is None:
            return self.answer(fault.get("status", 404), {"Content-Length": 0, **fault.get("headers", {})}, b"")
        start = int(wanted[6:-1]) if wanted and not fault.get("ignores_range") else None
        if start is not None and version not in (None, server.etag) and not fault.get("ignores_if_range"):
            start = None
        if start is not None and start >= len(data):
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0}, b"")
        headers = {"ETag": server.etag} if server.etag else {}
        if start is not None:
            start = fault.get("starts_at", start)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start or 0 :]
        headers["Content-Length"] = len(body) + fault.get("announces_more", 0)
        self.answer(200 if start is None else 206, {**headers, **fault.get("headers", {})}, body[: fault.get("breaks_off")])

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def call(tmp_path, monkeypatch, server):
    """Runs the script on folders of its own, with the server as mirror."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, mirror=server.url):
        run_script(lambda: download.main([*arguments, "--mirror", mirror, "--wait", "0", "--timeout", "5"]))

    return call


@pytest.fixture
def error_of(call, capsys):
    """The sentence in which a call ends."""

    def error_of(*arguments, **settings):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*arguments, **settings)
        assert stop.value.code == 1
        return capsys.readouterr().err.split("error: ", 1)[1].strip()

    return error_of


# Archives


def image(seed):
    file = io.BytesIO()
    Image.fromarray(noise_image(6, 6, seed)).save(file, "png")
    return file.getvalue()


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name), data)
    return file.getvalue()


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)
    return file.getvalue()


def benchmark(*names, count=5):
    """The members of EDSR's benchmark.tar for these sets."""
    places = {"HR": "", "LR_bicubic/X2": "x2", "LR_bicubic/X3": "x3", "LR_bicubic/X4": "x4"}
    stems = "abcdefghijklmn"[:count]
    return {
        f"benchmark/{name}/{place}/{stem}{end}.png": image(ord(stem)) for name in names for place, end in places.items() for stem in stems
    }


@pytest.fixture
def publish(server, monkeypatch):
    """Let a table's item be an archive of ours: serve it, with its own checksum and size, and `images` in each folder."""

    def publish(name, data, images=None, checksum="sha256", size=True):
        item = download.ITEMS[name]
        published = f"{checksum}:{hashlib.new(checksum, data).hexdigest()}" if checksum else ""
        source = dataclasses.replace(item.source, checksum=published, size=len(data) if size else None)
        folders = tuple(dataclasses.replace(folder, images=images or folder.images) for folder in item.folders)
        monkeypatch.setitem(download.ITEMS, name, dataclasses.replace(item, source=source, folders=folders))
        server.files[source.file] = data

    return publish


def tree(folder):
    """Everything below a folder: links as they point, files as they are."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# The table


def test_every_source_is_https_with_a_checksum_of_full_length_or_none():
    lengths = {"md5": 32, "sha256": 64}
    for item in download.ITEMS.values():
        assert item.source or item.by_hand
        if item.source:
            assert item.source.url.startswith("https://")
            algorithm, _, digest = item.source.checksum.partition(":")
            assert not digest or re.fullmatch("[0-9a-f]+", digest)
            assert len(digest) == lengths.get(algorithm, 0)
    assert "sha256:dcbb9e9d" in download.ITEMS["vgg19"].source.checksum  # torchvision names the file after it
    assert {name: folder.images for name in ("DIV2K", "DIV2K_valid", "Flickr2K") for folder in download.ITEMS[name].folders} == {
        "DIV2K": 800, "DIV2K_valid": 100, "Flickr2K": 2650,
    }  # fmt: skip
    assert {folder.path: folder.images for folder in download.ITEMS["BSDS500"].folders} == {
        "BSDS200/GT": 200, "BSDS_test200/GT": 200, "B100/GT": 100,
    }  # fmt: skip
    for name, number in {"Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100}.items():
        assert {folder.path: folder.images for folder in download.ITEMS[name].folders}[f"{name}/HR"] == number


def test_only_plain_names_of_images_are_taken():
    taken = ["0001.png", "a b(1).JPG", "ü.jpeg", "t1.bmp", "console.png"]
    left = [".0001.png", "._0001.png", "Thumbs.db", "CON.png", "lpt1.x.png", "a.png:stream.png", "a/b.png", "x.png.exe", "x.svg", ".png"]
    assert [name for name in taken + left if re.fullmatch(download.IMAGE, name)] == taken


MEMBERS = {  # as each archive is documented, with what must not be taken beside it
    "DIV2K": ["DIV2K_train_HR/0001.png", "DIV2K_train_HR/0002.png", "DIV2K_train_HR/._0001.png", "__MACOSX/._DIV2K_train_HR"],
    "DIV2K_LR_X2": ["DIV2K_train_LR_bicubic/X2/0001x2.png", "DIV2K_train_LR_bicubic/X2/0002x2.png"],
    "DIV2K_valid": ["DIV2K_valid_HR/0801.png", "DIV2K_valid_HR/0802.png"],
    "DIV2K_valid_LR_X4": ["DIV2K_valid_LR_bicubic/X4/0801x4.png", "DIV2K_valid_LR_bicubic/X4/0802x4.png"],
    "Flickr2K": ["Flickr2K/Flickr2K_HR/000001.png", "Flickr2K/Flickr2K_HR/000002.png", "Flickr2K/Flickr2K_LR_bicubic/X2/000001x2.png"],
    "BSDS500": [
        f"BSDS500-master/BSDS500/data/{name}"
        for name in (
            "images/train/1.jpg", "images/train/2.jpg", "images/test/3.jpg", "images/test/4.jpg", "images/val/5.jpg", "images/val/6.jpg",
            "images/val/Thumbs.db", "groundTruth/train/1.mat", ".DS_Store",
        )
    ],
}  # fmt: skip


def test_published_layouts_are_unpacked_as_find_pairs_wants_them(call, publish, server, capsys):
    for name, members in MEMBERS.items():
        pack = tar_of if name == "Flickr2K" else zip_of
        publish(name, pack({member: image(seed) for seed, member in enumerate(members)}), images=2, size=False)
    publish("Set5", tar_of(benchmark("Set5", "Set14")), checksum="md5")
    call("--items", *MEMBERS, "Set5")
    found = {}
    sets = (("DIV2K", 2), ("DIV2K", 3), ("DIV2K_valid", 4), ("Flickr2K", 4), ("BSDS200", 4), ("BSDS_test200", 2), ("B100", 3))
    for name, scale in sets:
        pairs = dataset.find_pairs(f"data/{name}", scale)
        found[name, scale] = [(pair.name, pair.gt.parent.name, pair.lr and pair.lr.name) for pair in pairs]
    assert found == {
        ("DIV2K", 2): [("0001", "GT", "0001x2.png"), ("0002", "GT", "0002x2.png")],
        ("DIV2K", 3): [("0001", "GT", None), ("0002", "GT", None)],
        ("DIV2K_valid", 4): [("0801", "GT", "0801x4.png"), ("0802", "GT", "0802x4.png")],
        ("Flickr2K", 4): [("000001", "GT", None), ("000002", "GT", None)],
        ("BSDS200", 4): [("1", "GT", None), ("2", "GT", None)],
        ("BSDS_test200", 2): [("3", "GT", None), ("4", "GT", None)],
        ("B100", 3): [("5", "GT", None), ("6", "GT", None)],
    }
    for scale in (2, 3, 4):
        pairs = dataset.find_pairs("data/Set5", scale)
        assert [(pair.gt.parts[-2:], pair.lr.name) for pair in pairs] == [(("HR", f"{s}.png"), f"{s}x{scale}.png") for s in "abcde"]
    assert sum(path.is_file() for path in Path("data").rglob("*")) == 8 + 2 + 6 + 20  # and nothing else
    said = capsys.readouterr().out
    assert f"Flickr2K: 2 images in {Path.cwd() / 'data' / 'Flickr2K' / 'GT'}\n" in said
    assert (np.array(Image.open("data/DIV2K/GT/0002.png")) == noise_image(6, 6, 1)).all()


def test_what_is_complete_is_left_alone_without_a_request(call, publish, server, capsys, tmp_path):
    publish("Set5", tar_of(benchmark("Set5")))
    call("--items", "Set5")
    before = tree(tmp_path)
    assert set(before) >= {"data/Set5/HR/a.png", "data/Set5/LR_bicubic/X4/ax4.png"}
    assert not list((tmp_path / "data/downloads").iterdir())  # nothing is kept
    server.requests.clear()
    capsys.readouterr()
    call("--items", "Set5")
    assert server.requests == []
    assert "already there" in capsys.readouterr().out
    assert tree(tmp_path) == before
    (tmp_path / "data/Set5/LR_bicubic/X3/bx3.png").unlink()  # what is missing comes back
    call("--items", "Set5")
    assert tree(tmp_path) == before


def test_originals_under_another_known_name_count_and_get_no_strange_lr_beside_them(call, server, tmp_path, publish, error_of):
    publish("Set5", tar_of(benchmark("Set5")))
    for name in "vwxyz":
        (tmp_path / "data/Set5/GTmod12").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/Set5/GTmod12/{name}.png").write_bytes(image(0))
    call("--items", "Set5")
    assert server.requests == []
    assert not (tmp_path / "data/Set5/LR_bicubic").exists()
    (tmp_path / "data/Set5/GTmod12/v.png").unlink()
    assert "GTmod12: 4 images are in the way of the 5" in error_of("--items", "Set5")
    assert not (tmp_path / "data/Set5/HR").exists()


def test_one_archive_serves_several_sets_with_one_download(call, publish, server, tmp_path):
    data = tar_of(benchmark("Set5") | benchmark("Set14", count=14) | benchmark("B100"))
    publish("Set5", data)
    publish("Set14", data)
    call("--items", "Set14", "Set5", "--keep_archives", "True")
    assert [path for path, *_ in server.requests] == ["benchmark.tar"]
    assert len(list((tmp_path / "data/Set14/LR_bicubic/X3").iterdir())) == 14
    assert len(list((tmp_path / "data/Set5/HR").iterdir())) == 5
    assert not (tmp_path / "data/B100").exists()  # nobody asked for it
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/downloads").iterdir()} == {"benchmark.tar": data}
    shutil.rmtree(tmp_path / "data/Set5")
    call("--items", "Set5")  # from the archive that was kept
    assert len(server.requests) == 1
    assert len(list((tmp_path / "data/Set5/HR").iterdir())) == 5


def test_weights_are_put_where_they_belong_and_their_checksum_is_shown(call, publish, server, tmp_path, capsys, error_of):
    publish("rcan_x4", b"\x80\x02weights", checksum="")
    publish("vgg19", b"\x80\x02VGG" * 99)
    call("--items", "rcan_x4", "vgg19", "--weights_dir", "w")
    assert tree(tmp_path / "w") == {"rcan_x4.pt": b"\x80\x02weights", "vgg19-dcbb9e9d.pth": b"\x80\x02VGG" * 99}
    said = capsys.readouterr().out
    assert hashlib.sha256(b"\x80\x02weights").hexdigest() in said  # nobody published it
    assert hashlib.sha256(b"\x80\x02VGG" * 99).hexdigest() not in said
    assert f"{tmp_path / 'w' / 'rcan_x4.pt'}, 9 bytes" in said
    (tmp_path / "w/vgg19-dcbb9e9d.pth").write_bytes(b"\x80\x02VGA" * 99)
    assert "is in the way, as its sha256 is" in error_of("--items", "vgg19", "--weights_dir", "w")
    assert (tmp_path / "w/vgg19-dcbb9e9d.pth").read_bytes() == b"\x80\x02VGA" * 99
    assert len(server.requests) == 2


def test_without_items_everything_is_listed_and_nothing_is_done(call, server, tmp_path, capsys):
    call(mirror="")
    said = capsys.readouterr().out
    for name, item in download.ITEMS.items():
        assert f"\n{name}: " in f"\n{said}"
        assert (item.source.url if item.source else item.by_hand) in said
    assert "3,530,603,713 bytes, sha256:9d0b9c46" in said
    assert "size unknown, no checksum published" in said
    assert f"0 of 109 images in {tmp_path / 'data' / 'Manga109' / 'GT'}" in said
    assert not list(tmp_path.iterdir())
    assert server.requests == []


def test_what_must_be_fetched_by_hand_comes_last_and_says_where_to_put_it(call, publish, server, tmp_path, error_of):
    publish("Set5", tar_of(benchmark("Set5")))
    said = error_of("--items", "Manga109", "rcan_native", "Set5")
    assert "http://www.manga109.org/en/" in said
    assert f"its 109 images into {tmp_path / 'data' / 'Manga109' / 'GT'}," in said
    assert f"into {tmp_path / 'pretrained' / 'rcan_native'}" in said
    assert len(list((tmp_path / "data/Set5/HR").iterdir())) == 5
    (tmp_path / "pretrained/rcan_native").mkdir(parents=True)
    (tmp_path / "pretrained/rcan_native/x4.pth.tar").write_bytes(b"1")
    (tmp_path / "data/OST/GT").mkdir(parents=True)
    (tmp_path / "data/OST/GT/a.png").write_bytes(image(0))
    call("--items", "rcan_native", "OST")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--items", "Set6"], r"'Set6' is unknown; known are DIV2K, .*Set5, .*vgg19"),
        (["--archive", "x.zip"], r"archive='x.zip' needs --items"),
        (["--archive", "x.zip", "--items", "T91"], r"x.zip: no such file"),
        (["--items", "Set5", "--retries", "0"], r"retries=0"),
    ],
)
def test_impossible_settings_are_refused(arguments, sentence, error_of):
    assert re.search(sentence, error_of(*arguments))


def test_a_mirror_must_be_a_web_address(error_of):
    assert "mirror='file:///etc' must begin with https" in error_of("--items", "Set5", mirror="file:///etc")


# Downloads


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads /file into tmp_path; returns its bytes."""

    def fetch(size=None, retries=3, path="file"):
        part = tmp_path / "file.part"
        download.download(f"{server.url}/{path}", part, size, retries=retries, wait=0, timeout=5)
        return part.read_bytes()

    return fetch


DATA = np.random.default_rng(0).bytes(5000)
OTHER = np.random.default_rng(1).bytes(5000)


def test_a_broken_download_goes_on_where_it_stopped(server, fetch):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, *[{"breaks_off": 1000}] * 2]  # as many as may fail in a row, but each gets further
    assert fetch(retries=3) == DATA
    assert server.ranges == [None, "bytes=2000-", "bytes=3000-", "bytes=4000-"]
    assert [version for *_, version in server.requests] == [None, '"one"', '"one"', '"one"']
    assert fetch() == DATA  # complete, so nothing is asked for
    assert len(server.requests) == 4


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, fetch, tmp_path):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, {"breaks_off": 0}, {"breaks_off": 0}]
    with pytest.raises(ConnectionError, match=r"broke off at 2,000 of 5,000 bytes; given up after 3 tries, 2,000 bytes are kept"):
        fetch()
    assert (tmp_path / "file.part").read_bytes() == DATA[:2000]
    assert fetch() == DATA
    assert server.ranges == [None, "bytes=2000-", "bytes=2000-", "bytes=2000-"]


def test_ctrl_c_leaves_only_what_the_next_call_goes_on_from(server, fetch, tmp_path, monkeypatch):
    server.files["file"] = DATA
    with monkeypatch.context() as patched:
        patched.setattr(download, "CHUNK", 1500)
        patched.setattr(download.tqdm, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert set(tree(tmp_path)) == {"file.part", "file.part.json"}
    have = (tmp_path / "file.part").stat().st_size
    assert 0 < have <= 1500
    assert fetch() == DATA
    assert server.ranges == [None, f"bytes={have}-"]


@pytest.mark.parametrize(
    "fault",
    [
        {"ignores_range": True},
        {"starts_at": 0},
        {"starts_at": 1999},
        {"ignores_if_range": True, "headers": {"ETag": '"two"'}},
        {"headers": {"Content-Range": "bytes 2000-4999/6000"}},
        {"headers": {"Content-Range": None}},
        {"status": 416, "headers": {"Content-Range": "bytes */1000"}},
    ],
)
def test_what_does_not_continue_the_part_is_fetched_from_the_start(server, fetch, fault):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, fault]
    assert fetch() == DATA
    assert server.ranges == [None, "bytes=2000-"] + [None] * ("ignores_range" not in fault)


def test_two_versions_are_never_joined(server, fetch):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}]
    with pytest.raises(ConnectionError):
        fetch(retries=1)
    server.files["file"], server.etag = OTHER, '"two"'
    server.faults = [{"breaks_off": 1000}]
    assert fetch() == OTHER
    assert [request[1:] for request in server.requests] == [(None, None), ("bytes=2000-", '"one"'), ("bytes=1000-", '"two"')]


def test_without_a_strong_etag_the_date_tells_versions_apart(server, fetch):
    server.files["file"] = DATA
    date = {"ETag": 'W/"weak"', "Last-Modified": "Tue, 14 Feb 2017 14:27:11 GMT"}
    server.faults = [{"breaks_off": 2000, "headers": date}, {"ignores_if_range": True, "headers": {"ETag": 'W/"weak"'}}]
    assert fetch() == DATA
    assert server.requests[1][1:] == ("bytes=2000-", date["Last-Modified"])
    assert len(server.requests) == 2  # a part of the answer need not repeat the date


def test_a_part_of_unknown_origin_is_not_gone_on_from(server, fetch, tmp_path):
    server.files |= {"file": DATA, "other": OTHER}
    (tmp_path / "file.part").write_bytes(OTHER[:2000])
    assert fetch() == DATA
    server.faults = [{"breaks_off": 2000}]
    with pytest.raises(ConnectionError):
        fetch(path="other", retries=1)
    assert fetch() == DATA
    (tmp_path / "file.part.json").write_text("[cut")
    assert fetch() == DATA
    assert server.ranges == [None] * 4


def test_a_complete_part_of_unknown_length_is_recognised(server, fetch, tmp_path):
    server.files["file"] = DATA
    (tmp_path / "file.part").write_bytes(DATA)
    (tmp_path / "file.part.json").write_text(json.dumps({"url": f"{server.url}/file", "version": server.etag, "size": None}))
    assert fetch() == DATA
    assert server.ranges == ["bytes=5000-"]  # answered by 416, with the length
    (tmp_path / "file.part").write_bytes(DATA + b"more")
    (tmp_path / "file.part.json").write_text(json.dumps({"url": f"{server.url}/file", "version": server.etag, "size": None}))
    assert fetch() == DATA
    assert server.ranges[1:] == ["bytes=5004-", None]


def test_a_length_that_is_announced_but_never_sent_is_given_up(server, fetch):
    server.files["file"] = DATA
    server.faults = [{"announces_more": 100}]
    with pytest.raises(ConnectionError, match="broke off at 5,000 of 5,100 bytes"):
        fetch(retries=1)


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, fetch, tmp_path):
    server.files["file"] = DATA
    with pytest.raises(ValueError, match="offers 5,000 bytes, but the published file has 5,001"):
        fetch(size=5001)
    assert not list(tmp_path.iterdir())
    server.faults = [{"headers": {"Content-Length": None}}]
    assert fetch(size=5000) == DATA


def test_no_more_is_written_than_the_published_size(server, fetch, tmp_path):
    server.files["file"] = DATA
    server.faults = [{"headers": {"Content-Length": None}}] * 2
    with pytest.raises(ConnectionError, match="sends more than the 4,000 bytes that were expected; given up after 2 tries"):
        fetch(size=4000, retries=2)
    assert (tmp_path / "file.part").stat().st_size <= 4000


def test_trouble_that_passes_is_tried_again_and_other_is_not(server, fetch):
    server.files["file"] = DATA
    server.faults = [{"status": 503}, {"status": 429}]
    assert fetch() == DATA
    server.requests.clear()
    with pytest.raises(FileNotFoundError, match=r"/gone: the server answers 404 Not Found; .*--mirror.*--archive"):
        fetch(path="gone")
    assert len(server.requests) == 1
    server.faults = [{"status": 503}] * 3
    with pytest.raises(ConnectionError, match="503 Service Unavailable; given up after 3 tries"):
        fetch(path="later")


def test_waiting_is_doubled_from_try_to_try(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.faults = [{"status": 503}] * 4
    with pytest.raises(ConnectionError):
        download.download(f"{server.url}/file", tmp_path / "part", retries=4, wait=3)
    assert waits == [3, 6, 12]


def test_a_server_that_is_not_there_is_said(server, tmp_path):
    server.server_close()
    with pytest.raises(ConnectionError, match=rf"{re.escape(server.url)}/file: .*refused; given up after 2 tries"):
        download.download(f"{server.url}/file", tmp_path / "part", retries=2, wait=0)


def test_redirects_lead_to_the_web_only_and_keep_the_range(server, fetch, tmp_path):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, {"status": 302, "headers": {"Location": "/elsewhere"}}]
    server.files["elsewhere"] = DATA
    assert fetch() == DATA
    assert server.requests[2] == ("elsewhere", "bytes=2000-", '"one"')
    (tmp_path / "secret").write_bytes(b"secret")
    for address in ((tmp_path / "secret").as_uri(), "ftp://127.0.0.1/secret"):
        server.faults = [{"status": 302, "headers": {"Location": address}}]
        with pytest.raises((OSError, ValueError), match=r"(?i)redirect.*not (allowed|followed)"):
            fetch(path="other")
    with pytest.raises(ValueError, match=r"https://a/b: redirects to http://a/b, which is not followed"):
        download._Redirects().redirect_request(Request("https://a/b"), io.BytesIO(), 302, "Found", {}, "http://a/b")
    assert download._Redirects().redirect_request(Request("http://a/b"), None, 302, "Found", {}, "https://a/c").full_url == "https://a/c"


def test_room_is_looked_for_before_anything_is_written(server, fetch, tmp_path, monkeypatch):
    server.files["file"] = DATA
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4999))
    with pytest.raises(OSError, match="too little room for 5,000 bytes of http://127"):
        fetch()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    assert fetch() == DATA


def test_wrong_bytes_are_removed_and_the_next_try_starts_anew(call, publish, server, error_of, tmp_path, capsys):
    right = tar_of(benchmark("Set5"))
    wrong = right.replace(b"IHDR", b"IHDX")
    publish("Set5", right)
    server.files["benchmark.tar"] = wrong
    said = error_of("--items", "Set5")
    assert hashlib.sha256(wrong).hexdigest() in said
    assert hashlib.sha256(right).hexdigest() in said
    assert "the file was removed" in said
    assert set(tree(tmp_path)) == {"data", "data/downloads"}
    publish("rcan_x2", b"\x80\x02weights", checksum="")
    with pytest.raises(SystemExit):
        call("--items", "rcan_x2", "Set5")
    assert f"rcan_x2: {tmp_path / 'pretrained' / 'rcan_x2.pt'}, 9 bytes" in capsys.readouterr().out  # what came is said all the same
    server.files["benchmark.tar"] = right
    call("--items", "Set5")
    assert server.ranges == [None] * 4


def test_a_web_page_in_place_of_the_archive_is_recognised(publish, server, error_of, tmp_path):
    publish("BSDS500", b"<!DOCTYPE html><html>Too many users have viewed or downloaded this file</html>", checksum="", size=False)
    assert "BSDS500-master.zip: it is a web page, not BSDS500-master.zip; the file was removed" in error_of("--items", "BSDS500")
    publish("rcan_x4", b"\n<html>quota</html>", checksum="", size=False)
    assert "it is a web page" in error_of("--items", "rcan_x4")
    publish("BSDS500", b"hello", checksum="", size=False)
    assert "it is neither a zip nor a tar file" in error_of("--items", "BSDS500")
    assert set(tree(tmp_path)) == {"data", "data/downloads"}


def test_a_damaged_download_without_a_checksum_is_removed_too(publish, server, error_of, tmp_path):
    good = zip_of({member: image(seed) for seed, member in enumerate(MEMBERS["BSDS500"])})
    publish("BSDS500", good.replace(b"IDAT", b"IDAX", 1), images=2, checksum="", size=False)
    said = error_of("--items", "BSDS500")
    assert "damaged" in said
    assert said.endswith("the download was removed")
    assert set(tree(tmp_path)) == {"data", "data/downloads"}


# Unpacking


@pytest.fixture
def given(tmp_path):
    """Writes an archive beside a folder that already holds something of the user's."""
    (tmp_path / "data/Set5").mkdir(parents=True)
    (tmp_path / "data/Set5/notes.txt").write_text("mine")
    (tmp_path / "outside.png").write_bytes(b"outside")

    def given(data, name="copy.bin"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return given


def test_a_given_archive_lands_exactly_and_is_left_as_it_is(call, given, server, tmp_path, capsys):
    for data in (tar_of(benchmark("Set5", "Set14")), zip_of({f"./a/{name}": data for name, data in benchmark("Set5").items()})):
        archive = given(data)
        before = tree(tmp_path)
        call("--items", "Set5", "--archive", archive)
        expected = {f"data/{name.removeprefix('benchmark/')}": data for name, data in benchmark("Set5").items()}
        after = tree(tmp_path)
        assert {name: data for name, data in after.items() if data is not None} == {
            **expected, **{name: data for name, data in before.items() if data is not None},
        }  # fmt: skip
        assert hashlib.sha256(data).hexdigest() in capsys.readouterr().out  # it isn't the published file
        shutil.rmtree(tmp_path / "data/Set5/HR")
        shutil.rmtree(tmp_path / "data/Set5/LR_bicubic")
    assert server.requests == []


def test_a_given_file_with_the_published_name_must_be_the_published_one(call, publish, given, error_of, tmp_path, capsys):
    data = tar_of(benchmark("Set5"))
    publish("Set5", data)
    archive = given(data[:-512] + bytes(511) + b"1", "benchmark.tar")
    assert "its sha256 is" in error_of("--items", "Set5", "--archive", archive)
    assert (tmp_path / "benchmark.tar").is_file()  # it is the user's
    call("--items", "Set5", "--archive", given(data, "benchmark (1).tar"))
    assert "the file has the published checksum" in capsys.readouterr().out
    publish("vgg19", b"\x80\x02VGG" * 99)
    assert "its size is 3 bytes, but the published one 495" in error_of("--items", "vgg19", "--archive", given(b"\x80\x02V"))
    call("--items", "vgg19", "--archive", given(b"\x80\x02VGG" * 99))
    assert (tmp_path / "pretrained/vgg19-dcbb9e9d.pth").read_bytes() == b"\x80\x02VGG" * 99


def test_sets_fetched_by_hand_are_unpacked_if_they_are_whole(call, given, error_of, tmp_path):
    images = {f"T91/t{index}.png": image(index) for index in range(90)}
    assert "holds 90 images for" in error_of("--items", "T91", "--archive", given(zip_of(images)))
    assert not (tmp_path / "data/T91").exists()
    call("--items", "T91", "--archive", given(zip_of(images | {"T91/more/t90.png": image(90)})))
    assert len(dataset.find_pairs(tmp_path / "data/T91", 4)) == 91
    scenes = {
        "OutdoorSceneTrain_v2/sky/1.png": image(1),
        "OutdoorSceneTrain_v2/sea/2.png": image(2),
        "OutdoorSceneTest300_anno/3.png": b"3",
    }
    call("--items", "OST", "--archive", given(tar_of(scenes)))
    assert [pair.name for pair in dataset.find_pairs(tmp_path / "data/OST", 4)] == ["1", "2"]  # no annotations
    assert "none of its 1 members is wanted here, the first is 'readme'" in error_of(
        "--items", "DIV8K", "--archive", given(tar_of({"readme": b"1"}))
    )


def zip_info(name, mode=0, **attributes):
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def tar_info(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BABY = "benchmark/Set5/HR/a.png"
OUT = [
    "../outside.png", "benchmark/Set5/HR/../../../../outside.png", "/outside.png", "benchmark/..", "C:/outside.png", "C:outside.png",
    "..\\outside.png", "benchmark\\Set5\\HR\\z.png", "\\outside.png", "benchmark/Set5/HR/z\n.png", "./../outside.png", "//host/outside.png",
]  # fmt: skip
ATTACKS = {
    **{
        f"{kind} {name!r}": (pack, {info(name): b"evil"}, name)
        for kind, pack, info in (("zip", zip_of, zip_info), ("tar", tar_of, tar_info))
        for name in OUT
    },
    "zip null": (zip_of, {zip_info("benchmark/Set5/HR/z.png\0/../x"): b"evil"}, "benchmark/Set5/HR/z.png\0"),
    "zip symlink": (zip_of, {zip_info(BABY, stat.S_IFLNK | 0o777): b"../../../outside.png"}, BABY),
    "zip device": (zip_of, {zip_info(BABY, stat.S_IFCHR | 0o666): b""}, BABY),
    "zip folder symlink": (zip_of, {zip_info("benchmark/Set5/HR", stat.S_IFLNK | 0o777): b"/tmp"}, "benchmark/Set5/HR"),
    "zip duplicate": (zip_of, {"again/Set5/HR/a.png": b"evil"}, "again/Set5/HR/a.png"),
    "zip duplicate on some systems": (zip_of, {"benchmark/Set5/HR/A.png": b"evil"}, "benchmark/Set5/HR/A.png"),
    "zip encrypted": (zip_of, {}, BABY),
    "tar symlink": (tar_of, {tar_info(BABY, tarfile.SYMTYPE, "../../../outside.png"): b""}, BABY),
    "tar symlink within": (tar_of, {tar_info(BABY, tarfile.SYMTYPE, "b.png"): b""}, BABY),
    "tar hardlink": (tar_of, {tar_info(BABY, tarfile.LNKTYPE, "benchmark/Set5/HR/b.png"): b""}, BABY),
    "tar hardlink out": (tar_of, {tar_info(BABY, tarfile.LNKTYPE, "/etc/passwd"): b""}, BABY),
    "tar device": (tar_of, {tar_info(BABY, tarfile.CHRTYPE): b""}, BABY),
    "tar pipe": (tar_of, {tar_info(BABY, tarfile.FIFOTYPE): b""}, BABY),
    "tar folder symlink": (tar_of, {tar_info("./benchmark/Set5/HR", tarfile.SYMTYPE, "/tmp"): b""}, "benchmark/Set5/HR"),
    "tar duplicate": (tar_of, {tar_info("again/Set5/HR/a.png"): b"evil"}, "again/Set5/HR/a.png"),
    "tar duplicate of itself": (tar_of, {tar_info(BABY): b"evil"}, BABY),
}


@pytest.mark.parametrize(("pack", "evil", "named"), ATTACKS.values(), ids=[name.replace("\0", "0") for name in ATTACKS])
def test_an_attacking_archive_is_refused_by_name_and_leaves_everything_as_it_was(pack, evil, named, given, error_of, tmp_path):
    members = benchmark("Set5")
    if any(getattr(info, "external_attr", 0) or getattr(info, "type", b"0") not in (b"0",) for info in evil):
        members = {name: data for name, data in members.items() if name != named}  # it comes in the picture's place
    data = pack(members | evil)
    if not evil:
        data = re.sub(rb"(?s)(PK\x01\x02....)..", lambda match: match[1] + b"\x01\x00", data)  # the flag of encrypted members
    archive = given(data)
    before = tree(tmp_path)
    said = error_of("--items", "Set5", "--archive", archive)
    assert f"{archive}: refused" in said
    assert repr(named)[:-1] in said
    assert "nothing was unpacked" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("data", [b"123", b"12345", b"1" * 2**22])
def test_a_member_is_written_up_to_the_size_that_it_announces(data, tmp_path):
    stream, member = io.BytesIO(data), download.Member("x.png", 4, "", None)
    with pytest.raises(download.BadArchive, match=r"member 'x.png' is not of the 4 bytes"):
        download._extract(Path("a.tar"), stream, member, tmp_path / "x.png")
    assert stream.tell() <= download.CHUNK  # and no further, however much there is
    download._extract(Path("a.tar"), io.BytesIO(b"1234"), member, tmp_path / "y.png")
    assert (tmp_path / "y.png").read_bytes() == b"1234"


def test_links_that_nobody_asked_for_are_not_made(call, given, tmp_path):
    call("--items", "Set5", "--archive", given(tar_of(benchmark("Set5") | {tar_info("README", tarfile.SYMTYPE, "/etc/passwd"): b""})))
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def huge_tar():
    info = tarfile.TarInfo("benchmark/Set5/HR/z.png")
    info.size = 10**12
    return tar_of(benchmark("Set5"))[:-10240] + info.tobuf()


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("benchmark/Set5/HR/z.png", bytes(3 * 2**20))
    return file.getvalue()


@pytest.mark.parametrize("make", [huge_tar, bomb])
def test_an_archive_that_would_grow_beyond_reason_is_refused(make, given, error_of, tmp_path):
    archive = given(make())
    before = tree(tmp_path)
    said = error_of("--items", "Set5", "--archive", archive)
    assert "refused at its member 'benchmark/Set5/HR/z.png', as it would grow to over" in said
    assert tree(tmp_path) == before


def understated_zip():
    """Says 10 bytes where there are more."""
    data = zip_of(benchmark("Set5"))
    length = len(image(ord("a")))
    at = data.rindex(b"PK\x01\x02", 0, data.index(BABY.encode(), data.index(b"PK\x01\x02")))
    assert data[at + 24 : at + 28] == length.to_bytes(4, "little")
    return data[: at + 24] + (10).to_bytes(4, "little") + data[at + 28 :]


@pytest.mark.parametrize(
    "make",
    [
        lambda: zip_of(benchmark("Set5")).replace(b"IDAT", b"IDAX", 20).replace(b"IDAX", b"IDAT", 19),
        lambda: zip_of(benchmark("Set5"))[:-30],
        lambda: tar_of(benchmark("Set5"))[:9000],
        lambda: b"<html>quota</html>",
        understated_zip,
    ],
    ids=["wrong CRC in the last member", "zip cut off", "tar cut off", "web page", "size understated"],
)
def test_a_damaged_archive_leaves_everything_as_it_was(make, given, error_of, tmp_path):
    archive = given(make())
    before = tree(tmp_path)
    said = error_of("--items", "Set5", "--archive", archive)
    assert f"{archive}: " in said
    assert re.search("damaged|is not of the|images for", said)
    assert tree(tmp_path) == before


def test_a_users_file_with_other_content_is_in_the_way_and_stays(given, error_of, tmp_path, call):
    archive = given(tar_of(benchmark("Set5")))
    target = tmp_path / "data/Set5/LR_bicubic/X4/cx4.png"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    before = tree(tmp_path)
    assert f"{target}: is in the way, as it differs" in error_of("--items", "Set5", "--archive", archive)
    assert tree(tmp_path) == before
    target.unlink()
    target.symlink_to("nowhere")
    assert f"{target}: is in the way" in error_of("--items", "Set5", "--archive", archive)
    assert target.is_symlink()
    target.unlink()
    same = bytes(len(image(ord("c"))))
    target.write_bytes(same)  # of the right size
    call("--items", "Set5", "--archive", archive)
    assert target.read_bytes() == same


def test_images_that_do_not_belong_to_the_set_are_in_the_way(given, error_of, tmp_path):
    archive = given(tar_of(benchmark("Set5")))
    (tmp_path / "data/Set5/HR").mkdir()
    (tmp_path / "data/Set5/HR/holiday.png").write_bytes(b"mine")
    before = tree(tmp_path)
    assert "holiday.png and 0 more are in the way of the 5 images" in error_of("--items", "Set5", "--archive", archive)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("count", [4, 6])
def test_a_wrong_number_of_images_is_an_error_with_both_numbers(count, given, error_of, tmp_path):
    archive = given(tar_of(benchmark("Set5", count=count)))
    before = tree(tmp_path)
    said = error_of("--items", "Set5", "--archive", archive)
    assert f"holds {count} images for {tmp_path / 'data' / 'Set5' / 'HR'}, but 5 belong there" in said
    assert tree(tmp_path) == before


def test_room_is_looked_for_before_anything_is_unpacked(given, error_of, tmp_path, monkeypatch):
    archive = given(tar_of(benchmark("Set5")))
    before = tree(tmp_path)
    needed = sum(map(len, benchmark("Set5").values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert "too little room for the images of" in error_of("--items", "Set5", "--archive", archive)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stopped", ["_extract", "_move"])
def test_ctrl_c_while_unpacking_leaves_no_half_file_and_the_next_call_finishes(stopped, call, given, tmp_path, monkeypatch):
    archive = given(tar_of(benchmark("Set5")))
    original, calls = getattr(download, stopped), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(download, stopped, interrupted)
        with pytest.raises(SystemExit):
            call("--items", "Set5", "--archive", archive)
    expected = {f"data/{name.removeprefix('benchmark/')}": data for name, data in benchmark("Set5").items()}
    files = {name: data for name, data in tree(tmp_path).items() if data is not None and name.endswith(".png") and name != "outside.png"}
    assert files.items() <= expected.items()
    assert len(files) == (2 if stopped == "_move" else 0)
    assert not list((tmp_path / "data").glob(".*"))
    (tmp_path / "data/.Set5.unpacking-1").mkdir()
    os.utime(tmp_path / "data/.Set5.unpacking-1", (0, 0))  # of a run that was killed long ago
    (tmp_path / "data/.Set5.unpacking-2").mkdir()  # of one that may still run
    call("--items", "Set5", "--archive", archive)
    assert expected.items() <= tree(tmp_path).items()
    assert [path.name for path in (tmp_path / "data").glob(".*")] == [".Set5.unpacking-2"]


def test_a_set_on_another_disk_is_filled_too(call, given, tmp_path, monkeypatch):
    def refuse(source, target, replace=os.replace):
        if ".unpacking-" in str(source):
            raise OSError(download.errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    call("--items", "Set5", "--archive", given(tar_of(benchmark("Set5"))))
    assert (tmp_path / "data/Set5/HR/b.png").read_bytes() == image(ord("b"))
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
