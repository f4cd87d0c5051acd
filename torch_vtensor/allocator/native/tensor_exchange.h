/* The part of DLPack's C exchange interface (version 1) that reads a tensor, declared here so that building needs no
 * other project's headers. tests/allocator/test_row_copy.py compares it with the dlpack.h that torch brings. */

#ifndef VTENSOR_TENSOR_EXCHANGE_H
#define VTENSOR_TENSOR_EXCHANGE_H

#include <stdint.h>

enum {
    DL_CPU = 1, /* device types */
    DL_CUDA = 2,
    DL_COMPLEX = 5, /* a type code */
    DL_MAJOR_VERSION = 1,
};

typedef struct {
    int32_t type;
    int32_t id;
} dl_device;

typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    dl_device device;
    int32_t num_dims;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    uint32_t major_version;
    uint32_t minor_version;
    void *previous;
    void *unused[3];
    /* Both are called with the GIL and return 0, or -1 with a Python exception set. What the first fills in is valid as
     * long as the object is not changed; it takes no reference. */
    int (*read)(void *object, dl_tensor *tensor);
    int (*current_stream)(int32_t device_type, int32_t device, void **stream);
} dl_exchange;

#endif
