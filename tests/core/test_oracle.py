"""The oracle: exact counts, chunks that do not matter, bounded memory, and a model left as it was."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from perturbkit.core import Cost, Oracle, checks, parse_memory, target_rows, unwrap_output


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
        ).double()


class Recorder:
    """Counts the rows it is given, and runs out of memory above a number of them."""

    def __init__(self, limit: int = 10**9, text: str = "DefaultCPUAllocator: not enough memory") -> None:
        self.batches: list[int] = []
        self.limit, self.text = limit, text

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise RuntimeError(self.text)
        self.batches.append(len(x))
        return x.square().sum(1, keepdim=True)


def test_rows_are_counted_exactly() -> None:
    oracle = Oracle(net(), chunk_size=4)
    x, t = draw(0, 10, 4), torch.arange(10) % 3
    oracle(x)
    assert oracle.cost == Cost(10, 0, 0)
    oracle.value(x[:3], 1)
    assert oracle.cost == Cost(13, 0, 0)
    oracle.value_and_gradient(x, t)
    assert oracle.cost == Cost(23, 10, 0)
    oracle.gradient(x[:1], 0)
    assert oracle.cost == Cost(24, 11, 0)
    oracle.vjp(x, draw(1, 10, 3))
    assert oracle.cost == Cost(34, 21, 0)
    oracle.jvp(x, draw(1, 10, 4))
    assert oracle.cost == Cost(44, 21, 10)
    assert (oracle.nfev, oracle.ngrad, oracle.njvp) == (44, 21, 10)


def test_the_measuring_row_is_not_counted() -> None:
    seen = Recorder()
    oracle = Oracle(seen)
    oracle(draw(0, 6, 4))
    assert (seen.batches, oracle.nfev) == ([1, 6], 6)
    oracle(draw(0, 5, 4))
    assert (seen.batches, oracle.nfev) == ([1, 6, 5], 11)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_results_do_not_depend_on_the_chunk_size(size: int) -> None:
    x, t, u, v = draw(0, 10, 4), torch.arange(10) % 3, draw(1, 10, 3), draw(2, 10, 4)
    one, many = Oracle(net(), chunk_size=10), Oracle(net(), chunk_size=size)
    for ask in (
        lambda o: (o(x),),
        lambda o: (o.value(x, t),),
        lambda o: o.value_and_gradient(x, t),
        lambda o: o.vjp(x, u),
        lambda o: o.jvp(x, v),
    ):
        for a, b in zip(ask(one), ask(many), strict=True):
            torch.testing.assert_close(a, b)
    assert one.cost == many.cost


def test_derivatives_agree_with_autograd() -> None:
    model = net().eval()
    x, t, u, v = draw(0, 10, 4), torch.arange(10) % 3, draw(1, 10, 3), draw(2, 10, 4)
    jacobian = torch.stack([torch.func.jacrev(lambda a: model(a[None])[0])(row) for row in x])
    oracle = Oracle(model, chunk_size=4)
    out = model(x).detach()
    value, gradient = oracle.value_and_gradient(x, t)
    torch.testing.assert_close(value, out[torch.arange(10), t])
    torch.testing.assert_close(gradient, jacobian[torch.arange(10), t].detach())
    torch.testing.assert_close(oracle.gradient(x, t), gradient)
    for got, want in (
        (oracle.vjp(x, u), torch.einsum("nk,nkd->nd", u, jacobian)),
        (oracle.jvp(x, v), torch.einsum("nkd,nd->nk", jacobian, v)),
    ):
        torch.testing.assert_close(got[0], out)
        torch.testing.assert_close(got[1], want.detach())


def test_objectives_and_further_rows() -> None:
    x, scale = draw(0, 7, 4), draw(1, 7, 1)
    oracle = Oracle(lambda a, s: a * s, chunk_size=3)
    torch.testing.assert_close(oracle(x, scale), x * scale)
    torch.testing.assert_close(oracle.value(x, 2, scale), (x * scale)[:, 2])
    loss = lambda out, target: nn.functional.cross_entropy(out, target, reduction="none")
    t = torch.arange(7) % 4
    value, gradient = oracle.value_and_gradient(x, t, scale, objective=loss)
    torch.testing.assert_close(value, loss(x * scale, t))
    want = scale * ((x * scale).softmax(1) - nn.functional.one_hot(t, 4))
    torch.testing.assert_close(gradient, want)
    value, gradient = oracle.value_and_gradient(x, None, scale, objective=lambda out, _: out.square().sum(1))
    torch.testing.assert_close(gradient, 2 * x * scale**2)


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: not enough memory", "CUDA out of memory. Tried"])
def test_chunks_are_halved_when_memory_runs_out(text: str, caplog: pytest.LogCaptureFixture) -> None:
    seen = Recorder(3, text)
    oracle = Oracle(seen, chunk_size=20)
    x = draw(0, 20, 4)
    with caplog.at_level(logging.WARNING, "perturbkit"):
        torch.testing.assert_close(oracle(x)[:, 0], x.square().sum(1))
    assert [r.message for r in caplog.records] == [
        f"out of memory: continuing with chunks of {k} rows" for k in (10, 5, 2)
    ]
    # No row was answered twice, and none is counted twice.
    assert seen.batches == [2] * 10
    assert oracle.nfev == 20
    # The lesson is kept.
    caplog.clear()
    oracle(x)
    assert not caplog.records


def test_other_errors_and_hopeless_memory_are_raised() -> None:
    with pytest.raises(RuntimeError, match="not enough memory"):
        Oracle(Recorder(0), chunk_size=4)(draw(0, 4, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Oracle(net(), chunk_size=4)(draw(0, 4, 5))


def test_the_memory_budget_bounds_a_chunk() -> None:
    # One row makes activations of 8000 bytes each; two live at once, the row's own and the next.
    sizes: list[int] = []

    def wide(x: Tensor) -> Tensor:
        sizes.append(len(x))
        y = x[:, :1].expand(-1, 1000) * 2.0
        for _ in range(10):
            y = y + 1
        return y.sum(1)

    Oracle(wide, memory=200_000)(draw(0, 100, 1))
    assert 8 <= max(sizes) <= 25
    forward = max(sizes)
    sizes.clear()
    deep = nn.Sequential(*[nn.Tanh() for _ in range(20)])
    oracle = Oracle(lambda x: (sizes.append(len(x)), deep(x))[1].sum(1), memory=2_000_000)
    oracle(draw(0, 1000, 1000))
    free = max(sizes)
    sizes.clear()
    oracle.gradient(draw(0, 1000, 1000))
    # A backward pass keeps all twenty activations.
    assert max(sizes) * 5 < free
    assert sum(Oracle(wide, memory=200_000).chunks(100, draw(0, 1, 1))) == 100
    assert max(Oracle(wide, memory=200_000).chunks(100, draw(0, 1, 1))) == forward


def test_inputs_and_weights_are_not_activations() -> None:
    # Views of the whole batch's storage, and of weights far larger than the budget, cost no row anything.
    sizes: list[int] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(2000, 2000, bias=False), nn.Linear(2000, 2)).double()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x = draw(0, 300, 2, 1000)
    Oracle(model, memory=2_000_000)(x)
    # 16 kB for the wide layer of one row; 4.8 MB of inputs and 32 MB of weights are not counted.
    assert 60 <= max(sizes) <= 125


class Moody(nn.Module):
    """A model with parts in different modes that can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.body[1].eval()
        self.body[4].weight.requires_grad_(False)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        assert not any(m.training for m in self.modules())
        assert not any(p.requires_grad for p in self.parameters())
        if self.fail:
            raise KeyError("inside")
        return self.body(x)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("query", ["__call__", "gradient", "vjp", "jvp", "frozen"])
