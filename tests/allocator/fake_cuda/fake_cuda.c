/* A CUDA driver without a GPU: bookkeeping of addresses, handles, mappings, streams and events, which notes the first
 * broken rule and fails whichever call it is asked to fail.
 *
 * A stream is a pair of counters: work submitted and work completed. A kernel is one unit of work that touches a range
 * of addresses until its stream has completed it. An event is complete once its stream has completed what was submitted
 * before the event was recorded. Kernels of a module run on the host, on the spot. Of what a page holds it knows one
 * number, which copies take along. */

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "host_kernels.h"

#define MAX 65536
#define GRANULARITY ((uint64_t)2 << 20)

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, NOT_READY = 600 };
enum { CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907 };
enum { NOT_CAPTURING, CAPTURING, CAPTURING_IMPLICITLY, CAPTURING_UNNOTICED };
enum { RELAXED = 2 };

typedef struct {
    uint64_t address, bytes, handle;
    int is_accessible;
} range;

typedef struct {
    uint64_t bytes, content;
    int is_alive, num_maps;
} physical;

typedef struct {
    void *key;
    int64_t submitted, completed;
    int capture;
} stream;

typedef struct {
    void *stream_key;
    int64_t after;
    int is_alive, is_recorded, is_captured;
} event;

typedef struct {
    void *stream_key;
    int64_t at;
    uint64_t address, bytes;
} kernel;

typedef struct {
    void *context;
    int is_alive;
} module;

typedef struct {
    module *module;
    const host_kernel *kernel;
} function;

typedef struct {
    void *stream_key;
    int64_t width, grid_x, block_x;
} launch;

typedef struct {
    const char *name;
    int64_t count;
} call_count;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static range reserved[MAX], mapped[MAX], vacated[MAX]; /* vacated: addresses to be given out again */
static physical handles[MAX];
static stream streams[64];
static event events[MAX];
static kernel kernels[MAX];
static module modules[64];
static function functions[512];
static launch last_launch;
static _Atomic int is_queue_full, is_stuck, num_waiting;
static call_count calls[64];
static int num_reserved, num_mapped, num_vacated, num_handles, num_streams, num_events, num_kernels, num_calls;
static int num_modules, num_functions, num_contexts;
static uint64_t next_address, memory_bytes, created_bytes;
static int64_t fail_in;
static int fail_code;
static char fail_names[64];
static char violation[512];

static _Thread_local void *context, *own_context; /* own: what is current while nothing is pushed */
static _Thread_local int capture_mode, context_depth;
static _Thread_local int may_share; /* one page may be mapped at two addresses, as PagePool's ranges do */
static _Thread_local int was_free; /* the answer to this thread's last question whether a stream is being captured */
static _Thread_local void *asked_stream;

static void violate(const char *format, ...) {
    if (violation[0] == '\0') {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(violation, sizeof violation, format, arguments);
        va_end(arguments);
    }
}

static stream *find_stream(void *key) {
    for (int i = 0; i < num_streams; i++) {
        if (streams[i].key == key) {
            return &streams[i];
        }
    }
    streams[num_streams] = (stream){.key = key};
    return &streams[num_streams++];
}

static int any_capture(void) {
    for (int i = 0; i < num_streams; i++) {
        if (streams[i].capture != NOT_CAPTURING) {
            return 1;
        }
    }
    return 0;
}

static int is_running(const kernel *candidate) {
    return find_stream(candidate->stream_key)->completed < candidate->at;
}

