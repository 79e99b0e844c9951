"""The settings a person edits, and what follows from them.

Edit a value on its line, or give it on the command line, where every line is an option of the same name:

    python train.py --model_arch_name rcan_x2 --upscale_factor 2 --batch_size 8
    python train.py --help
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from inspect import get_annotations
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

ModelName = Literal[
    "rcan_x2", "rcan_x3", "rcan_x4", "rcan_x8",
    "rcan_cbam_x2", "rcan_cbam_x3", "rcan_cbam_x4", "rcan_cbam_x8",
    "rcan_light_x2", "rcan_light_x3", "rcan_light_x4", "rcan_light_x8",
    "rcan_light_cbam_x2", "rcan_light_cbam_x3", "rcan_light_cbam_x4", "rcan_light_cbam_x8",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    # The network
    model_arch_name: ModelName = "rcan_x4"  # the paper's size, or rcan_light_… for CPUs; …_cbam_… has CBAM attention
    upscale_factor: Literal[2, 3, 4, 8] = 4  # how many times larger; the one that the model's name ends in
    channels: int | None = None  # width of the feature maps; None: as the model's name says
    reduction: int | None = None  # how many times narrower the attention's bottleneck is; None: as the name says
    num_rg: int | None = None  # residual groups; None: as the name says
    num_rcab: int | None = None  # blocks in each group; None: as the name says
    attention: Literal["channel", "cbam", "cbam_average"] | None = None  # cbam_average: without maxima; None: as the name says
    initial_channel_gate: float | None = None  # where the factor of each channel starts, 0 to 1; None: as published, near 0.5
    initial_spatial_gate: float | None = None  # where CBAM's factor of each pixel starts, 0 to 1; None: as published, near 0.5

    # The run
    mode: Literal["train", "test", "valid"] | None = None  # None: each script runs in its own mode; valid is test
    exp_name: str = ""  # the run's folder is results/<exp_name>; empty: the model's name, and the preset's where there is one
    results_dir: str = "results"  # where the folders of all runs lie
    seed: int = 0  # the same seed gives the same run, with any number of workers
    epochs: int = 1000  # how long to train; an epoch is steps_per_epoch updates, whatever the data's size
    steps_per_epoch: int = 1000  # updates in an epoch
    start_epoch: int = 0  # the epoch to resume in; 0: where the checkpoint stopped; any other must be that one
    resume: str = "auto"  # auto: go on from the run's last.pth.tar, if there; never: refuse if there; or a checkpoint's path
    dry_run: bool = False  # stand-in
    pretrained_model_path: str = ""  # start from these weights, of any scale: all but an upsampler of another shape

    # Data: a set is a folder with GT/ (or GTmod12/, HR/, or the images themselves), under data_root or anywhere
    data_root: str = "data"  # where the sets lie
    train_sets: tuple[str, ...] = ("DIV2K",)  # sets to train on, all together
    valid_sets: tuple[str, ...] = ("Set5",)  # sets scored during training; the first decides which weights are best
    test_sets: tuple[str, ...] = ("Set5",)  # sets that test.py scores
    degradation: Literal["BI", "BD", "DN"] = "BI"  # how LR images are made: bicubic; blur and decimation; bicubic and noise
    lr_patch_size: int = 48  # side of the LR patch, LR pixels; the GT patch is upscale_factor times as large
    small_images: Literal["refuse", "skip"] = "refuse"  # what to do with training images smaller than a patch
    cache_dir: str = ".cache"  # decoded training images, made once; may be deleted at any time
    num_workers: int = 1  # processes that cut batches, for each device; 0: in the training process

    # The optimizer: Adam
    batch_size: int = 16  # patches in an update, over all devices together
    learning_rate: float = 1e-4  # of Adam, at its highest
    adam_betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's averages of the gradient and of its square
    schedule: Literal["step", "cosine"] = "step"  # step: halved every halve_every updates; cosine: down to 0 at the end
    halve_every: int = 200_000  # updates between two halvings of the learning rate, for schedule=step
    warmup_updates: int = 0  # updates over which the learning rate rises from 0
    clip_grad_norm: float = 1.0  # longest gradient, in the 2-norm over all weights; 0: not clipped
    skip_threshold: float = 0.0  # skip an update whose loss is more than so many times the running loss; 0: only one not finite
    max_skipped: int = 50  # updates in a row that may be skipped before the run is stopped
    ema_decay: float = 0.999  # of the averaged weights, which are evaluated and saved; 0: no averaging

    # The device
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the network in training; auto: bf16 where it is fast
    channels_last: bool = True  # memory layout of the convolutions; faster nearly everywhere
    accumulation_steps: int = 1  # parts that a device's share of a batch is computed in, for less memory; the update is the same
    activation_checkpointing: bool = False  # compute the groups twice instead of keeping what they computed: less memory, slower
    compile: bool = False  # torch.compile each residual group: a slower start, faster updates; needs a C++ compiler on CPUs

    # Reports, in updates
    log_every: int = 100  # a line in log.jsonl and TensorBoard
    eval_every: int = 1000  # PSNR and SSIM of valid_sets, sample pictures, and best.pth.tar
    save_every: int = 1000  # last.pth.tar, from which the same command resumes
    save_every_minutes: float = 10.0  # and also whenever so many minutes have passed since the last time; 0: never
    keep_last: int = 1  # checkpoints before the last one to keep, as update_<number>.pth.tar

    best_metric: Literal["psnr", "ssim", "newest"] = "psnr"  # which weights best.pth.tar keeps, by the first of valid_sets

    # Composite loss, for train_improved.py
    use_composite_loss: bool = False  # False: L1 alone; True: the weighted sum of the three terms below
    l1_weight: float = 1.0  # of the mean absolute difference
    perceptual_weight: float = 0.006  # of the difference of VGG19's features
    adversarial_weight: float = 0.001  # of the discriminator's opinion

    # Testing
    model_path: str | tuple[str, ...] = ""  # weights, or several; empty: the experiment's best, else this repository's light network
    self_ensemble: bool = False  # mean over the eight turns of the picture (RCAN+); eight times as slow
    save_images: bool = True  # write the upscaled pictures

    def __post_init__(self) -> None:
        _check_types(self)
        self._check_ranges()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if not self.model_arch_name.endswith(f"_x{self.upscale_factor}"):
            family, scale = self.model_arch_name.rsplit("_x", 1)
            raise ValueError(
                f"model_arch_name={self.model_arch_name!r} contradicts upscale_factor={self.upscale_factor}: "
                f"set model_arch_name={family + '_x' + str(self.upscale_factor)!r} or upscale_factor={scale}"
            )
        has_cbam = "cbam" in self.model_arch_name
        if self.attention and has_cbam != ("cbam" in self.attention):
            remedy = "attention='cbam'" if has_cbam else "attention=None and initial_spatial_gate=None"
            raise ValueError(
                f"attention={self.attention!r} contradicts model_arch_name={self.model_arch_name!r}: "
                f"set {remedy}, or a model {'without' if has_cbam else 'with'} cbam in its name"
            )
        if self.initial_spatial_gate is not None and not has_cbam:
            raise ValueError(
                f"initial_spatial_gate={self.initial_spatial_gate} contradicts model_arch_name={self.model_arch_name!r}, which has no such "
                "gate: set initial_spatial_gate=None, or a model with cbam in its name"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps={self.accumulation_steps} contradicts batch_size={self.batch_size}, which can't be cut into so many "
                "equal parts: set a divisor of it"
            )
        if self.start_epoch and self.resume == "never":
            raise ValueError(f"start_epoch={self.start_epoch} contradicts resume='never': set start_epoch=0 or resume='auto'")
        if self.start_epoch >= self.epochs:
            raise ValueError(f"start_epoch={self.start_epoch} is not before the end, epochs={self.epochs}: raise epochs")

    def _check_ranges(self) -> None:
        for name in _AT_LEAST_1:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("initial_channel_gate", "initial_spatial_gate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1, and be neither; 0.95 is nearly open")
        for name in _AT_LEAST_0:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, and finite")
        if 0 < self.skip_threshold <= 1:
            raise ValueError(f"skip_threshold={self.skip_threshold} would skip ordinary updates: set it to 0, or above 1, as 10")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must lie between 0 and 1; the paper's is 1e-4")
        for name, values in (("ema_decay", (self.ema_decay,)), ("adam_betas", self.adam_betas)):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.total_updates >= 2**63:
            raise ValueError(f"epochs={self.epochs} of steps_per_epoch={self.steps_per_epoch} updates are more than 2**63: lower epochs")
        if not self.resume:
            raise ValueError("resume='' must be 'auto', 'never', or the path of a checkpoint")
        for name in ("train_sets", "valid_sets", "test_sets"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} names a set twice")

    @property
    def experiment_dir(self) -> Path:
        """Where the run leaves its checkpoints, logs and pictures."""
        return Path(self.results_dir) / (self.exp_name or self.model_arch_name)

    def shared_settings(self) -> dict[str, Any]:
        return {n: v for n, v in __import__("dataclasses").asdict(self).items() if n not in {"data_root", "cache_dir", "num_workers", "vgg19_weights_path"}}

    def free_at_resume(self, before: Any) -> set[str]:
        free = set(["mode", "results_dir", "exp_name", "resume", "start_epoch", "data_root", "cache_dir", "num_workers", "log_every", "eval_every", "save_every", "save_every_minutes", "keep_last", "max_skipped", "skip_threshold", "compile", "channels_last", "accumulation_steps", "activation_checkpointing", "valid_sets", "test_sets", "model_path", "self_ensemble", "save_images", "dry_run"])
        free |= {"epochs"} if self.schedule == "step" else set()
        free |= {"precision"} if self.precision == "auto" else set()
        return free

    @property
    def gt_patch_size(self) -> int:
        """Side of the GT patch, GT pixels."""
        return self.lr_patch_size * self.upscale_factor

    @property
    def total_updates(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What differs from the named network."""
        given = {name: getattr(self, name) for name in _OF_THE_MODEL}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def weights_paths(self) -> tuple[Path, ...]:
        """The weights to test: `model_path`, else the experiment's best or last, else those that come with this repository."""
        if self.model_path:
            given = (self.model_path,) if isinstance(self.model_path, str) else self.model_path
            return tuple(map(Path, given))
        trained = (self.experiment_dir / name for name in _CHECKPOINTS)
        return (next(filter(Path.is_file, trained), released_weights(self.upscale_factor)),)

    def test_dir(self, weights: Path | None = None) -> Path:
        """Where scores and pictures go: results/<exp_name>/test, named after the weights where exp_name is empty.

        Another degradation and self-ensemble have folders of their own (test_BD, test_plus); several weights tested at once have
        one each, and `None` stands for what they have in common. A file that only shares its name with a run is not filed there.
        """
        kind = "test" + ("" if self.degradation == "BI" else f"_{self.degradation}") + ("_plus" if self.self_ensemble else "")
        if len(self.weights_paths) == 1:
            return Path(self.results_dir) / (self.exp_name or self._folder_name(self.weights_paths[0])) / kind
        if weights is None:
            return Path(self.results_dir) / (self.exp_name or "table") / kind
        own = Path(self.exp_name) / kind / weights_name(weights) if self.exp_name else Path(self._folder_name(weights)) / kind
        return Path(self.results_dir) / own

    def _folder_name(self, weights: Path) -> str:
        name = weights_name(weights)
        is_run = any((Path(self.results_dir) / name / checkpoint).is_file() for checkpoint in _CHECKPOINTS)
        return f"{name}_file" if is_run and weights.name not in _CHECKPOINTS else name


