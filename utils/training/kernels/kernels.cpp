// Training kernels for maps that lie in memory as rows of channels (channels last): batch norm with
// ReLU6 after it, and the 3x3 depthwise convolution, forward and backward, in float32 or bfloat16.
//
// These operations do little arithmetic for each number that they read, so what counts is how often a
// map goes through memory: each function below reads its inputs once and writes its output once. All
// arithmetic is in float32, whatever the maps are stored in.
//
// Built and called by utils/training/kernels/build.py. Everything is in the plain vector types of GCC and
// Clang, which become the instructions of the CPU that it is compiled on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <omp.h>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 16;       // the number of channels is a multiple of it
constexpr long BLOCK = 1 << 14;  // bytes of a map that are summed up in float32 before they go into a double
constexpr int TAPS = 9;
constexpr float RELU6_HIGH = 6;

typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

struct bfloat16 {
    uint16_t bits;
};

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// What GCC 12 makes of __builtin_convertvector for 512 bits is several instructions where there is one.
#ifdef __AVX512F__
inline Bits widen(Halves halves) { return (Bits)_mm512_cvtepu16_epi32((__m256i)halves); }
inline Halves narrow(Bits bits) { return (Halves)_mm512_cvtepi32_epi16((__m512i)bits); }
#else
inline Bits widen(Halves halves) { return __builtin_convertvector(halves, Bits); }
inline Halves narrow(Bits bits) { return __builtin_convertvector(bits, Halves); }
#endif

inline Vector load(const bfloat16* from) {
    return (Vector)(widen(*reinterpret_cast<const Halves*>(from)) << 16);
}

inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

inline void store(bfloat16* to, Vector value) {
    Bits bits = (Bits)value;
    bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    *reinterpret_cast<Halves*>(to) = narrow(bits >> 16);
}

inline Vector splat(float value) { return Vector{} + value; }

// The comparisons are such that NaN comes through: a training that diverges must show.
inline Vector relu6(Vector z) {
    const Vector low = z < 0.0f ? Vector{} : z;
    return low > RELU6_HIGH ? splat(RELU6_HIGH) : low;
}

inline Vector relu6_gradient(Vector z, Vector gradient) {
    const Mask inside = (z > 0.0f) & (z < RELU6_HIGH);
    return inside ? gradient : Vector{};
}

// Sums of each thread, added up in the order of the threads, so that a run can be repeated to the bit.
class ThreadSums {
  public:
    explicit ThreadSums(long size) : size(size), sums(size * omp_get_max_threads()) {}
    double* own() { return &sums[size * omp_get_thread_num()]; }
    double total(long at) const {
        double total = 0;
        for (long i = at; i < long(sums.size()); i += size) total += sums[i];
        return total;
    }

  private:
    const long size;
    std::vector<double> sums;
};

// Adds up two sums for each channel. `add` adds some rows, which begin at the given places, to the sums of
// the channels from c on. Sums of a block of rows are float32, those of all are double.
template <typename T, typename Add>
void sum_in_blocks(long rows, long channels, double* totals, Add add) {
    constexpr int AT_ONCE = 4;  // rows for each time that sums are read and written
    const long step = std::max(1L, BLOCK / (channels * long(sizeof(T)))) * AT_ONCE;
    ThreadSums of_threads(2 * channels);
#pragma omp parallel
    {
        std::vector<float> sums(2 * channels);
        double* own = of_threads.own();
#pragma omp for schedule(static)
        for (long first = 0; first < rows; first += step) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            const long last = std::min(rows, first + step);
            const auto add_rows = [&]<int COUNT>(long row) {
                long places[COUNT];
                for (int i = 0; i < COUNT; i++) places[i] = (row + i) * channels;
                for (long c = 0; c < channels; c += LANES) {
                    Vector one = load(&sums[c]), other = load(&sums[channels + c]);
                    add(places, COUNT, c, one, other);
                    store(&sums[c], one);
                    store(&sums[channels + c], other);
                }
            };
            long row = first;
            for (; row + AT_ONCE <= last; row += AT_ONCE) add_rows.template operator()<AT_ONCE>(row);
            for (; row < last; row++) add_rows.template operator()<1>(row);
            for (long c = 0; c < 2 * channels; c++) own[c] += sums[c];
        }
    }
    for (long c = 0; c < 2 * channels; c++) totals[c] = of_threads.total(c);
}

// A row of the maps may hold several pixels; their sums, (2, row), go into those of the first.
void fold(double* sums, long row, long channels) {
    for (long c = channels; c < row; c++)
        for (long which = 0; which < 2; which++) sums[which * row + c % channels] += sums[which * row + c];
    std::copy(sums + row, sums + row + channels, sums + channels);
}

