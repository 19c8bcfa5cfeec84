// nll with one row a lane: for rows of few classes, and a class axis that is not the last.
//
// nll.pyx takes a row at a time, its classes as lanes. That is slow for a row of few classes, whose
// fixed costs are more than its exps, and for a class axis with a stride. Here a group of 64 rows
// (32 of doubles) is copied to a stage in L1 or L2, as lines: line c has class c of each row of the
// group. Every loop is then over the lanes of a line. Formulas and notes of nll.pyx hold here.
//
// (a) All loops run over all lanes, so that a row has the same instructions wherever it lies in a
//     group. A lane that no row fills is of an ignored row of zeros, which is not written.
// (b) Numbers are moved once from memory to the stage and once back, whatever their strides. Lines
//     that were read in memory for each pass evicted one another: at 128 x 128 positions all lines
//     lie in the same sets of a cache.
// (c) More than 256 classes take several stages, and the online rule of block.hpp joins them.
// (d) A float sum of 1 and small terms loses their digits, and with them 1 - p of a confident
//     target. So exps that are 1 are counted, the others added by sixteens, and these in double.
// (e) A gradient of up to 256 classes is a multiple of e^(z - maximum), which the forward has formed,
//     not of e^(z - lse): both in one pass form each exp once.
#pragma once

#include "group_memory.hpp"

namespace neglog {

template <class T>
struct Group {
    static constexpr int lanes = GroupMemory<T>::lanes;
    static constexpr ptrdiff_t stage_lines = 256;
    using Reals = Line<T, lanes>;
    using Doubles = Line<double, lanes>;
    using Flags = Line<int, lanes>;

    const Problem& p;
    const GroupMemory<T> memory;
    const Strides logits_strides, probs_strides;
    ptrdiff_t stage_classes;        // others of the lines hold probabilities, and slopes of a cap
    bool staged = false;            // the stage has the scores of all classes
    bool keeps_exps = false;        // the forward has put e^(z - maximum) in their place
    int counted = 0;                // rows that are not ignored
    Line<int64_t, lanes> target;    // -1 without one, or ignored
    Flags ignored;
    Doubles class_weight;           // of the target; 0 if ignored
    Reals token_weight;
    Reals target_score, maximum, high, low, loss;
    Doubles sum;
    Doubles target_weight, softmax_weight, uniform_weight;  // as GradientWeights has them
    Doubles entropy_weight, entropy;
    bool through_entropy = false;         // it has an upstream
    Reals shift, scale, target_gradient;  // a gradient is scale * e^(z - shift)
    // With an upstream of the entropy, (scale + slope * (z - high + offset)) e^(z - shift)
    Reals entropy_slope, entropy_offset;
    Reals stage[stage_lines];

    Group(const Problem& problem, ptrdiff_t group)
        : p(problem),
          memory(problem, group),
          logits_strides{p.logits_stride, p.logits_axes.of_class, p.logits_axes.position},
          probs_strides{p.probs_stride, p.probs_axes.of_class, p.probs_axes.position} {
        stage_classes = stage_lines / (1 + (p.probs != nullptr) + (p.softcap != 0));
        find_targets();
    }

    void find_targets() {
        Line<int64_t, lanes> given;
        const int64_t none = p.ignore_index;
        for (int i = 0; i < lanes; ++i) given[i] = none;
        if (p.target != nullptr)
            std::memcpy(&given, p.target + memory.first, memory.count * sizeof(int64_t));
        for (int i = 0; i < lanes; ++i) token_weight[i] = p.token_weight == nullptr ? 1 : 0;
        if (p.token_weight != nullptr) read(p.token_weight, token_weight);
        const bool probs = p.probs != nullptr;
        for (int i = 0; i < lanes; ++i) {
            ignored[i] = (!probs && given[i] == none) || token_weight[i] == 0;
            target[i] = probs || ignored[i] ? -1 : given[i];
            class_weight[i] = ignored[i] ? 0 : 1;
            counted += !ignored[i];
        }
        if (p.weight == nullptr || probs) return;
        for (int i = 0; i < lanes; ++i)
            if (!ignored[i]) class_weight[i] = weight_of(target[i]);
    }

    T weight_of(ptrdiff_t c) const {
        return p.weight == nullptr ? T(1) : static_cast<const T*>(p.weight)[c];
    }

    // The stage

