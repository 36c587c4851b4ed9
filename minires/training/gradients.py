"""When is which gradient summed over the processes? Each bucket of them as soon as its layers' backward is done.

The gradients lie in one array (see `FlatParameters`), and the backward of a model comes to its last layers first. While
their gradients are on the way, the layers before go on. No layer knows of it: its backward is wrapped.

Source      Li et al. 2020, "PyTorch Distributed: Experiences on accelerating data parallel training", section 3.2
"""

import functools

from minires.module import Parameter

BUCKET = 2**20  # bytes of gradients that are summed at a time, at least: with fewer, the number of messages counts


class GradientSums:
    """Sums the gradients of all processes in buckets, each as soon as its layers' backward is done.

    Each layer's backward is given a wrapper, which tells when it returns; that of the model waits for all the sums.
    The last layers come first, as in backward. In the flat array the vectors lie together at its end, so they are a
    bucket of their own, and the last.
    """

    def __init__(self, ranks, model, flat):
        self.ranks, self.flat, self.buckets, self.missing = ranks, flat, [], []
        end, parameters = flat.size, set()
        for i in sorted(range(len(flat.params)), key=flat.offsets.__getitem__, reverse=True):
            parameters.add(id(flat.params[i]))
            start = flat.offsets[i]
            large = (end - start) * flat.dtype.itemsize >= BUCKET
            if (large and end <= flat.vectors_start) or start in (0, flat.vectors_start):
                self.buckets.append((slice(start, end), parameters))
                end, parameters = start, set()
        for module in model.modules():
            if own := {id(parameter) for _, parameter in module.attributes(Parameter)}:
                module.backward = self._telling(module.backward, own)
        model.backward = self._summing(model.backward)

    def _telling(self, backward, own):
        @functools.wraps(backward)
        def call(*args, **kwargs):
            result = backward(*args, **kwargs)
            for missing in self.missing:
                missing[1].difference_update(own)
            self._start([part for part, missing in self.missing if not missing])
            self.ranks.progress()
            return result

        return call

    def _summing(self, backward):
        @functools.wraps(backward)
        def call(*args, **kwargs):
            self.missing = [(part, set(parameters)) for part, parameters in self.buckets]
            result = backward(*args, **kwargs)
            self._start([part for part, _ in self.missing])  # of layers that this backward did not come to
            self.ranks.finish_sums()
            return result

        return call

    def _start(self, parts):
        for part in parts:
            self.ranks.start_sum(self.flat.grad[part])
        self.missing = [(part, missing) for part, missing in self.missing if part not in parts]
