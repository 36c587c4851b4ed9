"""A network is built from the state that it was saved with, and nothing else is."""

import numpy as np
import pytest

from minires import ResNet
from minires.training.weights import network_of


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_network_is_built_from_its_state_with_and_without_batch_norm(rng, batch_norm):
    model = ResNet((2, 1), (4, 6), batch_norm=batch_norm).eval()
    again = network_of(model.state_dict()).eval()
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(again(x), model(x))


@pytest.mark.parametrize("arguments", [{}, {"blocks": (1, 3), "channels": (4, 8), "num_classes": 7, "shortcut": False}])
def test_a_network_is_rebuilt_from_its_state(rng, arguments):
    model = ResNet(**arguments, seed=9)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    model(x)
    rebuilt = network_of(model.state_dict())
    np.testing.assert_array_equal(rebuilt.eval()(x), model.eval()(x))


def test_the_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"not the state of a minires\.ResNet.*features\.weight"):
        network_of({"features.weight": np.zeros(3)})
