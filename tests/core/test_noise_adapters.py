"""Denoisers of diffusers' models and EDM networks, step by step against diffusers' own schedulers."""

import pytest
import torch

from perturbkit.core import Denoiser, DiscreteSchedule
from perturbkit.core.checks import ArgumentError, ArgumentTypeError
from perturbkit.diffusion import sample_ddim, sample_dpm_solver, sample_pndm

diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")

KINDS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
]


def network(x, t, **inputs):
    return 0.5 * torch.tanh(x + inputs.get("shift", 0.0)) + 0.001 * t.reshape(-1, *[1] * (x.ndim - 1))


def _x(seed=0):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _walk(scheduler, x, model=network):
    """Return the states of diffusers' own loop, the start included."""
    states = [x * scheduler.init_noise_sigma]
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(states[-1], t)
        answer = model(given, t.to(x.dtype).expand(len(x)))
        states.append(scheduler.step(answer, t, states[-1]).prev_sample)
    return states


@pytest.mark.parametrize("kind", KINDS, ids=["linear", "scaled", "cosine", "trained"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_step_by_step(kind, prediction):
    scheduler = diffusers.DDIMScheduler(
        **kind,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    theirs = _walk(scheduler, _x())
    from_object, from_config = (
        Denoiser.from_diffusers(network, s) for s in (scheduler, dict(scheduler.config))
    )
    times = scheduler.timesteps.double()
    for denoiser in (from_object, from_config):
        ours = [_x()]
        sample_ddim(denoiser, _x(), times, callback=lambda i, x, seen=ours: seen.append(x))
        for a, b in zip(ours, theirs, strict=False):
            assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_in_the_scaled_state_is_ddim(prediction):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    theirs = _walk(scheduler, _x())
    denoiser = Denoiser.from_diffusers(network, scheduler)
    times = scheduler.timesteps.double()
    alpha = denoiser.schedule.alpha(times)
    ours = [alpha[0] * theirs[0]]
    sample_ddim(denoiser, ours[0], times, callback=lambda i, x: ours.append(x))
    for a, b, scale in zip(ours, theirs, alpha, strict=False):
        assert float((a / scale - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def test_flow_matching_step_by_step():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x, states = _x(), [_x()]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(3)), t, x).prev_sample
        states.append(x)
    denoiser = Denoiser.from_diffusers(network, scheduler)
    times = scheduler.sigmas.double()
    times[0] = 1 - 1e-9  # at 1 no signal is left, and samplers want some
    ours = [_x()]
    sample_ddim(denoiser, _x(), times, callback=lambda i, y: ours.append(y))
    for a, b in zip(ours, states, strict=True):
        assert float((a - b).abs().max()) < 1e-5


def test_dpm_solver_and_pndm_step_by_step():
    singlestep = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver", solver_order=1, final_sigmas_type="sigma_min", lower_order_final=False
    )
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=0)
    for scheduler, sample in (
        (singlestep, lambda d, x, t: sample_dpm_solver(d, x, t, order=1).x),
        (pndm, lambda d, x, t: sample_pndm(d, x, t, warmup="euler").x),
    ):
        scheduler.set_timesteps(10)
        theirs = _walk(scheduler, _x())
        seen = scheduler.timesteps.double()
        times = torch.unique(seen).flip(0)
        ours = sample(Denoiser.from_diffusers(network, scheduler), _x(), times)
        # The last state of ours is at the last timestep; PNDM's first time is visited twice.
        index = len(seen) - 1
        assert float((ours - theirs[index]).abs().max()) < 1e-4 * float(theirs[index].abs().max())


def test_no_signal_at_the_last_step():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    for given in (scheduler, dict(scheduler.config)):
        schedule = Denoiser.from_diffusers(network, given).schedule
        assert isinstance(schedule, DiscreteSchedule)
        assert float(schedule.alpha(999.0)) == pytest.approx(float(schedule.alpha(998.0)) / 2)
        expected = scheduler.alphas_cumprod[:-1].double().sqrt()
        found = schedule.alpha(torch.arange(999, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Answer:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize(
    "wrap",
    [Answer, lambda a: (a,), lambda a: Answer(torch.cat([a, a], 1)), lambda a: a],
    ids=["object", "tuple", "variances", "tensor"],
)
def test_answers_of_any_form(wrap):
    denoiser = Denoiser.from_diffusers(
        lambda x, t: wrap(network(x, t)), {"beta_start": 1e-4, "beta_end": 0.02}
    )
    t = torch.full((3,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(denoiser.eps(_x(), 7.0), network(_x(), t))


def test_a_real_model_and_its_condition():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=3,
        ).eval()  # fmt: skip
    labels = torch.tensor([0, 2])
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = _walk(scheduler, x, lambda y, t: model(y, t, class_labels=labels).sample)
        denoiser = Denoiser.from_diffusers(model, scheduler, class_labels=labels)
        ours = sample_ddim(denoiser, x, scheduler.timesteps.double())
    torch.testing.assert_close(ours.x, theirs[4], rtol=1e-4, atol=1e-4)


def test_edm_network_gets_its_noise_and_condition():
    def edm(x, sigma, class_labels=None):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + class_labels

    denoiser = Denoiser.from_edm(edm, sigma_max=20.0, class_labels=0.5)
    torch.testing.assert_close(denoiser.x0(_x(), 2.0), _x() / 5 + 0.5)
    assert denoiser.schedule.t_max == 20


def test_refusals():
    with pytest.raises(ArgumentTypeError, match="scheduler is a str; allowed"):
        Denoiser.from_diffusers(network, "ddim")
    with pytest.raises(ArgumentError, match="beta_schedule is 'sigmoid'; allowed"):
        Denoiser.from_diffusers(network, {"beta_schedule": "sigmoid"})
    for other in ({}, diffusers.EDMEulerScheduler(), diffusers.ScoreSdeVeScheduler()):
        with pytest.raises(ArgumentError, match=r"the configuration has .*; allowed: one with beta_start"):
            Denoiser.from_diffusers(network, other)
    with pytest.raises(ArgumentError, match="prediction_type is 'flow'; allowed"):
        Denoiser.from_diffusers(network, {"prediction_type": "flow", "beta_start": 1e-4, "beta_end": 0.02})


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
        {"beta_schedule": "scaled_linear"},
    ],
    ids=["cosine", "trained", "scaled"],
)
def test_every_table_is_rescaled_when_asked_to(options):
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, **options)
    for given in (scheduler, dict(scheduler.config)):
        schedule = Denoiser.from_diffusers(network, given).schedule
        n = len(scheduler.alphas_cumprod) - 1
        found = schedule.alpha(torch.arange(n, dtype=torch.float64))
        torch.testing.assert_close(found, scheduler.alphas_cumprod[:n].double().sqrt(), rtol=1e-3, atol=1e-5)
        assert float(schedule.alpha(n)) == pytest.approx(float(found[-1]) / 2)


def test_a_scheduler_with_a_number_of_its_own_at_the_last_step():
    scheduler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] > scheduler.alphas_cumprod[-2]
    schedule = Denoiser.from_diffusers(network, scheduler).schedule
    assert float(schedule.alpha(999.0)) == pytest.approx(float(schedule.alpha(998.0)) / 2)


def test_flow_matching_named_by_its_prediction():
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    denoiser = Denoiser.from_diffusers(lambda x, t: x * t.reshape(-1, *[1] * (x.ndim - 1)), scheduler)
    assert denoiser.predicts == "velocity"
    torch.testing.assert_close(denoiser.velocity(_x(), 0.25), 250 * _x())
