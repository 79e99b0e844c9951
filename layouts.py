"""State-dict keys and value ranges of known RCAN programs: a table of layouts, and the exact conversions between them.

A layout maps the keys of `model.RCAN` to another program's, and its tensors to ours. Some programs subtract the mean in a
convolution, some work on [0, 255] inside, one scales its residuals. All of this is multiplied into the first and the last
convolutions, in float64; our network then computes the same to about 1e-7 of the image's range. `LAYOUTS` lists them:

    native     the keys of model.RCAN, and of the weights published for repositories like this one
    official   the paper's code; EDSR-PyTorch, torchSR, spandrel (so chaiNNer, ComfyUI) and traiNNer use its keys too
    basicsr    BasicSR
    rcan-it    RCAN-it (Lin et al., "Revisiting RCAN", 2022)
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import model

State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What the keys alone tell of a network."""

    groups: int
    blocks: int
    upsamplers: int
    cbam: bool


@dataclass(frozen=True)
class Layout:
    """A program's names of RCAN's layers; {g} counts groups, {b} blocks, {u} the upsampler's modules, {last} is one past them."""

    program: str
    mark: str  # a pattern for the beginning of a key that no other layout has
    conv1: str
    first: str  # of a block's two convolutions
    second: str
    squeeze: str  # of the attention's two 1x1 convolutions
    excite: str
    group: str  # a group's last convolution
    conv2: str
    upsampler: str
    conv3: str
    spatial: str = ""  # CBAM's 7x7 convolution; empty where the program has none
    upsampler_steps: int = 1  # from one convolution of the upsampler to the next
    to_native: Callable[[State], State] = dict  # under our keys, in float64: this layout's values to ours
    from_native: Callable[[State], State] | None = None  # and back; None: this layout is only read

    def names(self, size: Size) -> dict[str, str]:
        """Our keys (with .weight and .bias) -> this layout's."""
        return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in self._layers(size) for kind in ("weight", "bias")}

    def _layers(self, size: Size) -> Iterator[tuple[str, str]]:
        for field in ("conv1", "conv2", "conv3"):
            yield getattr(NATIVE, field), getattr(self, field).format(last=size.groups)
        for u in range(size.upsamplers):
            yield NATIVE.upsampler.format(u=u), self.upsampler.format(u=u * self.upsampler_steps)
        for g in range(size.groups):
            yield NATIVE.group.format(g=g, last=size.blocks), self.group.format(g=g, last=size.blocks)
            for b in range(size.blocks):
                for field in ("first", "second", "squeeze", "excite", *(["spatial"] if size.cbam else [])):
                    yield getattr(NATIVE, field).format(g=g, b=b), getattr(self, field).format(g=g, b=b)

    def title(self, state: Mapping[str, Tensor]) -> str:
        """The program and the range it works on, for messages."""
        inner = "[0, 255]" if self.program == "basicsr" or "sub_mean.weight" in state else "[0, 1]"
        return f"{self.program} layout, {inner} inside"


_RCAB = "trunk.{g}.residual_group.{b}.residual_channel_attention_block"
NATIVE = Layout(
    program="native",
    mark=r"trunk\.\d+\.residual_group\.",
    conv1="conv1",
    first=_RCAB + ".0",
    second=_RCAB + ".2",
    squeeze=_RCAB + ".3.channel_attention_layer.1",
    excite=_RCAB + ".3.channel_attention_layer.3",
    spatial=_RCAB + ".3.spatial_attention_layer.0",
    group="trunk.{g}.residual_group.{last}",
    conv2="conv2",
    upsampler="upsampling.{u}.upsample_block.0",
    conv3="conv3",
    from_native=dict,
)
MEAN_SHIFT = ("sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias")


def _fold_mean_shift(state: State) -> State:
    """To [0, 1] with one mean: the 1x1 convolutions before and after are multiplied into the first and the last convolution."""
    state = dict(state)
    if "sub_mean.weight" not in state:
        return {**state, "mean": torch.zeros(1, 3, 1, 1)}
    before, shift_before, after, shift_after = (state.pop(name) for name in MEAN_SHIFT)  # (3, 3, 1, 1), (3,)
    before, after = before[:, :, 0, 0], after[:, :, 0, 0]
    if torch.linalg.cond(before) > 1e6:
        raise ValueError(f"sub_mean.weight is {before.tolist()}, a mixture of colours that can't be inverted; is the file damaged?")
    mean = -torch.linalg.solve(before, shift_before) / 255
    state["conv1.weight"] = 255 * torch.einsum("oihw,ij->ojhw", state["conv1.weight"], before)
    state["conv3.weight"] = torch.einsum("po,oihw->pihw", after, state["conv3.weight"]) / 255
    state["conv3.bias"] = (after @ state["conv3.bias"] + shift_after) / 255 - mean
    return {**state, "mean": mean.view(1, 3, 1, 1)}


