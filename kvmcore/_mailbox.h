/* The mailbox: one page that the supervisor and one device process share, for the messages of the device's
 * access channel (devproc/wire.py) without a system call for each.
 *
 * Requests are numbered from 1, modulo 2^32, and are done in order.  Number n is in ring[(n - 1) % MAILBOX_RING]
 * from `posted` = n until `done` = n; `value` is the answer to the last read of those that are done.  There is no
 * second read before the first one's answer was taken; posted writes there may be.
 *
 * The device can write every byte.  So the supervisor keeps its own count of what it has posted, and of the page
 * it only ever reads what is marked as the device's, each word once per decision.
 *
 * A register that reading does not change has a shadow, which the supervisor may take for what a read would give
 * while the device is done with all that was posted.  So the device makes it right before it says that it is done,
 * and takes it back before it lets anything else, an interrupt above all, follow from what the host does.
 *
 * Nobody sleeps through news: who is to be woken says so first and then looks once more, the other one makes its
 * news visible first and then looks who is to be woken, all of it sequentially consistent. */
#ifndef MAILBOX_H
#define MAILBOX_H
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#define MAILBOX_SIZE 4096u
#define MAILBOX_RING 64u /* a power of 2 */
#define MAILBOX_SHADOWS 64u
#define MAILBOX_SHADOWED 0x100u
/* Longer than an access takes, shorter than it takes to wake a process on an idle core of a virtual machine. */
#define MAILBOX_SPIN_NS 50000

struct mailbox_request {
    uint64_t offset, data;
    uint64_t at_ns; /* CLOCK_MONOTONIC */
    uint32_t space;
    uint8_t tag, size, posted; /* tag as of wire.Read or wire.Write */
};

struct mailbox {
    /* the supervisor's */
    _Alignas(64) _Atomic uint32_t posted;
    _Atomic uint32_t wanted;     /* wake who sleeps on `done` when it becomes this */
    _Atomic uint32_t vcpu_cpu; /* on which the last request was made */

    /* the device's */
    _Alignas(64) _Atomic uint32_t done;
    _Atomic uint32_t asleep; /* 1: write to its eventfd; the supervisor clears it when it does */
    _Atomic uint32_t device_cpu;
    _Atomic uint64_t value;
    _Atomic uint16_t shadow[MAILBOX_SHADOWS]; /* by offset in space 0: MAILBOX_SHADOWED and the byte, or 0 */

    _Alignas(64) struct mailbox_request ring[MAILBOX_RING];
};
_Static_assert(sizeof(struct mailbox_request) == 32 && sizeof(struct mailbox) <= MAILBOX_SIZE, "one page");

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
#endif
