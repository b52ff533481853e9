// threads NUM_ROUNDS: drills the thread pool and the launchers. Exits with 0 when all went well.

#include "check.h"
#include "drills.h"

int main(int argc, char** argv) {
  octavo::tests::Check(argc == 2, "the only argument is the number of rounds");
  const int num_rounds = std::atoi(argv[1]);
  octavo::tests::Check(num_rounds > 0, "there is a round");
  octavo::tests::DrillPool(num_rounds);
  octavo::tests::DrillLaunches(num_rounds);
  std::puts("every drill went well");
  return 0;
}
