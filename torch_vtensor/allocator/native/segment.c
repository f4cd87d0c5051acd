/* Makes and unmakes segments: reserve, take or create pages, map, set access; and the same backwards. Sleeping is all of
 * it but the addresses. */

#include "segment.h"

#include <stdlib.h>

/* Destroy pooled pages of any size until `bytes` are back with the driver; returns what is. */
static int64_t shrink_pool(vtp_ledger *ledger, int64_t bytes) {
    int64_t freed_bytes = 0;
    uint64_t handle;
    int64_t page_bytes;
    while (freed_bytes < bytes && ledger_pop(ledger, &handle, &page_bytes, HELD_BY_TORCH)) {
        if (!CUDA_DO(cuMemRelease, page_bytes, handle)) {
            ledger_put(ledger, handle, page_bytes, HELD_BY_TORCH);
            break;
        }
        ledger_uncharge(ledger, page_bytes, HELD_BY_TORCH);
        freed_bytes += page_bytes;
    }
    return freed_bytes;
}

static segment_result acquire_page(const segment_plan *plan, vtp_ledger *ledger, int64_t bytes, segment_page *page) {
    *page = (segment_page){.bytes = bytes};
    do {
        int taken = ledger_take(ledger, bytes, &page->handle, HELD_BY_TORCH);
        if (taken == VTP_REUSED) {
            return SEGMENT_MADE;
        }
        if (taken == VTP_NO_MEMORY) {
            note_failure("no host memory", "vtp_ledger_take", bytes);
            return SEGMENT_FAILED;
        }
        if (taken == VTP_OVER_BUDGET) {
            note_failure("over budget", "vtp_ledger_take", bytes);
            continue;
        }
        const cuda_allocation allocation = {
            .type = CUDA_ALLOCATION_PINNED,
            .location = {.type = CUDA_LOCATION_DEVICE, .id = plan->device},
        };
        cuda_result created = cuda.cuMemCreate(&page->handle, (size_t)bytes, &allocation, 0);
        if (created == CUDA_OK) {
            page->is_new = 1;
            return SEGMENT_MADE;
        }
        ledger_uncharge(ledger, bytes, HELD_BY_TORCH);
        cuda_check(created, "cuMemCreate", bytes);
        if (created != CUDA_OUT_OF_MEMORY) {
            return SEGMENT_FAILED;
        }
    } while (shrink_pool(ledger, bytes) > 0);
    return SEGMENT_LACKS_MEMORY;
}

static segment_result fill(const segment_plan *plan, memory_segment *segment) {
    while (segment->mapped_bytes < segment->bytes) {
        int64_t left_bytes = segment->bytes - segment->mapped_bytes;
        int64_t bytes = left_bytes >= plan->large_page_bytes ? plan->large_page_bytes : plan->page_bytes;
        segment_page *page = &segment->pages[segment->num_pages];
        segment_result acquired = acquire_page(plan, segment->ledger, bytes, page);
        if (acquired != SEGMENT_MADE) {
            return acquired;
        }
        segment->num_pages++;
        uint64_t address = segment->address + (uint64_t)segment->mapped_bytes;
        if (!CUDA_DO(cuMemMap, bytes, address, (size_t)bytes, 0, page->handle, 0)) {
            return SEGMENT_FAILED;
        }
        segment->mapped_bytes += bytes;
    }
    size_t num_access = (size_t)plan->num_access;
    if (!CUDA_DO(cuMemSetAccess, segment->bytes, segment->address, (size_t)segment->bytes, plan->access, num_access)) {
        return SEGMENT_FAILED;
    }
    return SEGMENT_MADE;
}

/* Give a page back: new ones to the driver if `undo`, as if they had never been created, the others to the pool. */
static void drop_page(vtp_ledger *ledger, const segment_page *page, int undo) {
    if (undo && page->is_new && cuda.cuMemRelease(page->handle) == CUDA_OK) {
        ledger_uncharge(ledger, page->bytes, HELD_BY_TORCH);
    } else {
        ledger_put(ledger, page->handle, page->bytes, HELD_BY_TORCH);
    }
}

static int strip(memory_segment *segment, int undo) {
    if (segment->mapped_bytes > 0) {
        cuda_result result = cuda.cuMemUnmap(segment->address, (size_t)segment->mapped_bytes);
        if (result != CUDA_OK) {
            if (!undo) { /* otherwise what made it necessary is the failure */
                cuda_check(result, "cuMemUnmap", segment->mapped_bytes);
            }
            return 0;
        }
        segment->mapped_bytes = 0;
    }
    while (segment->num_pages > 0) {
        drop_page(segment->ledger, &segment->pages[--segment->num_pages], undo);
    }
    return 1;
}

static int unmake(memory_segment *segment, int undo) {
    if (!strip(segment, undo)) {
        return 0;
    }
    if (segment->address != 0 && cuda.cuMemAddressFree(segment->address, (size_t)segment->bytes) != CUDA_OK) {
        return 0;
    }
    vtp_ledger_delete(segment->ledger);
    free(segment);
    return 1;
}

segment_result segment_make(const segment_plan *plan, vtp_ledger *ledger, int64_t bytes, memory_segment **made) {
    *made = NULL;
    bytes = (bytes + plan->page_bytes - 1) / plan->page_bytes * plan->page_bytes;
    if (bytes > ledger_room(ledger)) {
        note_failure("over budget", "vtp_ledger_take", bytes);
        return SEGMENT_LACKS_MEMORY;
    }
    int64_t num_large = bytes / plan->large_page_bytes;
    int64_t num_small = (bytes - num_large * plan->large_page_bytes) / plan->page_bytes;
    size_t pages_bytes = (size_t)(num_large + num_small) * sizeof(segment_page);
    memory_segment *segment = calloc(1, sizeof *segment + pages_bytes);
    if (segment == NULL) {
        note_failure("no host memory", "vtp_torch_alloc", bytes);
        return SEGMENT_FAILED;
    }
    ledger_retain(ledger);
    segment->ledger = ledger;
    segment->bytes = bytes;
    segment_result result = SEGMENT_FAILED;
    if (CUDA_DO(cuMemAddressReserve, bytes, &segment->address, (size_t)bytes, 0, 0, 0)) {
        result = fill(plan, segment);
    } else {
        segment->address = 0;
    }
    if (result == SEGMENT_MADE || !unmake(segment, 1)) {
        *made = segment;
    }
    return result;
}

int segment_sleep(memory_segment *segment) {
    segment->is_asleep = strip(segment, 0);
    return segment->is_asleep;
}

segment_result segment_wake(const segment_plan *plan, memory_segment *segment) {
    if (!strip(segment, 0)) { /* what an earlier try could not undo */
        return SEGMENT_FAILED;
    }
    if (segment->bytes > ledger_room(segment->ledger)) {
        note_failure("over budget", "vtp_ledger_take", segment->bytes);
        return SEGMENT_LACKS_MEMORY;
    }
    segment_result result = fill(plan, segment);
    if (result == SEGMENT_MADE) {
        segment->is_asleep = 0;
    } else {
        strip(segment, 1);
    }
    return result;
}

int segment_unmake(memory_segment *segment) {
    return unmake(segment, 0);
}
