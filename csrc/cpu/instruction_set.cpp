// Which instruction set the kernels use.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastl2l::cpu {

const InstructionSet& instruction_set() {
  const InstructionSet* const all[] = {&kAvx512, &kAvx2, &kGeneric};
  const char* wanted = std::getenv("FASTL2L_CPU_ISA");  // read at every call, so that tests can change it
  std::string names;
  for (const InstructionSet* isa : all) {
    if (!isa->supported()) continue;
    if (!wanted || !*wanted || std::string(wanted) == isa->name) return *isa;
    names += std::string(names.empty() ? "" : ", ") + isa->name;
  }
  throw std::runtime_error("FASTL2L_CPU_ISA: expected one of " + names + " on this machine, got " + wanted);
}

}  // namespace fastl2l::cpu
