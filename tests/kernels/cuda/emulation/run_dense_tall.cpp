// The kernel of many rows by warpgroup products as a function of a library.

#include "dense_tall.cu"

extern "C" void run(int grid, TensorMap weights, TensorMap x, u16* y, const float* w_scale, const float* x_scale,
                    const float* bias, long long y_stride, int tokens) {
  launch(grid, THREADS, WORKERS, SHARED, SPLITS, [&] { dense_tall(weights, x, y, w_scale, x_scale, bias, y_stride, tokens); });
}
