"""The documents are true: commands parse, links lead somewhere, checksums match."""

import hashlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from config import Config, parse
from config_improved import parse_improved

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "assets" / "weights" / "README.md"])
PARSERS = {  # all other scripts begin by calling tyro.cli
    "train.py": partial(parse, Config, "train"),
    "test.py": partial(parse, Config, "test"),
    "train_improved.py": parse_improved,
}


class Parsed(Exception):
    """The script has accepted its arguments."""


def documented_commands() -> Iterator[tuple[str, ...]]:
    """The words of each command in blocks of shell code and in inline code."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for command in (part for line in lines for part in line.split(" && ")):
            if re.match(r"(python|pytest|torchrun|bash|sbatch) \S", command):
                yield tuple(shlex.split(command, comments=True))


COMMANDS = sorted(set(documented_commands()))


def parse_alone(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a script's main up to where its arguments are accepted."""

    def cli(*args, cli=tyro.cli, **kwargs):
        cli(*args, **kwargs)
        raise Parsed

    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(Parsed):
        module.main(arguments)


def check(words: tuple[str, ...], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand a command to the parser of its script; SystemExit or another error where it refuses."""
    program, *rest = words
    if program == "python" and rest[0] in PARSERS:
        PARSERS[rest[0]](rest[1:])
    elif program == "python" and rest[0] != "-m":
        parse_alone(REPOSITORY / rest[0], rest[1:], monkeypatch)
    elif program == "torchrun":
        known = get_args_parser().parse_args(rest)
        check(("python", known.training_script, *known.training_script_args), pytestconfig, monkeypatch)
    elif program == "sbatch":
        given = rest[rest.index("scripts/slurm.sh") + 1 :]
        check(("python", *([] if given[0].endswith(".py") else ["train.py"]), *given), pytestconfig, monkeypatch)
    elif program == "bash":
        text = (REPOSITORY / rest[0]).read_text(encoding="utf-8")
        assert all(f"{option})" in text for option in rest[1:])
    elif program == "pytest":
        assert all((REPOSITORY / word).is_file() for word in rest if word.endswith(".py"))
        for option in filter(re.compile("-").match, rest):
            pytestconfig.getoption(option)  # ValueError: there is no such option


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_documented_commands_parse(words, pytestconfig, monkeypatch):
    try:
        check(words, pytestconfig, monkeypatch)
    except SystemExit as end:
        assert end.code == 0 and "--help" in words, shlex.join(words)


def test_commands_of_every_kind_are_found():
    assert {word for words in COMMANDS for word in words} >= {*PARSERS, "inference.py", "scripts/quickstart.sh", "scripts/run_tests.sh"}


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_links_and_images_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("name", "most"), [("README.md", 180), ("IMPROVED_USAGE.md", 170)])
def test_guides_stay_short(name, most):
    assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) <= most


def test_the_model_card_names_every_file_with_its_checksum():
    folder = REPOSITORY / "assets" / "weights"
    card = dict(re.findall(r"`([\w.]+)` .*`([0-9a-f]{64})`", (folder / "README.md").read_text(encoding="utf-8")))
    assert card == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.pth.tar")}


@pytest.mark.parametrize(
    ("name", "keys"),
    [("CITATION.cff", "cff-version title authors"), (".pre-commit-config.yaml", "repos"), (".github/workflows/tests.yml", "jobs")],
)
def test_yaml_parses(name, keys):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8")).keys() >= {*keys.split()}
