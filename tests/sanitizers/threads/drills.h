// What the threads are put through. A drill that finds a wrong result ends the program; races are
// ThreadSanitizer's to find.

#ifndef OCTAVO_TESTS_SANITIZERS_THREADS_DRILLS_H_
#define OCTAVO_TESTS_SANITIZERS_THREADS_DRILLS_H_

namespace octavo::tests {

// Jobs of every small size, from one caller and from two, for threads that spin and threads that
// sleep; ends and forks of idle pools. A round takes about 10 ms.
void DrillPool(int num_rounds);

// Append, decode and copies of blocks with many threads, held against one thread. A round takes
// about 100 ms.
void DrillLaunches(int num_rounds);

}  // namespace octavo::tests

#endif  // OCTAVO_TESTS_SANITIZERS_THREADS_DRILLS_H_
