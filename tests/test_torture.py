"""scripts/torture.py: killed trainings end as straight ones do, and the verdict would say so if they didn't."""

import importlib
import json
import os
import random
import sys
import time

import numpy as np
import pytest
import torch

from helpers import REPOSITORY, write_set

sys.path.insert(0, str(REPOSITORY / "scripts"))
torture = importlib.import_module("torture")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")


# Real trainings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    write_set(folder / "data" / "DemoTrain", [(64, 70), (90, 66)])  # small ones, instead of the photographs
    write_set(folder / "data" / "DemoTest", [(72, 80), (60, 76)], seed=9)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers", "kills"), [("l1", 0, 2), ("composite", 2, 1)])
def test_killed_trainings_end_as_straight_ones_do(place, capsys, kind, workers, kills):
    arguments = ["--kills", kills, "--updates", 18, "--trainings", kind, "--workers", workers, "--output", place, "--seed", 1]
    torture.main([str(argument) for argument in arguments])  # would exit with 1
    said = capsys.readouterr().out
    last = f"{kills} of {kills} kills survived, 0 updates lost, every tensor and every logged number equal\n"
    assert said.endswith(last)
    assert (place / "verdict.md").read_text() in said
    (runs,) = [folder for folder in place.iterdir() if (folder / f"{kind}_workers{workers}_killed").is_dir()]
    assert (runs / "verdict.md").read_text() == (place / "verdict.md").read_text()
    (row,) = [line for line in said.splitlines() if line.startswith(f"| {kind} |")]
    assert row.startswith(f"| {kind} | {workers} | {kills} of {kills} |")
    log = torture.read_log((runs / f"{kind}_workers{workers}_killed" / "log.jsonl").read_text())
    assert sum(line.get("event") == "start" for line in log) == kills + 1  # so that it was killed indeed
    rates = [line["optimizer/learning_rate"] for line in log if "event" not in line]
    assert [rates[0], rates[5], rates[6], rates[17]] == pytest.approx([5e-4, 1e-3, 5e-4, 2.5e-4])


# The processes, with trainings that are played


def play(tmp_path, monkeypatch, script, **changes):
    """A training whose script is this code, run in its folder."""
    (tmp_path / "play.py").write_text(script)
    monkeypatch.setitem(torture.KINDS, "l1", (str(tmp_path / "play.py"), {}))
    config = torture.TortureConfig(output=str(tmp_path), updates=12, **changes)
    training = torture.Training(config, tmp_path, "l1", 0, "killed")
    training.folder.mkdir()
    monkeypatch.setattr(torture.Training, "environment", {**os.environ, "FOLDER": str(training.folder)})
    return training


START = """
import json, os, pathlib, subprocess, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
print("going on from /x/last.pth.tar: update 4, epoch 2", flush=True)
def log(**line):
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
"""


@pytest.mark.parametrize(
    ("then", "hit", "newest"),
    [
        ("", "start", None),
        ("log(update=4, event='start')", "start", None),
        ("log(update=4, event='start'); log(update=5)", "loop", 5),
        ("log(update=4, event='start'); log(update=5); log(update=6)", "evaluation", 6),
        ("log(update=4, event='start'); log(update=6); log(update=6, event='evaluation')", "loop", 6),
        ("log(update=4, event='start'); log(update=5); (folder / '.last.pth.tar.1.part').touch()", "save", 5),
        ("log(update=4, event='start'); log(update=5); (folder / '.config.json.1.part').touch()", "loop", 5),
    ],
)
def test_what_a_kill_has_hit_is_seen_from_what_is_left(tmp_path, monkeypatch, then, hit, newest):
    training = play(tmp_path, monkeypatch, f"{START}\n{then}\nprint('ready', flush=True)\ntime.sleep(60)")
    training.log.write_text('{"update": 0, "event": "start"}\n{"update": 1}\n{"update": 2}\n{"update": 3}\n')
    (training.folder / ".best.pth.tar.7.part").touch()  # left by a sitting before
    with torture.Sitting(training, 1) as sitting:
        assert sitting.wait_for(lambda: "ready" in (sitting.said.read_text() if sitting.said.exists() else ""))
        assert sitting.kill()
        assert (sitting.hit, sitting.newest, sitting.find_resumed()) == (hit, newest, 4)
        assert 0 <= sitting.gone_after() < 10


