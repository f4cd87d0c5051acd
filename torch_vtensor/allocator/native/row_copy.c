/* One kernel launch that copies a step's new keys and values to their places, prepared here from the tensors themselves:
 * a call costs less than torch takes to describe one of the two destinations. */

#include <stdlib.h>

#include "cuda_driver.h"
#include "tensor_exchange.h"

#include "row_copy.cu"

enum {
    NUM_WIDTHS = 5,
    BLOCK_THREADS = 128,
    MAX_BLOCKS = 4096, /* a part; the threads loop over what is left */
    NUM_DIMS = 4,
    TOKEN_DIM = 2,
    ROW_DIM = 3,
};

static const char *const KERNEL_NAMES[NUM_WIDTHS] = {
    "copy_rows_1", "copy_rows_2", "copy_rows_4", "copy_rows_8", "copy_rows_16",
};

struct vtp_row_copier {
    const dl_exchange *exchange;
    void *(*release_gil)(void);
    void (*take_gil)(void *state);
    cuda_context context;
    int32_t device;
    cuda_function kernels[NUM_WIDTHS]; /* by the logarithm of the bytes that are copied at once */
};

static int load_kernels(vtp_row_copier *copier, const void *image) {
    cuda_module module;
    if (!CUDA_DO(cuModuleLoadData, 0, &module, image)) {
        return 0;
    }
    /* Asked for now, so that a driver that loads lazily does not load in the middle of a step, or of a capture. */
    for (int i = 0; i < NUM_WIDTHS; i++) {
        if (!CUDA_DO(cuModuleGetFunction, 0, &copier->kernels[i], module, KERNEL_NAMES[i])) {
            cuda.cuModuleUnload(module);
            return 0;
        }
    }
    return 1;
}

vtp_row_copier *vtp_rows_open(const vtp_rows_config *config) {
    const dl_exchange *exchange = config->exchange;
    if (exchange->major_version != DL_MAJOR_VERSION || exchange->read == NULL) {
        note_failure("torch exchanges tensors in another way", "vtp_rows_open", 0);
        return NULL;
    }
    vtp_row_copier *copier = calloc(1, sizeof *copier);
    if (copier == NULL) {
        note_failure("no host memory", "vtp_rows_open", sizeof *copier);
        return NULL;
    }
    copier->exchange = exchange;
    copier->release_gil = config->release_gil;
    copier->take_gil = config->take_gil;
    copier->device = config->device;
    int handle, loaded = 0;
    if (cuda_open(config->driver) && CUDA_DO(cuDeviceGet, 0, &handle, config->device) &&
        CUDA_DO(cuDevicePrimaryCtxRetain, 0, &copier->context, handle)) {
        if (CUDA_DO(cuCtxPushCurrent_v2, 0, copier->context)) {
            /* Another thread may be capturing a graph, which only this mode leaves alone. */
            int mode = CUDA_CAPTURE_MODE_RELAXED;
            if (CUDA_DO(cuThreadExchangeStreamCaptureMode, 0, &mode)) {
                loaded = load_kernels(copier, config->image);
                cuda.cuThreadExchangeStreamCaptureMode(&mode);
            }
            cuda.cuCtxPopCurrent_v2(&(cuda_context){NULL});
        }
        if (!loaded) {
            cuda.cuDevicePrimaryCtxRelease_v2(handle);
        }
    }
    if (!loaded) {
        free(copier);
        return NULL;
    }
    return copier;
}

static int is_readable(const vtp_row_copier *copier, const dl_tensor *tensor) {
    /* Complex numbers may be stored conjugated, and those below a byte share it. */
    return tensor->device.type == DL_CUDA && tensor->device.id == copier->device && tensor->num_dims == NUM_DIMS &&
           tensor->dtype.code != DL_COMPLEX && tensor->dtype.lanes == 1 && tensor->dtype.bits % 8 == 0 &&
           (tensor->strides[ROW_DIM] == 1 || tensor->shape[ROW_DIM] == 1);
}

/* Describe how `rows` go to `whole` from token `position` on, and gather the bits of everything that has to be a
 * multiple of the width. 0: they do not fit. */
static int describe(const dl_tensor *whole, const dl_tensor *rows, int64_t position, struct row_copy_part *part,
                    uint64_t *bits) {
    if (whole->dtype.code != rows->dtype.code || whole->dtype.bits != rows->dtype.bits || position < 0 ||
        position + rows->shape[TOKEN_DIM] > whole->shape[TOKEN_DIM] || whole->shape[ROW_DIM] != rows->shape[ROW_DIM]) {
        return 0;
    }
    int64_t item_bytes = rows->dtype.bits / 8;
    int64_t position_bytes = position * whole->strides[TOKEN_DIM] * item_bytes;
    part->target = (char *)whole->data + whole->byte_offset + position_bytes;
    part->source = (const char *)rows->data + rows->byte_offset;
    part->row_words = (uint64_t)(rows->shape[ROW_DIM] * item_bytes); /* bytes, until the width is known */
    *bits |= (uintptr_t)part->target | (uintptr_t)part->source | part->row_words;
    for (int dim = 0; dim < ROW_DIM; dim++) {
        if (dim != TOKEN_DIM && whole->shape[dim] != rows->shape[dim]) {
            return 0;
        }
        /* The stride of a dimension of one is anything, and is not used. */
        int is_used = rows->shape[dim] > 1;
        part->target_strides[dim] = is_used ? (uint64_t)(whole->strides[dim] * item_bytes) : 0;
        part->source_strides[dim] = is_used ? (uint64_t)(rows->strides[dim] * item_bytes) : 0;
        *bits |= part->target_strides[dim] | part->source_strides[dim];
    }
    return 1;
}

