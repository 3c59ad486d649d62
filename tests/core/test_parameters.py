"""Weights as one vector: round trips, derivatives, and bit-exact restoring of seeded perturbations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.parameters import (
    Block,
    assign,
    flatten,
    functional,
    perturbed,
    seeded_direction,
    step,
    unflatten,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Weights(nn.Module):
    """A module of given weights, two parameters and one that is frozen."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        half = len(weight) // 2
        self.a = nn.Parameter(weight[:half].clone())
        self.b = nn.Parameter(weight[half:].reshape(1, -1).clone())
        self.frozen = nn.Parameter(torch.ones(3, dtype=weight.dtype), requires_grad=False)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def bits(weight: Tensor) -> Tensor:
    return (
        weight.detach()
        .reshape(-1)
        .view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    )


def wild(seed: int, dtype: torch.dtype, n: int = 400) -> Tensor:
    """Numbers of every magnitude: both zeros, denormals, the smallest and large ones."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=g, dtype=torch.float64) * 10 ** (8 * torch.rand(n, generator=g) - 6)
    w = w.to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 8, 1.0, -1.0, 2.0, 1 - torch.finfo(dtype).eps / 2]
    w[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return w[torch.randperm(n, generator=g)]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    scale=st.sampled_from([0.0, 1e-30, 1e-8, 1e-5, -1e-3, 0.1, 1.0, -17.3, 1e3]),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
)
def test_weights_come_back_bit_for_bit(dtype, seed, scale, distribution) -> None:
    module = Weights(wild(seed, dtype))
    before = [bits(p).clone() for p in module.parameters()]
    with perturbed(module, seed, scale, distribution):
        inside = flatten(module)
    assert all(torch.equal(bits(p), b) for p, b in zip(module.parameters(), before, strict=True))
    want = flatten(module).to(seeded_direction(module, 0).dtype) + scale * seeded_direction(
        module, seed, distribution
    )
    torch.testing.assert_close(
        inside, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0, check_dtype=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_subtracting_alone_would_not_restore(dtype: torch.dtype) -> None:
    # The control of the test above: without the kept counts, the weights differ.
    module = Weights(wild(0, dtype))
    before = bits(flatten(module)).clone()
    step(module, 5, 0.1)
    step(module, 5, -0.1)
    assert not torch.equal(bits(flatten(module)), before)


def test_weights_come_back_after_an_exception_and_when_nested() -> None:
    module = Weights(wild(1, torch.float32))
    before = bits(flatten(module)).clone()
    with pytest.raises(KeyError), perturbed(module, 1, 0.5):
        raise KeyError
    assert torch.equal(bits(flatten(module)), before)
    with perturbed(module, 1, 0.5):
        once = flatten(module)
        with perturbed(module, 2, 7.0, "rademacher"):
            assert not torch.equal(flatten(module), once)
        assert torch.equal(bits(flatten(module)), bits(once))
    assert torch.equal(bits(flatten(module)), before)


def test_weights_come_back_after_an_exception_while_perturbing(monkeypatch: pytest.MonkeyPatch) -> None:
    from perturbkit.core import parameters

    module = Weights(wild(1, torch.float32, n=200_000))  # several blocks
    before = bits(flatten(module)).clone()
    calls = []

    def failing(weight: Tensor, back: Tensor) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return original(weight, back)

    original = parameters._lost
    monkeypatch.setattr(parameters, "_lost", failing)
    with pytest.raises(MemoryError), perturbed(module, 1, 0.5):
        pass
    assert torch.equal(bits(flatten(module)), before)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.03), (torch.float64, 0.03), (torch.bfloat16, 0.05)]
)
def test_little_is_kept_for_a_small_perturbation(dtype: torch.dtype, share: float) -> None:
    g = torch.Generator().manual_seed(0)
    module = Weights((0.05 * torch.randn(40_000, generator=g, dtype=torch.float64)).to(dtype))
    copy = flatten(module).nbytes
    with perturbed(module, 3, 1e-3 * 0.05) as kept:
        assert 0 < kept.nbytes < share * copy
    with perturbed(module, 3, 100.0) as kept:
        # Weights whose digits are lost have to be kept, but never more than a copy.
        assert 0.5 * copy <= kept.nbytes <= copy


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaling_moves_along_the_same_direction_and_still_restores(dtype: torch.dtype) -> None:
    module = Weights(wild(4, dtype))
    before = [bits(p).clone() for p in module.parameters()]
    with perturbed(module, 9, 0.3) as kept:
        kept.rescale(-0.7)
        inside = flatten(module)
        with torch.no_grad():
            assert kept.scale == -0.7
    with perturbed(module, 9, -0.7):
        assert torch.equal(bits(inside), bits(flatten(module)))
    assert all(torch.equal(bits(p), b) for p, b in zip(module.parameters(), before, strict=True))


def test_settling_leaves_multiples_of_the_weights_and_the_direction_for_good() -> None:
    for factors, keep in ((0.5, 1.0), ([0.0, 1.0, -2.0, 0.5, 3.0, 4.0], [1.0, 0.9, 1.0, 0.5, 1.0, 0.0])):
        module = net()
        before, z = flatten(module), seeded_direction(module, 3)
        with perturbed(module, 3, 0.7) as at:
            at.settle(factors, keep)
            assert (at.scale, at.nbytes, at.moved) == (0.0, 0, False)
        each = [
            torch.cat(
                [
                    torch.full((p.numel(),), f, dtype=p.dtype)
                    for p, f in zip(module.parameters(), given, strict=True)
                ]
            )
            if isinstance(given, list)
            else given
            for given in (factors, keep)
        ]
        torch.testing.assert_close(flatten(module), each[1] * before + each[0] * z)


def test_replacing_leaves_what_is_made_of_the_weights_before_they_were_moved() -> None:
    g = torch.Generator().manual_seed(6)
    weights = [nn.Parameter(torch.randn(n, generator=g)) for n in (70_000, 11)]
    before, z = [p.detach().clone() for p in weights], seeded_direction(weights, 3)
    seen: list[Tensor] = []

    def halved(block: Block, weight: Tensor, direction: Tensor) -> Tensor:
        seen.append(direction.clone())
        assert torch.equal(bits(weight), bits(block.read(before)))
        return weight / 2

    with perturbed(weights, 3, 0.7) as at:
        at.rescale(-0.7)
        at.replace(halved)
        assert (at.scale, at.nbytes, at.moved) == (0.0, 0, False)
    assert torch.equal(torch.cat(seen), z)
    assert all(torch.equal(p, b / 2) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 0.3], ids=["small", "large"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_kept_takes_two_bytes_a_place(scale: float, transposed: bool) -> None:
    """A transposed parameter is one block, longer than two bytes can count."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(300, 700, generator=g)
    p = nn.Parameter(weight.T if transposed else weight)
    before = p.detach().clone()
    z = seeded_direction([p], 3).reshape(p.shape)
    away = before + scale * z
    lost = int((bits(away - scale * z) != bits(before)).sum())
    with perturbed([p], 3, scale) as kept:
        assert 6 * lost <= kept.nbytes < 6 * lost + 100
        kept.rescale(-scale)
        kept.rescale(2 * scale)
        torch.testing.assert_close(p.detach(), before + 2 * scale * z)
    assert torch.equal(p, before)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_large_and_transposed_parameters_are_moved_whole_and_restored(layout: str) -> None:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 500, generator=g)
    p = nn.Parameter(weight.T if layout == "transposed" else weight)
    before = p.detach().clone()
    z = seeded_direction([p], 1).reshape(p.shape)
    assert abs(float(z.std()) - 1) < 0.01
    with perturbed([p], 1, 0.5):
        torch.testing.assert_close(p.detach(), before + 0.5 * z)
    assert torch.equal(p, before)
    step([p], 1, 2.0)
    torch.testing.assert_close(p.detach(), before + 2 * z)


