// A check that ends the program with words.

#ifndef OCTAVO_TESTS_SANITIZERS_THREADS_CHECK_H_
#define OCTAVO_TESTS_SANITIZERS_THREADS_CHECK_H_

#include <cstdio>
#include <cstdlib>

namespace octavo::tests {

inline void Check(bool is_true, const char* what) {
  if (is_true) return;
  std::fprintf(stderr, "not true: %s\n", what);
  std::exit(1);
}

}  // namespace octavo::tests

#endif  // OCTAVO_TESTS_SANITIZERS_THREADS_CHECK_H_
