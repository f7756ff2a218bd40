// The vote of the views on every point, tiers and classes (reference: wireframe/voting.py).
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "avx2.h"
#include "ballot.h"
#include "pool.h"
#include "view_table.h"

namespace wireframe {
namespace {

struct LabelMaps {
  const uint8_t *ade, *gestalt;
  double tolerance;  // of the visibility test, below 0 = off
};

// The nearest depth of each cell of each view; concurrent minima are the same in any order.
class ZBuffer {
 public:
  explicit ZBuffer(const ViewTable& views) : begin_(size_t(views.size + 1)) {
    for (int64_t v = 0; v < views.size; ++v) {
      begin_[size_t(v + 1)] = begin_[size_t(v)] + zbuffer_size(views[v].height, views[v].width);
    }
    nearest_ = std::vector<std::atomic<double>>(size_t(begin_.back()));
    for (auto& cell : nearest_) cell.store(std::numeric_limits<double>::infinity(), std::memory_order_relaxed);
  }

  void add(int64_t v, const ViewRow& view, const Pixel& pixel) {
    auto& cell = at(v, view, pixel);
    double seen = cell.load(std::memory_order_relaxed);
    while (pixel.depth < seen && !cell.compare_exchange_weak(seen, pixel.depth, std::memory_order_relaxed)) {
    }
  }

  double nearest(int64_t v, const ViewRow& view, const Pixel& pixel) { return at(v, view, pixel).load(std::memory_order_relaxed); }

 private:
  std::atomic<double>& at(int64_t v, const ViewRow& view, const Pixel& pixel) {
    return nearest_[size_t(begin_[size_t(v)] + zbuffer_cell(pixel, view.width))];
  }

  std::vector<int64_t> begin_;
  std::vector<std::atomic<double>> nearest_;
};

// Points that vote: which views each of them is shown to.
struct Voters {
  const float* xyz;
  const int64_t* offsets;
  int64_t scenes;
  const int64_t* view_offsets;
  const ViewTable& views;
  const std::vector<Camera>& cameras;

  // body(first point, last point + 1, first view, last view + 1) for the scenes that share a chunk.
  template <class Body>
  void chunk(int64_t number, const Body& body) const {
    const int64_t end = std::min((number + 1) * kPointsPerChunk, offsets[scenes]);
    int64_t first = number * kPointsPerChunk;
    int64_t scene = std::upper_bound(offsets, offsets + scenes + 1, first) - offsets - 1;
    for (; first < end; ++scene) {
      const int64_t last = std::min(end, offsets[scene + 1]);
      if (first < last) body(first, last, view_offsets[scene], view_offsets[scene + 1]);
      first = last;
    }
  }
};

// The arrays that vote_labels fills.
struct Labels {
  Span<uint8_t> visible_src;
  Span<int16_t> visible_id, behind;
  Span<uint8_t> support, n_views_voted;
  Span<float> vote_frac;

  explicit Labels(const py::tuple& out, int64_t n)
      : visible_src(span<uint8_t>(out[0], "visible_src", {n})),
        visible_id(span<int16_t>(out[1], "visible_id", {n})),
        behind(span<int16_t>(out[2], "behind", {n})),
        support(span<uint8_t>(out[3], "support", {n})),
        n_views_voted(span<uint8_t>(out[4], "n_views_voted", {n})),
        vote_frac(span<float>(out[5], "vote_frac", {n})) {}

  void set(int64_t p, const PointLabel& label) const {
    visible_src[p] = label.visible_src, visible_id[p] = label.visible_id, behind[p] = label.behind;
    support[p] = label.support, n_views_voted[p] = label.n_views_voted, vote_frac[p] = label.vote_frac;
  }
};

struct Vote {
  const Voters& voters;
  const LabelMaps& maps;
  const LabelTables& tables;
  const Labels& out;
  ZBuffer* zbuffer;
  bool wide;
  VoteCodes codes{tables};

  // Writes what the points see into the z-buffer.
  void draw(int64_t first, int64_t last, int64_t first_view, int64_t last_view) const {
    Sight sight(voters.xyz + 3 * first, last - first, wide);
    for (int64_t v = first_view; v < last_view; ++v) {
      const ViewRow& view = voters.views[v];
      sight.look(voters.cameras[size_t(v)], view);
      for (int64_t i = 0; i < last - first; ++i) {
        if (sight.inside(i)) zbuffer->add(v, view, sight.pixel(i));
      }
    }
  }

  void label(int64_t first, int64_t last, int64_t first_view, int64_t last_view) const {
    const int64_t points = last - first, views = last_view - first_view;
    Sight sight(voters.xyz + 3 * first, points, wide);
    const bool few = views <= Ballot::kFewViews;
    Ballot ballot(few ? points : 0, views);
    std::vector<PointVotes> votes(size_t(few ? 0 : points));
    for (int64_t v = first_view; v < last_view; ++v) {
      const ViewRow& view = voters.views[v];
      sight.look(voters.cameras[size_t(v)], view);
      if (zbuffer) hide(sight, points, v, view);
      const uint8_t *ade = maps.ade + view.labels, *gestalt = maps.gestalt + view.labels;
      if (few) {
        ballot.cast(v - first_view, sight, view, ade, gestalt, codes);
        continue;
      }
      for (int64_t i = 0; i < points; ++i) {
        const int64_t at = sight.label(i, view.width);
        if (sight.inside(i)) votes[size_t(i)].add(ade[at], gestalt[at], tables);
      }
    }
    if (few) {
      ballot.decide_all([&](int64_t i, const PointLabel& label) { out.set(first + i, label); });
    } else {
      for (int64_t i = 0; i < points; ++i) out.set(first + i, decide(votes[size_t(i)]));
    }
  }

