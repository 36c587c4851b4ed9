"""The table of layers: what a network is made of, what shapes pass through it, and what it weighs.

Source      torchsummary, for the columns, the order and the arithmetic of the sizes
"""

import math

from minires.backend import array_module
from minires.module import Parameter, Sequential, real_array_of

MEGABYTE = 2**20
LINE = "-" * 64


def summary(model, input_shape=(32, 32, 3)):
    """Return the table of a model's layers as text.

    A row for each layer that has parameters, and for each block after its layers, in the order of definition. What has
    no parameters (ReLU, pooling, dropout) has no row, and neither has a Sequential. Shapes are printed as PyTorch
    prints them, [-1, C, H, W].

    The forward/backward size is what the outputs of all rows and their gradients take for one image: an estimate of
    training's memory, not a measurement.

    Args        input_shape: (H, W, C) of one image
    """
    rows = layer_rows(model, input_shape)
    total = model.num_parameters()
    dtype_bytes = max((p.data.itemsize for p in model.parameters()), default=4)
    input_size = math.prod(input_shape) * dtype_bytes / MEGABYTE
    pass_size = 2 * sum(math.prod(shape) for _, shape, _ in rows) * dtype_bytes / MEGABYTE
    params_size = total * dtype_bytes / MEGABYTE
    return "\n".join(
        [
            LINE,
            f"{'Layer (type)':>20}  {'Output Shape':>25}  {'Param #':>13}",
            LINE.replace("-", "="),
            *(f"{name:>20}  {[-1, *shape]!s:>25}  {own:>13,}" for name, shape, own in rows),
            LINE.replace("-", "="),
            f"Total params: {total:,}",
            f"Trainable params: {total:,}",
            "Non-trainable params: 0",
            LINE,
            f"Input size (MB): {input_size:.2f}",
            f"Forward/backward pass size (MB): {pass_size:.2f}",
            f"Params size (MB): {params_size:.2f}",
            f"Estimated Total Size (MB): {input_size + pass_size + params_size:.2f}",
            LINE,
        ]
    )


def layer_rows(model, input_shape=(32, 32, 3)):
    """Return the rows of the table: a layer's name, the shape of its output, (C, H, W) or (C,), its parameters."""
    shapes = output_shapes(model, input_shape)
    rows = []
    for module in dict.fromkeys(parts_first(model)):  # one with two names counts once
        own = sum(p.data.size for _, p in module.attributes(Parameter))
        is_block = any(True for _ in module.named_children())
        if module in shapes and (own or is_block) and not isinstance(module, Sequential):
            rows.append((f"{type(module).__name__}-{len(rows) + 1}", shapes[module], own))
    return rows


def parts_first(module):
    """Yield every part of the module, each after its own parts, and last the module itself."""
    for _, child in module.named_children():
        yield from parts_first(child)
    yield module


def output_shapes(model, input_shape):
    """Run one black image through the model and return {module: (C, H, W) or (C,)}, the model left as it was."""
    shapes = {}

    def recording(module, forward):
        def recorded(*inputs):
            out = forward(*inputs)
            shapes[module] = (out.shape[-1], *out.shape[1:-1])
            return out

        return recorded

    attributes = [(module, dict(vars(module))) for module in model.modules()]
    weight = real_array_of(model)
    try:
        for module, _ in attributes:
            module.training = False
            module.forward = recording(module, module.forward)  # hides the method of the class
        model(array_module(weight).zeros((1, *input_shape), dtype=weight.dtype))
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
    return shapes