static int overlaps(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

/* Count a call and say whether it has to fail; called with the lock held. */
static int begin(const char *name, int needs_context, int may_fail) {
    int i = 0;
    while (i < num_calls && strcmp(calls[i].name, name) != 0) {
        i++;
    }
    if (i == num_calls) {
        calls[num_calls++] = (call_count){.name = name};
    }
    calls[i].count++;
    if (needs_context && context == NULL) {
        violate("%s without a current context", name);
    }
    if (needs_context && any_capture() && capture_mode != RELAXED) {
        violate("%s during a capture, in a mode that forbids it", name);
    }
    if (!may_fail) {
        return OK;
    }
    if (fail_in > 0 && --fail_in == 0) {
        return fail_code;
    }
    return strstr(fail_names, name) != NULL ? fail_code : OK;
}

/* Run the rest under the lock unless the call has to fail; it sets `result`. */
#define CALL(needs_context, may_fail, ...)                                                                             \
    pthread_mutex_lock(&mutex);                                                                                        \
    int result = begin(__func__, needs_context, may_fail);                                                             \
    if (result == OK) {                                                                                                \
        __VA_ARGS__                                                                                                    \
    }                                                                                                                  \
    pthread_mutex_unlock(&mutex);                                                                                      \
    return result

int cuInit(unsigned flags) {
    (void)flags;
    return OK;
}

int cuGetErrorName(int result, const char **name) {
    static const struct {
        int code;
        const char *name;
    } names[] = {{INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}};
    for (int i = 0; i < 2; i++) {
        if (names[i].code == result) {
            *name = names[i].name;
            return OK;
        }
    }
    return INVALID_VALUE;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return OK;
}

int cuDevicePrimaryCtxRetain(void **made, int device) {
    CALL(0, 1, {
        num_contexts++;
        *made = (void *)(uintptr_t)(0xC0 + device);
    });
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    CALL(0, 0, { num_contexts--; });
}

int cuCtxGetCurrent(void **current) {
    CALL(0, 1, { *current = context; });
}

int cuCtxPushCurrent_v2(void *pushed) {
    CALL(0, 1, {
        if (context_depth++ > 0) {
            violate("a context was pushed on another");
        }
        context = pushed;
    });
}

int cuCtxPopCurrent_v2(void **popped) {
    CALL(0, 0, {
        if (context_depth-- != 1) {
            violate("a context was popped that was not pushed");
        }
        *popped = context;
        context = own_context;
    });
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    CALL(0, *mode == RELAXED, { /* going back cannot fail */
        int old = capture_mode;
        capture_mode = *mode;
        *mode = old;
    });
}

int cuCtxSynchronize(void) {
    CALL(1, 1, {
        for (int i = 0; i < num_streams; i++) {
            streams[i].completed = streams[i].submitted;
        }
    });
}

int cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t hint, unsigned long long flags) {
    (void)alignment, (void)hint, (void)flags;
    CALL(1, 1, {
        if (bytes == 0 || bytes % GRANULARITY != 0) {
            result = INVALID_VALUE;
        } else {
            int i = num_vacated - 1;
            while (i >= 0 && vacated[i].bytes != bytes) {
                i--;
            }
            *address = i >= 0 ? vacated[i].address : next_address;
            if (i >= 0) {
                vacated[i] = vacated[--num_vacated];
            } else {
                next_address += bytes + GRANULARITY;
            }
            reserved[num_reserved++] = (range){.address = *address, .bytes = bytes};
        }
    });
}

int cuMemAddressFree(uint64_t address, size_t bytes) {
    CALL(1, 1, {
        int i = 0;
        while (i < num_reserved && (reserved[i].address != address || reserved[i].bytes != bytes)) {
            i++;
        }
        if (i == num_reserved) {
            violate("addresses were freed that are not reserved");
            result = INVALID_VALUE;
        } else {
            for (int j = 0; j < num_mapped; j++) {
                if (overlaps(address, bytes, mapped[j].address, mapped[j].bytes)) {
                    violate("addresses were freed while a page is mapped there");
                }
            }
            if (num_vacated < MAX) {
                vacated[num_vacated++] = reserved[i];
            }
            reserved[i] = reserved[--num_reserved];
        }
    });
}

int cuMemCreate(uint64_t *handle, size_t bytes, const void *allocation, unsigned long long flags) {
    (void)allocation, (void)flags;
    CALL(1, 1, {
        if (bytes == 0 || bytes % GRANULARITY != 0) {
            result = INVALID_VALUE;
        } else if (created_bytes + bytes > memory_bytes) {
            result = OUT_OF_MEMORY;
        } else if (num_handles == MAX) {
            violate("the test creates more pages than the fake can count");
            result = OUT_OF_MEMORY;
        } else {
            created_bytes += bytes;
            handles[num_handles] = (physical){.bytes = bytes, .content = 0xBAD, .is_alive = 1};
            *handle = 0x1000 + (uint64_t)num_handles++;
        }
    });
}

static physical *find_handle(uint64_t handle) {
    uint64_t i = handle - 0x1000;
    return i < (uint64_t)num_handles && handles[i].is_alive ? &handles[i] : NULL;
}

int cuMemRelease(uint64_t handle) {
    CALL(1, 1, {
        physical *page = find_handle(handle);
        if (page == NULL) {
            violate("handle %#llx was released twice", (unsigned long long)handle);
            result = INVALID_VALUE;
        } else {
            if (page->num_maps > 0) {
                violate("a handle was released while it is mapped");
            }
            page->is_alive = 0;
            created_bytes -= page->bytes;
        }
    });
}

int cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) {
    (void)flags;
    CALL(1, 1, {
        int is_reserved = 0;
        for (int i = 0; i < num_reserved; i++) {
            is_reserved |= address >= reserved[i].address &&
                           address + bytes <= reserved[i].address + reserved[i].bytes;
        }
        physical *page = find_handle(handle);
        if (!is_reserved || page == NULL || page->bytes != bytes || offset != 0) {
            violate("a page was mapped wrongly");
            result = INVALID_VALUE;
        } else {
            for (int i = 0; i < num_mapped; i++) {
                if (overlaps(address, bytes, mapped[i].address, mapped[i].bytes)) {
                    violate("two pages were mapped at one address");
                }
            }
            if (page->num_maps++ > 0 && !may_share) {
                violate("one page was mapped under two segments");
            }
            mapped[num_mapped++] = (range){.address = address, .bytes = bytes, .handle = handle};
        }
    });
}

/* Walk the mappings that tile [address, address + bytes) exactly; `unmap` removes them, otherwise access is set. */
static int walk(uint64_t address, uint64_t bytes, int unmap) {
    uint64_t covered = 0;
    for (int i = 0; i < num_mapped; i++) {
        if (overlaps(address, bytes, mapped[i].address, mapped[i].bytes)) {
            covered += mapped[i].address >= address && mapped[i].address + mapped[i].bytes <= address + bytes
                           ? mapped[i].bytes
                           : 0;
        }
    }
    if (covered != bytes) {
        return 0;
    }
    for (int i = 0; i < num_mapped; i++) {
        if (overlaps(address, bytes, mapped[i].address, mapped[i].bytes)) {
            mapped[i].is_accessible = 1;
            if (unmap) {
                find_handle(mapped[i].handle)->num_maps--;
                mapped[i--] = mapped[--num_mapped];
            }
        }
    }
    return 1;
}

int cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count) {
    (void)access;
    CALL(1, 1, {
        if (count == 0 || !walk(address, bytes, 0)) {
            violate("access was set where nothing is mapped");
            result = INVALID_VALUE;
        }
    });
}

int cuMemUnmap(uint64_t address, size_t bytes) {
    CALL(1, 1, {
        for (int i = 0; i < num_kernels; i++) {
            if (is_running(&kernels[i]) && overlaps(address, bytes, kernels[i].address, kernels[i].bytes)) {
                violate("memory was unmapped under a running kernel");
            }
        }
        if (!walk(address, bytes, 1)) {
            violate("memory was unmapped that is not mapped");
            result = INVALID_VALUE;
        }
    });
}

/* The page that begins at an address, and can be used there. */
static physical *find_mapped(uint64_t address) {
    for (int i = 0; i < num_mapped; i++) {
        if (mapped[i].address == address && mapped[i].is_accessible) {
            return find_handle(mapped[i].handle);
        }
    }
    violate("memory was used that is not mapped");
    return NULL;
}

int cuMemcpyAsync(uint64_t target, uint64_t source, size_t bytes, void *stream_key) {
    (void)stream_key;
    CALL(1, 1, {
        physical *to = find_mapped(target);
        physical *from = find_mapped(source);
        if (to == NULL || from == NULL || to->bytes != bytes || from->bytes != bytes) {
            violate("something else than a whole page was copied");
            result = INVALID_VALUE;
        } else {
            to->content = from->content;
        }
    });
}

static event *find_event(void *handle) {
    event *found = &events[(uintptr_t)handle - 1];
    if (!found->is_alive) {
        violate("an event was used after it was destroyed");
    }
    return found;
}

int cuEventCreate(void **made, unsigned flags) {
    (void)flags;
    CALL(1, 1, {
        int i = 0;
        while (events[i].is_alive) {
            i++;
        }
        num_events = i + 1 > num_events ? i + 1 : num_events;
        events[i] = (event){.is_alive = 1};
        *made = (void *)(uintptr_t)(i + 1);
    });
}

int cuEventDestroy_v2(void *handle) {
    CALL(1, 0, { find_event(handle)->is_alive = 0; });
}

