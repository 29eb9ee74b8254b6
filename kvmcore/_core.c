/* The exit path: KVM_RUN, the bus look-up and the transaction with a device, none of it under Python's GIL.
 *
 * Spec: Linux, Documentation/virt/kvm/api.rst 5 (struct kvm_run); devproc/wire.py for the messages, which go
 * as its frames or through a mailbox (_mailbox.h).  Left out: coalesced MMIO but for ports.
 *
 * The guest chooses every address, size and value here, and a device process every byte of its replies:
 * neither is used as an index or a length before it was checked.  The loop allocates nothing, and every
 * wait in it but KVM_RUN ends at the deadline of the device that is waited for.
 *
 * Locks, never two at once: core.table_lock for one look-up; device.lock for one transaction; vcpu.kick_lock
 * around entering and leaving core_vcpu_run.  But core.ring_lock is held around the first two while what the ring
 * holds is posted, and device.slot_lock within any of them while a request is put into a mailbox. */
#define _GNU_SOURCE 1 /* as Python.h does */
#include "_core.h"
#include "_mailbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull
#define IO_BUS_SIZE 0x10000u
/* Cause and errno in one word, so that both become visible at once. */
#define GONE(cause, error) ((uint32_t)(cause) | (uint32_t)(error) << 8)
#define GONE_CAUSE(gone) ((gone) & 0xff)
#define GONE_ERROR(gone) ((int)((gone) >> 8))
#define PAGE_SIZE 4096u /* as KVM_COALESCED_MMIO_MAX needs it */
#define FRAME_MAX 32 /* the longest, a Write, takes 31 bytes with space, offset and data 64 bits wide */

/* One device process: the supervisor's end of its access channel. */
struct device {
    pthread_mutex_t lock;    /* held from a request to its reply, or to room for it in the mailbox */
    pthread_mutex_t slot_lock; /* held while a request is put into the mailbox, and never while waiting */
    int fd;                  /* SOCK_SEQPACKET */
    uint64_t deadline_ns;    /* how long it may hold up one access */
    struct mailbox *mailbox; /* NULL: requests go over `fd` */
    int bell;                /* eventfd that wakes the device when it does not look into its mailbox */
    _Atomic uint32_t posted; /* requests put into the mailbox so far, or just about to be */
    _Atomic uint32_t gone; /* GONE(), set once */
    _Atomic bool coalesced; /* writes to it may be in the ring */
    _Atomic uint64_t reads, writes, shadowed, wait_ns;
};

/* One bus: ranges sorted by start, disjoint, never changed once published. */
struct table {
    uint32_t n;
    struct core_route routes[];
};

struct core {
    uint64_t deadline_ns;
    pthread_rwlock_t table_lock; /* readers copy one route out */
    struct table *tables[2];     /* [is_mmio] */
    pthread_mutex_t add_lock;
    pthread_mutex_t ring_lock; /* held by who takes from the ring */
    volatile struct kvm_coalesced_mmio_ring *ring; /* the VM's, which KVM fills; NULL: there is none */
    _Atomic uint32_t lost; /* 1 + index of a device that was gone when a write of the ring was posted */
    _Atomic uint32_t n_devices;
    _Atomic uint64_t float_reads, float_writes;
    _Atomic uint32_t pci_address;                  /* CONFIG_ADDRESS */
    _Atomic uint32_t pci_functions[PCI_FUNCTIONS]; /* 1 + index of the device, 0 for none */
    struct device devices[CORE_DEVICES_MAX];
};

/* An access that KVM reported and that may take several steps: `count` elements of `size` bytes, each of
 * them one piece, or cut into byte pieces where it crosses from one range to the next. */
struct access {
    bool pending;
    bool is_mmio, is_write;
    bool bytes; /* the current element is being served byte by byte */
    uint64_t addr;
    uint32_t size, count;
    uint32_t element, byte; /* where we are */
    uint8_t *data;          /* in the run page */
};

struct core_vcpu {
    struct core *core;
    int fd;
    struct kvm_run *run;
    uint64_t run_size;
    struct access access;
    struct core_exit exit;
    bool awaits_python; /* the current piece was handed to Python by the last EXIT_IO */
    _Atomic bool stop;
    pthread_mutex_t kick_lock;
    bool inside; /* `thread` is in core_vcpu_run; under kick_lock */
    pthread_t thread;
};

static uint64_t all_ones(uint32_t size)
{
    return size >= 8 ? UINT64_MAX : (1ull << 8 * size) - 1;
}

static bool is_access_size(uint32_t size)
{
    return size == 1 || size == 2 || size == 4 || size == 8;
}

/* ---- msgpack, just as much as the access channel needs ---- */

static uint8_t *put_uint(uint8_t *p, uint64_t value)
{
    if (value < 0x80) {
        *p++ = (uint8_t)value;
        return p;
    }
    *p++ = 0xcf;
    for (int shift = 56; shift >= 0; shift -= 8)
        *p++ = (uint8_t)(value >> shift);
    return p;
}

