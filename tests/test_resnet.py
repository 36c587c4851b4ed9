"""The network: its size, its gradients, and that it learns."""

import numpy as np
import pytest

from minires import SGD, Adam, BasicBlock, ResNet, SoftmaxCrossEntropy, check_gradients


@pytest.mark.parametrize(
    ("blocks", "parameters"),
    [((2, 1, 1, 1), 4_977_226), ((1, 1, 1, 1), 4_903_242), ((2, 2, 2, 2), 11_173_962)],
)
def test_number_of_parameters(blocks, parameters):
    assert ResNet(blocks).num_parameters() == parameters


def test_the_plain_network_lacks_the_projections_only():
    plain, residual = ResNet(shortcut=False).state_dict(), ResNet().state_dict()
    assert set(plain) == {name for name in residual if ".shortcut." not in name}


def test_names_are_those_of_pytorch():
    names = [name for name, _ in ResNet().named_parameters()]
    assert names[:5] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.0.bn1.weight"]
    assert "layer2.0.shortcut.0.weight" in names
    assert "layer2.0.shortcut.1.bias" in names
    assert names[-2:] == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (3, 1), (4, 2)])
def test_block_gradients_agree_with_finite_differences(rng, in_channels, stride, shortcut):
    block = BasicBlock(in_channels, 4, stride, shortcut, rng=rng)
    for parameter in block.parameters():
        parameter.data += 0.2 * rng.standard_normal(parameter.data.shape).astype(np.float32)
    check_gradients(block, rng.standard_normal((2, 6, 7, in_channels)))


def test_network_gradients_agree_with_finite_differences(rng):
    errors = check_gradients(ResNet(channels=(8, 12, 16, 20)), rng.standard_normal((2, 16, 16, 3)))
    assert len(errors) == 1 + 44  # x, 14 convolutions, 14 times two of BatchNorm, two of linear


def test_plain_network_gradients_agree_with_finite_differences(rng):
    check_gradients(ResNet((1, 1), (4, 6), shortcut=False), rng.standard_normal((3, 8, 8, 3)))


@pytest.mark.parametrize("shortcut", [True, False])
def test_network_without_batch_norm_gradients_agree_with_finite_differences(rng, shortcut):
    model = ResNet((2, 1), (4, 6), shortcut=shortcut, batch_norm=False)
    check_gradients(model, rng.standard_normal((3, 8, 8, 3)))
    assert [name for name in model.state_dict() if name.startswith("bn1")] == ["bn1.bias"]


def test_the_gradient_of_the_images_can_be_left_out(rng):
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    dout = rng.standard_normal((2, 10)).astype(np.float32)
    models = [ResNet((1, 1), (4, 6)) for _ in range(2)]
    for model in models:
        model(x)
    assert models[0].backward(dout).shape == x.shape
    assert models[1].backward(dout, need_dx=False) is None
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        np.testing.assert_array_equal(a.grad, b.grad)


@pytest.mark.parametrize("make", [lambda p: Adam(p), lambda p: SGD(p, 0.1)])
def test_every_parameter_changes_after_one_step(rng, make):
    model, loss = ResNet((1, 1, 1, 1), (4, 5, 6, 7)), SoftmaxCrossEntropy()
    before = model.state_dict()
    optimizer = make(model.parameters())
    loss(model(rng.standard_normal((8, 32, 32, 3)).astype(np.float32)), rng.integers(0, 10, 8))
    model.backward(loss.backward(), need_dx=False)
    optimizer.step()
    after = model.state_dict()
    assert [name for name in before if (before[name] == after[name]).all()] == []


def test_32_images_can_be_overfitted(rng):
    model, loss = ResNet((1, 1), (16, 32), dropout=0.0), SoftmaxCrossEntropy()
    x, labels = rng.standard_normal((32, 8, 8, 3)).astype(np.float32), rng.integers(0, 10, 32)
    optimizer = Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(model(x), labels)
        model.backward(loss.backward(), need_dx=False)
        optimizer.step()
    assert value < 0.01


def test_the_seed_fixes_weights_and_masks(rng):
    x = rng.standard_normal((4, 8, 8, 3)).astype(np.float32)
    same = [ResNet((1,), (8,), seed=3)(x) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (ResNet((1,), (8,), seed=4)(x) != same[0]).any()


def test_blocks_and_channels_have_to_pair_up():
    with pytest.raises(ValueError, match=r"got blocks=\(2, 1\) and channels=\(64, 128, 256, 512\)"):
        ResNet(blocks=(2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 18}, "blocks must be a list, a number for each stage, got 18"),
        ({"channels": None}, "channels must be a list, a number for each stage, got None"),
        ({"blocks": "2111"}, "blocks must be a list, a number for each stage, got '2111'"),
        ({"blocks": (1.5, 1, 1, 1)}, r"blocks must be integers, got \(1\.5, 1, 1, 1\)"),
    ],
)
def test_blocks_and_channels_that_are_no_lists_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        ResNet(**arguments)
