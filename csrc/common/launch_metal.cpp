// On Apple: sends a KernelCall through MLX's Metal command encoder. The only file that sees metal-cpp.
#include <stdexcept>

#include "common/launch.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"

namespace bulwark {
bool simulating() { return false; }
bool on_metal(const mx::Stream& s) { return s.device == mx::Device::gpu; }

static MTL::ComputePipelineState* pipeline(const mx::Stream& s, const KernelCall& c) {
  auto& device = mx::metal::device(s.device);
  const std::string library = std::string("bulwark_") + c.source.name + "_" + c.source.hash;  // MLX keeps all by name
  std::string key = library + "_" + c.kernel;
  mx::metal::MTLFCList constants;
  for (auto& k : c.constants) {
    constants.emplace_back(&k.value, MTL::DataTypeBool, k.index);
    key += k.value ? "_1" : "_0";
  }
  auto* compiled = device.get_library(library, [&] { return std::string(c.source.text); });
  return device.get_kernel(c.kernel, compiled, key, constants);
}

void launch(const mx::Stream& s, const KernelCall& c) try {
  auto* kernel = pipeline(s, c);
  if (kernel->maxTotalThreadsPerThreadgroup() < c.threads)
    throw std::runtime_error("this GPU runs at most " +
                             std::to_string(size_t(kernel->maxTotalThreadsPerThreadgroup())) +
                             " threads a threadgroup of it but it needs " + std::to_string(size_t(c.threads)));
  auto& encoder = mx::metal::get_command_encoder(s);
  encoder.set_compute_pipeline_state(kernel);
  for (int i = 0; i < int(c.args.size()); i++) {
    auto& arg = c.args[i];
    if (arg.kind == KernelCall::Arg::bytes) {
      encoder.set_bytes(arg.data.data(), arg.data.size(), i);
    } else if (arg.array[0].size() == 0) {
      encoder.set_bytes(uint32_t(0), i);  // an empty array has no buffer
    } else if (arg.kind == KernelCall::Arg::in) {
      encoder.set_input_array(arg.array[0], i);
    } else {
      auto out = arg.array[0];
      encoder.set_output_array(out, i);
    }
  }
  encoder.dispatch_threadgroups(MTL::Size(c.groups, 1, 1), MTL::Size(c.threads, 1, 1));
} catch (const std::exception& e) {
  throw std::runtime_error("[bulwark] Metal kernel " + c.kernel + " of " + c.source.name + ".metal: " + e.what());
}

void allocate(const mx::Stream&, mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

mx::array temporary(const mx::Stream& s, const mx::Shape& shape, mx::Dtype type) {
  mx::array t(shape, type, nullptr, {});
  allocate(s, t);
  mx::metal::get_command_encoder(s).add_temporary(t);
  return t;
}
}  // namespace bulwark
