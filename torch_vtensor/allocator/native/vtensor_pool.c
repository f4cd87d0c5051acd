/* What PyTorch's caching allocator calls, under its own lock and without the GIL, for the segments of a MemPool.
 *
 * torch relies on cudaFree waiting for the device before it takes memory away. Here a freed segment is *pending* behind
 * fences instead, and is given back by a later call once they have passed:
 *
 *     alloc -> live -(torch frees it: fences set)-> pending -(fences passed)-> unmapped, pages pooled
 */

#include "vtensor_pool.h"

#include <pthread.h>
#include <stdlib.h>

#include "segment.h"

#define MAX_DEVICES 128

typedef struct {
    pthread_mutex_t mutex;
    cuda_context context; /* the primary one, retained for good by the first attach */
    vtp_ledger *ledger;   /* owned; NULL: detached */
    segment_plan plan;
    memory_segment *live;
    memory_segment *pending;
    int64_t num_made;    /* segments ever; the number of the latest */
    int64_t num_watches; /* ever; the number of the latest */
    int64_t watch;       /* the number of the one that is on; 0: none */
    vtp_torch_counts counts;
} device_state;

static device_state devices[MAX_DEVICES] = {[0 ... MAX_DEVICES - 1] = {.mutex = PTHREAD_MUTEX_INITIALIZER}};

int vtensor_pool_abi_version(void) {
    return 6;
}

/* Of the segments that the calling thread makes on each device. */
static _Thread_local int32_t thread_tags[MAX_DEVICES];

/* Lock a device and make its context current, with a capture mode in which the calling thread may map memory and ask
 * events although a capture is under way. The mode comes back in *mode, for leave(). */
static int enter(device_state *device, int *mode) {
    pthread_mutex_lock(&device->mutex);
    if (device->context == NULL) {
        note_failure("the device was never attached", "vtp_torch_attach", 0);
    } else if (CUDA_DO(cuCtxPushCurrent_v2, 0, device->context)) {
        *mode = CUDA_CAPTURE_MODE_RELAXED;
        if (CUDA_DO(cuThreadExchangeStreamCaptureMode, 0, mode)) {
            return 1;
        }
        cuda.cuCtxPopCurrent_v2(&(cuda_context){NULL});
    }
    pthread_mutex_unlock(&device->mutex);
    return 0;
}

static void leave(device_state *device, int mode) {
    cuda.cuThreadExchangeStreamCaptureMode(&mode);
    cuda.cuCtxPopCurrent_v2(&(cuda_context){NULL});
    pthread_mutex_unlock(&device->mutex);
}

static device_state *find_device(int ordinal) {
    return ordinal >= 0 && ordinal < MAX_DEVICES ? &devices[ordinal] : NULL;
}

static void add_pending(device_state *device, memory_segment *segment) {
    segment->next = device->pending;
    device->pending = segment;
    device->counts.pending_segments++;
    device->counts.pending_bytes += segment->bytes;
}

/* Give back the pending segments in *list that the device is done with; the others stay in it. */
static void give_back(device_state *device, memory_segment **list) {
    while (*list != NULL) {
        memory_segment *segment = *list;
        struct memory_segment *next = segment->next;
        int64_t bytes = segment->bytes;
        int is_done = device->watch == 0 || segment->watch != device->watch;
        for (int i = 0; i < 2; i++) {
            is_done &= fence_poll(&segment->fences[i]);
        }
        if (is_done && segment_unmake(segment)) {
            *list = next;
            device->counts.pending_segments--;
            device->counts.pending_bytes -= bytes;
        } else {
            list = &segment->next;
        }
    }
}

/* Give back every pending segment, waiting for the device. The lock is open meanwhile: the device's work may depend on
 * a host function that needs the GIL, whose holder may be asking for this lock. */
static void wait_for_pending(device_state *device) {
    memory_segment *waiting = device->pending;
    if (waiting == NULL) {
        return;
    }
    device->pending = NULL;
    device->counts.num_device_waits++;
    pthread_mutex_unlock(&device->mutex);
    for (memory_segment *segment = waiting; segment != NULL; segment = segment->next) {
        for (int i = 0; i < 2; i++) {
            fence_wait(&segment->fences[i]);
        }
    }
    pthread_mutex_lock(&device->mutex);
    give_back(device, &waiting);
    while (waiting != NULL) {
        memory_segment *segment = waiting;
        waiting = segment->next;
        segment->next = device->pending;
        device->pending = segment;
    }
}

