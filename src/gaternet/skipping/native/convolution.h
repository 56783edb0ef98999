// One image's convolution with the open rows and columns of its weights.
//
// A convolution is a matrix product: (pixels x (taps, channels read)) times ((taps, channels read) x filters). The first
// matrix is never made: a tile of some pixels by some filters is kept in registers, and each of its pixels has a pointer
// into the image for each tap. Weights lie in panels of up to VECTORS * LANES filters, a panel's filters behind each
// other for each tap and channel. Those of open filters and channels are copied together first; where all are open, the
// stored panels are used as they are. The order of additions is the same for every size of tile, so that neither
// threads nor other images in the batch change a bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "functions.h"

constexpr int MOST_PIXELS = 14;  // of a tile
constexpr int64_t AHEAD = 8;     // rows of weights that are fetched before they are read
constexpr int tile_pixels(int halves) { return std::min(MOST_PIXELS, ACCUMULATORS / ((halves + 1) / 2)); }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The threads that work on one image together.
struct Team {
    int64_t id, size;
    int64_t begin(int64_t count) const { return count * id / size; }
    int64_t end(int64_t count) const { return count * (id + 1) / size; }
    void wait() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

// A convolution's shape and weights; declared in library.py, too.
struct Conv {
    int64_t height, width, out_height, out_width, channels, filters;
    int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
    int64_t dilation_height, dilation_width, groups;
    int64_t offset;  // of CAT and PAD: the channel of the result at which their own begin
    const float *weights, *bias;  // in panels, see `pack_weights`; for each filter, or null
};

// The open channels of an image, in ascending order; `numbers` is null where all are open.
struct List {
    const int32_t *numbers;
    int64_t count;

    // How many of them come before channel `channel` of all.
    int64_t before(int64_t channel) const {
        return numbers ? std::lower_bound(numbers, numbers + count, channel) - numbers : channel;
    }
};

// A group's part of a list: `width` channels of all, numbered from its own first on, at places `start` to `stop` of all.
struct Group {
    std::vector<int32_t> numbers;
    const int64_t start, stop;

    Group(List all, int64_t group, int64_t width)
        : start(all.before(group * width)), stop(all.before((group + 1) * width)) {
        if (stop - start == width) return;
        for (int64_t place = start; place < stop; place++) numbers.push_back(all.numbers[place] - group * width);
    }

