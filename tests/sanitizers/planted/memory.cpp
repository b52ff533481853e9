// What AddressSanitizer and UndefinedBehaviorSanitizer have to find; a library that Python loads.

#include <cstdint>
#include <memory>

// Reads one past the end when size is 8.
extern "C" int planted_read(int size) {
  const volatile int length = 8;  // which the compiler must not know
  const std::unique_ptr<int[]> values(new int[length]());
  const volatile int* first = values.get();
  return first[size];
}

// Shifts by more than an int has when size is 8.
extern "C" int planted_shift(int size) {
  const volatile int one = 1;
  return one << 4 * size;
}
