"""Oracles of AtMan: closed forms of one attention layer, plain attention as reference, and real transformers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle, checks
from perturbkit.core.oracle import _LivingBytes
from perturbkit.explain import atman, attention_hooks, suppress_attention


def filled(module, seed=0, scale=1.0):
    """Give a module seeded weights."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
    return module


def built(factory, seed=0, scale=0.3):
    with torch.random.fork_rng(devices=[]):
        return filled(factory(), seed, scale).eval()


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(n=2, length=6, vocabulary=11, seed=3):
    return torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


class OneLayer(nn.Module):
    """Attention without residual, averaged over positions."""

    def __init__(self, width=8, heads=2, classes=3):
        super().__init__()
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Decoder(nn.Module):
    """A transformer with causal attention that answers logits at every position."""

    def __init__(self, vocabulary=11, width=8, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, attention_mask=None):
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=self.head.weight.dtype).triu(1)
        hidden = None if attention_mask is None else attention_mask == 0
        return self.head(self.layers(self.embedding(ids), mask=mask, src_key_padding_mask=hidden))


class Classifier(Decoder):
    def forward(self, ids, attention_mask=None):
        return super().forward(ids, attention_mask)[:, -1, :3]


def bert(implementation="eager"):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3, attn_implementation=implementation,
    )  # fmt: skip
    return built(lambda: transformers.BertForSequenceClassification(config)).double()


def gpt2(implementation="eager"):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, attn_implementation=implementation
    )
    return built(lambda: transformers.GPT2LMHeadModel(config)).double()


def next_tokens(ids, at=(-2,)):
    target = torch.full_like(ids, -100)
    for position in at:
        target[:, position] = ids[:, position + 1]
    return target


def small(dtype=torch.float64):
    return built(Classifier).to(dtype)


EXAMPLE = Example(
    model=Classifier,
    with_model=lambda model, generator, dtype: atman(model, tokens(), 1, cosine_threshold=0.2),
    chunked=lambda size: atman(Oracle(small(), chunk_size=size), tokens(), 1, cosine_threshold=0.2),
    refusals=(
        (lambda: atman(small(), tokens(), 1, suppression=1.5), "suppression is 1.5"),
        (lambda: atman(small(), tokens(), 1, cosine_threshold=2.0), "cosine_threshold is 2"),
        (lambda: atman(small(), tokens(), 5), "largest value of 5"),
        (lambda: atman(small(), tokens(), torch.full((2, 6), -100)), "at every position"),
        (lambda: atman(small(), tokens(), torch.zeros(3, dtype=torch.int64)), "target has shape"),
        (lambda: atman(lambda z: z, tokens(), 1), "model is a function"),
        (lambda: atman(nn.Flatten(), tokens(), 1, cosine_threshold=None), "no attention module"),
        (lambda: atman(nn.Flatten(), tokens(), 1), "no get_input_embeddings"),
        (lambda: atman(small(), tokens(), 1, attention_mask=torch.ones(2, 5)), "attention_mask has shape"),
        (lambda: suppress_attention(draw(1, 2, 3), draw(1, 4)), "factors has shape"),
        (lambda: suppress_attention(draw(1, 2, 3), -torch.ones(1, 3)), "smallest value of -1"),
    ),
)


def test_the_shift_and_the_mask_in_closed_form():
    scores, factors = draw(2, 3, 4, 5), torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(4, 5, dtype=torch.bool).triu(1)
    found = suppress_attention(scores, factors, mask)
    for row in range(2):
        for head in range(3):
            for i in range(4):
                low = scores[row, head, i, : i + 1].min()
                for j in range(5):
                    expected = (scores[row, head, i, j] - low) * factors[row, j] if j <= i else -1e4
                    assert float(found[row, head, i, j]) == pytest.approx(float(expected), abs=1e-12)


def test_a_negative_score_turned_down_loses_attention():
    scores = torch.tensor([[[-1.0, -2.0, -4.0]]])
    before = scores.softmax(-1)[0, 0, 0]
    after = suppress_attention(scores, torch.tensor([[0.1, 1.0, 1.0]])).softmax(-1)[0, 0, 0]
    assert float(after) < float(before)