static segment_result make(device_state *device, int64_t bytes, memory_segment **made) {
    *made = NULL;
    if (device->ledger == NULL) {
        note_failure("the device was detached", "vtp_torch_attach", bytes);
        return SEGMENT_FAILED;
    }
    segment_result result = segment_make(&device->plan, device->ledger, bytes, made);
    if (result != SEGMENT_MADE && *made != NULL) {
        /* Half undone, never seen by the device: there is nothing to wait for. */
        (*made)->fences[0].has_passed = (*made)->fences[1].has_passed = 1;
        add_pending(device, *made);
    }
    return result;
}

static void *alloc(device_state *device, int64_t bytes) {
    memory_segment *segment;
    give_back(device, &device->pending);
    segment_result result = make(device, bytes, &segment);
    if (result == SEGMENT_LACKS_MEMORY && device->pending != NULL) {
        /* As cudaMalloc after cudaFree would: better late than out of memory. */
        wait_for_pending(device);
        result = make(device, bytes, &segment);
    }
    if (result != SEGMENT_MADE) {
        return NULL;
    }
    segment->tag = thread_tags[device - devices];
    segment->number = ++device->num_made;
    segment->next = device->live;
    device->live = segment;
    device->counts.live_segments++;
    device->counts.live_bytes += segment->bytes;
    return (void *)(uintptr_t)segment->address;
}

void *vtp_torch_alloc(size_t size, int ordinal, void *stream) {
    (void)stream;
    device_state *device = find_device(ordinal);
    void *address = NULL;
    int mode;
    if (device != NULL && enter(device, &mode)) {
        address = alloc(device, (int64_t)size);
        device->counts.num_allocs++;
        device->counts.num_failures += address == NULL;
        leave(device, mode);
    }
    if (address == NULL) {
        latest_failure()->num_failures++;
        latest_failure()->asked_bytes = (int64_t)size;
    }
    return address;
}

/* Where the list of live segments has the one at the address; its end, NULL, where there is none. */
static memory_segment **find_live(device_state *device, uint64_t address) {
    memory_segment **link = &device->live;
    while (*link != NULL && (*link)->address != address) {
        link = &(*link)->next;
    }
    return link;
}

void vtp_torch_free(void *address, size_t size, int ordinal, void *stream) {
    (void)size;
    device_state *device = find_device(ordinal);
    int mode;
    if (device == NULL || !enter(device, &mode)) {
        return;
    }
    memory_segment **link = find_live(device, (uint64_t)(uintptr_t)address);
    memory_segment *segment = *link;
    if (segment != NULL) {
        *link = segment->next;
        device->counts.num_frees++;
        device->counts.live_segments--;
        device->counts.live_bytes -= segment->bytes;
        device->counts.asleep_bytes -= segment->is_asleep ? segment->bytes : 0;
        /* torch names the stream that was current when the segment was made. Its blocks may belong to another one, and
         * graphs are replayed where their user likes: most often on the default stream, hence the second fence. */
        segment->fences[0] = fence_set(stream);
        segment->fences[1] = stream != NULL ? fence_set(NULL) : (stream_fence){.has_passed = 1};
        add_pending(device, segment);
    }
    give_back(device, &device->pending);
    leave(device, mode);
}

int64_t vtp_torch_drain(int ordinal, int wait) {
    device_state *device = find_device(ordinal);
    int mode;
    if (device == NULL || !enter(device, &mode)) {
        return 0;
    }
    give_back(device, &device->pending);
    if (wait) {
        wait_for_pending(device);
    }
    int64_t num_pending = device->counts.pending_segments;
    leave(device, mode);
    return num_pending;
}

int32_t vtp_torch_set_tag(int ordinal, int32_t tag) {
    if (find_device(ordinal) == NULL) {
        return 0;
    }
    int32_t before = thread_tags[ordinal];
    thread_tags[ordinal] = tag;
    return before;
}

int64_t vtp_torch_list(int ordinal, vtp_torch_segment *segments, int64_t capacity, int watch) {
    device_state *device = find_device(ordinal);
    int64_t num_segments = 0;
    if (device != NULL) {
        pthread_mutex_lock(&device->mutex);
        if (watch) {
            device->watch = ++device->num_watches;
        }
        for (memory_segment *segment = device->live; segment != NULL; segment = segment->next, num_segments++) {
            if (num_segments < capacity) {
                segment->watch = watch ? device->watch : segment->watch;
                segments[num_segments] = (vtp_torch_segment){segment->address, segment->bytes, segment->number,
                                                             segment->tag, segment->is_asleep};
            }
        }
        pthread_mutex_unlock(&device->mutex);
    }
    return num_segments;
}

