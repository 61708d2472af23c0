# Toolchain: macOS arm64 from Linux. build_macos.py sets the environment that macos-c++ needs.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_VERSION 23)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/macos-c++")
set(CMAKE_AR "${CMAKE_CURRENT_LIST_DIR}/macos-ar" CACHE FILEPATH "" FORCE)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
# macos-c++ knows architecture, headers and deployment target; CMake would ask Xcode for them.
set(CMAKE_OSX_ARCHITECTURES "" CACHE STRING "" FORCE)
set(CMAKE_OSX_SYSROOT "" CACHE STRING "" FORCE)
set(CMAKE_OSX_DEPLOYMENT_TARGET "" CACHE STRING "" FORCE)
# `ar` writes the index, and the linker sets rpath and install names.
set(CMAKE_RANLIB /bin/true CACHE FILEPATH "" FORCE)
set(CMAKE_INSTALL_NAME_TOOL /bin/true CACHE FILEPATH "" FORCE)
