// The kernels' own tests.  native_kernels tiers | run ISA CASES | pool
// Ends with 0 if all is well, 1 if a check failed, 2 if it was called wrongly, 3 if this processor lacks the instruction set.
#include <cstdio>
#include <exception>

#include "cases.h"

namespace {

using native::Case;
using native::Report;

const std::map<std::string, void (*)(const Case&, const ts::Kernels&, Report&)> kCases = {
    {"linear", native::linear_case}, {"planes", native::linear_case}, {"attention", native::attention_case}, {"walk", native::walk_case},
    {"block", native::block_case}, {"experts", native::experts_case}, {"draw", native::draw_case}, {"gumbel", native::gumbel_case}};

int finish(const char* name, const Report& report) {
  std::printf("%s: %lld checks, %lld failed;", name, static_cast<long long>(report.checks), static_cast<long long>(report.failures));
  for (const auto& [kind, share] : report.worst) std::printf(" %s %.0f %%", kind.c_str(), 100 * share);
  std::printf(" of the tolerance\n");
  return report.failures ? 1 : 0;
}

int tiers() {
  for (const char* isa : {"avx512", "avx2", "neon", "generic"}) {
    if (ts::kernels_for(isa)) std::printf("%s\n", isa);
  }
  return 0;
}

int run(const std::string& isa, const std::string& path) {
  const ts::Kernels* kernels = ts::kernels_for(isa);
  if (!kernels) {
    std::printf("this processor has no %s\n", isa.c_str());
    return 3;
  }
  Report report;
  for (const Case& c : native::read_cases(path)) {
    report.begin(c);
    const auto found = kCases.find(c.kind());
    (found == kCases.end() ? native::row_case : found->second)(c, *kernels, report);
  }
  return finish(kernels->name, report);
}

int pool() {
  Report report;
  native::pool_cases(report);
  return finish("pool", report);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  try {
    if (command == "tiers" && argc == 2) return tiers();
    if (command == "run" && argc == 4) return run(argv[2], argv[3]);
    if (command == "pool" && argc == 2) return pool();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("native_kernels tiers | run ISA CASES | pool\n");
  return 2;
}
