/* The kernels that copy new rows of two tensors to their places, and what they are told.
 *
 * One source for three readers: NVRTC compiles it for the device, row_copy.c includes it for the declarations alone, and
 * the tests' fake driver compiles it for the host. So it is written in what C and CUDA C++ have in common. */

/* Where the rows [slot, head, token] of one tensor come from and go to. Strides are bytes. */
struct row_copy_part {
    char *target;
    const char *source;
    unsigned long long target_strides[3];
    unsigned long long source_strides[3];
    unsigned long long row_words; /* of the width that the kernel copies at once */
};

struct row_copy_job {
    struct row_copy_part parts[2]; /* one a blockIdx.y */
    unsigned long long num_slots, num_heads, num_tokens;
};

#if defined(__CUDACC__) && !defined(KERNEL)
#define KERNEL extern "C" __global__
#endif
#ifdef KERNEL

/* Heads vary before tokens: new rows mostly come as [slot, token, head, dim], and then both sides are read and written
 * in the order of their addresses. */
#define DEFINE_COPY_ROWS(width, word)                                                                                  \
    KERNEL void copy_rows_##width(const __grid_constant__ struct row_copy_job job) {                                   \
        const struct row_copy_part *part = &job.parts[blockIdx.y];                                                     \
        unsigned long long num_words = job.num_slots * job.num_tokens * job.num_heads * part->row_words;               \
        unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;                                          \
        unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;                              \
        for (; i < num_words; i += step) {                                                                             \
            unsigned long long row = i / part->row_words, in_row = i % part->row_words * width;                        \
            unsigned long long head = row % job.num_heads, token = row / job.num_heads;                                \
            unsigned long long slot = token / job.num_tokens;                                                          \
            token %= job.num_tokens;                                                                                   \
            const char *source = part->source + slot * part->source_strides[0] + head * part->source_strides[1] +      \
                                 token * part->source_strides[2] + in_row;                                             \
            char *target = part->target + slot * part->target_strides[0] + head * part->target_strides[1] +            \
                           token * part->target_strides[2] + in_row;                                                   \
            *(word *)target = *(const word *)source;                                                                   \
        }                                                                                                              \
    }

DEFINE_COPY_ROWS(16, uint4)
DEFINE_COPY_ROWS(8, uint2)
DEFINE_COPY_ROWS(4, unsigned int)
DEFINE_COPY_ROWS(2, unsigned short)
DEFINE_COPY_ROWS(1, unsigned char)

#endif
