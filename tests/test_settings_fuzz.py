"""Settings at random: whatever is given, they are sound or refused by name, and a sound one can be written down and read again."""

import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

pytest.importorskip("hypothesis", reason="pip install -r requirements-dev.txt")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import Config, ModelName, parse
from config_improved import PRESETS, ImprovedConfig, parse_improved, preset

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def repeatable(examples):
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=SLOW)


# Values


HINTS = {kind: get_type_hints(kind) for kind in (Config, ImprovedConfig)}
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 16, 2**31, 2**62, 2**63, -(2**63), 10**30, 10**400, -(10**4000)])
FRACTIONS = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e308, -1e-9, math.nan, math.inf, -math.inf])
WORDS = st.sampled_from(
    ["", " ", "Set5", "a b", "../x", "/", ".", "nul\0", "\ud800", "caf\udce9", "Größe", "画像", "🦆", "-1", "--seed", "None", "x" * 300]
)
ANYTHING = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.integers(), FRACTIONS, st.floats(), WORDS, st.text(max_size=8), st.binary(max_size=4),
    st.lists(WORDS, max_size=2), st.dictionaries(WORDS, NUMBERS, max_size=1), st.complex_numbers(),
    st.tuples(), st.tuples(WORDS), st.tuples(WORDS, WORDS), st.tuples(FRACTIONS, FRACTIONS), st.tuples(NUMBERS, FRACTIONS, WORDS),
)  # fmt: skip


SHARES = {  # between 0 and 1
    "learning_rate", "discriminator_learning_rate", "adam_betas", "ema_decay", "initial_channel_gate", "initial_spatial_gate",
}  # fmt: skip


def right(hint, name=""):
    """Values of a type, most of them also of a size that can be meant."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return st.lists(right(kinds[0]), max_size=3, unique=True).map(tuple)
        return st.tuples(*(right(kind, name) for kind in kinds))
    if get_args(hint):
        return st.one_of(*(right(kind, name) for kind in get_args(hint)))
    if hint is float and name in SHARES:
        return st.floats(0.001, 0.999)
    if hint is int and name == "accumulation_steps":
        return st.sampled_from([1, 2, 4])
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(1, 64) | st.integers(1, 2**30),
        float: st.floats(1.001, 10) | st.floats(0, 10) | st.integers(2, 9),
        str: st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(["Set5", "auto", "a/b"]),
    }[hint]


# These contradict each other more often than not when drawn alone
FITTING_SCALE = st.sampled_from(get_args(ModelName)).map(lambda name: {"model_arch_name": name, "upscale_factor": int(name[-1])})
FITTING_MODEL = FITTING_SCALE.map(lambda fitting: {**fitting, "attention": None, "initial_spatial_gate": None, "skip_threshold": 0.0})


def some_settings(kind, wrong):
    """Values for some fields, `wrong` of them at most being anything at all."""
    hints = HINTS[kind]
    fitting = st.fixed_dictionaries({}, optional={name: right(hint, name) for name, hint in hints.items()})
    subset = st.lists(st.sampled_from(list(hints)), max_size=8, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: right(hints[name], name) for name in names})
    )
    spoilt = st.dictionaries(st.sampled_from(list(hints)), ANYTHING, max_size=wrong)
    scale = FITTING_MODEL | FITTING_SCALE | st.just({})
    return st.builds(lambda *parts: {name: value for part in parts for name, value in part.items()}, subset | fitting, scale, spoilt)


def built(make, given_values):
    """The settings, or None where they are refused by a sentence that names one of them."""
    try:
        return make(**given_values)
    except ValueError as error:
        said = str(error)
    assert any(name in said for name in given_values), said
    assert len(said) < 2000
    assert said.isascii() or said.isprintable() or "\n" in said or any(not str(value).isprintable() for value in given_values.values())
    return None


def check(config):
    """What follows from sound settings, and that plain values are enough to make them again."""
    hints = HINTS[type(config)]
    assert config.gt_patch_size == config.lr_patch_size * config.upscale_factor >= 2
    assert 1 <= config.total_updates == config.epochs * config.steps_per_epoch < 2**63
    assert isinstance(config.experiment_dir, Path)
    assert set(config.model_arguments) <= hints.keys()
    assert None not in config.model_arguments.values()
    assert config.weights_paths
    assert isinstance(config.test_dir(), Path)
    for path in config.weights_paths:
        assert isinstance(config.test_dir(path), Path)
    again = type(config)(**dataclasses.asdict(config))
    assert again == config
    assert repr(again) == repr(config)  # also -0.0, and 1 for 1.0


@repeatable(600)
@given(some_settings(Config, wrong=2))
@example({"accumulation_steps": 0})
@example({"adam_betas": (0.9, math.nan)})
@example({"epochs": 2**62, "steps_per_epoch": 2**62})
@example({"resume": ""})
def test_settings_are_sound_or_refused(values):
    config = built(Config, values)
    if config is not None:
        check(config)


@repeatable(600)
@given(some_settings(ImprovedConfig, wrong=2))
@example({"use_composite_loss": True, "l1_weight": 10**400})
@example({"use_composite_loss": True, "perceptual_layers": ()})
def test_improved_settings_are_sound_or_refused(values):
    config = built(ImprovedConfig, values)
    if config is not None:
        check(config)


@repeatable(300)
@given(st.sampled_from(list(PRESETS)), some_settings(ImprovedConfig, wrong=1))
def test_changed_presets_are_sound_or_refused(name, values):
    values.pop("preset", None)
    config = built(lambda **changes: preset(name, **changes), values)
    if config is not None:
        check(config)
        assert config.preset == name


@repeatable(200)
@given(some_settings(Config, wrong=0))
def test_settings_of_the_right_type_are_refused_for_a_reason_only(values):
    """Where nothing is of a wrong type, no sentence speaks of types."""
    with contextlib.suppress(ValueError):
        Config(**values)
        return
    with pytest.raises(ValueError, match=r"must be at|must lie|less than|contradicts|is not before|would skip|lower epochs|resume=''"):
        Config(**values)


# The command line


def words(name, value):
    """A setting as the words of an option."""
    several = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, several)]


def is_writable(value):
    """Not all values can be words: one that begins with a dash is taken for an option, and an empty tuple of str | tuple for none."""
    several = value if isinstance(value, tuple) else (value,)
    return all(not (isinstance(part, str) and part.startswith("-")) for part in several)


def parsed(parser, argv):
    """(settings, None), or (None, what was said), for any words."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parser(argv), None
        except SystemExit as end:
            assert end.code in (0, 2)
            assert end.code == 0 or said.getvalue().strip()
            return None, said.getvalue()
        except ValueError as error:
            return None, str(error)


