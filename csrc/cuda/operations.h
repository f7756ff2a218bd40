// The operations on a CUDA device: device pointers in and out, everything allocated by the caller. Each returns once
// its kernels are queued on the stream; none waits, allocates or copies. They throw std::invalid_argument or
// std::runtime_error, one line that begins with the operation's name.
//
// Shapes: ade, gestalt, mask [N]; depth [M]; views, limits, counts [V]; K, R [V, 3, 3]; t [V, 3]; keys [B]; points'
// arrays [P]; offsets, view_offsets [B + 1]; tables [7, 256]. What each means is written in wireframe/scene_batch.py
// and in kernels/view_fusion.py and point_sampling.py. `stream` is a cudaStream_t. The contents of a workspace do not
// matter; it is aligned to 256 bytes and has at least the bytes that the function *_workspace gives for the same
// sizes.
#pragma once

#include <cstdint>

#include "../point_math.h"

namespace wireframe {

int64_t house_mask_workspace(int64_t N);
void house_mask(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const uint8_t* gestalt,
                int64_t N, const ViewRow* views, int64_t V, const uint8_t* tables, int64_t radius, bool* mask);

int64_t clip_limits_workspace(int64_t V);
void clip_limits(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const uint16_t* depth,
                 int64_t M, const ViewRow* views, int64_t V, double* limits);

int64_t depth_points_workspace(int64_t M, int64_t V);
void depth_points(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const uint16_t* depth,
                  int64_t M, const bool* mask, int64_t N, const double* limits, const ViewRow* views, int64_t V,
                  const float* K, const float* R, const float* t, const int64_t* keys, int64_t B, int64_t count,
                  uint64_t seed, float* xyz, int64_t* counts);

// Needed only with the visibility test: 0 bytes without.
int64_t vote_labels_workspace(int64_t N, int64_t V, double tolerance);
void vote_labels(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const float* xyz, int64_t P,
                 const int64_t* offsets, const int64_t* view_offsets, int64_t B, const uint8_t* ade,
                 const uint8_t* gestalt, int64_t N, const ViewRow* views, int64_t V, const float* K, const float* R,
                 const float* t, const uint8_t* tables, double tolerance, uint8_t* visible_src, int16_t* visible_id,
                 int16_t* behind, uint8_t* support, uint8_t* n_views_voted, float* vote_frac);

void point_tiers(int device, void* stream, const uint8_t* visible_src, const int16_t* visible_id,
                 const int16_t* behind, int64_t P, const uint8_t* tables, int8_t* group_id, uint8_t* class_id);

int64_t centre_and_scale_workspace(int64_t P, int64_t B);
void centre_and_scale(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const float* xyz,
                      const uint8_t* source, const bool* keep, int64_t P, const int64_t* offsets, const int64_t* keys,
                      int64_t B, uint64_t seed, float* center, float* scale);

int64_t priority_sample_workspace(int64_t P, int64_t B, int64_t num_points);
void priority_sample(int device, void* stream, uint8_t* workspace, int64_t workspace_bytes, const uint8_t* source,
                     const int8_t* group_id, const bool* keep, int64_t P, const int64_t* offsets, const int64_t* keys,
                     int64_t B, uint64_t seed, int64_t num_points, int64_t* index, int64_t* count);

}  // namespace wireframe
