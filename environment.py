"""The scripts import this first: it names missing packages in one sentence, before the first of them fails to import."""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("numpy", "scipy", "cv2", "PIL", "tifffile", "safetensors", "torch", "torchvision", "tqdm", "tyro", "tensorboard", "skimage")

if sys.version_info < (3, 10):  # noqa: UP036 (a person may start a script by an older one)
    sys.exit(f"error: this is Python {sys.version.split()[0]}, but at least 3.10 is needed")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if missing:
    home = Path(__file__).resolve().parent
    activate = r".venv\Scripts\activate" if sys.platform == "win32" else "source .venv/bin/activate"
    is_made = (home / ".venv").is_dir() and Path(sys.prefix).resolve() != home / ".venv"
    remedy = f"run {activate} in {home}" if is_made else f"run pip install -r {home / 'requirements.txt'}"
    sys.exit(f"error: {sys.executable} has no {', '.join(missing)}: {remedy}")