void vtp_torch_unwatch(int ordinal) {
    device_state *device = find_device(ordinal);
    if (device != NULL) {
        pthread_mutex_lock(&device->mutex);
        device->watch = 0; /* and so for those too that a thread is waiting for, which are on no list */
        pthread_mutex_unlock(&device->mutex);
    }
}

static int put_to_sleep(const segment_plan *plan, memory_segment *segment) {
    (void)plan;
    return segment_sleep(segment) ? VTP_SEGMENT_DONE : VTP_SEGMENT_FAILED;
}

static int wake(const segment_plan *plan, memory_segment *segment) {
    segment_result woken = segment_wake(plan, segment);
    return woken == SEGMENT_MADE           ? VTP_SEGMENT_DONE
           : woken == SEGMENT_LACKS_MEMORY ? VTP_SEGMENT_LACKS_MEMORY
                                           : VTP_SEGMENT_FAILED;
}

/* Bring the segment at the address to where it is_asleep or not, by `move`, unless it is so already. */
static int move_segment(int ordinal, uint64_t address, int is_asleep,
                        int (*move)(const segment_plan *, memory_segment *)) {
    device_state *device = find_device(ordinal);
    int mode;
    if (device == NULL || !enter(device, &mode)) {
        return VTP_SEGMENT_FAILED;
    }
    memory_segment *segment = *find_live(device, address);
    int result = segment == NULL ? VTP_SEGMENT_GONE : VTP_SEGMENT_DONE;
    if (segment != NULL && segment->is_asleep != is_asleep) {
        result = move(&device->plan, segment);
        int64_t bytes = result == VTP_SEGMENT_DONE ? segment->bytes : 0;
        device->counts.asleep_bytes += is_asleep ? bytes : -bytes;
    }
    leave(device, mode);
    return result;
}

int vtp_torch_sleep(int ordinal, uint64_t address) {
    return move_segment(ordinal, address, 1, put_to_sleep);
}

int vtp_torch_wake(int ordinal, uint64_t address) {
    return move_segment(ordinal, address, 0, wake);
}

static int retain_context(device_state *device, int ordinal) {
    int handle;
    return device->context != NULL || (CUDA_DO(cuDeviceGet, 0, &handle, ordinal) &&
                                       CUDA_DO(cuDevicePrimaryCtxRetain, 0, &device->context, handle));
}

int vtp_torch_attach(const vtp_torch_config *config) {
    device_state *device = find_device(config->device);
    if (device == NULL || !cuda_open(config->driver)) {
        return 0;
    }
    int num_access = 1 + config->num_peers;
    cuda_access *access = calloc((size_t)num_access, sizeof *access);
    if (access == NULL) {
        note_failure("no host memory", "vtp_torch_attach", 0);
        return 0;
    }
    for (int i = 0; i < num_access; i++) {
        int ordinal = i == 0 ? config->device : config->peers[i - 1];
        access[i] = (cuda_access){{CUDA_LOCATION_DEVICE, ordinal}, CUDA_ACCESS_READ_WRITE};
    }
    pthread_mutex_lock(&device->mutex);
    int attached = retain_context(device, config->device);
    if (attached) {
        free(device->plan.access);
        device->plan = (segment_plan){
            .page_bytes = config->page_bytes,
            .large_page_bytes = config->large_page_bytes,
            .device = config->device,
            .num_access = num_access,
            .access = access,
        };
        ledger_retain(config->ledger);
        if (device->ledger != NULL) {
            vtp_ledger_delete(device->ledger);
        }
        device->ledger = config->ledger;
    } else {
        free(access);
    }
    pthread_mutex_unlock(&device->mutex);
    return attached;
}

int64_t vtp_torch_detach(int ordinal) {
    device_state *device = find_device(ordinal);
    int mode;
    if (device == NULL || !enter(device, &mode)) {
        return 0;
    }
    if (device->ledger != NULL) {
        vtp_ledger_delete(device->ledger);
        device->ledger = NULL;
    }
    wait_for_pending(device);
    int64_t num_left = device->counts.live_segments + device->counts.pending_segments;
    leave(device, mode);
    return num_left;
}

void vtp_torch_read(int ordinal, vtp_torch_counts *counts) {
    *counts = (vtp_torch_counts){0};
    device_state *device = find_device(ordinal);
    if (device != NULL) {
        pthread_mutex_lock(&device->mutex);
        *counts = device->counts;
        pthread_mutex_unlock(&device->mutex);
    }
}

void vtp_torch_read_failure(vtp_torch_failure *failure) {
    *failure = *latest_failure();
}
