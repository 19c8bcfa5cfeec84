"""Conversion of bfloat16 and float16, from halves.hpp."""

cdef extern from "halves.hpp" namespace "neglog" nogil:
    ctypedef struct bfloat16:
        pass

    float widen(bfloat16 x)
    void narrow(float x, bfloat16& to)

    void widen_block(const void* source, int dtype, Py_ssize_t n, float* to)
    void narrow_block(const float* source, int dtype, Py_ssize_t n, void* to)
