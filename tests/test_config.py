"""Settings: types and ranges by kind, contradictions, and that the file, the command line and the help are one."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from config import Config, parse
from config_improved import ImprovedConfig, parse_improved
from helpers import REPOSITORY, write_set

HINTS = get_type_hints(ImprovedConfig)
FIELDS = [field.name for field in dataclasses.fields(ImprovedConfig)]


def kind_of(hint):
    """The kind of a type, for the tables below."""
    return "choice" if any(get_origin(part) is Literal for part in (hint, *get_args(hint))) else hint


# The laws of ranges and types, for every setting


RANGES = {  # values within, and beyond
    "at least 1": ([1, 2, 1000], [0, -1]),
    "at least 0": ([0, 1, 1000], [-1]),
    "more than 0 and less than 1": ([1e-9, 0.5, 0.999], [0.0, 1.0, -0.1]),
    "at least 0 and less than 1": ([0.0, 0.5, 0.999], [1.0, -0.1]),
    "0 to 1": ([0.0, 0.5, 1.0], [1.1, -0.1]),
    "0 or more than 1": ([0.0, 1.1, 10.0], [1.0, 0.5, -1.0]),
}
FREE = {"start_epoch": [0], "accumulation_steps": [1], "initial_spatial_gate": [0.9], "lr_patch_size": [8], "reduction": [1]}


def given(name, value):
    return {name: (value, 0.5) if name == "adam_betas" else value}


@pytest.mark.parametrize("name", ImprovedConfig.RANGES)
def test_every_number_keeps_to_its_range(name):
    within, beyond = RANGES[ImprovedConfig.RANGES[name]]
    is_float = "float" in str(HINTS[name])
    for value in FREE.get(name, within):
        assert ImprovedConfig(**given(name, value))
    for value in [*beyond, *([math.nan, math.inf, -math.inf] if is_float else [2**63, 10**400, -(10**5000)])]:
        with pytest.raises(ValueError, match=f"^{name}="):
            ImprovedConfig(**given(name, float(value) if is_float and value != 2**63 else value))


def test_every_number_has_a_range():
    numbers = {name for name in FIELDS if kind_of(HINTS[name]) in (int, float, int | None, float | None, tuple[float, float])}
    assert numbers == ImprovedConfig.RANGES.keys() > Config.RANGES.keys()
    assert set(ImprovedConfig.RANGES.values()) == RANGES.keys()


WRONG = {  # in the edited file, and on the command line
    int: (["5", 5.0, True, None, (5,)], ["five"]),
    float: (["0.5", True, None, (0.5,), 1j], ["half"]),
    bool: ([1, "True", None], ["perhaps"]),
    str: ([5, None, ("a",), b"a", Path("a")], []),
    int | None: (["5", 5.0, False, (5,)], ["five"]),
    float | None: (["0.5", True, (0.5,)], ["half"]),
    tuple[str, ...]: (["Set5", ["Set5"], None, (5,), ("Set5", None)], []),
    tuple[float, float]: ([0.9, (0.9,), (0.9, 0.99, 0.999), [0.9, 0.999], ("0.9", "0.999"), None], ["0.9", "half"]),
    str | tuple[str, ...]: ([5, None, ["w.pth"], (5,), b"w.pth"], []),
    "choice": ([0, -1, 5.5, "nonsense", "", ("cbam",), True], ["nonsense"]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_in_the_file_is_refused_with_the_files_name(name):
    own = name in vars(ImprovedConfig)["__annotations__"]
    for value in WRONG[kind_of(HINTS[name])][0]:
        with pytest.raises(ValueError, match=rf"^{name}=.*{'config_improved' if own else 'config'}\.py"):
            ImprovedConfig(**{name: value})


@pytest.mark.parametrize("kind", [kind for kind, (_, words) in WRONG.items() if words], ids=str)
def test_a_word_that_is_no_value_is_refused_with_the_option(kind, capsys):
    name = next(name for name in FIELDS if kind_of(HINTS[name]) == kind and name not in ImprovedConfig.TESTING_ALONE)
    with pytest.raises(SystemExit) as end:
        parse_improved([f"--{name}", *WRONG[kind][1]])
    assert end.value.code == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "caf\udce9"], ids=["null", "surrogate", "latin-1"])
def test_what_can_be_no_name_is_refused(text):
    for name in FIELDS:
        values = {str: [text], tuple[str, ...]: [("a", text)], str | tuple[str, ...]: [text, ("a", text)]}.get(kind_of(HINTS[name]), [])
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}="):
                ImprovedConfig(**{name: value})


def test_whole_numbers_do_for_floats():
    assert Config(clip_grad_norm=1).clip_grad_norm == 1


@pytest.mark.parametrize(
    ("line", "value"), [("batch_size", "16"), ("learning_rate", "1e-4"), ("upscale_factor", 5), ("train_sets", "Set5")]
)
def test_a_slip_in_the_edited_file_is_refused(line, value):
    edited = dataclasses.make_dataclass("Edited", [(line, HINTS[line], value)], bases=(Config,), frozen=True, kw_only=True)
    with pytest.raises(ValueError, match=f"^{line}="):
        parse(edited, "train", [])


# Contradictions


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"upscale_factor": 2}, ["rcan_x4", "rcan_x2", "upscale_factor=4"]),
        ({"start_epoch": 1000}, ["start_epoch=1000", "epochs=1000"]),
        ({"start_epoch": 2, "resume": "never"}, ["start_epoch=2", "resume='never'"]),
        ({"resume": ""}, ["resume=''", "auto"]),
        ({"valid_sets": ("Set5", "Set5")}, ["valid_sets"]),
        ({"batch_size": 6, "accumulation_steps": 4}, ["accumulation_steps=4", "batch_size=6"]),
        ({"epochs": 2**62, "steps_per_epoch": 2}, ["epochs", "steps_per_epoch=2"]),
        ({"attention": "cbam"}, ["attention='cbam'", "rcan_x4", "attention=None"]),
        ({"attention": "channel", "model_arch_name": "rcan_cbam_x4"}, ["attention='channel'", "attention='cbam'"]),
        ({"initial_spatial_gate": 0.9}, ["initial_spatial_gate=0.9", "rcan_x4"]),
    ],
)
def test_contradicting_settings_are_refused_by_name(settings, names):
    with pytest.raises(ValueError, match=re.escape(names[0])) as error:
        Config(**settings)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


# The command line


def test_a_line_is_an_option():
    config = parse(Config, "train", ["--batch_size", "8", "--valid_sets", "Set5", "Set14", "--compile", "True", "--channels=32"])
    assert (config.batch_size, config.valid_sets, config.compile, config.channels) == (8, ("Set5", "Set14"), True, 32)
    assert parse(Config, "train", []) == parse(Config, "test", []) == parse(Config, None, []) == Config()


def test_every_setting_is_read_back_from_the_command_line():
    fitting = {
        "model_arch_name": "rcan_light_cbam_x8", "attention": "cbam", "mode": "train", "epochs": 8, "skip_threshold": 2.5,
        "adam_betas": (0.25, 0.5), "use_composite_loss": True, "schedule": "step",
    }  # fmt: skip
    samples = {int: 7, float: 0.25, str: "a b", int | None: 7, float | None: 0.25, tuple[str, ...]: ("one", "Größe")}
    samples[str | tuple[str, ...]] = ("a.pth", "b.pth")
    values = {}
    for name in FIELDS:
        choices = get_args(HINTS[name])[-1:] if get_origin(HINTS[name]) is Literal else [not getattr(ImprovedConfig, name)]
        values[name] = fitting.get(name, samples.get(HINTS[name], choices[0]))
    words = [(f"--{name}", *map(str, value if isinstance(value, tuple) else [value])) for name, value in values.items()]
    expected = ImprovedConfig(**values)
    assert [name for name in FIELDS if getattr(expected, name) == getattr(ImprovedConfig, name)] == ["schedule"]
    assert parse(ImprovedConfig, None, [word for option in words for word in option]) == expected
    assert parse(Config, "train", ["--batch-size", "8"]).batch_size == 8


@pytest.mark.parametrize("mode", ["train", "test"])
def test_the_help_has_every_setting_that_the_script_uses_with_its_comment(mode, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, mode, ["--help"])
    assert end.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    lines = re.findall(r"^    (\w+): .+?  # (.+)$", (REPOSITORY / "config.py").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [(name, comment) for name, comment in lines if name in {field.name for field in dataclasses.fields(Config)}]
    assert [name for name, _ in lines] == [field.name for field in dataclasses.fields(Config)]
    unused = Config.NOT_IN_TRAINING if mode == "train" else {name for name, _ in lines} - Config.TESTING
    for name, comment in lines:
        assert (f"--{name} " in shown) == (name not in unused), name
        assert name in unused or comment in shown, name
    if mode == "train":  # in groups, in this order
        groups = ("The network", "The run", "Data", "Optimizer", "Device", "Reports")
        places = [re.search(rf"{group} options", shown).start() for group in groups]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("mode", "argv", "names"),
    [
        ("train", ["--model_path", "x.pth"], ["model_path", "pretrained_model_path", "test.py"]),
        ("train", ["--perceptual_weight", "1"], ["perceptual_weight", "train_improved.py"]),
        ("train", ["--preset=light"], ["preset", "train_improved.py"]),
        ("train", ["--schedule", "cosine", "--halve_every", "5"], ["halve_every", "schedule"]),
        ("test", ["--epochs", "3"], ["epochs", "train.py"]),
        ("test", ["--pretrained_model_path", "x.pth"], ["pretrained_model_path", "model_path"]),
        ("test", ["--input", "x.png"], ["input", "inference.py"]),
        ("test", ["--model_path", "x.pth", "--upscale_factor", "2", "--model_arch_name", "rcan_x2"], ["model_arch_name", "model_path"]),
        ("train", ["--mode", "test"], ["mode='test'", "train"]),
        ("test", ["--mode", "train"], ["mode='train'", "test"]),
    ],
)
def test_an_option_without_effect_is_refused_and_what_was_meant_is_named(mode, argv, names):
    with pytest.raises(ValueError, match=names[0]) as error:
        parse(Config, mode, argv)
    assert all(name in str(error.value) for name in names)


def test_the_scripts_read_no_setting_that_their_command_line_refuses():
    def read_by(*scripts):
        text = "".join((REPOSITORY / script).read_text(encoding="utf-8") for script in scripts)
        return set(re.findall(r"config\.(\w+)", text)) & set(FIELDS)

    assert {"data_root", "degradation", "self_ensemble", "save_images", "test_sets", "model_path"} <= read_by("test.py") <= Config.TESTING
    assert not read_by("train.py", "checkpoints.py") & Config.NOT_IN_TRAINING
    assert not read_by("train.py", "checkpoints.py", "train_improved.py") & ImprovedConfig.NOT_IN_TRAINING


def test_what_decides_the_weights_may_not_change_at_resume():
    """A new setting needs a decision."""
    fixed = {
        "model_arch_name", "upscale_factor", "channels", "reduction", "num_rg", "num_rcab", "attention", "initial_channel_gate",
        "initial_spatial_gate", "seed", "epochs", "steps_per_epoch", "pretrained_model_path", "train_sets", "degradation",
        "lr_patch_size", "small_images", "batch_size", "optimizer", "learning_rate", "adam_betas", "schedule", "halve_every",
        "warmup_updates", "clip_grad_norm", "pointwise_upsampler", "luma_share", "ema_decay", "precision", "best_metric",
        "use_composite_loss", "l1_weight", "perceptual_weight", "adversarial_weight",
    }  # fmt: skip
    improved = {"preset", "perceptual_layers", "adversarial_loss", "discriminator_channels", "discriminator_learning_rate"}
    assert {field.name for field in dataclasses.fields(Config)} - Config.FREE_AT_RESUME == fixed
    assert set(FIELDS) - ImprovedConfig.FREE_AT_RESUME == fixed | improved
    assert {"data_root", "cache_dir", "num_workers"} == Config.OF_ONE_MACHINE == ImprovedConfig.OF_ONE_MACHINE - {"vgg19_weights_path"}
    assert "vgg19_weights_path" in ImprovedConfig.OF_ONE_MACHINE


def test_edited_lines_that_another_script_uses_are_fine():
    assert parse(Config, "train", [], {"model_path": "x.pth"}).model_path == "x.pth"
    assert parse(Config, "test", ["--mode", "valid"], {"epochs": 3}).epochs == 3
    assert parse(Config, None, ["--model_path", "x.pth", "--epochs", "3"]).epochs == 3  # a script for both


@pytest.mark.parametrize(
    ("argv", "hint"),
    [(["--batchsize", "8"], "--batch_size"), (["--lr", "1"], "--learning_rate"), (["--model_arch_name", "rcan_x5"], "rcan_x4")],
)
def test_a_slip_is_answered_with_what_is_known(argv, hint, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, "train", argv)
    assert end.value.code == 2
    assert hint in capsys.readouterr().err


def test_importing_the_settings_is_cheap_and_reads_no_arguments():
    probe = "import sys; sys.argv = ['x', '--y']; import config_improved; print({'torch', 'numpy', 'tyro'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", probe], cwd=REPOSITORY, text=True).strip() == "set()"


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 0


def test_an_image_whose_name_is_not_utf_8_is_refused(tmp_path):
    """Python reads such a byte, as old archives have it, as half a character, which no report can hold."""
    import dataset

    write_set(tmp_path / "Set", [(40, 44)])
    try:
        (tmp_path / "Set" / "GT" / "a.png").rename(tmp_path / "Set" / "GT" / "caf\udce9.png")
    except (OSError, UnicodeError):
        pytest.skip("names are UTF-8 on this disk")
    with pytest.raises(ValueError, match=r"caf\\udce9\.png"):
        dataset.find_pairs(tmp_path / "Set", 2)


# What follows from the settings


def test_what_follows_is_computed():
    config = Config(model_arch_name="rcan_x3", upscale_factor=3, lr_patch_size=32, epochs=2, steps_per_epoch=7, exp_name="a", channels=32)
    assert (config.gt_patch_size, config.total_updates, config.model_arguments) == (96, 14, {"channels": 32})
    assert config.experiment_dir.as_posix() == "results/a"
    assert Config().experiment_dir.as_posix() == "results/rcan_x4"


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"model_arch_name": "rcan_light_x4", "channels": 100}, "rcan_light_x4_c100"),
        ({"num_rg": 2, "num_rcab": 3, "reduction": 8, "initial_channel_gate": 0.9}, "rcan_x4_r8_g2_b3"),  # gates change no shape
        ({"degradation": "BD", "channels": 100, "exp_name": "mine"}, "mine"),
        ({"degradation": "BD"}, "rcan_x4_BD"),
    ],
)
def test_a_runs_folder_says_what_differs_from_the_named_network(settings, folder):
    assert Config(**settings).experiment_dir.as_posix() == f"results/{folder}"


def test_a_list_that_is_given_twice_is_refused_as_the_first_would_be_dropped():
    with pytest.raises(ValueError, match="train_sets"):
        parse(Config, "train", ["--train_sets", "A", "--train_sets", "B"])
    assert parse(Config, "train", ["--epochs", "2", "--epochs", "3"]).epochs == 3  # as after a wrapper's own options


def test_a_home_folder_that_only_shells_know_is_refused():
    with pytest.raises(ValueError, match="data_root"):
        parse(Config, "train", ["--data_root=~/data"])


def test_what_the_model_is_told():
    config = Config(model_arch_name="rcan_cbam_x4", attention="cbam_average", initial_channel_gate=0.9, initial_spatial_gate=0.8)
    assert config.model_arguments == {"attention": "cbam_average", "initial_channel_gate": 0.9, "initial_spatial_gate": 0.8}
