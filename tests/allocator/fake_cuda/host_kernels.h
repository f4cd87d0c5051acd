/* The kernels of row_copy.cu, compiled for the host: its blocks and threads run one after another. */

#include <stddef.h>
#include <string.h>

typedef struct {
    unsigned x, y, z;
} index3;

typedef struct {
    unsigned words[4];
} uint4;

typedef struct {
    unsigned words[2];
} uint2;

static index3 gridDim, blockDim, blockIdx, threadIdx;

#define KERNEL static
#define __grid_constant__
#include "row_copy.cu"

typedef struct {
    const char *name;
    int64_t width;
    void (*run)(struct row_copy_job job);
} host_kernel;

static const host_kernel host_kernels[] = {
    {"copy_rows_1", 1, copy_rows_1}, {"copy_rows_2", 2, copy_rows_2},    {"copy_rows_4", 4, copy_rows_4},
    {"copy_rows_8", 8, copy_rows_8}, {"copy_rows_16", 16, copy_rows_16},
};

static const host_kernel *find_kernel(const char *name) {
    for (size_t i = 0; i < sizeof host_kernels / sizeof *host_kernels; i++) {
        if (strcmp(host_kernels[i].name, name) == 0) {
            return &host_kernels[i];
        }
    }
    return NULL;
}

static void run_on_host(const host_kernel *kernel, index3 grid, index3 block, void **parameters) {
    gridDim = grid;
    blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
            for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++) {
                kernel->run(*(const struct row_copy_job *)parameters[0]);
            }
        }
    }
}
