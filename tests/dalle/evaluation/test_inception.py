import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle.evaluation.features import inception_file
from dalle.evaluation.features.inception import LAYOUTS, Inception, Mixed
from dalle.evaluation.features.inception_file import load_inception
from dalle.evaluation.features.nets import InceptionFeatures
from dalle.evaluation.features.profiles import PROFILES, load_profile, tf_pixels
from storage.checkpoints.tensors import sha256


def empty(layout: str) -> Inception:
    with torch.device("meta"):
        return Inception(LAYOUTS[layout])


def small_state(layout: str) -> dict[str, Tensor]:
    """All tensors as views of the same numbers: a file of all names and shapes that is a tenth as large."""
    state = empty(layout).state_dict()
    numbers = torch.full((max(like.numel() for like in state.values()),), 0.5)
    return {
        name: torch.zeros((), dtype=torch.int64)
        if name.endswith("tracked")
        else numbers[: like.numel()].view(like.shape)
        for name, like in state.items()
    }


@pytest.fixture
def tf_file(tmp_path: Path) -> Path:
    torch.save(small_state("tf"), tmp_path / "tf.pth")
    return tmp_path / "tf.pth"


@pytest.fixture
def imagenet_file(tmp_path: Path) -> Path:
    # as torchvision's: the head for training is in it, and an older file has no counters
    state = {name: each for name, each in small_state("imagenet").items() if not name.endswith("tracked")}
    head = {
        "AuxLogits.conv0.conv.weight": torch.zeros(128, 768, 1, 1),
        "AuxLogits.fc.bias": torch.zeros(1000),
    }
    torch.save(state | head, tmp_path / "imagenet.pth")
    return tmp_path / "imagenet.pth"


def test_the_network_has_the_tensors_of_the_published_file() -> None:
    net = empty("tf")
    state = net.state_dict()
    assert len(state) == 566
    assert sum(parameter.numel() for parameter in net.parameters()) == 23_850_960
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch_pool.bn.num_batches_tracked"].shape == ()
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert net(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, 2048)
    assert empty("imagenet").state_dict()["fc.weight"].shape == (1000, 2048)


def test_both_files_are_read_and_known_by_their_classes(tf_file: Path, imagenet_file: Path) -> None:
    for path, layout, classes in ((tf_file, "tf", 1008), (imagenet_file, "imagenet", 1000)):
        file = load_inception(path)
        assert (file.net.layout.name, file.sha256) == (layout, sha256(path))
        assert not file.net.training
        assert file.net.logits(torch.ones(2, 2048), bias=False)[0].tolist() == [1024.0] * classes
        assert file.net.logits(torch.ones(2, 2048), bias=True)[0].tolist() == [1024.5] * classes


