// Attention of packed rows through a row table, on the CPU in fp32: keys and values are read where they lie.
#pragma once

#include <cstdint>
#include <string>

namespace kedit {

// out[rows, heads, dim] = softmax(softcap(query key^T scale)) value. A row sees the positions p of its run with
// pos - window < p <= pos that have a slot, 0 <= key_rows[run, p] < slots; nothing else is read.
//
// Strides are in elements, the numbers of a head lie side by side, and out is contiguous. heads is a multiple of
// kv_heads. softcap: 0 for none; sinks: [heads] or null.
struct Attention {
    float* out;
    const float *query, *key, *value;
    const int64_t *key_rows, *run, *pos;
    const float* sinks;
    int64_t rows, heads, kv_heads, dim, slots, runs, positions;
    int64_t query_row, query_head, key_slot, key_head, value_slot, value_head, run_stride;
    float scale, softcap;
    int64_t window;
};

// The same to the bit for every number of threads and, in a table without holes, for a row whatever rows are beside it.
// Throws
// std::invalid_argument for an unknown instruction set, or a row whose run or position is not in the table.
void attention(const Attention& call, int threads, const std::string& instruction_set);

}  // namespace kedit
