"""The documents are true: commands parse, links lead somewhere, checksums match."""

import hashlib
import itertools
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

import config_inference
from config import Config, parse
from config_improved import parse_improved

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "assets" / "weights" / "README.md"])
PARSERS = {
    "train.py": partial(parse, Config, "train"), "test.py": partial(parse, Config, "test"), "train_improved.py": parse_improved,
    "inference.py": config_inference.parse,
}  # fmt: skip


def prose(document: Path) -> str:
    return re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def documented_commands() -> Iterator[tuple[str, ...]]:
    """The words of each command in blocks of shell code and in inline code."""
    for document in DOCUMENTS:
        blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", prose(document))
        for command in (part for line in lines for part in line.split(" && ")):
            if re.match(r"(python|pytest|torchrun|bash|sbatch) \S", command):
                yield tuple(shlex.split(command, comments=True))


COMMANDS = sorted(set(documented_commands()))


def parse_alone(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the main of a script that begins with tyro.cli, and leave it when its arguments are accepted."""

    def cli(*args, cli=tyro.cli, **kwargs):
        cli(*args, **kwargs)
        raise StopIteration

    main = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(StopIteration):
        main(arguments)


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
    assert {*itertools.chain(*COMMANDS)} >= {*PARSERS, "scripts/quickstart.sh", "scripts/run_tests.sh", "--kills"}


def anchors(document: Path) -> list[str]:
    """What GitHub makes of the headings."""
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_links_and_images_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert "://" in link or (target.exists() and (not anchor or anchor in anchors(target))), link


def test_guides_stay_short():
    lines = {document.name: len(document.read_text(encoding="utf-8").splitlines()) for document in REPOSITORY.glob("*.md")}
    assert lines["README.md"] <= 180 and lines["IMPROVED_USAGE.md"] <= 170


def test_the_map_of_the_code_names_every_room():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    assert {*re.findall(r"\w+", text.split("```")[1])} >= {path.stem for path in REPOSITORY.glob("*.py")}


def test_the_model_card_names_every_file_with_its_checksum():
    folder = REPOSITORY / "assets" / "weights"
    card = dict(re.findall(r"`([\w.]+)` .*`([0-9a-f]{64})`", (folder / "README.md").read_text(encoding="utf-8")))
    assert card == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.pth.tar")}


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/tests.yml"])
def test_yaml_parses(name):
    assert pytest.importorskip("yaml").safe_load((REPOSITORY / name).read_text(encoding="utf-8"))
