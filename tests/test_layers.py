"""The arrows of the house: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LAYERS_1_AND_2 = {
    "files", "imgproc", "model", "losses", "config", "dataset", "utils", "weights", "layouts", "upscaling", "photo", "config_improved",
    "checkpoints",
}  # fmt: skip
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "imgproc": set(),
    "model": set(),
    "losses": set(),
    "config_improved": {"config"},
    "dataset": {"imgproc"},
    "utils": {"files", "imgproc"},
    "checkpoints": {"files", "weights"},
    "layouts": {"model"},
    "upscaling": {"model", "utils"},
    "photo": {"imgproc"},
    "weights": {"model", "layouts"},
    "train": LAYERS_1_AND_2,
    "train_improved": {"config_improved", "losses", "model", "train", "utils"},
    "test": LAYERS_1_AND_2,
    "inference": LAYERS_1_AND_2,
}
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
    allowed = MAY_IMPORT[path.stem] if path.parent == REPOSITORY else LAYERS_1_AND_2
    ours = {name.split(".")[0] for name in imported(path)} & (MAY_IMPORT.keys() | {"scripts", "tests"})
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


def test_importing_every_script_does_nothing(tmp_path):
    code = (
        "import sys, torch; sys.argv = ['x', '--nonsense']; before = torch.get_rng_state()\n"
        "import train, inference, dataset, utils, weights\n"
        "assert (before == torch.get_rng_state()).all()\n"
        "print(torch.cuda.is_initialized())"
    )
    assert in_a_new_process(code, tmp_path) == "False"
    assert not list(tmp_path.iterdir())
