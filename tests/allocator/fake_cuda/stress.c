/* Several threads allocate, launch, free, finish and capture at random, while one more uses the ledger as PagePool does
 * and changes its budget. Built with sanitizers; prints what is left over, which must be nothing.
 *
 *     stress <fake driver> <threads> <rounds> */

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../torch_vtensor/allocator/native/vtensor_pool.h"

#define MIB ((int64_t)1 << 20)
#define NUM_SLOTS 6

static void (*fake_reset)(uint64_t memory);
static void (*fake_launch)(void *stream, uint64_t address, uint64_t bytes);
static void (*fake_finish)(void *stream);
static void (*fake_set_capture)(void *stream, int capture);
static void (*fake_read)(int64_t counts[7]);
static const char *(*fake_violation)(void);

static vtp_ledger *ledger;
static vtp_shown shown;
static int num_rounds;

typedef struct {
    uintptr_t id;
    int64_t num_made;
    int64_t num_refused;
} worker;

static unsigned next(unsigned *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void *use_torch(void *argument) {
    worker *self = argument;
    void *stream = (void *)(self->id % 3); /* 0 is the legacy stream, and some threads share one */
    unsigned random = (unsigned)self->id + 1;
    struct {
        void *address;
        size_t bytes;
    } slots[NUM_SLOTS] = {{0}};
    for (int round = 0; round < num_rounds; round++) {
        unsigned slot = next(&random) % NUM_SLOTS;
        unsigned dice = next(&random) % 8;
        if (slots[slot].address == NULL) {
            slots[slot].bytes = (size_t)(1 + next(&random) % (40 * MIB));
            slots[slot].address = vtp_torch_alloc(slots[slot].bytes, 0, stream);
            self->num_made += slots[slot].address != NULL;
            self->num_refused += slots[slot].address == NULL;
            if (slots[slot].address != NULL && dice < 6) {
                fake_launch(stream, (uint64_t)(uintptr_t)slots[slot].address, slots[slot].bytes);
            }
        } else {
            vtp_torch_free(slots[slot].address, slots[slot].bytes, 0, stream);
            slots[slot].address = NULL;
        }
        if (dice == 0) {
            fake_finish(stream);
        } else if (dice == 1) {
            vtp_torch_drain(0, (int)(next(&random) % 2));
        } else if (dice == 2 && stream != NULL) {
            fake_set_capture(stream, (int)(next(&random) % 4));
        }
    }
    fake_set_capture(stream, 0);
    for (int slot = 0; slot < NUM_SLOTS; slot++) {
        if (slots[slot].address != NULL) {
            vtp_torch_free(slots[slot].address, slots[slot].bytes, 0, stream);
        }
    }
    return NULL;
}

/* What PagePool does: takes pooled pages and puts them back. It has no pages of its own, so what it is charged for it
 * uncharges. */
/* As another process reads them. */
static void look_at_shown(void) {
    int64_t version = __atomic_load_n(&shown.version, __ATOMIC_ACQUIRE);
    int64_t committed_bytes = __atomic_load_n(&shown.committed_bytes, __ATOMIC_ACQUIRE);
    int64_t free_bytes = __atomic_load_n(&shown.free_bytes, __ATOMIC_ACQUIRE);
    int64_t torch_bytes = __atomic_load_n(&shown.torch_bytes, __ATOMIC_ACQUIRE);
    if (version % 2 == 0 && __atomic_load_n(&shown.version, __ATOMIC_ACQUIRE) == version &&
        free_bytes + torch_bytes > committed_bytes) {
        printf("what is shown does not add up\n");
    }
}

static void *use_ledger(void *argument) {
    unsigned random = (unsigned)((worker *)argument)->id + 1;
    for (int round = 0; round < num_rounds; round++) {
        int64_t bytes = next(&random) % 2 ? 2 * MIB : 32 * MIB;
        uint64_t handle;
        int taken = vtp_ledger_take(ledger, bytes, &handle);
        if (taken == VTP_REUSED) {
            vtp_ledger_put(ledger, handle, bytes);
        } else if (taken == VTP_CHARGED) {
            vtp_ledger_uncharge(ledger, bytes);
        }
        if (vtp_ledger_pop(ledger, &handle, &bytes)) {
            vtp_ledger_put(ledger, handle, bytes);
        }
        vtp_ledger_set_budget(ledger, (int64_t)(100 + next(&random) % 400) * MIB);
        vtp_ledger_counts counts;
        vtp_ledger_read(ledger, &counts);
        if (counts.free_bytes + counts.torch_bytes > counts.committed_bytes || counts.torch_bytes < 0) {
            printf("the ledger does not add up\n");
        }
        look_at_shown();
        vtp_torch_counts torch_counts;
        vtp_torch_read(0, &torch_counts);
    }
    return NULL;
}

static void *find(void *driver, const char *name) {
    void *found = dlsym(driver, name);
    if (found == NULL) {
        fprintf(stderr, "%s: %s\n", name, dlerror());
        exit(2);
    }
    return found;
}

int main(int argc, char **argv) {
    void *driver = dlopen(argc > 1 ? argv[1] : "", RTLD_NOW);
    if (argc != 4 || driver == NULL) {
        fprintf(stderr, "%s\n", argc == 4 ? dlerror() : "usage: stress <fake driver> <threads> <rounds>");
        return 2;
    }
    *(void **)&fake_reset = find(driver, "fake_reset");
    *(void **)&fake_launch = find(driver, "fake_launch");
    *(void **)&fake_finish = find(driver, "fake_finish");
    *(void **)&fake_set_capture = find(driver, "fake_set_capture");
    *(void **)&fake_read = find(driver, "fake_read");
    *(void **)&fake_violation = find(driver, "fake_violation");
    int num_threads = atoi(argv[2]);
    num_rounds = atoi(argv[3]);

    fake_reset((uint64_t)300 * MIB); /* less than the largest budget, so that the device runs out as well */
    ledger = vtp_ledger_new(500 * MIB);
    vtp_ledger_show(ledger, &shown);
    int32_t peers[] = {1, 2};
    vtp_torch_config config = {
        .driver = argv[1],
        .num_peers = 2,
        .peers = peers,
        .ledger = ledger,
        .page_bytes = 2 * MIB,
        .large_page_bytes = 32 * MIB,
    };
    if (!vtp_torch_attach(&config)) {
        fprintf(stderr, "attach failed\n");
        return 2;
    }
    pthread_t *threads = calloc((size_t)num_threads + 1, sizeof *threads);
    worker *workers = calloc((size_t)num_threads + 1, sizeof *workers);
    for (int i = 0; i <= num_threads; i++) {
        workers[i].id = (uintptr_t)i;
        pthread_create(&threads[i], NULL, i < num_threads ? use_torch : use_ledger, &workers[i]);
    }
    int64_t num_made = 0;
    int64_t num_refused = 0;
    for (int i = 0; i <= num_threads; i++) {
        pthread_join(threads[i], NULL);
        num_made += workers[i].num_made;
        num_refused += workers[i].num_refused;
    }
    free(threads);
    free(workers);

    int64_t num_left = vtp_torch_detach(0);
    vtp_torch_counts torch_counts;
    vtp_torch_read(0, &torch_counts);
    vtp_ledger_counts counts;
    vtp_ledger_read(ledger, &counts);
    int64_t fake_counts[9];
    fake_read(fake_counts);
    printf("left %lld\n", (long long)num_left);
    printf("live_bytes %lld\n", (long long)(torch_counts.live_bytes + torch_counts.pending_bytes));
    printf("torch_bytes %lld\n", (long long)counts.torch_bytes);
    printf("uncharged_bytes %lld\n", (long long)(counts.committed_bytes - counts.free_bytes));
    printf("unpooled_bytes %lld\n", (long long)(fake_counts[3] - counts.free_bytes));
    printf("reserved_and_mapped %lld\n", (long long)(fake_counts[0] + fake_counts[1]));
    printf("events %lld\n", (long long)fake_counts[4]);
    printf("violation %s\n", fake_violation()[0] ? fake_violation() : "0");
    printf("exercised %d\n", num_made > 0 && num_refused > 0 && torch_counts.num_device_waits > 0);
    vtp_ledger_delete(ledger);
    return 0;
}