    template <class Visit>
    void for_stages(Visit visit) {
        for (ptrdiff_t c = 0; c < p.vocab; c += stage_classes)
            visit(Classes{c, std::min(stage_classes, p.vocab - c)});
    }

    void load_scores(Classes classes) {
        if (staged) return;
        memory.load(p.logits, logits_strides, classes, stage);
        for (ptrdiff_t c = 0; c < classes.count; ++c) to_scores(stage[c]);
        staged = one_stage();
    }

    bool one_stage() const { return p.vocab <= stage_classes; }

    void to_scores(Reals& z) const {
        if (p.logit_scale != 1) scale_line(z, T(p.logit_scale));
        if (p.softcap == 0) return;
        const T softcap = T(p.softcap);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) z[i] = softcap * tanh_any(z[i] / softcap);
    }

    static void scale_line(Reals& line, T factor) {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) line[i] *= factor;
    }

    // The weights w_c q'_c of the log-probabilities, for a target of probabilities.
    const Reals* load_coefficients(Classes classes) {
        Reals* lines = stage + stage_lines - stage_classes;
        memory.load(p.probs, probs_strides, classes, lines);
        const T kept = T(1 - p.label_smoothing), uniform = T(p.label_smoothing / p.vocab);
        for (ptrdiff_t c = 0; c < classes.count; ++c) {
            Reals& q = lines[c];
            if (p.label_smoothing != 0) {
#pragma omp simd
                for (int i = 0; i < lanes; ++i) q[i] = q[i] * kept + uniform;
            }
            if (p.weight != nullptr) scale_line(q, weight_of(classes.start + c));
        }
        return lines;
    }

    // Forward

    void find_lse() {
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            maximum[i] = -std::numeric_limits<T>::infinity();
            sum[i] = 0;
        }
        for_stages([&](Classes classes) {
            load_scores(classes);
            add_to_sum(classes);
        });
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            const double shift = maximum[i], log_sum = log_of_sum(sum[i]);
            const double total = shift + log_sum, back = total - shift;
            const double lost = (shift - (total - back)) + (log_sum - back);  // Knuth's two-sum
            high[i] = T(total);
            low[i] = T((total - high[i]) + lost);
        }
    }

    void add_to_sum(Classes classes) {
        for (int i = 0; i < lanes; i += kWidth<T>) {
            const Lanes<T> before = lanes_at(maximum, i);
            const Lanes<T> shift = add_to_maximum(classes, i);
            const InDouble total = keeps_exps ? sum_of_exps<true>(classes, i, shift)
                                              : sum_of_exps<false>(classes, i, shift);
            add_to_sum(i, InDouble(exp_nonpositive(before - shift)), total);
        }
    }

    // Returns what exps are shifted by.
    Lanes<T> add_to_maximum(Classes classes, int i) {
        Lanes<T> largest = lanes_at(maximum, i);
        for (ptrdiff_t c = 0; c < classes.count; ++c)
            largest = larger(lanes_at(stage[c], i), largest);
        set_lanes(maximum, i, largest);
        return shift_of(largest);
    }

    static Lanes<T> shift_of(Lanes<T> largest) {
        constexpr T lowest = -std::numeric_limits<T>::infinity();
        return largest == lowest ? Lanes<T>{} : largest;
    }

    template <bool keep>
    InDouble sum_of_exps(Classes classes, int i, Lanes<T> shift) {
        const Lanes<T> zero{}, one = zero + T(1);
        InDouble total{zero};
        Lanes<T> ones = zero;
        for (ptrdiff_t c = 0; c < classes.count;) {
            const ptrdiff_t end = std::min<ptrdiff_t>(c + 16, classes.count);
            Lanes<T> others = zero;
            for (; c < end; ++c) {
                const Lanes<T> e = exp_nonpositive(lanes_at(stage[c], i) - shift);
                if (keep) set_lanes(stage[c], i, e);
                ones += e == one ? one : zero;
                others += e == one ? zero : e;  // also NaN
            }
            total += InDouble(others);
        }
        total += InDouble(ones);
        return total;
    }

    void add_to_sum(int i, InDouble kept, InDouble total) {
        set_lanes(sum, i, lanes_at(sum, i) * kept.first + total.first);
        if constexpr (sizeof(T) == 4) {
            i += kWidth<double>;
            set_lanes(sum, i, lanes_at(sum, i) * kept.second + total.second);
        }
    }

    void find_target_scores() {
        if (one_stage()) {
            load_scores(Classes{0, p.vocab});
            for (int i = 0; i < lanes; ++i) {
                const ptrdiff_t c = target[i] < 0 ? 0 : target[i];
                target_score[i] = stage[c][i];
            }
            return;
        }
        for (int i = 0; i < lanes; ++i) target_score[i] = 0;
        memory.for_runs(logits_strides, [&](int lane, int n, ptrdiff_t offset, Strides strides) {
            for (int i = lane; i < lane + n; ++i, offset += strides.position) {
                if (target[i] < 0) continue;
                const ptrdiff_t at = offset + target[i] * strides.of_class;
                memory.load_line(p.logits + at * p.itemsize, 1, &target_score[i]);
            }
        });
        to_scores(target_score);
    }

    T log_p(T z, int i) const { return (z - high[i]) - low[i]; }

    void find_loss() {
        const bool probs = p.probs != nullptr;
        Doubles value, total;
        const double kept = 1 - p.label_smoothing;
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            const double log = log_p(target_score[i], i);
            value[i] = probs ? 0 : -kept * class_weight[i] * log;
        }
        if (probs || p.label_smoothing != 0) {
            add_log_probabilities(total);
            const double share = probs ? 1 : p.label_smoothing / p.vocab;
#pragma omp simd
            for (int i = 0; i < lanes; ++i) value[i] -= share * total[i];
        }
        if (p.z_loss != 0) {
            const double z_loss = p.z_loss;
#pragma omp simd
            for (int i = 0; i < lanes; ++i)
                value[i] += z_loss * class_weight[i] * (double(high[i]) * high[i]);
        }
