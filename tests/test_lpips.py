"""LPIPS: torchmetrics' implementation as oracle on random layers and its published heads, metric properties, files."""

from pathlib import Path

import pytest
import torch

from diffalign.errors import InputError
from diffalign.rewards.lpips import LAYERS, LPIPS, PerceptualDistance, load_lpips


def images(seed: int, n: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    coarse = torch.rand(n, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def backbone_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the keys of torchvision's AlexNet, its classifier left out."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for place, (inside, outside, size, *_) in LAYERS.items():
        deviation = (2 / (inside * size * size)) ** 0.5
        state[f"features.{place}.weight"] = torch.randn(outside, inside, size, size, generator=rng) * deviation
        state[f"features.{place}.bias"] = torch.randn(outside, generator=rng) * 0.1
    return state


def head_state(seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    widths = [outside for _, outside, *_ in LAYERS.values()]
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng) for i, c in enumerate(widths)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.save({**backbone_state(), "classifier.1.weight": torch.zeros(2, 2)}, folder / "alexnet.pth")
    torch.save(head_state(), folder / "alex.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(files) -> LPIPS:
    return load_lpips(files / "alexnet.pth", files / "alex.pth")


def test_layers_are_torchvisions_alexnet():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        state = torchvision.models.alexnet(weights=None).state_dict()
        ours = LPIPS()
    theirs = {name: tuple(v.shape) for name, v in state.items() if name.startswith("features.")}
    assert {k: tuple(v.shape) for k, v in backbone_state().items()} == theirs
    assert {name: tuple(v.shape) for name, v in ours.features_net.named_parameters()} == {
        name.removeprefix("features."): shape for name, shape in theirs.items()
    }
    assert [tuple(head.shape) for head in ours.heads] == [(64,), (192,), (384,), (256,), (256,)]


@pytest.mark.parametrize("published", [False, True], ids=["random heads", "published heads"])
def test_distances_agree_with_torchmetrics(files, published):
    functional = pytest.importorskip("torchmetrics.functional.image.lpips")
    heads = Path(functional.__file__).parent / "lpips_models" / "alex.pth" if published else files / "alex.pth"
    oracle = functional._LPIPS(pnet_rand=True, net="alex", model_path=str(heads))
    layers = {name.removeprefix("features."): value for name, value in backbone_state().items()}
    for part in oracle.net.children():
        part.load_state_dict({name: layers[name] for name in part.state_dict()})
    one, other = images(0), images(1)
    with torch.no_grad():
        expected = oracle(one, other, normalize=True).flatten()
    ours = load_lpips(files / "alexnet.pth", heads)(one, other)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # it adds 1e-8 under the root, we 1e-10 outside
    assert expected.min() > 0.01


def test_it_is_zero_for_equal_images_symmetric_and_positive(lpips):
    one, other = images(2), images(3)
    assert lpips(one, one).tolist() == [0, 0, 0]
    torch.testing.assert_close(lpips(one, other), lpips(other, one))
    assert (lpips(one, other) > 0).all()


def test_a_small_change_is_nearer_than_a_large_one(lpips):
    one, other = images(4), images(5)
    near, far = (lpips(one, one.lerp(other, share)) for share in (0.1, 1.0))
    assert (near < far).all()


def test_rows_do_not_depend_on_their_neighbours(lpips):
    one, other = images(6), images(7)
    whole = lpips(one, other)
    for row in range(3):
        torch.testing.assert_close(lpips(one[row : row + 1], other[row : row + 1])[0], whole[row])


def test_gradients_are_finite_where_the_images_are_equal_or_flat(lpips):
    one = torch.cat([images(8, 1), torch.full((1, 3, 48, 64), 0.5)]).requires_grad_()
    lpips(one, images(9, 2)).sum().backward()
    assert one.grad.isfinite().all()
    assert one.grad.abs().max() > 0
    same = images(8).requires_grad_()
    lpips(same, same.detach()).sum().backward()
    assert same.grad.abs().max() == 0
    assert all(parameter.grad is None for parameter in lpips.parameters())


def test_it_has_the_face_of_a_distance(lpips):
    assert isinstance(lpips, PerceptualDistance)
    assert lpips.version == "lpips 0.1, alexnet"


def test_images_too_small_for_the_network_are_refused(lpips):
    lpips.features(images(0, height=31, width=31))
    with pytest.raises(InputError, match="at least 31 pixels"):
        lpips.features(images(0, height=30, width=64))


def test_both_parts_may_lie_in_safetensors(files, tmp_path, lpips):
    from safetensors.torch import save_file

    save_file(backbone_state() | head_state(), tmp_path / "whole.safetensors")
    joined = load_lpips(tmp_path / "whole.safetensors", tmp_path / "whole.safetensors")
    torch.testing.assert_close(joined(images(0), images(1)), lpips(images(0), images(1)))


def without(state: dict, name: str) -> dict:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("backbone", "heads", "message"),
    [
        (without(backbone_state(), "features.3.bias"), head_state(), r"must hold features\.3\.bias"),
        (backbone_state(), without(head_state(), "lin4.model.1.weight"), r"must hold lin4"),
        (
            backbone_state(),
            head_state() | {"lin0.model.1.weight": torch.ones(1, 128, 1, 1)},
            r"must have shape \(1, 64",
        ),
        (backbone_state(), {k: -v for k, v in head_state().items()}, "must not be negative"),
        ([1, 2], head_state(), "must be a state dict, got list"),
    ],
)
def test_wrong_files_end_in_one_line(tmp_path, backbone, heads, message):
    torch.save(backbone, tmp_path / "b.pth")
    torch.save(heads, tmp_path / "h.pth")
    with pytest.raises(InputError, match=message) as caught:
        load_lpips(tmp_path / "b.pth", tmp_path / "h.pth")
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_end_in_one_line(tmp_path, files):
    with pytest.raises(InputError, match="which is missing"):
        load_lpips(tmp_path / "none.pth", files / "alex.pth")
    (tmp_path / "bad.pth").write_bytes((files / "alex.pth").read_bytes()[:500])
    with pytest.raises(InputError, match="heads must be readable"):
        load_lpips(files / "alexnet.pth", tmp_path / "bad.pth")
