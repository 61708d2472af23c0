#include <algorithm>
#include <string>

#include "common/cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ghost/pool.h"
#include "ghost/pool_simd.h"
#include "mlx/backend/cpu/encoder.h"

namespace bulwark {
static constexpr size_t TASK_VALUES = 32768;  // of x: many tasks, each far longer than its handing out

mx::array max_pool(const mx::array& x, const std::vector<int>& kernel, mx::StreamOrDevice sd) {
  const auto s = mx::to_stream(sd);
  auto op = std::make_shared<MaxPool>(s, kernel);
  const auto in = contiguous({x}, s);
  return mx::array(op->output_shapes(in)[0], mx::float32, op, in);
}

mx::array max_pool_gradient(const mx::array& x, const mx::array& dy, const std::vector<int>& kernel,
                            mx::StreamOrDevice sd) {
  const auto s = mx::to_stream(sd);
  return mx::array(x.shape(), mx::float32, std::make_shared<MaxPoolGradient>(s, kernel), contiguous({x, dy}, s));
}

std::vector<mx::Shape> MaxPool::output_shapes(const Arrays& in) {
  auto shape = in[0].shape();
  for (size_t i = 0; i < kernel_.size(); i++) shape[1 + i] /= kernel_[i];
  return {shape};
}

Arrays PoolOp::reference(const Arrays& in) {
  std::string call = name();
  call.append("{\"kernel\":[");
  for (size_t i = 0; i < kernel_.size(); i++) call.append(i ? "," : "").append(std::to_string(kernel_[i]));
  return call_reference(call.append("]}").c_str(), in, stream());
}

// Rows of windows along the last axis of space; axes that x lacks are of size 1.
struct Windows {
  std::array<size_t, 3> space{1, 1, 1}, kernel{1, 1, 1}, out{1, 1, 1};
  size_t batch, channels, step;
  std::vector<size_t> at;  // of a window's positions, from its first

  Windows(const mx::array& x, const std::vector<int>& sizes) : batch(x.shape(0)), channels(x.shape(-1)) {
    for (size_t i = 0, k = 3 - sizes.size(); i < sizes.size(); i++, k++)
      space[k] = x.shape(1 + i), kernel[k] = sizes[i], out[k] = space[k] / kernel[k];
    step = kernel[2] * channels;
    for (size_t i = 0; i < kernel[0]; i++)
      for (size_t j = 0; j < kernel[1]; j++)
        for (size_t k = 0; k < kernel[2]; k++) at.push_back(((i * space[1] + j) * space[2] + k) * channels);
  }

  size_t rows() const { return batch * out[0] * out[1]; }
  size_t row_of_x(size_t row) const {
    const size_t j = row % out[1], i = row / out[1] % out[0], b = row / out[1] / out[0];
    return ((b * space[0] + i * kernel[0]) * space[1] + j * kernel[1]) * space[2] * channels;
  }
  bool all() const {
    for (size_t i = 0; i < 3; i++)
      if (out[i] * kernel[i] != space[i]) return false;
    return true;
  }

  // f(row): rows are counted over the batch.
  template <class F>
  void each_row(const F& f) const {
    const size_t rows_a_task = std::max<size_t>(1, TASK_VALUES / std::max<size_t>(1, out[2] * at.size() * channels));
    parallel_for(ceil_div(rows(), rows_a_task), [&](size_t task) {
      for (size_t r = task * rows_a_task; r < std::min(rows(), (task + 1) * rows_a_task); r++) f(r);
    });
  }
};

void MaxPool::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  if (out[0].size() == 0) return;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [w = Windows(in[0], kernel_), x = in[0].data<float>(), y = out[0].data<float>()] {
        w.each_row([&](size_t row) {
          BULWARK_PICK(pool_kernels)
              .largest(x + w.row_of_x(row), w.step, w.at.data(), w.at.size(), w.channels, w.out[2],
                       y + row * w.out[2] * w.channels);
        });
      });
}

void MaxPoolGradient::cpu(const Arrays& in, Arrays& out) {
  allocate(out);
  if (out[0].size() == 0) return;
  mx::cpu::get_command_encoder(stream()).dispatch([w = Windows(in[0], kernel_), x = in[0].data<float>(),
                                                   n = out[0].size(), dx = out[0].data<float>(),
                                                   dy = in[1].size() ? in[1].data<float>() : nullptr] {
    if (!w.all()) std::fill_n(dx, n, 0.0f);
    w.each_row([&](size_t row) {
      const size_t at = w.row_of_x(row);
      BULWARK_PICK(pool_kernels)
          .shared(x + at, dy + row * w.out[2] * w.channels, w.step, w.at.data(), w.at.size(), w.channels, w.out[2],
                  dx + at);
    });
  });
}
}  // namespace bulwark
