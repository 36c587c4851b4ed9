"""The table of layers is that of the report, figure by figure."""

import numpy as np

from minires import Conv2d, Dropout, Linear, Module, ReLU, ResNet, Sequential, summary

REPORT = """
Conv2d-1 [-1, 64, 32, 32] 1,728
BatchNorm2d-2 [-1, 64, 32, 32] 128
Conv2d-3 [-1, 64, 32, 32] 36,864
BatchNorm2d-4 [-1, 64, 32, 32] 128
Conv2d-5 [-1, 64, 32, 32] 36,864
BatchNorm2d-6 [-1, 64, 32, 32] 128
BasicBlock-7 [-1, 64, 32, 32] 0
Conv2d-8 [-1, 64, 32, 32] 36,864
BatchNorm2d-9 [-1, 64, 32, 32] 128
Conv2d-10 [-1, 64, 32, 32] 36,864
BatchNorm2d-11 [-1, 64, 32, 32] 128
BasicBlock-12 [-1, 64, 32, 32] 0
Conv2d-13 [-1, 128, 16, 16] 73,728
BatchNorm2d-14 [-1, 128, 16, 16] 256
Conv2d-15 [-1, 128, 16, 16] 147,456
BatchNorm2d-16 [-1, 128, 16, 16] 256
Conv2d-17 [-1, 128, 16, 16] 8,192
BatchNorm2d-18 [-1, 128, 16, 16] 256
BasicBlock-19 [-1, 128, 16, 16] 0
Conv2d-20 [-1, 256, 8, 8] 294,912
BatchNorm2d-21 [-1, 256, 8, 8] 512
Conv2d-22 [-1, 256, 8, 8] 589,824
BatchNorm2d-23 [-1, 256, 8, 8] 512
Conv2d-24 [-1, 256, 8, 8] 32,768
BatchNorm2d-25 [-1, 256, 8, 8] 512
BasicBlock-26 [-1, 256, 8, 8] 0
Conv2d-27 [-1, 512, 4, 4] 1,179,648
BatchNorm2d-28 [-1, 512, 4, 4] 1,024
Conv2d-29 [-1, 512, 4, 4] 2,359,296
BatchNorm2d-30 [-1, 512, 4, 4] 1,024
Conv2d-31 [-1, 512, 4, 4] 131,072
BatchNorm2d-32 [-1, 512, 4, 4] 1,024
BasicBlock-33 [-1, 512, 4, 4] 0
Linear-34 [-1, 10] 5,130
Total params: 4,977,226
Trainable params: 4,977,226
Non-trainable params: 0
Input size (MB): 0.01
Forward/backward pass size (MB): 9.06
Params size (MB): 18.99
Estimated Total Size (MB): 28.06
"""


def test_the_table_equals_the_report():
    lines = [" ".join(line.split()) for line in summary(ResNet()).splitlines()]
    figures = [line for line in lines if line.strip("-=") and not line.startswith("Layer (type)")]
    assert figures == REPORT.split("\n")[1:-1]


def test_the_model_is_left_as_it_was(rng):
    model = ResNet((1,), (4,))
    model.layer1.eval()
    model.linear(np.ones((2, 4), np.float32))
    before = model.state_dict()
    summary(model)
    model.linear.backward(np.ones((2, 10), np.float32))  # its cache is still there
    assert model.training
    assert not model.layer1.training
    assert all("forward" not in vars(module) for module in model.modules())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_any_sequential_has_a_table():
    table = summary(Sequential(Linear(6, 4), ReLU(), Dropout(), Linear(4, 2)), input_shape=(6,))
    assert [line.split()[0] for line in table.splitlines() if "[-1" in line] == ["Linear-1", "Linear-2"]
    assert f"Total params: {6 * 4 + 4 + 4 * 2 + 2}" in table


def test_a_model_without_parameters_has_a_table():
    assert "Total params: 0" in summary(Sequential(ReLU()), input_shape=(6,))


class EveryOtherPixel(Module):
    """A layer of one's own, without parameters, that changes the shape."""

    def forward(self, x):
        return x[:, ::2, ::2].reshape(len(x), -1)


def test_a_new_layer_without_parameters_has_no_row_and_those_after_it_have_their_shapes(rng):
    model = Sequential(Conv2d(3, 4, 3, padding=1, rng=rng), EveryOtherPixel(), Linear(4 * 3 * 2, 5, rng=rng))
    table = summary(model, input_shape=(6, 4, 3))
    rows = [" ".join(line.split()) for line in table.splitlines() if "[-1" in line]
    assert rows == ["Conv2d-1 [-1, 4, 6, 4] 112", "Linear-2 [-1, 5] 125"]
