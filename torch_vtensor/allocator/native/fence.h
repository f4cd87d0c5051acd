/* A fence: passed once the device has done everything that one stream held when the fence was set. */

#ifndef VTENSOR_FENCE_H
#define VTENSOR_FENCE_H

#include "cuda_driver.h"

typedef struct {
    cuda_stream stream;
    cuda_event event; /* recorded, and not seen to be complete; NULL otherwise */
    int has_passed;
} stream_fence;

stream_fence fence_set(cuda_stream stream);
/* Never waits. */
int fence_poll(stream_fence *fence);
/* Waits for the device; returns whether the fence has passed, which fails only where nothing can be waited for. */
int fence_wait(stream_fence *fence);

#endif
