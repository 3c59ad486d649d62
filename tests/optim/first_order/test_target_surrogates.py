"""Oracles of target-based surrogates: one plain step, least squares, and a bound of the loss from above."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.optim import SSO

P = nn.Parameter


def regression(dtype=torch.float64, seed=0, n=12, d=3):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(n, generator=g, dtype=dtype)
    w = P(torch.randn(d, generator=g, dtype=dtype))
    return x, y, w


def square(y):
    return lambda z: (z - y).square().mean() / 2


def trained(dtype):
    x, y, w = regression(dtype)
    optimizer = SSO([w], target_lr=1.0, inner_steps=5)
    for _ in range(3):
        optimizer.step(lambda: x @ w, square(y))
    return w.detach()


W = P(torch.ones(2))
EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: SSO([W], "newton"), "inner_optimizer is 'newton'"),
        (lambda: SSO([W], 3), "inner_optimizer is a int"),
        (lambda: SSO([W], target_lr=0.0), "target_lr is 0"),
        (lambda: SSO([W], inner_steps=0), "inner_steps is 0"),
        (lambda: SSO([W], schedule="cosine"), "schedule is 'cosine'"),
        (lambda: SSO([W], divergence="hinge"), "divergence is 'hinge'"),
        (lambda: SSO([W]).step(3, abs), "model_fn is a int"),
        (lambda: SSO([W]).step(lambda: W, 3), "loss_fn is a int"),
        (lambda: SSO([W]).step(lambda: W, lambda z: z), "the closure's loss"),
    ),
)


def test_one_plain_step_inside_is_gradient_descent():
    x, y, w = regression(seed=1)
    v = P(w.detach().clone())
    frozen = P(torch.ones(1), requires_grad=False)
    ours = SSO([w, frozen], torch.optim.SGD, target_lr=0.3, inner_steps=1, lr=0.05)
    plain = torch.optim.SGD([v], lr=0.05)
    for _ in range(4):
        loss = ours.step(lambda: torch.tanh(x @ w), square(y))
        plain.zero_grad()
        other = square(y)(torch.tanh(x @ v))
        other.backward()
        plain.step()
        assert loss.item() == pytest.approx(other.item(), rel=1e-9)
    torch.testing.assert_close(w, v)
    assert ours.oracle_calls == 4


@pytest.mark.parametrize("inner", ["lbfgs", "armijo-gd"])
def test_a_linear_model_of_squared_loss_is_solved_by_one_gradient(inner):
    x, y, w = regression(seed=2)
    optimizer = SSO([w], inner, target_lr=1.0, inner_steps=400)
    optimizer.step(lambda: x @ w, square(y))
    torch.testing.assert_close(
        w.detach(), torch.linalg.lstsq(x, y[:, None]).solution[:, 0], rtol=1e-5, atol=1e-6
    )
    assert optimizer.oracle_calls == 1


@pytest.mark.parametrize("divergence", ["euclidean", "kl"])
def test_the_surrogate_touches_the_loss_and_is_nowhere_below_it(divergence):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (20,), generator=g)
    w = P(torch.randn(4, 3, generator=g, dtype=torch.float64))

    def loss(z):
        return nn.functional.cross_entropy(z, y)

    seen = []

    class Spy(torch.optim.SGD):
        """Evaluates the surrogate at many weights instead of stepping."""

        def step(self, closure):
            start = w.detach().clone()
            for k in range(300):
                with torch.no_grad():
                    w.copy_(start + (k / 100) * torch.randn(4, 3, generator=g, dtype=torch.float64))
                seen.append((float(closure().detach()), float(loss(x @ w).detach())))
            with torch.no_grad():
                w.copy_(start)

    SSO([w], Spy, target_lr=1.0, inner_steps=1, divergence=divergence, lr=1.0).step(lambda: x @ w, loss)
    assert seen[0][0] == pytest.approx(seen[0][1])
    assert all(above >= below - 1e-12 for above, below in seen)
    if divergence == "kl":
        # Cross-entropy is a Bregman divergence of this kind itself: the surrogate is the loss.
        assert all(above == pytest.approx(below, rel=1e-9) for above, below in seen)
    else:
        assert any(above > below + 0.1 for above, below in seen)


@pytest.mark.parametrize("inner", ["armijo-gd", "lbfgs", torch.optim.Adam], ids=["armijo", "lbfgs", "adam"])
def test_each_step_descends_the_loss(inner):
    x, y, w = regression(seed=4)
    optimizer = SSO(
        [w], inner, target_lr=0.8, inner_steps=5, **({"lr": 0.02} if inner is torch.optim.Adam else {})
    )
    losses = [optimizer.step(lambda: torch.tanh(x @ w), square(y)).item() for _ in range(30)]
    assert losses[-1] < losses[0]
    if inner is not torch.optim.Adam:
        assert all(a >= b - 1e-12 for a, b in pairwise(losses))


def test_schedules_shrink_the_steps_in_the_outputs():
    moves = {}
    for schedule in ("constant", "sqrt", "inverse"):
        z = P(torch.zeros(1, dtype=torch.float64))
        optimizer = SSO([z], "lbfgs", target_lr=0.1, inner_steps=50, schedule=schedule)
        last = 0.0
        for _ in range(4):
            optimizer.step(lambda z=z: z, lambda out: -out.sum())
            moves.setdefault(schedule, []).append(z.item() - last)
            last = z.item()
    assert moves["constant"] == pytest.approx([0.1] * 4)
    assert moves["sqrt"] == pytest.approx([0.1 * t**-0.5 for t in range(1, 5)])
    assert moves["inverse"] == pytest.approx([0.1 / t for t in range(1, 5)])


def test_training_goes_on_bit_for_bit_and_schedulers_work():
    x, y, w = regression(seed=5)
    v = P(w.detach().clone())
    one, two = (SSO([p], target_lr=0.5, inner_steps=3, schedule="sqrt") for p in (w, v))
    schedule = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
    one.step(lambda: x @ w, square(y))
    schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(lambda: x @ w, square(y))
        two.step(lambda: x @ v, square(y))
    assert torch.equal(w, v)
