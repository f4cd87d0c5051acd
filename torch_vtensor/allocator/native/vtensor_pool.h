/* The C interface of libvtensor_pool.so: what Python calls through ctypes, and PyTorch through function pointers.
 *
 * Sizes are bytes. Every function may be called from any thread. None needs the GIL or calls Python, except
 * vtp_rows_copy, which reads Python's tensors. */

#ifndef VTENSOR_POOL_H
#define VTENSOR_POOL_H

#include <stddef.h>
#include <stdint.h>

#define VTP_EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a meaning below changes, so that Python refuses a library built from older sources. */
VTP_EXPORT int vtensor_pool_abi_version(void);

/* ---- The ledger: which bytes of physical memory one device has given us, against which budget, and which of them are
 * pooled. It knows nothing of a driver: whoever takes a page creates, maps and destroys it. */

typedef struct vtp_ledger vtp_ledger;

enum {
    VTP_OVER_BUDGET = 0,
    VTP_REUSED = 1,    /* *handle is a pooled page of exactly these bytes */
    VTP_CHARGED = 2,   /* the bytes are charged: create a page, or uncharge them */
    VTP_NO_MEMORY = -1 /* no host memory for the ledger's own notes */
};

typedef struct {
    int64_t committed_bytes; /* free + torch + what PagePool holds */
    int64_t free_bytes;      /* pooled */
    int64_t torch_bytes;     /* under torch's tensors, or waiting for the device to be done with them */
    int64_t budget_bytes;    /* -1: no limit */
    int64_t num_free_pages;
    int64_t num_pages;
    int64_t unwanted_bytes; /* of the pooled ones: see vtp_ledger_watch */
} vtp_ledger_counts;

/* What a ledger shows to other processes, in memory that they map as well. The version is odd while the figures change:
 * whoever finds it odd, or another one after reading than before, reads again. */
typedef struct {
    int64_t version;
    int64_t committed_bytes;
    int64_t free_bytes;
    int64_t torch_bytes;
    int64_t budget_bytes;
    int64_t noted[3]; /* as in vtp_ledger_note */
} vtp_shown;

/* A budget below 0 is no limit. NULL where the host has no memory. */
VTP_EXPORT vtp_ledger *vtp_ledger_new(int64_t budget_bytes);
/* The caller is done with the ledger; its last owner frees it. Pooled pages are forgotten, not destroyed. */
VTP_EXPORT void vtp_ledger_delete(vtp_ledger *ledger);
VTP_EXPORT int vtp_ledger_take(vtp_ledger *ledger, int64_t bytes, uint64_t *handle);
/* The page becomes pooled: 1. Cannot fail for a page that was taken; 0 where none of these bytes is out. */
VTP_EXPORT int vtp_ledger_put(vtp_ledger *ledger, uint64_t handle, int64_t bytes);
/* 1 and the largest pooled page, which stays charged until it is put back or uncharged; 0 where none is pooled. */
VTP_EXPORT int vtp_ledger_pop(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes);
/* What is pooled now, and not taken from here on, is unwanted: of each size the fewest pages that are pooled at any
 * moment, whichever they are. */
VTP_EXPORT void vtp_ledger_watch(vtp_ledger *ledger);
/* So many more of the pooled pages of these bytes are unwanted, if there are so many. */
VTP_EXPORT void vtp_ledger_give_up(vtp_ledger *ledger, int64_t bytes, int64_t num_pages);
/* As vtp_ledger_pop, of the unwanted ones. */
VTP_EXPORT int vtp_ledger_pop_unwanted(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes);
/* A page of these bytes was destroyed, or never created: 1. 0 where none of these bytes is out. */
VTP_EXPORT int vtp_ledger_uncharge(vtp_ledger *ledger, int64_t bytes);
VTP_EXPORT void vtp_ledger_set_budget(vtp_ledger *ledger, int64_t budget_bytes);
/* Show the counts in *shown, which must stay there, from now on and after every change; NULL: nowhere. */
VTP_EXPORT void vtp_ledger_show(vtp_ledger *ledger, vtp_shown *shown);
/* Show these figures, which are not the ledger's own, beside its counts. */
VTP_EXPORT void vtp_ledger_note(vtp_ledger *ledger, int64_t reserved_bytes, int64_t shared_bytes,
                                int64_t offloaded_bytes);
/* All counts at one moment. */
VTP_EXPORT void vtp_ledger_read(vtp_ledger *ledger, vtp_ledger_counts *counts);

/* ---- The torch allocator: segments of PyTorch's caching allocator on pages of a ledger. */

typedef struct {
    const char *driver; /* the library to open, "libcuda.so.1"; the first attach of a process decides */
    int32_t device;
    int32_t num_peers;
    const int32_t *peers; /* devices that may read and write this one's memory as well */
    vtp_ledger *ledger;
    int64_t page_bytes;       /* the device's granularity */
    int64_t large_page_bytes; /* a multiple of it, for the bulk of a segment */
} vtp_torch_config;

typedef struct {
    int64_t live_segments;
    int64_t live_bytes;
    int64_t pending_segments; /* freed by torch, but perhaps still in use by the device */
    int64_t pending_bytes;
    int64_t num_allocs;
    int64_t num_frees;
    int64_t num_failures;     /* allocs that returned NULL */
    int64_t num_device_waits; /* times that a call had to wait for the device */
    int64_t asleep_bytes;     /* of live segments that have no memory for now */
} vtp_torch_counts;

