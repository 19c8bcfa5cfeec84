// A row whose teacher names some classes, with the log-probability of each. What these leave to 1
// is that of all other classes together.
//
// (a) The teacher is a distribution over count + 1 bins: the named classes, and all others as one.
//     The student's is that of its scores of them, and of the log-sum-exp of all others as the
//     score of the last bin. So the divergence and its gradient by these scores are those of any
//     two distributions; that of the last bin goes on to its classes by their softmax.
// (b) The log-sum-exp of the others leaves the named classes out, by a bitmap of all classes in
//     shared memory. Subtracted from the whole row's it would have no digits where they hold nearly
//     all of it.
// (c) The scores of the named classes are kept in shared memory too: when the last pass writes
//     their gradients, a gradient in place has overwritten the logits.

#pragma once

#include "common/cluster.cuh"
#include "kl/row.cuh"

namespace neglog {
namespace {

// Log-probabilities in 16 bits may sum to somewhat more than 1.
constexpr double kLargestMass = 1.05;

// A word more than the classes fill is read with the last of them.
__host__ __device__ inline int64_t bitmap_words(int64_t vocab) { return vocab / 32 + 2; }

// Shared memory of a block.
template <class T>
int64_t named_bytes(int64_t vocab, int64_t count) {
    return 2 * count * int64_t(sizeof(T)) + bitmap_words(vocab) * int64_t(sizeof(uint32_t));
}

template <class S>
class NamedRow {
    using T = compute_t<S>;

    const Problem<S>& p;
    const int64_t row;
    // In shared memory
    T* score;          // (count), without the temperature
    T* log_q;          // (count), -inf for an id that names none
    uint32_t* bitmap;  // of the classes that are named
    // The scores of the bins are less `shift`, their largest: that of the others is two numbers, and
    // near 1e4 one of them alone would be off by 5e-4.
    T shift = 0, others_score = 0, others_log_q = 0;
    Lse<T> of_others = {0, 0};
    LogSums<T> sums;

    __device__ int64_t id(int64_t k) const { return p.ids[row * p.ids_stride + k]; }

    // Its lowest n bits are those of the n columns from `column` on.
    template <int n>
    __device__ uint32_t named_among(int64_t column) const {
        const uint32_t* const words = bitmap + column / 32;
        return uint32_t((uint64_t(words[1]) << 32 | words[0]) >> (column % 32));
    }

    // A thread reads the same k here and wherever scores and log_q are used.
    __device__ void read_named() {
        // Every thread has left the last row's bitmap: it was behind a barrier since.
        for (int64_t i = threadIdx.x; i < bitmap_words(p.vocab); i += blockDim.x) bitmap[i] = 0;
        __syncthreads();
        double mass = 0, count = 0, largest = -INFINITY;
        for (int64_t k = threadIdx.x; k < p.count; k += blockDim.x) {
            T log[1];
            teacher_numbers(p, row, k, log);
            log_q[k] = log[0];
            if (log[0] == -INFINITY) continue;
            const int64_t column = id(k);
            assert(column >= 0 && column < p.vocab);
            const uint32_t bit = uint32_t(1) << (column % 32);
            const uint32_t before = atomicOr(bitmap + column / 32, bit);
            assert((before & bit) == 0);  // no class is named twice
            score[k] = score_at(p, row, column);
            largest = fmax(largest, double(rounded_product(score[k], p.inverse_temperature)));
            mass += exp(double(log[0]));
            count += 1;
        }
        shift = T(block_reduce(largest, Maximum{}));
        mass = block_sum(mass);  // behind these barriers the bitmap is complete
        count = block_sum(count);
        assert(!(mass > kLargestMass));
        const bool has_others = count < double(p.vocab);  // else what is left is the sum's rounding
        const double left = has_others ? 1 - mass : 0;
        others_log_q = T(log(left < 0 ? 0 : left));
    }

    // Calls visit(k, z, log_q) for each bin of this thread: its score and the teacher's
    // log-probability. The others' k is count.
    template <class Visit>
    __device__ void for_each_bin(Visit visit) const {
        for (int64_t k = threadIdx.x; k < p.count; k += blockDim.x)
            if (log_q[k] != -INFINITY)
                visit(k, rounded_product(score[k], p.inverse_temperature) - shift, log_q[k]);
        if (threadIdx.x == 0) visit(p.count, others_score, others_log_q);
    }

    __device__ void find_bins() {
        const T high = of_others.high, largest = fmax(shift, high);
        shift = isfinite(largest) ? largest : T(0);
        others_score = isfinite(high) ? (high - shift) + of_others.low : high;
        RunningSoftmax<T> bins;
        for_each_bin([&](int64_t, T z, T) {
            const T one[1] = {z};
            bins.add(one);
        });
        sums = log_sums(block_log_sum(bins.state()), Lse<T>{0, 0});
    }

    __device__ T gradient_of_bin(T z, T log_q, const Divergence& d, T scale) const {
        const T one[1] = {z}, of_teacher[1] = {log_q};
        T gradient[1] = {0};
        if (scale != 0) p.measure.gradient(sums, one, of_teacher, d, scale, gradient);
        return gradient[0];
    }

public:
    __device__ NamedRow(const Problem<S>& problem, int64_t row) : p(problem), row(row) {
        NEGLOG_DYNAMIC_SHARED(shared);
        score = reinterpret_cast<T*>(shared);
        log_q = score + p.count;
        bitmap = reinterpret_cast<uint32_t*>(log_q + p.count);
    }

    __device__ Lse<T> find_sums() {
        read_named();
        const auto student = student_sums(p, row, [&]<int n>(int64_t column, T(&z)[n]) {
            const uint32_t named = named_among<n>(column);
#pragma unroll
            for (int i = 0; i < n; ++i)
                if (named >> i & 1) z[i] = -INFINITY;
        });
        of_others = student.soft;
        find_bins();
        return student.hard;
    }

    __device__ Divergence divergence() const {
        DivergenceSums of_thread = {0, 0};
        for_each_bin([&](int64_t, T z, T log_q) {
            const T one[1] = {z}, of_teacher[1] = {log_q};
            p.measure.add(sums, one, of_teacher, of_thread);
        });
        return p.measure.divergence(of_thread);
    }

    // First all columns, as if the named ones had no divergence, then these.
    __device__ void write_gradient(const Divergence& d, const Factors<T>& f, S* out) const {
        const T of_last = gradient_of_bin(others_score, others_log_q, d, f.soft_scale);
        // Else the others are all impossible, or one is certain.
        const bool have_softmax = fabs(of_others.high) != INFINITY;
        write_row_gradient(
            p, row, f, out, [&]<int n>(int64_t column, const T(&z)[n], T(&gradient)[n]) {
                const uint32_t named = have_softmax ? named_among<n>(column) : ~uint32_t(0);
#pragma unroll
                for (int i = 0; i < n; ++i) {
                    const T softmax = exp(log_probability(z[i], of_others));
                    gradient[i] = named >> i & 1 ? T(0) : of_last * softmax;
                }
            });
        __syncthreads();  // what a vector's thread wrote to a named column is overwritten
        for_each_bin([&](int64_t k, T bin_score, T log_q) {
            if (k == p.count) return;
            const T z[1] = {score[k]};
            T gradient[1] = {gradient_of_bin(bin_score, log_q, d, f.soft_scale)};
            to_gradient(p, f, id(k), z, gradient);
            narrow(gradient[0], out[id(k)]);
        });
    }
};

}  // namespace
}  // namespace neglog
