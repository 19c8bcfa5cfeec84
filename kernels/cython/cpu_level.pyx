# cython: language_level=3
"""Which instructions the processor has. Compiled without -march, so that it runs on all of them."""

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GNUC__)
    static int neglog_x86_64_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2") &&
              __builtin_cpu_supports("popcnt"))) return 1;
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma"))) return 2;
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl"))) return 3;
        return 4;
    }
    #else
    static int neglog_x86_64_level(void) { return 0; }
    #endif
    """
    int neglog_x86_64_level() nogil


def x86_64_level():
    """The highest x86-64 level (1 to 4) that processor and system support; else 0."""
    return neglog_x86_64_level()
