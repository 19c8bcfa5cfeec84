// What the kernels of kl are asked: a student's logits, a teacher, and how they are compared.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neglog {

// The teacher is scores (rows, vocab) or, with `probabilities`, probabilities. With `ids` (rows,
// count) it is the log-probabilities (rows, count) of these classes, at the temperature of the
// comparison; what is left to 1 is spread over the others.
struct KlProblem {
    int dtype, teacher_dtype;
    ptrdiff_t rows, vocab;
    const char* logits;
    ptrdiff_t logits_stride;
    const char* teacher;
    ptrdiff_t teacher_stride;
    bool probabilities;
    const int64_t* ids;
    ptrdiff_t count;
    const int64_t* target;
    const void* token_weight;
    int64_t ignore_index;
    double beta, temperature, soft_weight, hard_weight, logit_scale, softcap;
    double teacher_scale, teacher_softcap;  // the first with the temperature in it
};

// Each may be null. `invalid` becomes a row whose ids or log-probabilities are none.
struct KlOutput {
    void* loss;
    void* divergence;
    void* cross_entropy;
    int64_t* invalid;
};

// The upstream of row r's loss is grad[r * grad_stride] * grad_scale; without grad, grad_scale.
struct KlGradient {
    char* out;
    ptrdiff_t stride;
    bool bypass_cache;  // it is larger than any cache, and does not lie over the logits
    const void* grad;
    ptrdiff_t grad_stride;
    double grad_scale;
};

}  // namespace neglog
