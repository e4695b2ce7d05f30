// What this machine can do at most: the figures that every speed is stated against.
#pragma once

namespace haomiao {

// Streaming read bandwidth in GB/s (1e9 bytes per second): `threads` threads read their share of a buffer of
// `megabytes` MB again and again for about `seconds`; the best pass counts. 0 if the memory cannot be had.
double read_bandwidth(int threads, int megabytes, double seconds);

// Peak of 8-bit dot products in GOPS (1e9 multiplications and additions per second): the best instruction of this
// machine's best instruction set, on registers only, on `threads` threads at once for about `seconds`.
double int8_peak(int threads, double seconds);

// The same for fused multiply-adds of f32, in GFLOPS.
double f32_peak(int threads, double seconds);

}  // namespace haomiao
