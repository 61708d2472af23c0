// What a launch has found, and what it hands back to the host as JSON.
#include <cstdarg>
#include <cstdio>
#include <map>

#include "machine.h"

namespace msl {
namespace {
struct Report {
  std::string what, detail, where;
  uintptr_t pc;
  Uint3 threadgroup, thread;
};
std::vector<Report> reports;
std::map<std::pair<std::string, uintptr_t>, int> seen;  // an instruction reports a thing once, not once a thread

std::string quoted(const std::string& s) {
  std::string q = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') q += '\\';
    q += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return q + '"';
}

std::string triple(Uint3 v) { return format("[%u,%u,%u]", v.x, v.y, v.z); }

std::string json(const Report& r) {
  return "{\"what\":" + quoted(r.what) + ",\"pc\":" + format("%zu", r.pc) + ",\"where\":" + quoted(r.where) +
         ",\"threadgroup\":" + triple(r.threadgroup) + ",\"thread\":" + triple(r.thread) +
         ",\"detail\":" + quoted(r.detail) + "}";
}

const char* name(Space s) { return s == Space::device ? "device" : s == Space::constant ? "constant" : "threadgroup"; }

std::string json(Region& r) {
  uint64_t unique_read = 0, unique_written = 0;
  for (size_t i = 0; i < r.size; i++) {
    unique_read += r.touched[i] & 1;
    unique_written += r.touched[i] >> 1 & 1;
  }
  auto& t = r.traffic;
  std::string s = "{\"name\":" + quoted(r.name) + ",\"space\":\"" + name(r.space) + "\"";
  auto add = [&](const char* key, uint64_t value) { s += format(",\"%s\":%llu", key, (unsigned long long)value); };
  add("size", r.size);
  add("read", t.read);
  add("written", t.written);
  add("atomic", t.atomic);
  add("unique_read", unique_read);
  add("unique_written", unique_written);
  add("lines_read", t.lines_read);
  add("lines_written", t.lines_written);
  add("accesses_read", t.accesses_read);
  add("accesses_written", t.accesses_written);
  return s + "}";
}

template <class List>
std::string joined(List& list) {
  std::string s = "[";
  for (auto& item : list) s += (s.size() > 1 ? "," : "") + json(item);
  return s + "]";
}
}  // namespace

std::string format(const char* form, ...) {
  char text[1000];
  va_list args;
  va_start(args, form);
  vsnprintf(text, sizeof text, form, args);
  va_end(args);
  return text;
}

void report(const char* what, const void* pc, const std::string& detail, const char* where) {
  uintptr_t offset = pc ? reinterpret_cast<uintptr_t>(pc) - image_base : 0;
  if (seen[{std::string(what) + where, offset}]++ || static_cast<int>(reports.size()) >= options.most_reports) return;
  if (!pc && !*where) where = kernel->defined_at;
  Uint3 none{};
  reports.push_back({what, detail, where, offset, current ? current->thread.threadgroup_position_in_grid : none,
                     current ? current->thread.thread_position_in_threadgroup : none});
}

void clear_reports() {
  reports.clear();
  seen.clear();
}

int report_count() { return static_cast<int>(reports.size()); }

const char* result_json() {
  static std::string text;
  std::vector<Region> none;
  std::string buffers = "[";
  for (auto& r : regions)
    if (r.space != Space::function_constant) buffers += (buffers.size() > 1 ? "," : "") + json(r);
  text = "{\"library\":" + quoted(image_path) + ",\"reports\":" + joined(reports) + ",\"buffers\":" + buffers +
         format("],\"threadgroup_bytes\":%zu,\"threads\":%llu}", threadgroup_bytes(),
                static_cast<unsigned long long>(launched_threads));
  return text.c_str();
}
}  // namespace msl

// Called by the shim, inside a kernel.
MSL_API void msl_report(const char* what) { msl::report(what, MSL_CALLER); }
