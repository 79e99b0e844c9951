"""The graphed step against the plain one, with a stand-in for CUDA graphs: computing again on the same tensors."""

import math

import pytest
import torch

import graphs
from config import Config
from runs import small_runs
from runtime import Runtime
from train import PixelStep

CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def settings(tmp_path):
    return small_runs(Config, tmp_path)


def graphed(config, precision, record=lambda work: work):
    step = PixelStep(config, CPU, precision)
    step.graph = graphs.GraphedGradients(step.generator, step.criterion, step.scaler, step.dtype, config.accumulation_steps, record)
    return step


def batch(number):
    """The images of an update; the NaN in one of them makes the guard skip it."""
    random = torch.Generator().manual_seed(number)
    lr, gt = (torch.rand(4, 3, side, side, generator=random).to(memory_format=torch.channels_last) for side in (10, 20))
    return (lr * math.nan if number == 20 else lr), gt


def everything(step):
    weights = dict(step.generator.state_dict())
    state = {f"{index} {name}": value for index, part in enumerate(step.optimizer.state.values()) for name, value in part.items()}
    return {**weights, **state, **{f"guard {name}": tensor for name, tensor in step.guard.state_dict().items()}}


CHANGES = [
    {},
    {"accumulation_steps": 2, "channels_last": False},
    {"optimizer": "muon", "pointwise_upsampler": True, "channels": 12, "skip_threshold": 10.0},
    {"model_arch_name": "rcan_cbam_x2", "activation_checkpointing": True},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", CHANGES)
def test_fifty_updates_with_a_skip_and_a_resume_equal_the_plain_steps(settings, changes, precision):
    """Bit for bit: losses, weights, moments, guard."""
    config = settings(**changes)
    torch.manual_seed(5)
    plain = PixelStep(config, CPU, precision)
    torch.manual_seed(5)
    step = graphed(config, precision)
    for number in range(50):
        if number == 30:  # goes on in a new process
            parts = {name: part.state_dict() for name, part in step.parts().items()}
            step = graphed(config, precision)
            for name, part in step.parts().items():
                part.load_state_dict(parts[name])
        expected, found = plain(*batch(number)), step(*batch(number))
        assert all(torch.equal(found[name], value) or number == 20 for name, value in expected.items()), number
    assert step.graph is not None
    expected, found = everything(plain), everything(step)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_work_that_cannot_be_recorded_is_computed_plainly_and_said(settings, capsys):
    def fail(_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    torch.manual_seed(5)
    plain = PixelStep(settings(), CPU, "fp32")
    torch.manual_seed(5)
    step = graphed(settings(), "fp32", fail)
    for number in range(3):
        plain(*batch(number))
        step(*batch(number))
    assert step.graph is None and capsys.readouterr().out.count("stream is capturing") == 1
    assert all(torch.equal(one, other) for one, other in zip(everything(plain).values(), everything(step).values(), strict=True))


def test_the_replay_sees_new_images_and_weights_at_the_same_addresses(settings):
    """What a CUDA graph demands: nothing that it reads or writes moves."""
    seen = []

    def record(work):
        def again():
            work()
            seen.append([tensor.data_ptr() for tensor in (step.graph.lr, step.graph.gt, step.graph.copies, step.graph.gradients)])
            seen[-1] += [weight.data_ptr() for weight in step.generator.parameters()]

        return again

    step = graphed(settings(accumulation_steps=2), "bf16", record)
    for number in range(3):
        step(*batch(number))
    assert len(seen) == 6 and all(addresses == seen[0] for addresses in seen)


def test_a_cpu_says_that_it_has_no_graphs(settings, capsys):
    assert PixelStep(settings(cuda_graph=True), CPU, "fp32").graph is None
    assert "cuda_graph" in capsys.readouterr().out