def test_a_file_that_is_not_the_published_one_is_told_with_the_expected_digits(
    tf_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        load_inception(tf_file)
    assert f"begins with {sha256(tf_file)[:8]}" in caplog.text
    assert "that of the published file with 6726825d" in caplog.text
    caplog.clear()
    published = dataclasses.replace(LAYOUTS["tf"], sha256=("00000000", sha256(tf_file)[:8]))
    monkeypatch.setitem(inception_file.LAYOUTS, "tf", published)
    load_inception(tf_file)
    assert caplog.text == ""


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    state = small_state("tf")
    del state["Mixed_6b.branch1x1.bn.bias"]
    state["Mixed_5b.branch1x1.conv.bias"] = torch.zeros(64)
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 3, 5, 5)
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match="expected pt_inception") as raised:
        load_inception(path)
    message = str(raised.value)
    assert "Mixed_6b.branch1x1.bn.bias is missing" in message
    assert "Mixed_5b.branch1x1.conv.bias is unexpected" in message
    assert "Conv2d_1a_3x3.conv.weight has the shape (32, 3, 5, 5) instead of (32, 3, 3, 3)" in message
    save_file({"fc.weight": torch.zeros(10, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has 10 classes: it is no Inception v3"):
        load_inception(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_inception(tmp_path / "none.pth")


class Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Command()}, "evil.pth")
    with pytest.raises(ValueError, match=r"would run code.*nothing was run"):
        load_inception("evil.pth")
    assert not Path("executed").exists()


def test_a_torchscript_archive_of_other_names_gets_the_hint(tmp_path: Path) -> None:
    scripted({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}).save(tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive.*expected pt_inception-2015-12-05-6726825d\.pth"):
        load_inception(tmp_path / "inception-2015-12-05.pt")


def scripted(state: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript module with these names and a forward that has nothing to do with them."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, own = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(own, tensor)
    root.forward = lambda x: x
    return torch.jit.trace(root, torch.zeros(1))


@pytest.mark.slow
def test_a_torchscript_archive_with_the_names_of_the_state_dict_is_read(tmp_path: Path) -> None:
    scripted(small_state("tf")).save(tmp_path / "named.pt")
    file = load_inception(tmp_path / "named.pt")
    assert file.net.layout.name == "tf"
    assert file.net.logits(torch.ones(1, 2048), bias=True).unique().tolist() == [1024.5]


@pytest.mark.slow
def test_profiles_take_the_files_that_they_need(tf_file: Path, imagenet_file: Path) -> None:
    both = load_profile(PROFILES["dalle2021"], [tf_file, imagenet_file])
    assert both.classes is not None
    assert (both.features.net.layout.name, both.classes.net.layout.name) == ("imagenet", "tf")
    assert (both.features.hash, both.classes.hash) == (sha256(imagenet_file), sha256(tf_file))
    assert load_profile(PROFILES["dalle2021"], [imagenet_file]).classes is None
    one = load_profile(PROFILES["clean"], [tf_file])
    assert one.features is one.classes
    wrong = {
        "no file has the weights for the distance of the profile dalle2021; expected torch": ("dalle2021", [tf_file]),
        "network imagenet, which the profile tf has no use for": ("tf", [imagenet_file]),
        "network tf, which was given before": ("tf", [tf_file, tf_file]),
        "takes its features from a CLIP": ("own", [tf_file]),
    }
    for message, (profile, files) in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_profile(PROFILES[profile], files)


def test_average_pools_count_padding_in_one_layout_and_the_last_is_a_maximum_in_the_other() -> None:
    branches = (((("branch_pool", 1, 1),),),)
    ones = torch.ones(1, 1, 4, 4)
    pools = {
        kind: Mixed(1, branches, count_padding=count, maximum=maximum)._pooled(ones)
        for kind, count, maximum in (("counted", True, False), ("not", False, False), ("maximum", False, True))
    }
    assert pools["counted"][0, 0, 0].tolist() == pytest.approx([4 / 9, 6 / 9, 6 / 9, 4 / 9])
    assert pools["not"].unique().tolist() == pytest.approx([1])
    assert pools["maximum"].unique().tolist() == [1]
    ramp = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Mixed(1, branches, count_padding=False, maximum=True)._pooled(ramp)[0, 0, 0].tolist() == [5, 6, 7, 7]
    tf, imagenet = empty("tf"), empty("imagenet")
    for name, maximum in (("Mixed_5b", False), ("Mixed_6c", False), ("Mixed_7b", False), ("Mixed_7c", True)):
        for net, expected in ((tf, (False, maximum)), (imagenet, (True, False))):
            found = net.get_submodule(name)
            assert isinstance(found, Mixed)
            assert (found.count_padding, found.maximum) == expected


def random_state(net: nn.Module) -> dict[str, Tensor]:
    """Weights that keep the size of activations, and statistics that are not those of a new batch norm."""
    rng = np.random.default_rng(0)
    state = {}
    for name, like in net.state_dict().items():
        values = rng.standard_normal(tuple(like.shape), dtype=np.float32)
        if name.endswith("conv.weight"):
            values *= (2 / np.prod(like.shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            values = 1 + 0.3 * np.abs(values)
        elif name.endswith("bn.weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        is_counter = name.endswith("tracked")
        state[name] = torch.zeros((), dtype=torch.int64) if is_counter else torch.from_numpy(values)
    return state


def picture() -> Tensor:
    y, x = np.mgrid[0:299, 0:299]
    waves = [np.sin(x / 9) * np.cos(y / 7), np.sin((x + y) / 23), np.cos(x * y / 4000)]
    return torch.from_numpy(np.rint(127.5 + 127.5 * np.stack(waves)).astype(np.uint8))[None]


FEATURES = {
    "tf": [0.33441722, 0.01273204, 0.00016454, 0.00373209, 0.22874148, 0.37544286, 0.43667492],
    "imagenet": [0.34835067, 0.01207610, 0.00035094, 0.00353061, 0.23540340, 0.36654016, 0.42904463],
}
LOGITS = {
    "tf": [0.00103807, 0.15168676, -0.64081478, 1.53340518, 2.19631720, 0.54976130],
    "imagenet": [0.08000837, 0.16681108, -0.63181138, 1.60930467, 2.12889218],
}
LOGITS_WITH_BIAS = {
    "tf": [0.19727588, 0.09075901, -0.72561902, 1.60190821, 2.36762547, 0.42185363],
    "imagenet": [0.01633417, 0.10508042, -0.57689923, 1.56308985, 2.11170006],
}
"""Of `picture` by torch-fidelity 0.4.0 with the weights of `random_state`; "imagenet" by its blocks with torchvision's
average pools in all of them, and 1,000 classes."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_and_logits_are_those_of_torch_fidelity_on_the_same_weights(layout: str, tmp_path: Path) -> None:
    torch.save(random_state(empty(layout)), tmp_path / "random.pth")
    file = load_inception(tmp_path / "random.pth")
    net = InceptionFeatures(file.net, file.sha256, "inception-tf", "tf1", tf_pixels)
    features, logits = net.features_and_logits(picture())
    assert features.shape == (1, 2048)
    assert features[0, ::300].tolist() == pytest.approx(FEATURES[layout], abs=2e-5)
    assert logits.shape == (1, LAYOUTS[layout].classes)
    assert logits[0, ::200].tolist() == pytest.approx(LOGITS[layout], abs=2e-4)
    with_bias = net.features_and_logits(picture(), bias=True)[1]
    assert with_bias[0, ::200].tolist() == pytest.approx(LOGITS_WITH_BIAS[layout], abs=2e-4)
