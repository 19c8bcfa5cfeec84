// What the kernels of nll are asked: the rows, their targets and options, and where results go.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neglog {

// Strides of an array (batch, class, position), in numbers; that of the batch stands beside it.
struct Axes {
    ptrdiff_t of_class, position;
};

// Row r is position r % positions of batch r / positions. Rows (N, V) have one position each.
struct Problem {
    int dtype;
    ptrdiff_t rows, vocab, positions;
    const char* logits;
    ptrdiff_t logits_stride;
    Axes logits_axes;
    const int64_t* target;
    const char* probs;
    ptrdiff_t probs_stride;
    Axes probs_axes;
    const void* weight;        // of classes
    const void* token_weight;  // of rows
    int64_t ignore_index;
    double label_smoothing, logit_scale, softcap, z_loss;
    double weight_sum;  // over the vocabulary; the vocabulary's size without weights
    int itemsize;
};

struct Output {
    void* loss;
    void* lse;
    void* lse_low;
    uint8_t* correct;
    void* entropy;
    int64_t* argmax;
};

struct Gradient {
    char* out;
    ptrdiff_t stride;
    Axes axes;
    bool bypass_cache;  // it is larger than any cache, and does not lie over the logits
};

// The upstream of a backward: of row r's loss grad[r * grad_stride] * grad_scale, of its lse
// grad_lse[r], and of its entropy, which is entropy[r], grad_entropy[r]; 0 without.
struct Upstream {
    const void* lse;
    const void* lse_low;
    const void* grad;
    ptrdiff_t grad_stride;
    double grad_scale;
    const void* grad_lse;
    const void* grad_entropy;
    const void* entropy;
};

}  // namespace neglog
