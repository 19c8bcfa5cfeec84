"""Arithmetic on one block of a row, from block.hpp."""

cdef extern from "block.hpp" namespace "neglog" nogil:
    cdef cppclass LseState[T]:
        T maximum
        double sum

    cdef cppclass Lse[T]:
        T high
        T low

    void update[T, M](LseState[T]& state, const M* z, Py_ssize_t n)
    Lse[T] finish[T](const LseState[T]& state)
    T log_probability[T](T z, Lse[T] lse)

    T exp_nonpositive[T](T x)
    double block_sum[T](const T* x, Py_ssize_t n)
    void block_softmax[T](const T* z, Py_ssize_t n, Lse[T] lse, T scale, T* out)

    void widen_block(const void* source, int dtype, Py_ssize_t n, float* to)
    void narrow_block(const float* source, int dtype, Py_ssize_t n, void* to)

    void finish_streams()