/* The unsigned integer at p; returns the byte after it, or NULL if there is none before `end`. */
static const uint8_t *get_uint(const uint8_t *p, const uint8_t *end, uint64_t *value)
{
    if (p == end)
        return NULL;
    uint8_t first = *p++;
    if (first < 0x80) {
        *value = first;
        return p;
    }
    if (first < 0xcc || first > 0xcf)
        return NULL;
    int width = 1 << (first - 0xcc);
    if (end - p < width)
        return NULL;
    *value = 0;
    while (width--)
        *value = *value << 8 | *p++;
    return p;
}

enum { TAG_READ = 1, TAG_WRITE = 2, TAG_VALUE = 3, TAG_DONE = 4 };

static size_t pack_request(uint8_t *frame, const struct mailbox_request *r)
{
    bool is_write = r->tag == TAG_WRITE;
    uint8_t *p = frame;
    *p++ = is_write ? 0x96 : 0x94;
    *p++ = r->tag;
    p = put_uint(p, r->space);
    p = put_uint(p, r->offset);
    p = put_uint(p, r->size);
    if (is_write) {
        p = put_uint(p, r->data);
        *p++ = r->posted ? 0xc3 : 0xc2;
    }
    return (size_t)(p - frame);
}

/* Whether the frame is exactly [tag] or, with `value`, [tag, value]. */
static bool parse_reply(const uint8_t *frame, size_t length, uint64_t tag, uint64_t *value)
{
    const uint8_t *p = frame, *end = frame + length;
    uint64_t got;
    if (length < 2 || *p++ != (value ? 0x92 : 0x91))
        return false;
    p = get_uint(p, end, &got);
    if (!p || got != tag)
        return false;
    if (value)
        p = get_uint(p, end, value);
    return p == end;
}

/* ---- one device process ---- */

