// The kernel of experts in MXFP4 as a function of a library.

#include "experts_packed.cu"

extern "C" void run(int grid, TensorMap codes, TensorMap scales, const u16* x, const int* ids, const float* shares,
                    const float* bias, u16* y, float* parts, long long x_stride, int chosen, float alpha, float limit) {
  launch(grid, THREADS, THREADS, SHARED, 1,
         [&] { experts_packed(codes, scales, x, ids, shares, bias, y, parts, x_stride, chosen, alpha, limit); });
}
