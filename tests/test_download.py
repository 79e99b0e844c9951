"""scripts/download.py: downloads from a local server that misbehaves, archives that attack, and where everything ends up."""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

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
        path, wanted, version = self.path.lstrip("/"), self.headers.get("Range"), self.headers.get("If-Range")
        self.server.requests.append((path, wanted, version))
        fault = self.server.faults.pop(0) if self.server.faults else {}
        data = self.server.files.get(path, b"")
        same = version == self.server.etag or fault.get("ignores_if_range")
        start = int(wanted[6:-1]) if wanted and same and not fault.get("ignores_range") else None
        status = 404 if path not in self.server.files else 200 if start is None else 206 if start < len(data) else 416
        start = fault.get("starts_at", start)
        body = data[start or 0 :]
        headers = {"ETag": self.server.etag, "Content-Length": len(body)}
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}" if body else f"bytes */{len(data)}"
        self.send_response(fault.get("status", status))
        for name, value in (headers | fault.get("headers", {})).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: fault.get("breaks_off")])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def call(tmp_path, monkeypatch, server, capsys):
    """Runs the script on folders of its own, with the server as mirror; returns what it prints, on stderr if it ends with a code."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        capsys.readouterr()
        with contextlib.nullcontext() if code == 0 else pytest.raises(SystemExit, match=f"^{code}$"):
            run_script(lambda: download.main([*arguments, "--mirror", server.url]))
        return capsys.readouterr()[bool(code)]

    return call


# Archives


def image(seed):
    file = io.BytesIO()
    Image.fromarray(noise_image(6, 6, seed)).save(file, "png")
    return file.getvalue()


def zip_of(members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)
    return file.getvalue()


def benchmark(*names, count=5):
    """The members of EDSR's benchmark.tar for these sets."""
    stems = "abcdefghijklmn"[:count]
    gt = {f"benchmark/{name}/HR/{stem}.png": image(ord(stem)) for name in names for stem in stems}
    return gt | {f"benchmark/{name}/LR_bicubic/X4/{stem}x4.png": b"" for name in names for stem in stems}


SET5 = {f"data/Set5/GT/{stem}.png": image(ord(stem)) for stem in "abcde"}


@pytest.fixture
def publish(server, monkeypatch):
    """Let a table's item be an archive of ours: serve it, with its own checksum and size, and `images` in each folder."""

    def publish(name, data, images=None, checksum="sha256", size=None):
        item = download.ITEMS[name]
        folders = tuple(dataclasses.replace(folder, images=images or folder.images) for folder in item.folders)
        published = f"{checksum}:{hashlib.new(checksum, data).hexdigest()}" if checksum else ""
        monkeypatch.setitem(download.ITEMS, name, dataclasses.replace(item, checksum=published, size=size, folders=folders))
        server.files[item.file] = data

    return publish


