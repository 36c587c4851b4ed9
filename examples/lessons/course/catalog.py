"""The exercises in the order of a course, and the first two hints for each; the third is the derivation in minires.

The last three are for the brave.
"""

from typing import NamedTuple

REFERENCE, LAYERS, WINOGRAD = "kernels/reference.py", "layers.py", "kernels/winograd.py"


class Exercise(NamedTuple):
    """name: of the function; topic: several make one; hints: the first two, the third is the derivation."""

    name: str
    topic: str
    title: str
    hints: tuple
    file: str = REFERENCE


LINEAR, RELU, SOFTMAX, DROPOUT = "linear", "relu", "softmax", "dropout"
AVERAGE, MAXIMUM, COLUMNS, CONV = "average_pool", "max_pool", "columns", "conv2d"
NORM, BLOCK, OPTIMIZERS, TRAINING, BRAVE = "batch_norm", "block", "optimizers", "training", "brave"

COURSE = (
    Exercise(
        "linear_forward",
        LINEAR,
        "linear layer",
        (
            "Each row of x is an image, each column of weight an output. Which product takes a row and a column?",
            "x (N, D) @ weight (D, K) is (N, K), and a bias (K,) is added to every row by itself. It may be None.",
        ),
    ),
    Exercise(
        "linear_backward",
        LINEAR,
        "linear layer, backward",
        (
            "Write one output as a sum, out[n, k] = sum_d x[n, d] weight[d, k] + bias[k], and ask for each input: in "
            "which outputs does it occur, and what is it multiplied by there?",
            "The shapes lead the way. dx (N, D) is made from dout (N, K) and weight (D, K): which product, with which "
            "of the two transposed, gives (N, D)? dweight (D, K) likewise from x (N, D) and dout (N, K). The bias "
            "occurs once in every row.",
        ),
    ),
    Exercise(
        "relu_forward",
        RELU,
        "ReLU",
        (
            "Element by element: the larger of x and 0.",
            "np.max takes the largest number of an array. The function that compares two arrays element by element is "
            "np.maximum.",
        ),
    ),
    Exercise(
        "relu_backward",
        RELU,
        "ReLU, backward",
        (
            "Move one x a little. Where does the output move as well, and how far? Where does it stay 0?",
            "You are given out, not x. Where out > 0 the gradient passes as it is; elsewhere it is 0. A comparison "
            "gives an array of True and False, which multiplies like 1 and 0.",
        ),
    ),
    Exercise(
        "softmax_cross_entropy_forward",
        SOFTMAX,
        "softmax and cross-entropy",
        (
            "softmax does not change when the same number is subtracted from all logits of a row. Which number keeps "
            "exp from overflowing, and differs from row to row?",
            "Do not take the logarithm of the probabilities: log p = shifted - log(sum exp(shifted)) cannot be log 0. "
            "log_p[np.arange(N), labels] picks the label's entry in each row. For the smoothing, the target of the "
            "label is 1 - s + s / K and of the others s / K: so the loss is (1 - s) times the plain one, plus s times "
            "the mean of -log p over all entries.",
        ),
    ),
    Exercise(
        "softmax_cross_entropy_backward",
        SOFTMAX,
        "softmax and cross-entropy, backward",
        (
            "For one row, the loss is log(sum_k exp(logits[k])) - sum_k target[k] logits[k]. Take the derivative of "
            "each term by logits[k]; the first is something that you have already.",
            "It is the difference of the probabilities and the target, the latter one-hot, or 1 - s + s / K and s / K. "
            "And the loss was a mean over N rows, times dloss. Work on a copy: probabilities belong to the caller.",
        ),
    ),
    Exercise(
        "dropout_mask",
        DROPOUT,
        "dropout: the mask",
        (
            "What is kept has to be scaled, so that the mean of the mask is 1. It is kept with probability 1 - p.",
            "Draw a number from 0 to 1 for each element, by np.random.default_rng([key, step]).random(x.shape): it is "
            "at least p with probability 1 - p. (random_words draws the same on a GPU; the reference takes that.) "
            "The mask has the dtype of x. start is for several processes that share a batch: "
            "leave it in the head, and you need not use it.",
        ),
    ),
    Exercise(
        "dropout_forward",
        DROPOUT,
        "dropout",
        (
            "The mask of dropout_mask is scaled already.",
            "One product, element by element.",
        ),
    ),
    Exercise(
        "dropout_backward",
        DROPOUT,
        "dropout, backward",
        (
            "Once the mask is drawn, each output is its input times a constant. Which one?",
            "The gradient needs the mask of the forward pass. The same key and step draw it again.",
        ),
    ),
    Exercise(
        "global_avg_pool2d_forward",
        AVERAGE,
        "average over all pixels",
        (
            "Which two axes of (N, H, W, C) are the pixels?",
            "mean takes a tuple of axes.",
        ),
    ),
    Exercise(
        "global_avg_pool2d_backward",
        AVERAGE,
        "average over all pixels, backward",
        (
            "How far does the average of H W numbers move when one of them moves by 1?",
            "Every pixel gets the same. Give dout two axes of length 1, dout[:, None, None, :], and broadcast it.",
        ),
    ),
    Exercise(
        "max_pool2d_forward",
        MAXIMUM,
        "max pooling",
        (
            "Loop over the taps (h, w) of the window, not over its positions: x[:, h::stride, w::stride] shows what "
            "tap (h, w) sees at all of them, but for a few too many at the end.",
            "x[pixels_of_tap(h, w, x.shape, kernel_size, stride)] has the shape of out, (N, oh, ow, C), for each tap. "
            "Take the maximum over the taps. Do not begin with zeros: all pixels of a window may be negative.",
        ),
    ),
    Exercise(
        "max_pool2d_backward",
        MAXIMUM,
        "max pooling, backward",
        (
            "Only the largest pixel of a window influences its output. Compare what each tap shows with out.",
            "For each tap: dx[pixels] += dout * (x[pixels] == out). Windows overlap, so it is += and not =. Where two "
            "pixels of a window are equally large, dout must not be given twice: keep an array of the windows whose "
            "largest pixel has come.",
        ),
    ),
    Exercise(
        "im2col",
        COLUMNS,
        "im2col",
        (
            "Pad the image with zeros. Then, for each tap (h, w), copy what it sees at all positions.",
            "np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))) pads rows and columns alone. Make "
            "columns of shape (N, oh, ow, kh, kw, C), oh = output_size(H, kh, stride, padding), and fill "
            "[:, :, :, h, w] for each tap with padded[pixels_of_tap(h, w, padded.shape, kernel_size, stride)]. At the "
            "end reshape to (N, oh, ow, kh*kw*C): the channels of a tap lie side by side.",
        ),
    ),
    Exercise(
        "col2im",
        COLUMNS,
        "col2im, the backward of im2col",
        (
            "im2col copied each pixel into as many rows as there are windows that show it. What comes back from all of "
            "these copies is added up.",
            "Make an image of zeros with its padding, (N, H + 2p, W + 2p, C), and for each tap add to it what im2col "
            "would copy from there. Then cut the padding off: its pixels are no pixels of x.",
        ),
    ),
    Exercise(
        "columns_conv2d_forward",
        CONV,
        "convolution by columns",
        (
            "With im2col, each window is a row. What is the sum over h, w and c of a row times a filter?",
            "columns (N*oh*ow, kh*kw*C) @ weight (kh*kw*C, O): weight.reshape(-1, O) has its numbers in the order of "
            "the columns already. Reshape the product to (N, oh, ow, O).",
        ),
    ),
    Exercise(
        "columns_conv2d_backward",
        CONV,
        "convolution by columns, backward",
        (
            "columns @ weight is a linear layer without bias. You have its backward, and that of im2col.",
            "With dout as rows (N*oh*ow, O): dweight = columns.T @ dout, in the shape of weight; dcolumns = dout @ "
            "weight.T, which col2im adds to the pixels. Without need_dx, dx is None.",
        ),
    ),
    Exercise(
        "conv2d_forward",
        CONV,
        "convolution with a bias",
        (
            "columns_conv2d_forward does it for all images; the bias, which may be None, is added to each pixel.",
            "Taking a few images at a time (image_chunks) saves memory, and you may leave it out.",
        ),
    ),
    Exercise(
        "conv2d_backward",
        CONV,
        "convolution with a bias, backward",
        (
            "The bias of a channel is added at every position of every image. Through how many outputs does it "
            "influence the loss?",
            "dx and dweight come from columns_conv2d_backward, dbias is dout summed over images, rows and columns. If "
            "you go through the images in parts, dx is put together and dweight adds up. None stands for what is not "
            "needed.",
        ),
    ),
    Exercise(
        "batch_norm_statistics",
        NORM,
        "BatchNorm: mean and variance",
        (
            "A channel's numbers are those of all images and pixels. Which axes are summed over?",
            "M = N H W, over axes 0, 1 and 2. The variance is the mean of (x - mean)^2, divided by M and not by M - 1.",
        ),
    ),
    Exercise(
        "batch_norm_forward",
        NORM,
        "BatchNorm: the normalisation",
        (
            "Subtract the mean, divide by the standard deviation: every array of shape (C,) fits x by broadcasting.",
            "1 / sqrt(var + eps), with eps inside the root. Then weight and bias.",
        ),
    ),
    Exercise(
        "batch_norm_backward_sums",
        NORM,
        "BatchNorm: gradients of weight and bias",
        (
            "out = x_hat weight + bias in every row. It is a linear layer that has one weight for each channel.",
            "Both are sums over the M = N H W rows: of dout times what weight was multiplied by, and of dout.",
        ),
    ),
    Exercise(
        "batch_norm_backward",
        NORM,
        "BatchNorm: the gradient of x",
        (
            "One x influences the outputs of its channel in three ways: directly, through the mean, and through the "
            "variance. Each gives a term. If all x of a channel grow by 1, nothing comes out differently: so the sum "
            "of dx over the M rows is 0. If you double the distance of all x from their mean, nothing changes either "
            "(but for eps).",
            "dx = weight rstd (dout - something the same for all rows - something times x_hat). Choose both such that "
            "the sum of dx and the sum of dx x_hat are 0 over the M rows: dbias = sum dout and dweight = sum dout "
            "x_hat, and the sum of x_hat^2 is M.",
        ),
    ),
    Exercise(
        "update_running_statistics",
        NORM,
        "BatchNorm: running statistics",
        (
            "Write into the arrays that you are given: running_mean *= ... or running_mean[...] = ... Assigning to the "
            "name changes nothing outside the function.",
            "momentum is the weight of the new batch. var was divided by M; M / (M - 1) times it is the unbiased one.",
        ),
    ),
    Exercise(
        "BasicBlock",
        BLOCK,
        "residual block",
        (
            "Forward: conv1, bn1 (its ReLU is in it), conv2, and bn2, which adds the shortcut's output and takes the "
            "ReLU of the sum: self.bn2(out, self.shortcut(x)). self.shortcut may be None: then it is self.bn2(out). "
            "Backward: the same parts in reverse. How many ways did x go?",
            "With a residual, self.bn2.backward(dout) returns two gradients: that of conv2's output and that of the "
            "residual. The first goes back through conv2, bn1, conv1; the second through the shortcut. x went both "
            "ways, so the two that arrive are added.",
        ),
        "resnet.py",
    ),
    Exercise(
        "sgd_update",
        OPTIMIZERS,
        "SGD with momentum",
        (
            "Write into param and velocity (param -= ..., velocity *= ...). A name that is assigned anew changes "
            "nothing outside the function; and grad is not yours.",
            "In order: g from grad, grad_scale and weight_decay; with momentum the velocity; the step. velocity is "
            "None where momentum is 0. Nesterov steps along g + momentum velocity, with the new velocity.",
        ),
    ),
    Exercise(
        "adam_update",
        OPTIMIZERS,
        "Adam",
        (
            "Write into param, m and v. Both averages first, then the step.",
            "step counts from 1, and the corrections are powers: 1 - beta1**step and 1 - beta2**step. m and v keep the "
            "uncorrected averages. eps is added to the root, not under it.",
        ),
    ),
    Exercise(
        "he_weight",
        TRAINING,
        "He initialisation",
        (
            "An output is the sum of n products of a weight and an input, n = kernel_size^2 in_channels. Its variance "
            "is n times that of one product. And of the inputs, which have passed a ReLU, only half are not 0.",
            "Normal, mean 0. normal() takes the standard deviation, which is the root of the variance. float32.",
        ),
        LAYERS,
    ),
    Exercise(
        "half_cosine",
        TRAINING,
        "learning rate: half a cosine",
        (
            "cos goes from 1 to -1 on the way from 0 to pi. What has to be done to get from 1 to 0?",
            "(1 + cos(pi step / steps)) / 2 goes from 1 to 0; scale it to go from start to end.",
        ),
        "schedules.py",
    ),
    Exercise(
        "cutout",
        TRAINING,
        "cutout",
        (
            "Draw a row and a column for each image: the middle of its square, which may be any pixel. Draw by key, "
            "epoch and the image's position (start + n), so that an epoch cut into other batches draws the same.",
            "With random_words(N, key, epoch, CUTOUT_STREAM, xp=np, start=start) and draw_below(H, words[:, 0]): the "
            "square begins at middle - size // 2 and has size rows. A row is covered if 0 <= row - top < size. "
            "np.where takes the color where rows and columns are both covered.",
        ),
        "augment.py",
    ),
    Exercise(
        "winograd_matrices",
        BRAVE,
        "Winograd: the matrices",
        (
            "Read 'By hand' in minires/kernels/winograd.py, which does it for two outputs. Any six points will do, and "
            "any way to share the scale out among the three matrices.",
            "Take the points 0, 1, -1, 2, -2 and infinity. Row a of WEIGHT is (1, a, a^2), over a number; row a of "
            "OUTPUT.T is (1, a, a^2, a^3); the rows of INPUT are the coefficients of the product of (t - b) over all "
            "other points b.",
        ),
        WINOGRAD,
    ),
    Exercise(
        "winograd_tile",
        BRAVE,
        "Winograd: a tile",
        (
            "A matrix on the left works on columns, its transpose on the right works on rows.",
            "Transform g to (6, 6) and x to (6, 6), multiply element by element, and transform to (4, 4).",
        ),
        WINOGRAD,
    ),
    Exercise(
        "SGD_CUDA",
        BRAVE,
        "SGD as a CUDA kernel",
        (
            "Every thread runs the function once. Which parameter is its own, given blockIdx.x, blockDim.x and "
            "threadIdx.x? The last block has threads too many.",
            "i = blockIdx.x * (long long)blockDim.x + threadIdx.x, and nothing is done where i >= size. From there it "
            "is sgd_update for one number. velocity is a null pointer without momentum.",
        ),
        "kernels/gpu.cu",
    ),
)
EXERCISES = {exercise.name: exercise for exercise in COURSE}
