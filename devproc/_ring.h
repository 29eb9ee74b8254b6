/* The device's end of a split virtqueue (virtio 1.2, section 2.7) without Python: split.py and chain.py, which say
 * what is checked and why, in C.  The driver may change any byte at any time, so each is copied once, checked, and
 * only then used.  A chain that ring_pop gives has the host's addresses, ready for readv(2) and its like.
 *
 * Left out: what split.py leaves out, and packed rings. */
#ifndef DEVPROC_RING_H
#define DEVPROC_RING_H

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>

#define CHAIN_MAX 1024u
#define BYTES_MAX (1ull << 32) /* 2.7.5.2 */
#define SIZE_MAX_32 0xffffffffu
#define DESC_SIZE 16u
#define WHY_MAX 128
enum { DESC_F_NEXT = 1, DESC_F_WRITE = 2, DESC_F_INDIRECT = 4 };
enum { AVAIL_F_NO_INTERRUPT = 1, USED_F_NO_NOTIFY = 1 };
enum { AT_FLAGS = 0, AT_IDX = 2, AT_RING = 4 }; /* of the available and the used ring alike */

enum popped { NOTHING, POPPED, BROKEN };

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

/* [gpa, gpa + size) of the guest is at `host`. */
struct region {
    uint64_t gpa, size;
    uint8_t *host;
};

struct ring {
    const struct region *regions;
    uint32_t n_regions;
    uint32_t size; /* a power of 2 */
    bool indirect, event_idx;
    bool notified; /* flags in the used ring ask for notifications; never with event_idx */
    uint16_t next_avail, seen, next_used;
    uint32_t n_out;
    uint64_t unannounced; /* pushed since ring_wants_interrupt was last asked */
    uint64_t low[3], high[3]; /* the areas: descriptor table, available ring, used ring */
    uint8_t *desc, *avail, *used;
    int32_t *out; /* for each head: where in the available ring it was, or -1 while it is the driver's */
    char why[WHY_MAX]; /* the ring is BROKEN */
};

/* One buffer of the driver: element i is gpa[i] for the guest and iov[i] for us, the readable ones come first. */
struct chain {
    uint16_t id;
    uint32_t descriptors, n_readable, n;
    uint64_t read_size, write_size;
    uint64_t gpa[CHAIN_MAX];
    struct iovec iov[CHAIN_MAX];
};

/* What a walk has found: `n` elements, of which there is room for CHAIN_MAX. */
struct walk {
    uint32_t n, descriptors;
    struct desc elements[CHAIN_MAX];
};

/* Copies what the driver may change meanwhile; the compiler must not read it a second time. */
static inline void copy_once(void *to, const void *from, size_t size)
{
    memcpy(to, from, size);
    atomic_signal_fence(memory_order_seq_cst);
}

static inline uint16_t load16(uint8_t *at, memory_order order)
{
    return atomic_load_explicit((_Atomic uint16_t *)at, order);
}

static inline void store16(uint8_t *at, uint16_t value, memory_order order)
{
    atomic_store_explicit((_Atomic uint16_t *)at, value, order);
}

/* Where [gpa, gpa + size) is, if all of it is RAM. */
static uint8_t *ring_host(const struct ring *r, uint64_t gpa, uint64_t size)
{
    for (const struct region *m = r->regions; m < r->regions + r->n_regions; m++)
        if (gpa >= m->gpa && size <= m->size && gpa - m->gpa <= m->size - size)
            return m->host + (gpa - m->gpa);
    return NULL;
}

__attribute__((format(printf, 2, 3))) static bool broken(struct ring *r, const char *why, ...)
{
    va_list args;
    va_start(args, why);
    vsnprintf(r->why, sizeof r->why, why, args);
    va_end(args);
    return false;
}

/* ---- what is available ---- */

static enum popped ring_advance(struct ring *r)
{
    r->seen = load16(r->avail + AT_IDX, memory_order_acquire);
    uint16_t waiting = (uint16_t)(r->seen - r->next_avail);
    if (waiting + r->n_out > r->size) {
        broken(r, "avail.idx 0x%x is %u ahead, %u are out: size %u", r->seen, waiting, r->n_out, r->size);
        return BROKEN;
    }
    return waiting ? POPPED : NOTHING;
}

