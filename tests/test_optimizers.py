"""Optimizers: what Muon does to a matrix, which weights it moves, and skipped updates. test_train.py has resuming."""

import copy
import math

import pytest
import torch
from pytest import approx

import checkpoints
import optimizers
from config import Config
from helpers import tiny

LEARNING_RATE = 1e-3
CONVOLUTION = "trunk.1.residual_group.0.residual_channel_attention_block.0.weight"


def build(network, **changes):
    return optimizers.build_optimizer(network, Config(optimizer="muon", learning_rate=LEARNING_RATE, **changes))


def put_gradients(network, factor=1.0, seed=0):
    torch.manual_seed(seed)
    for weight in network.parameters():
        weight.grad = factor * torch.randn_like(weight)


def moves(network, optimizer):
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizer.step()
    return {name: weight.detach() - before[name] for name, weight in network.named_parameters()}


def after_iterations(values, iterations=5):
    """What the iteration makes of singular values, one by one (Jordan et al.)."""
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (9, 9), (3, 16, 48)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    torch.manual_seed(1)
    matrices = 100 * torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    expected = after_iterations(values / values.norm(dim=-1, keepdim=True))
    found = optimizers.orthogonalise(matrices)
    assert found.numpy() == approx((left @ torch.diag_embed(expected) @ right).numpy(), abs=1e-9)
    assert torch.linalg.svdvals(optimizers.orthogonalise(torch.randn(8, 72))).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.3


def test_a_zero_gradient_moves_nothing():
    assert not optimizers.orthogonalise(torch.zeros(2, 4, 36)).any()


@pytest.mark.parametrize("size", [1e-12, 1e-15, 1e-20, 1e-30, 1e-44])
def test_a_vanishing_gradient_moves_next_to_nothing(size):
    """… and its square, which underflows, does not become infinite."""
    torch.manual_seed(2)
    assert optimizers.orthogonalise(size * torch.randn(2, 8, 72)).norm() < 0.01


def test_the_size_of_a_usual_gradient_does_not_matter():
    torch.manual_seed(2)
    gradient = torch.randn(8, 72)
    small, large = (optimizers.orthogonalise(size * gradient) for size in (1e-6, 1e3))
    assert (small - large).abs().max() < 0.01


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_first_update_is_the_orthogonalised_gradient_for_convolutions_and_adams_for_the_rest(channels_last):
    """… and convolutions decay by 0.3 of the learning rate."""
    network = tiny(4).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    put_gradients(network)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    found = moves(network, build(network))
    by_muon = {name for name, move in found.items() if move.abs().std() / move.abs().mean() > 0.1}  # Adam's first moves are all as large
    kernels = {name for name, weight in network.named_parameters() if weight.shape[2:] == (3, 3)}
    assert by_muon == kernels - {"conv3.weight"} and CONVOLUTION in by_muon
    for name, weight in network.named_parameters():
        if name in by_muon:
            left, values, right = torch.linalg.svd(weight.grad.flatten(1).double(), full_matrices=False)
            orthogonal = left @ torch.diag(after_iterations(values / values.norm())) @ right
            expected = -LEARNING_RATE * (0.2 * math.sqrt(weight[0].numel()) * orthogonal.view(weight.shape) + 0.3 * before[name])
        else:
            expected = -LEARNING_RATE * weight.grad.sign()
        assert found[name].numpy() == approx(expected.numpy(), rel=1e-2, abs=1e-6), name


def test_momentum_averages_gradients():
    """The same network moved by equal gradients twice, or by opposite ones: 0.95 of the average and 0.05 of the new one (Nesterov)."""
    network = tiny()
    optimizer = build(network)
    put_gradients(network, seed=1)
    first = network.get_parameter(CONVOLUTION).grad.clone()
    optimizer.step()
    put_gradients(network, seed=2)
    second = network.get_parameter(CONVOLUTION).grad.clone()
    decay = LEARNING_RATE * 0.3 * network.get_parameter(CONVOLUTION).detach().flatten(1)
    found = moves(network, optimizer)[CONVOLUTION].flatten(1) + decay
    average = 0.95 * 0.05 * first + 0.05 * second
    expected = optimizers.orthogonalise((0.05 * second + 0.95 * average).flatten(1))
    assert found.numpy() == approx((-LEARNING_RATE * 0.2 * math.sqrt(72) * expected).numpy(), abs=1e-6)


@pytest.mark.parametrize("factor", [1.0, math.nan])
def test_where_found_inf_is_one_nothing_changes(factor):
    network = tiny()
    optimizer = build(network)
    put_gradients(network)
    optimizer.step()
    before = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    put_gradients(network, factor, seed=1)
    optimizer.found_inf = torch.ones(())
    assert not any(move.any() for move in moves(network, optimizer).values())
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(after) > 60 and all(map(torch.equal, before, after))
    put_gradients(network, seed=1)
    optimizer.found_inf = torch.zeros(())
    assert all(move.any() for move in moves(network, optimizer).values())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_optimizer_goes_on_to_the_bit(channels_last):
    """… also with weights in another memory layout, which rounds differently at most."""
    networks, optimizers_ = [tiny(), tiny()], []
    networks[1] = networks[1].to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for network in networks:
        optimizers_.append(build(network))
    for seed in (0, 1):
        put_gradients(networks[0], seed=seed)
        optimizers_[0].step()
    networks[1].load_state_dict(networks[0].state_dict())
    checkpoints.restore({"optimizer": optimizers_[1]}, {"data": "", "optimizer": copy.deepcopy(optimizers_[0].state_dict())}, "file", "")
    results = []
    for network, optimizer in zip(networks, optimizers_, strict=True):
        for one, other in zip(network.parameters(), networks[0].parameters(), strict=True):
            one.grad = torch.empty_like(one).copy_(torch.linspace(-1, 1, other.numel()).view(other.shape))
        results.append(moves(network, optimizer))
    for name, move in results[0].items():
        assert torch.equal(move, results[1][name]) or (channels_last and results[1][name].numpy() == approx(move.numpy(), abs=1e-6)), name
    assert optimizers_[1].adam.state is optimizers_[1].state


def test_the_schedule_moves_both_groups():
    network = tiny()
    config = Config(optimizer="muon", schedule="cosine", epochs=1, steps_per_epoch=2)
    optimizer = optimizers.build_optimizer(network, config)
    schedule = optimizers.build_schedule(optimizer, config)
    put_gradients(network)
    first = moves(network, optimizer)
    schedule.step()
    put_gradients(network)
    second = moves(network, optimizer)  # in the middle of the cosine
    for name in (CONVOLUTION, "conv1.bias"):
        assert (second[name].norm() / first[name].norm()).item() == approx(0.5, rel=0.01), name