// sums: (2, channels) of x minus the running mean, which is near its own, and of the square.
template <typename T>
void batch_norm_sums(const T* x, const float* running_mean, long rows, long row, long channels, double* sums) {
    std::vector<float> center(row);
    for (long at = 0; at < row; at++) center[at] = running_mean[at % channels];
    sum_in_blocks<T>(rows, row, sums, [&](const long* places, int count, long c, Vector& sum, Vector& squares) {
        for (int i = 0; i < count; i++) {
            const Vector value = load(x + places[i] + c) - load(&center[c]);
            sum += value;
            squares += value * value;
        }
    });
    fold(sums, row, channels);
}

// y = x * scale + shift, then ReLU6 if there is one.
template <bool HAS_RELU6, typename T>
void batch_norm_forward(const T* x, const float* parameters, long rows, long channels, T* y) {
    const float *scale = parameters + 2 * channels, *shift = parameters + 3 * channels;
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long c = 0; c < channels; c += LANES) {
            const Vector z = load(x + row * channels + c) * load(scale + c) + load(shift + c);
            store(y + row * channels + c, HAS_RELU6 ? relu6(z) : z);
        }
    }
}

// sums: (2, channels) of the gradient before the ReLU6, and of it times (x - mean).
template <bool HAS_RELU6, typename T>
void batch_norm_backward_sums(const T* grad_y, const T* x, const float* parameters, long rows, long row,
                              long channels, double* sums) {
    const float *mean = parameters, *scale = parameters + 2 * row, *shift = parameters + 3 * row;
    sum_in_blocks<T>(rows, row, sums, [=](const long* places, int count, long c, Vector& sum, Vector& products) {
        const Vector a = load(scale + c), b = load(shift + c), middle = load(mean + c);
        for (int i = 0; i < count; i++) {
            const Vector value = load(x + places[i] + c);
            Vector gradient = load(grad_y + places[i] + c);
            if (HAS_RELU6) gradient = relu6_gradient(value * a + b, gradient);
            sum += gradient;
            products += gradient * (value - middle);
        }
    });
    fold(sums, row, channels);
}

// grad_x = gradient before the ReLU6 * scale + x * of_x + constant.
template <bool HAS_RELU6, typename T>
void batch_norm_backward(const T* grad_y, const T* x, const float* parameters, const float* of_sums, long rows,
                         long channels, T* grad_x) {
    const float *scale = parameters + 2 * channels, *shift = parameters + 3 * channels;
    const float *of_x = of_sums, *constant = of_sums + channels;
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        for (long c = 0; c < channels; c += LANES) {
            const Vector value = load(x + row * channels + c), a = load(scale + c);
            Vector gradient = load(grad_y + row * channels + c);
            if (HAS_RELU6) gradient = relu6_gradient(value * a + load(shift + c), gradient);
            store(grad_x + row * channels + c, gradient * a + value * load(of_x + c) + load(constant + c));
        }
    }
}

struct Map {
    long images, height, width, channels;
};

// Rows before the first and after the last are zeros.
template <typename T>
const T* row_of(const T* x, const T* zeros, const Map& map, long image, long y) {
    return y < 0 || y >= map.height ? zeros : x + (image * map.height + y) * map.width * map.channels;
}

// Channels are walked one vector at a time along a row, which no hardware foresees.
template <typename T>
void prefetch_row(const T* row, const Map& map) {
    const char* bytes = reinterpret_cast<const char*>(row);
    const long size = map.width * map.channels * long(sizeof(T));
    for (long at = 0; at < size; at += 64) __builtin_prefetch(bytes + at);
}

// Calls at<FIRST, LAST>(column) for the columns of an output row; FIRST to LAST are those of the three
// columns of taps that lie in the map. As constants they let the compiler unroll what is in `at`.
template <int STRIDE, typename At>
inline void for_each_column(long width, At at) {
    const long out_width = (width - 1) / STRIDE + 1;
    const long inner = std::max(1L, (width - 2) / STRIDE + 1);  // from here on the third is outside
    if (width < 2)
        at.template operator()<1, 1>(0);
    else
        at.template operator()<1, 2>(0);
    for (long column = 1; column < std::min(inner, out_width); column++) at.template operator()<0, 2>(column);
    if (inner < out_width) at.template operator()<0, 1>(inner);
}

