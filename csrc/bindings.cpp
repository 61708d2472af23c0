// One m.def an op: argument names only. Docs, checks and defaults live in python/mlx_bulwark/ops.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "clip/clip.h"
#include "common/blas.h"
#include "common/isa.h"
#include "common/launch.h"
#include "common/parallel.h"
#ifndef __APPLE__
  #include "common/sim.h"
#endif
#include "ghost/ghost.h"
#include "ghost/pool.h"
#include "mlx/version.h"
#include "neighbors/neighbors.h"
#include "noise/noise.h"
#include "smooth/smooth.h"
#include "step/step.h"
#include "tails/tails.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using namespace bulwark;

static std::map<std::string, nb::object>& references() {
  static auto* r = new std::map<std::string, nb::object>;  // leaked: Python is gone when statics are destroyed
  return *r;
}

namespace bulwark {
Arrays call_reference(const char* name, const Arrays& in, const mx::Stream& s) {
  nb::gil_scoped_acquire gil;
  const std::string full = name, base = full.substr(0, full.find('{')), parameters = full.substr(base.size());
  auto it = references().find(base);
  if (it == references().end()) throw std::runtime_error("[" + base + "] has no reference");
  return nb::cast<Arrays>(parameters.empty() ? it->second(in, s) : it->second(in, s, parameters));
}
}  // namespace bulwark

#ifdef BULWARK_SANITIZE
// What a sanitizer must see: .ci/run calls this to prove that the build it tests is a build that would have shown an
// error.
static int planted_error(std::string kind) {
  if (kind == "address") {
    std::vector<int> v(4);
    return v.data()[kind.size()];
  }
  if (kind == "undefined") return std::numeric_limits<int>::max() + static_cast<int>(kind.size());
  int shared = 0;
  std::thread other([&] { shared++; });
  shared++;
  other.join();
  return shared;
}
#endif

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");
  if (std::string(mx::version()).rfind(MLX_BUILT_FOR, 0) != 0)
    throw nb::import_error("built for mlx " MLX_BUILT_FOR ", another version is loaded");
  m.def("set_reference", [](std::string name, nb::object f) { references()[name] = f; }, "name"_a, "reference"_a);
  m.def("set_num_threads", [](size_t n) { Pool::get().limit = n; }, "n"_a);
  m.def("isa", [] { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "base"; });
  m.def("load_blas", &load_blas, "library"_a, "prefix"_a);
  m.def("has_blas", &has_blas);
  m.def("on_metal", [](mx::StreamOrDevice s) { return on_metal(mx::to_stream(s)); }, "stream"_a = nb::none());
  m.def("sources", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> all;
    for (auto* s :
         {&noise_source, &clip_source, &ghost_source, &neighbors_source, &smooth_source, &step_source, &tails_source})
      all.emplace_back(s->name, s->text, s->hash);
    return all;
  });
#ifndef __APPLE__
  m.def("sim_enable", &sim_enable, "on"_a);
  m.def("sim_option", &sim_option, "name"_a, "value"_a);
  m.def("sim_load", &sim_load, "hash"_a, "library"_a);
  m.def("sim_take", &sim_take);
#endif

  m.def("gaussian", &gaussian, "shape"_a, "sigma"_a, "key"_a, "counter"_a, "dtype"_a, "domain"_a,
        "stream"_a = nb::none());
  m.def("add_gaussian", &add_gaussian, "leaves"_a, "sigma"_a, "key"_a, "counter"_a, "domain"_a,
        "stream"_a = nb::none());
  m.def("random_bits", &random_bits, "shape"_a, "key"_a, "counter"_a, "domain"_a, "stream"_a = nb::none());
  m.def("normals_from_words", &normals_from_words, "words"_a);

  m.def("sample_sq_norms", &sample_sq_norms, "grads"_a, "stream"_a = nb::none());
  m.def("clipped_sum", &clipped_sum, "grads"_a, "factors"_a, "noise"_a, "stream"_a = nb::none());
  m.def("clip_and_sum", &clip_and_sum, "grads"_a, "max_grad_norm"_a, "mode"_a, "mask"_a, "noise"_a,
        "stream"_a = nb::none());

  m.def("ghost_sq_norms", &ghost_sq_norms, "x"_a, "dy"_a, "mask"_a, "segments"_a, "units"_a, "bias"_a, "groups"_a,
        "window"_a, "method"_a, "stream"_a = nb::none());
  m.def("ghost_grads", &ghost_grads, "x"_a, "dy"_a, "mask"_a, "segments"_a, "units"_a, "bias"_a, "groups"_a, "window"_a,
        "stream"_a = nb::none());
  m.def("ghost_clipped_sum", &ghost_clipped_sum, "x"_a, "dy"_a, "mask"_a, "factors"_a, "bias"_a, "groups"_a, "window"_a,
        "stream"_a = nb::none());
  m.def("convolved", &convolved, "x"_a, "weight"_a, "bias"_a, "groups"_a, "window"_a, "stream"_a = nb::none());
  m.def("max_pool", &max_pool, "x"_a, "kernel"_a, "stream"_a = nb::none());
  m.def("max_pool_gradient", &max_pool_gradient, "x"_a, "dy"_a, "kernel"_a, "stream"_a = nb::none());
  m.def("embedding_sq_norms", &embedding_sq_norms, "tokens"_a, "dy"_a, "segments"_a, "units"_a,
        "stream"_a = nb::none());
  m.def("embedding_clipped_sum", &embedding_clipped_sum, "tokens"_a, "dy"_a, "factors"_a, "vocabulary"_a,
        "stream"_a = nb::none());
  m.def("embedding_linear_products", &embedding_linear_products, "tokens"_a, "dy"_a, "x"_a, "dy_linear"_a, "segments"_a,
        "units"_a, "stream"_a = nb::none());

  m.def("knn", &knn, "arrays"_a, "prepared"_a, "k"_a, "metric"_a, "stream"_a = nb::none());
  m.def("mmd", &mmd, "rows"_a, "words"_a, "n"_a, "permutations"_a, "rates"_a, "stream"_a = nb::none());

  m.def("noisy_copies", &noisy_copies, "x"_a, "n"_a, "sigma"_a, "key"_a, "counter"_a, "uniform"_a, "bounds"_a,
        "levels"_a, "stream"_a = nb::none());
  m.def("count_votes", &count_votes, "logits"_a, "counts"_a, "stream"_a = nb::none());

  m.def("projected_step", &projected_step, "x"_a, "grad"_a, "origin"_a, "eps"_a, "alpha"_a, "norm"_a, "low"_a, "high"_a,
        "stream"_a = nb::none());

  m.def("column_stats", &column_stats, "x"_a, "stream"_a = nb::none());
  m.def("quantile_table", &quantile_table, "x"_a, "stream"_a = nb::none());
  m.def("tail_scores", &tail_scores, "x"_a, "values"_a, "counts"_a, "skewness"_a, "ranks"_a, "kind"_a,
        "stream"_a = nb::none());
  m.def("histogram_counts", &histogram_counts, "x"_a, "edges"_a, "stream"_a = nb::none());
  m.def("histogram_scores", &histogram_scores, "x"_a, "edges"_a, "scores"_a, "reach"_a, "per_column"_a,
        "stream"_a = nb::none());
  m.def("robust_zscore", &robust_zscore, "x"_a, "center"_a, "scale"_a, "stream"_a = nb::none());
  m.def("mahalanobis", &mahalanobis, "x"_a, "mean"_a, "cholesky"_a, "stream"_a = nb::none());
#ifdef BULWARK_SANITIZE
  m.def("planted_error", &planted_error, "kind"_a);
#endif
}