/* The device is dead now; the first cause stays.  Returns that cause. */
static uint32_t device_die(struct device *d, uint32_t gone)
{
    uint32_t before = CAUSE_NONE;
    if (!atomic_compare_exchange_strong(&d->gone, &before, gone))
        return before;
    /* Wakes whoever waits for its reply; what it may still send is never read. */
    shutdown(d->fd, SHUT_RDWR);
    if (d->mailbox) {
        atomic_fetch_xor(&d->mailbox->done, 1u << 31); /* for who is about to sleep */
        syscall(SYS_futex, &d->mailbox->done, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
    return gone;
}

/* Whether a socket call that failed may be tried again: both calls return by themselves well before the
 * deadline (see core_add_device), and signals may interrupt them. */
static bool try_again(uint64_t deadline_ns)
{
    return (errno == EAGAIN || errno == EINTR) && now_ns() < deadline_ns;
}

static uint32_t device_send(struct device *d, const uint8_t *frame, size_t length, uint64_t deadline_ns)
{
    while (send(d->fd, frame, length, MSG_NOSIGNAL) < 0) {
        if (try_again(deadline_ns))
            continue;
        if (errno == EAGAIN || errno == EINTR)
            return device_die(d, GONE(CAUSE_TIMEOUT, 0));
        return device_die(d, GONE(CAUSE_SEND_FAILED, errno));
    }
    return CAUSE_NONE;
}

/* Waits for [tag] or, with `value`, [tag, value]. */
static uint32_t device_receive(struct device *d, uint64_t tag, uint64_t *value, uint64_t deadline_ns)
{
    uint8_t frame[FRAME_MAX];
    ssize_t length;
    while ((length = recv(d->fd, frame, sizeof frame, MSG_TRUNC)) < 0) {
        if (try_again(deadline_ns))
            continue;
        if (errno == EAGAIN || errno == EINTR)
            return device_die(d, GONE(CAUSE_TIMEOUT, 0));
        return device_die(d, GONE(errno == ECONNRESET ? CAUSE_EOF : CAUSE_RECEIVE_FAILED, errno));
    }
    if (length == 0)
        return device_die(d, GONE(CAUSE_EOF, 0));
    if ((size_t)length > sizeof frame || !parse_reply(frame, (size_t)length, tag, value))
        return device_die(d, GONE(CAUSE_BAD_REPLY, 0));
    return CAUSE_NONE;
}

/* What the access channel says beside a mailbox: nothing, until the device is gone. */
static uint32_t device_listen(struct device *d)
{
    uint8_t byte;
    ssize_t length = recv(d->fd, &byte, sizeof byte, MSG_PEEK | MSG_DONTWAIT);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return CAUSE_NONE;
    return device_die(d, length > 0    ? GONE(CAUSE_BAD_REPLY, 0)
                         : length == 0 ? GONE(CAUSE_EOF, 0)
                                       : GONE(CAUSE_RECEIVE_FAILED, errno));
}

/* Waits until the device is done with request number `wanted`, one of the last MAILBOX_RING. */
static uint32_t mailbox_await(struct device *d, uint32_t wanted, uint64_t deadline_ns)
{
    struct mailbox *m = d->mailbox;
    /* On the same CPU the device could not go on as long as we spin. */
    bool spins = atomic_load(&m->device_cpu) != (uint32_t)sched_getcpu(), asked = false;
    uint64_t spin_until_ns = spins ? now_ns() + MAILBOX_SPIN_NS : 0;
    for (;;) {
        /* Both counts may grow meanwhile. */
        uint32_t least = d->posted - MAILBOX_RING, done = atomic_load(&m->done), gone = atomic_load(&d->gone);
        if (gone)
            return gone;
        if (done - least > d->posted - least)
            return device_die(d, GONE(CAUSE_BAD_REPLY, 0));
        if ((int32_t)(done - wanted) >= 0)
            return CAUSE_NONE;
        uint64_t now = now_ns();
        if (now >= deadline_ns)
            return device_die(d, GONE(CAUSE_TIMEOUT, 0));
        if (now < spin_until_ns) {
            __builtin_ia32_pause();
        } else if (!asked) {
            atomic_store(&m->wanted, wanted);
            asked = true;
        } else {
            /* As with a socket: the access channel and the deadline are looked at now and then. */
            uint64_t tick_ns = d->deadline_ns / 8 < deadline_ns - now ? d->deadline_ns / 8 : deadline_ns - now;
            struct timespec tick = {(time_t)(tick_ns / NS_PER_S), (long)(tick_ns % NS_PER_S)};
            if (syscall(SYS_futex, &m->done, FUTEX_WAIT, done, &tick, NULL, 0) && errno == ETIMEDOUT &&
                (gone = device_listen(d)))
                return gone;
        }
    }
}

/* Puts a request into the mailbox, as `number`; false if there is no room. */
static bool mailbox_put(struct device *d, const struct mailbox_request *r, uint32_t *number)
{
    struct mailbox *m = d->mailbox;
    pthread_mutex_lock(&d->slot_lock);
    bool fits = d->posted - atomic_load(&m->done) < MAILBOX_RING;
    if (fits) {
        m->ring[d->posted % MAILBOX_RING] = *r;
        atomic_store_explicit(&m->vcpu_cpu, (uint32_t)sched_getcpu(), memory_order_relaxed);
        *number = d->posted + 1;
        d->posted = *number; /* first: no shadow is taken that the device, seeing the other, has not made right */
        atomic_store(&m->posted, *number);
    }
    pthread_mutex_unlock(&d->slot_lock);
    if (fits && atomic_load(&m->asleep)) {
        atomic_store(&m->asleep, 0);
        if (write(d->bell, &(uint64_t){1}, sizeof(uint64_t)) < 0 && errno != EAGAIN) /* EAGAIN: it rings already */
            device_die(d, GONE(CAUSE_SEND_FAILED, errno));
    }
    return fits;
}

static uint32_t mailbox_transact(struct device *d, const struct mailbox_request *r, uint64_t *value,
                                 uint64_t deadline_ns)
{
    uint32_t number, gone;
    while (!mailbox_put(d, r, &number)) /* others may have taken the room */
        if ((gone = now_ns() < deadline_ns ? mailbox_await(d, d->posted - MAILBOX_RING / 2, deadline_ns)
                                           : device_die(d, GONE(CAUSE_TIMEOUT, 0))))
            return gone;
    gone = r->posted ? atomic_load(&d->gone) : mailbox_await(d, number, deadline_ns);
    if (!gone && r->tag == TAG_READ)
        *value = atomic_load(&d->mailbox->value);
    return gone;
}

static uint32_t socket_transact(struct device *d, const struct mailbox_request *r, uint64_t *value,
                                uint64_t deadline_ns)
{
    uint8_t frame[FRAME_MAX];
    bool is_read = r->tag == TAG_READ;
    uint32_t gone = device_send(d, frame, pack_request(frame, r), deadline_ns);
    if (gone || r->posted)
        return gone;
    return device_receive(d, is_read ? TAG_VALUE : TAG_DONE, is_read ? value : NULL, deadline_ns);
}

/* One transaction after the other; waiting for the others' counts towards the deadline. */
static uint32_t transact_in_turn(struct device *d, const struct mailbox_request *r, uint64_t *value)
{
    uint64_t deadline_ns = r->at_ns + d->deadline_ns;
    struct timespec until = {(time_t)(deadline_ns / NS_PER_S), (long)(deadline_ns % NS_PER_S)};
    if (pthread_mutex_clocklock(&d->lock, CLOCK_MONOTONIC, &until))
        return device_die(d, GONE(CAUSE_TIMEOUT, 0));
    uint32_t gone = atomic_load(&d->gone);
    if (!gone)
        gone = (d->mailbox ? mailbox_transact : socket_transact)(d, r, value, deadline_ns);
    if (!gone && r->tag == TAG_READ && *value > all_ones(r->size))
        gone = device_die(d, GONE(CAUSE_BAD_REPLY, 0));
    pthread_mutex_unlock(&d->lock);
    return gone;
}

/* One transaction.  `value` is what a read gives. */
static uint32_t device_transact(struct device *d, struct mailbox_request *r, uint64_t *value)
{
    uint32_t number, gone = atomic_load(&d->gone);
    r->at_ns = r->at_ns ? r->at_ns : now_ns();
    /* A posted write waits for nobody's answer, or the writes to other devices behind it in the ring would, too. */
    bool is_put = r->posted && d->mailbox && !gone && mailbox_put(d, r, &number);
    gone = is_put ? atomic_load(&d->gone) : transact_in_turn(d, r, value);
    atomic_fetch_add_explicit(r->tag == TAG_READ ? &d->reads : &d->writes, 1, memory_order_relaxed);
    if (!is_put)
        atomic_fetch_add_explicit(&d->wait_ns, now_ns() - r->at_ns, memory_order_relaxed);
    return gone;
}

/* Whether a shadow says what the read would give. */
static bool shadow_read(struct device *d, uint32_t space, uint64_t offset, uint32_t size, uint64_t *value)
{
    struct mailbox *m = d->mailbox;
    if (!m || space || size != 1 || offset >= MAILBOX_SHADOWS || atomic_load(&m->done) != d->posted)
        return false;
    uint16_t shadow = atomic_load(&m->shadow[offset]);
    if (!(shadow & MAILBOX_SHADOWED) || atomic_load(&d->gone))
        return false;
    *value = shadow & 0xff;
    atomic_fetch_add_explicit(&d->shadowed, 1, memory_order_relaxed);
    return true;
}

/* What [addr, addr + size) belongs to, a hole being a range that floats; false if to more than one. */
static bool locate(struct core *core, bool is_mmio, uint64_t addr, uint32_t size, struct core_route *route)
{
    pthread_rwlock_rdlock(&core->table_lock);
    const struct table *table = core->tables[is_mmio];
    uint32_t low = 0, high = table->n; /* ends with low = the first range that starts after addr */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (table->routes[middle].start <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    bool whole;
    const struct core_route *found = low ? &table->routes[low - 1] : NULL;
    if (found && addr - found->start < found->size) {
        *route = *found;
        whole = found->size - (addr - found->start) >= size;
    } else {
        *route = (struct core_route){.kind = ROUTE_FLOAT};
        whole = low == table->n || table->routes[low].start - addr >= size;
    }
    pthread_rwlock_unlock(&core->table_lock);
    return whole;
}

/* Posts the writes that KVM has put aside, in their order.  Who is late waits for who is at it: none is overtaken. */
static void drain(struct core *core)
{
    volatile struct kvm_coalesced_mmio_ring *ring = core->ring;
    if (!ring || ring->first == ring->last)
        return;
    pthread_mutex_lock(&core->ring_lock);
    uint64_t at_ns = now_ns(); /* they are one access: a device may hold it up for one deadline */
    for (uint32_t left = KVM_COALESCED_MMIO_MAX; left && ring->first != ring->last; left--) {
        atomic_thread_fence(memory_order_acquire); /* KVM: the write first, then `last` */
        uint32_t first = ring->first % KVM_COALESCED_MMIO_MAX;
        struct kvm_coalesced_mmio entry = *(struct kvm_coalesced_mmio *)&ring->coalesced_mmio[first];
        struct core_route r;
        uint64_t data = 0;
        if (is_access_size(entry.len) && locate(core, false, entry.phys_addr, entry.len, &r) &&
            r.kind == ROUTE_DEVICE) {
            memcpy(&data, entry.data, entry.len);
            uint64_t offset = r.base_offset + (entry.phys_addr - r.start);
            struct mailbox_request w = {.tag = TAG_WRITE, .space = r.space, .offset = offset, .at_ns = at_ns,
                                        .size = (uint8_t)entry.len, .data = data, .posted = true};
            if (device_transact(&core->devices[r.index], &w, NULL))
                atomic_store(&core->lost, r.index + 1);
        }
        atomic_thread_fence(memory_order_release);
        ring->first = (first + 1) % KVM_COALESCED_MMIO_MAX;
    }
    pthread_mutex_unlock(&core->ring_lock);
}

static uint32_t device_access(struct core *core, struct device *d, struct mailbox_request *r, uint64_t *value)
{
    if (atomic_load(&d->coalesced))
        drain(core);
    if (r->tag == TAG_READ && shadow_read(d, r->space, r->offset, r->size, value))
        return CAUSE_NONE;
    return device_transact(d, r, value);
}

static uint32_t device_read(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                            uint64_t *value)
{
    struct mailbox_request r = {.tag = TAG_READ, .space = space, .offset = offset, .size = (uint8_t)size};
    return device_access(core, &core->devices[index], &r, value);
}

static uint32_t device_write(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                             uint64_t data, bool posted)
{
    struct mailbox_request r = {.tag = TAG_WRITE, .space = space, .offset = offset, .size = (uint8_t)size,
                                .data = data, .posted = posted};
    return device_access(core, &core->devices[index], &r, NULL);
}

/* ---- PCI configuration ---- */

#define PCI_ENABLE 0x80000000u
#define PCI_ADDRESS_BITS 0x80fffffcu /* PCI 3.0, figure 3-2: enable, bus, device, function, register */

/* Turns the route of an access at `offset` of a configuration window into that of the function it selects. */
static void pci_resolve(struct core *core, bool is_mmio, bool is_write, uint64_t offset, uint32_t size,
                        struct core_route *route)
{
    uint32_t address = atomic_load(&core->pci_address);
    uint64_t bdf = is_mmio ? offset >> 12 : address >> 8 & 0xffff;
    uint64_t reg = is_mmio ? offset & 0xfff : (address & 0xfc) + (offset & 3);
    bool selected = is_mmio || (offset >= 4 && address & PCI_ENABLE);
    uint32_t function = bdf < PCI_FUNCTIONS ? atomic_load(&core->pci_functions[bdf]) : 0;
    if (!selected || !function || size > 4 || reg % size) {
        route->kind = ROUTE_FLOAT;
    } else if (is_write) {
        route->kind = ROUTE_PYTHON; /* it may move a BAR */
    } else {
        route->kind = ROUTE_DEVICE;
        route->index = function - 1;
        route->base_offset = reg - offset;
    }
}

/* ---- serving an access ---- */

/* One piece of an access, at `data` in the run page, for the one range it lies in. */
static int serve_piece(struct core_vcpu *v, struct core_route *route, uint64_t addr, uint32_t size, uint8_t *data)
{
    struct core *core = v->core;
    bool is_write = v->access.is_write;
    uint64_t value = all_ones(size);
    if (is_write) {
        value = 0;
        memcpy(&value, data, size);
    }
    if (route->kind == ROUTE_PCI_CONFIG) {
        uint64_t offset = addr - route->start;
        if (!v->access.is_mmio && offset == 0 && size == 4) {
            if (is_write) {
                atomic_store(&core->pci_address, (uint32_t)value & PCI_ADDRESS_BITS);
            } else {
                value = atomic_load(&core->pci_address);
                memcpy(data, &value, size);
            }
            return EXIT_NONE;
        }
        pci_resolve(core, v->access.is_mmio, is_write, offset, size, route);
    }
    if (route->kind == ROUTE_CHECKED)
        route->kind = is_write ? ROUTE_PYTHON : ROUTE_DEVICE;
    if (route->kind == ROUTE_PYTHON) {
        v->exit.is_mmio = v->access.is_mmio;
        v->exit.is_write = is_write;
        v->exit.size = size;
        v->exit.addr = addr;
        v->exit.data = value;
        v->awaits_python = true;
        return EXIT_IO;
    }
    if (route->kind == ROUTE_DEVICE) {
        uint64_t offset = route->base_offset + (addr - route->start);
        uint32_t gone = is_write ? device_write(core, route->index, route->space, offset, size, value, true)
                                 : device_read(core, route->index, route->space, offset, size, &value);
        if (gone) {
            v->exit.index = route->index;
            v->exit.cause = GONE_CAUSE(gone);
            v->exit.error = GONE_ERROR(gone);
            return EXIT_DEVICE_DEAD;
        }
    } else {
        atomic_fetch_add_explicit(is_write ? &core->float_writes : &core->float_reads, 1,
                                  memory_order_relaxed);
    }
    if (!is_write)
        memcpy(data, &value, size);
    return EXIT_NONE;
}

/* Whether core_vcpu_stop was called; takes it back. */
static bool take_stop(struct core_vcpu *v)
{
    if (!atomic_load(&v->stop))
        return false;
    pthread_mutex_lock(&v->kick_lock);
    v->run->immediate_exit = 0;
    atomic_store(&v->stop, false);
    pthread_mutex_unlock(&v->kick_lock);
    return true;
}

/* The rest of the pending access.  An exit in the middle leaves it pending: the next call goes on with
 * the same piece, which after EXIT_DEVICE_DEAD is looked up anew. */
static int serve(struct core_vcpu *v)
{
    struct access *a = &v->access;
    while (a->element < a->count) {
        uint8_t *data = a->data + (size_t)a->element * a->size + a->byte;
        uint32_t size = a->bytes ? 1 : a->size;
        if (v->awaits_python) {
            v->awaits_python = false;
            if (!a->is_write)
                memcpy(data, &v->exit.data, size);
        } else {
            if (take_stop(v))
                return EXIT_STOPPED;
            struct core_route route;
            uint64_t addr = a->addr + a->byte;
            if (!is_access_size(size) || !locate(v->core, a->is_mmio, addr, size, &route)) {
                a->bytes = true;
                continue;
            }
            int why = serve_piece(v, &route, addr, size, data);
            if (why)
                return why;
        }
        a->byte += size;
        if (a->byte == a->size) {
            a->byte = 0;
            a->bytes = false;
            a->element++;
        }
    }
    a->pending = false;
    return EXIT_NONE;
}

static int report(struct core_vcpu *v, int why, uint64_t reason)
{
    v->exit.reason = reason;
    v->exit.n_values = 0;
    return why;
}

static int report_values(struct core_vcpu *v, int why, uint64_t reason, const __u64 *values, uint32_t n)
{
    report(v, why, reason);
    v->exit.n_values = n < 16 ? n : 16;
    memcpy(v->exit.values, values, v->exit.n_values * sizeof *values);
    return why;
}

/* Acts on the exit that KVM described in the run page. */
int core_vcpu_dispatch(struct core_vcpu *v)
{
    struct kvm_run *run = v->run;
    struct access *a = &v->access;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        if (!run->io.size || run->io.data_offset > v->run_size ||
            (uint64_t)run->io.size * run->io.count > v->run_size - run->io.data_offset)
            return report(v, EXIT_UNKNOWN, KVM_EXIT_IO);
        *a = (struct access){.pending = true,
                             .is_write = run->io.direction == KVM_EXIT_IO_OUT,
                             .addr = run->io.port,
                             .size = run->io.size,
                             .count = run->io.count,
                             .data = (uint8_t *)run + run->io.data_offset};
        return serve(v);
    case KVM_EXIT_MMIO:
        if (!run->mmio.len || run->mmio.len > sizeof run->mmio.data)
            return report(v, EXIT_UNKNOWN, KVM_EXIT_MMIO);
        *a = (struct access){.pending = true,
                             .is_mmio = true,
                             .is_write = run->mmio.is_write,
                             .addr = run->mmio.phys_addr,
                             .size = run->mmio.len,
                             .count = 1,
                             .data = run->mmio.data};
        return serve(v);
    case KVM_EXIT_INTR:
        return EXIT_NONE;
    case KVM_EXIT_HLT:
        return EXIT_HLT;
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return EXIT_IRQ_WINDOW_OPEN;
    case KVM_EXIT_SHUTDOWN:
        return EXIT_SHUTDOWN;
    case KVM_EXIT_IOAPIC_EOI:
        return report(v, EXIT_IOAPIC_EOI, run->eoi.vector);
    case KVM_EXIT_FAIL_ENTRY:
        return report(v, EXIT_FAIL_ENTRY, run->fail_entry.hardware_entry_failure_reason);
    case KVM_EXIT_SYSTEM_EVENT:
        return report_values(v, EXIT_SYSTEM_EVENT, run->system_event.type, run->system_event.data,
                             run->system_event.ndata);
    case KVM_EXIT_INTERNAL_ERROR:
        return report_values(v, EXIT_INTERNAL_ERROR, run->internal.suberror, run->internal.data,
                             run->internal.ndata);
    default:
        return report(v, EXIT_UNKNOWN, run->exit_reason);
    }
}

static int enter_guest(struct core_vcpu *v)
{
    if (take_stop(v))
        return EXIT_STOPPED;
    if (ioctl(v->fd, KVM_RUN, 0) == 0)
        return core_vcpu_dispatch(v);
    /* EINTR: a signal; EAGAIN: a processor that waited for its INIT or SIPI has got it. */
    if (errno == EINTR || errno == EAGAIN)
        return EXIT_NONE;
    v->exit.error = errno;
    return EXIT_RUN_FAILED;
}

/* Runs the guest until there is something for Python. */
int core_vcpu_run(struct core_vcpu *v)
{
    pthread_mutex_lock(&v->kick_lock);
    v->thread = pthread_self();
    v->inside = true;
    pthread_mutex_unlock(&v->kick_lock);
    int why;
    do
        why = v->access.pending ? serve(v) : enter_guest(v);
    while (why == EXIT_NONE);
    pthread_mutex_lock(&v->kick_lock);
    v->inside = false;
    pthread_mutex_unlock(&v->kick_lock);
    return why;
}

/* The value that the read in the last EXIT_IO gives. */
void core_vcpu_complete(struct core_vcpu *v, uint64_t data)
{
    v->exit.data = data & all_ones(v->exit.size);
}

/* core_vcpu_run, now or when next called, returns EXIT_STOPPED.  From any thread. */
void core_vcpu_stop(struct core_vcpu *v)
{
    pthread_mutex_lock(&v->kick_lock);
    atomic_store(&v->stop, true);
    v->run->immediate_exit = 1; /* covers the moment between take_stop and KVM_RUN */
    if (v->inside)
        pthread_kill(v->thread, SIGRTMIN);
    pthread_mutex_unlock(&v->kick_lock);
}

const struct core_exit *core_vcpu_exit(struct core_vcpu *v)
{
    return &v->exit;
}

struct core_vcpu *core_vcpu_new(struct core *core, int fd, void *run, uint64_t run_size)
{
    if (run_size < sizeof(struct kvm_run))
        return NULL;
    struct core_vcpu *v = calloc(1, sizeof *v);
    if (!v)
        return NULL;
    v->core = core;
    v->fd = fd;
    v->run = run;
    v->run_size = run_size;
    pthread_mutex_init(&v->kick_lock, NULL);
    return v;
}

void core_vcpu_free(struct core_vcpu *v)
{
    pthread_mutex_destroy(&v->kick_lock);
    free(v);
}

static void no_op(int signal)
{
    (void)signal;
}

/* SIGRTMIN interrupts KVM_RUN and does nothing else.  0 or -1 with errno. */
int core_install_kick_signal(void)
{
    struct sigaction action = {.sa_handler = no_op}; /* no SA_RESTART: the point is EINTR */
    return sigaction(SIGRTMIN, &action, NULL);
}

/* ---- the core ---- */

static struct table *table_new(const struct core_route *routes, uint32_t n)
{
    struct table *table = malloc(sizeof *table + n * sizeof *routes);
    if (!table)
        return NULL;
    table->n = n;
    if (n)
        memcpy(table->routes, routes, n * sizeof *routes);
    return table;
}

struct core *core_new(uint32_t deadline_ms)
{
    struct core *core = calloc(1, sizeof *core);
    if (!core)
        return NULL;
    core->deadline_ns = deadline_ms * NS_PER_MS;
    core->tables[0] = table_new(NULL, 0);
    core->tables[1] = table_new(NULL, 0);
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    /* Or busy vCPUs could keep a BAR from moving for ever. */
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&core->table_lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    pthread_mutex_init(&core->add_lock, NULL);
    pthread_mutex_init(&core->ring_lock, NULL);
    if (!core->tables[0] || !core->tables[1]) {
        core_free(core);
        return NULL;
    }
    return core;
}

static void device_close(struct device *d)
{
    close(d->fd);
    if (d->mailbox) {
        munmap(d->mailbox, MAILBOX_SIZE);
        close(d->bell);
    }
}

/* No vCPU and no access may be under way. */
void core_free(struct core *core)
{
    for (uint32_t i = 0; i < core->n_devices; i++) {
        device_close(&core->devices[i]);
        pthread_mutex_destroy(&core->devices[i].lock);
        pthread_mutex_destroy(&core->devices[i].slot_lock);
    }
    if (core->ring)
        munmap((void *)core->ring, PAGE_SIZE);
    free(core->tables[0]);
    free(core->tables[1]);
    pthread_rwlock_destroy(&core->table_lock);
    pthread_mutex_destroy(&core->add_lock);
    pthread_mutex_destroy(&core->ring_lock);
    free(core);
}

/* A duplicate of `fd`, blocking, whose calls return now and then so that the deadline is looked at: an
 * eighth of the deadline is also by how much it may be exceeded. */
static int access_channel(struct core *core, int fd)
{
    int type, own;
    socklen_t length = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length))
        return -1;
    if (type != SOCK_SEQPACKET) {
        errno = EPROTOTYPE;
        return -1;
    }
    uint64_t tick_us = core->deadline_ns / 8 / 1000 + 1;
    struct timeval tick = {(time_t)(tick_us / 1000000), (suseconds_t)(tick_us % 1000000)};
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof tick) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof tick))
        return -1;
    own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (own >= 0 && fcntl(own, F_SETFL, fcntl(own, F_GETFL) & ~O_NONBLOCK)) {
        close(own);
        return -1;
    }
    return own;
}

