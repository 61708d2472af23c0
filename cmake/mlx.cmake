# Finds the MLX and the nanobind of the building Python, and refuses a pair that would fail at the first call.
set(MLX_SUPPORTED 0.32.4)
set(NANOBIND_SUPPORTED 3.1.0)

macro(ask_python out module code)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${code}" OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE ${out}
                  RESULT_VARIABLE _failed ERROR_QUIET)
  if(_failed)
    message(FATAL_ERROR "mlx-bulwark needs ${module} at build time, and ${Python_EXECUTABLE} does not import it. "
                        "`pip install .` brings the right one; with --no-build-isolation, install "
                        "\"mlx[cpu]==${MLX_SUPPORTED}\" (macOS: \"mlx==${MLX_SUPPORTED}\") and nanobind==${NANOBIND_SUPPORTED} first.")
  endif()
endmacro()

ask_python(nanobind_ROOT nanobind "import nanobind; print(nanobind.cmake_dir())")
ask_python(_nanobind nanobind "import nanobind; print(nanobind.__version__)")
if(NOT _nanobind VERSION_EQUAL NANOBIND_SUPPORTED)
  message(FATAL_ERROR "mlx-bulwark must be built with nanobind ${NANOBIND_SUPPORTED}, whose binary interface is that of "
                      "mlx ${MLX_SUPPORTED}, but nanobind ${_nanobind} is installed: `pip install nanobind==${NANOBIND_SUPPORTED}`.")
endif()
unset(nanobind_DIR CACHE)  # a build folder may have been configured for another environment
find_package(nanobind CONFIG REQUIRED)

if(NOT MLX_ROOT)
  # MLX is a namespace package: its folder is where its native core lies.
  ask_python(_mlx mlx "import importlib.util as u, os; print(os.path.dirname(u.find_spec('mlx.core').origin))")
  set(MLX_ROOT "${_mlx}/share/cmake/MLX")
endif()
unset(MLX_DIR CACHE)
find_package(MLX CONFIG QUIET)
if(NOT MLX_FOUND)
  message(FATAL_ERROR "no MLX library under ${MLX_ROOT}: on Linux plain `mlx` holds none, "
                      "`pip install \"mlx[cpu]==${MLX_SUPPORTED}\"` brings it.")
endif()
find_file(_version NAMES mlx/version.h PATHS "${MLX_DIR}/../../../include" NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
          NO_CACHE REQUIRED)
file(STRINGS ${_version} _lines REGEX "VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
string(REGEX REPLACE "[^0-9]+" "." _lines "${_lines}")
string(REGEX REPLACE "^\\.|\\.$" "" MLX_BUILT_FOR "${_lines}")
if(NOT MLX_BUILT_FOR VERSION_EQUAL MLX_SUPPORTED)
  message(FATAL_ERROR "mlx-bulwark must be built against mlx ${MLX_SUPPORTED} but mlx ${MLX_BUILT_FOR} is installed: "
                      "`pip install \"mlx[cpu]==${MLX_SUPPORTED}\"` (macOS: mlx==${MLX_SUPPORTED}) mends it.")
endif()
message(STATUS "mlx ${MLX_BUILT_FOR}, nanobind ${_nanobind}")
