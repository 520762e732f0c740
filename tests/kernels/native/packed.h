// Packed weights, and rows of activations as the kernels take them; every array ends where its data ends.
#pragma once
#include "cases.h"
#include "model.h"
#include "pack.h"

namespace native {

struct Problem {
  ts::Format format;
  int64_t rows, cols, count;
  Exact<uint8_t> source;                   // rows as the file holds them
  Exact<float> x;                          // [count, cols]
  std::vector<Exact<uint8_t>> tiles, low;  // of weights in planes, tiles are the high ones
};

Problem read_problem(const Case& c);

// A segment reserved and packed from its end, `part` rows at a time; part is a multiple of 16.
void add_segment(ts::Model& model, int32_t matrix, ts::Format format, const uint8_t* source, int64_t rows, int64_t cols, int64_t part = 1 << 20);

// Rows of x, quantized unless the weights are plain.
class Activations {
 public:
  Activations(const ts::Kernels& kernels, Exact<float> x, int64_t cols, bool plain = false);
  ts::Rows rows() const;
  // What the first look is given: the length of each block, in sixths of a unit of the low plane's.
  Exact<float> reach() const;

 private:
  int64_t cols_;
  Exact<float> x_, scale_;
  Exact<int8_t> hi_, lo_;
  Exact<int32_t> sums_;
};

}  // namespace native