def test_a_sitting_that_was_killed_early_has_gone_on_from_nowhere(tmp_path, monkeypatch):
    training = play(tmp_path, monkeypatch, "import time; time.sleep(60)")
    training.log.write_text('{"update": 0, "event": "start"}\n{"update": 1}\n')
    with torture.Sitting(training, 1) as sitting:
        assert sitting.kill()
        training.log.write_text('{"update": 0, "event": "start"}\n')  # what a later sitting writes is not its own
        assert (sitting.hit, sitting.newest, sitting.find_resumed()) == ("start", None, None)


def test_a_sitting_that_logs_and_says_nothing_is_a_new_run(tmp_path, monkeypatch):
    training = play(tmp_path, monkeypatch, START.replace("going on", "") + "log(update=0, event='start')")
    with torture.Sitting(training, 1) as sitting:
        sitting.finish()
        assert sitting.find_resumed() == 0


def test_workers_that_outlive_their_training_are_found(tmp_path, monkeypatch):
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    training = play(tmp_path, monkeypatch, f"{START}\nprint({child}.pid, 'is the worker', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(torture, "ORPHANS_MAY_LIVE", 0.3)
    with torture.Sitting(training, 1) as sitting:
        assert sitting.wait_for(lambda: "worker" in (sitting.said.read_text() if sitting.said.exists() else ""))
        sitting.kill()
        assert sitting.gone_after() is None
        monkeypatch.setattr(torture, "ORPHANS_MAY_LIVE", 10)
    assert not sitting._listener.is_alive()  # leaving ends what is left
    kill = torture.Kill("loop", 5, 4, None)
    assert torture.find_problems([kill], 2) == ["kill 1: a worker was still alive after 10 s"]


def test_a_training_that_fails_ends_the_torture_with_its_last_words(tmp_path, monkeypatch):
    training = play(tmp_path, monkeypatch, f"{START}\nprint('50%\\r60%')\nsys.exit('error: the disk is full')")
    words = r"l1_workers0_killed: ended by itself with code 1: (.|\n)*60%\nerror: the disk is full$"
    with torture.Sitting(training, 1) as sitting, pytest.raises(ValueError, match=words):
        sitting.finish()


def test_a_training_that_hangs_ends_the_torture(tmp_path, monkeypatch):
    training = play(tmp_path, monkeypatch, f"{START}\ntime.sleep(60)", timeout=0.01)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"l1_workers0_killed: not finished after 0\.01 minutes"), torture.Sitting(training, 1) as sitting:
        sitting.finish()
    assert time.monotonic() - started < 10


def test_a_kill_after_the_end_is_none(tmp_path, monkeypatch):
    training = play(tmp_path, monkeypatch, START)
    with torture.Sitting(training, 1) as sitting:
        assert not sitting.wait_for(lambda: False)
        assert not sitting.kill()
        assert sitting.killed_at is None


# When to kill