def test_the_model_is_left_as_it_was(fail: bool, query: str) -> None:
    model = Moody()
    x = draw(0, 6, 4)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    model.body.register_forward_hook(lambda *_: None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    graded = [p.requires_grad for p in model.parameters()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    assert len(set(modes)) == len(set(graded)) == 2
    model.fail = fail
    oracle = Oracle(model, chunk_size=2)

    def ask() -> None:
        if query == "frozen":
            with oracle.frozen():
                model(x)
        elif query == "gradient":
            oracle.gradient(x, 0)
        elif query in ("vjp", "jvp"):
            getattr(oracle, query)(x, draw(1, 6, 3 if query == "vjp" else 4))
        else:
            oracle(x)

    if fail:
        with pytest.raises(KeyError, match="inside"):
            ask()
    else:
        ask()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == graded
    assert all((p.grad == 2).all() for p in model.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]


def test_answers_carry_no_graph_and_inputs_are_not_changed() -> None:
    x = draw(0, 4, 4).requires_grad_(True)
    before = x.detach().clone()
    oracle = Oracle(net())
    for out in (
        oracle(x),
        *oracle.value_and_gradient(x, 1),
        *oracle.vjp(x, draw(1, 4, 3)),
        *oracle.jvp(x, draw(1, 4, 4)),
    ):
        assert not out.requires_grad
    assert x.grad is None
    assert torch.equal(x.detach(), before)
    with torch.no_grad():
        assert oracle.gradient(x, 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow(dtype: torch.dtype) -> None:
    oracle = Oracle(net().to(dtype), device="cpu")
    value, gradient = oracle.value_and_gradient(draw(0, 4, 4).to(dtype), 1)
    assert value.dtype == gradient.dtype == dtype


def test_outputs_in_other_wrappings() -> None:
    out = torch.ones(2, 3)
    assert unwrap_output(out) is out
    assert unwrap_output(SimpleNamespace(logits=out, loss=None)) is out
    assert unwrap_output({"logits": out}) is out
    assert unwrap_output((out,)) is out
    x = draw(0, 4, 3)
    assert torch.equal(Oracle(lambda a: SimpleNamespace(logits=a))(x), x)
    for wrong in ((out, out), [out], {"scores": out}, None, SimpleNamespace(logits=None)):
        with pytest.raises(checks.ModelError, match="Wrap the model"):
            unwrap_output(wrong)


def test_wrap_keeps_an_oracle() -> None:
    oracle = Oracle(net())
    assert Oracle.wrap(oracle, chunk_size=1) is oracle
    assert Oracle.wrap(net(), chunk_size=7).chunk_size == 7


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("512MB", 512_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("10kb", 10_000),
        ("3 KiB", 3072),
        ("7", 7),
        ("8B", 8),
        (9, 9),
    ],
)
def test_memory_sizes(given, size: int) -> None:
    assert parse_memory(given) == size


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Oracle(3), "allowed: an nn.Module or a callable"),
        (lambda: Oracle(net(), memory="lots"), "memory is 'lots'"),
        (lambda: Oracle(net(), memory="3 parsecs"), "4GB"),
        (lambda: Oracle(net(), memory="-1MB"), "memory"),
        (lambda: Oracle(net(), memory=0), "memory is 0"),
        (lambda: Oracle(net(), memory=1.5), "integer"),
        (lambda: Oracle(net(), chunk_size=0), "chunk_size"),
        (lambda: Oracle(net())(draw(0, 0, 4)), "no rows"),
        (lambda: Oracle(lambda x: x.sum())(draw(0, 4, 4)), "one row an input"),
        (lambda: Oracle(lambda x: x[:2])(draw(0, 4, 4)), "one row an input"),
        (lambda: Oracle(lambda x: [x])(draw(0, 4, 4)), "answered a list"),
        (lambda: Oracle(net()).value(draw(0, 4, 4)), "3 outputs"),
        (lambda: Oracle(net()).value(draw(0, 4, 4), 3), r"0\.\.2"),
        (lambda: Oracle(net()).value(draw(0, 4, 4), -1), "target"),
        (lambda: Oracle(net()).value(draw(0, 4, 4), torch.zeros(3, dtype=torch.long)), "4 labels"),
        (lambda: Oracle(net()).value(draw(0, 4, 4), torch.zeros(4)), "integer"),
        (lambda: Oracle(lambda x: x.sum(1)).value(draw(0, 4, 4), 0), "one output"),
        (lambda: Oracle(net()).jvp(draw(0, 4, 4), draw(0, 4, 3)), "tangent"),
        (lambda: Oracle(lambda x, m: x * m)(draw(0, 4, 4), draw(0, 3, 4)), "the 4 rows"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_a_model_that_writes_into_its_input_is_refused():
    with pytest.raises(checks.ModelError, match="writes into its input"):
        Oracle(lambda x: x.mul_(2))(torch.ones(3, 2))


def test_targets_are_one_index_a_row() -> None:
    x = torch.zeros(3, 2)
    assert target_rows(None, x) is None
    assert torch.equal(target_rows(2, x), torch.tensor([2, 2, 2]))
    assert torch.equal(target_rows(torch.tensor([0, 1, 4]), x), torch.tensor([0, 1, 4]))
    for wrong in (torch.tensor([0, 1]), torch.tensor([0.5, 1.0, 2.0]), -1):
        with pytest.raises(checks.PerturbkitError, match=r"target|labels"):
            target_rows(wrong, x)


class Repeating(nn.Module):
    """Holds as many copies of a row as it is told."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.times).sum(0)


class Alike(Repeating):
    """Calls every other of its kind equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    def __hash__(self) -> int:
        return 1


def test_what_a_row_takes_is_measured_anew_where_the_module_has_changed() -> None:
    x = draw(1, 3, 1000)
    model = nn.Sequential(Repeating(1), nn.Identity())
    few = Oracle(model).row_memory(x)
    assert Oracle(model).row_memory(x) == few
    model[0] = Repeating(50)
    many = Oracle(model).row_memory(x)
    assert many > 20 * few
    model[0] = Repeating(1)
    assert Oracle(model).row_memory(x) == few
    handle = model[1].register_forward_hook(lambda module, given, out: torch.stack([out] * 50).sum(0))
    assert Oracle(model).row_memory(x) > 20 * few
    handle.remove()
    assert Oracle(model).row_memory(x) == few


def test_modules_that_call_themselves_equal_are_measured_each() -> None:
    x = draw(1, 3, 1000)
    one, other = Alike(1), Alike(50)
    assert Oracle(other).row_memory(x) > 20 * Oracle(one).row_memory(x)