def weights_name(path: Path) -> str:
    """What weights are called in results: a run's folder, or the file's name up to its first dot."""
    if path.name in _CHECKPOINTS:
        return path.absolute().parent.name or path.name.split(".")[0]
    return path.name.lstrip(".").split(".")[0] or "weights"


def released_weights(upscale_factor: int) -> Path:
    """Where this repository keeps its own trained weights for a scale; there may be none."""
    return Path(__file__).parent / "assets" / "weights" / f"rcan_light_x{upscale_factor}.pth.tar"


Settings = TypeVar("Settings", bound=Config)


def parse(settings: type[Settings] | Settings, mode: Literal["train", "test"] | None, argv: Sequence[str] | None = None) -> Settings:
    """The settings of this run: the file's values, replaced by those on the command line.

    Args:
        settings: the class, or an instance whose values are taken instead of the file's.
        mode: what the script does; None for one to which any mode is right.

    Raises:
        ValueError: settings that contradict each other or the script. A slip or a wrong type ends with exit code 2.
    """
    import tyro  # only here, so that importing the settings stays cheap

    _check_types(settings)  # of the edited lines
    kind, start = (settings, {}) if isinstance(settings, type) else (type(settings), {"default": settings})
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    config = tyro.cli(kind, args=argv, use_underscores=True, config=options, **start)
    if None not in (mode, config.mode) and {"valid": "test"}.get(config.mode, config.mode) != mode:
        raise ValueError(f"mode={config.mode!r} contradicts this script, which can only {mode}: leave mode at None, or run another script")
    return config


