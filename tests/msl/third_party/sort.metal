#include <metal_common>
#include <metal_simdgroup>
using namespace metal;
#include "builtins.h"

#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/sort.h"
// It takes what it needs from the header above.
#include "mlx/backend/metal/kernels/searchsorted.h"

instantiate_kernel("sort_float32", block_sort, float, float, false, 64, 8)
instantiate_kernel("argsort_float16", block_sort, half, uint, true, 64, 8)
instantiate_kernel("searchsorted_float32", searchsorted, float, false)
