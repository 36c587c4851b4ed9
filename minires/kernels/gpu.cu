// The GPU's kernels: what gpu.py launches, one CUDA module.
//
// Images are NHWC, so a pixel's channels lie side by side, and every kernel that walks over channels moves 16 bytes per
// thread and access: a `Pack` of 4 floats or 8 halves. T is the type in memory, float or half; arithmetic is in float,
// sums are in float or double. They are cut by the shape of the problem alone and added in a fixed order: there is no
// atomic operation, and a run gives the same bits again.
//
// "Bytes" counts what a kernel must read and write, in arrays of the size of its main argument; divided by the memory's
// bandwidth that is its floor. Where arithmetic is the floor, the comment says so.
//
// tests/cuda_emulator.h runs this file on a CPU, a fiber for each thread; it brings its own version of what stands
// between #ifndef EMULATED and #endif.
//
// Sources     CUDA C++ Programming Guide, and the PTX ISA for ldmatrix, mma.sync and cp.async; others at their kernels

#ifndef EMULATED
#include <cuda_fp16.h>

// Copy 16 bytes from global to shared memory in the background; zeros, and no access, where `inside` is false.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool inside) {
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(bytes));
}
// Close a group of copies; wait until at most N of the latest groups are under way.
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;\n"); }
template <int N>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

// Load four 8x8 matrices of halves (or 8x4 of floats), a row's 16 bytes from the address that each lane gives. Lane l
// gets the 4 bytes at row l / 4, position l % 4 of each; transposed, the elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)));
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)));
}
// c (16x8) += a (16x16) @ b (16x8) on the tensor cores, sums in float
__device__ __forceinline__ void multiply_add(half, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c (16x8) += a (16x8) @ b (8x8), which the tensor cores read with the 10 leading bits of each fraction (TF32)
__device__ __forceinline__ void multiply_add(float, float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

typedef unsigned char byte;
constexpr float LARGEST = 3.402823466e38f;  // of all finite floats

// V neighbours in memory, moved as one
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
    T item[V];
};
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: Philox, as in rng.py
// ---------------------------------------------------------------------------------------------------------------------

struct Words {
    unsigned w[4];
};

__device__ __forceinline__ Words random_words(unsigned long long element, unsigned stream, unsigned long long key,
                                              unsigned long long step) {
    unsigned c0 = (unsigned)element, c1 = stream, c2 = (unsigned)step, c3 = (unsigned)(step >> 32);
    unsigned k0 = (unsigned)key, k1 = (unsigned)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = (unsigned)(p1 >> 32) ^ c1 ^ k0;
        c1 = (unsigned)p1;
        c2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
        c3 = (unsigned)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// out = x * mask / (1 - p), forward and backward alike; x begins at element `start` of what the mask is drawn for.
// Grid: a thread for 4 elements that share a counter.   Bytes: 2 of x
template <typename T>
__global__ void dropout(const T* x, T* out, long long size, unsigned threshold, float scale, unsigned long long key,
                        const unsigned long long* step, unsigned long long start) {
    const long long group = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long first = group * 4 - (long long)(start % 4);  // of the counter's elements, in x
    if (first >= size) return;
    const Words words = random_words(start / 4 + group, 0, key, *step);
    for (int i = 0; i < 4; ++i)
        if (first + i >= 0 && first + i < size)
            out[first + i] = T(words.w[i] >= threshold ? float(x[first + i]) * scale : 0.f);
}

// ---------------------------------------------------------------------------------------------------------------------
// Elementwise and small things
// ---------------------------------------------------------------------------------------------------------------------

// out = a + b.   Grid: a thread for V elements.   Bytes: 3 of a
template <typename T, int V>
__global__ void add(const T* a, const T* b, T* out, long long size) {
    const long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * V;
    if (i >= size) return;
    const Pack<T, V> p = load<V>(a + i), q = load<V>(b + i);
    Pack<T, V> sum;
    for (int v = 0; v < V; ++v) sum.item[v] = T(float(p.item[v]) + float(q.item[v]));
    store(out + i, sum);
}

// out[n, c] = mean over the pixels.   Grid: a thread for V channels of an image.   Bytes: 1 of x
template <typename T, int V>
__global__ void average_pool(const T* x, T* out, int N, int pixels, int C) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= N * C) return;
    const T* from = x + (long long)(i / C) * pixels * C + i % C;
    double sum[V] = {};
    for (int pixel = 0; pixel < pixels; ++pixel) {
        const Pack<T, V> p = load<V>(from + (long long)pixel * C);
        for (int v = 0; v < V; ++v) sum[v] += float(p.item[v]);
    }
    Pack<T, V> mean;
    for (int v = 0; v < V; ++v) mean.item[v] = T(sum[v] / pixels);
    store(out + i, mean);
}

// dx[n, pixel, c] = dout[n, c] / pixels.   Grid: a thread for V channels of a pixel.   Bytes: 1 of dx
template <typename T, int V>
__global__ void average_pool_backward(const T* dout, T* dx, long long size, int pixels, int C) {
    const long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * V;
    if (i >= size) return;
    Pack<T, V> p = load<V>(dout + i / ((long long)pixels * C) * C + i % C);
    for (int v = 0; v < V; ++v) p.item[v] = T(float(p.item[v]) / pixels);
    store(dx + i, p);
}