_OF_THE_MODEL = ("channels", "reduction", "num_rg", "num_rcab", "attention", "initial_channel_gate", "initial_spatial_gate")
_CHECKPOINTS = ("best.pth.tar", "last.pth.tar")
_AT_LEAST_1 = (
    "channels", "reduction", "num_rg", "num_rcab", "epochs", "steps_per_epoch", "lr_patch_size", "batch_size", "halve_every",
    "max_skipped", "accumulation_steps", "log_every", "eval_every", "save_every",
)  # fmt: skip
_AT_LEAST_0 = (
    "seed", "start_epoch", "num_workers", "warmup_updates", "clip_grad_norm", "skip_threshold", "save_every_minutes", "keep_last",
    "l1_weight", "perceptual_weight", "adversarial_weight",
)  # fmt: skip


def _check_types(config: Config | type[Config]) -> None:
    """Refuse a value of another type, as an edited line can hold one."""
    hints = get_type_hints(config if isinstance(config, type) else type(config))
    for field in fields(config):
        if not _fits(getattr(config, field.name), hints[field.name]):
            name = str(hints[field.name]).replace("typing.", "") if get_args(hints[field.name]) else hints[field.name].__name__
            where = _home(config, field.name)
            raise ValueError(f"{field.name}={_shown(getattr(config, field.name))} must be {name}; correct its line in {where}")
        _check_values(field.name, getattr(config, field.name))


def _check_values(name: str, value: Any) -> None:
    """Refuse what has the right type, but can be no path and no number of anything."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, str) and "\0" in part:
            raise ValueError(f"{name}={value!r} must not hold a null character; no path and no name can")
        if isinstance(part, str) and any("\ud800" <= character <= "\udfff" for character in part):
            raise ValueError(f"{name}={value!r} must be UTF-8, as reports name it; rename the file or folder")
        if isinstance(part, int) and abs(part) >= 2**63:
            raise ValueError(f"{name}={_shown(value)} must be less than 2**63")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "(a number of thousands of digits)"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _home(config: Config | type[Config], name: str) -> str:
    """The file in which a setting has its line."""
    kinds = (config if isinstance(config, type) else type(config)).__mro__
    return next(f"{kind.__module__}.py" for kind in kinds if name in get_annotations(kind))


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
