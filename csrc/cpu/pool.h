// A small thread pool for loops whose chunks do not depend on one another.
#pragma once

#include <cstdint>
#include <functional>

namespace wireframe {

// Runs body(chunk) for every chunk in [0, chunks), on the calling thread and up to threads - 1 helpers, and returns when
// all are done. What a chunk is must not depend on `threads`: then the result does not either. Several Python threads may
// call at once, and a forked child starts with fresh helpers. A chunk must not call parallel_for. The first exception is
// thrown again here, after all chunks have ended.
void parallel_for(int threads, int64_t chunks, const std::function<void(int64_t)>& body);

}  // namespace wireframe
