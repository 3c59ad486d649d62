"""A closure evaluated again, weights put back, and an optimizer around another."""

import copy

import pytest
import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import Replay, WrappingOptimizer, displaced, loss_value
from perturbkit.core.random import seeded_init


class Doubling(WrappingOptimizer):
    """Hands twice the gradient on."""

    def __init__(self, params, base_optimizer=torch.optim.SGD, *, factor=2.0, model=None, **base_options):
        super().__init__(params, base_optimizer, {"factor": factor}, base_options, model)

    def check_group(self, group):
        checks.positive("factor", group["factor"])

    def step(self, closure):
        loss = self.replay(closure)()
        for group, p in self.trained():
            p.grad.mul_(group["factor"])
        self.base_optimizer.step()
        return loss


def net(seed: int = 0) -> nn.Sequential:
    with seeded_init(seed):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def test_a_replay_sees_the_same_masks_and_leaves_statistics_and_generators_as_after_one_call() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    one, many = net(), net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = one(x).sum().item()
        after = torch.get_rng_state()
        torch.manual_seed(3)
        again = Replay(lambda: many(x).sum(), many.parameters(), many)
        values = [float(again().detach()) for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), after)
    assert values == [want] * 3
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), many.buffers(), strict=True))
    assert int(many[1].num_batches_tracked) == 1


def test_a_replay_without_gradients_records_no_graph() -> None:
    w = torch.ones(1, requires_grad=True)
    assert Replay(lambda: w.sum())().requires_grad
    assert not Replay(lambda: w.sum(), gradients=False)().requires_grad


def test_weights_come_back_after_an_exception() -> None:
    w = torch.tensor([1.0, 1e-30])

    def fail() -> None:
        with displaced([w], [torch.tensor([1e8, 1.0])], -1.0):
            assert w.tolist() == [-1e8, -1.0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(w, torch.tensor([1.0, 1e-30]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_groups_schedulers_and_states_are_shared(base) -> None:
    def problem():
        w, v, frozen = (nn.Parameter(torch.tensor([x])) for x in (1.0, 2.0, 3.0))
        frozen.requires_grad_(False)
        optimizer = Doubling(
            [{"params": [w, frozen]}, {"params": [v], "lr": 0.3, "factor": 1.0}], base, lr=0.1
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (w**2 + v**4).sum()
            value.backward()
            return value

        return (w, v, frozen), optimizer, loss

    (w, v, frozen), optimizer, loss = problem()
    assert [g["lr"] for g in optimizer.base_optimizer.param_groups] == [0.1, 0.3]
    if base is torch.optim.SGD:
        optimizer.step(loss)
        assert w.item() == pytest.approx(1 - 0.1 * 2 * 2)
        assert v.item() == pytest.approx(2 - 0.3 * 1 * 32)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(loss)
    schedule.step()
    assert optimizer.base_optimizer.param_groups[1]["lr"] == pytest.approx(0.15)
    weights, other, other_loss = problem()
    with torch.no_grad():
        for p, q in zip(weights, (w, v, frozen), strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(loss)
        other.step(other_loss)
    assert [p.item() for p in weights] == [w.item(), v.item(), 3.0]


def test_a_group_that_is_added_later_gets_the_options_of_both() -> None:
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Doubling([w], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [v]})
    assert optimizer.base_optimizer.param_groups[1]["momentum"] == 0.9
    assert len(optimizer.param_groups) == 2
    with pytest.raises(checks.ArgumentError, match="factor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "factor": 0.0})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Replay(None), "closure is None"),
        (lambda: Doubling([nn.Parameter(torch.ones(1))], "SGD"), "base_optimizer is a str"),
        (lambda: Doubling([nn.Parameter(torch.ones(1))], model=3, lr=0.1), "model is a int"),
        (lambda: Doubling([nn.Parameter(torch.ones(1))], factor=-1.0, lr=0.1), "factor is -1"),
        (lambda: loss_value(torch.ones(2)), r"shape \(2,\)"),
        (lambda: loss_value(None), "a NoneType"),
    ],
    ids=["closure", "base", "model", "factor", "loss", "none"],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