def tree(folder):
    """All files below a folder; links as they point."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in files}


# The table


def test_the_table_names_safe_sources_and_how_many_images_there_are():
    lengths = {"": 0, "md5": 32, "sha256": 64}
    for item in download.ITEMS.values():
        algorithm, _, digest = item.checksum.partition(":")
        assert re.fullmatch(f"[0-9a-f]{{{lengths[algorithm]}}}", digest)
        assert item.url.startswith("https://") or (item.by_hand and not item.url)
    assert download.ITEMS["vgg19"].checksum.startswith("sha256:dcbb9e9d")  # torchvision names the file after it
    images = {"DIV2K": 800, "DIV2K_valid": 100, "Flickr2K": 2650, "T91": 91, "BSDS200": 200, "BSDS_test200": 200, **dataset.BENCHMARKS}
    for folder in (folder for item in download.ITEMS.values() for folder in item.folders if folder.images):
        assert folder.images == images[folder.path.split("/")[0]]


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


def test_published_layouts_are_unpacked_as_find_pairs_wants_them(call, publish, tmp_path):
    for name, members in MEMBERS.items():
        pack = tar_of if name == "Flickr2K" else zip_of
        publish(name, pack({member: image(seed) for seed, member in enumerate(members)}), images=2)
    publish("Set5", tar_of(benchmark("Set5", "Set14")), checksum="md5")
    printed = call("--items", *MEMBERS, "Set5")
    found = {}
    for name, scale in (("DIV2K", 2), ("DIV2K", 3), ("DIV2K_valid", 4), ("Flickr2K", 4), ("BSDS200", 4), ("BSDS_test200", 2), ("B100", 3)):
        found[name, scale] = [(pair.name, pair.lr and pair.lr.name) for pair in dataset.find_pairs(f"data/{name}", scale)]
    assert found == {
        ("DIV2K", 2): [("0001", "0001x2.png"), ("0002", "0002x2.png")],
        ("DIV2K", 3): [("0001", None), ("0002", None)],
        ("DIV2K_valid", 4): [("0801", "0801x4.png"), ("0802", "0802x4.png")],
        ("Flickr2K", 4): [("000001", None), ("000002", None)],
        ("BSDS200", 4): [("1", None), ("2", None)],
        ("BSDS_test200", 2): [("3", None), ("4", None)],
        ("B100", 3): [("5", None), ("6", None)],
    }
    assert [pair.gt.name for pair in dataset.find_pairs("data/Set5", 4)] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert len(tree(tmp_path)) == 8 + 2 + 6 + 5  # and nothing else, neither archives nor what hid beside the images
    assert str(tmp_path / "data/Flickr2K/GT") in printed
    assert (np.array(Image.open("data/DIV2K/GT/0002.png")) == noise_image(6, 6, 1)).all()


# What is here and what is not


def test_without_items_everything_is_listed_and_nothing_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    download.main([])
    printed = capsys.readouterr().out
    for name, item in download.ITEMS.items():
        assert f"\n{name}: " in f"\n{printed}"
        assert (item.url or item.by_hand) in printed
        assert item.checksum in printed
    assert str(tmp_path / "data/Manga109/GT") in printed
    assert not list(tmp_path.iterdir())


def test_a_complete_set_needs_no_request_and_stays(call, publish, server, tmp_path):
    publish("Set5", tar_of(benchmark("Set5")))
    call("--items", "Set5")
    assert tree(tmp_path) == SET5
    (tmp_path / "data/Set5/GT/a.png").write_bytes(b"edited")
    call("--items", "Set5")
    assert (tmp_path / "data/Set5/GT/a.png").read_bytes() == b"edited"
    (tmp_path / "data/Set5/GT").rename(tmp_path / "data/Set5/GTmod12")  # where training finds GT images too
    call("--items", "Set5")
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["GT/a.png", "HR/holiday.png", "GT/notes.txt"])
def test_an_incomplete_folder_is_in_the_way_before_anything_is_fetched(name, publish, server, call, tmp_path):
    publish("Set5", tar_of(benchmark("Set5")))
    (tmp_path / "data/Set5" / name).parent.mkdir(parents=True)
    (tmp_path / "data/Set5" / name).write_bytes(b"mine")
    assert str(tmp_path / "data/Set5" / name[:2]) in call("--items", "Set5", code=1)
    assert tree(tmp_path) == {f"data/Set5/{name}": b"mine"}
    assert server.requests == []


def test_one_archive_serves_several_sets_and_stays_if_asked(call, publish, server, tmp_path):
    data = tar_of(benchmark("Set5") | benchmark("Set14", count=14) | benchmark("B100"))
    publish("Set5", data)
    publish("Set14", data)
    call("--items", "Set14", "Set5", "--keep_archives", "True")
    assert [path for path, *_ in server.requests] == ["benchmark.tar"]
    assert len(list((tmp_path / "data/Set14/GT").iterdir())) == 14
    assert not (tmp_path / "data/B100").exists()  # nobody asked for it
    shutil.rmtree(tmp_path / "data/Set5")
    call("--items", "Set5")
    assert tree(tmp_path / "data/downloads") == {"benchmark.tar": data}  # it was kept on purpose
    assert SET5.items() <= tree(tmp_path).items()
    assert len(server.requests) == 1
    (tmp_path / "data/downloads/benchmark.tar").write_bytes(data[:-1] + b"1")
    shutil.rmtree(tmp_path / "data/Set5")
    assert str(tmp_path / "data/downloads/benchmark.tar") in call("--items", "Set5", code=1)
    assert len(server.requests) == 1


def test_weights_are_put_where_they_belong_and_checked_again(call, publish, server, tmp_path):
    publish("rcan_x4", b"\x80\x02weights", checksum="")
    publish("vgg19", b"\x80\x02VGG")
    printed = call("--items", "rcan_x4", "vgg19", "--weights_dir", "w")
    assert tree(tmp_path) == {"w/rcan_x4.pt": b"\x80\x02weights", "w/vgg19-dcbb9e9d.pth": b"\x80\x02VGG"}
    assert hashlib.sha256(b"\x80\x02weights").hexdigest() in printed  # nobody published it
    (tmp_path / "w/vgg19-dcbb9e9d.pth").write_bytes(b"\x80\x02VGA")
    (tmp_path / "given.pth").write_bytes(b"\x80\x02VGG")
    for more in ((), ("--archive", "given.pth")):
        assert str(tmp_path / "w/vgg19-dcbb9e9d.pth") in call("--items", "vgg19", "--weights_dir", "w", *more, code=1)
    assert (tmp_path / "w/vgg19-dcbb9e9d.pth").read_bytes() == b"\x80\x02VGA"
    assert len(server.requests) == 2


def test_what_must_be_fetched_by_hand_comes_last_with_its_folder(call, publish, tmp_path):
    publish("Set5", tar_of(benchmark("Set5")))
    message = call("--items", "Manga109", "rcan_native", "Set5", code=1)
    assert SET5.items() <= tree(tmp_path).items()
    for expected in ("http://www.manga109.org/en/", tmp_path / "data/Manga109/GT", "drive.google.com", tmp_path / "pretrained/rcan_native"):
        assert str(expected) in message
    for path in (tmp_path / "pretrained/rcan_native/x4.pth.tar", tmp_path / "data/OST/GT/a.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1")
    call("--items", "rcan_native", "OST")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--items", "Set6"], "Set6"),
        (["--archive", "x.zip"], "x.zip"),
        (["--archive", "x.zip", "--items", "T91"], "x.zip"),
        (["--items", "Set5", "--mirror", "file:///etc"], "file:///etc"),
    ],
)
def test_impossible_settings_are_refused(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: download.main(arguments))
    assert stop.value.code == 1
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Downloads


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads /file into tmp_path; returns its bytes."""

    def fetch(size=None, path="file"):
        download.download(f"{server.url}/{path}", tmp_path / "file.part", size)
        return (tmp_path / "file.part").read_bytes()

    return fetch


