// The text of one <family>.metal, embedded by cmake/embed.cmake.
#pragma once

namespace bulwark {

struct Source {
  const char* name;
  const char* text;
  const char* hash;
};

}  // namespace bulwark