/* Opens `d`'s mailbox in the memfd `page`; 0 or -1 with errno. */
static int device_open_mailbox(struct device *d, int page, int bell)
{
    struct mailbox *mailbox = mmap(NULL, MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
    if (mailbox == MAP_FAILED)
        return -1;
    d->bell = fcntl(bell, F_DUPFD_CLOEXEC, 3);
    if (d->bell < 0) {
        munmap(mailbox, MAILBOX_SIZE);
        return -1;
    }
    d->mailbox = mailbox;
    return 0;
}

/* The new device's index, or -1 with errno.  The descriptors stay the caller's; `patience_ms` is on top of the
 * deadline; without a mailbox, `page` < 0. */
int core_add_device(struct core *core, int fd, uint32_t patience_ms, int page, int bell)
{
    struct device new = {.fd = access_channel(core, fd),
                         .deadline_ns = core->deadline_ns + patience_ms * NS_PER_MS};
    if (new.fd < 0)
        return -1;
    if (page >= 0 && device_open_mailbox(&new, page, bell)) {
        close(new.fd);
        return -1;
    }
    pthread_mutex_lock(&core->add_lock);
    uint32_t index = core->n_devices;
    if (index < CORE_DEVICES_MAX) {
        core->devices[index] = new;
        pthread_mutex_init(&core->devices[index].lock, NULL);
        pthread_mutex_init(&core->devices[index].slot_lock, NULL);
        atomic_store(&core->n_devices, index + 1);
    }
    pthread_mutex_unlock(&core->add_lock);
    if (index < CORE_DEVICES_MAX)
        return (int)index;
    device_close(&new);
    errno = ENOSPC;
    return -1;
}

/* Nothing is sent to the device any more, and nothing waits for it.  0, or -1 for a wrong index. */
int core_mark_dead(struct core *core, uint32_t index)
{
    if (index >= core->n_devices)
        return -1;
    device_die(&core->devices[index], GONE(CAUSE_MARKED, 0));
    return 0;
}

static bool route_fits(const struct core *core, const struct core_route *r, const struct core_route *before,
                       uint64_t bus_last)
{
    return r->size && r->start <= bus_last && r->size - 1 <= bus_last - r->start &&
           (!before || (r->start > before->start && r->start - before->start >= before->size)) &&
           r->kind <= ROUTE_CHECKED &&
           ((r->kind != ROUTE_DEVICE && r->kind != ROUTE_CHECKED) || r->index < core->n_devices);
}

/* Swaps both tables.  Routes come sorted by start.  Returns ROUTES_; or the position, counted through
 * both lists, of the first that is empty, leaves its bus, overlaps the one before, or has no such kind or
 * device, nothing then being changed. */
int core_set_routes(struct core *core, const struct core_route *pio, uint32_t n_pio,
                    const struct core_route *mmio, uint32_t n_mmio)
{
    for (uint32_t i = 0; i < n_pio; i++)
        if (!route_fits(core, &pio[i], i ? &pio[i - 1] : NULL, IO_BUS_SIZE - 1))
            return (int)i;
    for (uint32_t i = 0; i < n_mmio; i++)
        if (!route_fits(core, &mmio[i], i ? &mmio[i - 1] : NULL, UINT64_MAX))
            return (int)(n_pio + i);
    struct table *tables[2] = {table_new(pio, n_pio), table_new(mmio, n_mmio)};
    if (tables[0] && tables[1]) {
        pthread_rwlock_wrlock(&core->table_lock);
        for (int i = 0; i < 2; i++) {
            struct table *before = core->tables[i];
            core->tables[i] = tables[i];
            tables[i] = before;
        }
        pthread_rwlock_unlock(&core->table_lock);
    }
    /* Nobody keeps a pointer into a table beyond its look-up. */
    int result = tables[0] && tables[1] ? ROUTES_SET : ROUTES_NO_MEMORY;
    free(tables[0]);
    free(tables[1]);
    return result;
}

/* An access from Python.  0, GONE(), or CORE_INVALID for a wrong index or size. */
uint32_t core_read(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                   uint64_t *data)
{
    if (index >= core->n_devices || !is_access_size(size))
        return CORE_INVALID;
    return device_read(core, index, space, offset, size, data);
}

uint32_t core_write(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                    uint64_t data, int posted)
{
    if (index >= core->n_devices || !is_access_size(size) || data > all_ones(size))
        return CORE_INVALID;
    return device_write(core, index, space, offset, size, data, posted);
}

/* KVM is about to put writes to device `index` into the VM's ring, which is page `page` of any vCPU's `fd`.  0 or -1
 * with errno; before any vCPU runs. */
int core_coalesce(struct core *core, int fd, uint32_t page, uint32_t index)
{
    errno = EINVAL;
    if (index >= core->n_devices)
        return -1;
    if (!core->ring) {
        void *ring = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)page * PAGE_SIZE);
        if (ring == MAP_FAILED)
            return -1;
        core->ring = ring;
    }
    atomic_store(&core->devices[index].coalesced, true);
    return 0;
}

