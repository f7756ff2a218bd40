// NumPy arrays and CPU tensors as checked pointers: nothing here knows of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

namespace wireframe {

namespace py = pybind11;

constexpr int64_t kAny = -1;

// A C-contiguous buffer of T. It holds a reference to its owner: make it with the GIL held, use it without.
template <class T>
struct Span {
  py::buffer_info info;
  T* data;
  int64_t size;

  int64_t shape(int axis) const { return info.shape[size_t(axis)]; }
  T& operator[](int64_t i) const { return data[i]; }
};

namespace detail {

// One type code, of this processor's byte order: these modules are for little-endian processors.
template <class T>
bool same_type(const py::buffer_info& info) {
  using U = std::remove_const_t<T>;
  const std::string& format = info.format;
  const size_t code = !format.empty() && std::string("@=<").find(format[0]) != std::string::npos ? 1 : 0;
  if (info.itemsize != py::ssize_t(sizeof(U)) || format.size() != code + 1) return false;
  const std::string codes = std::is_same_v<U, bool>       ? "?"
                            : std::is_floating_point_v<U> ? "fd"
                            : std::is_signed_v<U>         ? "bhilq"
                                                          : "BHILQ";
  return codes.find(format[code]) != std::string::npos;
}

template <class T>
std::string type_name() {
  using U = std::remove_const_t<T>;
  if (std::is_same_v<U, bool>) return "bool";
  const std::string kind = std::is_floating_point_v<U> ? "float" : std::is_signed_v<U> ? "int" : "uint";
  return kind + std::to_string(8 * sizeof(U));
}

}  // namespace detail

// The buffer of `object` as Span<T> of the given shape (kAny = any length). A const T reads, another T wants a writable
// buffer. Throws TypeError or ValueError that begins with `name`.
template <class T>
Span<T> span(const py::object& object, const char* name, std::initializer_list<int64_t> shape) {
  if (!py::isinstance<py::buffer>(object)) {
    throw py::type_error(std::string(name) + " is not a buffer");
  }
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(!std::is_const_v<T>);
  if (!detail::same_type<T>(info)) {
    throw py::type_error(std::string(name) + " must be " + detail::type_name<T>() + ", got format '" + info.format + "'");
  }
  bool fits = info.ndim == py::ssize_t(shape.size());
  std::string wanted, found;
  size_t axis = 0;
  for (int64_t length : shape) {
    if (fits && length != kAny && info.shape[axis] != length) fits = false;
    wanted += (axis++ ? ", " : "") + (length == kAny ? std::string("N") : std::to_string(length));
  }
  for (size_t i = 0; i < info.shape.size(); ++i) found += (i ? ", " : "") + std::to_string(info.shape[i]);
  if (!fits) throw py::value_error(std::string(name) + " must have shape [" + wanted + "], got [" + found + "]");
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.size > 0 && info.shape[size_t(i)] > 1 && info.strides[size_t(i)] != stride) {
      throw py::value_error(std::string(name) + " must be contiguous");
    }
    stride *= info.shape[size_t(i)];
  }
  T* data = static_cast<T*>(info.ptr);
  const int64_t size = info.size;
  return {std::move(info), data, size};
}

// The bindings of each file, called by module.cpp.
void bind_centre(py::module_& module);
void bind_colors(py::module_& module);
void bind_depth(py::module_& module);
void bind_farthest(py::module_& module);
void bind_mask(py::module_& module);
void bind_merge(py::module_& module);
void bind_norms(py::module_& module);
void bind_points3d(py::module_& module);
void bind_priority(py::module_& module);
void bind_vote(py::module_& module);
void bind_voxels(py::module_& module);

}  // namespace wireframe
