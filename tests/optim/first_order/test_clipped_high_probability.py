"""Oracles of clipped methods: their unclipped limits, the accelerated bound, step lengths, and the schedules."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import (
    ClippedSGD,
    alpha_stable_noise,
    clip_schedule,
    minimize_clipped_sstm,
    solve_clipped_seg,
    solve_clipped_sgda,
)

P = nn.Parameter


def bowl(dtype=torch.float64, seed=0, d=6):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=dtype)
    return a @ a.T / d, torch.randn(d, generator=g, dtype=dtype)


def small(dtype):
    hessian, x0 = bowl(dtype)
    return minimize_clipped_sstm(lambda x: x @ hessian, x0, lipschitz=3.0, clip=0.5, iters=4)


ONE = torch.ones(2)
SCHEDULE = {"alpha": 1.5, "sigma": 1.0, "distance": 1.0, "lipschitz": 1.0, "iters": 10, "failure_prob": 0.1}
EXAMPLE = Example(
    call=lambda generator, dtype: small(dtype),
    refusals=(
        (lambda: ClippedSGD([P(ONE)], lr=-1.0, clip=1.0), "lr is -1"),
        (lambda: ClippedSGD([P(ONE)], lr=1.0, clip=0.0), "clip is 0"),
        (lambda: ClippedSGD([P(ONE)], lr=1.0, clip=[]), "clip is empty"),
        (lambda: minimize_clipped_sstm(abs, ONE, lipschitz=0.0, clip=1.0), "lipschitz is 0"),
        (lambda: minimize_clipped_sstm(abs, ONE, lipschitz=1.0, clip=1.0, a=0.5), "a is 0.5"),
        (lambda: minimize_clipped_sstm(abs, ONE, lipschitz=1.0, clip=1.0, iters=0), "iters is 0"),
        (lambda: solve_clipped_seg(abs, ONE, step=0.0, clip=1.0), "step is 0"),
        (lambda: solve_clipped_sgda(abs, ONE, step=1.0, clip=-1.0), "clip is -1"),
        (lambda: solve_clipped_seg(abs, torch.ones(1, 1, 1), step=1.0, clip=1.0), "x0"),
        (lambda: clip_schedule("linear", **SCHEDULE), "setting is 'linear'"),
        (lambda: clip_schedule("convex", **SCHEDULE | {"alpha": 1.0}), "alpha is 1"),
        (lambda: clip_schedule("strongly_convex", **SCHEDULE), "strong_convexity is None"),
        (lambda: alpha_stable_noise(1.0, (2,)), "alpha is 1"),
    ),
)


def test_constant_clipping_is_torchs():
    g = torch.Generator().manual_seed(0)
    (w, v), (a, b) = [(P(torch.ones(3)), P(torch.ones(2))) for _ in range(2)]
    ours, plain = ClippedSGD([w, v], lr=0.1, clip=0.7), torch.optim.SGD([a, b], lr=0.1)
    for scale in (0.01, 1.0, 100.0):
        w.grad, v.grad = scale * torch.randn(3, generator=g), scale * torch.randn(2, generator=g)
        a.grad, b.grad = w.grad.clone(), v.grad.clone()
        before = torch.cat([w, v]).detach()
        nn.utils.clip_grad_norm_([a, b], 0.7)
        ours.step()
        plain.step()
        assert (torch.cat([w, v]).detach() - before).norm() <= 0.07 * (1 + 1e-5)
    torch.testing.assert_close(torch.cat([w, v]), torch.cat([a, b]), rtol=1e-5, atol=1e-6)


def test_levels_may_change_by_the_step_and_the_last_is_kept():
    w = P(torch.zeros(1))
    optimizer = ClippedSGD([w], lr=1.0, clip=[3.0, 1.0])
    moves = []
    for _ in range(4):
        before = w.item()
        w.grad = torch.tensor([100.0])
        optimizer.step()
        moves.append(before - w.item())
    assert moves == pytest.approx([3.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("a", [1.0, 4.0])
def test_similar_triangles_keep_the_accelerated_bound(a):
    hessian, x0 = bowl(seed=1)
    smooth = float(torch.linalg.eigvalsh(hessian)[-1])
    for k in (1, 5, 40):
        found = minimize_clipped_sstm(
            lambda x: x @ hessian, x0, lipschitz=smooth, clip=math.inf, a=a, iters=k
        )
        gap = float(found.x @ hessian @ found.x) / 2
        assert gap <= 2 * a * smooth * float(x0 @ x0) / (k * (k + 3)) * (1 + 1e-12)
        assert found.cost.ngrad == k


def test_clipping_bounds_the_moves_of_similar_triangles():
    hessian, x0 = bowl(seed=2)
    found = minimize_clipped_sstm(lambda x: 1e6 * (x @ hessian), x0, lipschitz=1.0, clip=0.25, iters=1)
    torch.testing.assert_close((found.x - x0).norm(), torch.tensor(0.25, dtype=torch.float64))


def test_extragradient_written_out_and_its_rate_on_a_bilinear_game():
    def game(x):
        return torch.stack([x[:, 1], -x[:, 0]], 1)

    x0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    step = torch.eye(2) - 0.2 * turn @ (torch.eye(2) - 0.2 * turn)
    found = solve_clipped_seg(game, x0, step=0.2, clip=math.inf, iters=7)
    torch.testing.assert_close(found.x, torch.linalg.matrix_power(step.double(), 7) @ x0)
    away = solve_clipped_sgda(game, x0, step=0.2, clip=math.inf, iters=50)
    assert away.x.norm() > x0.norm()
    assert solve_clipped_seg(game, x0, step=0.2, clip=math.inf, iters=300).x.norm() < 1e-2


def test_descent_ascent_is_descent_and_runs_are_rows():
    hessian, x0 = bowl(seed=3)
    rows = torch.stack([x0, 10 * x0])
    found = solve_clipped_sgda(lambda x: x @ hessian, rows, step=0.1, clip=[2.0, 1.0], iters=3)
    x = rows
    for level in (2.0, 1.0, 1.0):
        g = x @ hessian
        x = x - 0.1 * g * (level / g.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(found.x, x)
    assert found.history.shape == (3, 2)


def test_heavy_tails_throw_descent_out_and_not_its_clipped_form():
    g = torch.Generator().manual_seed(0)

    def noisy(x):
        return x + alpha_stable_noise(1.5, x.shape, generator=g, dtype=x.dtype)

    x0 = torch.ones(2000, 5, dtype=torch.float64)
    clipped = solve_clipped_sgda(noisy, x0, step=0.02, clip=3.0, iters=400).x.norm(dim=1)
    plain = solve_clipped_sgda(noisy, x0, step=0.02, clip=math.inf, iters=400).x.norm(dim=1)
    assert clipped.quantile(0.999) < 0.3 * plain.quantile(0.999)


def test_noise_has_its_tails():
    x = alpha_stable_noise(1.5, (400_000,), generator=0, dtype=torch.float64)
    for level in (3.0, 10.0, 30.0):
        share = (x.abs() > level).double().mean().item()
        assert share == pytest.approx((1 + level) ** -1.5, rel=0.1)
    assert abs((x > 0).double().mean().item() - 0.5) < 0.005


def test_schedules_scale_as_the_theory_says():
    def step(setting, **options):
        return clip_schedule(setting, **SCHEDULE | {"strong_convexity": 0.1} | options)

    for alpha in (1.3, 2.0):
        one, two = (step("convex", alpha=alpha, iters=n) for n in (10**6, 10**8))
        logs = math.log(4e7) / math.log(4e9)
        want = 100 ** (-1 / alpha) * logs ** ((alpha - 1) / alpha)
        assert two[0] / one[0] == pytest.approx(want, rel=1e-6)
        # The level times the step is the distance over forty logarithms.
        assert two[0] * two[1][0] == pytest.approx(1 / (40 * math.log(4e9)))
    assert step("convex", sigma=0.0)[0] == pytest.approx(1 / (80 * math.log(400)))
    rate, levels = step("strongly_convex", iters=50)
    assert len(levels) == 50
    assert all(a > b for a, b in pairwise(levels))
    assert levels[2] / levels[0] == pytest.approx(math.exp(-rate * 0.1))
    a, reach = step("accelerated")
    assert a >= 1
    assert reach == [1 / (30 * math.log(400))]
    assert step("convex", factor=3.0)[0] == pytest.approx(3 * step("convex")[0])


def test_frozen_and_sparse_parameters_states_and_schedulers():
    table = nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
    w, frozen = P(torch.ones(3)), P(torch.ones(2), requires_grad=False)
    optimizer = ClippedSGD([w, frozen, *table.parameters()], lr=0.1, clip=[2.0, 1.0, 0.5])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    (w.sum() + table(torch.tensor([1])).sum() + frozen.sum()).backward()
    optimizer.step()
    schedule.step()
    v = P(w.detach().clone())
    copied = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, sparse=True)
    other = ClippedSGD(
        [v, P(torch.ones(2), requires_grad=False), *copied.parameters()], lr=0.1, clip=[2.0, 1.0, 0.5]
    )
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    v.grad, copied.weight.grad = w.grad.clone(), table.weight.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(w, v)
    assert (table.weight != 1).any(1).tolist() == [False, True, False, False]


def test_half_precision_gradients_are_clipped_whatever_their_norm():
    w = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    w.grad = torch.full((100,), 3e4, dtype=torch.float16)  # its norm is beyond half precision
    ClippedSGD([w], lr=1.0, clip=2.0).step()
    assert float(w.detach().double().norm()) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: minimize_clipped_sstm(lambda x: 3, torch.ones(2), lipschitz=1.0, clip=1.0),
            "grad answered a int",
        ),
        (
            lambda: solve_clipped_seg(lambda x: x[:, :1], torch.ones(2), step=1.0, clip=1.0),
            "operator answered shape",
        ),
        (
            lambda: solve_clipped_sgda(lambda x: x[0], torch.ones(2), step=1.0, clip=1.0),
            "operator answered shape",
        ),
        (lambda: ClippedSGD([nn.Parameter(torch.ones(1))], 0.1, torch.ones(2)), "clip is Tensor"),
    ],
    ids=["gradient", "extragradient", "ascent", "levels"],
)
def test_answers_and_levels_of_another_kind_are_refused(call, match):
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