// out[m, n] = sum_k a[m, k] b[k, n] (+ bias[n]), for products too small for a library call to pay. The strides between
// a's rows and columns and between b's choose the transposes.   Grid: a warp for each output
template <typename A, typename B, typename T>
__global__ void small_product(const A* a, const B* b, const float* bias, T* out, int M, int N, int K, int a_row,
                              int a_column, int b_row, int b_column) {
    const int output = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (output >= M * N) return;
    const int m = output / N, n = output % N;
    float sum = 0;
    for (int k = lane; k < K; k += 32)
        sum += float(a[(long long)m * a_row + (long long)k * a_column]) *
               float(b[(long long)k * b_row + (long long)n * b_column]);
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane == 0) out[output] = T(bias ? sum + bias[n] : sum);
}

// The sum over rows, in double.   Grid: a warp for each of C columns
template <typename T>
__global__ void column_sums(const T* x, float* out, int rows, int C) {
    const int c = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (c >= C) return;
    double sum = 0;
    for (int row = lane; row < rows; row += 32) sum += float(x[(long long)row * C + c]);
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane == 0) out[c] = float(sum);
}

// Softmax and the mean cross-entropy.   Grid: one block, a warp for every 32nd row; N K is small.
template <typename T, typename L>
__global__ void softmax_cross_entropy(const T* logits, const L* labels, float* probabilities, float* loss, int N, int K,
                                      float smoothing) {
    __shared__ double row_losses[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    double total = 0;
    for (int n = warp; n < N; n += warps) {
        const T* row = logits + (long long)n * K;
        float largest = -LARGEST;
        for (int k = lane; k < K; k += 32) largest = fmaxf(largest, float(row[k]));
        for (int other = 16; other; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        float sum = 0, shifted_sum = 0;
        for (int k = lane; k < K; k += 32) {
            sum += expf(float(row[k]) - largest);
            shifted_sum += float(row[k]) - largest;
        }
        for (int other = 16; other; other /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, other);
            shifted_sum += __shfl_xor_sync(0xffffffffu, shifted_sum, other);
        }
        for (int k = lane; k < K; k += 32) probabilities[(long long)n * K + k] = expf(float(row[k]) - largest) / sum;
        const float log_sum = logf(sum);
        const float of_label = float(row[labels[n]]) - largest;
        total += (1 - smoothing) * (log_sum - of_label);
        if (smoothing > 0) total += smoothing * (log_sum - shifted_sum / K);  // 0 * infinity would be NaN
    }
    if (lane == 0) row_losses[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int w = 0; w < warps; ++w) sum += row_losses[w];
        *loss = float(sum / N);
    }
}

// dlogits = dloss (p - target) / N.   Grid: a thread for each of N K
template <typename L>
__global__ void softmax_cross_entropy_backward(const float* probabilities, const L* labels, float* dlogits, int N,
                                               int K, float smoothing, float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= N * K) return;
    const float target = (labels[i / K] == i % K ? 1 - smoothing : 0.f) + smoothing / K;
    dlogits[i] = (probabilities[i] - target) * scale;
}

// ---------------------------------------------------------------------------------------------------------------------
// Batch normalisation: statistics in two stages, and then one pass for all the rest
//
// A block's threads stand in a rectangle: threadIdx.x is the index among the channels (V of them), threadIdx.y the row.
// A block takes a chunk of ROWS rows for each of its threads; blockIdx.x counts chunks, blockIdx.y slices of channels.
// blockDim.x is a power of 2 up to 32, and there are 256 threads. Where the last chunk is not full, its threads read
// the last row again and leave it out: loads without a condition can all be under way at once.
// ---------------------------------------------------------------------------------------------------------------------

// Add up each of V values over the rows of the block's threads; every thread gets the sums of its channels.
template <int V>
__device__ __forceinline__ void sum_over_block(float (&value)[V], float* shared) {
    const int lanes = blockDim.x, thread = threadIdx.y * lanes + threadIdx.x;
    for (int other = lanes; other < 32; other *= 2)
        for (int v = 0; v < V; ++v) value[v] += __shfl_xor_sync(0xffffffffu, value[v], other);
    if (thread % 32 < lanes)
        for (int v = 0; v < V; ++v) shared[thread / 32 * lanes * V + threadIdx.x * V + v] = value[v];
    __syncthreads();
    if (thread < lanes * V) {
        float sum = 0;
        for (int warp = 0; warp < 8; ++warp) sum += shared[warp * lanes * V + thread];
        shared[8 * lanes * V + thread] = sum;
    }
    __syncthreads();
    for (int v = 0; v < V; ++v) value[v] = shared[8 * lanes * V + threadIdx.x * V + v];
    __syncthreads();
}

