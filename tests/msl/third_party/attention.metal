#include <metal_simdgroup>
#include <metal_stdlib>
using namespace metal;
#include "builtins.h"

#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/sdpa_vector.h"

instantiate_kernel("attention_float32", sdpa_vector, float, 64, 64)
