// Runs a list of operations on a batch of images, each under its own gates; see convolution.h for how tensors lie.
//
// With many images, each thread takes one at a time through all the operations, so that what is held between them stays
// in its cache. With few, the threads work on one image together.

#include <omp.h>

#include <cmath>

#include "convolution.h"
#include "depthwise.h"

// A tensor: of each image at `data` + image * `step`, or in the arena at offset `step` where `data` is null.
struct Value {
    float *data;
    int64_t step, room;
};

enum Kind : int64_t { KINDS };  // library.py names them
enum Adds : int64_t { NO, TO_VALUE, TO_ZEROS };  // the last: what ZEROS made, which there is where filters are closed

// target = kind(source, other). Patterns are those of what is read and of what is written, -1 where it is dense.
struct Op {
    int64_t kind, function, source, other, target, reads, writes, adds;
    Conv shape;
};

// For each image, the open channels of each pattern: pattern p's list starts at `offsets[p]` of its numbers.
struct Live {
    const int64_t *offsets;
    int64_t patterns;
    const int32_t *numbers, *counts;

    List list(int64_t pattern, int64_t image, int64_t all) const {
        if (pattern < 0) return {nullptr, all};
        const int64_t count = counts[image * patterns + pattern];
        return {count == all ? nullptr : numbers + image * offsets[patterns] + offsets[pattern], count};
    }
};

namespace {

struct Runner {
    const Value *values;
    const Live &live;
    float *arena, *common, *workspace;  // for values; for the team, and for each of it
    int64_t image;
    Team team;

    Image at(int64_t value) const {
        const Value &v = values[value];
        return {v.data ? v.data + image * v.step : arena + v.step, v.room};
    }

