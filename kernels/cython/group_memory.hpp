// Where the rows of a group lie in memory, and how they come to lines and back. positions.hpp computes
// with the lines.
#pragma once

#include "lines.hpp"
#include "problem.hpp"

namespace neglog {

// Of an array (batch, class, position), in numbers.
struct Strides {
    ptrdiff_t batch, of_class, position;
};

// Some classes, of all rows of a group.
struct Classes {
    ptrdiff_t start, count;
};

// Where the rows of a group lie in arrays (batch, class, position).
template <class T>
struct GroupMemory {
    static constexpr int lanes = 256 / sizeof(T);
    static constexpr int raw_lines = 64;
    using Reals = Line<T, lanes>;

    ptrdiff_t first, positions;
    int count;                      // of rows; less than `lanes` in the last group
    int dtype, itemsize;
    bool by_rows;                   // rows (N, V) are one batch, of positions that are far apart

    GroupMemory(const Problem& p, ptrdiff_t group)
        : first(group * lanes),
          positions(p.positions == 1 ? p.rows : p.positions),
          count(int(std::min<ptrdiff_t>(lanes, p.rows - first))),
          dtype(p.dtype),
          itemsize(p.itemsize),
          by_rows(p.positions == 1) {}

    // move(lane, n, offset, strides) for each run of n rows that lie in one batch.
    template <class Move>
    void for_runs(Strides strides, Move move) const {
        if (by_rows) strides = {0, strides.of_class, strides.batch};
        for (int lane = 0; lane < count;) {
            const ptrdiff_t row = first + lane, batch = row / positions, at = row % positions;
            const int n = int(std::min<ptrdiff_t>(count - lane, positions - at));
            move(lane, n, batch * strides.batch + at * strides.position, strides);
            lane += n;
        }
    }

    void load(const char* array, Strides all, Classes classes, Reals* lines) const {
        if (count < lanes) std::memset(lines, 0, classes.count * sizeof(Reals));
        for_runs(all, [&](int lane, int n, ptrdiff_t offset, Strides strides) {
            const char* from = array + (offset + classes.start * strides.of_class) * itemsize;
            if (strides.position == 1) {
                for (ptrdiff_t c = 0; c < classes.count; ++c)
                    load_line(from + c * strides.of_class * itemsize, n, &lines[c][lane]);
            } else if (itemsize == sizeof(T)) {
                to_lines(reinterpret_cast<const T*>(from), strides, n, classes.count, &lines[0][lane]);
            } else {
                load_halves(reinterpret_cast<const uint16_t*>(from), strides, n, classes.count, lane,
                            lines);
            }
        });
    }

    void store(const Reals* lines, Classes classes, const Gradient& g) const {
        const Strides all = {g.stride, g.axes.of_class, g.axes.position};
        for_runs(all, [&](int lane, int n, ptrdiff_t offset, Strides strides) {
            char* to = g.out + (offset + classes.start * strides.of_class) * itemsize;
            if (strides.position == 1) {
                for (ptrdiff_t c = 0; c < classes.count; ++c)
                    store_line(&lines[c][lane], n, to + c * strides.of_class * itemsize);
            } else if (itemsize == sizeof(T)) {
                from_lines(&lines[0][lane], n, classes.count, reinterpret_cast<T*>(to), strides);
            } else {
                store_halves(lines, lane, n, classes.count, reinterpret_cast<uint16_t*>(to), strides);
            }
        });
    }

    void load_line(const char* from, int n, T* to) const {
        if (itemsize != sizeof(T))
            widen_block(from, dtype, n, reinterpret_cast<float*>(to));
        else if (n == lanes)  // a constant is copied by vectors
            std::memcpy(to, from, sizeof(Reals));
        else
            std::memcpy(to, from, n * sizeof(T));
    }

    void store_line(const T* from, int n, char* to) const {
        if (itemsize != sizeof(T))
            narrow_block(reinterpret_cast<const float*>(from), dtype, n, to);
        else if (n == lanes)
            std::memcpy(to, from, sizeof(Reals));
        else
            std::memcpy(to, from, n * sizeof(T));
    }

    // 16 bits are transposed as they are, and converted by lines.
    void load_halves(const uint16_t* from, Strides strides, int n, ptrdiff_t count, int lane,
                     Reals* lines) const {
        uint16_t raw[raw_lines * lanes];
        for (ptrdiff_t c = 0; c < count; c += raw_lines) {
            const ptrdiff_t m = std::min<ptrdiff_t>(raw_lines, count - c);
            to_lines(from + c * strides.of_class, strides, n, m, raw);
            for (ptrdiff_t k = 0; k < m; ++k)
                widen_block(raw + k * lanes, dtype, n, reinterpret_cast<float*>(&lines[c + k][lane]));
        }
    }

    void store_halves(const Reals* lines, int lane, int n, ptrdiff_t count, uint16_t* to,
                      Strides strides) const {
        uint16_t raw[raw_lines * lanes];
        for (ptrdiff_t c = 0; c < count; c += raw_lines) {
            const ptrdiff_t m = std::min<ptrdiff_t>(raw_lines, count - c);
            for (ptrdiff_t k = 0; k < m; ++k)
                narrow_block(reinterpret_cast<const float*>(&lines[c + k][lane]), dtype, n,
                             raw + k * lanes);
            from_lines(raw, n, m, to + c * strides.of_class, strides);
        }
    }

    template <class U>
    static void to_lines(const U* from, Strides strides, int n, ptrdiff_t count, U* lines) {
        if (strides.of_class == 1) {
            transpose(from, strides.position, n, count, lines, lanes);
            return;
        }
        for (ptrdiff_t c = 0; c < count; ++c)
            for (int i = 0; i < n; ++i)
                lines[c * lanes + i] = from[i * strides.position + c * strides.of_class];
    }

    template <class U>
    static void from_lines(const U* lines, int n, ptrdiff_t count, U* to, Strides strides) {
        if (strides.of_class == 1) {
            transpose(lines, lanes, count, n, to, strides.position);
            return;
        }
        for (ptrdiff_t c = 0; c < count; ++c)
            for (int i = 0; i < n; ++i)
                to[i * strides.position + c * strides.of_class] = lines[c * lanes + i];
    }
};

}  // namespace neglog