// weight: (9, channels), a tap at a time.
template <int STRIDE, typename T>
void depthwise_forward(const T* x, const float* weight, const Map map, T* y) {
    const long out_height = (map.height - 1) / STRIDE + 1, out_width = (map.width - 1) / STRIDE + 1;
    const long channels = map.channels;
    const std::vector<T> zeros(map.width * channels);
#pragma omp parallel for schedule(static)
    for (long out_row = 0; out_row < map.images * out_height; out_row++) {
        const long image = out_row / out_height, top = out_row % out_height * STRIDE - 1;
        const T* rows[3];
        for (int k = 0; k < 3; k++) rows[k] = row_of(x, zeros.data(), map, image, top + k);
        for (int k = 0; k < STRIDE; k++) prefetch_row(row_of(x, zeros.data(), map, image, top + 3 + k), map);
        for_each_column<STRIDE>(map.width, [&]<int FIRST, int LAST>(long column) {
            for (long c = 0; c < channels; c += LANES) {
                Vector sum{};
                for (int k = 0; k < 3; k++) {
                    const T* at = rows[k] + (column * STRIDE - 1) * channels + c;
                    for (int t = FIRST; t <= LAST; t++)
                        sum += load(at + t * channels) * load(weight + (3 * k + t) * channels + c);
                }
                store(y + (out_row * out_width + column) * channels + c, sum);
            }
        });
    }
}

// The gradient of the input at stride 2, where a place was seen by one, two or four outputs.
template <typename T>
void depthwise_backward_input_stride2(const T* grad_y, const float* weight, const Map map, T* grad_x) {
    const long out_height = (map.height - 1) / 2 + 1, out_width = (map.width - 1) / 2 + 1;
    const long channels = map.channels;
    struct Seen {
        long at;
        int tap;
    };
    // Output o sees 2 * o - 1, 2 * o and 2 * o + 1.
    const auto seen_by = [](long place, long size, Seen* seen) {
        int count = 0;
        if (place % 2 == 0) seen[count++] = {place / 2, 1};
        if (place % 2) seen[count++] = {place / 2, 2};
        if (place % 2 && (place + 1) / 2 < size) seen[count++] = {(place + 1) / 2, 0};
        return count;
    };
#pragma omp parallel for schedule(static)
    for (long row = 0; row < map.images * map.height; row++) {
        const long image = row / map.height;
        Seen rows[2], columns[2];
        const int row_count = seen_by(row % map.height, out_height, rows);
        for (long column = 0; column < map.width; column++) {
            const int column_count = seen_by(column, out_width, columns);
            for (long c = 0; c < channels; c += LANES) {
                Vector sum{};
                for (int i = 0; i < row_count; i++) {
                    const T* from = grad_y + (image * out_height + rows[i].at) * out_width * channels + c;
                    for (int j = 0; j < column_count; j++) {
                        const int tap = 3 * rows[i].tap + columns[j].tap;
                        sum += load(from + columns[j].at * channels) * load(weight + tap * channels + c);
                    }
                }
                store(grad_x + (row * map.width + column) * channels + c, sum);
            }
        }
    }
}

// grad_weight: (9, channels).
template <int STRIDE, typename T>
void depthwise_backward_weight(const T* grad_y, const T* x, const Map map, float* grad_weight) {
    const long out_height = (map.height - 1) / STRIDE + 1, out_width = (map.width - 1) / STRIDE + 1;
    const long channels = map.channels;
    const std::vector<T> zeros(map.width * channels);
    const long band = std::max(1L, 32 / out_width);  // rows for each time that sums are read and written
    ThreadSums of_threads(TAPS * channels);
#pragma omp parallel
    {
        double* own = of_threads.own();
        std::vector<float> sums(TAPS * channels);
#pragma omp for schedule(static)
        for (long image = 0; image < map.images; image++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (long first = 0; first < out_height; first += band) {
                const long last = std::min(out_height, first + band);
                for (long row = last * STRIDE + 1; row < (last + band) * STRIDE + 1; row++)
                    prefetch_row(row_of(x, zeros.data(), map, image, row), map);
                for (long c = 0; c < channels; c += LANES) {
                    Vector of_taps[TAPS];
                    for (int t = 0; t < TAPS; t++) of_taps[t] = load(&sums[t * channels + c]);
                    for (long out_row = first; out_row < last; out_row++) {
                        const T* gradients = grad_y + (image * out_height + out_row) * out_width * channels + c;
                        const T* rows[3];
                        for (int k = 0; k < 3; k++)
                            rows[k] = row_of(x, zeros.data(), map, image, out_row * STRIDE - 1 + k);
                        for_each_column<STRIDE>(map.width, [&]<int FIRST, int LAST>(long column) {
                            const Vector gradient = load(gradients + column * channels);
                            for (int k = 0; k < 3; k++) {
                                const T* at = rows[k] + (column * STRIDE - 1) * channels + c;
                                for (int t = FIRST; t <= LAST; t++)
                                    of_taps[3 * k + t] += load(at + t * channels) * gradient;
                            }
                        });
                    }
                    for (int t = 0; t < TAPS; t++) store(&sums[t * channels + c], of_taps[t]);
                }
            }
            for (long i = 0; i < TAPS * channels; i++) own[i] += sums[i];
        }
    }
    for (long i = 0; i < TAPS * channels; i++) grad_weight[i] = float(of_threads.total(i));
}

}  // namespace