static int launch_here(cuda_function kernel, unsigned num_blocks, cuda_stream stream, struct row_copy_job *job) {
    int capture;
    void *parameters[] = {job};
    if (!CUDA_DO(cuStreamIsCapturing, 0, stream, &capture) ||
        !CUDA_DO(cuLaunchKernel, 0, kernel, num_blocks, 2, 1, BLOCK_THREADS, 1, 1, 0, stream, parameters, NULL)) {
        return VTP_ROWS_FAILED;
    }
    return capture == CUDA_CAPTURE_STATUS_NONE ? VTP_ROWS_COPIED : VTP_ROWS_CAPTURED;
}

/* Launch in the kernels' own context, whichever is current. */
static int launch(const vtp_row_copier *copier, cuda_function kernel, unsigned num_blocks, cuda_stream stream,
                  struct row_copy_job *job) {
    cuda_context current;
    if (!CUDA_DO(cuCtxGetCurrent, 0, &current)) {
        return VTP_ROWS_FAILED;
    }
    /* Another device's is current where a model lies on several, none on a thread that is new to CUDA. */
    int is_foreign = current != copier->context;
    if (is_foreign && !CUDA_DO(cuCtxPushCurrent_v2, 0, copier->context)) {
        return VTP_ROWS_FAILED;
    }
    int result = launch_here(kernel, num_blocks, stream, job);
    if (is_foreign) {
        cuda.cuCtxPopCurrent_v2(&(cuda_context){NULL});
    }
    return result;
}

static int run(const vtp_row_copier *copier, struct row_copy_job *job, int log_width, cuda_stream stream) {
    uint64_t num_rows = job->num_slots * job->num_heads * job->num_tokens, most_words = 0;
    for (int i = 0; i < 2; i++) {
        job->parts[i].row_words >>= log_width;
        uint64_t num_words = num_rows * job->parts[i].row_words;
        most_words = num_words > most_words ? num_words : most_words;
    }
    if (most_words == 0) {
        return VTP_ROWS_COPIED;
    }
    uint64_t num_blocks = (most_words + BLOCK_THREADS - 1) / BLOCK_THREADS;
    num_blocks = num_blocks < MAX_BLOCKS ? num_blocks : MAX_BLOCKS;
    /* A launch waits while the device's queue is full, perhaps for work that waits for a host function in Python. */
    void *state = copier->release_gil();
    int result = launch(copier, copier->kernels[log_width], (unsigned)num_blocks, stream, job);
    copier->take_gil(state);
    return result;
}

int vtp_rows_copy(const vtp_row_copier *copier, void *keys, void *values, int64_t position, void *key, void *value) {
    if (copier == NULL) {
        return VTP_ROWS_NOT_COPIED;
    }
    void *objects[] = {keys, values, key, value};
    dl_tensor tensors[4];
    for (int i = 0; i < 4; i++) {
        if (copier->exchange->read(objects[i], &tensors[i]) != 0) {
            return VTP_ROWS_FAILED;
        }
        if (!is_readable(copier, &tensors[i])) {
            return VTP_ROWS_NOT_COPIED;
        }
    }
    const dl_tensor *rows = &tensors[2];
    struct row_copy_job job = {
        .num_slots = (uint64_t)rows->shape[0],
        .num_heads = (uint64_t)rows->shape[1],
        .num_tokens = (uint64_t)rows->shape[TOKEN_DIM],
    };
    uint64_t bits = (uint64_t)1 << (NUM_WIDTHS - 1);
    for (int i = 0; i < 2; i++) {
        for (int dim = 0; dim < ROW_DIM; dim++) {
            if (rows[i].shape[dim] != rows[0].shape[dim]) {
                return VTP_ROWS_NOT_COPIED;
            }
        }
        if (!describe(&tensors[i], &rows[i], position, &job.parts[i], &bits)) {
            return VTP_ROWS_NOT_COPIED;
        }
    }
    void *stream;
    if (copier->exchange->current_stream(DL_CUDA, copier->device, &stream) != 0) {
        return VTP_ROWS_FAILED;
    }
    return run(copier, &job, __builtin_ctzll(bits), stream);
}