DATA, OTHER = (np.random.default_rng(seed).bytes(5000) for seed in (0, 1))


def test_a_broken_download_goes_on_where_it_stopped(server, fetch, tmp_path):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, {"breaks_off": 0}, {"breaks_off": 0}]
    with pytest.raises(ConnectionError, match=f"{server.url}/file"):
        fetch()
    assert (tmp_path / "file.part").read_bytes() == DATA[:2000]
    server.faults = [{"breaks_off": 1000}] * 2 + [{"breaks_off": 500}]  # as many as may fail, but each gets further
    assert fetch() == DATA
    assert fetch() == DATA  # complete: the server answers that nothing is missing
    assert server.ranges == [None, *(f"bytes={have}-" for have in (2000, 2000, 2000, 3000, 4000, 4500, 5000))]
    assert {version for *_, version in server.requests[1:]} == {'"one"'}


def test_a_stopped_script_goes_on_from_its_part(call, publish, server, tmp_path, monkeypatch):
    data = tar_of(benchmark("Set5"))
    publish("Set5", data, size=len(data))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "CHUNK", 1500)
    for owner, name in ((download.tqdm, "update"), (download.hashlib, "new")):  # while it is fetched, then while it is checked
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stop)
            call("--items", "Set5", code=130)
    call("--items", "Set5")
    first, second, third = server.ranges
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 1500
    assert third == f"bytes={len(data)}-"
    assert tree(tmp_path) == SET5


