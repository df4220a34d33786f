// Instruction sets: one table, best first, asked at run time.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace vig {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  const char* (*why_not)();  // null: this machine runs it; else what it lacks
};

const std::vector<Isa>& isa_table();

// The kernels of the named instruction set; the best one for null or "". Throws std::invalid_argument with the reason.
const Kernels& select_kernels(const char* name);

// A remark for the user about units of this machine that the kernels leave unused, or "".
std::string machine_note();

}  // namespace vig