/* Whether the driver has made more available; if not, it has been asked to notify. */
static enum popped ring_look(struct ring *r)
{
    enum popped more = ring_advance(r);
    if (more == POPPED && r->notified) {
        store16(r->used + AT_FLAGS, USED_F_NO_NOTIFY, memory_order_relaxed);
        r->notified = false;
    }
    if (more != NOTHING)
        return more;
    if (r->event_idx)
        store16(r->used + AT_RING + 8 * r->size, r->next_avail, memory_order_relaxed);
    else if (!r->notified)
        store16(r->used + AT_FLAGS, 0, memory_order_relaxed);
    r->notified = !r->event_idx;
    /* A driver that added a chain meanwhile may have loaded the old wish: look again after the store. */
    atomic_thread_fence(memory_order_seq_cst);
    return ring_advance(r);
}

static void walk_add(struct walk *w, const struct desc *d)
{
    if (w->n < CHAIN_MAX)
        w->elements[w->n] = *d;
    w->n++;
}

static bool walk_table(struct ring *r, uint16_t head, const struct desc *where, struct walk *w)
{
    if (!r->indirect)
        return broken(r, "chain %u: INDIRECT was not negotiated", head);
    if (!where->len || where->len > CHAIN_MAX * DESC_SIZE || where->len % DESC_SIZE)
        return broken(r, "an indirect table of %u bytes, expected 1 to %u descriptors", where->len, CHAIN_MAX);
    const uint8_t *from = ring_host(r, where->addr, where->len);
    if (!from)
        return broken(r, "an indirect table at 0x%llx, size 0x%x: not RAM", (unsigned long long)where->addr, where->len);
    struct desc table[CHAIN_MAX];
    copy_once(table, from, where->len);
    uint32_t n = where->len / DESC_SIZE, index = 0;
    for (uint32_t count = 0; count < n; count++) {
        const struct desc *d = &table[index];
        if (d->flags & DESC_F_INDIRECT)
            return broken(r, "chain %u: an indirect table inside another", head);
        walk_add(w, d);
        if (!(d->flags & DESC_F_NEXT))
            return true;
        index = d->next;
        if (index >= n)
            return broken(r, "chain %u: descriptor %u of an indirect table of %u", head, index, n);
    }
    return broken(r, "chain %u: a loop in the indirect table of %u descriptors", head, n);
}

static bool walk(struct ring *r, uint16_t head, struct walk *w)
{
    uint32_t index = head;
    w->n = w->descriptors = 0;
    for (;;) {
        struct desc d;
        if (index >= r->size)
            return broken(r, "chain %u: descriptor %u of a table of %u", head, index, r->size);
        copy_once(&d, r->desc + DESC_SIZE * index, sizeof d);
        w->descriptors++;
        if (d.flags & DESC_F_INDIRECT) {
            if (d.flags & DESC_F_NEXT)
                return broken(r, "chain %u: INDIRECT and NEXT in one descriptor", head);
            return walk_table(r, head, &d, w);
        }
        walk_add(w, &d);
        if (!(d.flags & DESC_F_NEXT))
            return true;
        if (w->descriptors == r->size)
            return broken(r, "chain %u: a loop in the table of %u descriptors", head, r->size);
        index = d.next;
    }
}

static bool is_in_ring(const struct ring *r, uint64_t gpa, uint64_t size)
{
    for (int i = 0; i < 3; i++)
        if (gpa < r->high[i] && gpa + size > r->low[i])
            return true;
    return false;
}

