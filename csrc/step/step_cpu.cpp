#include <algorithm>
#include <bit>

#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/backend/cpu/encoder.h"
#include "step/step.h"

namespace bulwark {
mx::array projected_step(const mx::array& x, const mx::array& grad, const mx::array& origin, const mx::array& eps,
                         const mx::array& alpha, int norm, float low, float high, mx::StreamOrDevice sd) {
  const auto s = mx::to_stream(sd);
  auto op = std::make_shared<ProjectedStep>(s, Norm(norm), low, high);
  return mx::array(x.shape(), x.dtype(), op, contiguous({x, grad, origin, eps, alpha}, s));
}

Arrays ProjectedStep::vjp(const Arrays& in, const Arrays&, const std::vector<int>& argnums, const Arrays&) {
  Arrays zeros;
  for (int i : argnums) zeros.push_back(mx::zeros_like(in[i], stream()));
  return zeros;
}

Arrays ProjectedStep::reference(const Arrays& in) {
  const std::vector<int64_t> p{int(norm_), std::bit_cast<uint32_t>(low_), std::bit_cast<uint32_t>(high_)};
  Arrays all = in;
  all.push_back(mx::array(p.begin(), {int(p.size())}, mx::int64));
  return Op::reference(all);
}

bool ProjectedStep::same(const Op& other) const {
  auto& o = static_cast<const ProjectedStep&>(other);
  return norm_ == o.norm_ && low_ == o.low_ && high_ == o.high_;
}

void ProjectedStep::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  if (out[0].size() == 0) return;
  const auto type = in[0].dtype();
  const size_t rows = in[0].shape(0), size = in[0].size() / rows;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [rows, size, norm = norm_, low = low_, high = high_, item = in[0].itemsize(),
       type = type == mx::float32   ? 0
              : type == mx::float16 ? 1
                                    : 2,
       x = in[0].data<char>(), g = in[1].data<char>(), o = in[2].data<char>(), eps = in[3].data<float>(),
       alpha = in[4].data<float>(), eps_of = size_t(in[3].size() > 1), alpha_of = size_t(in[4].size() > 1),
       y = out[0].data<char>()] {
        const auto run = BULWARK_PICK(step_kernels).step[int(norm)][type];
        constexpr size_t PIECE = 16384, LANES = 16;
        const size_t piece = norm == Norm::linf ? std::min(size, PIECE) : size, pieces = (size + piece - 1) / piece;
        const size_t each = std::max<size_t>(1, PIECE / size), tasks = (rows + each - 1) / each;  // short rows together
        parallel_for(tasks * pieces, [&](size_t task) {
          std::vector<float> moved(norm == Norm::linf ? 0 : size + LANES);
          const size_t first = task / pieces * each, at = task % pieces * piece;
          for (size_t row = first; row < std::min(rows, first + each); row++) {
            const size_t from = (row * size + at) * item;
            const Step step{eps[row * eps_of], alpha[row * alpha_of], low, high};
            run(step, x + from, g + from, o + from, y + from, std::min(piece, size - at), moved.data());
          }
        });
      });
}
}  // namespace bulwark
