// How many threads a piece of work is worth.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kedit {

// Of `threads`, as many as have 32,768 elements each, as torch counts it; at least one.
inline int team_for(int64_t elements, int threads) {
    constexpr int64_t kGrain = 32768;
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, 1 + elements / kGrain)));
}

}  // namespace kedit
