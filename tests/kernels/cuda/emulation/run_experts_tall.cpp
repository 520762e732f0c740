// The kernel of experts by warpgroup products as a function of a library.

#include "experts_tall.cu"

extern "C" void run(int grid, TensorMap weights, const u16* x, const int* ids, const float* scale, u16* y, float* parts,
                    long long x_stride, int chosen) {
  launch(grid, THREADS, 128, SHARED, 1, [&] { experts_tall(weights, x, ids, scale, y, parts, x_stride, chosen); });
}