// Stage one: of each channel in each chunk, the mean and the sum of squares around it; partial (chunks, 2, C).
// The chunk stays in registers, so that the squares can be taken around a mean that is known.   Bytes: 1 of x
template <typename T, int V, int ROWS>
__global__ void __launch_bounds__(256) batch_norm_moments(const T* x, float* partial, int M, int C) {
    __shared__ float shared[9 * 32 * V];
    const int c = min((int)(blockIdx.y * blockDim.x + threadIdx.x) * V, C - V), step = blockDim.y;
    const int first = blockIdx.x * ROWS * step, row = first + threadIdx.y;
    Pack<T, V> p[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) p[i] = load<V>(x + (long long)min(row + i * step, M - 1) * C + c);
    float mean[V] = {}, rest[V] = {}, squares[V] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < V; ++v) mean[v] += row + i * step < M ? float(p[i].item[v]) : 0.f;
    sum_over_block(mean, shared);
    const float share = 1.f / min(ROWS * step, M - first);
    for (int v = 0; v < V; ++v) mean[v] *= share;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < V; ++v) {
            const float centred = row + i * step < M ? float(p[i].item[v]) - mean[v] : 0.f;
            rest[v] += centred;
            squares[v] += centred * centred;
        }
    sum_over_block(rest, shared);  // what rounding has left of the mean: 0 but for large numbers close together
    sum_over_block(squares, shared);
    if (threadIdx.y == 0)
        for (int v = 0; v < V; ++v) {
            partial[(blockIdx.x * 2LL + 0) * C + c + v] = mean[v] + rest[v] * share;
            const float around_mean = squares[v] - rest[v] * rest[v] * share;
            partial[(blockIdx.x * 2LL + 1) * C + c + v] = around_mean < 0 ? 0.f : around_mean;  // by rounding
        }
}

// Add up a value over the 32 rows of a block of (8, 32) threads; every thread gets the sum of its column.
__device__ __forceinline__ double sum_over_columns(double value, double (*shared)[9]) {
    shared[threadIdx.y][threadIdx.x] = value;
    __syncthreads();
    double sum = 0;
    for (int y = 0; y < 32; ++y) sum += shared[y][threadIdx.x];
    __syncthreads();
    return sum;
}

// Stage two: mean and variance from those of all chunks. Around the mean of all rows, a chunk's sum of squares is
// larger by count (mean of the chunk - mean)^2. Source: Chan, Golub and LeVeque 1979. Grid: 8 channels a block, 32
// threads for each.   Bytes: the partials
__global__ void __launch_bounds__(256)
    batch_norm_merge(const float* partial, float* mean, float* var, int chunks, int chunk_rows, int M, int C) {
    __shared__ double shared[32][9];
    const int c = min((int)(blockIdx.x * 8 + threadIdx.x), C - 1);
    double total = 0, squares = 0;
#pragma unroll 4
    for (int chunk = threadIdx.y; chunk < chunks; chunk += 32)
        total += (double)partial[chunk * 2LL * C + c] * min(chunk_rows, M - chunk * chunk_rows);
    const double centre = sum_over_columns(total, shared) / M;
#pragma unroll 4
    for (int chunk = threadIdx.y; chunk < chunks; chunk += 32) {
        const double apart = partial[chunk * 2LL * C + c] - centre;
        squares += partial[(chunk * 2LL + 1) * C + c] + apart * apart * min(chunk_rows, M - chunk * chunk_rows);
    }
    squares = sum_over_columns(squares, shared);
    if (threadIdx.y == 0) {
        mean[c] = float(centre);
        var[c] = float(squares / M);
    }
}

// running = (1 - momentum) running + momentum batch, with the unbiased variance.   Grid: a thread for each channel
__global__ void update_running(float* running_mean, float* running_var, const float* mean, const float* var, int C,
                               float momentum, float unbiased) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    running_mean[c] = running_mean[c] * (1 - momentum) + mean[c] * momentum;
    running_var[c] = running_var[c] * (1 - momentum) + var[c] * unbiased * momentum;
}

// out = (x - mean) weight / sqrt(var + eps) + bias, then + residual, then ReLU, each if asked for.
// Bytes: 2 of x, or 3 with a residual
template <typename T, int V, int ROWS>
__global__ void __launch_bounds__(256)
    batch_norm_apply(const T* x, const T* residual, const float* weight, const float* bias, const float* mean,
                     const float* var, T* out, int M, int C, float eps, bool relu) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * V, step = blockDim.y;
    const int row = blockIdx.x * ROWS * step + threadIdx.y;
    if (c >= C) return;
    float scale[V], centre[V], shift[V];
    for (int v = 0; v < V; ++v) {
        scale[v] = weight[c + v] * rsqrtf(var[c + v] + eps);
        centre[v] = mean[c + v];
        shift[v] = bias[c + v];
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const long long at = (long long)min(row + i * step, M - 1) * C + c;
        const Pack<T, V> p = load<V>(x + at);
        Pack<T, V> r = {}, result;
        if (residual) r = load<V>(residual + at);
        for (int v = 0; v < V; ++v) {
            const float y = (float(p.item[v]) - centre[v]) * scale[v] + shift[v] + float(r.item[v]);
            result.item[v] = T(relu && y < 0 ? 0.f : y);  // unlike fmaxf, this keeps NaN
        }
        if (row + i * step < M) store(out + at, result);
    }
}

