"""The optimizer of a supernet: table entries live in their own time, weights as in AdamW; the schedule."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eqnet.nn.supernet import Supernet
from eqnet.training.optimizer import SupernetAdamW, cosine, parameter_groups

LR = 0.01


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_sizes(*shape: int, seed: int = 0) -> Tensor:
    """So large that no update reaches a tenth of them."""
    return 10 + normal(*shape, seed=seed)


def table_optimizer(table: nn.Parameter, **kwargs: float) -> SupernetAdamW:
    return SupernetAdamW([{"params": [table], "per_entry": True, "lr": LR}], **kwargs)


def moments(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = optimizer.state[p]
    return state["exp_avg"].clone(), state["exp_avg_sq"].clone()


def test_entries_without_gradient_rest_and_keep_their_moments():
    table = nn.Parameter(step_sizes(6))
    optimizer = table_optimizer(table, weight_decay=0.5)
    for seed in range(3):
        table.grad = normal(6, seed=seed)
        optimizer.step()
    resting = torch.tensor([True, False, True, False, False, True])
    value, (first, second) = table.detach().clone(), moments(optimizer, table)
    for seed in range(5):
        table.grad = normal(6, seed=10 + seed) * ~resting
        optimizer.step()
    later_first, later_second = moments(optimizer, table)
    assert torch.equal(table[resting], value[resting])
    assert torch.equal(later_first[resting], first[resting])
    assert torch.equal(later_second[resting], second[resting])
    assert (table[~resting] != value[~resting]).all()


@settings(max_examples=25)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=30), st.integers(0, 100))
def test_each_entry_follows_adam_run_only_on_the_steps_that_selected_it(selected, seed):
    table = nn.Parameter(step_sizes(4, seed=seed))
    singles = [nn.Parameter(table.detach()[i : i + 1].clone()) for i in range(4)]
    adams = [torch.optim.Adam([p], lr=LR) for p in singles]
    optimizer = table_optimizer(table)
    for step, chosen in enumerate(selected):
        grad = normal(4, seed=1000 * seed + step)
        table.grad = grad * torch.tensor(chosen)
        optimizer.step()
        for i in range(4):
            if chosen[i]:
                singles[i].grad = grad[i : i + 1].clone()
                adams[i].step()
    torch.testing.assert_close(table.detach(), torch.cat(singles).detach(), rtol=0, atol=1e-5)


def test_first_update_of_an_entry_has_full_size_however_late():
    """Bias correction counts the entry's own updates: the first step of Adam is lr * sign(gradient)."""
    table = nn.Parameter(torch.ones(2))
    optimizer = table_optimizer(table)
    for _ in range(50):
        table.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
    table.grad = torch.tensor([0.0, -0.3])
    optimizer.step()
    assert table[1].item() - 1 == pytest.approx(LR, rel=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_are_updated_as_by_adamw(weight_decay):
    ours = [nn.Parameter(normal(4, 3)), nn.Parameter(normal(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    table = nn.Parameter(step_sizes(3))
    optimizer = SupernetAdamW(
        [{"params": ours, "lr": LR, "weight_decay": weight_decay}, {"params": [table], "per_entry": True, "lr": LR}]
    )
    reference = torch.optim.AdamW(theirs, lr=LR, weight_decay=weight_decay, fused=True)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = normal(*p.shape, seed=step) * (step % 3 != 0)  # zero gradients are steps, too
            q.grad = p.grad.clone()
        table.grad = normal(3, seed=step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_table_without_gradient_is_left_out():
    table, other = nn.Parameter(step_sizes(3)), nn.Parameter(step_sizes(3))
    before = table.detach().clone()
    optimizer = SupernetAdamW([{"params": [table, other], "per_entry": True, "lr": LR}])
    other.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(table, before)
    torch.testing.assert_close(other.detach(), step_sizes(3) - LR)


def test_learning_rate_of_a_table_can_change_between_steps():
    table = nn.Parameter(torch.ones(1))
    optimizer = table_optimizer(table)
    for factor in (1.0, 0.5, 0.0):
        optimizer.param_groups[0]["lr"] = LR * factor
        table.grad = torch.ones(1)
        optimizer.step()
    assert table.item() == pytest.approx(1 - 1.5 * LR, rel=1e-6)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    weight, table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SupernetAdamW([{"params": [weight]}, {"params": [table], "per_entry": True}], lr=LR)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight.square() + table.square()).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert optimizer.step(closure) < 4.0
    assert (weight < 1).all()
    assert (table < 1).all()


def test_stored_state_continues_the_same_trajectory():
    def build() -> tuple[list[nn.Parameter], SupernetAdamW]:
        parameters = [nn.Parameter(normal(3, 2)), nn.Parameter(step_sizes(4))]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "per_entry": True}]
        return parameters, SupernetAdamW(groups, lr=LR)

    def train(parameters: list[nn.Parameter], optimizer: SupernetAdamW, steps: range) -> None:
        for step in steps:
            parameters[0].grad = normal(3, 2, seed=step)
            parameters[1].grad = normal(4, seed=step) * (normal(4, seed=100 + step) > 0)
            optimizer.step()

    straight, optimizer = build()
    train(straight, optimizer, range(10))
    first, optimizer = build()
    train(first, optimizer, range(5))
    stored = copy.deepcopy(optimizer.state_dict())
    resumed, optimizer = build()
    for p, q in zip(resumed, first, strict=True):
        p.data.copy_(q.data)
    optimizer.load_state_dict(stored)
    assert optimizer.param_groups[1]["per_entry"]
    train(resumed, optimizer, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(resumed, straight, strict=True))


def test_groups_hold_every_trained_parameter_once_and_decay_only_matrices(cnn):
    supernet = Supernet.from_model(cnn, (3, 8, 8), bits=[2, 8], symmetric=[True])
    groups = parameter_groups(supernet, supernet.step_sizes(), lr=0.1, step_size_lr=0.02, weight_decay=0.3)
    held = [p for g in groups for p in g["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in supernet.parameters() if p.requires_grad}
    tables = {id(p) for p in supernet.step_sizes()}
    for group in groups:
        assert group["peak_lr"] == group["lr"]
        is_table = {id(p) in tables for p in group["params"]}
        assert is_table == {group.get("per_entry", False)}
        assert group["lr"] == (0.02 if is_table == {True} else 0.1)
        decayed = {p.ndim > 1 and id(p) not in tables for p in group["params"]}
        assert decayed == {group["weight_decay"] == 0.3}


def test_float_models_have_no_table_group(cnn):
    groups = parameter_groups(cnn, [], lr=0.1, step_size_lr=0.02, weight_decay=0.0)
    assert not any(g.get("per_entry") for g in groups)
    assert all(g["params"] for g in groups)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("total", [1, 2, 50, 1000])
def test_schedule_starts_at_the_peak_and_ends_near_zero(total, warmup):
    factors = [cosine(step, total, warmup) for step in range(total)]
    assert all(0 <= f <= 1 for f in factors)
    if total > warmup:
        assert max(factors) == 1.0
        assert factors[min(warmup, total - 1)] == 1.0
    if total > warmup + 40:
        assert factors[-1] < 0.005
    assert cosine(total, total, min(warmup, total)) == pytest.approx(0.0 if total > warmup else 1.0, abs=1e-12)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)


def test_warm_up_is_linear_and_joins_the_cosine():
    factors = [cosine(step, 110, 10) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[60] == pytest.approx(0.5)
    assert factors[35] == pytest.approx(0.5 + math.sqrt(0.125))


def test_step_sizes_stay_positive_and_change_by_a_tenth_at_most():
    start = torch.tensor([1e-4, 2e-3, 0.5])
    for sign in (1.0, -1.0):
        table = nn.Parameter(start.clone())
        optimizer = SupernetAdamW([{"params": [table], "per_entry": True, "lr": 1e-2}])
        before = table.detach().clone()
        for _ in range(50):
            table.grad = torch.full_like(table, sign)
            optimizer.step()
            change = (table.detach() / before - 1).abs()
            assert (table > 0).all()
            assert change.max() <= 0.1 + 1e-6
            before = table.detach().clone()
        assert ((start - before) * sign > 0).all()  # each entry went where its gradient pointed