    List list() const { return {numbers.empty() ? nullptr : numbers.data(), stop - start}; }
};

// An image-like tensor: pixels of up to `room` channels.
struct Image {
    float *data;
    int64_t room;
};

// A run of filters whose weights lie together: `halves` * HALF of them from filter `first` on.
struct Panel {
    int64_t first, halves;
    int64_t width() const { return halves * HALF; }
    int64_t stop() const { return first + width(); }
};

// How many filters `filters` take with those that fill the last panel up.
inline int64_t packed(int64_t filters) { return divide_up(filters, HALF) * HALF; }

inline std::vector<Panel> split(int64_t filters) {
    const int64_t vectors = divide_up(filters, LANES), panels = divide_up(vectors, VECTORS);
    std::vector<Panel> result;
    for (int64_t p = 0, first = 0; p < panels; p++) {
        const int64_t count = vectors / panels + (p < vectors % panels);
        result.push_back({first * LANES, std::min(2 * count, divide_up(filters - first * LANES, HALF))});
        first += count;
    }
    return result;
}

// Pointers into the image x for each tap of `count` pixels, MOST_PIXELS apart; to zeros where the tap lies outside.
inline void point(const Conv &conv, Image x, int64_t pixel, int64_t count, const float *zeros, const float **pointers) {
    int64_t rows[MOST_PIXELS], columns[MOST_PIXELS], starts[MOST_PIXELS];
    int64_t row = pixel / conv.out_width, column = pixel % conv.out_width;
    for (int64_t i = 0; i < count; i++) {
        rows[i] = row * conv.stride_height - conv.pad_height;
        columns[i] = column * conv.stride_width - conv.pad_width;
        starts[i] = (rows[i] * conv.width + columns[i]) * x.room;
        if (++column == conv.out_width) column = 0, row++;
    }
    for (int64_t ky = 0; ky < conv.kernel_height; ky++)
        for (int64_t kx = 0; kx < conv.kernel_width; kx++, pointers += MOST_PIXELS) {
            const int64_t down = ky * conv.dilation_height, right = kx * conv.dilation_width;
            const float *base = x.data + (down * conv.width + right) * x.room;
            for (int64_t i = 0; i < count; i++) {  // unsigned: below zero is too large as well
                const bool inside = (static_cast<uint64_t>(rows[i] + down) < static_cast<uint64_t>(conv.height)) &
                                    (static_cast<uint64_t>(columns[i] + right) < static_cast<uint64_t>(conv.width));
                pointers[i] = inside ? base + starts[i] : zeros;
            }
        }
}

// One tile: PIXELS pixels by HALVES half vectors of filters. `pointers` has each tap's MOST_PIXELS pointers to `depth`
// numbers.
template <int HALVES, int PIXELS>
void compute_tile(const float *const *pointers, int64_t taps, int64_t depth, const float *weights, const float *bias,
                  bool adds, Bounds bounds, float *y, int64_t room) {
    // Each loop over the sums is unrolled, else they would not stay in registers.
    constexpr int NV = HALVES / 2;
    constexpr bool odd = HALVES % 2;
    Vector sums[PIXELS][NV + 1];  // the last only for the compiler, where there are none
    HalfVector ends[PIXELS];
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sums[i][j] = load(bias + j * LANES);
        if constexpr (odd) ends[i] = load_half(bias + NV * LANES);
    }
    for (int64_t tap = 0; tap < taps; tap++) {
        const float *x[PIXELS];
#pragma GCC unroll 14
        for (int i = 0; i < PIXELS; i++) x[i] = pointers[tap * MOST_PIXELS + i];
        for (int64_t k = 0; k < depth; k++, weights += HALVES * HALF) {
            Vector w[NV + 1];
            HalfVector end;
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) w[j] = load(weights + j * LANES);
            if constexpr (odd) end = load_half(weights + NV * LANES);
#pragma GCC unroll 14
            for (int i = 0; i < PIXELS; i++) {
                const float value = x[i][k];
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) sums[i][j] += value * w[j];
                if constexpr (odd) ends[i] += value * end;
            }
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; i++) {
        float *to = y + i * room;
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            const Vector sum = adds ? sums[i][j] + load(to + j * LANES) : sums[i][j];
            store(to + j * LANES, clamp(sum, bounds.low, bounds.high));
        }
        if constexpr (odd) {
            const HalfVector sum = adds ? ends[i] + load_half(to + NV * LANES) : ends[i];
            store(to + NV * LANES, clamp(sum, bounds.low, bounds.high));
        }
    }
}

using Tile = void (*)(const float *const *, int64_t, int64_t, const float *, const float *, bool, Bounds, float *,
                      int64_t);

template <int HALVES, int PIXELS>
Tile find_tile(int64_t pixels) {
    if constexpr (PIXELS == 1) {
        return compute_tile<HALVES, 1>;
    } else {
        return pixels == PIXELS ? compute_tile<HALVES, PIXELS> : find_tile<HALVES, PIXELS - 1>(pixels);
    }
}

template <int HALVES = 2 * VECTORS>
Tile find_tile(int64_t halves, int64_t pixels) {
    if constexpr (HALVES == 1) {
        return find_tile<1, tile_pixels(1)>(pixels);
    } else {
        return halves == HALVES ? find_tile<HALVES, tile_pixels(HALVES)>(pixels)
                                : find_tile<HALVES - 1>(halves, pixels);
    }
}

// Open filters that are neighbours in vector `vector` of all filters: its lanes `mask`, held from place `to` on.
struct Piece {
    int64_t vector, to;
    uint32_t mask;
    const float *from;  // the vector's stored weights, rows `step` apart
    int64_t step;
};

