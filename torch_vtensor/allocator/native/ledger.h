/* The ledger's inside half: what the torch allocator needs beyond the exported functions. */

#ifndef VTENSOR_LEDGER_H
#define VTENSOR_LEDGER_H

#include "vtensor_pool.h"

/* Who holds a page that is out. Pages of the two move freely between them through the pool. */
typedef enum { HELD_BY_PAGE_POOL, HELD_BY_TORCH } page_holder;

int ledger_take(vtp_ledger *ledger, int64_t bytes, uint64_t *handle, page_holder holder);
int ledger_put(vtp_ledger *ledger, uint64_t handle, int64_t bytes, page_holder holder);
int ledger_pop(vtp_ledger *ledger, uint64_t *handle, int64_t *bytes, page_holder holder);
int ledger_uncharge(vtp_ledger *ledger, int64_t bytes, page_holder holder);

/* One owner more: the ledger lives until every owner has deleted it. */
void ledger_retain(vtp_ledger *ledger);
/* The bytes that could be taken if every pooled page were destroyed first; INT64_MAX without a budget. */
int64_t ledger_room(vtp_ledger *ledger);

#endif
