/* The ledger: one budget and one set of pooled pages, for the Python PagePool and the torch allocator alike. */

#include "ledger.h"

#include <pthread.h>
#include <stdlib.h>

/* Pooled pages of one size; the latest is reused first. A driver has one to three sizes, so the classes are a short
 * sorted array. `capacity` is never below `num_pages`, which is what lets a put succeed without memory. */
typedef struct {
    int64_t bytes;
    int64_t num_pages; /* charged: pooled or out */
    int64_t num_free;
    int64_t num_unwanted; /* of the free ones: see vtp_ledger_watch */
    int64_t capacity;
    uint64_t *free_handles;
} size_class;

struct vtp_ledger {
    pthread_mutex_t mutex;
    int num_owners; /* the Python Ledger, the torch allocator attached to it, and every segment on its pages */
    int64_t budget_bytes;
    int64_t committed_bytes;
    int64_t free_bytes;
    int64_t torch_bytes;
    size_class *classes; /* ascending by bytes */
    int num_classes;
    vtp_shown *shown;
    int64_t noted[3];
};

/* Let go of the mutex behind a change, which others see first. */
static void unlock(vtp_ledger *ledger) {
    vtp_shown *shown = __atomic_load_n(&ledger->shown, __ATOMIC_RELAXED);
    if (shown != NULL) {
        int64_t version = shown->version;
        __atomic_store_n(&shown->version, version + 1, __ATOMIC_RELAXED);
        /* Each behind those before it, the odd version first of all. */
        __atomic_store_n(&shown->committed_bytes, ledger->committed_bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&shown->free_bytes, ledger->free_bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&shown->torch_bytes, ledger->torch_bytes, __ATOMIC_RELEASE);
        __atomic_store_n(&shown->budget_bytes, ledger->budget_bytes, __ATOMIC_RELEASE);
        for (int i = 0; i < 3; i++) {
            __atomic_store_n(&shown->noted[i], ledger->noted[i], __ATOMIC_RELEASE);
        }
        __atomic_store_n(&shown->version, version + 2, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&ledger->mutex);
}

vtp_ledger *vtp_ledger_new(int64_t budget_bytes) {
    vtp_ledger *ledger = calloc(1, sizeof *ledger);
    if (ledger == NULL) {
        return NULL;
    }
    if (pthread_mutex_init(&ledger->mutex, NULL) != 0) {
        free(ledger);
        return NULL;
    }
    ledger->budget_bytes = budget_bytes < 0 ? -1 : budget_bytes;
    ledger->num_owners = 1;
    return ledger;
}

void ledger_retain(vtp_ledger *ledger) {
    pthread_mutex_lock(&ledger->mutex);
    ledger->num_owners++;
    pthread_mutex_unlock(&ledger->mutex);
}

void vtp_ledger_delete(vtp_ledger *ledger) {
    pthread_mutex_lock(&ledger->mutex);
    int is_owned = --ledger->num_owners > 0;
    pthread_mutex_unlock(&ledger->mutex);
    if (is_owned) {
        return;
    }
    for (int i = 0; i < ledger->num_classes; i++) {
        free(ledger->classes[i].free_handles);
    }
    free(ledger->classes);
    pthread_mutex_destroy(&ledger->mutex);
    free(ledger);
}

static size_class *find_class(vtp_ledger *ledger, int64_t bytes) {
    for (int i = 0; i < ledger->num_classes; i++) {
        if (ledger->classes[i].bytes == bytes) {
            return &ledger->classes[i];
        }
    }
    return NULL;
}

static size_class *add_class(vtp_ledger *ledger, int64_t bytes) {
    size_class *classes = realloc(ledger->classes, (size_t)(ledger->num_classes + 1) * sizeof *classes);
    if (classes == NULL) {
        return NULL;
    }
    ledger->classes = classes;
    int at = ledger->num_classes++;
    for (; at > 0 && classes[at - 1].bytes > bytes; at--) {
        classes[at] = classes[at - 1];
    }
    classes[at] = (size_class){.bytes = bytes};
    return &classes[at];
}

/* Make room to pool one page more than there are: done when a page is charged, so that putting it back cannot fail. */
static int ensure_room(size_class *class) {
    if (class->num_pages < class->capacity) {
        return 1;
    }
    int64_t capacity = class->capacity > 0 ? 2 * class->capacity : 64;
    uint64_t *handles = realloc(class->free_handles, (size_t)capacity * sizeof *handles);
    if (handles == NULL) {
        return 0;
    }
    class->free_handles = handles;
    class->capacity = capacity;
    return 1;
}

/* The class of a page that someone holds, or NULL if no page of these bytes is out. */
static size_class *held_class(vtp_ledger *ledger, int64_t bytes) {
    size_class *class = find_class(ledger, bytes);
    return class != NULL && class->num_free < class->num_pages ? class : NULL;
}

static void count_held(vtp_ledger *ledger, int64_t bytes, page_holder holder) {
    if (holder == HELD_BY_TORCH) {
        ledger->torch_bytes += bytes;
    }
}

/* Take a pooled page out: it is one of the wanted ones as long as there are some. */
static uint64_t unpool(vtp_ledger *ledger, size_class *class) {
    ledger->free_bytes -= class->bytes;
    class->num_free--;
    class->num_unwanted = class->num_unwanted < class->num_free ? class->num_unwanted : class->num_free;
    return class->free_handles[class->num_free];
}

static int take(vtp_ledger *ledger, int64_t bytes, uint64_t *handle) {
    size_class *class = find_class(ledger, bytes);
    int reuse = class != NULL && class->num_free > 0;
    /* Reusing a pooled page keeps what is committed, so after the budget was lowered below that, what counts is that
     * the pages in use stay within it. */
    int64_t counted_bytes = reuse ? ledger->committed_bytes - ledger->free_bytes : ledger->committed_bytes;
    if (ledger->budget_bytes >= 0 && counted_bytes > ledger->budget_bytes - bytes) {
        return VTP_OVER_BUDGET;
    }
    if (reuse) {
        *handle = unpool(ledger, class);
        return VTP_REUSED;
    }
    if (class == NULL) {
        class = add_class(ledger, bytes);
    }
    if (class == NULL || !ensure_room(class)) {
        return VTP_NO_MEMORY;
    }
    class->num_pages++;
    ledger->committed_bytes += bytes;
    return VTP_CHARGED;
}

int ledger_take(vtp_ledger *ledger, int64_t bytes, uint64_t *handle, page_holder holder) {
    pthread_mutex_lock(&ledger->mutex);
    int result = take(ledger, bytes, handle);
    if (result > 0) {
        count_held(ledger, bytes, holder);
    }
    unlock(ledger);
    return result;
}

int ledger_put(vtp_ledger *ledger, uint64_t handle, int64_t bytes, page_holder holder) {
    pthread_mutex_lock(&ledger->mutex);
    size_class *class = held_class(ledger, bytes);
    if (class != NULL) {
        class->free_handles[class->num_free++] = handle;
        ledger->free_bytes += bytes;
        count_held(ledger, -bytes, holder);
    }
    unlock(ledger);
    return class != NULL;
}

int ledger_pop(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes, page_holder holder) {
    int found = 0;
    pthread_mutex_lock(&ledger->mutex);
    for (int i = ledger->num_classes - 1; i >= 0 && !found; i--) {
        size_class *class = &ledger->classes[i];
        if (class->num_free > 0) {
            *handle = unpool(ledger, class);
            *bytes = class->bytes;
            count_held(ledger, class->bytes, holder);
            found = 1;
        }
    }
    unlock(ledger);
    return found;
}

int ledger_uncharge(vtp_ledger *ledger, int64_t bytes, page_holder holder) {
    pthread_mutex_lock(&ledger->mutex);
    size_class *class = held_class(ledger, bytes);
    if (class != NULL) {
        class->num_pages--;
        ledger->committed_bytes -= bytes;
        count_held(ledger, -bytes, holder);
    }
    unlock(ledger);
    return class != NULL;
}

int64_t ledger_room(vtp_ledger *ledger) {
    pthread_mutex_lock(&ledger->mutex);
    int64_t used_bytes = ledger->committed_bytes - ledger->free_bytes;
    int64_t room = ledger->budget_bytes < 0 ? INT64_MAX : ledger->budget_bytes - used_bytes;
    pthread_mutex_unlock(&ledger->mutex);
    return room;
}

int vtp_ledger_take(vtp_ledger *ledger, int64_t bytes, uint64_t *handle) {
    return ledger_take(ledger, bytes, handle, HELD_BY_PAGE_POOL);
}

int vtp_ledger_put(vtp_ledger *ledger, uint64_t handle, int64_t bytes) {
    return ledger_put(ledger, handle, bytes, HELD_BY_PAGE_POOL);
}

int vtp_ledger_pop(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes) {
    return ledger_pop(ledger, handle, bytes, HELD_BY_PAGE_POOL);
}

int vtp_ledger_uncharge(vtp_ledger *ledger, int64_t bytes) {
    return ledger_uncharge(ledger, bytes, HELD_BY_PAGE_POOL);
}

void vtp_ledger_watch(vtp_ledger *ledger) {
    pthread_mutex_lock(&ledger->mutex);
    for (int i = 0; i < ledger->num_classes; i++) {
        ledger->classes[i].num_unwanted = ledger->classes[i].num_free;
    }
    pthread_mutex_unlock(&ledger->mutex);
}

void vtp_ledger_give_up(vtp_ledger *ledger, int64_t bytes, int64_t num_pages) {
    pthread_mutex_lock(&ledger->mutex);
    size_class *class = find_class(ledger, bytes);
    if (class != NULL) {
        int64_t num_wanted = class->num_free - class->num_unwanted;
        class->num_unwanted += num_pages < num_wanted ? num_pages : num_wanted;
    }
    pthread_mutex_unlock(&ledger->mutex);
}

int vtp_ledger_pop_unwanted(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes) {
    int found = 0;
    pthread_mutex_lock(&ledger->mutex);
    for (int i = ledger->num_classes - 1; i >= 0 && !found; i--) {
        size_class *class = &ledger->classes[i];
        if (class->num_unwanted > 0) {
            class->num_unwanted--;
            *handle = unpool(ledger, class);
            *bytes = class->bytes;
            found = 1;
        }
    }
    unlock(ledger);
    return found;
}

void vtp_ledger_set_budget(vtp_ledger *ledger, int64_t budget_bytes) {
    pthread_mutex_lock(&ledger->mutex);
    ledger->budget_bytes = budget_bytes < 0 ? -1 : budget_bytes;
    unlock(ledger);
}

void vtp_ledger_show(vtp_ledger *ledger, vtp_shown *shown) {
    if (shown == NULL) { /* also in a child of fork(), where nobody may be left to let go of the mutex */
        __atomic_store_n(&ledger->shown, NULL, __ATOMIC_RELAXED);
        return;
    }
    pthread_mutex_lock(&ledger->mutex);
    ledger->shown = shown;
    unlock(ledger);
}

void vtp_ledger_note(vtp_ledger *ledger, int64_t reserved_bytes, int64_t shared_bytes, int64_t offloaded_bytes) {
    pthread_mutex_lock(&ledger->mutex);
    ledger->noted[0] = reserved_bytes;
    ledger->noted[1] = shared_bytes;
    ledger->noted[2] = offloaded_bytes;
    unlock(ledger);
}

void vtp_ledger_read(vtp_ledger *ledger, vtp_ledger_counts *counts) {
    pthread_mutex_lock(&ledger->mutex);
    *counts = (vtp_ledger_counts){
        .committed_bytes = ledger->committed_bytes,
        .free_bytes = ledger->free_bytes,
        .torch_bytes = ledger->torch_bytes,
        .budget_bytes = ledger->budget_bytes,
    };
    for (int i = 0; i < ledger->num_classes; i++) {
        counts->num_free_pages += ledger->classes[i].num_free;
        counts->num_pages += ledger->classes[i].num_pages;
        counts->unwanted_bytes += ledger->classes[i].num_unwanted * ledger->classes[i].bytes;
    }
    pthread_mutex_unlock(&ledger->mutex);
}