// To which vectors of all filters the open filters [first, stop) belong.
inline std::vector<Piece> find_pieces(List filters, int64_t first, int64_t stop) {
    std::vector<Piece> pieces;
    int64_t last = -1;
    for (int64_t j = first; j < stop; j++) {
        const int64_t filter = filters.numbers ? filters.numbers[j] : j, vector = filter / LANES;
        if (vector != last) pieces.push_back({vector, j - first, 0, nullptr, 0});
        pieces.back().mask |= 1u << (filter % LANES);
        last = vector;
    }
    return pieces;
}

// y = conv(x), or y += conv(x) where `adds`; then the function, behind a sum a ReLU or none. Up to `room` numbers of each
// of y's pixels may be written over. The team makes an image with margins in `common`, each of it gathers weights in its
// own `workspace`, which may lie behind.
struct Convolution {
    Conv conv;
    Image x;
    List channels, filters;
    Image y;
    int64_t room;
    bool adds;
    int64_t function;
    Team team;
    float *common, *workspace;

    void run() {
        const int64_t stored_rows = conv.kernel_height * conv.kernel_width * conv.channels;
        int64_t depth = channels.count;
        const bool thin = depth * conv.kernel_width <= 64 && !channels.numbers && x.room == depth;
        if (thin && conv.dilation_width == 1 && conv.kernel_width > 1) {  // a row of taps lies together
            pad();
            depth *= conv.kernel_width;
            conv.kernel_width = 1;
            conv.pad_height = conv.pad_width = 0;
        }
        const int64_t rows = conv.kernel_height * conv.kernel_width * depth;
        const std::vector<Panel> panels = split(filters.count);
        const std::vector<float> zeros(channels.count + LANES);
        // Each of the team has a run of tiles, and gathers the weights of its panels itself: what another core has just
        // written is slow to read. So where the image is large, each has the same part of its pixels in all panels, and
        // reads what it wrote itself; where weights are, each has other panels. Tiles cost about the same in all
        // panels, for narrow panels have more pixels in a tile.
        const int64_t pixels = conv.out_height * conv.out_width;
        const bool by_pixels = 2 * pixels * channels.count > rows * filters.count;
        int64_t total = 0, passed = 0;
        for (const Panel &panel : panels) total += tiles(panel);
        for (const Panel &panel : panels) {
            const int64_t count = tiles(panel);
            const int64_t first = by_pixels ? team.begin(count) : std::max<int64_t>(0, team.begin(total) - passed);
            const int64_t stop = by_pixels ? team.end(count) : std::min(count, team.end(total) - passed);
            passed += count;
            if (first >= stop) continue;
            const float *weights = conv.weights + panel.first * rows;
            if (channels.numbers || filters.numbers) {
                gather(panel, rows, stored_rows, workspace);
                weights = workspace;
            }
            compute(panel, depth, first, stop, weights, zeros.data());
        }
    }

    // Pixels of a tile: as many as can be, but such that there are as many tiles for each of the team where they are few.
    int64_t tile_size(Panel panel) const {
        const int64_t pixels = conv.out_height * conv.out_width, least = divide_up(pixels, tile_pixels(panel.halves));
        const int64_t count = least < 8 * team.size ? divide_up(least, team.size) * team.size : least;
        return divide_up(pixels, count);
    }

    int64_t tiles(Panel panel) const { return divide_up(conv.out_height * conv.out_width, tile_size(panel)); }

    // The image with its margins of zeros.
    void pad() {
        const int64_t height = conv.height + 2 * conv.pad_height, width = conv.width + 2 * conv.pad_width;
        for (int64_t row = team.begin(height); row < team.end(height); row++) {
            float *to = common + row * width * x.room;
            std::memset(to, 0, width * x.room * sizeof(float));
            const int64_t source = row - conv.pad_height;
            if (source >= 0 && source < conv.height)
                std::memcpy(to + conv.pad_width * x.room, x.data + source * conv.width * x.room,
                            conv.width * x.room * sizeof(float));
        }
        x.data = common;
        workspace += divide_up(height * width * x.room, LANES) * LANES;
        conv.height = height;
        conv.width = width;
        team.wait();
    }