def _to_255(state: State) -> State:
    """The first and the last convolution for a program that works on [0, 255] inside."""
    last = {name: state[name] * 255 for name in ("conv3.weight", "conv3.bias")}
    return {**state, "conv1.weight": state["conv1.weight"] / 255, **last}


def _unfold_mean_shift(state: State) -> State:
    """As `_to_255`, with mean shifts that only add."""
    state = _to_255(state)
    shift = state.pop("mean").flatten() * 255
    before, after = (torch.eye(3).view(3, 3, 1, 1) for _ in range(2))
    return {**state, **dict(zip(MEAN_SHIFT, (before, -shift, after, shift), strict=True))}


OFFICIAL = Layout(
    program="official",
    mark=r"body\.\d+\.body\.\d+\.body\.3\.conv_du\.",
    conv1="head.0",
    first="body.{g}.body.{b}.body.0",
    second="body.{g}.body.{b}.body.2",
    squeeze="body.{g}.body.{b}.body.3.conv_du.0",
    excite="body.{g}.body.{b}.body.3.conv_du.2",
    group="body.{g}.body.{last}",
    conv2="body.{last}",
    upsampler="tail.0.{u}",
    upsampler_steps=2,
    conv3="tail.1",
    to_native=_fold_mean_shift,
    from_native=_unfold_mean_shift,
)


def _from_basicsr(state: State) -> State:
    """BasicSR subtracts DIV2K's mean in [0, 1], and multiplies by 255 after."""
    scaled = {"conv1.weight": 255 * state["conv1.weight"]}
    scaled |= {name: state[name] / 255 for name in ("conv3.weight", "conv3.bias")}
    return {**state, **scaled, "mean": torch.tensor(model.DIV2K_MEAN).view(1, 3, 1, 1)}


def _to_basicsr(state: State) -> State:
    state = _to_255(state)
    mean = state.pop("mean").flatten()
    if not torch.equal(mean, torch.tensor(model.DIV2K_MEAN)):
        raise ValueError(
            f"layout='basicsr' has the mean {model.DIV2K_MEAN} built in, but the network's is {mean.tolist()}: use layout='official'"
        )
    return state


BASICSR = Layout(
    program="basicsr",
    mark=r"body\.\d+\.residual_group\.\d+\.rcab\.",
    conv1="conv_first",
    first="body.{g}.residual_group.{b}.rcab.0",
    second="body.{g}.residual_group.{b}.rcab.2",
    squeeze="body.{g}.residual_group.{b}.rcab.3.attention.1",
    excite="body.{g}.residual_group.{b}.rcab.3.attention.3",
    group="body.{g}.conv",
    conv2="conv_after_body",
    upsampler="upsample.{u}",
    upsampler_steps=2,
    conv3="conv_last",
    to_native=_from_basicsr,
    from_native=_to_basicsr,
)


def _fold_rcan_it(state: State) -> State:
    """As official, and each block's result is multiplied by a small number before it is added."""
    state = _fold_mean_shift(state)
    for block in {name.removesuffix(".2.weight") for name in state if re.fullmatch(pattern(NATIVE.second) + r"\.weight", name)}:
        for name in (f"{block}.2.weight", f"{block}.2.bias"):
            state[name] = state[name] * RCAN_IT_RESIDUAL_SCALE
        squeeze = f"{block}.3.channel_attention_layer.1.weight"  # its input shrinks with the second convolution
        state[squeeze] = state[squeeze] / RCAN_IT_RESIDUAL_SCALE
    return {**state, **{mark: torch.empty(0) for mark in RCAN_IT_MARKS}}


RCAN_IT_RESIDUAL_SCALE = 0.1  # its default setting, which files don't record

RCAN_IT_MARKS = ("silu", "upsampler_activation")  # keys of model.MARKS: its networks differ from the paper's in these

RCAN_IT = replace(
    OFFICIAL,
    program="rcan-it",
    mark=r"body\.\d+\.body\.\d+\.body\.3\.excitation\.",
    squeeze="body.{g}.body.{b}.body.3.excitation.0",
    excite="body.{g}.body.{b}.body.3.excitation.2",
    upsampler_steps=3,
    to_native=_fold_rcan_it,
    from_native=None,
)

LAYOUTS = {layout.program: layout for layout in (NATIVE, OFFICIAL, BASICSR, RCAN_IT)}


def pattern(template: str) -> str:
    """A regular expression for the keys of a template; its groups are the numbers."""
    return re.sub(r"\\\{\w+\\\}", r"(\\d+)", re.escape(template))
