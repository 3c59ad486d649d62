"""The training loop: what it minimises, what it leaves alone, and resumption bit for bit."""

import copy
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perturbkit.core import History, fit
from perturbkit.core.checks import ArgumentError, ArgumentTypeError, ModelError
from perturbkit.core.random import randn, seeded_init

G = torch.Generator().manual_seed(41)
X = randn((50, 3), generator=G)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]])


def net(seed=0, dropout=0.0):
    with seeded_init(seed):
        return nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1)
        )


def squared(model, x, y, *, generator):
    return (model(x) - y + 0.01 * randn(y.shape, generator=generator, like=y)).square().mean()


def run(model, **options):
    return fit(
        model,
        squared,
        (X, Y),
        **{"steps": 12, "generator": 5, "progress": False, "batch_size": 16, **options},
    )


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_one_step_is_the_optimizers():
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())

    def plain(model, x, y, *, generator):
        return (model(x) - y).square().mean()

    options = {
        "steps": 5,
        "decay": "none",
        "optimizer": lambda w: torch.optim.SGD(w, lr=0.1),
        "progress": False,
    }
    fit(ours, plain, lambda generator: (X, Y), **options)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        plain(theirs, X, Y, generator=None).backward()
        optimizer.step()
    assert same(ours, theirs)


def test_rate_follows_half_a_cosine_and_gradients_are_clipped():
    weight = nn.Linear(1, 1, bias=False)
    before = weight.weight.detach().clone()

    def steep(model, *, generator):
        return 1000 * model.weight.sum()

    fit(
        weight,
        steep,
        lambda g: (),
        steps=4,
        clip=2.0,
        optimizer=lambda w: torch.optim.SGD(w, lr=0.5),
        progress=False,
    )
    rates = [0.5 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * k / 4))) for k in range(4)]
    torch.testing.assert_close(before - weight.weight, torch.full((1, 1), 2.0 * float(sum(rates))))


def test_average_of_weights():
    model, plain = net(), net()
    run(model, average=0.9, steps=3)
    kept, shadow = (
        [min(0.9, (1 + k) / (10 + k)) for k in (1, 2, 3)],
        [p.detach().clone() for p in plain.parameters()],
    )
    # The weights that each of the three steps starts from, and the last ones.
    seen = []

    def watching(m, x, y, *, generator):
        seen.append([p.detach().clone() for p in m.parameters()])
        return squared(m, x, y, generator=generator)

    last = net()
    fit(last, watching, (X, Y), steps=3, generator=5, progress=False, batch_size=16)
    for share, weights in zip(kept, [*seen[1:], [p.detach() for p in last.parameters()]], strict=True):
        shadow = [share * s + (1 - share) * w for s, w in zip(shadow, weights, strict=True)]
    for s, p in zip(shadow, model.parameters(), strict=True):
        torch.testing.assert_close(s, p.detach())


def test_same_generator_same_run_and_the_global_one_is_left_alone():
    first, second = net(dropout=0.5), net(dropout=0.5)
    state = torch.get_rng_state()
    a = run(first)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    b = run(second)
    assert same(first, second)
    assert torch.equal(a.losses, b.losses)
    assert isinstance(a, History)
    assert a.n_steps == len(a.losses) == 12
    assert a.ended == "steps"


def test_modes_and_frozen_parameters_stay():
    model = net()
    model[0].weight.requires_grad_(False)
    model.eval()
    model[3].train()
    frozen = model[0].weight.clone()
    run(model)
    assert torch.equal(frozen, model[0].weight)
    assert [m.training for m in model] == [False, False, False, True, False]


class Counting(torch.optim.SGD):
    """Counts its steps in its group, as some optimizers do, and goes by the count."""

    def __init__(self, weights):
        super().__init__(weights, lr=0.05, momentum=0.9)
        self.param_groups[0]["count"] = 0

    def step(self, closure=None):
        group = self.param_groups[0]
        group["count"] += 1
        group["lr"] /= group["count"]
        return super().step(closure)