def test_full_suppression_sets_the_logit_to_the_smallest_of_its_row():
    model, x = built(OneLayer, scale=1.0).double(), draw(3, 5, 8)
    found = atman(model, x, 1, suppression=1.0, cosine_threshold=None)
    mix, parts = model.mix, model.mix.in_proj_weight.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(2, (2, 4)).transpose(1, 2)
        for w, b in zip(parts, mix.in_proj_bias.chunk(3), strict=True)
    )
    scores = q @ k.mT / 2.0

    def loss(edited):
        out = mix.out_proj((edited.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)
        return functional.cross_entropy(model.head(out), torch.ones(3).long(), reduction="none")

    for i in range(5):
        edited = scores.clone()
        edited[..., i] = scores.amin(-1)
        expected = (loss(edited) - loss(scores)).detach()
        torch.testing.assert_close(found.values[:, i, 0], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.extras["base_loss"], loss(scores).detach(), rtol=1e-10, atol=1e-12)
    assert found.cost.nfev == 3 * 6


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_no_suppression_gives_exactly_zero(threshold):
    for model, target in ((small(), 2), (gpt2(), next_tokens(tokens()))):
        found = atman(model, tokens(), target, suppression=0.0, cosine_threshold=threshold)
        assert bool((found.values == 0).all())


@pytest.mark.parametrize("make", [lambda: built(Decoder).double(), gpt2, lambda: gpt2("sdpa")])
def test_tokens_that_no_scored_position_sees_get_exactly_zero(make):
    ids = tokens(2, 8)
    found = atman(make(), ids, next_tokens(ids, at=(3, 4)), cosine_threshold=None)
    assert bool((found.values[:, 5:] == 0).all())
    assert bool((found.values[:, :5] != 0).all())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_eager_and_fused_attention_agree(make):
    ids = tokens()
    target = 1 if make is bert else next_tokens(ids, at=(2, 4))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    found = [atman(make(kind), ids, target, attention_mask=mask) for kind in ("eager", "sdpa")]
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-8, atol=1e-10)
    assert float(found[0].values.abs().max()) > 1e-6
    plain = make()(input_ids=ids, attention_mask=mask).logits.detach()
    rows = target if make is gpt2 else torch.full((2,), 1)
    loss = functional.cross_entropy(plain.flatten(0, -2), rows.flatten(), reduction="none")
    expected = loss.reshape(2, -1).sum(1)
    torch.testing.assert_close(found[0].extras["base_loss"], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_padding_gets_zero_and_changes_nothing(kind):
    model, ids = bert(kind), tokens(1, 5)
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=ids.dtype)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    found = atman(model, padded, 2, attention_mask=mask, cosine_threshold=None)
    single = atman(model, ids, 2, attention_mask=torch.ones_like(ids), cosine_threshold=None)
    torch.testing.assert_close(found.values[:, :5], single.values, rtol=1e-8, atol=1e-10)
    assert float(found.values[:, 5:].abs().max()) < 1e-12


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_against_plain_attention(need_weights, batch_first):
    layer = built(lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first), scale=1.0).double()
    x, factors = draw(3, 5, 8), torch.rand(3, 5, generator=torch.Generator().manual_seed(2)).double()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    q, k, v = (
        (x @ w.T + b).unflatten(2, (2, 4)).transpose(1, 2)
        for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    )
    weights = suppress_attention(q @ k.mT / 2.0, factors, causal).softmax(-1)
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(2)).detach()
    given = x if batch_first else x.transpose(0, 1)
    with torch.no_grad(), attention_hooks(layer, factors):
        out, shown = layer(given, given, given, attn_mask=causal, need_weights=need_weights)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected, rtol=1e-10, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(shown, weights.mean(1).detach(), rtol=1e-10, atol=1e-12)


def test_grouped_queries_and_causal_attention_without_a_mask():
    class Grouped(nn.Module):
        def forward(self, q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    q, k, v = draw(2, 4, 9, 3), draw(2, 2, 9, 3, seed=2), draw(2, 2, 9, 3, seed=3)
    factors = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)).double()
    with attention_hooks(layer := Grouped(), factors, attention=lambda m: True):
        found = layer(q, k, v)
    wide_k, wide_v = (z.repeat_interleave(2, 1) for z in (k, v))
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = suppress_attention(q @ wide_k.mT / 3**0.5, factors, causal).softmax(-1)
    torch.testing.assert_close(found, weights @ wide_v, rtol=1e-10, atol=1e-12)


def test_neighbours_are_turned_down_by_their_cosine():
    model = built(OneLayer, scale=1.0).double()
    x = draw(1, 5, 8)
    x[0, 3] = 2.0 * x[0, 1] + 0.1 * x[0, 2]
    cosine = functional.cosine_similarity(x[0][:, None], x[0][None], dim=-1)
    assert float(cosine[1, 3]) > 0.9
    found = atman(model, x, 0, suppression=0.8, cosine_threshold=0.9)
    for i in range(5):
        factors = torch.where(cosine[i] >= 0.9, 1 - 0.8 * cosine[i], torch.ones(5).double())[None]
        with torch.no_grad(), attention_hooks(model, factors):
            loss = functional.cross_entropy(model(x), torch.zeros(1).long())
        with torch.no_grad():
            base = functional.cross_entropy(model(x), torch.zeros(1).long())
        torch.testing.assert_close(found.values[0, i, 0], loss - base, rtol=1e-8, atol=1e-10)


def test_hooks_come_off_also_after_an_exception():
    model, ids = small(), tokens()
    plain = model(ids)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    broken = model.layers.layers[1].linear1.register_forward_hook(stop)
    with pytest.raises(Stop):
        atman(model, ids, 1)
    broken.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(model(ids), plain)
    assert all(p.requires_grad for p in model.parameters())


def test_attention_that_cannot_be_reached_is_refused_and_not_passed_over():
    class BlindAttention(nn.Module):
        def forward(self, x):
            return (x @ x.mT / 3).sigmoid() @ x

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = BlindAttention()

        def forward(self, x):
            return x.mean(1)

    with pytest.raises(checks.ModelError, match=r"ran without scores.*allowed"):
        atman(nn.Sequential(BlindAttention(), nn.Flatten()), draw(1, 3, 4), 0)
    with pytest.raises(checks.ModelError, match=r"without its attention modules; allowed"):
        atman(Unused(), draw(1, 3, 4), 0)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_memory_is_within_a_tenth_of_a_forward_pass(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=128, attn_implementation=kind,
    )  # fmt: skip
    model = built(lambda: transformers.BertForSequenceClassification(config))
    ids = tokens(8, 96, 50)

    def peak(edited):
        # Flash attention on a CPU hides its blocks inside one operation; what it returns is counted.
        with torch.no_grad(), _LivingBytes() as living:
            if edited:
                with attention_hooks(model, torch.full((8, 96), 0.5)):
                    model(ids)
            else:
                model(ids)
        return living.peak

    assert peak(True) <= 1.1 * peak(False)
