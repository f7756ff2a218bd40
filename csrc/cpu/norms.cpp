// Norms of rows and of head vectors with their gradients (kernels/residual_norm_reference.py, kernels/reference.py), on
// the calling thread: torch's own threads still spin after the product before them, and others would wait for a core.
#include <cmath>
#include <optional>
#include <vector>

#include "buffers.h"
#include "lanes.h"

namespace wireframe {
namespace {

// Rows whose gradients of the weight are added in float before they are in double.
constexpr int64_t kRowsTogether = 64;

// Rows of `width` numbers, each in one piece, `stride` apart.
template <class T>
struct Rows {
  py::buffer_info info;
  T* data;
  int64_t count, stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

bool contiguous(const py::buffer_info& info) {
  py::ssize_t stride = info.itemsize;
  for (size_t axis = size_t(info.ndim); axis-- > 0;) {
    if (info.shape[axis] > 1 && info.strides[axis] != stride) return false;
    stride *= info.shape[axis];
  }
  return true;
}

// A contiguous buffer of any shape, or one of two axes whose rows are each in one piece.
template <class T>
Rows<T> rows(const py::object& object, const char* name, int64_t count, int64_t width) {
  const std::string called(name);
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(!std::is_const_v<T>);
  if (!detail::same_type<T>(info)) throw py::type_error(called + " must be " + detail::type_name<T>());
  // The last axes make a row, those before them count the rows.
  size_t axis = size_t(info.ndim);
  int64_t found = 1, together = 1;
  while (axis > 0 && together != width) together *= info.shape[--axis];
  if (together != width) throw py::value_error(called + " must have rows of " + std::to_string(width));
  for (size_t i = 0; i < axis; ++i) found *= info.shape[i];
  if (count != kAny && found != count) throw py::value_error(called + " does not have the rows that it should");
  int64_t stride = width;
  if (info.size > 0 && !contiguous(info)) {
    const auto size = py::ssize_t(sizeof(T));
    const bool table = info.ndim == 2 && axis == 1 && (width <= 1 || info.strides[1] == size);
    if (!table || info.strides[0] % size != 0) throw py::value_error(called + " must have rows in one piece");
    stride = info.strides[0] / size;
  }
  T* data = static_cast<T*>(info.ptr);
  return {std::move(info), data, found, stride};
}

template <class T>
std::optional<Rows<T>> rows_or_none(const py::object& object, const char* name, int64_t count, int64_t width) {
  if (object.is_none()) return std::nullopt;
  return rows<T>(object, name, count, width);
}

// body(i, n) for every eight of [0, width) and for those left: n is how many they are.
template <class Body>
WIREFRAME_INLINE void each_eight(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}

WIREFRAME_INLINE Lanes get(const float* from, int64_t i, int64_t n) {
  return n == kLanes ? load(from + i) : load(from + i, n);
}

WIREFRAME_INLINE void put(float* to, int64_t i, int64_t n, Lanes x) {
  n == kLanes ? store(to + i, x) : store(to + i, x, n);
}

// One row of normed = t / sqrt(mean(t^2) + eps) weight with t = x + branch, or x where there is no branch.
WIREFRAME_INLINE void norm_row(const float* x, const float* branch, const float* weight, float eps, float* total,
                               float* normed, int64_t width) {
  Lanes squares = lanes(0.0f);
  each_eight(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    Lanes t = get(x, i, n);
    if (branch) {
      t += get(branch, i, n);
      put(total, i, n, t);
    }
    squares += t * t;
  });
  const float* t = branch ? total : x;
  const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
  each_eight(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    put(normed, i, n, get(t, i, n) * scale * get(weight, i, n));
  });
}

// The gradient of t, and that of the weight added to dweight. With r = 1 / sqrt(mean(t^2) + eps) and u = r t:
// dt = dtotal + r (dnormed weight - u mean(dnormed weight u)), dweight = dnormed u.
WIREFRAME_INLINE void norm_row_backward(const float* dtotal, const float* dnormed, const float* t, const float* weight,
                                        float eps, float* dt, float* dweight, int64_t width) {
  Lanes squares = lanes(0.0f), products = lanes(0.0f);
  each_eight(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes at = get(t, i, n);
    squares += at * at;
    products += get(dnormed, i, n) * get(weight, i, n) * at;
  });
  const float r = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
  const float mean = sum(products) * r / float(width);
  each_eight(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes u = get(t, i, n) * r, given = get(dnormed, i, n);
    Lanes d = (given * get(weight, i, n) - u * mean) * r;
    if (dtotal) d += get(dtotal, i, n);
    put(dt, i, n, d);
    put(dweight, i, n, get(dweight, i, n) + given * u);
  });
}

