// The experts' kernel as a function of a library.

#include "experts.cu"

extern "C" void run(int grid, const u16* x, const int* ids, const float* shares, const u8* weight, const float* scale, u16* y,
                    long long x_stride, int tokens) {
  launch(grid, THREADS, THREADS, SHARED, 1, [=] { experts(x, ids, shares, weight, scale, y, x_stride, tokens); });
}