/* Where in the ring the oldest write is that nobody has taken yet, or CORE_INVALID. */
uint32_t core_oldest(struct core *core)
{
    return core->ring && core->ring->first != core->ring->last ? core->ring->first : CORE_INVALID;
}

/* Posts what the ring holds.  1 + index and cause of a device that could not take its writes, once; else 0. */
uint32_t core_drain(struct core *core, uint32_t *gone)
{
    drain(core);
    uint32_t lost = atomic_exchange(&core->lost, 0);
    if (lost)
        *gone = atomic_load(&core->devices[lost - 1].gone);
    return lost;
}

/* Function `devfn` of bus 0 is device `index` from now on. */
int core_set_pci_function(struct core *core, uint32_t devfn, uint32_t index)
{
    if (devfn >= PCI_FUNCTIONS || index >= core->n_devices)
        return -1;
    atomic_store(&core->pci_functions[devfn], index + 1);
    return 0;
}

/* CONFIG_ADDRESS as the guest has left it. */
uint32_t core_pci_address(struct core *core)
{
    return atomic_load(&core->pci_address);
}

int core_device_counters(struct core *core, uint32_t index, struct core_device_counters *counters)
{
    if (index >= core->n_devices)
        return -1;
    struct device *d = &core->devices[index];
    counters->reads = atomic_load_explicit(&d->reads, memory_order_relaxed);
    counters->writes = atomic_load_explicit(&d->writes, memory_order_relaxed);
    counters->shadowed = atomic_load_explicit(&d->shadowed, memory_order_relaxed);
    counters->wait_ns = atomic_load_explicit(&d->wait_ns, memory_order_relaxed);
    return 0;
}

void core_float_counters(struct core *core, uint64_t *reads, uint64_t *writes)
{
    *reads = atomic_load_explicit(&core->float_reads, memory_order_relaxed);
    *writes = atomic_load_explicit(&core->float_writes, memory_order_relaxed);
}
