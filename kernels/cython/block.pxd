"""The block arithmetic of block.hpp, as Cython sees it."""

from libc.stdint cimport int64_t

cdef extern from "block.hpp" namespace "neglog" nogil:
    cdef cppclass LogSumExp[T]:
        T maximum
        double sum

    cdef cppclass Lse[T]:
        T high
        T low

    ctypedef struct bfloat16:
        pass

    float widen(bfloat16 x)
    void narrow(float x, bfloat16& to)

    void absorb[T, Logit](LogSumExp[T]& state, const Logit* z, Py_ssize_t n)
    Lse[T] finish[T](const LogSumExp[T]& state)
    T log_probability[T](T z, Lse[T] lse)

    T exp_nonpositive[T](T x)
    T block_log_probability_sum[T](const T* z, Py_ssize_t n, Lse[T] lse)
    T block_log_probability_dot[T](const T* z, const T* coefficient, Py_ssize_t n, Lse[T] lse)
    double block_sum[T](const T* x, Py_ssize_t n)
    T block_negative_entropy[T](const T* z, Py_ssize_t n, Lse[T] lse)
    bint block_contains[T](const T* z, Py_ssize_t n, T value)

    void block_softmax[T, Logit](const Logit* z, Py_ssize_t n, Lse[T] lse, T scale, Logit* out)
    void block_scale[T](T* x, Py_ssize_t n, T scale)
    void block_affine[T](T* x, Py_ssize_t n, T scale, T offset)
    void block_multiply[T](T* x, const T* y, Py_ssize_t n)
    void block_subtract[T](T* out, const T* x, Py_ssize_t n, T scale)
    void block_softcap[T](T* z, Py_ssize_t n, T softcap)
    void block_softcap_backward[T](T* grad, const T* z, Py_ssize_t n, T softcap)

    void block_pair_scores[T](const T* similarity, Py_ssize_t n, T scale, const T* bias, T* z)
    void block_exclude[T](T* z, Py_ssize_t n, int64_t group, const int64_t* groups)
    void block_maximum_of_columns[T](const T* z, Py_ssize_t n, T* maximum)
    double block_exp_sum_both[T](const T* z, Py_ssize_t n, T* column_sum)
    void block_exp_sum_of_columns[T](const T* z, Py_ssize_t n, const T* shift, T* column_sum)
    void block_pour[T](T* source, Py_ssize_t n, double* to)
    void block_pair_gradient_bounded[T](const T* z, Py_ssize_t n, T row, const T* column, T* out)
    void block_pair_gradient[T](const T* z, Py_ssize_t n, T row, T row_lse, const T* column,
                                const T* column_lse, T* out)
    T softplus[T](T z, T& sigmoid)
    double block_softplus[T](const T* z, Py_ssize_t n, T scale, T* out)

    void widen_block(const void* source, int dtype, Py_ssize_t n, float* to)
    void narrow_block(const float* source, int dtype, Py_ssize_t n, void* to)
    void zero_bytes(char* to, Py_ssize_t n, bint past_caches)
