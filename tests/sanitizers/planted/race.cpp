// What ThreadSanitizer has to find: two threads count in one plain integer.

#include <thread>

int main() {
  volatile int count = 0;
  const auto run = [&] {
    for (int i = 0; i < 1000; ++i) count = count + 1;
  };
  std::thread other(run);
  run();
  other.join();
  return 0;
}
