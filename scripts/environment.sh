# Sourced by the other scripts: makes .venv (or $VENV) from a requirements file, once, and puts it first on the PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

prepare_environment() { # $1: the requirements file
  local python="${PYTHON:-python3}" venv="${VENV:-.venv}"
  local stamp="$venv/installed-${1%.txt}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: '$python' is missing or older than Python 3.10; set PYTHON to a newer one, as in PYTHON=python3.12 bash $0" >&2
    exit 1
  fi
  if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
      rm -rf "$venv"
      echo "error: '$python -m venv' does not work; install it (on Debian and Ubuntu: apt install python3-venv)" >&2
      exit 1
    fi
  fi
  if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
    echo "installing what $1 lists (a few GB where PyTorch is not yet in pip's cache)"
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$1"
    cat requirements.txt "$1" > "$stamp"
  fi
  export PATH="$PWD/$venv/bin:$PATH"
}
