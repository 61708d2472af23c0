// The Metal Shading Language on the host: the part of its standard library that compute kernels use. Translated kernel
// text is compiled behind this header, twice: to be executed, and, with MSL_STRICT, to have its address spaces checked.
#pragma once
#pragma clang system_header
#include "msl/geometry.h"
#include "msl/integers.h"
#include "msl/limits.h"
#include "msl/math.h"
#include "msl/simdgroup.h"
#include "msl/simdgroup_matrix.h"
#include "msl/synchronization.h"
#include "msl/traits.h"
#include "msl/types.h"
#include "msl/vectors.h"
// The macros of these bear the names of address spaces,
#include "msl/address_spaces.h"
#include "msl/atomics.h"
// and those of this one the names of types.
#include "msl/constructors.h"
