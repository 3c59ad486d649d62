"""A closure evaluated again, weights put back, and an optimizer around another."""

import copy

import pytest
import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import (
    BaseOptimizer,
    Replay,
    WrappingOptimizer,
    dense_gradients,
    displaced,
    evaluated,
    global_norm,
    loss_value,
)
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
        (lambda: evaluated(3), "closure is 3"),
    ],
    ids=["closure", "base", "model", "factor", "loss", "none", "optional"],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_gradients_are_copied_dense_and_zero_where_there_is_none() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    unused = nn.Parameter(torch.ones(2))
    found = dense_gradients([table.weight, unused])
    assert found[0].tolist() == [[0, 0], [2, 2], [0, 0]]
    assert found[1].tolist() == [0, 0]
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    dense_gradients([w])[0].mul_(3)
    assert w.grad.tolist() == [1, 1]


def test_the_norm_of_half_precision_tensors_is_taken_in_single() -> None:
    many = [torch.full((100,), 3e4, dtype=torch.float16), torch.full((3,), 1e-4, dtype=torch.float64)]
    assert float(global_norm(many)) == pytest.approx(3e5, rel=1e-3)
    assert float(global_norm([torch.full((4,), 1e-5, dtype=torch.float16)])) == pytest.approx(2e-5, rel=1e-2)


def test_a_loaded_state_keeps_its_precision_and_that_of_the_optimizer_inside() -> None:
    class Wide(BaseOptimizer):
        def step(self, closure=None):  # type: ignore[override]
            raise AssertionError

    value = torch.tensor([1 + 2**-20])
    for model, saved, want in (
        (torch.bfloat16, value, torch.float32),
        (torch.bfloat16, value.bfloat16(), torch.bfloat16),
        (torch.float32, value.double(), torch.float32),
    ):
        w, v = (nn.Parameter(torch.ones(1, dtype=model)) for _ in range(2))
        one, other = Wide([w], {}), Wide([v], {})
        one.state[w]["kept"] = saved
        other.load_state_dict(one.state_dict())
        assert other.state[v]["kept"].dtype == want
        assert other.state[v]["kept"].data_ptr() != saved.data_ptr()
        assert torch.equal(other.state[v]["kept"].to(saved.dtype), saved)
    # Adam keeps its moments in the weights' precision, whatever was saved.
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    one, other = (Doubling([p], torch.optim.Adam, lr=0.1) for p in (w, v))

    def closure_of(p, optimizer):
        def closure():
            optimizer.zero_grad()
            p.sum().backward()
            return 1.0

        return closure

    one.step(closure_of(w, one))
    other.load_state_dict(one.state_dict())
    other.step(closure_of(v, other))
    assert other.state[v]["exp_avg"].dtype == torch.bfloat16


def test_copies_have_hooks_of_their_own_and_no_scheduler() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = Doubling([w], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    _, other = copy.deepcopy((w, optimizer))
    assert "step" not in vars(other)
    assert other.base_optimizer.param_groups is other.param_groups
    assert other.base_optimizer.state is other.state
    assert other.param_groups is not optimizer.param_groups
