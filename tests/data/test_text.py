from collections import Counter

import pytest
import torch

from perturbkit.core import checks
from perturbkit.data import load_sentences, text_model


@pytest.fixture(scope="module")
def model():
    return text_model()


def test_sentences():
    data, train, test = load_sentences(), load_sentences("train"), load_sentences("test")
    assert len(data) == 406
    assert len(set(data.x)) == 406
    assert Counter(data.y.tolist()) == {0: 203, 1: 203}
    assert len(train) + len(test) == 406
    assert not set(train.x) & set(test.x)
    assert Counter(test.y.tolist()) == {0: 49, 1: 49}
    assert set(test.extras["topic"]) == set(train.extras["topic"])
    assert len(set(data.extras["topic"])) == 7
    assert all(s == s.strip() and s.endswith(".") for s in data.x)
    assert data.licence == "Apache-2.0"


def test_head_is_right_on_held_out_sentences(model):
    test = load_sentences("test")
    p = model.module.predict(test.x)
    torch.testing.assert_close(p.sum(1), torch.ones(len(test)))
    right = float((p.argmax(1) == test.y).float().mean())
    assert right >= 0.8
    assert right == pytest.approx(model.accuracy, abs=0.011)


def test_padding_does_not_change_an_answer(model):
    short, long = (
        "Great.",
        "The room was small, but we could not have been happier with the view and the food.",
    )
    together = model.module.predict([short, long])
    torch.testing.assert_close(together[:1], model.module.predict([short]), atol=1e-5, rtol=0)


def test_embeddings_go_in_and_gradients_come_out(model):
    batch = model.module.encode(["A wonderful film.", "It broke on the second day."])
    e = model.module.embeddings(batch["input_ids"]).detach().requires_grad_(True)
    out = model.module(inputs_embeds=e, attention_mask=batch["attention_mask"])
    with torch.no_grad():
        torch.testing.assert_close(out, model.module(**batch), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(out[:, 1].sum(), e)
    assert gradient.abs().sum(-1)[batch["attention_mask"] == 1].min() > 0


def test_tokenizer_is_the_models_own(model):
    ids = model.module.encode(["Hello, world!"])["input_ids"][0]
    tokens = model.module.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["[CLS]", "hello", ",", "world", "!", "[SEP]"]
    assert model.module.encode(["word " * 500])["input_ids"].shape == (1, 128)


def test_loading_is_quiet_offline_and_leaves_global_state(capsys, monkeypatch):
    import os
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    state, environment = torch.get_rng_state(), dict(os.environ)
    made = text_model()
    assert torch.equal(state, torch.get_rng_state())
    assert dict(os.environ) == environment
    assert capsys.readouterr() == ("", "")
    assert not any(m.training for m in made.module.modules())


def test_refusals(model):
    with pytest.raises(checks.ArgumentError, match="'train', 'test', 'all'"):
        load_sentences("dev")
    with pytest.raises(checks.ArgumentTypeError, match="Put a single text into a list"):
        model.module.predict("A wonderful film.")
    with pytest.raises(checks.ArgumentTypeError, match="at least one str"):
        model.module.encode([])
    with pytest.raises(checks.ArgumentError, match="neither of input_ids and inputs_embeds"):
        model.module()
