// The router as a function of a library.

#include "router.cu"

extern "C" void run(int rows, const u16* x, const u16* branch, const u16* weight, const float* bias, const float* correction,
                    const float* norm_weight, const float* branch_weight, const int* slots, const int* positions, int* ids,
                    float* shares, u16* normed, u16* joined, long long x_stride, long long branch_stride, long long w_stride,
                    float eps, float branch_eps, float scale, u32 seed, int tokens) {
  for (token_of_grid = 0; token_of_grid < rows; ++token_of_grid)
    launch(PROGRAMS, 32 * WARPS, 32 * WARPS, SHARED, PROGRAMS, [=] {
      route(x, branch, weight, bias, correction, norm_weight, branch_weight, slots, positions, ids, shares, normed, joined,
            x_stride, branch_stride, w_stride, eps, branch_eps, scale, seed, tokens);
    });
}
