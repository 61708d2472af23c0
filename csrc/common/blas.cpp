#include "common/blas.h"

#include <dlfcn.h>

#include <atomic>

#include "common/isa.h"
#include "ghost/ghost_simd.h"

namespace bulwark {
using Sgemm = void (*)(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);
using Ssyrk = void (*)(int order, int uplo, int trans, int n, int k, float alpha, const float* a, int lda, float beta,
                       float* c, int ldc);
static std::atomic<Sgemm> loaded{nullptr};
static std::atomic<Ssyrk> loaded_ssyrk{nullptr};
static constexpr int ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112, LOWER = 122;

bool load_blas(const std::string& library, const std::string& prefix) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: a stream thread may be in it
  if (!handle) return false;
  auto f = reinterpret_cast<Sgemm>(dlsym(handle, (prefix + "cblas_sgemm").c_str()));
  if (auto set = reinterpret_cast<void (*)(int)>(dlsym(handle, (prefix + "openblas_set_num_threads").c_str()))) set(1);
  auto g = reinterpret_cast<Ssyrk>(dlsym(handle, (prefix + "cblas_ssyrk").c_str()));
  if (f && g) loaded = f, loaded_ssyrk = g;
  return f && g;
}

bool has_blas() { return loaded; }

void sgemm(bool ta, bool tb, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b, size_t ldb,
           float beta, float* c, size_t ldc) {
  if (Sgemm f = loaded)
    f(ROW_MAJOR, ta ? TRANSPOSED : PLAIN, tb ? TRANSPOSED : PLAIN, int(m), int(n), int(k), 1, a, int(lda), b, int(ldb),
      beta, c, int(ldc));
  else
    BULWARK_PICK(ghost_kernels).sgemm(ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
}

void ssyrk(size_t n, size_t k, const float* a, size_t lda, float* c, size_t ldc) {
  Ssyrk f = loaded_ssyrk;
  if (f && k)  // without columns OpenBLAS leaves C as it was
    f(ROW_MAJOR, LOWER, PLAIN, int(n), int(k), 1, a, int(lda), 0, c, int(ldc));
  else
    sgemm(false, true, n, n, k, a, lda, a, lda, 0, c, ldc);
}
}  // namespace bulwark