int cuEventRecord(void *handle, void *stream_key) {
    CALL(1, 1, {
        event *recorded = find_event(handle);
        stream *on = find_stream(stream_key);
        /* Another thread may begin a capture between the question and the record. */
        int began_since = was_free && asked_stream == stream_key;
        was_free = 0;
        if ((on->capture == CAPTURING || on->capture == CAPTURING_IMPLICITLY) && !began_since) {
            violate("an event was recorded into a capture");
        }
        recorded->stream_key = stream_key;
        recorded->after = on->submitted;
        recorded->is_recorded = 1;
        recorded->is_captured = on->capture == CAPTURING || on->capture == CAPTURING_UNNOTICED;
        on->capture = on->capture == CAPTURING_UNNOTICED ? CAPTURING : on->capture;
    });
}

static int query(event *asked) {
    if (!asked->is_recorded) {
        violate("an event was asked for before it was recorded");
    }
    if (asked->is_captured) {
        return CAPTURED_EVENT;
    }
    return find_stream(asked->stream_key)->completed >= asked->after ? OK : NOT_READY;
}

int cuEventQuery(void *handle) {
    CALL(1, 1, { result = query(find_event(handle)); });
}

int cuEventSynchronize(void *handle) {
    num_waiting++;
    for (int i = 0; i < 1000 && is_stuck; i++) {
        usleep(10000);
    }
    num_waiting--;
    CALL(1, 1, {
        event *waited = find_event(handle);
        result = query(waited);
        if (result == NOT_READY) {
            find_stream(waited->stream_key)->completed = waited->after;
            result = OK;
        }
    });
}

int cuStreamIsCapturing(void *stream_key, int *status) {
    CALL(0, 1, { /* allowed in every mode */
        if (context == NULL) {
            violate("cuStreamIsCapturing without a current context");
        }
        int capture = find_stream(stream_key)->capture;
        *status = capture == CAPTURING;
        was_free = capture == NOT_CAPTURING || capture == CAPTURING_UNNOTICED;
        asked_stream = stream_key;
        result = capture == CAPTURING_IMPLICITLY ? CAPTURE_IMPLICIT : OK;
    });
}

int cuModuleLoadData(void **made, const void *image) {
    CALL(1, 1, {
        if (strcmp(image, "fake image") != 0) {
            result = INVALID_VALUE;
        } else {
            modules[num_modules] = (module){.context = context, .is_alive = 1};
            *made = &modules[num_modules++];
        }
    });
}

int cuModuleUnload(void *unloaded) {
    CALL(1, 0, { ((module *)unloaded)->is_alive = 0; });
}

int cuModuleGetFunction(void **found, void *in, const char *name) {
    CALL(1, 1, {
        functions[num_functions] = (function){.module = in, .kernel = find_kernel(name)};
        if (functions[num_functions].kernel == NULL) {
            result = INVALID_VALUE;
        } else {
            *found = &functions[num_functions++];
        }
    });
}

int cuLaunchKernel(void *launched, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream_key, void **parameters,
                   void **extra) {
    for (int i = 0; i < 1000 && is_queue_full; i++) {
        usleep(10000);
    }
    CALL(0, 1, {
        if (is_queue_full) {
            violate("a launch waited in vain for room in the queue");
        }
        const function *of = launched;
        if (of->module->context != context || !of->module->is_alive) {
            result = INVALID_HANDLE;
        } else if (grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes != 0 || extra != NULL) {
            violate("the fake has no such launches");
        } else {
            last_launch = (launch){stream_key, of->kernel->width, grid_x, block_x};
            run_on_host(of->kernel, (index3){grid_x, grid_y, 1}, (index3){block_x, 1, 1}, parameters);
        }
    });
}

/* ---- What a test does to the fake. */

/* Begin anew, on a device of `memory` bytes. */
void fake_reset(uint64_t memory) {
    pthread_mutex_lock(&mutex);
    num_reserved = num_mapped = num_vacated = num_handles = num_streams = num_events = num_kernels = num_calls = 0;
    memset(events, 0, sizeof events);
    next_address = (uint64_t)0x7f << 40;
    memory_bytes = memory;
    created_bytes = 0;
    num_modules = num_functions = num_contexts = 0;
    last_launch = (launch){.width = 0};
    fail_in = 0;
    fail_names[0] = violation[0] = '\0';
    pthread_mutex_unlock(&mutex);
}

void fake_set_memory(uint64_t memory) {
    pthread_mutex_lock(&mutex);
    memory_bytes = memory;
    pthread_mutex_unlock(&mutex);
}

/* Fail the n-th call from now on that can fail (0: none), or every call of these names ("": none). */
void fake_fail(int64_t n, const char *names, int code) {
    pthread_mutex_lock(&mutex);
    fail_in = n;
    fail_code = code;
    snprintf(fail_names, sizeof fail_names, "%s", names);
    pthread_mutex_unlock(&mutex);
}

