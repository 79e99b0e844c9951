"""The settings that a person edits, their ranges, and what follows from them.

Edit a value on its line, or give it on the command line, where each line is an option of the same name:

    python train.py --model_arch_name rcan_x2 --upscale_factor 2 --batch_size 8
    python train.py --help

The comment on a line is its help; a comment above lines is the heading of their group.
"""

import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from math import inf
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

BEST, LAST = "best.pth.tar", "last.pth.tar"  # the checkpoints of a run

ModelName = Literal[
    "rcan_x2", "rcan_x3", "rcan_x4", "rcan_x8",
    "rcan_cbam_x2", "rcan_cbam_x3", "rcan_cbam_x4", "rcan_cbam_x8",
    "rcan_light_x2", "rcan_light_x3", "rcan_light_x4", "rcan_light_x8",
    "rcan_light_cbam_x2", "rcan_light_cbam_x3", "rcan_light_cbam_x4", "rcan_light_cbam_x8",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    # The network
    model_arch_name: ModelName = "rcan_x4"  # rcan_…: the paper's size; rcan_light_…: for CPUs; …_cbam_…: with CBAM attention
    upscale_factor: Literal[2, 3, 4, 8] = 4  # times the width and height; must be the one in the model's name
    channels: int | None = None  # width of the feature maps; None: as the model's name says (paper: 64)
    reduction: int | None = None  # channel attention narrows to channels / reduction; None: as the name says (paper: 16)
    num_rg: int | None = None  # residual groups; None: as the name says (paper: 10)
    num_rcab: int | None = None  # residual blocks in each group; None: as the name says (paper: 20)
    attention: Literal["channel", "cbam", "cbam_average"] | None = None  # cbam_average: no max pooling; None: as the name says
    initial_channel_gate: float | None = None  # channel gate initialisation, 0 to 1; None: as published, near 0.5
    initial_spatial_gate: float | None = None  # CBAM's spatial gate initialisation, 0 to 1; None: as published, near 0.5
    pointwise_upsampler: bool = False  # one convolution computes all pixels: light networks are 1.6 times as fast

    # The run
    mode: Literal["train", "test", "valid"] | None = None  # None: the script's own; valid means test
    exp_name: str = ""  # name of the run's folder in results_dir; empty: the model's name
    results_dir: str = "results"  # folder that holds the folders of all runs
    seed: int = 0  # the same seed repeats a run exactly, with any number of workers
    epochs: int = 1000  # length of the training (paper: 1000)
    steps_per_epoch: int = 1000  # updates in an epoch, whatever the size of the data (paper: 1000)
    start_epoch: int = 0  # epoch that the checkpoint must have reached; 0: any
    resume: str = "auto"  # auto: from the run's last.pth.tar if there is one; never: refuse if there is one; or a checkpoint's path
    pretrained_model_path: str = ""  # weights to start from, of any scale (paper: x2's for x3, x4 and x8)
    dry_run: bool = False  # try two updates, print what would run and how long it takes, and stop

    # Data: a set is a folder in data_root (or a path) that holds GT/, GTmod12/, HR/, or the images themselves
    data_root: str = "data"  # folder that holds the sets
    train_sets: tuple[str, ...] = ("DIV2K",)  # sets to train on, together (paper: DIV2K)
    valid_sets: tuple[str, ...] = ("Set5",)  # sets to score during training; the first one decides which weights are best
    test_sets: tuple[str, ...] = ("Set5",)  # sets to score in test.py (paper: Set5 Set14 B100 Urban100 Manga109)
    degradation: Literal["BI", "BD", "DN", "photo"] = "BI"  # how LR is made of GT, see docs/data.md (paper: BI; BD and DN at x3)
    lr_patch_size: int = 48  # side of an LR patch, LR pixels; a GT patch is upscale_factor times as large (paper: 48)
    small_images: Literal["refuse", "skip"] = "refuse"  # what to do with training images smaller than a patch
    cache_dir: str = ".cache"  # folder for decoded training images; may be deleted at any time
    num_workers: int = 1  # processes that cut batches, for each device; 0: the training process does it

    # Optimizer
    batch_size: int = 16  # patches in an update, on all devices together (paper: 16)
    optimizer: Literal["adam", "muon"] = "adam"  # muon: learns faster per update, at a learning_rate of about 1e-3 (paper: adam)
    learning_rate: float = 1e-4  # learning rate at its peak (paper: 1e-4)
    adam_betas: tuple[float, float] = (0.9, 0.999)  # Adam's decay of the gradient's mean and square (paper: 0.9 0.999)
    schedule: Literal["step", "cosine"] = "step"  # step: halve the learning rate every halve_every; cosine: down to 0 (paper: step)
    halve_every: int = 200_000  # updates between halvings, with schedule=step (paper: 200000)
    warmup_updates: int = 0  # updates in which the learning rate rises from 0 (paper: none)
    clip_grad_norm: float = 1.0  # largest 2-norm of the gradient over all weights; 0: no clipping (paper: none)
    skip_threshold: float = 0.0  # skip updates whose loss exceeds the running loss this many times; 0: only non-finite ones
    max_skipped: int = 50  # stop the run after this many skipped updates in a row
    ema_decay: float = 0.999  # decay of the EMA weights, which are scored and kept as the best; 0: no EMA (paper: none)

    # Device
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the network in training; auto: bf16 where it is fast, else fp32
    channels_last: bool = True  # memory layout of the convolutions; faster on nearly every device
    accumulation_steps: int = 1  # parts in which a device computes its share of a batch: less memory, the same update
    activation_checkpointing: bool = False  # compute each group twice instead of keeping its activations: less memory, slower
    cuda_graph: bool = False  # replay an update's kernels on a GPU instead of launching each; unmeasured: see scripts/gpu_check.py
    compile: bool = False  # torch.compile the residual groups: slower start, faster updates; on CPUs it needs a C++ compiler

    # Reports, in updates
    log_every: int = 100  # updates between lines in log.jsonl and TensorBoard
    eval_every: int = 1000  # updates between evaluations on valid_sets, with samples and best.pth.tar
    save_every: int = 1000  # updates between saves of last.pth.tar, from which the same command resumes
    save_every_minutes: float = 10.0  # save also after this many minutes without a save; 0: never
    keep_last: int = 1  # earlier checkpoints to keep, as update_<number>.pth.tar
    best_metric: Literal["psnr", "ssim", "newest"] = "psnr"  # what best.pth.tar is chosen by, on the first of valid_sets

    # Loss
    luma_share: float = 0.0  # share of L1 that is taken on luma, as PSNR and SSIM are; the rest on RGB (paper: 0)

    # Composite loss
    use_composite_loss: bool = False  # False: L1 alone (paper); True: the weighted sum of three terms, by train_improved.py
    l1_weight: float = 1.0  # weight of the mean absolute difference
    perceptual_weight: float = 0.006  # weight of the difference between VGG19 features
    adversarial_weight: float = 0.001  # weight of the discriminator's judgement

    # Testing
    model_path: str | tuple[str, ...] = ""  # weights to score, one or several; empty: the run's best, else assets/weights
    self_ensemble: bool = False  # mean over 8 flips and rotations, the paper's RCAN+; 8 times as slow
    save_images: bool = True  # write the upscaled images

    # Of the settings above, subclasses extend these
    TESTING_ALONE: ClassVar = frozenset({"model_path", "test_sets", "self_ensemble", "save_images"})
    TESTING: ClassVar = TESTING_ALONE | {  # all that test.py uses
        "model_arch_name", "upscale_factor", "mode", "exp_name", "results_dir", "data_root", "degradation",
    }  # fmt: skip
    NOT_IN_TRAINING: ClassVar = TESTING_ALONE | {"l1_weight", "perceptual_weight", "adversarial_weight"}
    IDLE: ClassVar[Mapping[str, tuple[Any, frozenset[str]]]] = {  # settings without effect while another one has this value
        "schedule": ("cosine", frozenset({"halve_every"})),
    }
    FREE_AT_RESUME: ClassVar = TESTING_ALONE | {  # where things lie, what is reported, and how the same update is computed
        "mode", "results_dir", "exp_name", "resume", "start_epoch", "dry_run", "data_root", "valid_sets", "cache_dir", "num_workers",
        "log_every", "eval_every", "save_every", "save_every_minutes", "keep_last", "max_skipped", "skip_threshold",
        "cuda_graph", "compile", "channels_last", "accumulation_steps", "activation_checkpointing",
    }  # fmt: skip
    OF_ONE_MACHINE: ClassVar = frozenset({"data_root", "cache_dir", "num_workers"})  # may differ between the machines of a run
    RANGES: ClassVar[Mapping[str, str]] = {  # of every number
        **dict.fromkeys((
            "channels", "reduction", "num_rg", "num_rcab", "epochs", "steps_per_epoch", "lr_patch_size", "batch_size", "halve_every",
            "max_skipped", "accumulation_steps", "log_every", "eval_every", "save_every",
        ), "at least 1"),
        **dict.fromkeys((
            "seed", "start_epoch", "num_workers", "warmup_updates", "clip_grad_norm", "save_every_minutes", "keep_last",
            "l1_weight", "perceptual_weight", "adversarial_weight",
        ), "at least 0"),
        **dict.fromkeys(("initial_channel_gate", "initial_spatial_gate", "learning_rate"), "more than 0 and less than 1"),
        **dict.fromkeys(("adam_betas", "ema_decay"), "at least 0 and less than 1"),
        "luma_share": "0 to 1",
        "skip_threshold": "0 or more than 1",
    }  # fmt: skip

    def __post_init__(self) -> None:
        _check_types(type(self), vars(self))
        for name, span in self.RANGES.items():
            value = getattr(self, name)
            if not all(_IS_WITHIN[span](part) for part in _parts(value) if part is not None):
                raise ValueError(f"{name}={value} must be {span}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        family, scale = self.model_arch_name.rsplit("_x", 1)
        if scale != str(self.upscale_factor):
            raise ValueError(
                f"model_arch_name={self.model_arch_name!r} contradicts upscale_factor={self.upscale_factor}: "
                f"set model_arch_name='{family}_x{self.upscale_factor}' or upscale_factor={scale}"
            )
        has_cbam = "cbam" in family
        if self.attention and has_cbam != ("cbam" in self.attention):
            remedy = "attention='cbam'" if has_cbam else "attention=None and initial_spatial_gate=None"
            raise ValueError(
                f"attention={self.attention!r} contradicts model_arch_name={self.model_arch_name!r}: "
                f"set {remedy}, or a model {'without' if has_cbam else 'with'} cbam in its name"
            )
        if self.initial_spatial_gate is not None and not has_cbam:
            raise ValueError(
                f"initial_spatial_gate={self.initial_spatial_gate} contradicts model_arch_name={self.model_arch_name!r}, which has no "
                "spatial gate: set initial_spatial_gate=None, or a model with cbam in its name"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} doesn't divide batch_size={self.batch_size}: set a divisor of batch_size"
            )
        if self.total_updates >= 2**63:
            raise ValueError(f"epochs={self.epochs} of steps_per_epoch={self.steps_per_epoch} are 2**63 updates or more: lower epochs")
        if self.start_epoch and self.resume == "never":
            raise ValueError(f"start_epoch={self.start_epoch} contradicts resume='never': set start_epoch=0 or resume='auto'")
        if self.start_epoch >= self.epochs:
            raise ValueError(f"start_epoch={self.start_epoch} is not before the end, epochs={self.epochs}: raise epochs")
        if not self.resume:
            raise ValueError("resume='' must be 'auto', 'never', or the path of a checkpoint")
        for name in ("train_sets", "valid_sets", "test_sets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} names a set twice: name each once")

    @property
    def experiment_dir(self) -> Path:
        """The run's folder: checkpoints, logs and samples. Without exp_name it is named after the network, as rcan_light_x4_c100_BD."""
        return Path(self.results_dir) / (self.exp_name or self.model_arch_name + self._differences())

    def _differences(self) -> str:
        """What distinguishes the network and its data from those that the model's name means."""
        usual = {"attention": type(self).attention, "degradation": "BI"}  # of sizes: None
        marks = {"channels": "c", "reduction": "r", "num_rg": "g", "num_rcab": "b", "attention": "", "degradation": ""}
        values = {name: getattr(self, name) for name in marks}
        return "".join(f"_{marks[name]}{value}" for name, value in values.items() if value not in (None, usual.get(name)))

    @property
    def gt_patch_size(self) -> int:
        """Side of a GT patch, GT pixels."""
        return self.lr_patch_size * self.upscale_factor

    @property
    def total_updates(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What differs from the named network."""
        names = (
            "channels", "reduction", "num_rg", "num_rcab", "attention",
            "initial_channel_gate", "initial_spatial_gate", "pointwise_upsampler",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None and getattr(self, name) is not False}


def released_weights(upscale_factor: int, kind: str = "clean") -> Path:
    """The path of this repository's own weights for a scale, "clean" or "photo"; the file may be absent."""
    name = f"rcan_light_x{upscale_factor}" if kind == "clean" else f"rcan_light_{kind}_x{upscale_factor}"
    return Path(__file__).parent / "assets" / "weights" / f"{name}.pth.tar"


# The command line

Settings = TypeVar("Settings", bound=Config)
Mode = Literal["train", "test"]


def parse(
    kind: type[Settings], mode: Mode | None, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a run: the values in the file, replaced by `defaults`, replaced by the command line.

    Args:
        kind: the class of the settings.
        mode: what the script does; None for a script that takes the settings of both.

    Raises:
        ValueError: settings that contradict each other or the script, or options that have no effect.
        SystemExit: 2 for an unknown option or an unreadable value, 0 after --help.
    """
    values: dict[str, Any] = {line.name: line.default for line in fields(kind)} | dict(defaults or {})
    _check_types(kind, values)
    unused = {None: set[str](), "train": kind.NOT_IN_TRAINING, "test": values.keys() - kind.TESTING}[mode]
    words = sys.argv[1:] if argv is None else argv
    given = [word[2:].split("=")[0].replace("-", "_") for word in words if word[:2] == "--" and word not in ("--", "--help")]
    for name in given:
        _check_name(name, values, unused, mode)
        if given.count(name) > 1 and "tuple" in str(get_type_hints(kind)[name]):
            raise ValueError(f"--{name} is given {given.count(name)} times, and only the last would count: give all its values at once")
    config = kind(**values | _read(kind, {name: value for name, value in values.items() if name not in unused}, argv))
    if mode and config.mode and (config.mode == "train") != (mode == "train"):
        raise ValueError(f"mode={config.mode!r} contradicts this script, which can only {mode}: set mode=None, or run another script")
    for name, (value, idle) in kind.IDLE.items():
        if getattr(config, name) == value and (vain := sorted(idle.intersection(given))):
            raise ValueError(f"--{vain[0]} has no effect with {name}={value!r}: leave it out, or set another {name}")
    if mode == "test" and config.model_path and (vain := sorted({"model_arch_name", "upscale_factor"}.intersection(given))):
        raise ValueError(f"--{vain[0]} has no effect with model_path={config.model_path!r}, as weights name their network: leave one out")
    return config


def answer_help(read: Callable[[], object]) -> None:
    """Print the help and exit, where it is asked for: called before PyTorch is imported, which takes a second.

    Args:
        read: parses the command line. A mistake that it finds is left to the script, which reports it.
    """
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        with contextlib.suppress(ValueError):
            read()


_MEANT: dict[str | None, dict[str, str]] = {  # by an option that a script doesn't use
    "train": {
        "model_path": "--pretrained_model_path starts from weights, --resume goes on from a checkpoint, test.py scores weights",
        "test_sets": "--valid_sets names the sets to score during training, test.py scores test_sets",
        **dict.fromkeys(("self_ensemble", "save_images"), "test.py uses it"),
        **dict.fromkeys(("preset", "l1_weight", "perceptual_weight", "adversarial_weight"), "train_improved.py uses it"),
    },
    "test": {
        "valid_sets": "--test_sets names the sets to score",
        "precision": "test.py scores in fp32",
        **dict.fromkeys(("pretrained_model_path", "resume"), "--model_path names the weights to score"),
        **dict.fromkeys(("input", "output"), "inference.py upscales images of your own"),
    },
}


def _check_name(name: str, known: Iterable[str], unused: Container[str], mode: Mode | None) -> None:
    """Refuse an option that has no effect or doesn't exist, and name what was meant."""
    meant = _MEANT.get(mode, {}).get(name)
    if name in unused or (meant and name not in known):
        raise ValueError(f"--{name} has no effect here: {meant or 'train.py uses it'}")
    if name not in known:
        initials = [line for line in known if "".join(word[:1] for word in line.split("_")) == name]
        alike = initials or difflib.get_close_matches(name, known, 3, 0.7) or [line for line in known if name in line][:3]
        question = f"did you mean {' or '.join(f'--{line}' for line in alike)}? " if alike else ""
        print(f"error: --{name} is unknown: {question}--help lists all options", file=sys.stderr)
        raise SystemExit(2)


def _read(kind: type[Config], values: Mapping[str, Any], argv: Sequence[str] | None) -> dict[str, Any]:
    """The values, replaced by those on the command line; --help shows them in groups, each with its comment."""
    import tyro  # only here, so that importing the settings stays cheap

    hints, lines, groups = get_type_hints(kind), dict[str, tuple[str, str]](), dict[str, list[Any]]()
    for part in reversed(kind.__mro__[:-1]):
        title = ""
        for heading, name, comment in re.findall(r"^    (?:# (\w[\w ]+)|(\w+): .+?  # (.+))", inspect.getsource(part), re.M):
            title = heading or title
            lines[name] = (lines.get(name, (title,))[0], comment)  # a line stays in its group where a subclass repeats it
    for name, value in values.items():
        title, comment = lines.get(name, ("Others", ""))
        option: Any = Annotated[hints[name], tyro.conf.arg(help=comment)]
        groups.setdefault(title, []).append((name, option, field(default=value)))
    parts: list[Any] = []  # tyro groups the options of each dataclass within a dataclass
    for title, members in groups.items():
        group: Any = make_dataclass("Group", members, kw_only=True)
        parts.append((f"group{len(parts)}", Annotated[group, tyro.conf.arg(name=title)], field(default_factory=group)))
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes)
    found: Any = tyro.cli(make_dataclass("Options", parts), args=argv, use_underscores=True, config=options)
    return {name: value for group in vars(found).values() for name, value in vars(group).items()}


# Types and ranges

_IS_WITHIN: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: 1 <= value < inf,
    "at least 0": lambda value: 0 <= value < inf,
    "more than 0 and less than 1": lambda value: 0 < value < 1,
    "at least 0 and less than 1": lambda value: 0 <= value < 1,
    "0 to 1": lambda value: 0 <= value <= 1,
    "0 or more than 1": lambda value: value == 0 or 1 < value < inf,
}


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_types(kind: type[Config], values: Mapping[str, Any]) -> None:
    """Refuse a value of another type, as an edited line can hold one, and one that can be no path and no count."""
    hints = get_type_hints(kind)
    for name in (line.name for line in fields(kind)):
        value, hint = values[name], hints[name]
        if not _fits(value, hint):
            expected = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
            home = next(part.__module__ for part in kind.__mro__ if name in inspect.get_annotations(part))
            raise ValueError(f"{name}={_shown(value)} must be {expected}; correct its line in {home}.py")
        for part in _parts(value):
            if isinstance(part, str) and "\0" in part:
                raise ValueError(f"{name}={value!r} holds a null character, which no path and no name can: remove it")
            if isinstance(part, str) and any("\ud800" <= character <= "\udfff" for character in part):
                raise ValueError(f"{name}={value!r} is not UTF-8, which reports need: rename the file or folder")
            if isinstance(part, str) and part.startswith("~"):
                raise ValueError(f"{name}={value!r}: ~ is only replaced by shells, and not here: write the path of your home folder")
            if isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError(f"{name}={_shown(value)} must be less than 2**63")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "(a number of thousands of digits)"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is Ellipsis else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
