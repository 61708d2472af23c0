// How Python tells launch_sim.cpp about the simulator (tests/msl), and what it gets back. Not part of the Apple build.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace bulwark {
void sim_enable(bool on);
void sim_option(const std::string& name, int value);
// `library` is a file that tests/msl built from the text that has this hash.
void sim_load(const std::string& hash, const std::string& library);
// (kernel, the simulator's result in JSON) of every call since the last take.
std::vector<std::pair<std::string, std::string>> sim_take();
}  // namespace bulwark