def test_parameters_may_be_given_instead_of_their_module_and_each_have_a_factor() -> None:
    module = net()
    before, z = flatten(module), seeded_direction(module, 3)
    assert torch.equal(z, seeded_direction(module.parameters(), 3))
    factors = [0.0, 1.0, -2.0, 0.5, 3.0, 4.0]
    each = torch.cat(
        [
            torch.full((p.numel(),), f, dtype=p.dtype)
            for p, f in zip(module.parameters(), factors, strict=True)
        ]
    )
    step(module.parameters(), 3, factors)
    torch.testing.assert_close(flatten(module), before + each * z)


def test_the_graph_and_modes_are_left_alone() -> None:
    module = net()
    x = torch.ones(4, 3, dtype=torch.float64)
    module(x).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    with perturbed(module, 0, 0.1):
        assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))
    assert module.training


def test_step_adds_the_seeded_direction() -> None:
    for name in ("gaussian", "rademacher"):
        module = net()
        before = flatten(module)
        step(module, 11, 0.25, name)
        torch.testing.assert_close(flatten(module), before + 0.25 * seeded_direction(module, 11, name))
    signs = seeded_direction(module, 11, "rademacher")
    assert (signs.abs() == 1).all()
    z = seeded_direction(Weights(torch.zeros(20_000)), 4)
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.03
    assert not torch.equal(z, seeded_direction(Weights(torch.zeros(20_000)), 5))


def test_vector_round_trip_leaves_frozen_parameters_out() -> None:
    module = Weights(wild(0, torch.float32))
    vector = flatten(module)
    assert vector.shape == (400,)
    assert flatten(module, trainable_only=False).shape == (403,)
    assert vector.data_ptr() != module.a.data_ptr()
    assert not vector.requires_grad
    assign(module, 2 * vector)
    torch.testing.assert_close(flatten(module), 2 * vector)
    assert (module.frozen == 1).all()
    assign(module, torch.zeros(403), trainable_only=False)
    assert (module.frozen == 0).all()
    pieces = unflatten(vector, module)
    assert list(pieces) == ["a", "b"]
    assert pieces["b"].shape == module.b.shape


