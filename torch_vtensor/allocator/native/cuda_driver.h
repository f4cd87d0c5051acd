/* The part of the CUDA driver's interface that is used from C, declared here so that building needs no CUDA
 * headers; the driver is opened at run time. tests/allocator/test_native_allocator.py compares it with NVIDIA's cuda.h.
 */

#ifndef VTENSOR_CUDA_DRIVER_H
#define VTENSOR_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "vtensor_pool.h"

typedef int cuda_result;
typedef struct cuda_context *cuda_context;
typedef struct cuda_stream *cuda_stream;
typedef struct cuda_event *cuda_event;
typedef struct cuda_module *cuda_module;
typedef struct cuda_function *cuda_function;

enum {
    CUDA_OK = 0,
    CUDA_OUT_OF_MEMORY = 2,
    CUDA_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_CAPTURED_EVENT = 907,
};

enum {
    CUDA_ALLOCATION_PINNED = 1,
    CUDA_LOCATION_DEVICE = 1,
    CUDA_ACCESS_READ_WRITE = 3,
    CUDA_EVENT_DISABLE_TIMING = 2,
    CUDA_CAPTURE_MODE_RELAXED = 2,
    CUDA_CAPTURE_STATUS_NONE = 0,
};

typedef struct {
    int32_t type;
    int32_t id;
} cuda_location;

typedef struct {
    cuda_location location;
    int32_t flags;
} cuda_access;

typedef struct {
    int32_t type;
    int32_t handle_types;
    cuda_location location;
    void *win32_metadata;
    unsigned char flags[8];
} cuda_allocation;

_Static_assert(sizeof(cuda_location) == 8, "CUmemLocation");
_Static_assert(sizeof(cuda_access) == 12 && offsetof(cuda_access, flags) == 8, "CUmemAccessDesc");
_Static_assert(sizeof(cuda_allocation) == 32 && offsetof(cuda_allocation, location) == 8, "CUmemAllocationProp");
_Static_assert(offsetof(cuda_allocation, win32_metadata) == 16, "CUmemAllocationProp");
_Static_assert(offsetof(cuda_allocation, flags) == 24, "CUmemAllocationProp");

/* Name and parameters. Where cuda.h maps a name to a later version of the function, that version is named here. */
#define CUDA_FUNCTIONS(X)                                                                                             \
    X(cuInit, (unsigned flags))                                                                                       \
    X(cuGetErrorName, (cuda_result result, const char **name))                                                        \
    X(cuDeviceGet, (int *device, int ordinal))                                                                        \
    X(cuDevicePrimaryCtxRetain, (cuda_context * context, int device))                                                 \
    X(cuDevicePrimaryCtxRelease_v2, (int device))                                                                     \
    X(cuCtxGetCurrent, (cuda_context * context))                                                                      \
    X(cuCtxPushCurrent_v2, (cuda_context context))                                                                    \
    X(cuCtxPopCurrent_v2, (cuda_context * context))                                                                   \
    X(cuCtxSynchronize, (void))                                                                                       \
    X(cuMemAddressReserve,                                                                                            \
      (uint64_t *address, size_t bytes, size_t alignment, uint64_t hint, unsigned long long flags))                   \
    X(cuMemAddressFree, (uint64_t address, size_t bytes))                                                             \
    X(cuMemCreate, (uint64_t *handle, size_t bytes, const cuda_allocation *allocation, unsigned long long flags))     \
    X(cuMemRelease, (uint64_t handle))                                                                                \
    X(cuMemMap, (uint64_t address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags))           \
    X(cuMemUnmap, (uint64_t address, size_t bytes))                                                                   \
    X(cuMemSetAccess, (uint64_t address, size_t bytes, const cuda_access *access, size_t count))                      \
    X(cuEventCreate, (cuda_event * event, unsigned flags))                                                            \
    X(cuEventRecord, (cuda_event event, cuda_stream stream))                                                          \
    X(cuEventQuery, (cuda_event event))                                                                               \
    X(cuEventSynchronize, (cuda_event event))                                                                         \
    X(cuEventDestroy_v2, (cuda_event event))                                                                          \
    X(cuStreamIsCapturing, (cuda_stream stream, int *status))                                                         \
    X(cuThreadExchangeStreamCaptureMode, (int *mode))                                                                 \
    X(cuModuleLoadData, (cuda_module * module, const void *image))                                                    \
    X(cuModuleGetFunction, (cuda_function * function, cuda_module module, const char *name))                          \
    X(cuModuleUnload, (cuda_module module))                                                                           \
    X(cuLaunchKernel,                                                                                                 \
      (cuda_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,                   \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, cuda_stream stream, void **parameters,              \
       void **extra))

typedef struct {
#define CUDA_DECLARE(name, parameters) cuda_result(*name) parameters;
    CUDA_FUNCTIONS(CUDA_DECLARE)
#undef CUDA_DECLARE
} cuda_driver;

/* Usable after cuda_open has returned 1. */
extern cuda_driver cuda;

/* Open the driver and initialise it; does nothing the second time. 1, or 0 with the reason noted. */
int cuda_open(const char *library);

/* Note what failed, for vtp_torch_read_failure; returns whether `result` is CUDA_OK. */
int cuda_check(cuda_result result, const char *call, int64_t bytes);
/* Note a failure that is not the driver's. */
void note_failure(const char *code, const char *call, int64_t bytes);
/* The calling thread's latest failure. */
vtp_torch_failure *latest_failure(void);

#define CUDA_DO(name, bytes, ...) cuda_check(cuda.name(__VA_ARGS__), #name, (int64_t)(bytes))

#endif