// Backward, stage one: g is dout, or with a ReLU 0 where out is not positive, and then written to `masked`; the sums of
// g and of g x_hat over each chunk of rows, partial (chunks, 2, C). Without a ReLU, out and masked are null.
// Bytes: 2 of x, or 4 with a ReLU
template <typename T, int V, int ROWS>
__global__ void __launch_bounds__(256)
    batch_norm_backward_sums(const T* dout, const T* x, const T* out, const float* mean, const float* var,
                             float* partial, T* masked, int M, int C, float eps) {
    __shared__ float shared[9 * 32 * V];
    const int c = min((int)(blockIdx.y * blockDim.x + threadIdx.x) * V, C - V), step = blockDim.y;
    const int row = blockIdx.x * ROWS * step + threadIdx.y;
    float centre[V], sum[V] = {}, product[V] = {};
    for (int v = 0; v < V; ++v) centre[v] = mean[c + v];
#pragma unroll 4
    for (int i = 0; i < ROWS; ++i) {
        const long long at = (long long)min(row + i * step, M - 1) * C + c;
        const Pack<T, V> d = load<V>(dout + at), p = load<V>(x + at), o = load<V>((out ? out : x) + at);
        Pack<T, V> kept;
        for (int v = 0; v < V; ++v) {
            const bool counts = row + i * step < M && (!out || float(o.item[v]) > 0);
            const float g = counts ? float(d.item[v]) : 0.f;
            sum[v] += g;
            product[v] += g * (float(p.item[v]) - centre[v]);
            kept.item[v] = T(g);
        }
        if (masked && row + i * step < M) store(masked + at, kept);
    }
    sum_over_block(sum, shared);
    sum_over_block(product, shared);
    if (threadIdx.y == 0)
        for (int v = 0; v < V; ++v) {
            partial[(blockIdx.x * 2LL + 0) * C + c + v] = sum[v];
            partial[(blockIdx.x * 2LL + 1) * C + c + v] = product[v] * rsqrtf(var[c + v] + eps);
        }
}

// Backward, stage two: dbias and dweight.   Grid: 8 channels a block, 32 threads for each
__global__ void __launch_bounds__(256)
    batch_norm_backward_merge(const float* partial, float* dbias, float* dweight, int chunks, int C) {
    __shared__ double shared[32][9];
    const int c = min((int)(blockIdx.x * 8 + threadIdx.x), C - 1);
    double sum = 0, product = 0;
#pragma unroll 4
    for (int chunk = threadIdx.y; chunk < chunks; chunk += 32) {
        sum += partial[chunk * 2LL * C + c];
        product += partial[(chunk * 2LL + 1) * C + c];
    }
    sum = sum_over_columns(sum, shared);
    product = sum_over_columns(product, shared);
    if (threadIdx.y == 0) {
        dbias[c] = float(sum);
        dweight[c] = float(product);
    }
}

// Backward, the last pass: dx = weight rstd (dout - dbias / M - x_hat dweight / M).   Bytes: 3 of x
template <typename T, int V, int ROWS>
__global__ void __launch_bounds__(256)
    batch_norm_backward_apply(const T* dout, const T* x, const float* weight, const float* mean, const float* var,
                              const float* dbias, const float* dweight, T* dx, int M, int C, float eps) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * V, step = blockDim.y;
    const int row = blockIdx.x * ROWS * step + threadIdx.y;
    if (c >= C) return;
    float scale[V], slope[V], shift[V];  // dx = scale dout - slope (x - mean) - shift, sorted by what varies
    for (int v = 0; v < V; ++v) {
        const float rstd = rsqrtf(var[c + v] + eps);
        scale[v] = weight[c + v] * rstd;
        slope[v] = scale[v] * rstd * dweight[c + v] / M;
        shift[v] = scale[v] * dbias[c + v] / M;
    }