def test_intervals_fit_any_number_of_updates():
    for updates in range(12, 500):
        config = torture.TortureConfig(updates=updates)
        assert config.eval_every % config.save_every
        assert config.save_every < config.eval_every < updates // 2
        moments = torture.choose_moments(config, 5, random.Random(updates))
        assert all(1 <= moment.update <= updates - 2 * config.save_every for moment in moments)
        assert [moment.update for moment in moments] == sorted(moment.update for moment in moments)
        assert {moment.name for moment in moments} == set(torture.MOMENTS)
    config = torture.TortureConfig(updates=13)
    assert (config.eval_every, config.save_every) == (3, 2)
    assert [update for update, kind in config.expected if kind == "report"] == list(range(1, 14))
    assert [update for update, kind in config.expected if kind == "evaluation"] == [3, 6, 9, 12, 13]
    assert config.expected[:5] == [(1, "report"), (2, "report"), (3, "report"), (3, "evaluation"), (4, "report")]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"kills": 0}, "kills=0 must be at least 1"),
        ({"updates": 11}, "updates=11 must be at least 12"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"timeout": 0.0}, r"timeout=0\.0 must be more than 0"),
        ({"workers": (1, 1)}, r"workers=\(1, 1\) must name at least one, and each once"),
        ({"workers": (-1,)}, r"workers=\(-1,\) must be at least 0 each"),
        ({"trainings": ()}, r"trainings=\(\) must name at least one"),
    ],
)
def test_impossible_settings_are_refused(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        torture.TortureConfig(**setting)


def test_impossible_settings_start_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        torture.main(["--kills", "0"])
    assert "kills=0 must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_of_an_earlier_torture_is_touched(tmp_path):
    assert [torture._new_folder(tmp_path / "a").name for _ in range(3)] == ["1", "2", "3"]


# Comparing


def checkpoint(path, **changes):
    state = {
        "update": 4, "seconds": 1.5, "best_psnr": 30.0, "state_dict": {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)},
        "scheduler": {"_last_lr": [1e-4]}, "config": {"exp_name": "a", "seed": 0}, "provenance": {"command": "x", "torch": "2"},
    }  # fmt: skip
    torch.save({**state, **changes}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"seconds": 9.0, "config": {"exp_name": "b", "seed": 0}, "provenance": {"command": "y", "torch": "2"}}, []),
        ({"state_dict": {"w": torch.tensor([1.0, np.nextafter(np.float32(2), 3)]), "b": torch.zeros(1)}}, ["/state_dict/w differs"]),
        ({"state_dict": {"w": torch.tensor([1.0, 2.0]), "b": -torch.zeros(1)}}, ["/state_dict/b differs"]),
        ({"state_dict": {"w": torch.tensor([1.0, 2.0]).double(), "b": torch.zeros(1)}}, ["/state_dict/w differs"]),
        ({"state_dict": {"w": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(1)}}, ["/state_dict/w differs"]),
        ({"state_dict": {"w": torch.tensor([1.0, 2.0])}}, ["/state_dict/b is missing in the killed run"]),
        ({"ema": torch.zeros(1)}, ["/ema is missing in the straight run"]),
        ({"scheduler": {"_last_lr": [5e-5]}}, ["/scheduler/_last_lr/0 differs: 5e-05, 0.0001 in the straight run"]),
        ({"update": 4.0}, ["/update differs: 4.0, 4 in the straight run"]),
        ({"provenance": {"command": "y", "torch": "3"}}, ["/provenance/torch differs: '3', '2' in the straight run"]),
    ],
)
def test_what_differs_in_checkpoints_is_named(tmp_path, changes, found):
    compared = torture.compare_checkpoints(checkpoint(tmp_path / "straight.pth"), checkpoint(tmp_path / "last.pth.tar", **changes))
    assert compared.differences == tuple(f"last.pth.tar: {each}" for each in found)
    if not changes:
        assert (compared.tensors, compared.others) == (2, 5)


EXPECTED = [(1, "report"), (2, "report"), (2, "evaluation"), (3, "report"), (3, "evaluation")]


def logged():
    lines = [{"update": update, "loss/l1": 1 / update, "seconds": update, "time/waiting": 0.1} for update in (1, 2, 3)]
    scores = [{"update": update, "event": "evaluation", "seconds": 1.0, "Set/psnr": 30.0 + update} for update in (2, 3)]
    return [{"update": 0, "event": "start"}, lines[0], lines[1], scores[0], lines[2], scores[1]]


