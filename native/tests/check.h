// A native test is a program that returns 0 when every CHECK held.
#pragma once
#include <cstdio>

namespace haomiao_test {
inline int failures = 0;
}

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
      ++haomiao_test::failures;                                                          \
    }                                                                                    \
  } while (0)
