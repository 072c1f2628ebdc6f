#include "tests/ptx/profile.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>

#include "tests/ptx/options.h"

namespace ptx {

namespace {

using Json = nlohmann::ordered_json;

// A kernel's launch as a node of a graph.
struct Node {
  std::string name;  // a kernel's symbol, or a library's call
  bool is_kernel = false;
  Extent grid, block;
  uint32_t shared_bytes = 0;  // static and dynamic
  Counters counters;
  Work work;
};

struct CallTotals {
  uint64_t calls = 0;
  Work work;
};

struct Profile {
  std::map<std::string, Counters> kernels;  // by symbol
  std::map<std::string, std::string> names;
  std::map<std::string, CallTotals> calls;
  std::vector<Node> graph, last_graph;
  bool in_graph = false;
  uint64_t graph_launches = 0;
  Counters current;
  Node current_node;
};
Profile& profile() {
  static Profile* p = new Profile;
  return *p;
}

Json json_of(const Counters& c) {
  Json j;
  j["launches"] = c.launches;
  j["blocks"] = c.blocks;
  j["threads"] = c.threads;
  for (size_t k = 0; k < size_t(Class::count); k++)
    if (c.warp_instructions[k]) {
      j["warp_instructions"][name_of(Class(k))] = c.warp_instructions[k];
      j["lane_instructions"][name_of(Class(k))] = c.lane_instructions[k];
    }
  j["load_requests"] = c.load_requests;
  j["load_sectors"] = c.load_sectors;
  j["load_bytes"] = c.load_bytes;
  j["store_requests"] = c.store_requests;
  j["store_sectors"] = c.store_sectors;
  j["store_bytes"] = c.store_bytes;
  j["loaded_footprint_bytes"] = c.loaded_footprint * 32;
  j["stored_footprint_bytes"] = c.stored_footprint * 32;
  j["shared_requests"] = c.shared_requests;
  j["shared_wavefronts"] = c.shared_wavefronts;
  j["branches"] = c.branches;
  j["divergent_branches"] = c.divergent_branches;
  j["block_cycles"] = c.block_cycles;
  j["longest_chain"] = {{"cycles", c.longest.cycles}, {"loads", c.longest.loads}, {"barriers", c.longest.barriers}};
  return j;
}

Json json_of(const Extent& e) { return Json::array({e.x, e.y, e.z}); }

void write_profile() {
  const Profile& p = profile();
  Json j;
  j["graph_launches"] = p.graph_launches;
  j["graph"] = Json::array();
  for (const Node& n : p.last_graph) {
    Json node{{"kind", n.is_kernel ? "kernel" : "call"}, {"name", n.name}};
    if (n.is_kernel) {
      node["readable"] = p.names.at(n.name);
      node["grid"] = json_of(n.grid);
      node["block"] = json_of(n.block);
      node["shared_bytes"] = n.shared_bytes;
      node["counters"] = json_of(n.counters);
    } else {
      node["flops"] = n.work.flops;
      node["bytes"] = n.work.bytes;
    }
    j["graph"].push_back(std::move(node));
  }
  for (const auto& [symbol, counters] : p.kernels) {
    Json k = json_of(counters);
    k["readable"] = p.names.at(symbol);
    j["kernels"][symbol] = std::move(k);
  }
  for (const auto& [name, totals] : p.calls)
    j["calls"][name] = {{"calls", totals.calls}, {"flops", totals.work.flops}, {"bytes", totals.work.bytes}};
  const std::string& path = options().profile;
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (!file) {
    std::fprintf(stderr, "ptx: cannot write %s\n", path.c_str());
    return;
  }
  const std::string text = j.dump(1);
  std::fwrite(text.data(), 1, text.size(), file);
  std::fclose(file);
}

}  // namespace

bool is_profiling() {
  static const bool yes = [] {
    if (options().profile.empty()) return false;
    std::atexit(write_profile);
    return true;
  }();
  return yes;
}

void begin_kernel(Launch& launch) {
  if (!is_profiling()) return;
  profile().current = {};
  launch.counters = &profile().current;
}

void finish_kernel(const Launch& launch) {
  if (!is_profiling()) return;
  Profile& p = profile();
  const std::string& symbol = launch.kernel->symbol;
  p.kernels[symbol].add(p.current);
  p.names[symbol] = launch.kernel->name;
  p.current_node = {symbol,    true, launch.grid, launch.block, launch.kernel->shared_used + launch.dynamic_bytes,
                    p.current, {}};
}

void profile_operation(const Operation& operation) {
  if (!is_profiling()) return;
  Profile& p = profile();
  if (!operation.is_kernel) {
    CallTotals& totals = p.calls[operation.name];
    totals.calls++;
    totals.work.flops += operation.work.flops;
    totals.work.bytes += operation.work.bytes;
    p.current_node = {operation.name, false, {}, {}, 0, {}, operation.work};
  }
  if (p.in_graph) p.graph.push_back(p.current_node);
}

void profile_graph_begins(size_t nodes) {
  if (!is_profiling()) return;
  profile().graph.clear();
  profile().graph.reserve(nodes);
  profile().in_graph = true;
}

void profile_graph_ends() {
  if (!is_profiling()) return;
  Profile& p = profile();
  p.in_graph = false;
  p.graph_launches++;
  p.last_graph = std::move(p.graph);
}

}  // namespace ptx
