import torch
from safetensors.torch import load_file

from perturbkit.data import _files, rebuild


def test_breast_cancer_network_is_rebuilt_as_shipped():
    state = torch.get_rng_state()
    module, accuracy = rebuild._breast_cancer()
    assert torch.equal(state, torch.get_rng_state())
    shipped = load_file(str(_files.FOLDER / "breast_cancer_mlp.safetensors"))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, shipped[name], atol=1e-3, rtol=1e-3)
    assert accuracy > 0.95


def test_shifts_move_an_image_and_fill_with_zeros():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    places = set()
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        moved = rebuild._shifted(x, 1, g)
        assert moved.shape == x.shape
        assert moved.sum() == 1
        places.add(tuple(moved[0, 0].nonzero()[0].tolist()))
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


def test_files_are_small_and_readable():
    sizes = {p.name: len(p.read_bytes()) for p in _files.FOLDER.iterdir()}
    assert sum(sizes.values()) < 4_000_000
    assert all(size < 500_000 for name, size in sizes.items() if name.endswith(".safetensors"))