#pragma omp simd
        for (int i = 0; i < lanes; ++i) loss[i] = ignored[i] ? T(0) : T(token_weight[i] * value[i]);
    }

    // The sums over all classes of what add(classes, part) adds to `part`, which begins as 0. By
    // stages, and these by parts: one sum of 50,000 doubles was off by 79 roundings.
    template <class Add>
    void sum_by_stages(Doubles& total, Add add) {
        constexpr int count = 8;
        Doubles parts[count] = {};
        int next = 0;
        for_stages([&](Classes classes) {
            Doubles part = {};
            add(classes, part);
            for (int i = 0; i < lanes; ++i) parts[next][i] += part[i];
            next = (next + 1) % count;
        });
        for (int i = 0; i < lanes; ++i) total[i] = 0;
        for (const Doubles& part : parts)
            for (int i = 0; i < lanes; ++i) total[i] += part[i];
    }

    // The sums of w_c log p_c, or of w_c q'_c log p_c.
    void add_log_probabilities(Doubles& total) {
        sum_by_stages(total, [&](Classes classes, Doubles& part) {
            load_scores(classes);
            const Reals* q = p.probs == nullptr ? nullptr : load_coefficients(classes);
            for (ptrdiff_t c = 0; c < classes.count; ++c) {
                const Reals& z = stage[c];
                const T w = q == nullptr ? weight_of(classes.start + c) : T(1);
                if (q == nullptr) {
#pragma omp simd
                    for (int i = 0; i < lanes; ++i) part[i] += w * log_p(z[i], i);
                } else {
#pragma omp simd
                    for (int i = 0; i < lanes; ++i) part[i] += q[c][i] * log_p(z[i], i);
                }
            }
        });
    }

    void find_entropy(Reals& of_rows) {
        Doubles total;
        sum_by_stages(total, [&](Classes classes, Doubles& part) {
            load_scores(classes);
            for (ptrdiff_t c = 0; c < classes.count; ++c) {
                const Reals& z = stage[c];
#pragma omp simd
                for (int i = 0; i < lanes; ++i) {
                    const T log = log_p(z[i], i), probability = exp_nonpositive(log);
                    part[i] += probability == 0 ? T(0) : probability * log;
                }
            }
        });
        for (int i = 0; i < lanes; ++i) of_rows[i] = T(-total[i]);
    }

    // As torch has it: the first class with a NaN, or else with the maximum.
    void find_argmax(Line<int64_t, lanes>& argmax) {
        Line<int64_t, lanes> with_nan;
        for (int i = 0; i < lanes; ++i) argmax[i] = with_nan[i] = p.vocab;
        for_stages([&](Classes classes) {
            load_scores(classes);
            for (ptrdiff_t c = classes.count - 1; c >= 0; --c) {
                // From the last class to the first of a stage, none of which is before another's.
                const Reals& z = stage[c];
                const int64_t column = classes.start + c;
                for (int i = 0; i < lanes; ++i) {
                    if (z[i] == maximum[i] && !(argmax[i] < classes.start)) argmax[i] = column;
                    if (z[i] != z[i] && !(with_nan[i] < classes.start)) with_nan[i] = column;
                }
            }
        });
        for (int i = 0; i < lanes; ++i) {
            if (with_nan[i] < p.vocab) argmax[i] = with_nan[i];
            if (argmax[i] == p.vocab) argmax[i] = 0;
        }
    }

    void find_correct(const Line<int64_t, lanes>& argmax, Line<uint8_t, lanes>& correct) const {
        for (int i = 0; i < lanes; ++i) {
            const bool nan_among_finite =
                std::isnan(high[i]) && maximum[i] < std::numeric_limits<T>::infinity();
            correct[i] = target[i] >= 0 && target[i] == argmax[i] && !nan_among_finite;
        }
    }

    // Whether nothing after the lse, in forward or backward, reads the scores of all classes.
    bool exps_suffice(const Output& o) const {
        return one_stage() && p.softcap == 0 && p.probs == nullptr && p.label_smoothing == 0 &&
               !wants_stats(o);
    }

    static bool wants_stats(const Output& o) {
        return o.correct != nullptr || o.entropy != nullptr || o.argmax != nullptr;
    }

    void forward(const Output& o) {
        const bool stats = wants_stats(o);
        if (counted || stats) {
            find_target_scores();
            find_lse();
            find_loss();
            write_stats(o);
        }
        if (!stats && counted < lanes) {  // the lse of a row that was not asked for
            for (int i = 0; i < lanes; ++i) {
                if (!ignored[i]) continue;
                loss[i] = high[i] = low[i] = 0;
            }
        }
        write(loss, o.loss);
        write(high, o.lse);
        write(low, o.lse_low);
    }

    void write_stats(const Output& o) {
        if (o.correct != nullptr || o.argmax != nullptr) {
            Line<int64_t, lanes> argmax;
            Line<uint8_t, lanes> correct;
            find_argmax(argmax);
            find_correct(argmax, correct);
            write(argmax, o.argmax);
            write(correct, o.correct);
        }
        if (o.entropy != nullptr) {
            Reals of_rows;
            find_entropy(of_rows);
            write(of_rows, o.entropy);
        }
    }

    template <class U>
    void write(const Line<U, lanes>& line, void* to) const {
        if (to != nullptr)
            std::memcpy(static_cast<U*>(to) + memory.first, &line, memory.count * sizeof(U));
    }

    // Backward

    void backward(const Gradient& g, double grad_scale) {
        Doubles grad, grad_lse;
        for (int i = 0; i < lanes; ++i) {
            grad[i] = grad_scale;
            grad_lse[i] = entropy_weight[i] = entropy[i] = 0;
        }
        backward(g, grad, grad_lse);
    }

    void backward(const Gradient& g, const Upstream& u) {
        Doubles grad, grad_lse;
        for (int i = 0; i < lanes; ++i) {
            grad[i] = grad_lse[i] = high[i] = low[i] = 0;
            entropy_weight[i] = entropy[i] = 0;
        }
        read(u.lse, high);
        read(u.lse_low, low);
        auto of_loss = static_cast<const T*>(u.grad), of_lse = static_cast<const T*>(u.grad_lse);
        auto of_entropy = static_cast<const T*>(u.grad_entropy);
        through_entropy = of_entropy != nullptr;
        const ptrdiff_t first = memory.first;
        for (int i = 0; i < memory.count; ++i) {
            grad[i] = of_loss[(first + i) * u.grad_stride] * u.grad_scale;
            if (of_lse != nullptr) grad_lse[i] = of_lse[first + i];
            if (!through_entropy) continue;
            entropy_weight[i] = -of_entropy[first + i];
            entropy[i] = static_cast<const T*>(u.entropy)[first + i];
        }
        backward(g, grad, grad_lse);
    }

    void read(const void* from, Reals& line) const {
        std::memcpy(&line, static_cast<const T*>(from) + memory.first, memory.count * sizeof(T));
    }

    // `grad` is 0 for ignored rows.
    void find_gradient_weights(const Doubles& grad, const Doubles& grad_lse) {
        const double kept = p.probs == nullptr ? 1 - p.label_smoothing : 0;
        const double share = p.probs != nullptr ? 1 : uniform_share();
        const double weight_sum = p.weight_sum;
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            target_weight[i] = grad[i] * kept * class_weight[i];
            uniform_weight[i] = share == 0 ? 0 : grad[i] * share;  // no inf * 0
            softmax_weight[i] = grad_lse[i] + uniform_weight[i] * weight_sum;
        }
        if (p.probs != nullptr) {
            Doubles total;
            add_coefficients(total);
#pragma omp simd
            for (int i = 0; i < lanes; ++i)
                softmax_weight[i] = grad_lse[i] + (ignored[i] ? 0 : grad[i] * total[i]);
        }
        if (p.z_loss != 0) {
            const double twice = 2 * p.z_loss;
#pragma omp simd
            for (int i = 0; i < lanes; ++i)
                softmax_weight[i] += grad[i] * twice * class_weight[i] * high[i];
        }
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            const double log = log_p(target_score[i], i);
            target_gradient[i] = T(softmax_weight[i] * exp_nonpositive(log) +
                                   target_weight[i] * expm1_nonpositive(log));
            // e^(z - high - low) = e^(shift - high - low) e^(z - shift)
            const double log_factor = (double(shift[i]) - high[i]) - low[i];
            scale[i] = T((target_weight[i] + softmax_weight[i]) * exp_nonpositive(log_factor));
        }
        if (through_entropy) find_entropy_factors();
    }

    void find_entropy_factors() {
        for (int i = 0; i < lanes; ++i) {
            const double log = log_p(target_score[i], i), probability = exp_nonpositive(log);
            if (probability != 0)
                target_gradient[i] = T(target_gradient[i] +
                                       entropy_weight[i] * probability * (log + entropy[i]));
            const double log_factor = (double(shift[i]) - high[i]) - low[i];
            entropy_slope[i] = T(entropy_weight[i] * exp_nonpositive(log_factor));
            entropy_offset[i] = T(entropy[i] - low[i]);
        }
    }

    double uniform_share() const {
        return p.label_smoothing != 0 ? p.label_smoothing / p.vocab : 0;
    }

    void add_coefficients(Doubles& total) {
        sum_by_stages(total, [&](Classes classes, Doubles& part) {
            const Reals* q = load_coefficients(classes);
            for (ptrdiff_t c = 0; c < classes.count; ++c) {
#pragma omp simd
                for (int i = 0; i < lanes; ++i) part[i] += q[c][i];
            }
        });
    }

    // The lines of the stage become gradients.
    void to_gradients(Classes classes, const Flags& zero, bool any_zero) {
        Reals* slopes = stage + stage_classes;
        for (ptrdiff_t c = 0; c < classes.count; ++c) {
            if (p.softcap != 0) cap(stage[c], slopes[c]);
            to_softmax(stage[c]);
        }
        for (int i = 0; i < lanes; ++i) {
            const ptrdiff_t c = target[i] - classes.start;
            if (0 <= c && c < classes.count) stage[c][i] = target_gradient[i];
        }
        const Reals* q = p.probs == nullptr ? nullptr : load_coefficients(classes);
        for (ptrdiff_t c = 0; c < classes.count; ++c) {
            Reals& line = stage[c];
            if (q != nullptr) {
#pragma omp simd
                for (int i = 0; i < lanes; ++i)  // of an ignored row they may be NaN
                    line[i] -= ignored[i] ? T(0) : T(uniform_weight[i]) * q[c][i];
            } else if (p.label_smoothing != 0) {
                const T w = weight_of(classes.start + c);
#pragma omp simd
                for (int i = 0; i < lanes; ++i) line[i] -= T(uniform_weight[i]) * w;
            }
            if (p.softcap != 0) {
#pragma omp simd
                for (int i = 0; i < lanes; ++i) line[i] *= slopes[c][i];
            }
            if (p.logit_scale != 1) scale_line(line, T(p.logit_scale));
            if (any_zero) {
#pragma omp simd
                for (int i = 0; i < lanes; ++i) line[i] = zero[i] ? T(0) : line[i];
            }
        }
    }

    // Of a score, or of its exp.
    void to_softmax(Reals& line) const {
        for (int i = 0; i < lanes; i += kWidth<T>) {
            const Lanes<T> z = lanes_at(line, i);
            Lanes<T> factor = lanes_at(scale, i);
            if (through_entropy)
                factor += lanes_at(entropy_slope, i) *
                          (larger(z - lanes_at(high, i), Lanes<T>{} + T(kLogOfZero)) +
                           lanes_at(entropy_offset, i));
            set_lanes(line, i,
                      factor * (keeps_exps ? z : exp_nonpositive(z - lanes_at(shift, i))));
        }
    }

    void cap(Reals& z, Reals& slope) const {
        const T softcap = T(p.softcap);
#pragma omp simd
        for (int i = 0; i < lanes; ++i) {
            const T y = z[i] / softcap;
            z[i] = softcap * tanh_any(y);
            slope[i] = tanh_slope(y);
        }
    }

    // `high` and `low` are known.
    void backward(const Gradient& g, const Doubles& grad_loss, const Doubles& grad_lse) {
        Doubles grad;
        Flags zero;
        int zeros = 0;
        for (int i = 0; i < lanes; ++i) {
            grad[i] = ignored[i] ? 0 : grad_loss[i] * token_weight[i];
            // Exactly zero, even where the logits are NaN. x - x is 0 of a finite x.
            const bool unused = grad_lse[i] == 0 && entropy_weight[i] == 0;
            zero[i] = ignored[i] && (unused || !(high[i] - high[i] == 0));
            zeros += zero[i];
        }
        if (zeros == lanes) {
            write_zeros(g);
            return;
        }
        if (!keeps_exps) find_target_scores();
        find_shift();
        find_gradient_weights(grad, grad_lse);
        for_stages([&](Classes classes) {
            if (p.softcap != 0)
                load_uncapped(classes);
            else if (!keeps_exps)
                load_scores(classes);
            to_gradients(classes, zero, zeros != 0);
            memory.store(stage, classes, g);
        });
    }

    void find_shift() {
        shift = high;
        if (!one_stage()) return;
        if (!keeps_exps) {
            for (int i = 0; i < lanes; ++i) maximum[i] = -std::numeric_limits<T>::infinity();
            for (int i = 0; i < lanes; i += kWidth<T>) add_to_maximum(Classes{0, p.vocab}, i);
        }
        // Of -inf alone e^(z - shift) would be NaN. The lse is finite then where the row goes on in
        // another process.
        constexpr T lowest = -std::numeric_limits<T>::infinity();
        for (int i = 0; i < lanes; ++i)
            shift[i] = maximum[i] == lowest && high[i] != lowest ? 0 : maximum[i];
    }

    // A capped score does not tell its slope.
    void load_uncapped(Classes classes) {
        memory.load(p.logits, logits_strides, classes, stage);
        if (p.logit_scale == 1) return;
        for (ptrdiff_t c = 0; c < classes.count; ++c) scale_line(stage[c], T(p.logit_scale));
    }

    void write_zeros(const Gradient& g) {
        for_stages([&](Classes classes) {
            std::memset(stage, 0, classes.count * sizeof(Reals));
            memory.store(stage, classes, g);
        });
    }
};

// Calls what(T()) for the type computed with.
template <class What>
inline void of_real(const Problem& p, What what) {
    if (p.dtype == kFloat64)
        what(double());
    else
        what(float());
}

// One group

inline ptrdiff_t group_size(const Problem& p) {
    return p.dtype == kFloat64 ? Group<double>::lanes : Group<float>::lanes;
}

inline void group_forward(const Problem& p, const Output& o, ptrdiff_t group) {
    of_real(p, [&](auto real) { Group<decltype(real)>(p, group).forward(o); });
}

inline void group_backward(const Problem& p, const Gradient& g, const Upstream& u,
                           ptrdiff_t group) {
    of_real(p, [&](auto real) { Group<decltype(real)>(p, group).backward(g, u); });
}

inline void group_forward_backward(const Problem& p, const Output& o, const Gradient& g,
                                   double grad_scale, ptrdiff_t group) {
    of_real(p, [&](auto real) {
        Group<decltype(real)> rows(p, group);
        rows.keeps_exps = rows.exps_suffice(o);
        rows.forward(o);
        rows.backward(g, grad_scale);
    });
}

}  // namespace neglog
