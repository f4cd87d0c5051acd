/* Calls torch's two functions of the native allocator on a thread that Python knows nothing of. Called through
 * ctypes.PyDLL, `native_thread_run` keeps the GIL until they are done: one that wanted it would not come back. */

#include <pthread.h>
#include <stddef.h>
#include <time.h>

typedef void *(*alloc_function)(size_t bytes, int device, void *stream);
typedef void (*free_function)(void *address, size_t bytes, int device, void *stream);

static struct {
    alloc_function alloc;
    free_function free;
    size_t bytes;
    void *stream;
    int num_rounds;
    int num_made;
    pthread_t thread;
} job;

static void *run(void *unused) {
    (void)unused;
    for (int round = 0; round < job.num_rounds; round++) {
        void *address = job.alloc(job.bytes, 0, job.stream);
        if (address != NULL) {
            job.num_made++;
            job.free(address, job.bytes, 0, job.stream);
        }
    }
    return NULL;
}

/* 1 once every call has come back, 0 if one has not within so many milliseconds: then `native_thread_join` has to. */
int native_thread_run(alloc_function alloc, free_function free, size_t bytes, void *stream, int num_rounds, int ms) {
    struct timespec until;
    job.alloc = alloc;
    job.free = free;
    job.bytes = bytes;
    job.stream = stream;
    job.num_rounds = num_rounds;
    job.num_made = 0;
    if (pthread_create(&job.thread, NULL, run, NULL) != 0) {
        return 0;
    }
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec += 1;
        until.tv_nsec -= 1000000000L;
    }
    return pthread_timedjoin_np(job.thread, NULL, &until) == 0;
}

void native_thread_join(void) {
    pthread_join(job.thread, NULL);
}

/* How many allocations succeeded. */
int native_thread_num_made(void) {
    return job.num_made;
}
