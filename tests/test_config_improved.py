"""Settings of improved training: presets, which value wins, and what is refused before anything is read."""

import dataclasses
import importlib.util
import re
import sys
from typing import get_args

import pytest

import config_improved
from config import Config
from config_improved import PRESETS, ImprovedConfig, parse_improved, preset
from helpers import REPOSITORY

COMPOSITE = {"use_composite_loss": True, "best_metric": "newest"}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """config_improved.py as someone edits it: a line's value replaced, or one of config.py's lines repeated with another."""

    def edited(**lines):
        source = (REPOSITORY / "config_improved.py").read_text(encoding="utf-8")
        for name, value in lines.items():
            source, found = re.subn(rf"(?m)^(    {name}: .+? = )\S+", rf"\g<1>{value!r}", source, count=1)
            if not found:
                added = f"    {name}: {type(value).__name__} = {value!r}\n\n    @property\n"
                source, found = re.subn("    @property\n", lambda _, added=added: added, source, count=1)
            assert found == 1
        path = tmp_path / "edited_settings.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited_settings", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited_settings", module)
        spec.loader.exec_module(module)
        return module

    return edited


# Presets


def test_the_presets_by_name():
    assert set(PRESETS) == {"psnr", "perceptual", "light", "light_perceptual"} == set(get_args(config_improved.Preset))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("psnr", {"model_arch_name": "rcan_cbam_x4", "use_composite_loss": False, "best_metric": "psnr", "train_sets": ("DIV2K",)}),
        ("perceptual", {
            **COMPOSITE, "model_arch_name": "rcan_cbam_x4", "train_sets": ("DIV2K",), "learning_rate": 1e-5,
            "discriminator_learning_rate": 1e-4, "discriminator_channels": 64, "total_updates": 100_000}),
        ("light", {
            "model_arch_name": "rcan_light_cbam_x4", "use_composite_loss": False, "best_metric": "psnr", "train_sets": ("DemoTrain",),
            "valid_sets": ("DemoTest",), "small_images": "skip", "schedule": "cosine", "total_updates": 600}),
        ("light_perceptual", {
            **COMPOSITE, "model_arch_name": "rcan_light_cbam_x4", "train_sets": ("DemoTrain",), "valid_sets": ("DemoTest",),
            "small_images": "skip", "schedule": "cosine", "discriminator_channels": 32, "total_updates": 400}),
    ],
)  # fmt: skip
def test_what_a_preset_is_for(name, settings):
    chosen = preset(name)
    assert {setting: getattr(chosen, setting) for setting in settings} == settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_values_and_nothing_else(name):
    fields = {field.name for field in dataclasses.fields(ImprovedConfig)}
    assert PRESETS[name].keys() <= fields - {"preset"}
    expected = {**dataclasses.asdict(ImprovedConfig()), **PRESETS[name], "preset": name}
    assert dataclasses.asdict(preset(name)) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_of_a_preset_reports_before_it_ends(name):
    chosen = preset(name)
    assert max(chosen.log_every, chosen.eval_every, chosen.save_every) <= chosen.total_updates
    assert chosen.warmup_updates < chosen.total_updates / 4


def test_changes_win_over_a_preset():
    changed = preset("light", epochs=9, exp_name="mine")
    assert changed == dataclasses.replace(preset("light"), epochs=9, exp_name="mine")


def test_an_unknown_preset_is_answered_with_the_known(capsys):
    with pytest.raises(ValueError, match="preset='nonsense'"):
        preset("nonsense")
    for argv, hints in (
        (["--preset", "nonsense"], PRESETS),
        (["--preset", "light", "--epoch", "3"], ["--epochs"]),
        (["--preset"], ["preset"]),
    ):
        with pytest.raises(SystemExit) as end:
            parse_improved(argv)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert all(hint in said for hint in hints)


# Which value wins


def test_the_command_line_wins_over_the_preset_over_the_class_over_config(edit):
    parse_edited = edit(seed=9, batch_size=5, epochs=7, discriminator_channels=48).parse_improved
    chosen = parse_edited(["--preset", "light", "--epochs", "3"])
    assert PRESETS["light"].keys() & {"seed", "batch_size", "epochs", "discriminator_channels"} == {"batch_size", "epochs"}
    assert (chosen.epochs, chosen.batch_size, chosen.seed, chosen.discriminator_channels, chosen.num_workers) == (
        3,  # the command line's
        PRESETS["light"]["batch_size"],
        9,  # the class's
        48,  # the class's
        Config.num_workers,
    )
    assert (parse_edited([]).epochs, parse_edited([]).batch_size) == (7, 5)


