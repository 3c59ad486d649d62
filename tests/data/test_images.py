import pytest
import torch

from perturbkit.core import checks
from perturbkit.data import image_model, load_photographs


@pytest.fixture(scope="module")
def model():
    return image_model()


def test_photographs():
    photos = load_photographs()
    assert photos.x.shape == (8, 3, 224, 224)
    assert photos.x.dtype == torch.float32
    assert 0 <= photos.x.min() < photos.x.max() <= 1
    names = [photos.class_names[i] for i in photos.y.tolist()]
    assert names == [
        "espresso",
        "moped",
        "Egyptian cat",
        "palace",
        "daisy",
        "missile",
        "tripod",
        "wall clock",
    ]
    assert len(set(photos.class_names)) == 1000
    assert all(photos.extras["licence"])
    assert "CC BY 2.0 (danielbuechele" in photos.licence
    assert torch.equal(load_photographs().x, photos.x)


def test_crops_carry_their_photograph():
    one, many, more = load_photographs(size=64), load_photographs(4, size=64), load_photographs(6, size=64)
    assert many.x.shape == (32, 3, 64, 64)
    assert torch.equal(many.x[::4], one.x)
    assert torch.equal(more.x.reshape(8, 6, 3, 64, 64)[:, :4].reshape(many.x.shape), many.x)
    assert torch.equal(many.y, one.y.repeat_interleave(4))
    assert many.groups.tolist() == [g for g in range(8) for _ in range(4)]
    distinct = {tuple(x.flatten()[:50].tolist()) for x in many.x}
    assert len(distinct) == 32


def test_model_knows_the_photographs(model):
    photos = load_photographs()
    with torch.no_grad():
        p = model.module(photos.x).softmax(1)
    assert p.shape == (8, 1000)
    right = p.argmax(1) == photos.y
    assert right.tolist() == [True] * 7 + [False]  # the clock is blurred by motion
    assert p[0, 967] > 0.9
    assert model.class_names == photos.class_names


def test_model_scales_its_input(model):
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = model.module.network((x * 255 - 127) / 128)
        torch.testing.assert_close(model.module(x), inner, atol=1e-3, rtol=1e-3)


def test_model_is_quiet_and_leaves_the_global_generator(capsys):
    state = torch.get_rng_state()
    made = image_model()
    assert torch.equal(state, torch.get_rng_state())
    assert capsys.readouterr() == ("", "")
    assert not any(m.training for m in made.module.modules())
    assert not any(p.is_meta for p in made.module.parameters())
    x = torch.full((1, 3, 224, 224), 0.5, requires_grad=True)
    made.module(x)[0, 0].backward()
    assert x.grad.abs().sum() > 0


def test_refusals():
    with pytest.raises(checks.ArgumentError, match=r"n_crops is 0; allowed: an integer in 1\.\.64"):
        load_photographs(0)
    with pytest.raises(checks.ArgumentTypeError, match="n_crops"):
        load_photographs(2.5)
    with pytest.raises(checks.ArgumentError, match="size is 8"):
        load_photographs(size=8)
