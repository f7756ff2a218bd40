// wireframe._C_cuda: the operations on CUDA devices. Pointers and streams come as integers from
// wireframe/kernels/native_cuda.py, which checks the tensors; nothing here looks at what they point to.
#include <pybind11/pybind11.h>

#include "operations.h"

#ifndef WIREFRAME_SOURCES
#define WIREFRAME_SOURCES ""
#endif
#ifndef WIREFRAME_COMPILER
#define WIREFRAME_COMPILER ""
#endif

namespace py = pybind11;

namespace {

template <class T>
struct FromPython {
  using type = T;
  static T convert(T value) { return value; }
};

template <class T>
struct FromPython<T*> {
  using type = uintptr_t;
  static T* convert(uintptr_t address) { return reinterpret_cast<T*>(address); }
};

// The operation as a function of plain numbers that releases the GIL.
template <class Result, class... Parameters>
auto with_addresses(Result (*operation)(Parameters...)) {
  return [operation](typename FromPython<Parameters>::type... arguments) {
    py::gil_scoped_release release;
    return operation(FromPython<Parameters>::convert(arguments)...);
  };
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  using namespace wireframe;
  module.doc() = "wireframe's operations on CUDA devices; use wireframe.kernels.ops";
  // What it was built from and with (csrc/native_build.py), for wireframe.kernels.native.
  module.attr("sources") = WIREFRAME_SOURCES;
  module.attr("compiler") = WIREFRAME_COMPILER;
  module.def("house_mask_workspace", with_addresses(&house_mask_workspace));
  module.def("house_mask", with_addresses(&house_mask));
  module.def("clip_limits_workspace", with_addresses(&clip_limits_workspace));
  module.def("clip_limits", with_addresses(&clip_limits));
  module.def("depth_points_workspace", with_addresses(&depth_points_workspace));
  module.def("depth_points", with_addresses(&depth_points));
  module.def("vote_labels_workspace", with_addresses(&vote_labels_workspace));
  module.def("vote_labels", with_addresses(&vote_labels));
  module.def("point_tiers", with_addresses(&point_tiers));
  module.def("centre_and_scale_workspace", with_addresses(&centre_and_scale_workspace));
  module.def("centre_and_scale", with_addresses(&centre_and_scale));
  module.def("priority_sample_workspace", with_addresses(&priority_sample_workspace));
  module.def("priority_sample", with_addresses(&priority_sample));
}
