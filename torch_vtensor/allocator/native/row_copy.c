/* One call that copies a step's new keys and values to their places: by one kernel launch, or on the host by the
 * processor. It is prepared here from the tensors themselves, and costs less than torch takes to describe one of the two
 * destinations. */

#include <stdlib.h>
#include <string.h>

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
    NUM_ARGUMENTS = 5,
    MAX_HOST_BYTES = 256 * 1024, /* more is worth torch's threads */
};

static const char *const KERNEL_NAMES[NUM_WIDTHS] = {
    "copy_rows_1", "copy_rows_2", "copy_rows_4", "copy_rows_8", "copy_rows_16",
};

struct vtp_row_copier {
    const dl_exchange *exchange;
    vtp_python python;
    cuda_context context; /* NULL on the host */
    int32_t device_type, device;
    cuda_function kernels[NUM_WIDTHS]; /* by the logarithm of the bytes that are copied at once */
};

static void *(*capsule_pointer)(void *capsule, const char *name); /* PyCapsule_GetPointer */

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
    copier->python = config->python;
    capsule_pointer = config->python.capsule_pointer;
    copier->device = config->device;
    if (config->driver == NULL) {
        copier->device_type = DL_CPU;
        return copier;
    }
    copier->device_type = DL_CUDA;
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
    /* Complex numbers may be stored conjugated, and those below a byte share it. Numbers that are stored without their
     * sign are every second one of complex ones: no row of several of them is contiguous. */
    return tensor->device.type == copier->device_type &&
           (copier->device_type == DL_CPU || tensor->device.id == copier->device) && tensor->num_dims == NUM_DIMS &&
           tensor->dtype.code != DL_COMPLEX && tensor->dtype.lanes == 1 && tensor->dtype.bits % 8 == 0 &&
           tensor->shape[ROW_DIM] > 1 && tensor->strides[ROW_DIM] == 1;
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

static int launch_here(cuda_function kernel, unsigned num_blocks, cuda_stream stream, struct row_copy_job *job,
                       int *capture) {
    void *parameters[] = {job};
    return CUDA_DO(cuStreamIsCapturing, 0, stream, capture) &&
           CUDA_DO(cuLaunchKernel, 0, kernel, num_blocks, 2, 1, BLOCK_THREADS, 1, 1, 0, stream, parameters, NULL);
}

/* Launch in the kernels' own context, whichever is current. 0: the reason is noted. */
static int launch(const vtp_row_copier *copier, cuda_function kernel, unsigned num_blocks, cuda_stream stream,
                  struct row_copy_job *job, int *capture) {
    cuda_context current;
    if (!CUDA_DO(cuCtxGetCurrent, 0, &current)) {
        return 0;
    }
    /* Another device's is current where a model lies on several, none on a thread that is new to CUDA. */
    int is_foreign = current != copier->context;
    if (is_foreign && !CUDA_DO(cuCtxPushCurrent_v2, 0, copier->context)) {
        return 0;
    }
    int launched = launch_here(kernel, num_blocks, stream, job, capture);
    if (is_foreign) {
        cuda.cuCtxPopCurrent_v2(&(cuda_context){NULL});
    }
    return launched;
}

static int64_t copy_on_device(const vtp_row_copier *copier, struct row_copy_job *job, int log_width) {
    uint64_t num_rows = job->num_slots * job->num_heads * job->num_tokens, most_words = 0;
    for (int i = 0; i < 2; i++) {
        job->parts[i].row_words >>= log_width;
        uint64_t num_words = num_rows * job->parts[i].row_words;
        most_words = num_words > most_words ? num_words : most_words;
    }
    void *stream;
    if (copier->exchange->current_stream(DL_CUDA, copier->device, &stream) != 0) {
        return VTP_ROWS_RAISED;
    }
    uint64_t num_blocks = (most_words + BLOCK_THREADS - 1) / BLOCK_THREADS;
    num_blocks = num_blocks < MAX_BLOCKS ? num_blocks : MAX_BLOCKS;
    /* A launch waits while the device's queue is full, perhaps for work that waits for a host function in Python. */
    void *state = copier->python.release_gil();
    int capture = CUDA_CAPTURE_STATUS_NONE;
    int launched = launch(copier, copier->kernels[log_width], (unsigned)num_blocks, stream, job, &capture);
    copier->python.take_gil(state);
    if (!launched) {
        return VTP_ROWS_FAILED;
    }
    return (int64_t)job->num_tokens | (capture == CUDA_CAPTURE_STATUS_NONE ? 0 : VTP_ROWS_CAPTURED);
}