typedef struct {
    uint64_t address;
    int64_t bytes;
    int64_t number; /* of no other segment of the device, also where addresses are used again */
    int32_t tag;
    int32_t is_asleep;
} vtp_torch_segment;

enum {
    VTP_SEGMENT_FAILED = -1,      /* the reason is in this thread's failure; it is as it was */
    VTP_SEGMENT_GONE = 0,         /* torch has freed it */
    VTP_SEGMENT_DONE = 1,
    VTP_SEGMENT_LACKS_MEMORY = 2, /* as FAILED; it may work once pages come back */
};

typedef struct {
    int64_t num_failures; /* allocs of this thread that returned NULL, on any device */
    int64_t asked_bytes;  /* by the latest of them */
    int64_t bytes;        /* what the call below was about */
    const char *call;     /* the driver's call that failed, or ours; NULL: none yet */
    const char *code;     /* the driver's name of the failure, or ours */
} vtp_torch_failure;

/* From here on, segments of this device come from the ledger; segments made before keep theirs. 1, or 0 with the reason
 * in this thread's failure. */
VTP_EXPORT int vtp_torch_attach(const vtp_torch_config *config);
/* No new segments; waits for the device and gives back what torch has freed. Returns the segments that stay: torch
 * still uses them, and may free them later. */
VTP_EXPORT int64_t vtp_torch_detach(int device);
/* Give back what torch has freed and the device is done with; if `wait`, make the device be done with it. Returns the
 * segments that are still pending. */
VTP_EXPORT int64_t vtp_torch_drain(int device, int wait);
VTP_EXPORT void vtp_torch_read(int device, vtp_torch_counts *counts);
/* Why the calling thread's latest alloc (or attach) failed. */
VTP_EXPORT void vtp_torch_read_failure(vtp_torch_failure *failure);

/* The calling thread's segments on the device have this tag from now on; returns the one before. */
VTP_EXPORT int32_t vtp_torch_set_tag(int device, int32_t tag);
/* The first `capacity` live segments. Returns how many there are. If `watch`, they stay mapped until vtp_torch_unwatch,
 * even if torch frees them; there is one watch at a time. */
VTP_EXPORT int64_t vtp_torch_list(int device, vtp_torch_segment *segments, int64_t capacity, int watch);
VTP_EXPORT void vtp_torch_unwatch(int device);
/* Unmap a live segment and pool its pages, whose contents are lost; the addresses stay torch's. The device must be done
 * with it. Returns one of the above. */
VTP_EXPORT int vtp_torch_sleep(int device, uint64_t address);
/* Map pages at a sleeping segment's addresses again; what they hold is for the caller to write. */
VTP_EXPORT int vtp_torch_wake(int device, uint64_t address);

/* CUDAPluggableAllocator's two functions. NULL makes torch raise torch.OutOfMemoryError. */
VTP_EXPORT void *vtp_torch_alloc(size_t size, int device, void *stream);
VTP_EXPORT void vtp_torch_free(void *address, size_t size, int device, void *stream);

/* ---- Rows: new keys and values to their places behind the old ones, by one kernel launch, or by the processor. */

typedef struct vtp_row_copier vtp_row_copier;

/* What is needed of Python, whose library is not linked. */
typedef struct {
    void *(*release_gil)(void); /* PyEval_SaveThread and PyEval_RestoreThread */
    void (*take_gil)(void *state);
    void *(*capsule_pointer)(void *capsule, const char *name); /* PyCapsule_GetPointer */
    long long (*read_int)(void *object);                       /* PyLong_AsLongLong */
    void *(*make_int)(long long number);                       /* PyLong_FromLongLong */
    void (*clear_error)(void);                                 /* PyErr_Clear */
    void *(*call)(void *callable);                             /* PyObject_CallNoArgs */
    void *on_failure; /* a callable that raises this thread's failure */
} vtp_python;

typedef struct {
    const char *driver; /* as above; NULL copies tensors of the host */
    int32_t device;
    const void *image;    /* row_copy.cu, compiled for the device */
    const void *exchange; /* torch's DLPackExchangeAPI */
    vtp_python python;
} vtp_rows_config;

/* What became of a copy: the number of tokens that were copied, or one of these. */
#define VTP_ROWS_RAISED ((int64_t)-2)    /* a Python exception is set */
#define VTP_ROWS_FAILED ((int64_t)-1)    /* the reason is in this thread's failure */
#define VTP_ROWS_NOT_COPIED ((int64_t)0) /* not tensors for this copier: let torch copy them */
/* Or-ed to the tokens: they will be copied by each replay of the graph that the stream is being captured into. */
#define VTP_ROWS_CAPTURED ((int64_t)1 << 40)

/* Load the kernels into the device's primary context, for the life of the process. NULL, with the reason in this
 * thread's failure, and with nothing left behind. */
VTP_EXPORT vtp_row_copier *vtp_rows_open(const vtp_rows_config *config);
/* Copy the torch tensors key and value [B, H, T, D] to keys and values [B, H, >= position + T, D] from token `position`
 * on, behind what was submitted to torch's current stream; `tensors` are keys, values, key and value. Needs the GIL, and
 * lets go of it for a launch. */
VTP_EXPORT int64_t vtp_rows_copy(const vtp_row_copier *copier, void *const *tensors, int64_t position);
/* The same as a function of Python, for METH_FASTCALL: (keys, values, position, key, value), bound to a capsule without
 * a name that holds the copier. */
VTP_EXPORT void *vtp_rows_call(void *capsule, void *const *arguments, intptr_t num_arguments);

#endif
