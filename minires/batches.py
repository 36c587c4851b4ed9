"""The images of an epoch, batch after batch: in the epoch's order, augmented, and made ahead of their use.

    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    for x, labels in Batches(images, labels, order, batch_size=128, transform=transform): ...

    def transform(images, index, start):
        return normalize(random_crop(images, seed, epoch, start), MEAN, STD)

What chance does to an image depends on its position in the epoch (see augment.py). So the transform is told the
position of the first image that it is given: an epoch gives the same images however it is cut, and one that is resumed
in its middle has the draws that it would have had.
"""

import concurrent.futures
import math
import numbers

import numpy as np

from minires.backend import array_module
from minires.module import check_array

IMAGES_AT_ONCE = 5120  # that are augmented together on a GPU, where many small launches take longer than one large


class Batches:
    """The batches of one epoch, to be iterated: pairs (images, labels).

    On the CPU a batch is made in another thread while the one before is in use; on a GPU many are made at once.

    Shapes      images (M, H, W, C), labels (M,), order (N,) indices of images  ->  (batch_size, ...) and (batch_size,),
                less in the last batch
    Args        transform: a function of images (n, H, W, C), their index (n,) in `images`, and start, the position in
                the epoch of the first one, that returns what the network is given; None gives the images as they are.
                Arrays and order are on one device; ranks: the processes that share each batch, see
                training/distributed.py: this one gets its part of it, which is empty where they are more than images
    Raises      ValueError for images and labels of different lengths, and a batch_size below 1; TypeError for lists,
                and a batch_size that is no integer
    """

    def __init__(self, images, labels, order, batch_size, transform=None, ranks=None):
        for name, array in (("images", images), ("labels", labels), ("order", order)):
            check_array(f"Batches: {name}", array)
        if len(images) != len(labels):
            raise ValueError(
                f"Batches: expected a label for each image, got {len(images)} images and {len(labels)} labels"
            )
        if not isinstance(batch_size, numbers.Integral):
            raise TypeError(f"Batches: batch_size must be an integer, got {batch_size!r}")
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        self.images, self.labels, self.order, self.batch_size = images, labels, order, int(batch_size)
        self.transform, self.ranks = transform or unchanged, ranks
        self.first = 0  # the position in the epoch of the first image

    def __len__(self):
        return max(0, math.ceil((len(self.order) - self.first) / self.batch_size))

    def skip(self, count):
        """Return the same batches without the first `count`."""
        rest = Batches(self.images, self.labels, self.order, self.batch_size, self.transform, self.ranks)
        rest.first = self.first + count * self.batch_size
        return rest

    def __iter__(self):
        if self.ranks:
            return self._parts()
        if array_module(self.images) is np:
            return ahead(self._batches(self.batch_size))
        return self._batches(max(1, IMAGES_AT_ONCE // self.batch_size) * self.batch_size)

    def _parts(self):
        def part_of(start):
            whole = self.order[start : start + self.batch_size]
            part = self.ranks.part(len(whole))
            index = whole[part]
            return len(whole), self.transform(self.images[index], index, start + part.start), self.labels[index]

        parts = map(part_of, range(self.first, len(self.order), self.batch_size))
        for total, images, labels in ahead(parts) if array_module(self.images) is np else parts:
            self.ranks.total = total  # not earlier: the layers are told of the batch that they are in
            yield images, labels

    def _batches(self, at_once):
        for start in range(self.first, len(self.order), at_once):
            index = self.order[start : start + at_once]
            images, labels = self.transform(self.images[index], index, start), self.labels[index]
            for i in range(0, len(index), self.batch_size):
                yield images[i : i + self.batch_size], labels[i : i + self.batch_size]


def unchanged(images, index, start):
    return images


def ahead(items):
    """Yield the items in their order, each made in another thread while the one before is in use."""
    items, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item
