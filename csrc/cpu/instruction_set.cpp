// Which instruction set the kernels use.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastl2l::cpu {

static const InstructionSet* const kAll[] = {&kAvx512, &kAvx2, &kGeneric};

std::string instruction_sets() {
  std::string names;
  for (const InstructionSet* isa : kAll) {
    if (!isa->supported()) continue;
    if (!names.empty()) names += ',';
    names += isa->name;
  }
  return names;
}

const InstructionSet& instruction_set() {
  const char* wanted = std::getenv("FASTL2L_CPU_ISA");  // read at every call, so that tests can change it
  for (const InstructionSet* isa : kAll) {
    if (isa->supported() && (!wanted || !*wanted || std::string(wanted) == isa->name)) return *isa;
  }
  throw std::runtime_error("FASTL2L_CPU_ISA: expected one of " + instruction_sets() + " on this machine, got " +
                           wanted);
}

}  // namespace fastl2l::cpu
