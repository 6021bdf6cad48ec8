#include <algorithm>

#include "machine.hpp"

namespace cuemu {

Order::Acquired Order::enter(const void* p, bool releases, u32 block, u32 clock) {
  auto [at, fresh] = numbers.try_emplace(p, counters.size());
  if (fresh) counters.emplace_back();
  std::vector<Release>& log = counters[at->second];
  if (releases) {
    auto own = acquired.find(block);
    log.push_back({block, clock, own == acquired.end() ? 0 : (u32)own->second.size()});
  }
  return {at->second, (u32)log.size()};
}

void Order::acquire(u32 block, Acquired what) {
  std::lock_guard<std::mutex> guard(lock);
  acquired[block].push_back(what);
}

std::unordered_map<u32, u32> Order::seen_by(u32 block) {
  std::lock_guard<std::mutex> guard(lock);
  std::unordered_map<u32, u32> clocks, followed;  // by block: its clock, and how many of its acquisitions
  std::vector<u32> read(counters.size(), 0);      // by counter: how much of its log
  struct Step {
    u32 block, acquired;
  };
  auto own = acquired.find(block);
  if (own == acquired.end()) return clocks;
  std::vector<Step> open{{block, (u32)own->second.size()}};
  while (!open.empty()) {
    Step step = open.back();
    open.pop_back();
    u32& done = followed[step.block];
    for (; done < step.acquired; done++) {
      Acquired what = acquired[step.block][done];
      u32& from = read[what.counter];
      for (; from < what.releases; from++) {
        Release& r = counters[what.counter][from];
        u32& clock = clocks[r.block];
        clock = std::max(clock, r.clock);
        if (r.acquired) open.push_back({r.block, r.acquired});
      }
    }
  }
  clocks.erase(block);
  return clocks;
}
}  // namespace cuemu
