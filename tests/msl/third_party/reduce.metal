#include <metal_atomic>
#include <metal_simdgroup>
using namespace metal;
#include "builtins.h"

#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/reduce_utils.h"
#include "mlx/backend/metal/kernels/reduce.h"

instantiate_kernel("all_sum_float32", all_reduce, float, float, Sum<float>)
instantiate_kernel("all_max_float16", all_reduce, half, half, Max<half>)
instantiate_kernel("row_sum_float32", row_reduce_simple, float, float, Sum<float>, int)
instantiate_kernel("column_min_int32", col_reduce_looped, int, int, Min<int>, int, 1, 32, 32)
instantiate_kernel("column_sum_float32", col_reduce_looped, float, float, Sum<float>, int, 1, 128, 32)