    void run(const Op &op) const {
        const Conv &s = op.shape;
        const Image x = at(op.source), y = at(op.target);
        const List reads = live.list(op.reads, image, s.channels), writes = live.list(op.writes, image, s.filters);
        const int64_t pixels = s.out_height * s.out_width;
        switch (op.kind) {
            case CONV:
                if (writes.count > 0) {
                    const bool adds = op.adds == TO_VALUE || (op.adds == TO_ZEROS && writes.numbers);
                    if (s.groups > 1)
                        grouped(s, x, reads, writes, y, op.function);
                    else
                        Convolution{s, x, reads, writes, y, y.room, adds, op.function, team, common, workspace}.run();
                }
                break;
            case DEPTHWISE: Depthwise{s, x, y, writes, op.function, team}.run(); break;
            case ADD: add(pixels, x, at(op.other), y, writes.count, op.function == RELU); break;
            case ADD_OPEN: add_open(pixels, x, y, reads, s.filters, op.function == RELU); break;
            case EXPAND:
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
                    std::memset(y.data + pixel * y.room, 0, s.filters * sizeof(float));
                add_open(pixels, x, y, reads, s.filters, false);
                break;
            case COMPRESS:
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
                    for (int64_t j = 0; j < writes.count; j++)
                        y.data[pixel * y.room + j] = x.data[pixel * x.room + (writes.numbers ? writes.numbers[j] : j)];
                break;
            case MAX_POOL: max_pool(s, x, y, writes.count); break;
            case AVERAGE_POOL: average_pool(s, x, y, writes.count, op.function != 0); break;
            case MEAN: mean(s.height * s.width, x, y, writes.count); break;
            case POINTWISE: pointwise(op.function, pixels, x, y, writes.count); break;
            case SCALE: scale(pixels, x, at(op.other), y, writes.count, s.height * s.width); break;
            case CAT: {  // x behind those channels of y that come before channel `offset`
                const int64_t start = writes.before(s.offset);
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
                    std::memcpy(y.data + pixel * y.room + start, x.data + pixel * x.room, reads.count * sizeof(float));
                break;
            }
            case SUBSAMPLE:
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++) {
                    const int64_t row = pixel / s.out_width * s.stride_height, column = pixel % s.out_width * s.stride_width;
                    std::memcpy(y.data + pixel * y.room, x.data + (row * s.width + column) * x.room,
                                writes.count * sizeof(float));
                }
                break;
            case PAD:  // with channels of zeros, the first `offset` of them in front
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++) {
                    float *to = y.data + pixel * y.room;
                    std::memset(to, 0, writes.count * sizeof(float));
                    std::memcpy(to + s.offset, x.data + pixel * x.room, s.channels * sizeof(float));
                }
                break;
            case ZEROS:
                for (int64_t pixel = team.begin(pixels); writes.numbers && pixel < team.end(pixels); pixel++)
                    std::memset(y.data + pixel * y.room, 0, s.filters * sizeof(float));
                break;
            case RELU_CLOSED:  // the convolution before did it at its open filters; once more does no harm
                if (writes.numbers) pointwise(RELU, pixels, y, y, s.filters);
                break;
            case COPY:
                for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
                    std::memcpy(y.data + pixel * y.room, x.data + pixel * x.room, writes.count * sizeof(float));
                break;
        }
    }

    // Each group is a convolution of its own. What is open of it lies together in x and in y, behind the groups before.
    void grouped(Conv conv, Image x, List reads, List writes, Image y, int64_t function) const {
        const int64_t groups = conv.groups, channels = conv.channels / groups, filters = conv.filters / groups;
        const int64_t weights = conv.kernel_height * conv.kernel_width * channels * packed(filters);
        const bool whole = groups >= team.size;  // then each of the team does whole groups, else all work on each
        const int64_t begin = whole ? team.begin(groups) : 0, end = whole ? team.end(groups) : groups;
        conv.channels = channels, conv.filters = filters;
        for (int64_t group = begin; group < end; group++) {
            const Group in(reads, group, channels), out(writes, group, filters);
            if (out.start == out.stop) continue;
            // Behind the group's filters lie those that come next, or that another of the team writes.
            const int64_t next = whole ? end : group + 1;
            const int64_t room = next == groups ? y.room : writes.before(next * filters);
            Conv part = conv;
            part.weights += group * weights;
            if (part.bias) part.bias += group * filters;
            Convolution{part, {x.data + in.start, x.room}, in.list(), out.list(), {y.data + out.start, y.room},
                        room - out.start, false, function, whole ? Team{0, 1} : team, common, workspace}
                .run();
        }
    }

    // Calls use(tap, pixel) for each tap of an output pixel that lies inside the image.
    template <class Use>
    static void for_taps(const Conv &s, int64_t row, int64_t column, Use use) {
        for (int64_t ky = 0; ky < s.kernel_height; ky++) {
            const int64_t source_row = row * s.stride_height - s.pad_height + ky * s.dilation_height;
            if (source_row < 0 || source_row >= s.height) continue;
            for (int64_t kx = 0; kx < s.kernel_width; kx++) {
                const int64_t source_column = column * s.stride_width - s.pad_width + kx * s.dilation_width;
                if (source_column < 0 || source_column >= s.width) continue;
                use(ky * s.kernel_width + kx, source_row * s.width + source_column);
            }
        }
    }

    void max_pool(const Conv &s, Image x, Image y, int64_t count) const {
        const int64_t pixels = s.out_height * s.out_width;
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
            for (int64_t first = 0; first < count; first += LANES) {
                Vector most = Vector{} - INFINITY;
                for_taps(s, pixel / s.out_width, pixel % s.out_width, [&](int64_t, int64_t source) {
                    const Vector value = part(x.data + source * x.room + first, count - first);
                    most = (value > most) | (value != value) ? value : most;  // NaN stays
                });
                store_part(y.data + pixel * y.room + first, most, count - first);
            }
    }

    // Where `margins` count, zeros around the image are a part of the mean.
    void average_pool(const Conv &s, Image x, Image y, int64_t count, bool margins) const {
        const int64_t pixels = s.out_height * s.out_width, all = s.kernel_height * s.kernel_width;
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
            for (int64_t first = 0; first < count; first += LANES) {
                Vector sum = {};
                int64_t inside = 0;
                for_taps(s, pixel / s.out_width, pixel % s.out_width, [&](int64_t, int64_t source) {
                    sum += part(x.data + source * x.room + first, count - first);
                    inside++;
                });
                store_part(y.data + pixel * y.room + first, sum / static_cast<float>(margins ? all : inside), count - first);
            }
    }

    // Each channel's pixels in four sums: one alone would wait for itself.
    void mean(int64_t pixels, Image x, Image y, int64_t count) const {
        const int64_t vectors = divide_up(count, LANES);
        for (int64_t first = team.begin(vectors) * LANES; first < team.end(vectors) * LANES; first += LANES) {
            const float *from = x.data + first;
            Vector sums[4] = {};
            int64_t pixel = 0;
            for (; pixel + 4 <= pixels; pixel += 4)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sums[i] += part(from + (pixel + i) * x.room, count - first);
            for (; pixel < pixels; pixel++) sums[0] += part(from + pixel * x.room, count - first);
            const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            store_part(y.data + first, sum / static_cast<float>(pixels), count - first);
        }
    }

    void add(int64_t pixels, Image a, Image b, Image y, int64_t count, bool relu) const {
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++) {
            const float *first = a.data + pixel * a.room, *second = b.data + pixel * b.room;
            float *to = y.data + pixel * y.room;
            for (int64_t c = 0; c < count; c++) {
                const float sum = first[c] + second[c];
                to[c] = relu && sum < 0 ? 0 : sum;
            }
        }
    }

    // y += x at the open channels, then ReLU on all.
    void add_open(int64_t pixels, Image x, Image y, List open, int64_t channels, bool relu) const {
        const std::vector<Piece> pieces = find_pieces(open, 0, open.count);
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++) {
            const float *from = x.data + pixel * x.room;
            float *to = y.data + pixel * y.room;
            for (const Piece &piece : pieces) {
                const int64_t first = piece.vector * LANES;
                const Vector added = expand(part(from + piece.to, open.count - piece.to), piece.mask);
                store_part(to + first, part(to + first, channels - first) + added, channels - first);
            }
            for (int64_t c = 0; relu && c < channels; c++) to[c] = to[c] < 0 ? 0 : to[c];
        }
    }

    // y = x * factor, which has one pixel for all, or as many as x.
    void scale(int64_t pixels, Image x, Image factor, Image y, int64_t count, int64_t factor_pixels) const {
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++) {
            const float *by = factor.data + (factor_pixels == 1 ? 0 : pixel * factor.room);
            for (int64_t first = 0; first < count; first += LANES) {
                const Vector value = part(x.data + pixel * x.room + first, count - first) * part(by + first, count - first);
                store_part(y.data + pixel * y.room + first, value, count - first);
            }
        }
    }

    void pointwise(int64_t function, int64_t pixels, Image x, Image y, int64_t count) const {
        for (int64_t pixel = team.begin(pixels); pixel < team.end(pixels); pixel++)
            for (int64_t first = 0; first < count; first += LANES) {
                const Vector value = apply(function, part(x.data + pixel * x.room + first, count - first));
                store_part(y.data + pixel * y.room + first, value, count - first);
            }
    }
};

}  // namespace