#pragma unroll 4
    for (int i = 0; i < ROWS; ++i) {
        const long long at = (long long)min(row + i * step, M - 1) * C + c;
        const Pack<T, V> d = load<V>(dout + at), p = load<V>(x + at);
        Pack<T, V> result;
        for (int v = 0; v < V; ++v)
            result.item[v] =
                T(float(d.item[v]) * scale[v] - (float(p.item[v]) - mean[c + v]) * slope[v] - shift[v]);
        if (row + i * step < M) store(dx + at, result);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolution by columns: im2col and its adjoint, for a matrix product in between
// ---------------------------------------------------------------------------------------------------------------------

// columns[(n, i, j), (h, w, c)] = x[n, i stride + h - padding, j stride + w - padding, c]. A row has row_size numbers;
// what is beyond kh kw C is 0. V divides row_size; where it divides C as well, V numbers are one load (WHOLE).
// Grid: a thread for V numbers.   Bytes: x and the columns, 1 each
template <typename T, int V, bool WHOLE>
__global__ void im2col(const T* x, T* columns, long long size, int row_size, int H, int W, int C, int oh, int ow,
                       int kh, int kw, int stride, int padding) {
    const long long at = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * V;
    if (at >= size) return;
    const int row = at / row_size, k = at % row_size;
    const int j = row % ow, i = row / ow % oh, n = row / ow / oh;
    int c = k % C, w = k / C % kw, h = k / C / kw;
    Pack<T, V> p;
    if (WHOLE) {
        const int y = i * stride + h - padding, z = j * stride + w - padding;
        const bool inside = h < kh && y >= 0 && y < H && z >= 0 && z < W;
        if (inside)
            p = load<V>(x + (((long long)n * H + y) * W + z) * C + c);
        else
            for (int v = 0; v < V; ++v) p.item[v] = T(0.f);
    } else
        for (int v = 0; v < V; ++v) {
            const int y = i * stride + h - padding, z = j * stride + w - padding;
            const bool inside = h < kh && y >= 0 && y < H && z >= 0 && z < W;
            p.item[v] = inside ? x[(((long long)n * H + y) * W + z) * C + c] : T(0.f);
            if (++c == C) {
                c = 0;
                if (++w == kw) w = 0, ++h;
            }
        }
    store(columns + at, p);
}

// The adjoint, as a gather: a pixel collects from every window that shows it, so no two threads write to one position.
// Grid: a thread for V channels of a pixel.   Bytes: the columns and dx, 1 each
template <typename T, int V>
__global__ void col2im(const T* columns, T* dx, long long size, int H, int W, int C, int oh, int ow, int kh, int kw,
                       int stride, int padding) {
    const long long at = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * V;
    if (at >= size) return;
    const int c = at % C, z = at / C % W, y = at / C / W % H;
    const long long n = at / C / W / H;
    float sum[V] = {};
    for (int h = 0; h < kh; ++h) {
        const int i = y + padding - h;
        if (i < 0 || i % stride || i / stride >= oh) continue;
        for (int w = 0; w < kw; ++w) {
            const int j = z + padding - w;
            if (j < 0 || j % stride || j / stride >= ow) continue;
            const Pack<T, V> p =
                load<V>(columns + (((n * oh + i / stride) * ow + j / stride) * kh * kw + h * kw + w) * C + c);
            for (int v = 0; v < V; ++v) sum[v] += float(p.item[v]);
        }
    }
    Pack<T, V> result;
    for (int v = 0; v < V; ++v) result.item[v] = T(sum[v]);
    store(dx + at, result);
}

// Convert the weights to the type of the images.   Grid: a thread for each.   Bytes: both arrays
template <typename T>
__global__ void cast(const float* from, T* to, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) to[i] = T(from[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolution without columns, on the tensor cores
//
// The product of im2col is computed, but its columns never exist: a block gathers the part of them that it needs
// straight into shared memory. A block computes a tile of BM x BN outputs, stepping through the inner dimension INNER
// bytes at a time (BK numbers). STAGES such steps are under way at any time: while the tensor cores multiply one, the
// next ones are being copied. A warp computes WM x WN of the tile in pieces of 16 x 8, held in registers.
//
// Tiles lie in shared memory in one of two ways, as they lie in global memory:
//     inner     a row holds INNER bytes along the inner dimension, 64 or 128; `ldmatrix` hands them out as the tensor
//               cores want them
//     outer     a row holds BM or BN numbers of one index of the inner dimension, and has to be transposed on the way:
//               `ldmatrix` can for halves, floats are fetched one by one
// In both, 16-byte chunks are swapped around within their row ("swizzled"), so that the eight rows of a matrix lie in
// different banks.
//
// Floor: 2 M N K operations over the tensor cores' rate.
// Source: the technique is that of CUTLASS's implicit GEMM; cuDNN's paper (Chetlur et al. 2014) describes the idea.
// ---------------------------------------------------------------------------------------------------------------------

template <int INNER>
__device__ __forceinline__ int inner_position(int row, int chunk) {
    return row * INNER + ((chunk ^ (INNER == 128 ? row & 7 : row >> 1 & 3)) << 4);
}
template <typename T, int WIDTH>
__device__ __forceinline__ int outer_position(int row, int chunk) {
    constexpr int BYTES = WIDTH * sizeof(T);
    const int swizzle = sizeof(T) == 4 ? (row & 3) << 1 : BYTES >= 128 ? row & 7 : row >> 1 & 3;
    return row * BYTES + ((chunk ^ swizzle) << 4);
}

// The tensor cores cut a float's fraction after 10 bits; adding half of what is cut first makes that a rounding.
__device__ __forceinline__ void round_to_tf32(half, unsigned (&)[4]) {}
__device__ __forceinline__ void round_to_tf32(float, unsigned (&r)[4]) {
    for (int i = 0; i < 4; ++i)
        if (fabsf(reinterpret_cast<float&>(r[i])) <= LARGEST) r[i] += 0x1000u;  // NaN and infinity stay what they are
}

// A piece of the left factor, 16 rows from `first` on and the `part`-th 32 bytes of the inner dimension
template <typename T, int INNER>
__device__ __forceinline__ void left_inner(unsigned (&a)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + inner_position<INNER>(first + lane % 16, part * 2 + lane / 16));
    round_to_tf32(T(0.f), a);
}
template <int WIDTH>
__device__ __forceinline__ void left_outer(half, unsigned (&a)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(
        a, tile + outer_position<half, WIDTH>(part * 16 + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
}
template <int WIDTH>
__device__ __forceinline__ void left_outer(float, unsigned (&a)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32, row = part * 8 + lane % 4, m = first + lane / 4;
    for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 4, column = m + i % 2 * 8;
        a[i] = *(const unsigned*)(tile + outer_position<float, WIDTH>(r, column / 4) + column % 4 * 4);
    }
    round_to_tf32(0.f, a);
}
// Two neighbouring 32-byte x 8 pieces of the right factor: b[0], b[1] for columns `first`, b[2], b[3] for the next 8
template <typename T, int INNER>
__device__ __forceinline__ void right_inner(unsigned (&b)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, tile + inner_position<INNER>(first + lane % 8 + lane / 16 * 8, part * 2 + lane / 8 % 2));
    round_to_tf32(T(0.f), b);
}
template <int WIDTH>
__device__ __forceinline__ void right_outer(half, unsigned (&b)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(b, tile + outer_position<half, WIDTH>(part * 16 + lane % 16, first / 8 + lane / 16));
}
template <int WIDTH>
__device__ __forceinline__ void right_outer(float, unsigned (&b)[4], const byte* tile, int first, int part) {
    const int lane = threadIdx.x % 32, row = part * 8 + lane % 4, n = first + lane / 4;
    for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 4, column = n + i / 2 * 8;
        b[i] = *(const unsigned*)(tile + outer_position<float, WIDTH>(r, column / 4) + column % 4 * 4);
    }
    round_to_tf32(0.f, b);
}

// FORWARD: out (N, oh, ow, O) from x (N, H, W, C). Otherwise the input gradient: dx, like x, from dout, like out.
//
// Both gather: a position of the target collects, tap by tap of the window, from a pixel of the source. Forward, from
// position (i, j) tap (h, w) sees pixel (i stride + h - padding, ...). Backward, pixel (y, ...) of dx was seen by tap h
// from position (y + padding - h) / stride of dout, if that is an integer: for which taps it is depends only on
// y % stride. So pixels are taken in stride^2 phases, one to each blockIdx.z, and every tap of a phase counts for all
// its pixels.
//
// weight (kh, kw, C, O); the source's channels are a multiple of BK, the target's of BN.
// Grid: (tiles of rows, target channels / BN, phases)
template <typename T, int BM, int BN, int WM, int WN, int STAGES, int INNER, bool FORWARD>
__global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)
    convolve(const T* source, const T* weight, T* target, int N, int H, int W, int C, int oh, int ow, int O, int kh,
             int kw, int stride, int padding) {
    constexpr int THREADS = BM / WM * (BN / WN) * 32, CHUNK = 16 / sizeof(T), BK = INNER / sizeof(T);
    constexpr int LEFT = BM * INNER, RIGHT = BN * INNER, ACROSS = INNER / 16, ROW_STEP = THREADS / ACROSS;
    constexpr int LEFT_COPIES = BM / ROW_STEP, RIGHT_COPIES = BN * ACROSS / THREADS;
    extern __shared__ __align__(128) byte shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN;

    // The geometry of this phase
    const int phase_h = FORWARD ? 0 : blockIdx.z / stride, phase_w = FORWARD ? 0 : blockIdx.z % stride;
    const int first_h = FORWARD ? 0 : (phase_h + padding) % stride,
              first_w = FORWARD ? 0 : (phase_w + padding) % stride;
    const int tap_step = FORWARD ? 1 : stride;
    const int taps_h = (kh - first_h + tap_step - 1) / tap_step, taps_w = (kw - first_w + tap_step - 1) / tap_step;
    const int positions_h = FORWARD ? oh : (H - phase_h + stride - 1) / stride;
    const int positions_w = FORWARD ? ow : (W - phase_w + stride - 1) / stride;
    const int source_h = FORWARD ? H : oh, source_w = FORWARD ? W : ow, channels = FORWARD ? C : O;
    const int target_h = FORWARD ? oh : H, target_w = FORWARD ? ow : W, target_channels = FORWARD ? O : C;
    const int direction = FORWARD ? 1 : -1;  // in which the source's pixel moves from tap to tap
    const int M = N * positions_h * positions_w, first_row = blockIdx.x * BM, first_column = blockIdx.y * BN;
    if (first_row >= M) return;
    const int steps = taps_h * taps_w * (channels / BK);

    // The rows that this thread gathers: where the source's pixel at the first tap is, and a bit for each tap that
    // tells whether the pixel there is inside. All of it is worked out before the loop, whose time it would cost.
    const int chunk = thread % ACROSS, chunk_row = thread / ACROSS;
    const T* row_from[LEFT_COPIES];
    unsigned inside[LEFT_COPIES];
#pragma unroll
    for (int i = 0; i < LEFT_COPIES; ++i) {
        const int m = first_row + chunk_row + i * ROW_STEP;
        const int x = m % positions_w, y = m / positions_w % positions_h, n = m / positions_w / positions_h;
        const int row_y = FORWARD ? y * stride - padding : y + (phase_h + padding - first_h) / stride;
        const int row_x = FORWARD ? x * stride - padding : x + (phase_w + padding - first_w) / stride;
        row_from[i] = source + ((n * source_h + row_y) * source_w + row_x) * channels + chunk * CHUNK;
        unsigned inside_x = 0;
        for (int t = 0; t < taps_w; ++t)
            inside_x |= unsigned((unsigned)(row_x + t * direction) < (unsigned)source_w) << t;
        inside[i] = 0;
        for (int t = 0; t < taps_h; ++t)
            if (m < M && (unsigned)(row_y + t * direction) < (unsigned)source_h) inside[i] |= inside_x << t * taps_w;
    }
    const int left_position = inner_position<INNER>(chunk_row, chunk);

    // The weights: forward, O is outermost in memory and the rows of a step follow each other from step to step;
    // backward, a row is a channel of dx, and the inner dimension, O, lies along it.
    constexpr int WEIGHT_ACROSS = FORWARD ? BN / CHUNK : ACROSS, WEIGHT_STEP = THREADS / WEIGHT_ACROSS;
    constexpr int WEIGHT_ROW_BYTES = FORWARD ? BN * sizeof(T) : INNER;
    const int weight_chunk = thread % WEIGHT_ACROSS, weight_row = thread / WEIGHT_ACROSS;
    const T* weight_from =
        weight + (FORWARD ? weight_row * O + first_column : (first_column + weight_row) * O) + weight_chunk * CHUNK;
    const int right_position =
        FORWARD ? outer_position<T, BN>(weight_row, weight_chunk) : inner_position<INNER>(weight_row, weight_chunk);

    // The next step to be copied: its tap of the window, its first channel, and its stage in shared memory
    int tap = 0, tap_x = 0, tap_y = 0, channel = 0, copy_stage = 0;
    auto copy_step = [&] {
        byte *left = shared + copy_stage * (LEFT + RIGHT), *right = left + LEFT;
        const int from = (tap_y * source_w + tap_x) * direction * channels + channel;
#pragma unroll
        for (int i = 0; i < LEFT_COPIES; ++i)
            copy16(left + left_position + i * ROW_STEP * INNER, row_from[i] + from, inside[i] >> tap & 1);
        const int weight_tap = (first_h + tap_y * tap_step) * kw + first_w + tap_x * tap_step;
        const int weight_at = FORWARD ? (weight_tap * C + channel) * O : weight_tap * C * O + channel;
#pragma unroll
        for (int i = 0; i < RIGHT_COPIES; ++i)
            copy16(right + right_position + i * WEIGHT_STEP * WEIGHT_ROW_BYTES,
                   weight_from + weight_at + i * WEIGHT_STEP * O, true);
        if (++copy_stage == STAGES) copy_stage = 0;
        channel += BK;
        if (channel == channels) {
            channel = 0, ++tap;
            if (++tap_x == taps_w) tap_x = 0, ++tap_y;
        }
    };

    float sum[WM / 16][WN / 8][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) copy_step();
        end_of_copies();
    }
    for (int step = 0, stage = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy_step();
        end_of_copies();
        const byte *left = shared + stage * (LEFT + RIGHT), *right = left + LEFT;
        if (++stage == STAGES) stage = 0;
#pragma unroll
        for (int part = 0; part < INNER / 32; ++part) {
            unsigned a[WM / 16][4], b[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; ++i) left_inner<T, INNER>(a[i], left, warp_m + i * 16, part);
#pragma unroll
            for (int j = 0; j < WN / 16; ++j)
                if (FORWARD)
                    right_outer<BN>(T(0.f), b[j], right, warp_n + j * 16, part);
                else
                    right_inner<T, INNER>(b[j], right, warp_n + j * 16, part);
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j) multiply_add(T(0.f), sum[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }

    // The tile goes through shared memory, so that the target is written 16 bytes at a time
    wait_for_copies<0>();
    __syncthreads();
    auto tile_position = [&](int row, int column) {
        return row * BN * (int)sizeof(T) + ((column / CHUNK ^ (row & 7)) << 4) + column % CHUNK * (int)sizeof(T);
    };
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int row = warp_m + i * 16 + lane / 4 + lower * 8, column = warp_n + j * 8 + lane % 4 * 2;
                store(reinterpret_cast<T*>(shared + tile_position(row, column)),
                      Pack<T, 2>{{T(sum[i][j][lower * 2]), T(sum[i][j][lower * 2 + 1])}});
            }
    __syncthreads();
    for (int id = thread; id < BM * (BN / CHUNK); id += THREADS) {
        const int row = id / (BN / CHUNK), column = id % (BN / CHUNK) * CHUNK, m = first_row + row;
        if (m >= M) break;
        const int x = m % positions_w, y = m / positions_w % positions_h, n = m / positions_w / positions_h;
        const int target_y = FORWARD ? y : y * stride + phase_h, target_x = FORWARD ? x : x * stride + phase_w;
        store(target + (((long long)n * target_h + target_y) * target_w + target_x) * target_channels + first_column +
                  column,
              load<CHUNK>(reinterpret_cast<const T*>(shared + tile_position(row, column))));
    }
}

