"""Oracles of AdaGrad step sizes: torch's Adagrad in one dimension, an exact inequality, equivariance, and its bounds."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import AdaGradNorm, adagrad_norm_bound, affine_noise, high_probability_experiment

P = nn.Parameter


def bowl(dtype=torch.float64, seed=0, d=5):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=dtype)
    return a @ a.T / d, P(torch.randn(d, generator=g, dtype=dtype))


def run(optimizer, w, hessian, steps=5, factor=1.0):
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * (w @ hessian @ w) / 2).backward()
        norms.append(float(w.grad.square().sum()))
        optimizer.step()
    return norms


def trained(dtype):
    hessian, w = bowl(dtype)
    run(AdaGradNorm([w]), w, hessian)
    return w.detach()


BOUND = {"smoothness": 1.0, "gap_or_distance": 1.0, "lr": 1.0, "initial": 0.1, "sigma0": 0.0, "sigma1": 0.0,
         "steps": 10, "failure_prob": 0.1}  # fmt: skip
EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: AdaGradNorm([P(torch.ones(1))], lr=0.0), "lr is 0"),
        (lambda: AdaGradNorm([P(torch.ones(1))], initial=0.0), "initial is 0"),
        (lambda: adagrad_norm_bound("both", **BOUND), "kind is 'both'"),
        (lambda: adagrad_norm_bound("convex", **BOUND | {"smoothness": 0.0}), "smoothness is 0"),
        (lambda: adagrad_norm_bound("convex", **BOUND | {"sigma1": -1.0}), "sigma1 is -1"),
        (lambda: adagrad_norm_bound("convex", **BOUND | {"steps": 0}), "steps is 0"),
        (lambda: adagrad_norm_bound("convex", **BOUND | {"failure_prob": 1.0}), "failure_prob is 1"),
        (lambda: affine_noise(torch.ones(2), -1.0, 0.0), "sigma0 is -1"),
        (lambda: high_probability_experiment(abs, torch.ones(2), runs=0, steps=1, lr=1.0), "runs is 0"),
        (lambda: high_probability_experiment(abs, torch.ones(2), runs=1, steps=0, lr=1.0), "steps is 0"),
        (lambda: high_probability_experiment(abs, torch.ones(2), runs=1, steps=1, lr=1.0, levels=(2.0,)), "levels is 2"),
    ),
)  # fmt: skip


def test_in_one_dimension_it_is_torchs_adagrad():
    w, v = P(torch.tensor([2.0], dtype=torch.float64)), P(torch.tensor([2.0], dtype=torch.float64))
    hessian = torch.tensor([[3.0]], dtype=torch.float64)
    run(AdaGradNorm([w], lr=0.4, initial=0.3), w, hessian, 20)
    run(torch.optim.Adagrad([v], lr=0.4, initial_accumulator_value=0.09, eps=0), v, hessian, 20)
    torch.testing.assert_close(w, v, rtol=1e-9, atol=0)


def test_two_steps_share_one_rate_over_all_tensors():
    w, v = P(torch.tensor([3.0])), P(torch.tensor([4.0, 0.0]))
    optimizer = AdaGradNorm([w, v], lr=1.0, initial=1.0)
    for _ in range(2):
        w.grad, v.grad = torch.tensor([3.0]), torch.tensor([4.0, 0.0])
        optimizer.step()
    move = 1 / math.sqrt(1 + 25) + 1 / math.sqrt(1 + 50)
    torch.testing.assert_close(w.detach(), torch.tensor([3 - 3 * move]))
    torch.testing.assert_close(v.detach(), torch.tensor([4 - 4 * move, 0]))
    own = AdaGradNorm([w, v], lr=1.0, initial=1e-9, per_parameter=True)
    before = w.detach().clone(), v.detach().clone()
    own.step()
    torch.testing.assert_close(before[0] - w.detach(), torch.ones(1))
    torch.testing.assert_close(before[1] - v.detach(), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("lr", [0.1, 3.0])
def test_the_sum_of_squared_steps_is_below_its_logarithm_at_every_step(lr):
    hessian, w = bowl(seed=1)
    norms = torch.tensor(run(AdaGradNorm([w], lr=lr, initial=0.2), w, hessian, 60), dtype=torch.float64)
    total = norms.cumsum(0)
    steps = (lr**2 * norms / (0.04 + total)).cumsum(0)
    assert (steps <= lr**2 * torch.log1p(total / 0.04) + 1e-12).all()


def test_the_scale_of_the_loss_does_not_matter():
    (hessian, w), (_, v) = bowl(seed=2), bowl(seed=2)
    run(AdaGradNorm([w], initial=0.1), w, hessian, 10)
    run(AdaGradNorm([v], initial=100.0), v, hessian, 10, factor=1000.0)
    torch.testing.assert_close(w, v, rtol=1e-9, atol=1e-12)


def test_noise_is_unbiased_and_of_the_stated_size():
    g = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    noisy = affine_noise(g.expand(40_000, 3), 2.0, 0.5, generator=0)
    square = (noisy - g).square().sum(1)
    torch.testing.assert_close(square, torch.full_like(square, 4 + 0.25 * 25))
    assert (noisy.mean(0) - g).norm() < 4 * math.sqrt(10.25 / 40_000)


def test_runs_of_the_experiment_are_runs_of_the_optimizer():
    hessian, w = bowl(seed=3)
    found = high_probability_experiment(
        lambda x: x @ hessian, w.detach(), runs=3, steps=12, lr=0.7, initial=0.1
    )
    norms = torch.tensor(run(AdaGradNorm([w], lr=0.7, initial=0.1), w, hessian, 12), dtype=torch.float64)
    torch.testing.assert_close(found.quantiles[0], norms.cumsum(0) / torch.arange(1, 13))
    assert found.last[0].item() == pytest.approx((hessian @ w.detach()).square().sum().item(), rel=1e-6)


@pytest.mark.parametrize(("sigma0", "sigma1"), [(0.0, 0.0), (0.0, 1.0), (0.5, 0.3)])
@pytest.mark.parametrize("lr", [0.1, 1.0, 10.0])
def test_the_bound_covers_what_is_seen(sigma0, sigma1, lr):
    hessian, w = bowl(seed=4)
    found = high_probability_experiment(
        lambda x: x @ hessian,
        w.detach(),
        runs=200,
        steps=400,
        lr=lr,
        sigma0=sigma0,
        sigma1=sigma1,
        levels=(0.99,),
        generator=1,
    )
    bound = adagrad_norm_bound(
        "nonconvex", smoothness=float(torch.linalg.eigvalsh(hessian)[-1]), gap_or_distance=float(w.detach() @ hessian @ w.detach() / 2),
        lr=lr, initial=1e-2, sigma0=sigma0, sigma1=sigma1, steps=400, failure_prob=0.01,
    )  # fmt: skip
    assert float(found.quantiles[0, -1]) <= bound


def test_the_bounds_two_regimes():
    clean = [
        adagrad_norm_bound(k, **BOUND | {"steps": 10**n}) for k in ("convex", "nonconvex") for n in (5, 7)
    ]
    assert 60 < clean[0] / clean[1] < 100
    assert 60 < clean[2] / clean[3] < 100
    noisy = [adagrad_norm_bound("convex", **BOUND | {"steps": 10**n, "sigma0": 1.0}) for n in (9, 11)]
    assert 7 < noisy[0] / noisy[1] < 10


def test_frozen_and_sparse_parameters_states_and_schedulers():
    w, frozen = P(torch.ones(3)), P(torch.ones(2), requires_grad=False)
    table = nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
    optimizer = AdaGradNorm([w, frozen, *table.parameters()], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def gradients():
        optimizer.zero_grad()
        (w.square().sum() + table(torch.tensor([1])).sum() + frozen.sum()).backward()

    gradients()
    optimizer.step()
    schedule.step()
    assert (table.weight != 1).any(1).tolist() == [False, True, False, False]
    v, other = P(w.detach().clone()), P(torch.ones(2), requires_grad=False)
    copied = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, sparse=True)
    second = AdaGradNorm([v, other, *copied.parameters()], lr=0.5)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients()
    v.grad, copied.weight.grad = w.grad.clone(), table.weight.grad.clone()
    optimizer.step()
    second.step()
    assert torch.equal(w, v)
    assert torch.equal(table.weight, copied.weight)


def test_the_sum_goes_on_where_the_first_parameter_had_no_gradient_before():
    w, v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = AdaGradNorm([w, v], lr=1.0, initial=1.0)
    v.grad = torch.tensor([3.0])
    optimizer.step()
    w.grad, v.grad = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer.step()
    assert w.item() == pytest.approx(-1 / (1 + 9 + 2) ** 0.5)


def test_the_sum_is_loaded_in_double_precision():
    w, v = (nn.Parameter(torch.zeros(1, dtype=torch.float16)) for _ in range(2))
    one, other = (AdaGradNorm([p], lr=1.0, initial=1e-2) for p in (w, v))
    w.grad = torch.tensor([6e4], dtype=torch.float16)  # the square is beyond half precision
    one.step()
    other.load_state_dict(one.state_dict())
    assert other.state[v]["total"].dtype == torch.float64
    assert float(other.state[v]["total"]) == float(one.state[w]["total"])


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(checks.ArgumentError, match="gradient answered shape"):
        high_probability_experiment(lambda x: x[:1], torch.ones(2), runs=3, steps=1, lr=1.0)