@pytest.mark.parametrize(
    "fault",
    [
        {"ignores_range": True},
        {"starts_at": 1999},
        {"ignores_if_range": True, "headers": {"ETag": '"two"'}},
        {"headers": {"Content-Range": None}},
    ],
)
def test_what_does_not_continue_the_part_is_fetched_from_the_start(server, fetch, fault):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, fault]
    assert fetch() == DATA
    assert server.ranges == [None, "bytes=2000-"] + [None] * ("ignores_range" not in fault)


def test_two_versions_are_never_joined(server, fetch):
    server.files["file"] = DATA
    server.faults = [{"breaks_off": 2000}, {"breaks_off": 0}, {"breaks_off": 0}]
    with pytest.raises(ConnectionError):
        fetch()
    server.files["file"], server.etag = OTHER, '"two"'
    server.faults = [{"breaks_off": 1000}]
    assert fetch() == OTHER
    assert [request[1:] for request in server.requests[3:]] == [("bytes=2000-", '"one"'), ("bytes=1000-", '"two"')]


def test_without_a_strong_etag_the_date_tells_versions_apart_and_without_both_nothing_is_continued(server, fetch, tmp_path):
    server.files["file"] = DATA
    date = {"ETag": 'W/"weak"', "Last-Modified": "Tue, 14 Feb 2017 14:27:11 GMT"}
    server.faults = [{"breaks_off": 2000, "headers": date}, {"ignores_if_range": True, "headers": {"ETag": 'W/"weak"'}}]
    assert fetch() == DATA
    assert server.requests[1][1:] == ("bytes=2000-", date["Last-Modified"])
    assert len(server.requests) == 2  # a part of the answer need not repeat the date
    server.faults = [{"ignores_if_range": True, "ignores_range": True, "breaks_off": 2000, "headers": {"ETag": None}}]
    assert fetch() == DATA
    (tmp_path / "file.part").write_bytes(OTHER[:2000])
    (tmp_path / "file.part.version").unlink()
    assert fetch() == DATA
    assert server.ranges[3:] == [None, None]


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, fetch, tmp_path):
    server.files["file"] = DATA
    with pytest.raises(ValueError, match=f"{server.url}/file: .*5,000.*5,001"):
        fetch(size=5001)
    assert not list(tmp_path.iterdir())
    server.faults = [{"headers": {"Content-Length": None}}]
    assert fetch(size=5000) == DATA


def test_passing_trouble_is_tried_again_with_doubled_waits_and_other_trouble_is_not(server, fetch, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    monkeypatch.setattr(download, "WAIT", 3)
    server.files["file"] = DATA
    server.faults = [{"status": 503}, {"status": 429}]
    assert fetch() == DATA
    server.faults = [{"status": 503}] * 3
    with pytest.raises(ConnectionError, match=f"{server.url}/later"):
        fetch(path="later")
    assert waits == [3, 6] * 2
    server.requests.clear()
    with pytest.raises(FileNotFoundError, match=f"{server.url}/gone: .*404"):
        fetch(path="gone")
    assert len(server.requests) == 1
    server.server_close()
    with pytest.raises(ConnectionError, match=f"{server.url}/file"):
        fetch()


def test_redirects_keep_the_range_and_lead_to_no_file_and_not_away_from_https(server, fetch, tmp_path, monkeypatch):
    server.files = {"file": DATA, "elsewhere": DATA}
    server.faults = [{"breaks_off": 2000}, {"status": 302, "headers": {"Location": "/elsewhere"}}]
    assert fetch() == DATA
    assert server.requests[2] == ("elsewhere", "bytes=2000-", '"one"')
    (tmp_path / "secret").write_bytes(b"secret")
    server.faults = [{"status": 302, "headers": {"Location": (tmp_path / "secret").as_uri()}}]
    with pytest.raises(OSError, match=f"{server.url}/other"):
        fetch(path="other")
    insecure = download.urlopen(f"{server.url}/elsewhere")
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: insecure)
    with pytest.raises(ValueError, match=f"https://a/b: .*{server.url}/elsewhere"):
        download.download("https://a/b", tmp_path / "other.part")
    assert not (tmp_path / "other.part").exists()


