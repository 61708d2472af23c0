# embed_metal(<family>): csrc/<family>/<family>.metal with its "..." includes pasted in -> C++ source with text and hash.
function(embed_metal family out_var)
  set(dir ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  file(READ ${dir}/${family}/${family}.metal text)
  set(deps ${dir}/${family}/${family}.metal)
  string(REGEX MATCHALL "#include \"[^\"]+\"" includes "${text}")
  foreach(line IN LISTS includes)
    string(REGEX REPLACE "#include \"([^\"]+)\"" "\\1" file "${line}")
    find_file(_found_${file} NAMES ${file} PATHS ${dir}/${family} ${dir}/noise ${dir}/common NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH REQUIRED)
    file(READ ${_found_${file}} body)
    list(APPEND deps ${_found_${file}})
    string(REPLACE "${line}" "${body}" text "${text}")
  endforeach()
  if(text MATCHES "[^\t\n -~]")
    message(FATAL_ERROR "${family}.metal must be ASCII")
  endif()
  string(SHA256 hash "${text}")
  string(SUBSTRING ${hash} 0 16 hash)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/${family}_source.cpp)
  file(CONFIGURE OUTPUT ${out} @ONLY CONTENT "#include \"common/source.h\"
namespace bulwark {
extern const Source ${family}_source;
const Source ${family}_source{\"${family}\", R\"metal(@text@)metal\", \"${hash}\"};
}
")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${deps})
  set(${out_var} ${out} PARENT_SCOPE)
endfunction()
