#include <metal_stdlib>
using namespace metal;

struct Item {
  float a[3];
  half h;
  uchar b[6];
};

#define KERNEL(name, type) \
  kernel void name(device const type* x [[buffer(0)]], device type* y [[buffer(1)]], uint i [[thread_position_in_grid]])

KERNEL(copy_uchar, uchar) { y[i] = x[i]; }
KERNEL(copy_half4, half4) { y[i] = x[i] * 2.0h; }
KERNEL(copy_float4, float4) { y[i] = x[i] * 2.0f; }
KERNEL(copy_float3, float3) { y[i] = x[i] * 2.0f; }
KERNEL(copy_packed_float3, packed_float3) { y[i] = float3(x[i]) * 2.0f; }
KERNEL(copy_packed_float4, packed_float4) { y[i] = float4(x[i]) * 2.0f; }
KERNEL(copy_packed_bfloat4, packed_bfloat4) { y[i] = x[i]; }
KERNEL(copy_struct, Item) {
  Item item = x[i];
  item.h += 1.0h;
  y[i] = item;
}
KERNEL(every_16th_float, float) { y[i] = x[i * 16]; }
KERNEL(one_float_for_all, float) { y[i] = x[0]; }
KERNEL(each_float_twice, float) {
  float first = x[i];
  threadgroup_barrier(mem_flags::mem_none);
  y[i] = first + x[i];
}
KERNEL(shifted_float, float) { y[i] = x[i + 1]; }
kernel void count_atomically(device const uint* x [[buffer(0)]], device atomic_uint* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(y, x[i], memory_order_relaxed);
}
