// The streaming kernel as a function of a library.

#include SOURCE

extern "C" void run(int grid, const u16* x, const float* x_scale, const u16* branch, const u8* weight, const u8* scale,
                    const float* bias, const float* norm_weight, const float* branch_weight, u16* y, u16* joined,
                    long long x_stride, long long w_stride, int rows, int n, float eps, float branch_eps) {
  launch(grid, ALL_THREADS, 32 * WARPS, SHARED, CLUSTER, [=] {
    stream(x, x_scale, branch, weight, scale, bias, norm_weight, branch_weight, y, joined, x_stride, w_stride, rows, n, eps,
           branch_eps);
  });
}