// 1 / max(|x|, 1e-12), and whether |x| is the larger.
struct Length {
  float inverse;
  bool free;
};

WIREFRAME_INLINE Length length_of(const float* x, int64_t dim) {
  Lanes squares = lanes(0.0f);
  each_eight(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes at = get(x, i, n);
    squares += at * at;
  });
  const float square = sum(squares);
  return {1.0f / std::sqrt(square < 1e-24f ? 1e-24f : square), !(square < 1e-24f)};
}

WIREFRAME_INLINE void unit_vector(const float* x, float scale, float* out, int64_t dim) {
  const float factor = length_of(x, dim).inverse;
  each_eight(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    put(out, i, n, get(x, i, n) * factor * scale);
  });
}

// Writes the gradient of x; returns that of the logarithm of the scale. With u = x / |x|, g = dout scale:
// dx = (g - u (u . g)) / |x|, without the second term where |x| was raised to 1e-12.
WIREFRAME_INLINE float unit_vector_backward(const float* dout, const float* x, float scale, float* dx, int64_t dim) {
  const Length length = length_of(x, dim);
  Lanes products = lanes(0.0f);
  each_eight(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    products += get(dout, i, n) * (get(x, i, n) * length.inverse);
  });
  const float dot = sum(products) * scale;
  const float along = length.free ? dot : 0.0f;
  each_eight(dim, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Lanes u = get(x, i, n) * length.inverse;
    put(dx, i, n, (get(dout, i, n) * scale - u * along) * length.inverse);
  });
  return dot;
}

struct NormInputs {
  const Rows<const float>&x, *branch;
  const float* weight;
  float eps;
  const Rows<float>*total, &normed;
  int64_t width;
};

WIREFRAME_INLINE void norm_rows(const NormInputs& in) {
  for (int64_t row = 0; row < in.x.count; ++row) {
    const float* branch = in.branch ? (*in.branch)[row] : nullptr;
    norm_row(in.x[row], branch, in.weight, in.eps, in.total ? (*in.total)[row] : nullptr, in.normed[row], in.width);
  }
}

struct NormGradients {
  const Rows<const float>*dtotal, &dnormed, &total;
  const float* weight;
  float eps;
  const Rows<float>& dx;
  float* dweight;
  int64_t width;
};

WIREFRAME_INLINE void norm_rows_backward(const NormGradients& in) {
  std::vector<float> part(size_t(in.width));
  std::vector<double> whole(size_t(in.width), 0.0);
  for (int64_t first = 0; first < in.total.count; first += kRowsTogether) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t row = first; row < std::min(first + kRowsTogether, in.total.count); ++row) {
      norm_row_backward(in.dtotal ? (*in.dtotal)[row] : nullptr, in.dnormed[row], in.total[row], in.weight, in.eps,
                        in.dx[row], part.data(), in.width);
    }
    for (size_t i = 0; i < whole.size(); ++i) whole[i] += part[i];
  }
  for (size_t i = 0; i < whole.size(); ++i) in.dweight[i] = float(whole[i]);
}

struct Heads {
  const Rows<const float>&x, *dout;
  const float* scales;           // nullptr: all 1
  const Rows<const bool>* mask;  // nullptr: all true
  const Rows<float>& out;        // or the gradient of x
  float* dscales;
  int64_t heads, dim;
};

WIREFRAME_INLINE void unit_vectors(const Heads& in) {
  std::vector<double> sums(size_t(in.heads), 0.0);
  const int64_t width = in.heads * in.dim;
  for (int64_t row = 0; row < in.x.count; ++row) {
    float* out = in.out[row];
    if (in.mask && !*(*in.mask)[row]) {
      std::fill(out, out + width, 0.0f);
      continue;
    }
    for (int64_t head = 0; head < in.heads; ++head) {
      const float* x = in.x[row] + head * in.dim;
      const float scale = in.scales ? in.scales[head] : 1.0f;
      if (in.dout) {
        const float* dout = (*in.dout)[row] + head * in.dim;
        sums[size_t(head)] += unit_vector_backward(dout, x, scale, out + head * in.dim, in.dim);
      } else {
        unit_vector(x, scale, out + head * in.dim, in.dim);
      }
    }
  }
  if (in.dscales) {
    for (size_t head = 0; head < sums.size(); ++head) in.dscales[head] = float(sums[head]);
  }
}