/* The chain of what a walk has found, every element checked. */
static bool check(struct ring *r, uint16_t head, const struct walk *w, struct chain *c)
{
    if (w->n > CHAIN_MAX)
        return broken(r, "chain %u: %u elements, at most %u", head, w->n, CHAIN_MAX);
    c->id = head;
    c->descriptors = w->descriptors;
    c->n_readable = 0;
    c->read_size = c->write_size = 0;
    for (c->n = 0; c->n < w->n; c->n++) {
        const struct desc *d = &w->elements[c->n];
        unsigned long long gpa = d->addr;
        if (!d->len)
            return broken(r, "chain %u: an empty element at 0x%llx", head, gpa);
        uint8_t *host = ring_host(r, gpa, d->len);
        if (!host)
            return broken(r, "chain %u: an element at 0x%llx, size 0x%x: not RAM", head, gpa, d->len);
        if (is_in_ring(r, gpa, d->len))
            return broken(r, "chain %u: an element at 0x%llx, size 0x%x: in the ring itself", head, gpa, d->len);
        if (d->flags & DESC_F_WRITE) {
            c->write_size += d->len;
        } else if (c->write_size) {
            return broken(r, "chain %u: a readable element after a writable one", head);
        } else {
            c->read_size += d->len;
            c->n_readable++;
        }
        c->gpa[c->n] = gpa;
        c->iov[c->n] = (struct iovec){host, d->len};
    }
    unsigned long long bytes = c->read_size + c->write_size;
    return bytes <= BYTES_MAX || broken(r, "chain %u: 0x%llx bytes, at most 0x%llx", head, bytes, BYTES_MAX);
}

/* The next chain, which is out from now on; BROKEN: the driver broke the specification, as `why` says. */
static enum popped ring_pop(struct ring *r, struct chain *c)
{
    if (r->next_avail == r->seen) {
        enum popped more = ring_look(r);
        if (more != POPPED)
            return more;
    }
    uint16_t at = r->next_avail;
    uint16_t head = load16(r->avail + AT_RING + 2 * (at & (r->size - 1)), memory_order_relaxed);
    if (head < r->size && r->out[head] >= 0) {
        broken(r, "chain %u: made available again before it was used", head);
        return BROKEN;
    }
    struct walk w;
    if (!walk(r, head, &w) || !check(r, head, &w, c))
        return BROKEN;
    r->out[head] = at;
    r->n_out++;
    r->next_avail++;
    return POPPED;
}

static bool ring_is_out(const struct ring *r, uint32_t id)
{
    return id < r->size && r->out[id] >= 0;
}

/* Whether chain `id` was popped last, and so can be popped again. */
static bool ring_unpop(struct ring *r, uint32_t id)
{
    if (!ring_is_out(r, id) || (uint16_t)(r->out[id] + 1) != r->next_avail)
        return false;
    r->next_avail = (uint16_t)r->out[id];
    r->out[id] = -1;
    r->n_out--;
    return true;
}

/* ---- what is used ---- */

/* Writes the used element of a chain that is out, `ahead` after those that the driver sees. */
static void ring_fill(struct ring *r, uint32_t ahead, uint32_t id, uint64_t written)
{
    uint32_t element[2] = {id, written < SIZE_MAX_32 ? (uint32_t)written : SIZE_MAX_32};
    memcpy(r->used + AT_RING + 8 * ((r->next_used + ahead) & (r->size - 1)), element, sizeof element);
    r->out[id] = -1;
    r->n_out--;
}

static void ring_publish(struct ring *r, uint32_t count)
{
    r->next_used = (uint16_t)(r->next_used + count);
    r->unannounced += count;
    store16(r->used + AT_IDX, r->next_used, memory_order_release); /* after data and elements (2.7.8.2) */
}

static bool ring_wants_interrupt(struct ring *r)
{
    uint64_t pushed = r->unannounced;
    r->unannounced = 0;
    if (!pushed)
        return false;
    atomic_thread_fence(memory_order_seq_cst); /* used.idx was stored before the driver's wish is loaded */
    if (!r->event_idx)
        return !(load16(r->avail + AT_FLAGS, memory_order_relaxed) & AVAIL_F_NO_INTERRUPT);
    uint16_t event = load16(r->avail + AT_RING + 2 * r->size, memory_order_relaxed);
    return (uint16_t)(r->next_used - event - 1) < pushed; /* 2.7.7.2 */
}

#endif