def test_the_preset_in_the_file_is_taken_unless_another_is_given(edit):
    edited = edit(preset="light_perceptual")
    assert dataclasses.asdict(edited.parse_improved([])) == dataclasses.asdict(preset("light_perceptual"))
    assert dataclasses.asdict(edited.parse_improved(["--preset", "light"])) == dataclasses.asdict(preset("light"))


@pytest.mark.parametrize("argv", [
    ["--preset", "light", "--epochs", "1000", "--train_sets", "A", "B"],
    ["--epochs", "1000", "--train_sets", "A", "B", "--preset", "light"],
    ["--epochs=1000", "--preset=light", "--train_sets", "A", "B"],
])  # fmt: skip
def test_the_command_line_wins_wherever_it_stands_and_with_the_usual_value_too(argv):
    assert Config.epochs == 1000 != PRESETS["light"]["epochs"]
    assert parse_improved(argv) == preset("light", epochs=1000, train_sets=("A", "B"))


def test_without_a_command_line_it_is_the_preset_of_the_file():
    assert parse_improved([]) == preset(ImprovedConfig.preset) == preset("psnr")


def test_values_may_look_like_presets():
    assert parse_improved(["--exp_name", "light", "--preset", "perceptual"]).exp_name == "light"
    assert parse_improved(["--exp_name", "light"]) == preset("psnr", exp_name="light")


def test_tuples_and_choices_of_the_composite_loss_on_the_command_line():
    chosen = parse_improved(["--preset", "perceptual", "--perceptual_layers", "conv3_4", "relu5_4", "--adversarial_loss", "vanilla"])
    assert chosen == preset("perceptual", perceptual_layers=("conv3_4", "relu5_4"), adversarial_loss="vanilla")


def test_another_scale_is_two_words_on_the_command_line():
    chosen = parse_improved(["--preset", "light", "--model_arch_name", "rcan_light_cbam_x2", "--upscale_factor", "2"])
    assert (chosen.upscale_factor, chosen.gt_patch_size) == (2, 2 * PRESETS["light"]["lr_patch_size"])


def test_the_command_line_may_resolve_what_file_and_preset_contradict(edit):
    edited = edit(model_arch_name="rcan_cbam_x2", upscale_factor=2)
    assert edited.parse_improved(["--preset", "light", "--model_arch_name", "rcan_light_cbam_x2"]).upscale_factor == 2


def test_the_help_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit) as end:
        parse_improved(["--preset", "light", "--help"])
    assert end.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert f"(default: {PRESETS['light']['steps_per_epoch']})" in shown
    assert all(f"--{name} " in shown for name in (*dataclasses.asdict(ImprovedConfig()),) if name not in Config.TESTING_ALONE)


# What follows


