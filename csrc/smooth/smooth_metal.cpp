// Host side of smooth.metal: shapes, grid, order of buffers. Compiled on every platform.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "smooth/smooth.h"

namespace bulwark {
namespace {
// These stand in smooth.metal too.
constexpr uint32_t COPY_THREADS = 512, VOTE_THREADS = 256, SLOTS = 4096;
constexpr uint64_t MOST_HELD = 4096;
// A threadgroup that holds few values draws more tiles twice, at both ends of each copy.
constexpr uint64_t LEAST_HELD = 1280;
// Each of so many copies reads the input once more, which is what keeps it below 2 % of what is written.
constexpr uint64_t COPIES_A_READING = 60, MOST_COPIES_EACH = 1 << 18;
constexpr uint64_t MANY_GROUPS = 256;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

uint32_t group_count(uint64_t groups) {
  if (groups > std::numeric_limits<uint32_t>::max()) throw std::runtime_error("[bulwark] too many rows for Metal");
  return uint32_t(groups);
}
}  // namespace

void NoisyCopies::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  if (out[0].size() == 0) return;
  const uint64_t size = in[0].size(), copies = copies_.n;
  const uint64_t readings = std::max<uint64_t>(1, copies / COPIES_A_READING);
  uint64_t width = std::min(size, MOST_HELD);
  if (size > MOST_HELD) width = std::clamp(size * readings / MANY_GROUPS, LEAST_HELD, MOST_HELD);
  const uint64_t ranges = ceil_div(size, width);
  const uint64_t slices = std::min(readings, ceil_div(MANY_GROUPS, ranges));
  const uint64_t each = std::min(ceil_div(copies, slices), MOST_COPIES_EACH);
  auto& l = copies_.limits;
  const std::array<float, 6> limits{l.low, l.high, l.scale, l.width, l.steps, l.steps ? 1 / l.steps : 0};
  KernelCall call{smooth_source, std::string("noisy_copies") + suffix(out[0].dtype()),
                  group_count(ranges * ceil_div(copies, each)), COPY_THREADS};
  call.in(in[0]).out(out[0]).in(in[1]).in(in[2]).in(in[3]).bytes(limits);
  call.bytes(size).bytes(uint32_t(copies)).bytes(uint32_t(each)).bytes(uint32_t(width));
  call.constant(0, copies_.distribution == Distribution::uniform).constant(1, l.bounded);
  launch(stream(), call.constant(2, l.steps != 0));
}

void CountVotes::metal(const Arrays& in, Arrays& out) {
  allocate(stream(), out[0]);
  const uint32_t rows = in[0].shape(0), classes = in[0].shape(1);
  const auto winners = temporary(stream(), {int(rows)}, mx::uint32);
  uint32_t width = 1;
  while (width < classes && width < 32) width *= 2;
  if (rows) {
    KernelCall find{smooth_source, std::string("find_winners") + suffix(in[0].dtype()),
                    group_count(ceil_div(uint64_t(rows) * width, VOTE_THREADS)), VOTE_THREADS};
    launch(stream(), find.in(in[0]).out(winners).bytes(rows).bytes(classes).bytes(width));
  }
  KernelCall add{smooth_source, "add_votes", uint32_t(ceil_div(classes + 1, SLOTS)), VOTE_THREADS};
  launch(stream(), add.in(winners).in(in[1]).out(out[0]).bytes(rows).bytes(classes + 1));
}
}  // namespace bulwark