static int64_t copy_on_host(const struct row_copy_job *job) {
    uint64_t num_rows = job->num_slots * job->num_heads * job->num_tokens;
    if (num_rows * (job->parts[0].row_words + job->parts[1].row_words) > MAX_HOST_BYTES) {
        return VTP_ROWS_NOT_COPIED;
    }
    for (int i = 0; i < 2; i++) {
        const struct row_copy_part *part = &job->parts[i];
        for (uint64_t row = 0; row < num_rows; row++) {
            uint64_t head = row % job->num_heads, token = row / job->num_heads;
            uint64_t place[] = {token / job->num_tokens, head, token % job->num_tokens}, target = 0, source = 0;
            for (int dim = 0; dim < ROW_DIM; dim++) {
                target += place[dim] * part->target_strides[dim];
                source += place[dim] * part->source_strides[dim];
            }
            memcpy(part->target + target, part->source + source, part->row_words);
        }
    }
    return (int64_t)job->num_tokens;
}

int64_t vtp_rows_copy(const vtp_row_copier *copier, void *const *tensors, int64_t position) {
    dl_tensor read[4]; /* keys, values, key, value */
    for (int i = 0; i < 4; i++) {
        if (copier->exchange->read(tensors[i], &read[i]) != 0) {
            copier->python.clear_error(); /* DLPack has no name for the dtype, or there is no memory to read */
            return VTP_ROWS_NOT_COPIED;
        }
        if (!is_readable(copier, &read[i])) {
            return VTP_ROWS_NOT_COPIED;
        }
    }
    const dl_tensor *rows = &read[2];
    struct row_copy_job job = {
        .num_slots = (uint64_t)rows->shape[0],
        .num_heads = (uint64_t)rows->shape[1],
        .num_tokens = (uint64_t)rows->shape[TOKEN_DIM],
    };
    if (job.num_slots * job.num_heads * job.num_tokens == 0) {
        return VTP_ROWS_NOT_COPIED;
    }
    uint64_t bits = (uint64_t)1 << (NUM_WIDTHS - 1);
    for (int i = 0; i < 2; i++) {
        for (int dim = 0; dim < ROW_DIM; dim++) {
            if (rows[i].shape[dim] != rows[0].shape[dim]) {
                return VTP_ROWS_NOT_COPIED;
            }
        }
        if (!describe(&read[i], &rows[i], position, &job.parts[i], &bits)) {
            return VTP_ROWS_NOT_COPIED;
        }
    }
    return copier->device_type == DL_CPU ? copy_on_host(&job) : copy_on_device(copier, &job, __builtin_ctzll(bits));
}

void *vtp_rows_call(void *capsule, void *const *arguments, intptr_t num_arguments) {
    const vtp_row_copier *copier = capsule_pointer(capsule, NULL);
    if (num_arguments != NUM_ARGUMENTS) {
        return copier->python.make_int(VTP_ROWS_NOT_COPIED);
    }
    void *tensors[] = {arguments[0], arguments[1], arguments[3], arguments[4]};
    int64_t result = vtp_rows_copy(copier, tensors, copier->python.read_int(arguments[2]));
    if (result == VTP_ROWS_FAILED) {
        return copier->python.call(copier->python.on_failure); /* which raises */
    }
    return result == VTP_ROWS_RAISED ? NULL : copier->python.make_int(result);
}