// dweight (kh*kw*C, O) = columns.T @ dout. The inner dimension, the positions of dout, is long, the result small: each
// blockIdx.z takes `positions_each` of the positions, and writes to its own part of partial (splits, kh*kw*C, O), which
// `sum_splits` adds up. A row of the result is a tap of the window and a channel; a block's rows may be those of
// several taps, which read almost the same pixels.
// kh kw C is a multiple of BM, C of 16 bytes, O of BN.   Grid: (kh kw C / BM, O / BN, splits)
template <typename T, int BM, int BN, int WM, int WN, int STAGES, int INNER>
__global__ void __launch_bounds__(BM / WM * (BN / WN) * 32)
    convolve_weight_gradient(const T* x, const T* dout, float* partial, int N, int H, int W, int C, int oh, int ow,
                             int O, int kw, int stride, int padding, int positions_each) {
    constexpr int THREADS = BM / WM * (BN / WN) * 32, CHUNK = 16 / sizeof(T), BK = INNER / sizeof(T);
    constexpr int LEFT = BM * INNER, RIGHT = BN * INNER;
    constexpr int SHARERS = THREADS / BK;  // of a position: so many threads copy its channels
    constexpr int LEFT_COPIES = BM / CHUNK / SHARERS, RIGHT_COPIES = BN / CHUNK / SHARERS;
    extern __shared__ __align__(128) byte shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN;
    const int first_row = blockIdx.x * BM, first_o = blockIdx.y * BN;
    const int first = blockIdx.z * positions_each, end = min(first + positions_each, N * oh * ow);
    const int steps = (end - first + BK - 1) / BK;

    // This thread follows one position, which moves on by BK from step to step, and sees it from several taps, channels
    const int row = thread / SHARERS, sharer = thread % SHARERS;
    int position = first + row, j = position % ow, i = position / ow % oh, n = position / ow / oh;
    const int on_j = BK % ow, on_i = BK / ow % oh, on_n = BK / ow / oh;
    int tap_y[LEFT_COPIES], tap_x[LEFT_COPIES], from[LEFT_COPIES];
#pragma unroll
    for (int k = 0; k < LEFT_COPIES; ++k) {
        const int m = first_row + (sharer + k * SHARERS) * CHUNK;
        tap_y[k] = m / C / kw - padding, tap_x[k] = m / C % kw - padding;
        from[k] = (tap_y[k] * W + tap_x[k]) * C + m % C;
    }
    int copy_stage = 0;
    auto copy_step = [&] {
        byte *left = shared + copy_stage * (LEFT + RIGHT), *right = left + LEFT;
        const int y = i * stride, z = j * stride;
        const T* pixel = x + ((n * H + y) * W + z) * C;
        const bool counts = position < end;
#pragma unroll
        for (int k = 0; k < LEFT_COPIES; ++k) {
            const bool inside = (unsigned)(y + tap_y[k]) < (unsigned)H && (unsigned)(z + tap_x[k]) < (unsigned)W;
            copy16(left + outer_position<T, BM>(row, sharer + k * SHARERS), pixel + from[k], counts && inside);
        }
        const T* gradient = dout + position * O + first_o + sharer * CHUNK;
#pragma unroll
        for (int k = 0; k < RIGHT_COPIES; ++k)
            copy16(right + outer_position<T, BN>(row, sharer + k * SHARERS), gradient + k * SHARERS * CHUNK, counts);
        if (++copy_stage == STAGES) copy_stage = 0;
        position += BK, j += on_j, i += on_i, n += on_n;
        if (j >= ow) j -= ow, ++i;
        if (i >= oh) i -= oh, ++n;
    };

    float sum[WM / 16][WN / 8][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) copy_step();
        end_of_copies();
    }
    for (int step = 0, stage = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy_step();
        end_of_copies();
        const byte *left = shared + stage * (LEFT + RIGHT), *right = left + LEFT;
        if (++stage == STAGES) stage = 0;
#pragma unroll
        for (int part = 0; part < INNER / 32; ++part) {
            unsigned a[WM / 16][4], b[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; ++i) left_outer<BM>(T(0.f), a[i], left, warp_m + i * 16, part);
#pragma unroll
            for (int j = 0; j < WN / 16; ++j) right_outer<BN>(T(0.f), b[j], right, warp_n + j * 16, part);
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j) multiply_add(T(0.f), sum[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }
    float* to = partial + (long long)blockIdx.z * gridDim.x * BM * O;
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int m = first_row + warp_m + i * 16 + lane / 4 + lower * 8;
                const int o = first_o + warp_n + j * 8 + lane % 4 * 2;
                store(to + (long long)m * O + o, Pack<float, 2>{{sum[i][j][lower * 2], sum[i][j][lower * 2 + 1]}});
            }
}

