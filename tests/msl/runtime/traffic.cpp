// Lines of 64 bytes that simdgroups touch. Lanes run one after the other here, so what they would have done together is
// put together afterwards: the k-th execution of one instruction by each lane is one access of the simdgroup.
#include <algorithm>
#include <tuple>
#include <unordered_map>

#include "machine.h"

namespace msl {
void log_lines(uintptr_t address, size_t bytes, bool write, const void* pc) {
  if (options.lines)
    current->log.push_back(
        {reinterpret_cast<uintptr_t>(pc), address / line_size, (address + bytes - 1) / line_size, write});
}

void count_lines(unsigned first, unsigned end) {
  std::vector<std::tuple<uintptr_t, uint32_t, uintptr_t, bool>> touches;  // pc, execution, line, write
  for (unsigned i = first; i < end; i++) {
    std::unordered_map<uintptr_t, uint32_t> executions;
    for (auto& t : fibers[i].log) {
      uint32_t execution = executions[t.pc]++;
      for (uintptr_t line = t.first_line; line <= t.last_line; line++)
        touches.emplace_back(t.pc, execution, line, t.write);
    }
    fibers[i].log.clear();
  }
  std::sort(touches.begin(), touches.end());
  touches.erase(std::unique(touches.begin(), touches.end()), touches.end());
  for (size_t i = 0; i < touches.size(); i++) {
    auto& [pc, execution, line, write] = touches[i];
    // A buffer starts on a line, so that a line that it touches has its first byte there.
    Region* region = region_at(line * line_size);
    if (!region) continue;
    bool first_line = i == 0 || std::get<0>(touches[i - 1]) != pc || std::get<1>(touches[i - 1]) != execution;
    (write ? region->traffic.lines_written : region->traffic.lines_read)++;
    (write ? region->traffic.accesses_written : region->traffic.accesses_read) += first_line;
  }
}
}  // namespace msl