  void hide(Sight& sight, int64_t points, int64_t v, const ViewRow& view) const {
    for (int64_t i = 0; i < points; ++i) {
      const Pixel pixel = sight.pixel(i);
      if (pixel.inside) sight.hide(i, !zbuffer_sees(pixel.depth, zbuffer->nearest(v, view, pixel), maps.tolerance));
    }
  }
};

void vote(const Voters& voters, const LabelMaps& maps, const LabelTables& tables, const Labels& out, int threads,
          bool vector) {
  const int64_t points = voters.offsets[voters.scenes];
  const int64_t chunks = (points + kPointsPerChunk - 1) / kPointsPerChunk;
  std::vector<ZBuffer> zbuffer;
  if (maps.tolerance >= 0.0) zbuffer.emplace_back(voters.views);
  ZBuffer* const nearest = zbuffer.empty() ? nullptr : &zbuffer[0];
  const Vote votes{voters, maps, tables, out, nearest, vector && has_avx2()};
  if (votes.zbuffer) {
    parallel_for(threads, chunks, [&](int64_t number) {
      voters.chunk(number, [&](auto... range) { votes.draw(range...); });
    });
  }
  parallel_for(threads, chunks, [&](int64_t number) {
    voters.chunk(number, [&](auto... range) { votes.label(range...); });
  });
}

}  // namespace

void bind_vote(py::module_& module) {
  module.def(
      "vote_labels",
      [](const py::object& xyz, const py::object& offsets, const py::object& view_offsets, const py::object& ade,
         const py::object& gestalt, const py::object& views, const py::object& K, const py::object& R,
         const py::object& t, const py::object& tables, double zbuffer, const py::tuple& out, int threads, bool vector) {
        const auto points = span<const float>(xyz, "xyz", {kAny, 3});
        const auto bounds = offsets_to(offsets, "offsets", points.shape(0));
        const auto ade_maps = span<const uint8_t>(ade, "ade", {kAny});
        const auto gestalt_maps = span<const uint8_t>(gestalt, "gestalt", {ade_maps.size});
        const ViewTable table = view_table(views, bounds.size - 1, true, ade_maps.size, false, 0);
        const auto view_bounds = offsets_to(view_offsets, "view_offsets", table.size);
        if (view_bounds.size != bounds.size) throw std::invalid_argument("view_offsets must have the length of offsets");
        const auto table_data = span<const uint8_t>(tables, "tables", {7, 256});
        const Cameras all = cameras(K, R, t, table.size);
        if (out.size() != 6) throw std::invalid_argument("out must hold six arrays");
        const Labels labels(out, points.shape(0));
        std::vector<Camera> loaded;
        for (int64_t v = 0; v < table.size; ++v) loaded.push_back(all[v]);
        const LabelTables lookup = label_tables(table_data);
        py::gil_scoped_release release;
        const Voters voters{points.data, bounds.data, bounds.size - 1, view_bounds.data, table, loaded};
        vote(voters, {ade_maps.data, gestalt_maps.data, zbuffer}, lookup, labels, threads, vector);
      },
      py::arg("xyz"), py::arg("offsets"), py::arg("view_offsets"), py::arg("ade"), py::arg("gestalt"), py::arg("views"),
      py::arg("K"), py::arg("R"), py::arg("t"), py::arg("tables"), py::arg("zbuffer"), py::arg("out"), py::arg("threads"),
      py::arg("vector") = true, "vector=False keeps to portable code, which gives the same bits.");

  module.def(
      "point_tiers",
      [](const py::object& visible_src, const py::object& visible_id, const py::object& behind, const py::object& tables,
         const py::object& group_id, const py::object& class_id) {
        const auto src = span<const uint8_t>(visible_src, "visible_src", {kAny});
        const auto id = span<const int16_t>(visible_id, "visible_id", {src.size});
        const auto hidden = span<const int16_t>(behind, "behind", {src.size});
        const auto table_data = span<const uint8_t>(tables, "tables", {7, 256});
        const auto group = span<int8_t>(group_id, "group_id", {src.size});
        const auto point_class = span<uint8_t>(class_id, "class_id", {src.size});
        const LabelTables lookup = label_tables(table_data);
        py::gil_scoped_release release;
        for (int64_t p = 0; p < src.size; ++p) {
          const PointTier tier = tier_of(src[p], id[p], hidden[p], lookup);
          group[p] = tier.group, point_class[p] = tier.point_class;
        }
      },
      py::arg("visible_src"), py::arg("visible_id"), py::arg("behind"), py::arg("tables"), py::arg("group_id"),
      py::arg("class_id"));
}

}  // namespace wireframe
