// A rows header compiled once for each instruction set: a template cannot take from its argument the attribute that lets
// a function use instructions. Included inside a namespace, behind vectors.h and second_moment.h. Expected:
//   KEDIT_ROWS  the header, quoted; it is given V, the vectors, and KEDIT_TARGET, that attribute, and defines kTable

namespace plain {
using V = PlainVector;
#define KEDIT_TARGET
#include KEDIT_ROWS
#undef KEDIT_TARGET
}  // namespace plain

#ifdef KEDIT_X86

namespace avx2 {
using V = Avx2Vector;
#define KEDIT_TARGET __attribute__((target("avx2,fma")))
#include KEDIT_ROWS
#undef KEDIT_TARGET
}  // namespace avx2

namespace avx512 {
using V = Avx512Vector;
#define KEDIT_TARGET __attribute__((target("avx512f")))
#include KEDIT_ROWS
#undef KEDIT_TARGET
}  // namespace avx512

#endif  // KEDIT_X86

// The header's table for an instruction set; empty takes the best.
const auto& table_of(const std::string& instruction_set) {
    const std::string name = known_instruction_set(instruction_set);
#ifdef KEDIT_X86
    if (name == "avx512" || name == "avx512_bf16") return avx512::kTable;
    if (name == "avx2") return avx2::kTable;
#endif
    return plain::kTable;
}
