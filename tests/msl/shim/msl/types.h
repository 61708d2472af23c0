// Scalar types, literals, and the constants that Metal defines for everybody.
#pragma once
#pragma clang system_header
#include <stddef.h>
#include <stdint.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double v) { return (half)v; }
constexpr half operator"" H(long double v) { return (half)v; }
constexpr bfloat operator"" bf(long double v) { return (bfloat)v; }
constexpr bfloat operator"" BF(long double v) { return (bfloat)v; }

// Inlined, so that what happens inside is reported at the kernel's own line.
#define MSL_INLINE inline __attribute__((always_inline))
#define METAL_FUNC inline
// Where threads meet: two calls in two branches stay two, and none moves into a branch.
#define MSL_MEETING __attribute__((convergent, nomerge))

#define __METAL__ 1
#define __METAL_MACOS__ 1
#define __METAL_VERSION__ 320

#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.78539816339744830962f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
