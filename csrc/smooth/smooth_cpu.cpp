#include <algorithm>
#include <bit>
#include <cstring>

#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/backend/cpu/encoder.h"
#include "smooth/smooth.h"

namespace bulwark {
Copies::Copies(int n, bool uniform, const std::vector<float>& bounds, int levels)
    : n(n), distribution(uniform ? Distribution::uniform : Distribution::gaussian), limits{}, levels(levels) {
  if (bounds.empty()) return;
  limits.bounded = true;
  limits.low = bounds[0], limits.high = bounds[1];
  if (levels == 0) return;
  limits.width = float(double(bounds[1]) - double(bounds[0]));
  limits.steps = float(levels - 1);
  limits.scale = float(double(limits.steps) / double(limits.width));
}

static mx::array make_copies(const mx::array& x, const mx::array& sigma, const mx::array& key, const mx::array& counter,
                             const Copies& copies, mx::Stream s) {
  auto shape = x.shape();
  shape.insert(shape.begin(), copies.n);
  Arrays in = contiguous({x, sigma, key, counter}, s);
  return mx::array(shape, x.dtype(), std::make_shared<NoisyCopies>(s, copies), std::move(in));
}

mx::array noisy_copies(const mx::array& x, int n, const mx::array& sigma, const mx::array& key,
                       const mx::array& counter, bool uniform, const std::vector<float>& bounds, int levels,
                       mx::StreamOrDevice s) {
  return make_copies(x, sigma, key, counter, Copies(n, uniform, bounds, levels), mx::to_stream(s));
}

mx::array count_votes(const mx::array& logits, const mx::array& counts, mx::StreamOrDevice sd) {
  const auto s = mx::to_stream(sd);
  return mx::array(counts.shape(), mx::int32, std::make_shared<CountVotes>(s), contiguous({logits, counts}, s));
}

std::vector<mx::Shape> NoisyCopies::output_shapes(const Arrays& in) {
  auto shape = in[0].shape();
  shape.insert(shape.begin(), copies_.n);
  return {shape};
}

std::vector<int64_t> NoisyCopies::parameters() const {
  auto& l = copies_.limits;
  auto p = NoiseOp::parameters();
  p.insert(p.end(), {copies_.n, copies_.distribution == Distribution::uniform, l.bounded,
                     std::bit_cast<uint32_t>(l.low), std::bit_cast<uint32_t>(l.high), copies_.levels});
  return p;
}

// By x: the sum of the cotangents over the copies, without those of values that were clipped, for which the noise is
// drawn again.
Arrays NoisyCopies::vjp(const Arrays& in, const Arrays& cotangents, const std::vector<int>& argnums,
                        const Arrays& out) {
  if (argnums != std::vector<int>{0}) return Op::vjp(in, cotangents, argnums, out);
  const auto s = stream();
  auto c = mx::astype(cotangents[0], mx::float32, s);
  if (copies_.limits.bounded) {
    Copies free(copies_.n, copies_.distribution == Distribution::uniform, {}, 0);
    auto v = make_copies(mx::astype(in[0], mx::float32, s), in[1], in[2], in[3], free, s);
    auto clipped = mx::logical_or(mx::less(v, mx::array(copies_.limits.low), s),
                                  mx::greater(v, mx::array(copies_.limits.high), s), s);
    c = mx::where(clipped, mx::array(0.0f), c, s);
  }
  return {mx::astype(mx::sum(c, 0, false, s), in[0].dtype(), s)};
}

namespace {
constexpr size_t TILES = 32;        // of a task: some 20 us of one core
constexpr size_t LOGITS = 1 << 16;  // the same

Float float_of(mx::Dtype d) { return d == mx::float32 ? Float::f32 : d == mx::float16 ? Float::f16 : Float::bf16; }

// An input that repeats: for tiles over its end there is a buffer with its last values and what follows them.
class Repeated {
 public:
  Repeated(const char* x, size_t size, size_t item)
      : x_(x), size_(size), item_(item), first_(size - std::min(size, NORMALS_PER_TILE)) {
    const size_t held = size - first_ + NORMALS_PER_TILE;
    end_.resize(held * item);
    for (size_t at = 0; at < held;) {
      const size_t from = (first_ + at) % size, n = std::min(size - from, held - at);
      std::memcpy(&end_[at * item], x + from * item, n * item);
      at += n;
    }
  }
  // A tile from value `at`, and how many values are there behind it.
  std::pair<const char*, size_t> from(size_t at) const {
    if (at + NORMALS_PER_TILE <= size_) return {x_ + at * item_, size_ - at};
    return {&end_[(at - first_) * item_], NORMALS_PER_TILE};
  }

 private:
  const char* x_;
  const size_t size_, item_, first_;
  std::vector<char> end_;
};
}  // namespace

void NoisyCopies::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  if (out[0].size() == 0) return;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [copies = copies_, x = in[0].data<char>(), size = in[0].size(), item = in[0].itemsize(),
       type = float_of(in[0].dtype()), sigma = in[1].data<float>(), key = in[2].data<uint32_t>(),
       counter = in[3].data<uint32_t>(), y = out[0].data<char>(), n = out[0].size(), domain = domain] {
        NoiseStream s{{}, uint64_t(counter[1]) << 32 | counter[0], {domain[0], domain[1]}};
        std::copy(key, key + 8, s.key);
        const Repeated input(x, size, item);
        const auto add = BULWARK_PICK(smooth_kernels).add_draws[int(type)];
        constexpr size_t chunk = TILES * NORMALS_PER_TILE;
        parallel_for((n + chunk - 1) / chunk, [&](size_t i) {
          const size_t end = std::min(n, (i + 1) * chunk);
          for (size_t at = i * chunk; at < end;) {
            const auto [from, there] = input.from(at % size);
            const size_t some = std::min(end - at, there / NORMALS_PER_TILE * NORMALS_PER_TILE);
            add(s, copies.distribution, *sigma, copies.limits, at / NORMALS_PER_TILE, from, y + at * item, some);
            at += some;
          }
        });
      });
}

void CountVotes::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  const size_t rows = in[0].shape(0), classes = in[0].shape(1);
  mx::cpu::get_command_encoder(stream()).dispatch([rows, classes, x = rows ? in[0].data<char>() : nullptr,
                                                   item = in[0].itemsize(), type = float_of(in[0].dtype()),
                                                   before = in[1].data<int32_t>(), counts = out[0].data<int32_t>()] {
    std::copy(before, before + classes + 1, counts);
    const size_t chunk = std::max<size_t>(1, LOGITS / classes);
    std::vector<int32_t> winners(rows);
    parallel_for((rows + chunk - 1) / chunk, [&](size_t i) {
      const size_t at = i * chunk, n = std::min(chunk, rows - at);
      BULWARK_PICK(smooth_kernels).winners[int(type)](x + at * classes * item, n, classes, &winners[at]);
    });
    for (auto w : winners) counts[w]++;
  });
}
}  // namespace bulwark