extern "C" {

// Bytes of what library.py has twins of.
int64_t size_of(int64_t number) {
    const size_t sizes[] = {sizeof(Conv), sizeof(Op), sizeof(Value), sizeof(Live)};
    return static_cast<int64_t>(sizes[number]);
}

int64_t half_lanes() { return HALF; }

int64_t panel_lanes() { return VECTORS * LANES; }

// Weights of each group's filters (filters, channels, taps) -> panels, with zeros behind the last filter.
void pack_weights(const float *weights, int64_t groups, int64_t filters, int64_t channels, int64_t taps, float *to) {
    for (; groups > 0; groups--, weights += filters * channels * taps)
        for (const Panel &panel : split(filters))
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t channel = 0; channel < channels; channel++)
                    for (int64_t lane = 0; lane < panel.width(); lane++) {
                        const int64_t filter = panel.first + lane;
                        *to++ = filter < filters ? weights[(filter * channels + channel) * taps + tap] : 0;
                    }
}

// The inverse.
void unpack_weights(const float *from, int64_t groups, int64_t filters, int64_t channels, int64_t taps, float *to) {
    for (; groups > 0; groups--, to += filters * channels * taps)
        for (const Panel &panel : split(filters))
            for (int64_t tap = 0; tap < taps; tap++)
                for (int64_t channel = 0; channel < channels; channel++, from += panel.width())
                    for (int64_t lane = 0; lane < panel.width() && panel.first + lane < filters; lane++)
                        to[((panel.first + lane) * channels + channel) * taps + tap] = from[lane];
}

// Lists of open channels: for each image and pattern, those whose gate is open; column -1 is always open, -2 never.
void open_channels(const float *gates, int64_t images, int64_t num_gates, const int64_t *columns, const int64_t *offsets,
                   int64_t patterns, int32_t *counts, int32_t *numbers) {
    for (int64_t image = 0; image < images; image++)
        for (int64_t p = 0; p < patterns; p++) {
            int32_t *start = numbers + image * offsets[patterns] + offsets[p], *next = start;
            for (int64_t c = offsets[p]; c < offsets[p + 1]; c++) {
                *next = static_cast<int32_t>(c - offsets[p]);
                next += columns[c] < 0 ? columns[c] == -1 : gates[image * num_gates + columns[c]] > 0;
            }
            counts[image * patterns + p] = static_cast<int32_t>(next - start);
        }
}

// Run `count` operations on each image; every thread has an arena, `arena_step` apart.
void run(const Op *ops, int64_t count, const Value *values, int64_t images, const Live *live, float *arenas,
         int64_t arena_step, int64_t workspace, int64_t threads) {
    if (threads > 1 && (images % threads == 0 || images >= 4 * threads)) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t image = 0; image < images; image++) {
            const NoDenormals fast;
            float *arena = arenas + omp_get_thread_num() * arena_step;
            const Runner runner = {values, *live, arena, arena + workspace, arena + workspace, image, {0, 1}};
            for (int64_t i = 0; i < count; i++) runner.run(ops[i]);
        }
        return;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < images; image++) {
        const NoDenormals fast;
        const Team team = {omp_get_thread_num(), omp_get_num_threads()};
        float *own = arenas + team.id * arena_step + workspace;
        const Runner runner = {values, *live, arenas, arenas + workspace, own, image, team};
        for (int64_t i = 0; i < count; i++) {
            runner.run(ops[i]);
            runner.team.wait();
        }
    }
}
}
