// Sets words of a workspace; one launch.
#pragma once

#include "launch.h"

namespace wireframe {

void fill(const Launcher& launch, unsigned* words, int64_t count, unsigned value);

}  // namespace wireframe
