"""The arrows of the house: who may import whom, and that importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Rows of the house from the bottom up; a file may import what stands in a lower row, or further right in its own
ROWS = (
    ("config", "config_inference", "losses", "layouts", "model", "imgproc", "image_files", "metadata", "runtime", "files", "environment"),
    ("store", "dataset", "weights", "utils", "reports", "html_report", "optimizers", "graphs"),
    ("checkpoints", "upscaling", "config_improved"),
    ("train", "test", "inference"),
    ("train_improved",),
)
ORDER = [name for row in reversed(ROWS) for name in row]
FILES = sorted(REPOSITORY.glob("*.py")) + sorted((REPOSITORY / "scripts").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside its functions; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arrows_point_down(path):
    if path.parent == REPOSITORY:
        entries = {"test", "inference"} if path.stem == "train_improved" else {"train", "test", "inference"}
        allowed = {*ORDER[ORDER.index(path.stem) + 1 :]} - entries
    else:
        of_row_4 = {"gpu_check": "train", "demo": "inference"}  # which check the update itself, and show the same results
        allowed = {*ROWS[0], *ROWS[1], *ROWS[2], of_row_4.get(path.stem)}
    ours = {name.split(".")[0] for name in imported(path)} & {*ORDER, "scripts", "tests"}
    assert ours <= allowed


@pytest.mark.parametrize("path", FILES + sorted((REPOSITORY / "tests").glob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_private_and_removed_names_are_not_imported(path):
    banned = ("torch._", "torch.utils.data._utils", "torchvision.transforms.functional_tensor", "scipy.misc")
    assert not [name for name in imported(path) if name.startswith(banned)]


def in_a_new_process(code: str, folder: Path) -> str:
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_settings_takes_no_torch_and_no_arguments(tmp_path):
    code = "import sys; sys.argv = ['x', '--nonsense']; import config, config_improved; print('torch' in sys.modules)"
    assert in_a_new_process(code, tmp_path) == "False"


@pytest.mark.parametrize("script", ["train.py", "test.py", "train_improved.py", "inference.py"])
def test_help_takes_no_torch(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0 and "--model_" in finished.stdout
    modules = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
    assert "tyro" in modules and "torch" not in modules


IMPORT_ALL = """
import os, random, signal, sys, threading, warnings
sys.argv = ["x", "--nonsense"]
events = []
watched = {"socket.bind", "socket.connect", "subprocess.Popen", "os.system", "os.mkdir", "os.rename", "os.remove", "os.putenv"}
def hear(event, arguments):
    if listening and (event in watched or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))):
        events.append((event, str(arguments[:1])))
listening = False
sys.addaudithook(hear)
import cv2, numpy, torch, torchvision, tqdm, tyro, matplotlib, torch.distributed.checkpoint  # what libraries do is their affair
import onnx, PIL.Image, safetensors, scipy.ndimage, tifffile, torch.utils.checkpoint
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), torch.get_num_threads(), os.getcwd(),
        dict(os.environ), {number: signal.getsignal(number) for number in signal.valid_signals()}, threading.active_count(),
        torch.get_default_dtype(), torch.backends.cudnn.deterministic, torch.is_grad_enabled(), sys.argv, torch.cuda.is_initialized(),
    )
before, listening = state(), True
import importlib
for name in sys.stdin.read().split():
    importlib.import_module(name)
listening = False
assert [one for one, two in zip(before, state()) if one != two] == []
print(events)
"""


@pytest.mark.slow
def test_importing_every_module_does_nothing(tmp_path):
    """No random number, thread, signal, file, process, connection or argument is touched; what libraries do before doesn't count."""
    names = [path.stem for path in FILES if path.stem != "test"]
    finished = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL],
        input=" ".join(names),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'scripts'}"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


# Calls that run what a file or a shell says, or handle paths as text
BANNED_CALLS = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "tempfile.mktemp", "yaml.load", "subprocess.getoutput",
    "os.path.join", "os.path.exists", "os.path.isfile", "os.path.isdir", "os.path.basename", "os.path.dirname", "os.path.splitext",
    "os.listdir", "os.makedirs", "glob.glob", "joblib.load",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_runs_code_from_files_or_shells_and_paths_are_paths(path):
    """Checkpoints are read by weights.read alone, archives unpacked member by member, and programs started without a shell."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in BANNED_CALLS, f"{path}:{node.lineno}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("shell", "False") == "False", f"{path}:{node.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        if called.endswith((".extractall", ".extract")):  # else it writes where the archive says
            assert options.get("filter") == "'data'", f"{path}:{node.lineno}"
        if called.endswith("torch.load"):
            assert options.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert path.stem == "weights", f"{path}:{node.lineno}"
        if called in ("os.replace", "os.rename", "tempfile.NamedTemporaryFile"):  # files.replacing is the only atomic writer
            assert path.stem in ("files", "download"), f"{path}:{node.lineno}"  # whose part outlives the process, to be resumed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_private_name_of_torch_is_used(path):
    """Such as torch._foreach_add_, which may change in any release."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert ast.unparse(node.value).split(".")[0] != "torch", f"{path}:{node.lineno}"
