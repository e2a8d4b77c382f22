// Which instruction sets this machine has.
#pragma once
#include <vector>

#include "kernels.h"

namespace lowtide {

// Best first.
const std::vector<const Kernels *> &available_kernels();

// By name; null or empty is the best. Null result: not available here.
const Kernels *find_kernels(const char *name);

}  // namespace lowtide
