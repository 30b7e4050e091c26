// Runs a kernel over files of the working directory: a block is a process with a thread for each of its own.
//
//     main BLOCKS SEQUENCES MAX_PAGES QUERY_HEADS KV_HEADS COLUMN_TILES SPLITS SCALE SOFT_CAP FIELD_OFFSET*5
//
// Reads query, memory, page_table, lengths, query_starts; writes out and lse over what these files hold.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include KERNEL

template <typename T>
T* mapped(const char* name) {
  const int file = open(name, O_RDWR);
  struct stat status;
  if (file < 0 || fstat(file, &status)) std::exit(2);
  void* const all = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (all == MAP_FAILED) std::exit(2);
  return static_cast<T*>(all);
}

int main(int, char** arguments) {
  const auto number = [&](int i) { return std::atoi(arguments[i]); };
  const auto field = [&](int i) { return std::atoll(arguments[10 + i]); };
  void* const query = mapped<void>("query");
  const auto memory = mapped<uint8_t>("memory");
  const auto page_table = mapped<int>("page_table"), lengths = mapped<int>("lengths");
  const auto query_starts = mapped<int>("query_starts");
  const auto out = mapped<float>("out"), lse = mapped<float>("lse");
  const auto partial = mapped<uint2>("partial");
  const uint32_t mark = 0xFFC00007u;
  gridDim.x = number(1);
  for (int block = 0; block < number(1); block++) {
    if (fork()) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    blockIdx.x = block;
    std::memset(shared, 0xFF, sizeof shared);
    std::vector<std::thread> threads;
    for (int i = 0; i < 32 * WARPS; i++)
      threads.emplace_back([=] {
        threadIdx.x = i;
        attend(query, memory, page_table, lengths, query_starts, out, lse, partial, field(0), field(1),
               field(2), field(3), field(4), number(2), number(3), number(4), number(5), number(6),
               number(7), std::atof(arguments[8]), std::atof(arguments[9]), mark);
      });
    for (std::thread& thread : threads) thread.join();
    std::_Exit(0);
  }
  int status, failed = 0;
  while (wait(&status) > 0) failed |= status;
  return failed != 0;
}
