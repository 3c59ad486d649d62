"""Oracles of amortised inference: linear-Gaussian posteriors in closed form, small changes, densities, and training."""

import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import assign, flatten
from perturbkit.core.random import randn, uniform
from perturbkit.robust import (
    AmortizedPosterior,
    fisher_information,
    fisher_trace,
    posterior_attack,
    robustness_report,
)
from perturbkit.robust.training._densities import (
    FlowDensity,
    GaussianDensity,
    MixtureDensity,
    normal_log_prob,
)
from perturbkit.robust.training._fisher import FisherPenalty, exact_root

F64 = torch.float64
D, DX = 2, 5


def rng(seed):
    return torch.Generator().manual_seed(seed)


def prior_of(dtype=F64, d=D):
    return lambda n, generator: randn((n, d), generator=generator, dtype=dtype)


def simulator_of(dtype=F64, seed=11, noise=0.5, d=D):
    h = randn((d, DX), generator=rng(seed), dtype=dtype)
    return lambda theta, generator: (
        theta @ h + noise * randn((len(theta), DX), generator=generator, like=theta)
    )


def tiny(dtype=F64, seed=0, n=60, epochs=2, **options):
    made = AmortizedPosterior(
        simulator_of(dtype), prior_of(dtype), hidden=6, generator=options.pop("generator", seed), **options
    )
    return made.fit(n, epochs=epochs, batch_size=20)


class Linear(nn.Module):
    """A Gaussian of mean ``A x`` and one precision, with or without moments."""

    def __init__(self, a, factor, moments=True):
        super().__init__()
        self.a, self.factor = nn.Parameter(a), nn.Parameter(factor)
        if moments:
            self.moments = self._moments

    def _moments(self, x):
        return x @ self.a.T, self.factor.expand(len(x), -1, -1)

    def log_prob(self, theta, x):
        return normal_log_prob(theta, *self._moments(x))

    def sample(self, x, n, generator):
        mean, _ = self._moments(x)
        noise = randn((len(x), n, mean.shape[1]), generator=generator, like=mean)
        return mean[:, None] + noise @ torch.linalg.inv(self.factor).T


def linear(seed=3, moments=True, lr=1e-12):
    """A fitted estimator around a known density (the rate is too small to change it) and what it knows."""
    a = randn((D, DX), generator=rng(seed), dtype=F64)
    factor = torch.tensor([[1.5, 0.0], [0.7, 0.8]], dtype=F64)
    density = Linear(a, factor, moments)
    model = AmortizedPosterior(simulator_of(), prior_of(), density=density, generator=seed)
    model.fit(50, epochs=1, lr=lr)
    information = (
        density.a.detach().T @ density.factor.detach().T @ density.factor.detach() @ density.a.detach()
    )
    return model, information


