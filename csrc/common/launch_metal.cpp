// On Apple: sends a KernelCall through MLX's Metal command encoder. The only file that sees metal-cpp.
#include <cstring>
#include <stdexcept>

#include "common/launch.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"

namespace bulwark {
namespace {
constexpr size_t MOST_BYTES = 4096;  // of setBytes

struct Used {
  const MTL::Resource* resource;
};
}  // namespace
}  // namespace bulwark

// MLX's encoder binds all that a kernel touches, and has no word for what a kernel reaches through an address. This is
// its template, for a type of ours, and so a member that sees Metal's own encoder.
template <>
void mlx::core::metal::CommandEncoder::set_bytes(const bulwark::Used& used, int) {
  get_command_encoder()->useResource(used.resource, MTL::ResourceUsageRead);
}

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

static void set_bytes(const mx::Stream& s, const void* data, size_t size, int slot) {
  auto& encoder = mx::metal::get_command_encoder(s);
  if (size <= MOST_BYTES) return encoder.set_bytes(static_cast<const uint8_t*>(data), int(size), slot);
  auto held = temporary(s, {int(size)}, mx::uint8);
  std::memcpy(held.data<uint8_t>(), data, size);
  encoder.set_input_array(held, slot);
}

// Binds the addresses of arrays, each of which is bound before to the same slot, where MLX takes note of it.
static void set_addresses(const mx::Stream& s, const std::vector<mx::array>& arrays, int slot) {
  auto& encoder = mx::metal::get_command_encoder(s);
  std::vector<uint64_t> addresses;
  for (auto& x : arrays) {
    addresses.push_back(0);
    if (x.size() == 0) continue;
    const auto* buffer = static_cast<const MTL::Buffer*>(x.buffer().ptr());
    addresses.back() = buffer->gpuAddress() + x.offset();
    encoder.set_input_array(x, slot);
    encoder.set_bytes(Used{buffer}, slot);
  }
  set_bytes(s, addresses.data(), addresses.size() * sizeof(uint64_t), slot);
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
      set_bytes(s, arg.data.data(), arg.data.size(), i);
    } else if (arg.kind == KernelCall::Arg::addresses) {
      set_addresses(s, arg.array, i);
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