def test_tied_and_mixed_parameters() -> None:
    module = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1, dtype=torch.float64)
    )
    module[1].weight = module[0].weight
    vector = flatten(module)
    assert (vector.shape, vector.dtype) == ((13,), torch.float64)
    assert {n: p.dtype for n, p in unflatten(vector, module).items()} == {
        "0.weight": torch.float32,
        "2.weight": torch.float64,
        "2.bias": torch.float64,
    }
    out = functional(module[:2])(torch.ones(9), torch.ones(1, 3))
    assert torch.equal(out, torch.full((1, 3), 9.0))


def test_functional_is_the_module_and_leaves_its_buffers() -> None:
    module = net()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    call = functional(module)
    vector = flatten(module).requires_grad_(True)
    out = call(vector, x)
    out.square().sum().backward()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    assert int(state["1.num_batches_tracked"]) == 0
    want = module(x)
    torch.testing.assert_close(out, want)
    want.square().sum().backward()
    torch.testing.assert_close(vector.grad, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    module.eval()
    jacobian = torch.func.jacrev(lambda v: call(v, x).sum(0))(vector.detach())
    assert jacobian.shape == (2, len(vector))


def made_in_inference_mode() -> list[Tensor]:
    with torch.inference_mode():
        return [torch.ones(3)]


def of_the_same_memory(n: int) -> list[Tensor]:
    weight = torch.ones(n)
    return [nn.Parameter(torch.ones(3)), nn.Parameter(weight), nn.Parameter(weight.view(2, -1))]


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (made_in_inference_mode(), "weight 0 was made in inference mode"),
        ([torch.ones(3), torch.ones(1, 1).expand(4, 1)], "weight 1 is expanded"),
        (of_the_same_memory(4), "weight 2 lies in the memory of weight 1"),
        (of_the_same_memory(200_000), "weight 2 lies in the memory of weight 1"),
    ],
    ids=["inference", "expanded", "shared", "shared-large"],
)
def test_weights_that_could_not_be_restored_are_refused_before_the_first_change(weights, match) -> None:
    """PyTorch writes to some of these before it complains, and moves twice what lies in the same memory."""
    with pytest.raises(checks.ArgumentError, match=match), perturbed(weights, 1, 0.5, trainable_only=False):
        pass
    with pytest.raises(checks.ArgumentError, match=match):
        step(weights, 1, 0.5, trainable_only=False)
    assert all(bool((w == 1).all()) for w in weights)


def test_views_of_one_memory_and_empty_weights_come_back() -> None:
    memory = torch.arange(12.0)
    weights = [memory[:5], memory[5:], torch.zeros(0), torch.zeros(3, 0), torch.ones(1).expand(1)]
    with perturbed(weights, 1, 0.5, trainable_only=False):
        assert not torch.equal(memory, torch.arange(12.0))
    assert torch.equal(memory, torch.arange(12.0))


def test_global_generator_is_untouched() -> None:
    before = torch.random.get_rng_state()
    module = Weights(wild(0, torch.float32))
    step(module, 0, 1.0)
    with perturbed(module, 0, 1.0):
        pass
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flatten(nn.ReLU()), "no trainable parameters"),
        (lambda: flatten(nn.Linear(1, 1).requires_grad_(False)), "trainable_only=False"),
        (lambda: flatten(torch.sin), "nn.Module"),
        (lambda: unflatten(torch.zeros(3), nn.Linear(1, 1)), r"shape \(2,\)"),
        (lambda: assign(nn.Linear(1, 1), [1.0, 2.0]), "a list"),
        (lambda: step(nn.Linear(1, 1), 0.5, 1.0), "seed"),
        (lambda: step(nn.Linear(1, 1), 0, float("inf")), "scale"),
        (lambda: step(nn.Linear(1, 1), 0, [1.0]), "1 factors; allowed: one, or 2"),
        (lambda: step(torch.ones(3), 0, 1.0), "a Tensor"),
        (lambda: step(nn.Linear(1, 1), 0, 1.0, "uniform"), "distribution"),
        (lambda: perturbed(nn.Linear(1, 1), 0, 1.0, "uniform").__enter__(), "distribution"),
        (lambda: perturbed(nn.Linear(1, 1), None, 1.0).__enter__(), "seed"),
        (lambda: functional(nn.ReLU()), "no trainable"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_a_tensor_that_is_given_twice_is_moved_once_and_comes_back():
    w = torch.randn(70_000, generator=torch.Generator().manual_seed(1))
    before = w.clone()
    with perturbed([w, w], 1, 0.5, trainable_only=False):
        assert torch.equal(w, before + 0.5 * seeded_direction([before], 1, trainable_only=False))
    assert torch.equal(w, before)