def call(generator, dtype):
    model = tiny(dtype, generator=generator, density="mdn", fisher_weight=0.1)
    x = randn((3, DX), generator=rng(1), dtype=dtype)
    return {
        "weights": flatten(model.density_),
        "log_prob": model.log_prob(torch.zeros(3, D, dtype=dtype), x),
        "draws": model.sample(x, 4, generator=generator),
        "trace": fisher_trace(model, x, generator=generator),
        "attack": posterior_attack(model, x, 0.5, n_steps=3, n_restarts=3, n_samples=5, generator=generator),
    }


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: AmortizedPosterior(None, prior_of()), "simulator is a NoneType"),
        (lambda: AmortizedPosterior(simulator_of(), 3), "prior is a int"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of(), density="kde"), "density is 'kde'"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of(), density=nn.Linear(1, 1)), "density is a Linear"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of(), density="maf", estimator="exact"), "estimator is"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of()).simulate(0), "n is 0"),
        (lambda: tiny().fit((torch.zeros(20, 2),)), "tensors in simulations is 1"),
        (lambda: fisher_trace(tiny(torch.float32), torch.zeros(2, DX, dtype=F64)), "x has dtype torch.float64"),
        (
            lambda: tiny(torch.float32).log_prob(torch.zeros(2, D, dtype=F64), torch.zeros(2, DX)),
            "theta has dtype torch.float64",
        ),
        (
            lambda: posterior_attack(
                tiny(density="mdn"), torch.zeros(2, DX), 0.5, n_samples=1, direction="reverse"
            ),
            "n_samples in the reverse direction is 1",
        ),
        (lambda: posterior_attack(tiny(torch.float32), 1e6 * torch.ones(2, DX), 0.5), "information overflows in 2 of 2 rows"),
        (lambda: robustness_report(tiny(), torch.zeros(2, DX), 0.5), "epsilons has shape"),
        (lambda: robustness_report(tiny(), torch.zeros(2, DX), [0.5], norm="linf"), "norm is 'linf'"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of(), fisher_weight=-1.0), "fisher_weight is -1"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of(), hidden=0), "hidden is 0"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of()).sample(torch.zeros(1, DX)), "not fitted"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of()).fit(3), "simulations is 3"),
        (lambda: AmortizedPosterior(simulator_of(), prior_of()).fit(30, epochs=0), "epochs is 0"),
        (lambda: AmortizedPosterior(lambda t, g: t[:5], prior_of()).fit(30), "the simulator's answer"),
        (lambda: tiny().fit((torch.zeros(20, 2), torch.zeros(19, 5))), "x has shape"),
        (lambda: tiny().log_prob(torch.zeros(2, 2), torch.zeros(3, DX)), "theta has shape"),
        (lambda: tiny().log_prob(torch.zeros(0, 2), torch.zeros(0, DX)), "x is empty"),
        (lambda: fisher_trace(tiny(), torch.zeros(2, DX + 1)), "x has shape"),
        (lambda: fisher_trace(tiny(density="maf"), torch.zeros(2, DX), exact=True), "exact is True"),
        (lambda: fisher_information(tiny(), torch.zeros(2, DX), n_samples=0), "n_samples is 0"),
        (lambda: posterior_attack(tiny(), torch.zeros(2, DX), -0.5), "epsilon is -0.5"),
        (lambda: posterior_attack(tiny(), torch.zeros(2, DX), 0.5, norm="l3"), "norm is 'l3'"),
        (lambda: posterior_attack(tiny(), torch.zeros(2, DX), 0.5, direction="up"), "direction is 'up'"),
        (lambda: robustness_report(tiny(), torch.zeros(2, DX), []), "epsilons is empty"),
        (lambda: fisher_trace(nn.Linear(1, 1), torch.zeros(2, DX)), "model is a Linear"),
    ),
    stochastic=True,
)  # fmt: skip


