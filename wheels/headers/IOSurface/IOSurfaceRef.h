// The only name of IOSurface that metal-cpp uses: ziglang ships no framework.
#pragma once
typedef struct __IOSurface* IOSurfaceRef;
