#include <metal_common>
#include <metal_simdgroup>
using namespace metal;
#include "builtins.h"

#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/cross_entropy.h"
#include "mlx/backend/metal/kernels/logsumexp.h"
#include "mlx/backend/metal/kernels/softmax.h"

instantiate_kernel("softmax_float32", softmax_single_row, float)
instantiate_kernel("softmax_float16", softmax_single_row, half, float)
instantiate_kernel("softmax_bfloat16", softmax_single_row, bfloat16_t, float)
instantiate_kernel("softmax_looped_float32", softmax_looped, float)
instantiate_kernel("logsumexp_float32", logsumexp, float)
instantiate_kernel("logsumexp_looped_float32", logsumexp_looped, float)
instantiate_kernel("cross_entropy_float32", cross_entropy, float)
