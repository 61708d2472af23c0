// The matrix products of a BLAS that is loaded when the extension is imported: Accelerate on macOS, scipy-openblas32 on
// Linux. Its threads are set to one, for parallel_for runs products side by side: results must not depend on threads.
#pragma once
#include <cstddef>
#include <string>

namespace bulwark {
// Takes <prefix>cblas_sgemm and <prefix>cblas_ssyrk from a library; false where that cannot be.
bool load_blas(const std::string& library, const std::string& prefix);
bool has_blas();

// C [m, n] = A B + beta C, row by row; A is [m, k] or, with `ta`, kept as [k, m]; B is [k, n] or, with `tb`, [n, k].
// C is not read where beta is 0. Without a BLAS the family's own kernel computes it.
void sgemm(bool ta, bool tb, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b, size_t ldb,
           float beta, float* c, size_t ldc);
// The lower triangle of C [n, n] = A A^T, A [n, k]; what stands above it is left or spoilt.
void ssyrk(size_t n, size_t k, const float* a, size_t lda, float* c, size_t ldc);
}  // namespace bulwark
