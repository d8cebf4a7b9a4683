// libcublas.so: the one product that Baton calls, bf16 times bf16 with single-precision sums.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver.h"

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { OP_N = 0, OP_T = 1, R_32F = 0, R_16BF = 14, COMPUTE_32F = 68 };

struct Blas {
    gpu_double::Stream* stream = nullptr;
};

// So many rows of A go through one pass over k.
constexpr int PANEL = 64;

float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Product {
    int m, n, k;
    const uint16_t* a;
    const uint16_t* b;
    void* c;
    int lda, ldb, ldc;
    bool add, floats;

    void store(int i, int j, float sum) const {
        size_t at = size_t(j) * ldc + i;
        if (floats) {
            float& to = static_cast<float*>(c)[at];
            to = add ? to + sum : sum;
        } else {
            uint16_t& to = static_cast<uint16_t*>(c)[at];
            to = narrow(add ? widen(to) + sum : sum);
        }
    }

    void panel(int first, const std::vector<float>& columns) const {
        std::vector<float> row(k);
        for (int i = first; i < std::min(first + PANEL, m); i++) {
            const uint16_t* from = a + size_t(i) * lda;
            for (int x = 0; x < k; x++) row[x] = widen(from[x]);
            int j = 0;
            for (; j + 4 <= n; j += 4) {
                const float *p = &columns[size_t(j) * k], *q = p + k, *r = q + k, *s = r + k;
                float sums[4] = {};
                for (int x = 0; x < k; x++) {
                    sums[0] += row[x] * p[x];
                    sums[1] += row[x] * q[x];
                    sums[2] += row[x] * r[x];
                    sums[3] += row[x] * s[x];
                }
                for (int o = 0; o < 4; o++) store(i, j + o, sums[o]);
            }
            for (; j < n; j++) {
                const float* p = &columns[size_t(j) * k];
                float sum = 0.0f;
                for (int x = 0; x < k; x++) sum += row[x] * p[x];
                store(i, j, sum);
            }
        }
    }

    void run() const {
        size_t element = floats ? 4 : 2;
        gpu_double::check_range(a, (size_t(m - 1) * lda + k) * 2, "A of a product");
        gpu_double::check_range(b, (size_t(n - 1) * ldb + k) * 2, "B of a product");
        gpu_double::check_range(c, (size_t(n - 1) * ldc + m) * element, "C of a product");
        std::vector<float> columns(size_t(n) * k);
        for (int j = 0; j < n; j++) {
            for (int x = 0; x < k; x++) columns[size_t(j) * k + x] = widen(b[size_t(j) * ldb + x]);
        }
        gpu_double::parallel((m + PANEL - 1) / PANEL, [&](size_t i) { panel(int(i) * PANEL, columns); });
    }
};

}  // namespace

API cublasCreate_v2(Blas** handle) {
    *handle = new Blas;
    return SUCCESS;
}

API cublasDestroy_v2(Blas* handle) {
    delete handle;
    return SUCCESS;
}

API cublasSetStream_v2(Blas* handle, gpu_double::Stream* stream) {
    handle->stream = stream;
    return SUCCESS;
}

API cublasSetWorkspace_v2(Blas*, void* workspace, size_t bytes) {
    gpu_double::check_range(workspace, bytes, "cuBLAS's workspace");
    return SUCCESS;
}

API cublasGemmEx(Blas* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const void* a, int type_a,
                 int lda, const void* b, int type_b, int ldb, const float* beta, void* c, int type_c, int ldc,
                 int compute, int) {
    if (!handle->stream) return NOT_INITIALIZED;
    if (m <= 0 || n <= 0 || k <= 0 || lda < k || ldb < k || ldc < m) return INVALID_VALUE;
    bool known = op_a == OP_T && op_b == OP_N && type_a == R_16BF && type_b == R_16BF && compute == COMPUTE_32F;
    if (!known || (type_c != R_32F && type_c != R_16BF) || *alpha != 1.0f || (*beta != 0.0f && *beta != 1.0f)) {
        return NOT_SUPPORTED;
    }
    Product product{m, n, k, static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), c, lda, ldb, ldc,
                    *beta == 1.0f, type_c == R_32F};
    gpu_double::enqueue(handle->stream, [product] { product.run(); });
    return SUCCESS;
}