def test_a_linear_gaussian_posterior_has_the_closed_information():
    model, information = linear()
    x = randn((4, DX), generator=rng(5), dtype=F64)
    found = fisher_information(model, x)
    assert not found.requires_grad
    torch.testing.assert_close(found, information.expand(4, -1, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fisher_trace(model, x), information.trace().expand(4), rtol=1e-9, atol=0)


def test_the_sampled_information_agrees_with_the_closed_one():
    model, information = linear(moments=False)
    x = randn((3, DX), generator=rng(5), dtype=F64)
    found = fisher_information(model, x, n_samples=40_000, generator=0)
    scale = float(information.diagonal().max())
    assert float((found - information).abs().max()) < 0.03 * scale
    traces = torch.stack([fisher_trace(model, x, n_samples=400, generator=s) for s in range(40)])
    error = traces.std() / math.sqrt(traces.numel())
    assert abs(float(traces.mean() - information.trace())) < 4 * float(error)


@pytest.mark.parametrize("seed", range(3))
def test_the_information_of_a_gaussian_is_the_curvature_of_its_divergence(seed):
    """By second derivatives of the divergence, computed from torch's own Gaussians; the factor moves too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        density = GaussianDensity(DX, 3, 7).double()
    z = randn((1, DX), generator=rng(seed), dtype=F64)

    def gaussian(point):
        mean, factor = density.moments(point[None])
        return torch.distributions.MultivariateNormal(mean[0], precision_matrix=factor[0].T @ factor[0])

    clean = gaussian(z[0])
    clean = torch.distributions.MultivariateNormal(clean.loc.detach(), clean.covariance_matrix.detach())
    curvature = torch.func.hessian(lambda p: torch.distributions.kl_divergence(clean, gaussian(p)))(z[0])
    root = exact_root(density, z, graph=False)[0]
    torch.testing.assert_close(root.T @ root, curvature.detach(), rtol=1e-6, atol=1e-8)


def test_small_changes_diverge_by_half_the_quadratic_form():
    model = tiny(epochs=20, n=400)
    x = randn((6, DX), generator=rng(5), dtype=F64)
    information = fisher_information(model, x)
    report = robustness_report(model, x, [1e-3], n_steps=40, n_restarts=2, generator=0)
    torch.testing.assert_close(report.attack, report.predicted, rtol=1e-2, atol=0)
    top = torch.linalg.eigvalsh(information)[:, -1]
    torch.testing.assert_close(report.predicted[0], 0.5e-6 * top, rtol=1e-9, atol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("moments", [True, False])
def test_the_attack_reaches_the_optimum_of_a_linear_gaussian_posterior(direction, moments):
    model, information = linear(moments=moments)
    x = randn((3, DX), generator=rng(6), dtype=F64)
    best = 0.5 * 0.7**2 * float(torch.linalg.eigvalsh(information)[-1])
    found = posterior_attack(
        model, x, 0.7, direction=direction, n_steps=30, n_restarts=4, n_samples=400, generator=0
    )
    close = {"rtol": 1e-4, "atol": 1e-9} if moments else {"rtol": 0.08, "atol": 0.0}
    torch.testing.assert_close(found.kl, torch.full((3,), best, dtype=F64), **close)
    assert bool((found.radius <= 0.7 + 1e-9).all())
    moved = (found.x - x) / model.x_std_
    torch.testing.assert_close(moved.norm(dim=1), found.radius)
    if moments:
        change = (moved[:, None] @ information @ moved[..., None])[:, 0, 0] / 2
        torch.testing.assert_close(change, found.kl, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_changes_stay_in_the_ball_and_beat_random_ones(norm):
    model = tiny(epochs=20, n=400)
    x = randn((5, DX), generator=rng(7), dtype=F64)
    found = posterior_attack(model, x, 0.4, norm=norm, n_steps=30, generator=1)
    assert bool((found.radius <= 0.4 + 1e-9).all())
    zero = posterior_attack(model, x, 0.0, norm=norm, n_steps=2, generator=1)
    assert float(zero.kl.abs().max()) < 1e-12
    if norm == "l2":
        report = robustness_report(model, x, [0.4], n_steps=30, generator=1)
        assert bool((report.attack > report.noise).all())
        torch.testing.assert_close(report.attack[0], found.kl, rtol=0.01, atol=0)


def test_a_divergence_of_gaussians_agrees_with_torch():
    model = tiny(epochs=10, n=200)
    x = randn((4, DX), generator=rng(8), dtype=F64)

    def gaussian(rows):
        mean, factor = model.density_.moments((rows - model.x_mean_) / model.x_std_)
        return torch.distributions.MultivariateNormal(mean, precision_matrix=factor.mT @ factor)

    for direction in ("forward", "reverse"):
        found = posterior_attack(model, x, 0.6, direction=direction, n_steps=5, generator=0)
        pair = (gaussian(x), gaussian(found.x))
        wanted = torch.distributions.kl_divergence(*(pair if direction == "forward" else pair[::-1]))
        torch.testing.assert_close(found.kl, wanted.detach(), rtol=1e-8, atol=1e-10)


DENSITIES = {"gaussian": GaussianDensity, "mdn": MixtureDensity, "maf": FlowDensity}


def density_of(kind, d, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DENSITIES[kind](3, d, 12).double()
    assign(made, 0.35 * randn((len(flatten(made)),), generator=rng(seed), dtype=F64))
    return made


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("kind", sorted(DENSITIES))
def test_a_density_integrates_to_one_and_has_the_moments_of_its_draws(kind, d):
    density = density_of(kind, d, seed=d)
    x = randn((1, 3), generator=rng(1), dtype=F64)
    with torch.no_grad():
        theta = density.sample(x, 20_000, rng(2))[0]
        assert theta.shape == (20_000, d)
        centre, width = theta.mean(0), theta.std(0)
        line = torch.linspace(-9, 9, 401, dtype=F64)
        grid = torch.cartesian_prod(*[line] * d).reshape(-1, d) * width + centre
        mass = density.log_prob(grid, x.expand(len(grid), -1)).exp() * ((line[1] - line[0]) * width).prod()
    assert float(mass.sum()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close((mass[:, None] * grid).sum(0), centre, rtol=0, atol=0.04 * float(width.max()))
    second = torch.einsum("n,ni,nj->ij", mass, grid - centre, grid - centre)
    torch.testing.assert_close(
        second, torch.atleast_2d(theta.T.cov()), rtol=0.1, atol=0.1 * float(second.max())
    )


def test_draws_of_a_flow_are_standard_normal_at_its_base():
    density = density_of("maf", 3, seed=4)
    x = randn((2, 3), generator=rng(1), dtype=F64)
    with torch.no_grad():
        u, given = density.sample(x, 5000, rng(2)).flatten(0, 1), x.repeat_interleave(5000, 0)
        noise = randn((10_000, 3), generator=rng(2), dtype=F64)
        for layer in density.layers:
            shift, log_scale = layer(u, given)
            u = ((u - shift) * (-log_scale).exp()).flip(1)
    torch.testing.assert_close(u, noise, rtol=1e-6, atol=1e-6)


def test_a_flow_is_autoregressive_and_its_determinant_right():
    density = density_of("maf", 3)
    theta, x = randn((1, 3), generator=rng(1), dtype=F64)[0], randn((1, 3), generator=rng(2), dtype=F64)
    layer = density.layers[0]
    jacobian = torch.func.jacrev(lambda t: layer(t[None], x)[0][0])(theta).detach()
    assert float(jacobian.triu().abs().max()) == 0
    assert bool((jacobian.tril(-1)[[1, 2, 2], [0, 0, 1]].abs() > 0).all())

    def base(t):
        u = t[None]
        for one in density.layers:
            shift, log_scale = one(u, x)
            u = ((u - shift) * (-log_scale).exp()).flip(1)
        return u[0]

    log_det = torch.linalg.slogdet(torch.func.jacrev(base)(theta)).logabsdet
    normal = -0.5 * base(theta).square().sum() - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(density.log_prob(theta[None], x)[0], normal + log_det)


def test_without_weight_training_is_plain_inference_bit_for_bit():
    theta = randn((200, D), generator=rng(1), dtype=F64)
    x = simulator_of()(theta, rng(2))
    models = [
        AmortizedPosterior(simulator_of(), prior_of(), generator=4, estimator=e, hidden=8).fit(
            (theta, x), epochs=2, batch_size=50
        )
        for e in ("exact", "ema")
    ]
    assert torch.equal(flatten(models[0].density_), flatten(models[1].density_))
    assert models[0].history_.reference_loss.numel() == 0
    # By hand: the same first weights, batches and rates.
    again = AmortizedPosterior(simulator_of(), prior_of(), generator=4, hidden=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(0, 2**63 - 1, (1,), generator=again.generator)))
        net = GaussianDensity(DX, D, 8).double()
    z, t = (x - x.mean(0)) / x.std(0), (theta - theta.mean(0)) / theta.std(0)
    optimizer = torch.optim.Adam(net.parameters())
    for step in range(8):
        if step % 4 == 0:
            batches = torch.randperm(180, generator=again.generator).split(50)
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / 8))
        optimizer.zero_grad()
        (-net.log_prob(t[batches[step % 4]], z[batches[step % 4]]).mean()).backward()
        optimizer.step()
    assert torch.equal(flatten(net), flatten(models[0].density_))


def test_the_exact_penalty_has_the_gradient_of_the_mean_trace():
    density = density_of("gaussian", 2)
    z = randn((5, 3), generator=rng(3), dtype=F64)
    penalty = FisherPenalty(density, 0.3, True, rng(0))
    loss = sum(p.sum() for p in density.parameters())
    penalty.backward(loss, penalty.trace(z))
    name, step = "net.0.weight", 1e-6
    weight = dict(density.named_parameters())[name]
    direction = randn(weight.shape, generator=rng(4), dtype=F64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(exact_root(density, z, graph=False).square().sum((1, 2)).mean()))
            weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    found = float(((weight.grad - 1) * direction).sum())
    assert found == pytest.approx(0.3 * slope, rel=1e-5)


def test_the_sampled_penalty_averages_to_the_exact_gradient():
    """With the draws held fixed, no gradient passes through them, and one passes through the density."""
    a = randn((2, 3), generator=rng(1), dtype=F64)
    density = Linear(a, torch.eye(2, dtype=F64), moments=False)
    z = randn((400, 3), generator=rng(2), dtype=F64)
    penalty = FisherPenalty(density, 0.5, False, rng(0))
    for _ in range(100):
        for p in density.parameters():
            p.grad = None
        penalty.backward(3 * density.a.sum(), penalty.trace(z))
    # Of the score A^T W^T W (theta - A x): the draws are held, and the mean moves with A.
    assert float((density.a.grad - 3 - 0.5 * 2 * density.a.detach()).abs().max()) < 0.15


def test_outlying_draws_are_scaled_down_to_ten_medians():
    class Spiked(Linear):
        def log_prob(self, theta, x):
            return super().log_prob(theta, x) * torch.where(x[:, 0] > 50, 1e4, 1.0)

    density = Spiked(torch.ones(2, 3, dtype=F64), torch.eye(2, dtype=F64), moments=False)
    z = randn((50, 3), generator=rng(2), dtype=F64)
    calm = float(FisherPenalty(density, 1.0, False, rng(0)).trace(z).detach())
    z[0, 0] = 100.0
    assert float(FisherPenalty(density, 1.0, False, rng(0)).trace(z).detach()) < 1.5 * calm + 10 * calm / 50


@pytest.mark.parametrize(
    ("density", "estimator"), [("gaussian", "exact"), ("gaussian", "ema"), ("maf", "ema")]
)
def test_the_penalty_lowers_the_trace(density, estimator):
    theta = randn((600, D), generator=rng(1), dtype=F64)
    x = simulator_of()(theta, rng(2))
    traces = []
    for weight in (0.0, 0.3):
        model = AmortizedPosterior(
            simulator_of(), prior_of(), density=density, hidden=16, fisher_weight=weight, estimator=estimator, generator=0
        ).fit((theta, x), epochs=8, batch_size=50, lr=5e-3)  # fmt: skip
        traces.append(float(fisher_trace(model, x[:50], n_samples=50, generator=0).mean()))
    assert traces[1] < 0.6 * traces[0]


def test_a_trained_gaussian_finds_the_posterior_of_a_linear_model():
    """Bayes' rule for the linear model, in its own units."""
    h = randn((D, DX), generator=rng(11), dtype=F64)
    model = AmortizedPosterior(simulator_of(), prior_of(), hidden=32, generator=0).fit(4000, epochs=25)
    theta, x = model.simulate(300)
    precision = torch.eye(D, dtype=F64) + h @ h.T / 0.25
    mean = (x @ h.T / 0.25) @ torch.linalg.inv(precision)
    exact = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    gap = exact.log_prob(theta).mean() - model.log_prob(theta, x).mean()
    assert -0.05 < float(gap) < 0.1
    drawn = model.sample(x[:20], 500, generator=1)
    assert drawn.shape == (20, 500, D)
    spread = drawn.std(1).mean(0) / torch.linalg.inv(precision).diagonal().sqrt()
    torch.testing.assert_close(spread, torch.ones(D, dtype=F64), rtol=0.1, atol=0)
    assert float(model.history_.score[-1]) > float(model.history_.score[0])


def test_a_density_with_dropout_is_measured_in_evaluation_mode():
    class Dropping(Linear):
        def __init__(self):
            super().__init__(torch.ones(D, DX, dtype=F64), torch.eye(D, dtype=F64))
            self.drop = nn.Dropout(0.5)

        def _moments(self, x):
            return super()._moments(self.drop(x))

    model = AmortizedPosterior(simulator_of(), prior_of(), density=Dropping(), generator=0)
    model.fit(50, epochs=1, lr=1e-12)
    x = torch.ones(3, DX, dtype=F64)
    assert model.density_.training
    report = robustness_report(model, x, [0.5], n_steps=30, generator=0)
    torch.testing.assert_close(report.attack[0], report.predicted[0], rtol=1e-3, atol=0)
    assert bool((report.noise <= report.predicted + 1e-9).all())
    assert torch.equal(
        model.log_prob(torch.zeros(3, D, dtype=F64), x), model.log_prob(torch.zeros(3, D, dtype=F64), x)
    )
    assert model.density_.training


def test_units_of_the_data_do_not_matter():
    theta = uniform((300, D), generator=rng(1), dtype=F64)
    x = simulator_of()(theta, rng(2))
    first = AmortizedPosterior(simulator_of(), prior_of(), generator=0, hidden=8).fit((theta, x), epochs=3)
    other = AmortizedPosterior(simulator_of(), prior_of(), generator=0, hidden=8).fit((10 * theta + 3, 5 * x - 1), epochs=3)  # fmt: skip
    torch.testing.assert_close(
        other.log_prob(10 * theta + 3, 5 * x - 1), first.log_prob(theta, x) - D * math.log(10)
    )
    torch.testing.assert_close(fisher_trace(other, 5 * x - 1), fisher_trace(first, x))


def test_the_divergence_reported_is_not_the_luckiest_of_its_estimates():
    """No change of this size reaches more than the optimum, so neither may the mean of what is reported."""
    model, information = linear(moments=False)
    x = randn((200, DX), generator=rng(9), dtype=F64)
    best = 0.5 * 0.05**2 * float(torch.linalg.eigvalsh(information)[-1])
    found = posterior_attack(model, x, 0.05, n_steps=5, n_samples=20, generator=0).kl
    assert float(found.mean()) < best + 4 * float(found.std()) / len(x) ** 0.5


@pytest.mark.parametrize("moments", [True, False])
def test_the_cost_is_what_the_density_is_asked_for(moments):
    asked = {"rows": 0}

    class Counted(Linear):
        def _moments(self, x):
            asked["rows"] += len(x)
            return super()._moments(x)

    density = Counted(torch.ones(D, DX, dtype=F64), torch.eye(D, dtype=F64), moments)
    model = AmortizedPosterior(simulator_of(), prior_of(), density=density, generator=0).fit(50, epochs=1)
    asked["rows"] = 0
    x = randn((4, DX), generator=rng(5), dtype=F64)
    found = posterior_attack(model, x, 0.5, n_steps=10, n_restarts=2, n_samples=7, generator=0)
    assert found.cost.ngrad == 4 * 10 * 2
    assert found.cost.nfev == found.cost.ngrad + 4 * (2 if moments else 3)
    if moments:
        # Besides: the information, the moments before the change, and two rows on which memory is measured.
        assert asked["rows"] == found.cost.nfev + 4 + 4 + 2


def test_a_random_change_costs_the_mean_of_the_spectrum():
    model, information = linear()
    x = randn((3, DX), generator=rng(5), dtype=F64)
    report = robustness_report(model, x, [0.3], n_draws=2000, n_steps=2, n_restarts=1, generator=0)
    wanted = 0.5 * 0.3**2 * float(information.trace()) / DX
    torch.testing.assert_close(report.noise, torch.full((1, 3), wanted, dtype=F64), rtol=0.08, atol=0)


def test_dtypes_of_parameters_and_observations_may_differ():
    theta, x = randn((60, D), generator=rng(1)), randn((60, DX), generator=rng(2), dtype=F64)
    model = AmortizedPosterior(simulator_of(), prior_of(), generator=0, hidden=6).fit((theta, x), epochs=1)
    assert model.log_prob(theta, x).dtype == F64
    wide = AmortizedPosterior(
        lambda t, g: simulator_of()(t.double(), g), prior_of(torch.float32), generator=0
    )
    assert wide.simulate(5)[1].dtype == F64


@pytest.mark.parametrize("estimator", ["exact", "ema"])
def test_a_density_may_ignore_the_observations_at_first_and_hold_parameters_fixed(estimator):
    density = Linear(torch.zeros(D, DX, dtype=F64), torch.eye(D, dtype=F64), estimator == "exact")
    density.factor.requires_grad_(False)
    model = AmortizedPosterior(
        simulator_of(), prior_of(), density=density, fisher_weight=0.1, estimator=estimator, generator=0
    ).fit(50, epochs=1)
    assert bool(flatten(density).isfinite().all())
    assert bool(density.a.any())
    assert torch.equal(density.factor, torch.eye(D, dtype=F64))
    assert model.history_.reference_loss.isfinite().all()


def test_a_constant_column_has_unit_scale_and_graphs_of_observations_end():
    theta = randn((6000, D), generator=rng(1))
    x = torch.cat([theta, torch.full((6000, 1), 0.1)], 1)
    model = AmortizedPosterior(simulator_of(), prior_of(), generator=0, hidden=6).fit((theta, x), epochs=1)
    assert float(model.x_std_[2]) == 1
    rows = x[:2].clone().requires_grad_()
    found = posterior_attack(model, rows, 0.1, n_steps=2, generator=0)
    assert not found.x.requires_grad
    assert not model.log_prob(theta[:2], rows).requires_grad


def test_draws_are_differentiated_in_chunks(monkeypatch):
    from perturbkit.core import Oracle

    asked = []

    class Watched(Linear):
        def log_prob(self, theta, x):
            asked.append(len(x))
            return super().log_prob(theta, x)

    density = Watched(torch.ones(D, DX, dtype=F64), torch.eye(D, dtype=F64), moments=False)
    model = AmortizedPosterior(simulator_of(), prior_of(), density=density, generator=0).fit(50, epochs=1)
    x = randn((3, DX), generator=rng(5), dtype=F64)
    whole = fisher_information(model, x, n_samples=50, generator=0)
    monkeypatch.setattr(Oracle, "_size", lambda self, rows, kind: 7)
    asked.clear()
    torch.testing.assert_close(fisher_information(model, x, n_samples=50, generator=0), whole)
    assert max(asked) == 7
    assert sum(asked) == 150