def test_room_is_looked_for_before_anything_is_written(server, fetch, call, tmp_path, monkeypatch):
    server.files["file"] = DATA
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4999))
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        fetch()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    assert fetch() == DATA
    needed = sum(map(len, SET5.values()))
    (tmp_path / "set.tar").write_bytes(tar_of(benchmark("Set5")))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert str(tmp_path / "data") in call("--items", "Set5", "--archive", "set.tar", code=1)
    assert not (tmp_path / "data/Set5").exists()


@pytest.mark.parametrize(
    ("name", "wrong", "checksum"),
    [
        ("Set5", tar_of(benchmark("Set5")).replace(b"IHDR", b"IHDX"), "sha256"),
        ("Set5", tar_of(benchmark("Set5")).replace(b"IHDR", b"IHDX"), "md5"),
        ("rcan_x4", b"\n<!DOCTYPE html><html>Too many users have downloaded this file</html>", ""),
    ],
)
def test_a_wrong_file_is_removed_and_the_next_call_starts_anew(name, wrong, checksum, call, publish, server, tmp_path):
    right = tar_of(benchmark("Set5"))
    publish(name, right, checksum=checksum)
    (file,) = server.files
    server.files[file] = wrong
    publish("rcan_x2", b"\x80\x02weights")
    message = call("--items", "rcan_x2", name, code=1)
    assert file in message
    assert not checksum or {hashlib.new(checksum, data).hexdigest() for data in (right, wrong)} <= set(re.findall(r"[0-9a-f]+", message))
    assert tree(tmp_path) == {"pretrained/rcan_x2.pt": b"\x80\x02weights"}  # what came before stays
    server.files[file] = right
    call("--items", name)
    assert server.ranges == [None] * 3


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


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_a_given_archive_lands_exactly_and_is_left_as_it_is(pack, call, given, server, tmp_path):
    link = {tar_info("README", tarfile.SYMTYPE, "/etc/passwd"): b""} if pack == tar_of else {}  # nobody asked for it
    archive = given(pack({f"./a/{name}": data for name, data in benchmark("Set5", "Set14").items()} | link))
    before = tree(tmp_path)
    assert hashlib.sha256(before["copy.bin"]).hexdigest() in call("--items", "Set5", "--archive", archive)
    assert tree(tmp_path) == before | SET5  # no link either
    assert server.requests == []


def test_a_given_file_with_the_published_name_must_be_the_published_one(call, publish, given, tmp_path):
    data = tar_of(benchmark("Set5"))
    publish("Set5", data)
    archive = given(data[:-1] + b"1", "benchmark.tar")
    assert archive in call("--items", "Set5", "--archive", archive, code=1)
    assert (tmp_path / "benchmark.tar").is_file()  # it is the user's
    call("--items", "Set5", "--archive", given(data, "benchmark.tar"))
    publish("vgg19", b"\x80\x02VGG")
    archive = given(b"\x80\x02V")  # whatever its name, as there is no other way to know it
    assert archive in call("--items", "vgg19", "--archive", archive, code=1)
    call("--items", "vgg19", "--archive", given(b"\x80\x02VGG"))
    assert (tmp_path / "pretrained/vgg19-dcbb9e9d.pth").read_bytes() == b"\x80\x02VGG"


