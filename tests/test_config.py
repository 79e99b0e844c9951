"""Settings: what is refused, before anything is read, and that the file and the command line are one."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from config import Config, parse, released_weights, weights_name
from config_improved import ImprovedConfig
from helpers import REPOSITORY


def test_a_line_is_an_option():
    config = parse(Config, "train", ["--batch_size", "8", "--test_sets", "Set5", "Set14", "--self_ensemble", "True", "--channels", "32"])
    assert (config.batch_size, config.test_sets, config.self_ensemble, config.channels) == (8, ("Set5", "Set14"), True, 32)
    assert parse(Config, "train", []) == Config()


def test_every_setting_has_its_comment_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Config, "train", ["--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", (REPOSITORY / "config.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in lines] == [field.name for field in dataclasses.fields(Config)]
    for name, comment in lines:
        assert f"--{name} " in shown
        assert comment.split("; ")[0] in shown


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--batchsize", "8"], "batch_size"),
        (["--model_arch_name", "rcan_x5"], "rcan_x4"),
        (["--batch_size", "many"], "batch_size"),
        (["--precision", "fp8"], "bf16"),
        (["--adam_betas", "0.9"], "adam_betas"),
        (["--self_ensemble", "perhaps"], "True"),
    ],
)
def test_a_slip_is_answered_with_what_is_known(argv, hint, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(Config, "train", argv)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"upscale_factor": 2}, "='rcan_x4' contradicts upscale_factor=2: set model_arch_name='rcan_x2' or upscale_factor=4"),
        ({"batch_size": "16"}, "batch_size='16' must be int"),
        ({"batch_size": 16.0}, "batch_size=16.0 must be int"),
        ({"epochs": True}, "epochs=True must be int"),
        ({"train_sets": ("T91")}, r"train_sets='T91' must be tuple\[str, ...\]"),
        ({"train_sets": ["T91"]}, "train_sets="),
        ({"precision": "half"}, r"precision='half' must be Literal\['auto', 'fp32', 'bf16', 'fp16'\]"),
        ({"model_arch_name": "rcan"}, "model_arch_name='rcan' must be"),
        ({"channels": 1.5}, "channels=1.5 must be int | None"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm=nan"),
        ({"learning_rate": 2.0}, "learning_rate=2.0 must lie between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas="),
        ({"start_epoch": 2000}, "start_epoch=2000 is not before the end, epochs=1000"),
        ({"start_epoch": 2, "resume": "never"}, "start_epoch=2 contradicts resume='never'"),
        ({"valid_sets": ("Set5", "Set5")}, "names a set twice"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize(("line", "value"), [("batch_size", "16"), ("learning_rate", "1e-4"), ("upscale_factor", 5), ("test_sets", "Set5")])
def test_a_slip_in_the_edited_file_is_refused(line, value, capsys):
    hint = get_type_hints(Config)[line]
    edited = dataclasses.make_dataclass("Edited", [(line, hint, value)], bases=(Config,), frozen=True, kw_only=True)
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(edited, "train", [])
    assert line in f"{error.value} {capsys.readouterr().err}"


def test_whole_numbers_do_for_floats():
    assert Config(clip_grad_norm=1).clip_grad_norm == 1


@pytest.mark.parametrize(("mode", "script", "fits"), [("train", "train", True), ("valid", "test", True), ("test", "train", False)])
def test_a_mode_that_contradicts_the_script_is_refused(mode, script, fits):
    if fits:
        assert parse(Config, script, ["--mode", mode]).mode == mode
    else:
        with pytest.raises(ValueError, match="mode='test' contradicts this script, which can only train"):
            parse(Config, script, ["--mode", mode])


def test_what_follows_is_computed():
    config = Config(model_arch_name="rcan_x3", upscale_factor=3, lr_patch_size=32, epochs=2, steps_per_epoch=7, exp_name="a", channels=32)
    assert (config.gt_patch_size, config.total_updates, config.model_arguments) == (96, 14, {"channels": 32})
    assert config.experiment_dir.as_posix() == "results/a"
    assert Config().experiment_dir.as_posix() == "results/rcan_x4"


def test_the_weights_to_test_are_given_or_the_best_or_the_released(tmp_path):
    assert Config(results_dir=str(tmp_path)).weights_paths == (released_weights(4),)
    (tmp_path / "rcan_x4").mkdir()
    (tmp_path / "rcan_x4" / "last.pth.tar").touch()
    assert Config(results_dir=str(tmp_path)).weights_paths == (tmp_path / "rcan_x4" / "last.pth.tar",)
    (tmp_path / "rcan_x4" / "best.pth.tar").touch()
    assert Config(results_dir=str(tmp_path)).weights_paths == (tmp_path / "rcan_x4" / "best.pth.tar",)
    assert Config(results_dir=str(tmp_path), model_path="w.pth").weights_paths == (Path("w.pth"),)
    assert Config(results_dir=str(tmp_path), model_path=("a.pth", "b.pth")).weights_paths == (Path("a.pth"), Path("b.pth"))
    assert parse(Config, "test", ["--model_path", "a.pth", "b.pth"]).model_path == ("a.pth", "b.pth")
    assert parse(Config, "test", ["--model_path", "a.pth"]).model_path == "a.pth"


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "rcan_light_x4/test"),
        ({"model_path": "results/mine/best.pth.tar"}, "mine/test"),
        ({"model_path": "downloads/RCAN_x4-DIV2K.pth.tar"}, "RCAN_x4-DIV2K/test"),
        ({"model_path": "results/mine/best.pth.tar", "exp_name": "again"}, "again/test"),
        ({"degradation": "BD"}, "rcan_light_x4/test_BD"),
        ({"self_ensemble": True}, "rcan_light_x4/test_plus"),
        ({"degradation": "DN", "self_ensemble": True}, "rcan_light_x4/test_DN_plus"),
        ({"model_path": ("a.pth", "b.pth")}, "table/test"),
        ({"model_path": ("a.pth", "b.pth"), "exp_name": "all"}, "all/test"),
    ],
)
def test_scores_are_filed_under_the_weights_name_and_the_protocol(tmp_path, settings, folder):
    assert Config(results_dir=str(tmp_path), **settings).test_dir() == tmp_path / folder


def test_a_file_that_shares_a_runs_name_is_not_filed_there(tmp_path):
    (tmp_path / "rcan_x4").mkdir()
    (tmp_path / "rcan_x4" / "last.pth.tar").touch()
    settings = {"results_dir": str(tmp_path)}
    assert Config(**settings, model_path="pretrained/rcan_x4.pt").test_dir() == tmp_path / "rcan_x4_file" / "test"
    assert Config(**settings).test_dir() == tmp_path / "rcan_x4" / "test"
    several = Config(**settings, model_path=("pretrained/rcan_x4.pt", "pretrained/rcan_x2.pt"))
    assert several.test_dir(Path("pretrained/rcan_x4.pt")) == tmp_path / "rcan_x4_file" / "test"
    assert several.test_dir(Path("pretrained/rcan_x2.pt")) == tmp_path / "rcan_x2" / "test"


def test_weights_always_have_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert [weights_name(Path(name)) for name in ("best.pth.tar", "../x/last.pth.tar", ".hidden.pth", "a.b.pth")] == [
        "mine",
        "x",
        "hidden",
        "a",
    ]


def test_several_weights_have_a_folder_each(tmp_path):
    both = {"results_dir": str(tmp_path), "model_path": ("x/a.pth", "run/best.pth.tar")}
    assert Config(**both).test_dir(Path("run/best.pth.tar")) == tmp_path / "run" / "test"
    assert Config(**both, exp_name="all").test_dir(Path("x/a.pth")) == tmp_path / "all" / "test" / "a"


def test_improved_settings_restate_only_what_differs():
    plain, improved = Config(), ImprovedConfig()
    assert {name for name in dataclasses.asdict(plain) if getattr(plain, name) != getattr(improved, name)} == {
        "model_arch_name",
        "attention",
        "initial_spatial_gate",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": "cbam"},
            "attention='cbam' contradicts model_arch_name='rcan_x4': set attention=None and initial_spatial_gate=None, or",
        ),
        ({"attention": "channel", "model_arch_name": "rcan_cbam_x4"}, "set attention='cbam', or a model without cbam in its name"),
        ({"initial_spatial_gate": 0.9}, "initial_spatial_gate=0.9 contradicts model_arch_name='rcan_x4', which has no such gate"),
        ({"initial_channel_gate": 1.0}, "initial_channel_gate=1.0 must lie between 0 and 1"),
        ({"initial_spatial_gate": 0.0, "model_arch_name": "rcan_cbam_x4"}, "initial_spatial_gate=0.0 must lie between 0 and 1"),
    ],
)
def test_a_model_and_its_attention_agree(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        Config(**settings)


def test_what_the_model_is_told():
    config = Config(model_arch_name="rcan_cbam_x4", attention="cbam_average", initial_channel_gate=0.9, initial_spatial_gate=0.8)
    assert config.model_arguments == {"attention": "cbam_average", "initial_channel_gate": 0.9, "initial_spatial_gate": 0.8}