def doctored(change):
    lines = logged()
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "found", "lost"),
    [
        (lambda lines: None, [], 0),
        (lambda lines: lines.insert(3, {"update": 2, "event": "start"}), [], 0),
        (lambda lines: lines[2].update({"seconds": 7, "time/waiting": 0.9, "memory/peak_gib": 2}), [], 0),
        (lambda lines: lines.insert(2, lines[2]), ["update 2: report 2 times in the killed run's log"], 0),
        (lambda lines: lines.insert(5, lines[3]), ["update 2: evaluation 2 times in the killed run's log"], 0),
        (lambda lines: lines.pop(2), ["update 2: report missing in the killed run's log"], 1),
        (lambda lines: lines.pop(5), ["update 3: evaluation missing in the killed run's log"], 0),
        (
            lambda lines: lines.insert(1, lines.pop(2)),
            ["update 1: report after the report of update 2 in the killed run's log"],
            0,
        ),
        (lambda lines: lines.append({"update": 4}), ["update 4: report unexpected in the killed run's log"], 0),
        (
            lambda lines: lines[2].update({"loss/l1": 0.5000000000000001}),
            ["update 2, report: loss/l1 differs: 0.5000000000000001, 0.5 in the straight run"],
            0,
        ),
        (
            lambda lines: lines[3].update({"Set/psnr": 31}),
            ["update 2, evaluation: Set/psnr differs: 31, 32.0 in the straight run"],
            0,
        ),
        (lambda lines: lines[4].pop("loss/l1"), ["update 3, report: loss/l1 is missing in the killed run"], 0),
        (lambda lines: lines[4].update(extra=1), ["update 3, report: extra is missing in the straight run"], 0),
    ],
)
def test_what_differs_in_logs_is_named(tmp_path, change, found, lost):
    for name, lines in (("straight", logged()), ("killed", doctored(change))):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = torture.compare_logs(tmp_path / "straight", tmp_path / "killed", EXPECTED)
    assert compared.differences == tuple(found)
    assert torture.count_lost(tmp_path / "killed", 3) == lost
    if not found:
        assert (compared.lines, compared.others) == (5, 3 * 2 + 2 * 3)  # without times: update, loss/l1; update, event, Set/psnr


def test_a_log_that_is_wrong_in_both_runs_is_wrong(tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in logged()[:-1]) + '{"update": 3, "eve')
    compared = torture.compare_logs(tmp_path / "straight", tmp_path / "killed", EXPECTED)
    assert "update 3: evaluation missing in the straight run's log" in compared.differences
    assert "update 0: garbled line unexpected in the killed run's log" in compared.differences


# The verdict


KILLS = (torture.Kill("loop", 7, 6, 4.5), torture.Kill("start", None, 6, 0.1))


def outcome(**changes):
    whole = {"kind": "l1", "workers": 2, "planned": 2, "kills": KILLS, "checkpoints": torture.Comparison(5, 6), "lost": 0}
    return torture.Outcome(**{**whole, "log": torture.Comparison(0, 30, 10), **changes})


def run_with(monkeypatch, tmp_path, *outcomes):
    waiting = list(outcomes)
    monkeypatch.setattr(torture, "_prepare_pictures", lambda config: None)
    monkeypatch.setattr(torture, "torture", lambda *_: waiting.pop(0))
    torture.main(["--trainings", "l1", "--kills", "4", "--updates", "12", "--output", str(tmp_path)])


def test_the_verdict_counts_what_was_compared(tmp_path, monkeypatch, capsys):
    run_with(monkeypatch, tmp_path, outcome(), outcome(planned=3))
    said = capsys.readouterr().out
    assert "| l1 | 2 | 2 of 2 | 1 / 0 / 0 / 1 | 1 | 0 | at most 4.5 | 5 + 6 | 0 | 10 (30) | 0 |" in said
    last = "4 of 5 kills survived (1 came after the end), 0 updates lost, every tensor and every logged number equal"
    assert said.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("changes", "found", "last"),
    [
        ({"checkpoints": torture.Comparison(5, 6, 0, ("last: /w differs",))}, "last: /w differs", "NOT EQUAL: 1 differences in check"),
        ({"log": torture.Comparison(0, 3, 1, ("update 2: no report",)), "lost": 1}, "update 2: no report", "1 updates lost, NOT EQUAL"),
        ({"problems": ("kill 1: a worker was still alive",)}, "kill 1: a worker", "0 in logs, 1 other problems, listed above"),
    ],
)
def test_the_verdict_fails_by_name(tmp_path, monkeypatch, capsys, changes, found, last):
    with pytest.raises(SystemExit) as ended:
        run_with(monkeypatch, tmp_path, outcome(), outcome(**changes))
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert f"- l1, 2 workers: {found}" in said
    assert last in said.splitlines()[-1]
    assert last in (tmp_path / "verdict.md").read_text()


def test_a_kill_that_costs_more_than_a_checkpoint_is_a_problem():
    kills = [torture.Kill("loop", 8, 6, 1.0), torture.Kill("save", 9, 6, 1.0), torture.Kill("start", None, 6, 1.0)]
    assert torture.find_problems(kills, 2) == ["kill 2: 3 updates done again, though saved every 2: a checkpoint was lost"]
