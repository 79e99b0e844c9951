"""The checks for a GPU, tried on the CPU: they run, and they fail where they should."""

import pytest

from scripts import gpu_check


@pytest.mark.slow
def test_checks_run_one_by_one_and_are_reported(tmp_path, capsys):
    gpu_check.main(["--device", "cpu", "--only", "device", "skipping", "--output", str(tmp_path / "o" / "report.md")])
    report = (tmp_path / "o" / "report.md").read_text()
    assert report.count(": passed") == 2


@pytest.mark.slow
def test_a_failure_is_named_and_the_next_check_still_runs(tmp_path, monkeypatch):
    """Profiling needs a GPU, which only the child process knows here; the tests take longer than they may."""
    monkeypatch.setitem(gpu_check.CHECKS, "profile", gpu_check.CHECKS["profile"]._replace(needs_gpu=False))
    monkeypatch.setitem(gpu_check.CHECKS, "tests", gpu_check.CHECKS["tests"]._replace(seconds=5.5))
    with pytest.raises(ValueError, match=r"2 of 3.*profile, tests"):
        gpu_check.main(["--device", "cpu", "--only", "profile", "tests", "device", "--output", str(tmp_path / "report.md")])
    report = (tmp_path / "report.md").read_text()
    assert "profile | failed with" in report and "tests | stopped after" in report and "device | passed" in report


@pytest.mark.slow
def test_what_was_not_reached_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SECONDS", 4)
    gpu_check.main(["--device", "cpu", "--only", "device", "--output", str(tmp_path / "report.md")])
    assert "device | not reached" in (tmp_path / "report.md").read_text() and "--only device" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_that_differs_is_noticed(monkeypatch):
    import torch

    monkeypatch.setattr(gpu_check, "_use_graph", lambda step, device: step.optimizer.param_groups[0].update(lr=2e-3))
    with pytest.raises(AssertionError):
        gpu_check.graph(torch.device("cpu"))


@pytest.mark.parametrize("arguments", [["--only", "nothing"], [], ["--device", "cpu", "--only", "profile"]])
def test_what_cannot_be_checked_is_said(arguments, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"nothing|GPU"):
        gpu_check.main(arguments)
