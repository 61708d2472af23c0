// Everywhere but on Apple: runs a KernelCall in the simulator, a library that tests/msl built from the same text.
// No Python here: calls arrive on MLX's stream threads, where waiting for the GIL can deadlock. Nor does anything leave
// such a thread by an exception: what went wrong is in sim_take, and outputs stay NaN.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "common/launch.h"
#include "common/sim.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

namespace bulwark {
namespace {
struct Library {  // the functions that tests/msl/README.md names
  explicit Library(const std::string& file) : handle(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle) throw std::runtime_error(dlerror());
    find(option, "msl_option"), find(begin, "msl_begin"), find(constant, "msl_constant"), find(buffer, "msl_buffer");
    find(reached, "msl_reached"), find(launch, "msl_launch"), find(result, "msl_result"), find(error, "msl_error");
  }

  template <class F>
  void find(F*& function, const char* name) {
    function = reinterpret_cast<F*>(dlsym(handle, name));
    if (!function) throw std::runtime_error(std::string("the simulator lacks ") + name);
  }

  void accept(bool ok) const {
    if (!ok) throw std::runtime_error(error());
  }

  void* handle;
  int (*option)(const char*, int);
  int (*begin)(const char*);
  int (*constant)(int, int, const void*, size_t);
  void* (*buffer)(int, size_t, int);
  void* (*reached)(int, int, size_t);
  int (*launch)(const uint32_t*, const uint32_t*);
  const char* (*result)();
  const char* (*error)();
};

struct Buffer {
  KernelCall::Arg::Kind kind;
  char* data;
  size_t size;
  std::vector<uint8_t> bytes;
  std::vector<Buffer> reached{};  // by the addresses that this one holds
};

Buffer buffer_of(KernelCall::Arg::Kind kind, const mx::array& x) {
  return {kind, x.size() ? const_cast<char*>(x.data<char>()) : nullptr, x.nbytes(), {}};
}

std::mutex lock;                                        // the simulator is one machine; several streams may call
auto& libraries = *new std::map<std::string, Library>;  // leaked: stream threads outlive static destructors
auto& results = *new std::vector<std::pair<std::string, std::string>>;
auto& options = *new std::map<std::string, int>;
bool enabled = false;

std::string simulate(const KernelCall& c, std::vector<Buffer>& buffers) {
  auto found = libraries.find(c.source.hash);
  if (found == libraries.end()) throw std::runtime_error("no simulator was built from this text");
  auto& lib = found->second;
  for (auto& [name, value] : options) lib.accept(lib.option(name.c_str(), value) >= 0);
  lib.accept(lib.begin(c.kernel.c_str()) >= 0);
  for (auto& k : c.constants) lib.accept(lib.constant(k.index, true, &k.value, sizeof k.value) >= 0);
  std::vector<void*> bound;
  for (auto& b : buffers) {
    for (size_t i = 0; i < b.reached.size(); i++) {
      auto& x = b.reached[i];
      void* to = x.size ? lib.reached(bound.size(), i, x.size) : nullptr;
      if (x.size) lib.accept(to), std::memcpy(to, x.data, x.size);
      std::memcpy(&b.bytes[i * sizeof to], &to, sizeof to);
    }
    const bool out = b.kind == KernelCall::Arg::out;
    bound.push_back(lib.buffer(bound.size(), b.size, out));
    lib.accept(bound.back());
    if (b.size && !out) std::memcpy(bound.back(), b.data ? b.data : reinterpret_cast<char*>(b.bytes.data()), b.size);
  }
  const uint32_t grid[3] = {c.groups * c.threads, 1, 1}, threads[3] = {c.threads, 1, 1};
  lib.accept(lib.launch(grid, threads) >= 0);
  for (size_t i = 0; i < buffers.size(); i++)
    if (auto& b = buffers[i]; b.size && b.kind == KernelCall::Arg::out) std::memcpy(b.data, bound[i], b.size);
  return lib.result();
}

// The reason why a call could not run, in the form of the simulator's own results.
std::string failure(std::string reason) {
  for (auto& c : reason)
    if (c == '"' || c == '\\' || c < ' ') c = '\'';
  return R"({"library": "", "reports": [{"what": "the call could not run", "detail": ")" + reason +
         R"(", "where": "the host", "pc": 0, "threadgroup": [0, 0, 0], "thread": [0, 0, 0]}], "buffers": [], )" +
         R"("threadgroup_bytes": 0, "threads": 0})";
}
}  // namespace

void sim_enable(bool on) { enabled = on; }

void sim_option(const std::string& name, int value) {
  std::lock_guard<std::mutex> l(lock);
  options[name] = value;
}

void sim_load(const std::string& hash, const std::string& library) {
  Library loaded(library);
  std::lock_guard<std::mutex> l(lock);
  libraries.insert_or_assign(hash, loaded);
}

std::vector<std::pair<std::string, std::string>> sim_take() {
  std::lock_guard<std::mutex> l(lock);
  return std::exchange(results, {});
}

bool simulating() { return enabled; }
bool on_metal(const mx::Stream&) { return enabled; }

void launch(const mx::Stream& s, const KernelCall& c) {
  if (s.device != mx::Device::cpu) throw std::runtime_error("[bulwark] this build has no Metal path");
  std::vector<Buffer> buffers;  // MLX keeps inputs, outputs and temporaries alive, as for its own CPU tasks
  for (auto& a : c.args) {
    if (a.kind == KernelCall::Arg::bytes) {
      buffers.push_back({a.kind, nullptr, a.data.size(), a.data});
    } else if (a.kind == KernelCall::Arg::addresses) {
      const size_t size = a.array.size() * sizeof(void*);
      buffers.push_back({a.kind, nullptr, size, std::vector<uint8_t>(size)});
      for (auto& x : a.array) buffers.back().reached.push_back(buffer_of(KernelCall::Arg::in, x));
    } else {
      buffers.push_back(buffer_of(a.kind, a.array[0]));
    }
  }
  KernelCall call = c;
  call.args.clear();  // arrays with Python deleters have no place on a stream thread
  mx::cpu::get_command_encoder(s).dispatch([call, buffers]() mutable {
    std::lock_guard<std::mutex> l(lock);
    try {
      results.emplace_back(call.kernel, simulate(call, buffers));
    } catch (const std::exception& e) {
      results.emplace_back(call.kernel, failure(e.what()));
    }
  });
}

void allocate(const mx::Stream& s, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) return;
  mx::cpu::get_command_encoder(s).dispatch([p = out.data<char>(), n = out.nbytes()] { std::memset(p, 0xff, n); });
}

mx::array temporary(const mx::Stream& s, const mx::Shape& shape, mx::Dtype type) {
  mx::array t(shape, type, nullptr, {});
  allocate(s, t);
  mx::cpu::get_command_encoder(s).add_temporary(t);
  return t;
}
}  // namespace bulwark