/* How many calls are left until the one that fails. */
int64_t fake_fail_in(void) {
    return fail_in;
}

/* Run a kernel that touches these bytes until fake_finish. */
void fake_launch(void *stream_key, uint64_t address, uint64_t bytes) {
    pthread_mutex_lock(&mutex);
    uint64_t accessible = 0;
    for (int i = 0; i < num_mapped; i++) {
        if (mapped[i].is_accessible && overlaps(address, bytes, mapped[i].address, mapped[i].bytes)) {
            uint64_t first = address > mapped[i].address ? address : mapped[i].address;
            uint64_t end = address + bytes;
            uint64_t mapped_end = mapped[i].address + mapped[i].bytes;
            accessible += (end < mapped_end ? end : mapped_end) - first;
        }
    }
    if (accessible != bytes) {
        violate("a kernel touched memory that is not accessible");
    }
    int slot = 0;
    while (slot < num_kernels && is_running(&kernels[slot])) {
        slot++;
    }
    num_kernels += slot == num_kernels;
    int64_t at = ++find_stream(stream_key)->submitted;
    kernels[slot] = (kernel){.stream_key = stream_key, .at = at, .address = address, .bytes = bytes};
    pthread_mutex_unlock(&mutex);
}

void fake_finish(void *stream_key) {
    pthread_mutex_lock(&mutex);
    stream *finished = find_stream(stream_key);
    finished->completed = finished->submitted;
    pthread_mutex_unlock(&mutex);
}

/* What is current on the calling thread while nothing is pushed. */
void fake_set_context(void *current) {
    context = own_context = current;
}

void fake_set_sharing(int may) {
    may_share = may;
}

/* Launches wait as long as it is full. */
void fake_set_queue_full(int full) {
    is_queue_full = full;
}

/* Who waits for an event goes on waiting as long as the device is stuck. */
void fake_set_stuck(int stuck) {
    is_stuck = stuck;
}

int fake_num_waiting(void) {
    return num_waiting;
}

void fake_read_launch(launch *latest) {
    pthread_mutex_lock(&mutex);
    *latest = last_launch;
    pthread_mutex_unlock(&mutex);
}

/* 0 none, 1 capturing, 2 another stream's capture forbids to ask, 3 a capture that begins just after the question. */
void fake_set_capture(void *stream_key, int capture) {
    pthread_mutex_lock(&mutex);
    find_stream(stream_key)->capture = capture;
    pthread_mutex_unlock(&mutex);
}

/* Give the page that begins at an address a content, and tell it. */
void fake_write_page(uint64_t address, uint64_t content) {
    pthread_mutex_lock(&mutex);
    physical *page = find_mapped(address);
    if (page != NULL) {
        page->content = content;
    }
    pthread_mutex_unlock(&mutex);
}

uint64_t fake_read_page(uint64_t address) {
    pthread_mutex_lock(&mutex);
    const physical *page = find_mapped(address);
    uint64_t content = page != NULL ? page->content : 0xBAD;
    pthread_mutex_unlock(&mutex);
    return content;
}

int64_t fake_num_calls(const char *name) {
    int64_t count = 0;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < num_calls; i++) {
        if (name[0] == '\0' || strcmp(calls[i].name, name) == 0) {
            count += calls[i].count;
        }
    }
    pthread_mutex_unlock(&mutex);
    return count;
}

typedef struct {
    int64_t num_reserved, num_mapped, num_handles, created_bytes, num_events, num_modules, num_contexts;
    int64_t context_depth, capture_mode;
} fake_counts;

/* What is alive now; the last two are the calling thread's. */
void fake_read(fake_counts *counts) {
    pthread_mutex_lock(&mutex);
    *counts = (fake_counts){.num_reserved = num_reserved,
                            .num_mapped = num_mapped,
                            .created_bytes = (int64_t)created_bytes,
                            .num_contexts = num_contexts,
                            .context_depth = context_depth,
                            .capture_mode = capture_mode};
    for (int i = 0; i < num_handles; i++) {
        counts->num_handles += handles[i].is_alive;
    }
    for (int i = 0; i < num_events; i++) {
        counts->num_events += events[i].is_alive;
    }
    for (int i = 0; i < num_modules; i++) {
        counts->num_modules += modules[i].is_alive;
    }
    pthread_mutex_unlock(&mutex);
}

/* The first broken rule; "" where none was. */
const char *fake_violation(void) {
    return violation;
}
