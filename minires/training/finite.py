"""Where did it go wrong? Finding the first layer of which a number is not finite.

A NaN or an infinity spreads: a step later every weight has it, and nothing tells where it began. So training looks at
the loss and the gradients before the weights move, and when they are not finite the step is done once more, with
`find_not_finite` looking at every layer. A step that goes well pays for the first look only, a thousandth of its time.
"""

import itertools

from minires.backend import array_module
from minires.module import Parameter


def all_finite(arrays):
    """Return whether no number in the arrays, which are on one device, is NaN or infinite.

    The device is asked once, for all arrays together.
    """
    flags = [array_module(array).isfinite(array).all() for array in arrays]
    return bool(array_module(flags[0]).stack(flags).all())


def find_not_finite(model, passes):
    """Run passes through a model and name the first layer whose output or gradient is not finite.

    The layers looked at are those without parts of their own. In backward, a layer's gradients are those of its inputs
    and of its parameters.

    Args        passes: a function without arguments that calls the model's forward and perhaps its backward
    Returns     how many calls of layers went before, and a text such as "the output of layer2.0.conv1", with a word on
                weights that are not finite themselves; None in its place if every number is finite
    """
    found, calls = [], itertools.count()
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.named_children())]

    def watched(way, name, module, method):
        def call(*args, **kwargs):
            result, position = method(*args, **kwargs), next(calls)
            own = [parameter for _, parameter in module.attributes(Parameter)]
            made = [*result] if isinstance(result, tuple) else [] if result is None else [result]
            made += [parameter.grad for parameter in own if way == "backward"]
            if not found and made and not all_finite(made):
                weights = [parameter.data for parameter in own]
                cause = ", whose weights are not finite" if weights and not all_finite(weights) else ""
                what = "output" if way == "forward" else "gradient"
                found.append((position, f"the {what} of {name or 'the model'}{cause}"))
            return result

        return call

    methods = [(name, module, way, getattr(module, way)) for name, module in leaves for way in ("forward", "backward")]
    try:
        for name, module, way, method in methods:
            setattr(module, way, watched(way, name, module, method))  # hides the method of the class
        passes()
    finally:
        for _, module, way, method in methods:
            del vars(module)[way]
            if getattr(module, way) != method:  # it was the module's own
                setattr(module, way, method)
    return found[0] if found else (next(calls), None)