@repeatable(60)
@given(some_settings(Config, wrong=0))
def test_settings_written_as_options_are_read_back(values):
    round_trip(Config, lambda argv: parse(Config, None, argv), values)


@repeatable(40)
@given(some_settings(ImprovedConfig, wrong=0))
def test_improved_settings_written_as_options_are_read_back(values):
    values = {**values, "mode": None}
    round_trip(ImprovedConfig, parse_improved, values)


def round_trip(kind, parser, values):
    values = {name: value for name, value in values.items() if is_writable(value)}
    try:
        config = kind(**values)
    except ValueError:
        return
    argv = [word for field in dataclasses.fields(kind) for word in words(field.name, getattr(config, field.name))]
    single = isinstance(config.model_path, tuple) and len(config.model_path) < 2  # a word is a str, and none at all is ()
    read, said = parsed(parser, argv)
    assert said is None, said
    assert dataclasses.replace(read, model_path="") == dataclasses.replace(config, model_path="")
    assert single or read.model_path == config.model_path


OPTIONS = st.sampled_from([f"--{name}" for name in HINTS[ImprovedConfig]]) | st.sampled_from(
    ["--", "-", "--help", "-h", "--no-compile", "--preset=light", "--epochs=", "--seed=1=2", "---seed", "--batch-size", "--EPOCHS"]
)
VALUES = WORDS | st.text(max_size=6) | NUMBERS.map(str) | FRACTIONS.map(str)


@st.composite
def command_lines(draw):
    """Options and values, some of them cut, doubled or swapped."""
    argv = draw(st.lists(st.tuples(OPTIONS, st.lists(VALUES, max_size=3)), max_size=4))
    argv = [word for option, given_words in argv for word in (option, *given_words)]
    for _ in range(draw(st.integers(0, 2)) if argv else 0):
        index = draw(st.integers(0, len(argv) - 1))
        word = argv[index]
        argv[index : index + 1] = draw(st.sampled_from([[], [word, word], [word[:-1]], [word + "x"], [word.upper()]]))
    return argv


@repeatable(50)
@given(command_lines())
def test_any_command_line_is_understood_or_refused(argv):
    config, said = parsed(lambda given_words: parse(Config, "train", given_words), argv)
    if config is not None:
        check(config)
    else:
        assert said is not None


@repeatable(35)
@given(command_lines())
def test_any_command_line_of_improved_training_is_understood_or_refused(argv):
    config, said = parsed(parse_improved, argv)
    if config is not None:
        check(config)
    else:
        assert said is not None


@repeatable(60)
@given(st.data())
def test_one_wrong_word_is_answered_with_the_options_name(data):
    """A value that can't be read for a field that holds numbers, or one of a few words."""
    fields = {name: hint for name, hint in HINTS[Config].items() if hint in (int, float, bool) or get_origin(hint) is Literal}
    name = data.draw(st.sampled_from(list(fields)))
    word = data.draw(st.sampled_from(["five", "1,5", "0x10", "1e", "½", "tru", "rcan", "", "画"]))
    config, said = parsed(lambda argv: parse(Config, "train", argv), [f"--{name}", word])
    assert config is None
    assert name in said