    // Copy the weights of a panel's open filters, for the open channels, together.
    void gather(Panel panel, int64_t rows, int64_t stored_rows, float *to) const {
        const std::vector<Panel> stored = split(conv.filters);
        const int64_t width = panel.width(), stop = std::min(filters.count, panel.stop());
        std::vector<Piece> pieces = find_pieces(filters, panel.first, stop);
        for (Piece &piece : pieces) {
            const int64_t filter = piece.vector * LANES;
            size_t p = 0;
            while (filter >= stored[p].stop()) p++;
            piece.from = conv.weights + stored[p].first * stored_rows + filter - stored[p].first;
            piece.step = stored[p].width();
        }
        int64_t channel = 0, tap = 0;
        for (int64_t row = 0; row < rows; row++, to += width) {
            const auto row_of = [&](int64_t c) { return tap + channels.numbers[std::min(c, channels.count - 1)]; };
            const int64_t source = channels.numbers ? row_of(channel) : row;
            const int64_t later = channels.numbers ? row_of(channel + AHEAD) : row + AHEAD;
            for (const Piece &piece : pieces) {  // what is stored beyond the row is written over, by the next
                __builtin_prefetch(piece.from + later * piece.step);
                store(to + piece.to, compress(load(piece.from + source * piece.step), piece.mask));
            }
            for (int64_t lane = stop - panel.first; lane < width; lane++) to[lane] = 0;
            if (++channel == channels.count) channel = 0, tap += conv.channels;
        }
    }

    // Tiles [first, stop) of a panel.
    void compute(Panel panel, int64_t depth, int64_t first, int64_t stop, const float *weights,
                 const float *zeros) const {
        const int64_t taps = conv.kernel_height * conv.kernel_width, pixels = conv.out_height * conv.out_width;
        const int64_t most = tile_size(panel), width = panel.width();
        const int64_t filled = std::min(filters.count - panel.first, width);
        std::vector<const float *> pointers(taps * MOST_PIXELS);
        std::vector<float> buffer(MOST_PIXELS * width + LANES), bias(width);
        for (int64_t j = 0; conv.bias && j < filled; j++)
            bias[j] = conv.bias[filters.numbers ? filters.numbers[panel.first + j] : panel.first + j];
        const std::vector<Piece> pieces =
            adds ? find_pieces(filters, panel.first, panel.first + filled) : std::vector<Piece>{};
        const bool direct = panel.first + width <= room && !(adds && filters.numbers);
        const Bounds bounds(direct || !adds ? function : IDENTITY);
        const bool cuts = only_cuts(function);
        const Tile whole = find_tile(panel.halves, most);
        for (int64_t number = first; number < stop; number++) {
            const int64_t pixel = number * most, count = std::min(most, pixels - pixel);
            point(conv, x, pixel, count, zeros, pointers.data());
            const Tile tile = count == most ? whole : find_tile(panel.halves, count);
            float *to = y.data + pixel * y.room + panel.first, *made = direct ? to : buffer.data();
            const int64_t step = direct ? y.room : width;
            tile(pointers.data(), taps, depth, weights, bias.data(), direct && adds, bounds, made, step);
            if (!cuts) finish(function, made, count, width, step);
            for (int64_t i = 0; i < count && !direct; i++) {
                if (adds)
                    add(pieces, buffer.data() + i * width, y.data + (pixel + i) * y.room);
                else
                    std::memcpy(to + i * y.room, buffer.data() + i * width, filled * sizeof(float));
            }
        }
    }

    // to += the filters' values at their places, then the function there, a ReLU or none. Nothing else is written: a
    // neighbour in the same vector may be another thread's.
    void add(const std::vector<Piece> &pieces, const float *values, float *to) const {
        const bool relu = function == RELU;
        for (const Piece &piece : pieces) {
            float *place = to + piece.vector * LANES;
#if defined(__AVX512F__)
            const __m512 added = _mm512_maskz_expand_ps(piece.mask, _mm512_loadu_ps(values + piece.to));
            const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(piece.mask, place), added);
            _mm512_mask_storeu_ps(place, piece.mask, relu ? (__m512)positive((Vector)sum) : sum);
#else
            const float *value = values + piece.to;
            for (uint32_t mask = piece.mask; mask; mask &= mask - 1) {
                float &number = place[__builtin_ctz(mask)];
                number += *value++;
                if (relu && number < 0) number = 0;
            }
#endif
        }
    }
};
