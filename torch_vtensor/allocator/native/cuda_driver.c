/* Opens the CUDA driver at run time and names its failures. */

#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>

cuda_driver cuda;

static pthread_mutex_t open_mutex = PTHREAD_MUTEX_INITIALIZER;
static int is_open;

static _Thread_local vtp_torch_failure failure;

vtp_torch_failure *latest_failure(void) {
    return &failure;
}

void note_failure(const char *code, const char *call, int64_t bytes) {
    failure.code = code;
    failure.call = call;
    failure.bytes = bytes;
}

int cuda_check(cuda_result result, const char *call, int64_t bytes) {
    if (result == CUDA_OK) {
        return 1;
    }
    const char *code = NULL;
    if (cuda.cuGetErrorName(result, &code) != CUDA_OK || code == NULL) {
        code = "an error that the driver has no name for";
    }
    note_failure(code, call, bytes);
    return 0;
}

static int resolve(const char *library) {
    void *opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (opened == NULL) {
        note_failure("the library cannot be opened", "dlopen", 0);
        return 0;
    }
#define CUDA_RESOLVE(name, parameters)                                                                                 \
    /* POSIX lets an object pointer hold a function's address; ISO C does not let it be converted. */                  \
    *(void **)&cuda.name = dlsym(opened, #name);                                                                       \
    if (cuda.name == NULL) {                                                                                           \
        note_failure("the driver has no such function", #name, 0);                                                     \
        dlclose(opened);                                                                                               \
        return 0;                                                                                                      \
    }
    CUDA_FUNCTIONS(CUDA_RESOLVE)
#undef CUDA_RESOLVE
    return 1;
}

int cuda_open(const char *library) {
    pthread_mutex_lock(&open_mutex);
    if (!is_open) {
        is_open = resolve(library) && CUDA_DO(cuInit, 0, 0);
    }
    int opened = is_open;
    pthread_mutex_unlock(&open_mutex);
    return opened;
}
