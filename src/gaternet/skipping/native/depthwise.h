// One image's depthwise convolution: each open channel by itself, in tiles of some pixels by some channels.
#pragma once

#include "convolution.h"

constexpr int WIDE = 4;                    // vectors of channels of a tile
constexpr int DEEP = ACCUMULATORS / WIDE;  // its pixels: each weight is read once for all of them
static_assert(DEEP <= MOST_PIXELS, "pointers to the pixels of a tap lie MOST_PIXELS apart");

// y = conv(x), then the function. Weights are (taps, filters), and x and y have the same open channels.
struct Depthwise {
    const Conv &conv;
    Image x, y;
    List open;
    int64_t function;
    Team team;

    void run() const {
        const int64_t taps = conv.kernel_height * conv.kernel_width, pixels = conv.out_height * conv.out_width;
        const int64_t step = open.numbers ? divide_up(open.count, LANES) * LANES : conv.filters;
        const std::vector<float> zeros(open.count + LANES), gathered = gather(taps, step);
        const float *weights = open.numbers ? gathered.data() : conv.weights;
        const float *bias = open.numbers ? weights + taps * step : conv.bias ? conv.bias : zeros.data();
        std::vector<const float *> pointers(taps * MOST_PIXELS, zeros.data());
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel += DEEP) {
            const int64_t count = std::min<int64_t>(DEEP, team.end(pixels) - pixel);
            point(conv, x, pixel, count, zeros.data(), pointers.data());
            float *to = y.data + pixel * y.room;
            int64_t first = 0;
            for (; first + WIDE * LANES <= open.count; first += WIDE * LANES)
                tile<WIDE>(pointers.data(), taps, first, WIDE * LANES, weights, step, bias, to, count);
            for (; first < open.count; first += LANES)
                tile<1>(pointers.data(), taps, first, open.count - first, weights, step, bias, to, count);
            if (!only_cuts(function)) finish(function, to, count, open.count, y.room);
        }
    }

    // The open channels' weights together, a row of `step` for each tap, and their biases; nothing where all are open.
    std::vector<float> gather(int64_t taps, int64_t step) const {
        if (!open.numbers) return {};
        std::vector<float> rows((taps + 1) * step + LANES);
        const std::vector<Piece> pieces = find_pieces(open, 0, open.count);
        for (int64_t row = 0; row < taps + (conv.bias != nullptr); row++) {
            const float *from = row < taps ? conv.weights + row * conv.filters : conv.bias;
            for (const Piece &piece : pieces) {  // what is stored beyond the row is written over, by the next
                const int64_t filter = piece.vector * LANES;
                const Vector stored = part(from + filter, conv.filters - filter);
                store(rows.data() + row * step + piece.to, compress(stored, piece.mask));
            }
        }
        return rows;
    }

    // Channels [first, first + held) of `count` pixels: whole vectors, or a part of one. The order of additions is that
    // of the taps. Where there are fewer pixels than the tile has, the others are computed for nothing.
    template <int COUNT>
    void tile(const float *const *pointers, int64_t taps, int64_t first, int64_t held, const float *weights,
              int64_t step, const float *bias, float *to, int64_t count) const {
        // Each loop over the sums is unrolled, else they would not stay in registers.
        const auto read = [&](const float *from, int j) {
            return COUNT > 1 ? load(from + first + j * LANES) : part(from + first, held);
        };
        Vector sums[DEEP][COUNT];
#pragma GCC unroll 7
        for (int i = 0; i < DEEP; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COUNT; j++) sums[i][j] = read(bias, j);
        for (int64_t tap = 0; tap < taps; tap++, weights += step, pointers += MOST_PIXELS) {
            Vector w[COUNT];
#pragma GCC unroll 4
            for (int j = 0; j < COUNT; j++) w[j] = read(weights, j);
#pragma GCC unroll 7
            for (int i = 0; i < DEEP; i++)
#pragma GCC unroll 4
                for (int j = 0; j < COUNT; j++) sums[i][j] += read(pointers[i], j) * w[j];
        }
        const Bounds bounds(function);
#pragma GCC unroll 7
        for (int i = 0; i < DEEP; i++)
            if (i < count)
#pragma GCC unroll 4
                for (int j = 0; j < COUNT; j++)
                    store_part(to + i * y.room + first + j * LANES, clamp(sums[i][j], bounds.low, bounds.high),
                               COUNT > 1 ? LANES : held);
    }
};
