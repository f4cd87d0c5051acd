/* Fences by events. A stream that is being captured cannot be fenced now: its fence is set, later, when it no longer
 * is, which covers more work and is as safe. */

#include "fence.h"

/* Try to put the event behind the stream's work. */
static void record(stream_fence *fence) {
    int status = CUDA_CAPTURE_STATUS_NONE;
    /* Asking about the legacy stream while a blocking stream is captured answers CUDA_STREAM_CAPTURE_IMPLICIT and does
     * no harm, whereas recording there would end that capture. */
    if (cuda.cuStreamIsCapturing(fence->stream, &status) != CUDA_OK || status != CUDA_CAPTURE_STATUS_NONE) {
        return;
    }
    if (cuda.cuEventCreate(&fence->event, CUDA_EVENT_DISABLE_TIMING) != CUDA_OK) {
        fence->event = NULL;
        return;
    }
    if (cuda.cuEventRecord(fence->event, fence->stream) != CUDA_OK) {
        cuda.cuEventDestroy_v2(fence->event);
        fence->event = NULL;
    }
}

/* Act on what a query or a wait said about the event. */
static int settle(stream_fence *fence, cuda_result result) {
    /* CUDA_CAPTURED_EVENT: a capture began between the question and the record. */
    if (result == CUDA_OK || result == CUDA_CAPTURED_EVENT) {
        cuda.cuEventDestroy_v2(fence->event);
        fence->event = NULL;
        fence->has_passed = result == CUDA_OK;
    }
    return fence->has_passed;
}

stream_fence fence_set(cuda_stream stream) {
    stream_fence made = {.stream = stream};
    record(&made);
    return made;
}

int fence_poll(stream_fence *fence) {
    if (!fence->has_passed && fence->event == NULL) {
        record(fence);
    }
    return fence->has_passed || (fence->event != NULL && settle(fence, cuda.cuEventQuery(fence->event)));
}

int fence_wait(stream_fence *fence) {
    if (fence_poll(fence)) {
        return 1;
    }
    if (fence->event != NULL) {
        return settle(fence, cuda.cuEventSynchronize(fence->event));
    }
    int status = CUDA_CAPTURE_STATUS_NONE;
    cuda_result asked = cuda.cuStreamIsCapturing(fence->stream, &status);
    if (asked == CUDA_STREAM_CAPTURE_IMPLICIT || (asked == CUDA_OK && status != CUDA_CAPTURE_STATUS_NONE)) {
        return 0;
    }
    /* The stream is gone or of another context, but its work may still run. */
    fence->has_passed = cuda.cuCtxSynchronize() == CUDA_OK;
    return fence->has_passed;
}
