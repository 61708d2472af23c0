// One call of a Metal kernel, described without Metal: what launch_metal.cpp encodes and launch_sim.cpp simulates.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/source.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace bulwark {
namespace mx = mlx::core;

struct KernelCall {
  struct Arg {  // its position in the list is its [[buffer(i)]]
    enum Kind { in, out, bytes, addresses } kind;
    std::vector<mx::array> array;  // one, or none for bytes, or those whose addresses it holds
    std::vector<uint8_t> data;
  };
  struct Constant {
    int index;  // [[function_constant(index)]]
    bool value;
  };

  const Source& source;
  std::string kernel;
  uint32_t groups, threads;
  std::vector<Arg> args{};
  std::vector<Constant> constants{};

  KernelCall& in(const mx::array& x) { return args.push_back({Arg::in, {x}, {}}), *this; }
  KernelCall& out(const mx::array& x) { return args.push_back({Arg::out, {x}, {}}), *this; }
  // Inputs, more than a kernel has buffers: it gets a struct with a device pointer for each.
  KernelCall& addresses(std::vector<mx::array> xs) {
    return args.push_back({Arg::addresses, std::move(xs), {}}), *this;
  }
  template <class T>
  KernelCall& bytes(const T& value) {
    return bytes(std::vector<T>{value});
  }
  template <class T>
  KernelCall& bytes(const std::vector<T>& values) {
    std::vector<uint8_t> data(values.size() * sizeof(T));
    if (!data.empty()) std::memcpy(data.data(), values.data(), data.size());
    return args.push_back({Arg::bytes, {}, std::move(data)}), *this;
  }
  KernelCall& unused() { return bytes(uint32_t(0)); }  // a buffer that the kernel does not touch in this call
  KernelCall& constant(int index, bool value) { return constants.push_back({index, value}), *this; }
};

void launch(const mx::Stream&, const KernelCall&);
void allocate(const mx::Stream&, mx::array& out);                     // filled with NaN under the simulator
mx::array temporary(const mx::Stream&, const mx::Shape&, mx::Dtype);  // lives until the calls that use it are done
bool simulating();                 // whether ops that are built now run their Metal path in the simulator
bool on_metal(const mx::Stream&);  // whether an op that is built now on this stream runs its Metal path

inline const char* suffix(mx::Dtype t) {
  return t == mx::float32 ? "_float32" : t == mx::float16 ? "_float16" : "_bfloat16";
}
}  // namespace bulwark