def test_sets_fetched_by_hand_are_unpacked_if_they_are_whole(call, given, tmp_path):
    images = {f"T91/t{index}.png": image(index) for index in range(90)}
    message = call("--items", "T91", "--archive", given(zip_of(images)), code=1)
    assert {"90", "91"} <= set(re.findall(r"\d+", message))
    assert not (tmp_path / "data/T91").exists()
    call("--items", "T91", "--archive", given(zip_of(images | {"T91/more/t90.png": image(90)})))
    assert len(dataset.find_pairs(tmp_path / "data/T91", 4)) == 91
    scenes = {"OutdoorSceneTrain_v2/sky/1.png": b"1", "OutdoorSceneTrain_v2/sea/2.png": b"2", "OutdoorSceneTest300_anno/3.png": b"3"}
    call("--items", "OST", "--archive", given(tar_of(scenes)))
    assert [pair.name for pair in dataset.find_pairs(tmp_path / "data/OST", 4)] == ["1", "2"]  # no annotations
    archive = given(tar_of({"readme": b"1"}))
    assert archive in call("--items", "DIV8K", "--archive", archive, code=1)


def zip_info(name, mode=0):
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return info


def tar_info(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BABY = "benchmark/Set5/HR/a.png"
OUT = [  # the last ones lead out on Windows, or are other files there
    "../outside.png", "benchmark/Set5/HR/../../../../outside.png", "/outside.png", "benchmark/..", "./../outside.png",
    "C:/outside.png", "..\\outside.png", "benchmark\\Set5\\HR\\z.png", "benchmark/Set5/HR/z.png:stream.png", "benchmark/Set5/HR/z\n.png",
]  # fmt: skip
ATTACKS = {
    **{f"zip {name!r}": (zip_of, zip_info(name), b"evil") for name in OUT},
    **{f"tar {name!r}": (tar_of, tar_info(name), b"evil") for name in OUT},
    "zip null": (zip_of, zip_info("benchmark/Set5/HR/z.png\0/../x"), b"evil"),
    "zip symlink": (zip_of, zip_info(BABY, stat.S_IFLNK | 0o777), b"../../../outside.png"),
    "zip device": (zip_of, zip_info(BABY, stat.S_IFCHR | 0o666), b""),
    "zip folder": (zip_of, zip_info(f"{BABY}/"), b""),
    "zip duplicate": (zip_of, zip_info("again/Set5/HR/a.png"), b"evil"),
    "zip duplicate where case is ignored": (zip_of, zip_info("benchmark/Set5/HR/A.png"), b"evil"),
    "tar symlink": (tar_of, tar_info(BABY, tarfile.SYMTYPE, "../../../outside.png"), b""),
    "tar symlink within": (tar_of, tar_info(BABY, tarfile.SYMTYPE, "b.png"), b""),
    "tar hardlink": (tar_of, tar_info(BABY, tarfile.LNKTYPE, "/etc/passwd"), b""),
    "tar device": (tar_of, tar_info(BABY, tarfile.CHRTYPE), b""),
    "tar pipe": (tar_of, tar_info(BABY, tarfile.FIFOTYPE), b""),
    "tar duplicate of itself": (tar_of, tar_info(BABY), b"evil"),
}


@pytest.mark.parametrize(("pack", "info", "data"), ATTACKS.values(), ids=[name.replace("\0", "0") for name in ATTACKS])
def test_an_attacking_archive_is_refused_by_name_and_leaves_everything_as_it_was(pack, info, data, given, call, tmp_path):
    name = getattr(info, "orig_filename", "") or info.name
    members = benchmark("Set5")
    if name.rstrip("/") == BABY and data != b"evil":
        del members[BABY]  # the member comes in the image's place
    archive = given(pack(members | {info: data}))
    before = tree(tmp_path)
    message = call("--items", "Set5", "--archive", archive, code=1)
    assert archive in message
    assert repr(name)[1:-1].split("\\x00")[0] in message
    assert tree(tmp_path) == before


def huge_tar():
    info = tarfile.TarInfo("benchmark/Set5/HR/z.png")
    info.size = 10**12
    return tar_of(benchmark("Set5"))[:-10240] + info.tobuf()


def understated_zip():
    """Says 10 bytes where there are more."""
    data = zip_of(benchmark("Set5"))
    at = data.rindex(b"PK\x01\x02", 0, data.index(BABY.encode(), data.index(b"PK\x01\x02")))
    assert data[at + 24 : at + 28] == len(image(ord("a"))).to_bytes(4, "little")
    return data[: at + 24] + (10).to_bytes(4, "little") + data[at + 28 :]


BAD_ARCHIVES = {
    "wrong CRC in the last image": lambda: zip_of(benchmark("Set5")).replace(b"IDAT", b"IDAX", 5).replace(b"IDAX", b"IDAT", 4),
    "zip cut off": lambda: zip_of(benchmark("Set5"))[:-30],
    "tar cut off": lambda: tar_of(benchmark("Set5"))[:3000],
    "web page": lambda: b"<html>quota</html>",
    "no archive": lambda: b"hello",
    "empty": lambda: b"",
    "size understated": understated_zip,
    "encrypted": lambda: re.sub(rb"(?s)(PK\x01\x02....)..", lambda match: match[1] + b"\x01\x00", zip_of(benchmark("Set5"))),
    "huge tar": huge_tar,
    "bomb": lambda: zip_of({"benchmark/Set5/HR/z.png": bytes(3 * 2**20)}, compression=zipfile.ZIP_DEFLATED),
    "an image less": lambda: tar_of(benchmark("Set5", count=4)),
    "an image more": lambda: tar_of(benchmark("Set5", count=6)),
}


@pytest.mark.parametrize("make", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES.keys())
def test_a_damaged_or_wrong_archive_leaves_everything_as_it_was(make, given, call, tmp_path):
    archive = given(make())
    before = tree(tmp_path)
    assert archive in call("--items", "Set5", "--archive", archive, code=1)
    assert tree(tmp_path) == before


def test_a_bomb_is_refused_before_it_is_unpacked(given, call, monkeypatch):
    archive = given(BAD_ARCHIVES["bomb"]())
    monkeypatch.setitem(download.ITEMS, "Set5", download.Item(folders=(download.Folder("Set5/GT", 1, "Set5/HR/*"),)))
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("unpacked"))
    assert archive in call("--items", "Set5", "--archive", archive, code=1)


