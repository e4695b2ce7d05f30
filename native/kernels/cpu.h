// What this processor and operating system can run (cpuid and XGETBV, or the auxiliary vector on ARM).
#pragma once

namespace haomiao {

// isa: "scalar", "avx2", "avx512", "avx512_bf16", "neon". False for names that are unknown or compiled out.
bool cpu_supports(const char* isa);
// Names this machine can run, best first, ended by nullptr.
const char* const* available_isas();

}  // namespace haomiao