// From sums over `count` pixels to what batch_norm_forward and its gradient take: out is (4, row), the mean,
// the inverse of the standard deviation, scale and shift. The running statistics follow.
extern "C" void batch_norm_parameters_float32(const double* sums, long count, const float* weight,
                                              const float* bias, double eps, double momentum, long row,
                                              long channels, float* running_mean, float* running_var,
                                              float* out) {
    for (long c = 0; c < channels; c++) {
        const double offset = sums[c] / double(count);
        const double difference = sums[channels + c] / double(count) - offset * offset;
        const double variance = difference < 0 ? 0 : difference;  // NaN stays NaN
        const double inverse = 1 / std::sqrt(variance + eps), mean = running_mean[c] + offset;
        const double scale = weight[c] * inverse;
        const double values[] = {mean, inverse, scale, bias[c] - mean * scale};
        for (long which = 0; which < 4; which++)
            for (long at = c; at < row; at += channels) out[which * row + at] = float(values[which]);
        running_mean[c] = float(running_mean[c] + momentum * offset);
        running_var[c] = float(running_var[c] + momentum * (variance * double(count) / double(count - 1) - running_var[c]));
    }
}

// From sums over `count` pixels to what batch_norm_backward takes: out is (2, row), of_x and constant.
extern "C" void batch_norm_backward_parameters_float32(const double* sums, long count, const float* parameters,
                                                       long row, long channels, float* out) {
    for (long c = 0; c < channels; c++) {
        const double mean = parameters[c], inverse = parameters[row + c], scale = parameters[2 * row + c];
        const double of_x = -scale * inverse * inverse * sums[channels + c] / double(count);
        const double constant = -scale * sums[c] / double(count) - of_x * mean;
        for (long at = c; at < row; at += channels) {
            out[at] = float(of_x);
            out[row + at] = float(constant);
        }
    }
}

// The C interface, once for each type of the maps.
#define INTERFACE(TYPE, NAME)                                                                                   \
    extern "C" void batch_norm_sums_##NAME(const TYPE* x, const float* running_mean, long rows, long row,       \
                                           long channels, double* sums) {                                       \
        batch_norm_sums(x, running_mean, rows, row, channels, sums);                                            \
    }                                                                                                           \
    extern "C" void batch_norm_forward_##NAME(const TYPE* x, const float* parameters, long rows, long row,      \
                                              long has_relu6, TYPE* y) {                                        \
        (has_relu6 ? batch_norm_forward<true, TYPE> : batch_norm_forward<false, TYPE>)(x, parameters, rows,     \
                                                                                       row, y);                 \
    }                                                                                                           \
    extern "C" void batch_norm_backward_sums_##NAME(const TYPE* grad_y, const TYPE* x, const float* parameters, \
                                                    long rows, long row, long channels, long has_relu6,         \
                                                    double* sums) {                                             \
        (has_relu6 ? batch_norm_backward_sums<true, TYPE> : batch_norm_backward_sums<false, TYPE>)(             \
            grad_y, x, parameters, rows, row, channels, sums);                                                  \
    }                                                                                                           \
    extern "C" void batch_norm_backward_##NAME(const TYPE* grad_y, const TYPE* x, const float* parameters,      \
                                               const float* of_sums, long rows, long row, long has_relu6,       \
                                               TYPE* grad_x) {                                                  \
        (has_relu6 ? batch_norm_backward<true, TYPE> : batch_norm_backward<false, TYPE>)(                       \
            grad_y, x, parameters, of_sums, rows, row, grad_x);                                                 \
    }                                                                                                           \
    extern "C" void depthwise_forward_##NAME(const TYPE* x, const float* weight, long images, long height,      \
                                             long width, long channels, long stride, TYPE* y) {                  \
        (stride == 1 ? depthwise_forward<1, TYPE> : depthwise_forward<2, TYPE>)(                                \
            x, weight, {images, height, width, channels}, y);                                                   \
    }                                                                                                           \
    extern "C" void depthwise_backward_input_stride2_##NAME(const TYPE* grad_y, const float* weight,            \
                                                            long images, long height, long width,               \
                                                            long channels, TYPE* grad_x) {                      \
        depthwise_backward_input_stride2(grad_y, weight, {images, height, width, channels}, grad_x);            \
    }                                                                                                           \
    extern "C" void depthwise_backward_weight_##NAME(const TYPE* grad_y, const TYPE* x, long images,            \
                                                     long height, long width, long channels, long stride,       \
                                                     float* grad_weight) {                                      \
        (stride == 1 ? depthwise_backward_weight<1, TYPE> : depthwise_backward_weight<2, TYPE>)(                \
            grad_y, x, {images, height, width, channels}, grad_weight);                                         \
    }

INTERFACE(float, float32)
INTERFACE(bfloat16, bfloat16)
