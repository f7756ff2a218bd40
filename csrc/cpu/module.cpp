// wireframe._C: the operations on the CPU. Buffers in and out, allocated by the caller; every function releases the GIL.
#include "buffers.h"

#ifndef WIREFRAME_SOURCES
#define WIREFRAME_SOURCES ""
#endif
#ifndef WIREFRAME_COMPILER
#define WIREFRAME_COMPILER ""
#endif
#ifndef WIREFRAME_SANITIZED
#define WIREFRAME_SANITIZED 0
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "wireframe's operations on the CPU; use wireframe.kernels.ops";
  // What it was built from and with (csrc/native_build.py), for wireframe.kernels.native.
  module.attr("sources") = WIREFRAME_SOURCES;
  module.attr("compiler") = WIREFRAME_COMPILER;
  module.attr("sanitized") = bool(WIREFRAME_SANITIZED);
  wireframe::bind_centre(module);
  wireframe::bind_colors(module);
  wireframe::bind_depth(module);
  wireframe::bind_farthest(module);
  wireframe::bind_mask(module);
  wireframe::bind_merge(module);
  wireframe::bind_norms(module);
  wireframe::bind_points3d(module);
  wireframe::bind_priority(module);
  wireframe::bind_vote(module);
  wireframe::bind_voxels(module);
}
