// A key is loaded once for up to four queries: the heads of a row that share it, or where these are one or two those of
// several rows of a run. Their scores lie in a cache from the pass over the keys to that over the values.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "second_moment.h"
#include "team.h"
#include "vectors.h"

namespace kedit {
namespace {

constexpr int kMost = 4;        // queries of a block
constexpr int64_t kLine = 16;  // floats of the longest vector

// One head of one row, which sees the keys from begin to end of its block.
struct Query {
    const float* q;
    float* out;
    int64_t begin, end;
    float sink;
};

// Queries of one key head, and the slots of the keys that one of them sees. In front of these are as many others as
// bring position p to lane p mod 16: so a row's sums are the same whatever rows are beside it.
struct Block {
    Query query[kMost];
    int64_t* slot;
    int64_t keys;
    float* parts;   // of the scores of a vector of keys: a vector each, to be summed up
    float* scores;  // of each query, apart from one another
    int64_t apart;
};

using Attend = void (*)(const Attention& call, const Block& block, int64_t kv_head);

#define KEDIT_ROWS "attention_rows.h"
#include "each_instruction_set.h"

void check(const Attention& call) {
    for (int64_t row = 0; row < call.rows; ++row)
        if (call.run[row] < 0 || call.run[row] >= call.runs || call.pos[row] < 0 || call.pos[row] >= call.positions)
            throw std::invalid_argument("attention: row " + std::to_string(row) + " is not in the table");
}

// Heads of a row that go into one block, as equally many as may be.
int64_t heads_of(int64_t group) {
    const int64_t parts = (group + kMost - 1) / kMost;
    return (group + parts - 1) / parts;
}

// How many rows from this one on, before the end and up to a block's, follow each other in its run.
int64_t together(const Attention& call, int64_t row, int64_t end) {
    end = std::min(end, row + kMost / heads_of(call.heads / call.kv_heads));
    int64_t n = 1;
    while (row + n < end && call.run[row + n] == call.run[row] && call.pos[row + n] == call.pos[row] + n) ++n;
    return n;
}

struct Span {
    int64_t begin, end;
};

// The slots of the keys that one of n rows sees, and which of them each row does; rows follow each other.
void find(const Attention& call, int64_t row, int64_t n, Block& block, Span* seen) {
    const int64_t* table = call.key_rows + call.run[row] * call.run_stride;
    const auto first = [&](int64_t i) { return std::max<int64_t>(0, call.pos[row + i] - call.window + 1); };
    int64_t p = first(0), entered = 0;
    block.keys = p % kLine;
    for (int64_t i = 0; i < n; ++i) {
        for (; p <= call.pos[row + i]; ++p) {
            for (; entered < n && first(entered) <= p; ++entered) seen[entered].begin = block.keys;
            const int64_t slot = table[p];
            if (slot >= 0 && slot < call.slots) block.slot[block.keys++] = slot;
        }
        seen[i].end = block.keys;
    }
    // what no row looks at, in front and behind (keys are taken two at a time), is a slot that there is
    const int64_t begin = first(0) % kLine, some = block.keys > begin ? block.slot[begin] : 0;
    std::fill(block.slot, block.slot + begin, some);
    block.slot[block.keys] = some;
}

// All heads of n rows, block by block.
void take(const Attention& call, const Attend* attend, Block& block, int64_t row, int64_t n, const Span* seen) {
    const int64_t group = call.heads / call.kv_heads, in_row = heads_of(group);
    for (int64_t head = 0, end; head < call.heads; head = end) {
        const int64_t kv_head = head / group;
        end = std::min(head + in_row, (kv_head + 1) * group);
        Query* query = block.query;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t h = head; h < end; ++h)
                *query++ = {
                    call.query + (row + i) * call.query_row + h * call.query_head,
                    call.out + ((row + i) * call.heads + h) * call.dim,
                    seen[i].begin,
                    seen[i].end,
                    call.sinks ? call.sinks[h] : -std::numeric_limits<float>::infinity(),
                };
        attend[query - block.query - 1](call, block, kv_head);
    }
}

constexpr int64_t kRows = 16;  // that a thread takes at a time, at most

// Numbers of the keys that all rows see, over as many as a query's own number is worth.
int64_t worth(const Attention& call) {
    int64_t keys = 0;
    for (int64_t row = 0; row < call.rows; ++row) keys += std::min(call.pos[row] + 1, call.window);
    return keys * call.heads * call.dim / kRows;
}

}  // namespace

void attention(const Attention& call, int threads, const std::string& instruction_set) {
    const Attend* attend = table_of(instruction_set);
    check(call);
    const int64_t apart = (call.positions + kLine - 1) / kLine * kLine;
    // few rows, as of texts that are written on, are shared out too
    const int64_t rows = std::clamp<int64_t>(call.rows / std::max(threads, 1), 1, kRows);
    const int64_t blocks = (call.rows + rows - 1) / rows;
    const int team = static_cast<int>(std::min<int64_t>(team_for(worth(call), threads), std::max<int64_t>(blocks, 1)));
    // here, where running out of memory can be told
    constexpr int64_t kParts = kMost * kLine * kLine;
    const int64_t each = kParts + kMost * apart;
    std::vector<float> floats(team * each + kLine);
    float* const aligned = floats.data() + kLine - reinterpret_cast<uintptr_t>(floats.data()) / sizeof(float) % kLine;
    std::vector<int64_t> slots(team * (apart + kLine));
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        float* const own = aligned + thread * each;
        Block block{{}, slots.data() + thread * (apart + kLine), 0, own, own + kParts, apart};
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t end = std::min(call.rows, (i + 1) * rows);
            for (int64_t row = i * rows, n; row < end; row += n) {
                Span seen[kMost];
                n = together(call, row, end);
                find(call, row, n, block, seen);
                take(call, attend, block, row, n, seen);
            }
        }
    }
}

}  // namespace kedit