@pytest.mark.parametrize("stopped", ["copyfileobj", "replace"])
def test_a_stop_while_unpacking_leaves_no_half_folder_and_the_next_call_finishes(stopped, call, given, tmp_path, monkeypatch):
    archive = given(tar_of(benchmark("Set5")))
    before, calls = tree(tmp_path), []
    module = shutil if stopped == "copyfileobj" else os
    original = getattr(module, stopped)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == (3 if stopped == "copyfileobj" else 1):
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, stopped, interrupted)
        call("--items", "Set5", "--archive", archive, code=130)
    assert tree(tmp_path) == before
    (tmp_path / "data/Set5/.GT.1.part").mkdir()  # of a run that was killed
    (tmp_path / "data/Set5/.GT.1.part/a.png").write_bytes(b"half")
    call("--items", "Set5", "--archive", archive)
    assert tree(tmp_path) == before | SET5


def test_of_several_folders_all_come_or_none(publish, call, tmp_path):
    whole = zip_of({member: image(seed) for seed, member in enumerate(MEMBERS["BSDS500"])})
    last = whole.index(b"IDAT", whole.index(b"val/6.jpg"))
    publish("BSDS500", whole[:last] + b"IDAX" + whole[last + 4 :], images=2, checksum="")
    archive = tmp_path / "data/downloads/master.zip"
    assert str(archive) in call("--items", "BSDS500", code=1)
    assert list(tree(tmp_path)) == ["data/downloads/master.zip"]


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused(call, publish, server, tmp_path):
    publish("Set5", tar_of(benchmark("Set5")))
    code = "import files, pathlib, sys, time; lock = files.FolderLock(pathlib.Path(sys.argv[1])); lock.__enter__(); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path / "data/downloads")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}) as holder:
        holder.stdout.readline()
        message = call("--items", "Set5", code=1)
        holder.kill()
    assert str(tmp_path / "data/downloads") in message
    assert server.requests == []