// out = the sum of the parts, in their order.   Grid: a thread for 4 sums.   Bytes: the parts
__global__ void sum_splits(const float* partial, float* out, int size, int splits) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= size) return;
    Pack<float, 4> sum = load<4>(partial + i);
#pragma unroll 8
    for (int split = 1; split < splits; ++split) {
        const Pack<float, 4> part = load<4>(partial + (long long)split * size + i);
        for (int v = 0; v < 4; ++v) sum.item[v] += part.item[v];
    }
    store(out + i, sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizers, over flat buffers
// ---------------------------------------------------------------------------------------------------------------------

// See reference.adam_update; new1 and new2 are 1 - beta1 and 1 - beta2, which floats would lose digits of.
// Grid: a thread for each parameter.   Bytes: 7 of param
__global__ void adam(float* param, const float* grad, float* m, float* v, long long size, float grad_scale,
                     float weight_decay, float beta1, float new1, float beta2, float new2, float step_size,
                     float rms_scale, float eps) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= size) return;
    const float g = grad[i] * grad_scale + weight_decay * param[i];
    m[i] = beta1 * m[i] + new1 * g;
    v[i] = beta2 * v[i] + new2 * g * g;
    param[i] -= step_size * m[i] / (sqrtf(v[i]) * rms_scale + eps);
}

// See reference.sgd_update.   Grid: a thread for each parameter.   Bytes: 5 of param, 3 without momentum
__global__ void sgd(float* param, const float* grad, float* velocity, long long size, float grad_scale, float lr,
                    float momentum, bool nesterov, float weight_decay) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= size) return;
    float g = grad[i] * grad_scale + weight_decay * param[i];
    if (velocity) {
        const float moved = momentum * velocity[i] + g;
        velocity[i] = moved;
        g = nesterov ? g + momentum * moved : moved;
    }
    param[i] -= lr * g;
}

// average = decay average + (1 - decay) weights.   Grid: a thread for each parameter.   Bytes: 3 of weights
__global__ void average(float* average, const float* weights, long long size, float decay, float share) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < size) average[i] = decay * average[i] + share * weights[i];
}
