// The sums of block.hpp and block_pairs.hpp, for ctypes: tests/kernels/test_block.py.

#include "block_pairs.hpp"

using namespace neglog;

extern "C" {
double exp_sum(const float* z, ptrdiff_t n, float lse, float*) {
    return block_exp_sum(z, n, lse, ahead_of(z));
}

double log_probability_sum(const float* z, ptrdiff_t n, float lse, float*) {
    return block_log_probability_sum(z, n, Lse<float>{lse, 0});
}

double log_probability_dot(const float* z, ptrdiff_t n, float lse, float* coefficient) {
    return block_log_probability_dot(z, coefficient, n, Lse<float>{lse, 0});
}

double negative_entropy(const float* z, ptrdiff_t n, float lse, float*) {
    return block_negative_entropy(z, n, Lse<float>{lse, 0});
}

double exp_sum_of_row(const float* z, ptrdiff_t n, float, float* column_sum) {
    return block_exp_sum_of_row_and_columns(z, n, column_sum);
}

double softplus_sum(const float* z, ptrdiff_t n, float, float* out) {
    return block_softplus(z, n, 1.0f, out);
}
}
