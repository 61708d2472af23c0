#include <algorithm>
#include <stdexcept>

#include "common/isa.h"
#include "common/parallel.h"
#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "noise/noise.h"
#include "noise/noise_simd.h"

namespace bulwark {
void add_normals(const NoiseStream& s, float sigma, size_t first_tile, Float type, const void* x, void* y, size_t n) {
  BULWARK_PICK(noise_kernels).add_normals[int(type)](s, sigma, first_tile, x, y, n);
}

void add_normals(const NoiseStream& s, float sigma, size_t first_tile, const float* x, float* y, size_t n) {
  add_normals(s, sigma, first_tile, Float::f32, x, y, n);
}

// The Metal kernels read row-contiguous inputs; the CPU's read any.
static mx::array input(const mx::array& x, mx::Stream s) { return on_metal(s) ? mx::contiguous(x, false, s) : x; }

mx::array gaussian(std::vector<int> shape, const mx::array& sigma, const mx::array& key, const mx::array& counter,
                   mx::Dtype dtype, Domain domain, mx::StreamOrDevice sd) {
  mx::Shape out(shape.begin(), shape.end());
  const auto s = mx::to_stream(sd);
  auto op = std::make_shared<Gaussian>(s, out, dtype, domain);
  return mx::array(out, dtype, op, {sigma, input(key, s), input(counter, s)});
}

static size_t tiles_of(const mx::array& x) { return (x.size() + NORMALS_PER_TILE - 1) / NORMALS_PER_TILE; }

Arrays add_gaussian(const Arrays& leaves, const mx::array& sigma, const mx::array& key, const mx::array& counter,
                    Domain domain, mx::StreamOrDevice sd) {
  constexpr size_t GROUP = 24;  // every output holds every input, so that one primitive's cost grows as the square
  const auto s = mx::to_stream(sd);
  Arrays all;
  size_t tile = 0;
  for (size_t begin = 0; begin < leaves.size(); begin += GROUP) {
    Arrays in;
    for (size_t i = begin; i < std::min(leaves.size(), begin + GROUP); i++) in.push_back(input(leaves[i], s));
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    auto op = std::make_shared<AddGaussian>(s, domain, tile);
    for (auto& x : in) {
      shapes.push_back(x.shape());
      dtypes.push_back(x.dtype());
      tile += tiles_of(x);
    }
    in.insert(in.end(), {sigma, input(key, s), input(counter, s)});
    auto out = mx::array::make_arrays(std::move(shapes), dtypes, op, in);
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

mx::array random_bits(std::vector<int> shape, const mx::array& key, const mx::array& counter, Domain domain,
                      mx::StreamOrDevice sd) {
  mx::Shape out(shape.begin(), shape.end());
  const auto s = mx::to_stream(sd);
  auto op = std::make_shared<RandomBits>(s, out, domain);
  return mx::array(out, mx::uint32, op, {input(key, s), input(counter, s)});
}

mx::array normals_from_words(mx::array words) {
  words = mx::contiguous(words, false, mx::Device::cpu);
  words.eval();
  std::vector<float> y(words.size() / 3 * 2);
  BULWARK_PICK(noise_kernels).transform(words.data<uint32_t>(), y.data(), y.size() / 2);
  return mx::array(y.begin(), {int(y.size() / 2), 2});
}

std::pair<Arrays, std::vector<int>> NoiseOp::vmap(const Arrays& in, const std::vector<int>& axes) {
  if (axes.back() < 0)
    throw std::invalid_argument(std::string("[") + name() +
                                "] counter must be batched under vmap, or every copy gets the same noise");
  return Op::vmap(in, axes);
}

Arrays NoiseOp::reference(const Arrays& in) {
  auto p = parameters();
  Arrays all = in;
  all.push_back(mx::array(p.begin(), {int(p.size())}, mx::int64));
  return Op::reference(all);
}

static Float float_of(mx::Dtype d) {
  return d == mx::float32 ? Float::f32 : d == mx::float16 ? Float::f16 : Float::bf16;
}

std::vector<int64_t> DrawOp::parameters() const {
  auto p = NoiseOp::parameters();
  p.insert(p.end(), shape_.begin(), shape_.end());
  return p;
}

std::vector<int64_t> Gaussian::parameters() const {
  auto p = DrawOp::parameters();
  p.insert(p.begin() + 2, int64_t(float_of(dtype_)));  // behind the domain
  return p;
}

std::vector<int64_t> AddGaussian::parameters() const { return {domain[0], domain[1], int64_t(first_tile_)}; }

std::vector<mx::Shape> AddGaussian::output_shapes(const Arrays& in) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i + 3 < in.size(); i++) shapes.push_back(in[i].shape());
  return shapes;
}

namespace {
// A vector of words that may be read only when the task runs.
struct WordsView {
  explicit WordsView(const mx::array& a) : data(a.data<uint32_t>()), stride(a.strides(0)) {}
  uint32_t operator[](int i) const { return data[i * stride]; }
  const uint32_t* data;
  int64_t stride;
};

NoiseStream stream_of(WordsView key, WordsView counter, Domain domain, size_t first_tile = 0) {
  const uint64_t start = uint64_t(counter[1]) << 32 | counter[0];
  NoiseStream s{{}, start + BLOCKS_PER_TILE * first_tile, {domain[0], domain[1]}};
  for (int i = 0; i < 8; i++) s.key[i] = key[i];
  return s;
}

struct Leaf {
  const char* x;  // null: noise alone
  char* y;
  size_t n, first_tile, itemsize;
  Float type;
  mx::Shape shape;      // empty where x is contiguous
  mx::Strides strides;  // in elements
};

// y[i] = x at index i in row-major order, for i in [begin, end).
template <typename T>
void gather(const Leaf& leaf, size_t begin, size_t end) {
  const T* x = reinterpret_cast<const T*>(leaf.x);
  T* y = reinterpret_cast<T*>(leaf.y);
  const int dims = leaf.shape.size();
  mx::Shape index(dims, 0);
  int64_t at = 0;
  size_t rest = begin;
  for (int d = dims - 1; d >= 0; rest /= leaf.shape[d--]) {
    index[d] = rest % leaf.shape[d];
    at += index[d] * leaf.strides[d];
  }
  for (size_t i = begin; i < end; i++) {
    y[i] = x[at];
    for (int d = dims - 1; d >= 0; d--) {
      at += leaf.strides[d];
      if (++index[d] < leaf.shape[d]) break;
      at -= index[d] * leaf.strides[d];
      index[d] = 0;
    }
  }
}

void add_to_leaf(const Leaf& leaf, const NoiseStream& s, float sigma, size_t begin_tile, size_t end_tile) {
  const size_t begin = (begin_tile - leaf.first_tile) * NORMALS_PER_TILE;
  const size_t end = std::min(leaf.n, (end_tile - leaf.first_tile) * NORMALS_PER_TILE);
  const char* x = leaf.x;
  if (!leaf.shape.empty()) {
    leaf.itemsize == 4 ? gather<uint32_t>(leaf, begin, end) : gather<uint16_t>(leaf, begin, end);
    x = leaf.y;
  }
  const size_t offset = begin * leaf.itemsize;
  add_normals(s, sigma, begin_tile, leaf.type, x ? x + offset : nullptr, leaf.y + offset, end - begin);
}

constexpr size_t CHUNK = 32;  // tiles: some 20 us of one core

// The leaves follow each other in one sequence of tiles, which is what is split among the threads.
void add_to_leaves(const std::vector<Leaf>& leaves, size_t tiles, const NoiseStream& s, float sigma) {
  parallel_for((tiles + CHUNK - 1) / CHUNK, [&](size_t chunk) {
    const size_t end = std::min(tiles, (chunk + 1) * CHUNK);
    size_t tile = chunk * CHUNK;
    auto leaf =
        std::upper_bound(leaves.begin(), leaves.end(), tile, [](size_t t, const Leaf& l) { return t < l.first_tile; });
    for (--leaf; tile < end; ++leaf) {
      const size_t stop = std::min(end, leaf + 1 == leaves.end() ? tiles : leaf[1].first_tile);
      if (tile < stop) add_to_leaf(*leaf, s, sigma, tile, stop);
      tile = std::max(tile, stop);
    }
  });
}
}  // namespace

void Gaussian::cpu(const Arrays& in, Arrays& out) {
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  const size_t n = out[0].size();
  if (!n) return;
  Leaf leaf{nullptr, out[0].data<char>(), n, 0, out[0].itemsize(), float_of(dtype_), {}, {}};
  mx::cpu::get_command_encoder(stream()).dispatch(
      [leaves = std::vector<Leaf>{leaf}, tiles = tiles_of(out[0]), sigma = in[0].data<float>(), key = WordsView(in[1]),
       counter = WordsView(in[2]),
       domain = domain] { add_to_leaves(leaves, tiles, stream_of(key, counter, domain), *sigma); });
}

// Every output holds all inputs until it is evaluated, which is now, and MLX is about to let go of them. (MLX protects
// the inputs of tracers itself.)
void AddGaussian::let_go_of_inputs(const Arrays& in, Arrays& out) {
  for (auto& y : out)
    if (&y.inputs() != &in && !y.is_tracer()) y.inputs().clear();
}

void AddGaussian::cpu(const Arrays& in, Arrays& out) {
  let_go_of_inputs(in, out);
  std::vector<Leaf> leaves;
  size_t tiles = 0;
  for (size_t i = 0; i < out.size(); i++) {
    const bool contiguous = in[i].flags().row_contiguous;
    if (contiguous && mx::is_donatable(in[i], out[i]))
      out[i].copy_shared_buffer(in[i]);
    else
      out[i].set_data(mx::allocator::malloc(out[i].nbytes()));
    if (in[i].size() == 0) continue;
    leaves.push_back({in[i].data<char>(), out[i].data<char>(), in[i].size(), tiles, in[i].itemsize(),
                      float_of(in[i].dtype()), contiguous ? mx::Shape{} : in[i].shape(),
                      contiguous ? mx::Strides{} : in[i].strides()});
    tiles += tiles_of(in[i]);
  }
  if (!tiles) return;
  const size_t k = out.size();
  mx::cpu::get_command_encoder(stream()).dispatch([leaves = std::move(leaves), tiles, sigma = in[k].data<float>(),
                                                   key = WordsView(in[k + 1]), counter = WordsView(in[k + 2]),
                                                   domain = domain, first_tile = first_tile_] {
    add_to_leaves(leaves, tiles, stream_of(key, counter, domain, first_tile), *sigma);
  });
}

void RandomBits::cpu(const Arrays& in, Arrays& out) {
  out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
  const size_t n = out[0].size();
  if (!n) return;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [n, y = out[0].data<uint32_t>(), key = WordsView(in[0]), counter = WordsView(in[1]), domain = domain] {
        constexpr size_t blocks = CHUNK * BLOCKS_PER_TILE, words = blocks * 16;
        const NoiseStream s = stream_of(key, counter, domain);
        parallel_for((n + words - 1) / words, [&](size_t i) {
          BULWARK_PICK(noise_kernels).keystream(s, i * blocks, y + i * words, std::min(words, n - i * words));
        });
      });
}
}  // namespace bulwark
