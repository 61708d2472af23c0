// The only names of CoreFoundation that metal-cpp uses: ziglang ships no framework.
#pragma once
typedef double CFTimeInterval;
typedef const struct __CFString* CFStringRef;
#ifdef __cplusplus
extern "C"
#endif
    CFStringRef
    __CFStringMakeConstantString(const char* text);
