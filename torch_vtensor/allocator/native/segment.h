/* A segment: reserved addresses with pages of one ledger mapped behind all of them, or behind none while it sleeps. */

#ifndef VTENSOR_SEGMENT_H
#define VTENSOR_SEGMENT_H

#include "cuda_driver.h"
#include "fence.h"
#include "ledger.h"

/* How segments of a device are made. */
typedef struct {
    int64_t page_bytes;
    int64_t large_page_bytes;
    int device;
    int num_access;
    cuda_access *access; /* who may read and write: the device itself, then its peers */
} segment_plan;

typedef struct {
    uint64_t handle;
    int64_t bytes;
    int is_new; /* created for this segment, not taken from the pool */
} segment_page;

typedef struct memory_segment {
    struct memory_segment *next;
    vtp_ledger *ledger; /* owned */
    uint64_t address;   /* 0: nothing is reserved */
    int64_t bytes;
    int64_t mapped_bytes;   /* from the address on */
    int num_pages;          /* held; the first ones are mapped */
    int32_t tag;            /* by which it is put to sleep */
    int is_asleep;          /* what is still mapped was not given back for want of a working driver */
    int64_t number;         /* among those of its device */
    int64_t watch;          /* while this one is on, somebody reads it: it stays mapped, even if torch frees it */
    stream_fence fences[2]; /* set when torch frees the segment */
    segment_page pages[];
} memory_segment;

typedef enum { SEGMENT_MADE, SEGMENT_LACKS_MEMORY, SEGMENT_FAILED } segment_result;

/* Make a segment of at least `bytes`. Unless SEGMENT_MADE, everything is as it was and *made is NULL or what could not
 * be undone yet: segment_unmake finishes it. LACKS_MEMORY: it may work once pages come back. */
segment_result segment_make(const segment_plan *plan, vtp_ledger *ledger, int64_t bytes, memory_segment **made);
/* Unmap the segment and pool its pages; torch keeps the addresses. 1, or 0 where the driver refused, with it awake. The
 * device must be done with it. */
int segment_sleep(memory_segment *segment);
/* Map pages behind a sleeping segment, of which nobody knows what they hold. Unless SEGMENT_MADE, it sleeps on. */
segment_result segment_wake(const segment_plan *plan, memory_segment *segment);
/* Give everything back, the pages to the pool. 1 and the segment is gone; 0 where the driver refused: try again. */
int segment_unmake(memory_segment *segment);

#endif