#ifdef WIREFRAME_AVX2
WIREFRAME_AVX2 void norm_rows_avx2(const NormInputs& in) { norm_rows(in); }
WIREFRAME_AVX2 void norm_rows_backward_avx2(const NormGradients& in) { norm_rows_backward(in); }
WIREFRAME_AVX2 void unit_vectors_avx2(const Heads& in) { unit_vectors(in); }
#else
constexpr auto norm_rows_avx2 = norm_rows;
constexpr auto norm_rows_backward_avx2 = norm_rows_backward;
constexpr auto unit_vectors_avx2 = unit_vectors;
#endif

template <class T>
T* pointer(std::optional<T>& optional) {
  return optional ? &*optional : nullptr;
}

void rms_norm(const py::object& x_object, const py::object& branch_object, const py::object& weight_object, float eps,
              const py::object& total_object, const py::object& normed_object) {
  const auto weight = span<const float>(weight_object, "weight", {kAny});
  const auto x = rows<const float>(x_object, "x", kAny, weight.size);
  auto branch = rows_or_none<const float>(branch_object, "branch", x.count, weight.size);
  std::optional<Rows<float>> total;
  if (branch) total = rows<float>(total_object, "total", x.count, weight.size);
  const auto normed = rows<float>(normed_object, "normed", x.count, weight.size);
  py::gil_scoped_release release;
  const NormInputs in{x, pointer(branch), weight.data, eps, pointer(total), normed, weight.size};
  has_avx2() ? norm_rows_avx2(in) : norm_rows(in);
}

void rms_norm_backward(const py::object& dtotal_object, const py::object& dnormed_object, const py::object& total_object,
                       const py::object& weight_object, float eps, const py::object& dx_object,
                       const py::object& dweight_object) {
  const auto weight = span<const float>(weight_object, "weight", {kAny});
  const auto total = rows<const float>(total_object, "total", kAny, weight.size);
  auto dtotal = rows_or_none<const float>(dtotal_object, "dtotal", total.count, weight.size);
  const auto dnormed = rows<const float>(dnormed_object, "dnormed", total.count, weight.size);
  const auto dx = rows<float>(dx_object, "dx", total.count, weight.size);
  const auto dweight = span<float>(dweight_object, "dweight", {weight.size});
  py::gil_scoped_release release;
  const NormGradients in{pointer(dtotal), dnormed, total, weight.data, eps, dx, dweight.data, weight.size};
  has_avx2() ? norm_rows_backward_avx2(in) : norm_rows_backward(in);
}

void unit_heads(const py::object& dout_object, const py::object& x_object, int64_t heads, int64_t dim,
                const py::object& scales_object, const py::object& mask_object, const py::object& out_object,
                const py::object& dscales_object) {
  const auto x = rows<const float>(x_object, "x", kAny, heads * dim);
  auto dout = rows_or_none<const float>(dout_object, "dout", x.count, heads * dim);
  std::optional<Span<const float>> scales;
  auto mask = rows_or_none<const bool>(mask_object, "mask", x.count, 1);
  std::optional<Span<float>> dscales;
  if (!scales_object.is_none()) scales = span<const float>(scales_object, "scales", {heads});
  if (!dscales_object.is_none()) dscales = span<float>(dscales_object, "dscales", {heads});
  const auto out = rows<float>(out_object, "out", x.count, heads * dim);
  py::gil_scoped_release release;
  const Heads in{x, pointer(dout), scales ? scales->data : nullptr, pointer(mask), out,
                 dscales ? dscales->data : nullptr, heads, dim};
  has_avx2() ? unit_vectors_avx2(in) : unit_vectors(in);
}

}  // namespace

void bind_norms(py::module_& module) {
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("branch"), py::arg("weight"), py::arg("eps"), py::arg("total"),
             py::arg("normed"),
             "normed [R, C] = t / sqrt(mean(t^2) + eps) weight of each row t = x + branch, which goes to total; without "
             "a branch t = x, and there is no total.");
  module.def("rms_norm_backward", &rms_norm_backward, py::arg("dtotal"), py::arg("dnormed"), py::arg("total"),
             py::arg("weight"), py::arg("eps"), py::arg("dx"), py::arg("dweight"),
             "dx [R, C] and dweight [C] for the gradients of total (or None) and normed.");
  module.def("unit_heads", &unit_heads, py::arg("dout"), py::arg("x"), py::arg("heads"), py::arg("dim"),
             py::arg("scales"), py::arg("mask"), py::arg("out"), py::arg("dscales"),
             "out [R, heads x dim] = x / max(|x|, 1e-12) scale for each head vector, 0 in rows that mask leaves out; with "
             "dout the gradient of x instead, and in dscales [heads] those of the logarithms of the scales.");
}

}  // namespace wireframe
