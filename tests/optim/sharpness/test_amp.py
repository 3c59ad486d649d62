"""Oracles of adversarial model perturbation: the base optimizer, a quadratic by hand, and the limit of a large step."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import seeded_init
from perturbkit.optim import AMP, amp_loss


def bowl(dtype=torch.float64, seed=0):
    """Two tensors, a quadratic loss of both, and its Hessian."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 6, generator=g, dtype=dtype)
    hessian = a @ a.T / 6 + torch.eye(6, dtype=dtype) / 4
    w, v = (nn.Parameter(torch.randn(n, generator=g, dtype=dtype)) for n in (2, 4))

    def closure(optimizer=None):
        for p in (w, v):
            p.grad = None
        both = torch.cat([w, v])
        loss = both @ hessian @ both / 2
        loss.backward()
        return loss

    return (w, v), closure, hessian


def flat(weights):
    return torch.cat([w.detach().flatten() for w in weights])


def trained(dtype, **options):
    weights, closure, _ = bowl(dtype)
    optimizer = AMP(weights, lr=0.1, **options)
    for _ in range(3):
        optimizer.step(closure)
    return flat(weights)


EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype, radius=0.3),
    refusals=(
        (lambda: AMP([nn.Parameter(torch.ones(1))], radius=-1.0), "radius is -1"),
        (lambda: AMP([nn.Parameter(torch.ones(1))], inner_lr=-1.0), "inner_lr is -1"),
        (lambda: AMP([nn.Parameter(torch.ones(1))], inner_steps=0), "inner_steps is 0"),
        (lambda: AMP([nn.Parameter(torch.ones(1))], lr=0.1).step(None), "closure is None"),
        (lambda: amp_loss(lambda: 0.0, [torch.ones(1)], 1.0), "params has none"),
        (lambda: amp_loss(lambda: torch.ones(2), [torch.ones(2, requires_grad=True)], 1.0), "shape"),
    ),
)


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"inner_lr": 0.0}], ids=["radius", "rate"])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_without_a_perturbation_it_is_the_base_optimizer(options, per_tensor):
    weights, closure, _ = bowl()
    plain = torch.optim.SGD(weights, lr=0.1)
    for _ in range(3):
        closure()
        plain.step()
    assert torch.equal(trained(torch.float64, per_tensor=per_tensor, **options), flat(weights))


@pytest.mark.parametrize("steps", [1, 3])
def test_inside_the_ball_of_a_quadratic_the_gradient_is_a_polynomial_of_the_hessian(steps):
    weights, closure, hessian = bowl(seed=1)
    before = flat(weights)
    AMP(weights, lr=1.0, radius=1e6, inner_lr=0.1, inner_steps=steps).step(closure)
    # Each step multiplies w + delta by (I + inner_lr H) and adds what delta has not of w.
    shift = torch.zeros_like(before)
    for _ in range(steps):
        shift = shift + 0.1 * hessian @ (before + shift)
    torch.testing.assert_close(before - flat(weights), hessian @ (before + shift))
    if steps == 1:
        torch.testing.assert_close(before - flat(weights), hessian @ (before + 0.1 * hessian @ before))


@pytest.mark.parametrize("per_tensor", [True, False])
def test_a_large_step_jumps_to_the_sphere(per_tensor):
    weights, closure, hessian = bowl(seed=2)
    before = flat(weights)
    AMP(weights, lr=1.0, radius=0.3, inner_lr=1e9, per_tensor=per_tensor).step(closure)
    g = hessian @ before
    parts = g.split([2, 4]) if per_tensor else [g]
    shift = torch.cat([0.3 * part / part.norm() for part in parts])
    torch.testing.assert_close(before - flat(weights), hessian @ (before + shift))


def test_several_steps_are_projected_after_each():
    weights, closure, hessian = bowl(seed=3)
    before = flat(weights)
    AMP(weights, lr=1.0, radius=0.2, inner_lr=0.5, inner_steps=4, per_tensor=False).step(closure)
    shift = torch.zeros_like(before)
    for _ in range(4):
        shift = shift + 0.5 * hessian @ (before + shift)
        shift = shift * min(1.0, 0.2 / float(shift.norm()))
    torch.testing.assert_close(before - flat(weights), hessian @ (before + shift))


def test_the_loss_found_lies_between_the_loss_and_the_maximum_over_the_ball():
    weights, closure, hessian = bowl(seed=4)
    before = flat(weights)
    here = closure().item()
    found = amp_loss(
        lambda: torch.cat(weights) @ hessian @ torch.cat(weights) / 2,
        weights,
        0.5,
        0.3,
        200,
        per_tensor=False,
    )
    # The maximum of the quadratic over the ball, on a fine grid of multipliers of its boundary problem.
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ (hessian @ before)
    lams = values[-1] * (1 + torch.logspace(-9, 3, 200_001, dtype=torch.float64))
    norms = (g / (lams[:, None] - values)).norm(dim=1)
    delta = vectors @ (g / (lams[(norms - 0.5).abs().argmin()] - values))
    most = ((before + delta) @ hessian @ (before + delta) / 2).item()
    assert here < found <= most * (1 + 1e-4)
    assert found == pytest.approx(most, rel=1e-3)
    assert torch.equal(flat(weights), before)


def test_running_statistics_move_once_and_dropout_masks_are_the_same():
    def train(wrap):
        with seeded_init(3):
            net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 1))
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        optimizer = wrap(net)

        def closure():
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            optimizer.step(closure)
        return net

    plain = train(lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    none = train(lambda net: AMP(net.parameters(), lr=0.1, radius=0.0, model=net))
    far = train(lambda net: AMP(net.parameters(), lr=0.1, radius=0.5, model=net))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), none.state_dict().values(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), far.buffers(), strict=True))
    assert not torch.equal(plain[0].weight, far[0].weight)


def test_frozen_and_sparse_parameters():
    with seeded_init(0):
        table = nn.Embedding(5, 3, sparse=True)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = AMP([table.weight, frozen], lr=0.1, radius=0.1)
    before = table.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (table(torch.tensor([1, 3])) * frozen).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = (table.weight != before).any(1)
    assert moved.tolist() == [False, True, False, True, False]
    assert (frozen == 1).all()


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    (weights, closure, _), (others, other, _) = bowl(), bowl()
    one, two = (AMP(w, torch.optim.Adam, lr=0.05, radius=0.2) for w in (weights, others))
    schedule = torch.optim.lr_scheduler.StepLR(one, 2, 0.5)
    for _ in range(4):
        one.step(closure)
        schedule.step()
    with torch.no_grad():
        for a, b in zip(others, weights, strict=True):
            a.copy_(b)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(closure)
        two.step(other)
    assert torch.equal(flat(weights), flat(others))


def test_weights_come_back_when_the_closure_fails():
    weights, closure, _ = bowl()
    before = flat(weights)
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise checks.ModelError("lost")
        return closure()

    with pytest.raises(checks.ModelError):
        AMP(weights, lr=0.1).step(failing)
    assert torch.equal(flat(weights), before)


def test_the_ball_of_half_precision_weights_is_measured_in_single():
    w = torch.full((16,), 1.0, dtype=torch.float16, requires_grad=True)
    seen = []

    def loss():
        seen.append(w.detach().double().clone())
        return (w.float() * 6e4).sum() / 2

    amp_loss(loss, [w], 0.5, inner_lr=1.0)
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(0.5, rel=2e-3)


def test_a_loss_without_a_graph_is_told_and_the_weights_are_as_before():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(checks.ModelError, match="without a graph"):
        amp_loss(lambda: 3.0, [w], 0.5)
    assert (w == 1).all()