@pytest.mark.parametrize("average", [None, 0.9], ids=["last", "averaged"])
@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        torch.optim.Rprop,
        lambda w: torch.optim.SGD(w, lr=0.05, momentum=0.9, nesterov=True),
        Counting,
    ],
    ids=["adamw", "rprop", "momentum", "counting"],
)
@pytest.mark.parametrize("stop", [1, 7], ids=["after-1", "after-7"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, optimizer, average, stop):
    whole, parted = net(dropout=0.3), net(dropout=0.3)
    # An optimizer that sets its own rate is left to it.
    options = {
        "optimizer": optimizer,
        "average": average,
        "decay": "none" if optimizer is Counting else "cosine",
    }
    expected = run(whole, **options)
    path, calls = tmp_path / "run.safetensors", []

    def interrupted(model, x, y, *, generator):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return squared(model, x, y, generator=generator)

    with pytest.raises(KeyboardInterrupt):
        fit(
            parted,
            interrupted,
            (X, Y),
            steps=12,
            generator=5,
            progress=False,
            batch_size=16,
            checkpoint=path,
            **options,
        )
    assert len(calls) == stop
    fresh = net(seed=9, dropout=0.3)  # other weights: everything must come from the file
    found = fit(
        fresh,
        squared,
        (X, Y),
        steps=12,
        generator=77,
        progress=False,
        batch_size=16,
        checkpoint=path,
        **options,
    )
    assert same(fresh, whole)
    assert torch.equal(found.losses, expected.losses)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_checkpoint_gives_the_finished_model(tmp_path):
    path = tmp_path / "run.safetensors"
    model = net()
    expected = run(model, average=0.9, checkpoint=path)
    again = net(seed=3)
    found = run(again, average=0.9, checkpoint=path)
    assert same(model, again)
    assert torch.equal(found.losses, expected.losses)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_periodic_checkpoints(tmp_path):
    path, steps = tmp_path / "run.safetensors", []

    def dying(model, x, y, *, generator):
        steps.append(1)
        if len(steps) == 6:
            raise MemoryError
        return squared(model, x, y, generator=generator)

    parted, whole = net(), net()
    with pytest.raises(MemoryError):
        fit(
            parted,
            dying,
            (X, Y),
            steps=12,
            generator=5,
            progress=False,
            batch_size=16,
            checkpoint=path,
            checkpoint_seconds=1e-9,
        )
    run(parted, checkpoint=path)
    run(whole)
    assert same(parted, whole)


def test_a_time_limit_ends_a_run():
    found = run(net(), steps=None, seconds=0.05)
    assert found.ended == "seconds"
    assert found.n_steps >= 1
    assert 0.05 <= found.seconds < 5
    assert run(net(), steps=2, seconds=100.0).ended == "steps"


def test_a_run_that_a_time_limit_ended_is_kept(tmp_path):
    path, model, again = tmp_path / "run.safetensors", net(), net(seed=3)
    options = {"steps": None, "seconds": 0.05, "average": 0.9, "checkpoint": path}
    expected = run(model, **options)
    found = run(again, **options)
    assert found.ended == "seconds"
    assert same(model, again)
    assert torch.equal(found.losses, expected.losses)


def test_an_interruption_after_the_last_step_is_not_lost(tmp_path):
    path, calls = tmp_path / "run.safetensors", []

    class Reporter:
        def start(self, description, total):
            pass

        def advance(self, steps=1):
            calls.append(1)
            if len(calls) == 12:
                os.kill(os.getpid(), signal.SIGINT)

        def stop(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        run(net(), checkpoint=path, progress=Reporter())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found, whole = net(seed=3), net()
    run(found, checkpoint=path)
    run(whole)
    assert same(found, whole)


def test_gradients_of_weights_that_the_optimizer_was_not_given_are_not_added_up():
    first, norms = nn.Linear(3, 1), []

    def plain(model, x, y, *, generator):
        norms.append(0.0 if model.bias.grad is None else float(model.bias.grad.abs()))
        return model(x).mean() + model.bias.sum()

    fit(first, plain, (X, Y), steps=4, optimizer=lambda w: torch.optim.SGD(w[:1], lr=0.1), progress=False)
    assert norms == [0.0, 2.0, 2.0, 2.0]


def test_a_run_inside_no_grad_and_a_batch_of_one_tensor():
    def squared_answer(model, x, *, generator):
        return model(x).square().mean()

    model = nn.Linear(3, 1)
    with torch.no_grad():
        found = fit(model, squared_answer, lambda g: X, steps=20, lr=0.1, progress=False)
    assert found.losses[-1] < found.losses[0]


def test_progress_is_reported():
    class Reporter:
        done, total, stopped = 0, None, False

        def start(self, description, total):
            self.total = total

        def advance(self, steps=1):
            self.done += steps

        def stop(self):
            self.stopped = True

    reporter = Reporter()
    run(net(), progress=reporter)
    assert (reporter.done, reporter.total, reporter.stopped) == (12, 12, True)


def test_losses_must_be_one_finite_number():
    with pytest.raises(ModelError, match=r"shape \(16, 1\).*mean"):
        fit(net(), lambda m, x, y, *, generator: m(x) - y, (X, Y), steps=2, batch_size=16, progress=False)
    count = []

    def breaking(model, x, y, *, generator):
        count.append(1)
        return squared(model, x, y, generator=generator) * (float("nan") if len(count) == 7 else 1.0)

    with pytest.raises(ModelError, match="nan at step 7"):
        fit(net(), breaking, (X, Y), steps=20, progress=False)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(net(), checkpoint=path)
    with pytest.raises(ArgumentError, match="another run"):
        run(net(), checkpoint=path, steps=13)
    with pytest.raises(ArgumentError, match="another run"):
        run(net(), checkpoint=path, average=0.5)
    with pytest.raises(ArgumentError, match="another run"):
        run(net(), checkpoint=path, optimizer=lambda w: torch.optim.SGD(w, lr=0.1))
    with pytest.raises(ArgumentError, match="another run"):
        run(net(), checkpoint=path, lr=0.1)
    with pytest.raises(ArgumentError, match="another run"):
        fit(
            net().double(),
            squared,
            (X.double(), Y.double()),
            steps=12,
            batch_size=16,
            checkpoint=path,
            progress=False,
        )
    with pytest.raises(ArgumentError, match="another run"):
        fit(nn.Linear(3, 1), squared, (X, Y), steps=12, batch_size=16, checkpoint=path, progress=False)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArgumentError, match="another run"):
        run(net(), checkpoint=path)
    path.write_bytes(b"not one at all")
    with pytest.raises(ArgumentError, match="cannot be read"):
        run(net(), checkpoint=path)
    with pytest.raises(ArgumentError, match="safetensors"):
        run(net(), checkpoint=tmp_path / "run.pt")
    with pytest.raises(ArgumentError, match="folder"):
        run(net(), checkpoint=tmp_path / "none" / "run.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": None}, ArgumentError, "at least one limit"),
        ({"steps": 0}, ArgumentError, "steps"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"lr": 0.0}, ArgumentError, "lr"),
        ({"average": 1.0}, ArgumentError, "average"),
        ({"clip": -1.0}, ArgumentError, "clip"),
        ({"decay": "linear"}, ArgumentError, "decay"),
        ({"seconds": 0.0}, ArgumentError, "seconds"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_refusals(options, error, match):
    with pytest.raises(error, match=match):
        run(net(), **options)


def test_refusals_of_things():
    with pytest.raises(ArgumentTypeError, match=r"nn\.Module"):
        fit(lambda x: x, squared, (X, Y), steps=1)
    with pytest.raises(ArgumentTypeError, match="loss"):
        fit(net(), 3, (X, Y), steps=1)
    with pytest.raises(ArgumentError, match="as many rows"):
        fit(net(), squared, (X, Y[:4]), steps=1)
    with pytest.raises(ArgumentError, match="at least one"):
        fit(net(), squared, X[:0], steps=1)
    with pytest.raises(ArgumentError, match=r"ndarray.*tensors"):
        fit(net(), squared, X.numpy(), steps=1)
    with pytest.raises(ArgumentTypeError, match="answered a dict"):
        fit(net(), squared, lambda g: {"x": X}, steps=1)
    with pytest.raises(ArgumentTypeError, match="optimizer is Adam"):
        fit(net(), squared, (X, Y), steps=1, optimizer=torch.optim.Adam(net().parameters()))
    with pytest.raises(ArgumentTypeError, match="optimizer answered NoneType"):
        fit(net(), squared, (X, Y), steps=1, optimizer=lambda w: None)
    with pytest.raises(ModelError, match="does not depend"):
        fit(net(), lambda m, x, y, *, generator: (m(x) - y).detach().mean(), (X, Y), steps=1, progress=False)
    frozen = copy.deepcopy(net()).requires_grad_(False)
    with pytest.raises(ModelError, match="trainable"):
        run(frozen)