def test_the_runs_folder_names_the_model_the_preset_and_what_differs():
    assert preset("light", channels=32).experiment_dir.as_posix() == "results/rcan_light_cbam_x4_light_c32"
    assert preset("light").experiment_dir.as_posix() == "results/rcan_light_cbam_x4_light"
    assert ImprovedConfig().experiment_dir.as_posix() == "results/rcan_cbam_x4_psnr"
    assert preset("perceptual", results_dir="runs").experiment_dir.as_posix() == "runs/rcan_cbam_x4_perceptual"
    assert preset("light", exp_name="mine").experiment_dir.as_posix() == "results/mine"
    assert len({preset(name).experiment_dir for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_any_gt_patch_at_any_scale(name):
    family = preset(name).model_arch_name.rsplit("_x", 1)[0]
    for gt, scale in ((96, 2), (144, 3), (128, 4), (192, 8)):
        chosen = preset(name, model_arch_name=f"{family}_x{scale}", upscale_factor=scale, lr_patch_size=gt // scale)
        assert chosen.gt_patch_size == gt


def test_improved_settings_restate_only_what_differs():
    plain, improved = Config(), ImprovedConfig()
    changed = {name for name in dataclasses.asdict(plain) if getattr(plain, name) != getattr(improved, name)}
    assert changed == {"model_arch_name", "attention", "initial_spatial_gate"}


# What is refused


def composite(**changes):
    return ImprovedConfig(**{"use_composite_loss": True, **changes})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lr_patch_size": 3, "adversarial_weight": 0.0}, ["lr_patch_size=3", "perceptual_weight=0.006", "16", "at least 4"]),
        ({"lr_patch_size": 7, "perceptual_weight": 0.0}, ["lr_patch_size=7", "adversarial_weight=0.001", "32", "at least 8"]),
        ({"lr_patch_size": 15, "batch_size": 1}, ["batch_size=1", "adversarial_weight=0.001", "60"]),
        ({"l1_weight": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 0.0}, ["l1_weight", "perceptual_weight", "adversarial_weight"]),
        ({"perceptual_layers": ()}, ["perceptual_weight=0.006", "perceptual_layers=()"]),
        ({"perceptual_layers": ("conv5_4", "conv5_4")}, ["perceptual_layers="]),
        ({"upscale_factor": 2}, ["rcan_cbam_x4", "upscale_factor=2", "rcan_cbam_x2"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(changes, names):
    with pytest.raises(ValueError, match=re.escape(names[0])) as error:
        composite(**changes)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "argv",
    [
        ["--perceptual_layers", "conv3_4"],  # the preset psnr trains with L1
        ["--preset", "perceptual", "--perceptual_weight", "0", "--vgg19_weights_path", "x.pth"],
        ["--preset", "perceptual", "--adversarial_weight", "0", "--discriminator_channels", "8"],
    ],
)
def test_an_option_without_effect_is_refused(argv):
    with pytest.raises(ValueError, match=argv[-2]):
        parse_improved(argv)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(("weights", "least"), [({"adversarial_weight": 0.0}, 16), ({"perceptual_weight": 0.0}, 32), ({}, 32)])
def test_the_named_remedy_is_the_smallest_patch_that_fits(scale, weights, least):
    settings = {"model_arch_name": f"rcan_cbam_x{scale}", "upscale_factor": scale, **weights}
    refused, offers = 0, set()
    for lr_patch_size in range(1, least + 1):
        try:
            fits = composite(**settings, lr_patch_size=lr_patch_size)
        except ValueError as error:
            refused += 1
            offers.add(int(re.search(r"at least (\d+)$", str(error))[1]))
        else:
            assert fits.gt_patch_size >= least
    smallest = next(size for size in range(1, least + 1) if size * scale >= least)
    assert refused == smallest - 1
    assert max(offers) == smallest


def test_a_single_patch_fits_from_64_pixels_on():
    assert composite(lr_patch_size=16, batch_size=1).gt_patch_size == 64
    assert composite(lr_patch_size=8, batch_size=2).gt_patch_size == 32
    assert composite(lr_patch_size=8, batch_size=1, adversarial_weight=0.0).gt_patch_size == 32


def test_the_limits_are_the_discriminators():
    import model  # only here: settings need no torch

    least = model.Discriminator.MIN_SIZE // 4
    assert composite(lr_patch_size=least).gt_patch_size == model.Discriminator.MIN_SIZE
    with pytest.raises(ValueError, match=f"{model.Discriminator.MIN_SIZE}"):
        composite(lr_patch_size=least - 1)
    with pytest.raises(ValueError, match="batch_size=1"):
        composite(lr_patch_size=2 * least - 1, batch_size=1)


def test_terms_that_are_not_used_are_not_held_to_anything():
    impossible = {"lr_patch_size": 1, "batch_size": 1, "perceptual_layers": ()}
    assert ImprovedConfig(**impossible, l1_weight=0.0, perceptual_weight=0.0, adversarial_weight=0.0).gt_patch_size == 4
    assert ImprovedConfig(**impossible).use_composite_loss is False
    assert composite(**impossible, perceptual_weight=0.0, adversarial_weight=0.0).gt_patch_size == 4
    for only in ("l1_weight", "perceptual_weight", "adversarial_weight"):
        weights = {name: float(name == only) for name in ("l1_weight", "perceptual_weight", "adversarial_weight")}
        assert getattr(composite(**weights), only) == 1


# What the documents say


def test_the_documented_way_back_to_the_published_networks():
    published = ["--attention", "cbam", "--initial_spatial_gate", "None", "--initial_channel_gate", "None"]
    assert f"`{' '.join(published)}`" in (REPOSITORY / "IMPROVED_USAGE.md").read_text(encoding="utf-8").replace("\n", " ")
    for name in ("psnr", "light"):
        arguments = parse_improved(["--preset", name, *published]).model_arguments
        assert arguments == {"attention": "cbam"}
    plain = ["--model_arch_name", "rcan_x4", "--attention", "None", "--initial_spatial_gate", "None"]
    assert parse_improved(["--preset", "psnr", *plain]).model_arguments == {}
