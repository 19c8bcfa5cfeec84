"""Arithmetic on one block of a row, from block.hpp."""

cdef extern from "block.hpp" namespace "neglog" nogil:
    cdef cppclass LseState[T]:
        T maximum
        double sum

    cdef cppclass Lse[T]:
        T high
        T low

    void update[T, Logit](LseState[T]& state, const Logit* z, Py_ssize_t n)
    Lse[T] finish[T](const LseState[T]& state)
    T log_probability[T](T z, Lse[T] lse)

    T exp_nonpositive[T](T x)
    double block_log_probability_sum[T](const T* z, Py_ssize_t n, Lse[T] lse)
    double block_log_probability_dot[T](const T* z, const T* coefficient, Py_ssize_t n, Lse[T] lse)
    double block_sum[T](const T* x, Py_ssize_t n)
    double block_negative_entropy[T](const T* z, Py_ssize_t n, Lse[T] lse)
    bint block_contains[T](const T* z, Py_ssize_t n, T value)

    void block_softmax[T, Logit](const Logit* z, Py_ssize_t n, Lse[T] lse, T scale, Logit* out)
    void block_scale[T](T* x, Py_ssize_t n, T scale)
    void block_affine[T](T* x, Py_ssize_t n, T scale, T offset)
    void block_multiply[T](T* x, const T* y, Py_ssize_t n)
    void block_subtract[T](T* out, const T* x, Py_ssize_t n, T scale)
    void block_softcap[T](T* z, Py_ssize_t n, T softcap)
    void block_softcap_and_slope[T](T* z, Py_ssize_t n, T softcap, T* slope)
    void zero_bytes(char* to, Py_ssize_t n, bint bypass_cache)
