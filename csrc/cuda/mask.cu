// The house mask: a box dilation, first along the rows, then along the columns (reference: wireframe/depth.py).
#include "batch.cuh"
#include "block.cuh"
#include "operations.h"

namespace wireframe {
namespace {

// Positions [first, last] of a line of `size` that lie within the radius of i.
struct Window {
  int first, last;
};

__device__ Window window_of(int i, int size, int radius) {
  return {i > radius ? i - radius : 0, i < size - 1 - radius ? i + radius : size - 1};
}

__global__ void __launch_bounds__(kThreads) mask_rows_kernel(const uint8_t* gestalt, int64_t N, const ViewRow* views,
                                                             LabelTables tables, int radius, int parts, bool* rows) {
  const ViewRow view = label_view(views, blockIdx.x / unsigned(parts), N);
  const int width = int(view.width), size = int(view.height) * width;
  const Range range = piece_of(size, int(blockIdx.x % unsigned(parts)), parts);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    const int column = i % width;
    const Window near = window_of(column, width, radius);
    const uint8_t* row = gestalt + view.labels + (i - column);
    bool found = false;
    for (int j = near.first; j <= near.last && !found; ++j) found = tables.in_house(row[j]);
    rows[view.labels + i] = found;
  }
}

__global__ void __launch_bounds__(kThreads)
    mask_columns_kernel(const bool* rows, int64_t N, const ViewRow* views, int radius, int parts, bool* mask) {
  const ViewRow view = label_view(views, blockIdx.x / unsigned(parts), N);
  const int width = int(view.width), height = int(view.height), size = height * width;
  const Range range = piece_of(size, int(blockIdx.x % unsigned(parts)), parts);
  for (int i = range.begin + int(threadIdx.x); i < range.end; i += kThreads) {
    const Window near = window_of(i / width, height, radius);
    const bool* column = rows + view.labels + i % width;
    bool found = false;
    for (int j = near.first; j <= near.last && !found; ++j) found = column[int64_t(j) * width];
    mask[view.labels + i] = found;
  }
}

struct MaskWork {
  bool* rows;  // [N]

  MaskWork(Workspace& workspace, int64_t N) : rows(workspace.take<bool>(N)) {}
};

}  // namespace

int64_t house_mask_workspace(int64_t N) {
  Workspace workspace;
  MaskWork(workspace, N);
  return workspace.used();
}

void house_mask(int device, void* stream, uint8_t* memory, int64_t memory_bytes, const uint8_t* gestalt, int64_t N,
                const ViewRow* views, int64_t V, const uint8_t* tables, int64_t radius, bool* mask) {
  Workspace workspace(memory, memory_bytes);
  const MaskWork work(workspace, N);
  workspace.check("house_mask");
  const Launcher launch("house_mask", device, stream);
  const int parts = parts_for(N, V, kPixelsPerBlock);
  const int reach = int(radius < 0 ? 0 : radius < INT32_MAX / 2 ? radius : INT32_MAX / 2);
  launch(mask_rows_kernel, V * parts, kThreads, gestalt, N, views, LabelTables{tables}, reach, parts, work.rows);
  launch(mask_columns_kernel, V * parts, kThreads, static_cast<const bool*>(work.rows), N, views, reach, parts, mask);
}

}  // namespace wireframe
