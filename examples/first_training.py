"""The whole of a training on one screen: a small residual network learns from 1,000 images in ten seconds.

python examples/first_training.py
"""

import numpy as np

import minires
from minires import cifar10
from minires.augment import normalize, random_flip

SEED, EPOCHS, BATCH_SIZE = 0, 5, 50

# Data: images (N, 32, 32, 3) of bytes, labels (N,) from 0 to 9
data = cifar10.load_sample()

# Model, loss, optimizer
model = minires.ResNet(blocks=(1, 1, 1), channels=(16, 32, 64), dropout=0.0, seed=SEED)
loss_function = minires.SoftmaxCrossEntropy()
optimizer = minires.Adam(model.parameters(), lr=3e-3)

for epoch in range(1, EPOCHS + 1):
    # Each epoch takes the images in a new order, some of them mirrored; start is the place of images[0] in the epoch
    def transform(images, index, start, epoch=epoch):
        return normalize(random_flip(images, SEED, epoch, start), cifar10.MEAN, cifar10.STD)

    order = np.random.default_rng([SEED, epoch]).permutation(len(data.train_images))
    losses = []
    for images, labels in minires.Batches(data.train_images, data.train_labels, order, BATCH_SIZE, transform):
        optimizer.zero_grad()  # gradients are added up: begin at 0
        logits = model(images)  # (N, 10): a score for each class
        losses.append(loss_function(logits, labels))  # how wrong the scores are, one number
        model.backward(loss_function.backward())  # fills every gradient
        optimizer.step()  # moves every weight against its gradient
    print(f"epoch {epoch}: training loss {np.mean(losses):.3f}")

loss, accuracy = minires.evaluate(model, data.test_images, data.test_labels, cifar10.MEAN, cifar10.STD)
print(f"test loss {loss:.3f}, {accuracy:.1%} of {len(data.test_images)} test images are right; guessing gives 10 %")
