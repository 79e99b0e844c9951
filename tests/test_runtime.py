"""How scripts start and end: exit codes, signals, and what processes agree on."""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import runtime
from helpers import REPOSITORY
from runtime import Poll, Runtime, StopRequest, start_runtime

CPU = Runtime(torch.device("cpu"))
signals = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def ended(code, folder=REPOSITORY):
    """Exit code and stderr's lines of a program that ends by `run_script`."""
    program = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport image_files\nfrom runtime import *\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.mark.slow
def test_a_users_mistake_is_one_sentence_and_one_of_ours_a_traceback():
    code, lines = ended("run_script(lambda: image_files.read_image('gone.png'))")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("error: gone.png")
    code, lines = ended("run_script(lambda: [].remove(1))")
    assert code == 1
    assert lines[0].startswith("Traceback")
    code, lines = ended("sys.argv = ['x', '--debug']\nrun_script(lambda: image_files.read_image('gone.png'))")
    assert code == 1
    assert lines[0].startswith("Traceback")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), "batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes"), "batch_size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"), "num_workers"),
        (ConnectionResetError(104, "Connection reset by peer"), "num_workers"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "process"),
        (PermissionError(13, "Permission denied", "results/x"), "results/x"),
    ],
)
def test_what_is_no_mistake_of_ours_is_a_sentence(error, named, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.run_script(main)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert named in said


def test_a_worker_that_ends_while_it_hands_over_a_batch_is_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    here, there = multiprocessing.Pipe()
    there.close()
    with pytest.raises(SystemExit) as end:
        runtime.run_script(here.recv)
    assert end.value.code == 1
    assert "num_workers" in capsys.readouterr().err


def test_a_closed_pipe_is_not_blamed_on_the_workers(capsys, monkeypatch):
    """As of `script | head`."""
    monkeypatch.setattr(sys, "argv", ["x"])

    def main():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        runtime.run_script(main)
    assert end.value.code == 1
    assert "num_workers" not in capsys.readouterr().err


@pytest.mark.slow
@signals
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_script_that_is_ended_tidies_up(tmp_path, name, code):
    program = f"""
import os, signal, time, pathlib
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    finally:
        pathlib.Path("tidied").touch()
run_script(main)"""
    assert ended(program, tmp_path)[0] == code
    assert (tmp_path / "tidied").exists()


@pytest.mark.slow
@signals
def test_a_second_signal_leaves_at_once():
    program = """
import os, signal, time
def main():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(StopRequest.SAME + 0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
run_script(main)"""
    assert ended(program) == (130, ["stopped"])


@signals
def test_a_stop_is_asked_for_once_and_forced_the_second_time():
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun and a terminal both do; the same request
        stop.requested -= StopRequest.SAME
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_process_answers_and_gathers_alone():
    poll = Poll(CPU)
    assert (poll(True, False), poll(False, True), poll.finish()) == ([True, False], [False, True], [])
    assert CPU.gather("x") == ["x"]
    assert CPU.in_turns(lambda: 5) == 5
    CPU.check_agreement({"seed": 1})


def test_processes_that_differ_are_refused_with_names_and_values(monkeypatch):
    monkeypatch.setattr(Runtime, "gather", lambda _, own: [own, {**own, "seed": 2}])
    with pytest.raises(ValueError, match="seed is 2 and 1"):
        Runtime(torch.device("cpu"), 0, 2).check_agreement({"seed": 1, "same": 3})


@pytest.mark.parametrize(("cards", "processes", "backend"), [(2, 2, "cpu:gloo,cuda:nccl"), (1, 2, "gloo"), (0, 2, "gloo")])
def test_more_processes_than_cards_take_gloo(monkeypatch, cards, processes, backend):
    """NCCL refuses two processes on one card."""
    chosen = []
    places = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "here", "MASTER_PORT": 1}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(runtime, "try_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: "group")
    monkeypatch.setattr(runtime, "_fresh_store", lambda *_: None)
    found = start_runtime()
    assert chosen == [backend]
    assert (found.rank, found.world_size, str(found.device)) == (1, 2, f"cuda:{1 % cards}" if cards else "cpu")
    assert not found.is_main


def test_alone_on_this_machine(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = start_runtime()
    assert (found.rank, found.world_size, found.is_main, found.control) == (0, 1, True, None)
    assert runtime.cores() == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Devices and environments that are not what they seem


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"RANK": ""}, "RANK"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_refused_by_name(monkeypatch, given, named):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        start_runtime()


def test_a_script_for_one_process_refuses_several(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        start_runtime(alone=True)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    ],
)
def test_a_gpu_that_fails_at_its_first_convolution_is_named(monkeypatch, message):
    """A stand-in for old cards, which are reported as available."""

    def fail(*_):
        raise RuntimeError(f"{message}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
    with pytest.raises(ValueError, match=r"cpu.*CUDA_VISIBLE_DEVICES") as caught:
        runtime.try_device(torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_every_way_to_run_out_of_memory_is_known(message):
    assert runtime.is_out_of_memory(RuntimeError(message))
    assert not runtime.is_out_of_memory(ValueError(message))
    assert not runtime.is_out_of_memory(RuntimeError("shapes differ"))


def test_a_gpu_that_is_not_used_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "nvidia-smi" in runtime.unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as somebody wants it
    assert runtime.unused_gpu() == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_missing_compiler_is_named(monkeypatch, device):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "compile=True" in runtime.missing_compiler(torch.device(device))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name)
    assert runtime.missing_compiler(torch.device(device)) == ""


# Streams that are gone


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.EIO, 0), (errno.ENOSPC, 1)])
def test_work_goes_on_when_the_output_is_gone_and_a_full_disk_is_named_at_the_end(monkeypatch, capsys, number, code):
    """EPIPE: of `script | head`; EIO: of a closed terminal."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, "gone")

    done = []

    def main():
        for _ in range(3):
            print("x")
            done.append(1)

    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stdout", gone := Gone())
    if code:
        with pytest.raises(SystemExit) as end:
            runtime.run_script(main)
        assert end.value.code == code
        assert "standard output" in capsys.readouterr().err
    else:
        runtime.run_script(main)
    assert done == [1, 1, 1]
    assert sys.stdout is gone


@pytest.mark.slow
@signals
def test_nohup_holds_off_a_closed_terminal(tmp_path):
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def main():
    os.kill(os.getpid(), signal.SIGHUP)
    print("still here")
run_script(main)"""
    assert ended(program, tmp_path)[0] == 0
