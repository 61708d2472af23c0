#include <metal_common>
#include <metal_simdgroup>
using namespace metal;
#include "builtins.h"

#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/scan.h"

instantiate_kernel("sum_int32", contiguous_scan, int, int, CumSum<int>, 4, true, false)
instantiate_kernel("sum_reversed_exclusive_int32", contiguous_scan, int, int, CumSum<int>, 4, false, true)
instantiate_kernel("max_float32", contiguous_scan, float, float, CumMax<float>, 4, true, false)
instantiate_kernel("strided_sum_int32", strided_scan, int, int, CumSum<int>, 4, true, false)
