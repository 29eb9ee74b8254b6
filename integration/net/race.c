/* A driver of a network card's first pair of queues that races with it, on rings that are shared with its process
 * (virtio 1.2, 2.7): buffers of odd sizes, few or all, notifications only as the card wants them, interrupts now
 * and then, while the host sends frames.  `race` says why if something stands still: the card sleeps for seconds
 * while there is something to do, or there is something for the driver and no interrupt. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEADER_SIZE 12u
#define FRAME_MIN 60u
#define STILL_MS 2000
enum { WRITE = 2, NO_INTERRUPT = 1, NO_NOTIFY = 1 };

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct queue {
    struct desc *desc;
    uint8_t *avail, *used;
    uint64_t buffers; /* guest-physical address of `size` times `buffer_size` bytes */
    uint32_t size, buffer_size;
    int kick, irq, event_idx, receives;
};

struct race {
    struct queue rx, tx;
    int tap, host, pid; /* the card's tap, a socket that sends into it, the card's process */
    uint32_t seed, ms, frame_max;
    uint64_t received, sent; /* out: buffers used */
    char why[160];
};

struct driver {
    struct race *race;
    struct queue *q;
    unsigned seed;
    uint16_t avail, seen, added, n_free, *free;
};

static _Atomic bool ending, over; /* nothing new is begun; nothing is waited for any more */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void nap(unsigned us)
{
    nanosleep(&(struct timespec){us / 1000000, us % 1000000 * 1000}, NULL);
}

static _Atomic uint16_t *word(uint8_t *area, uint32_t at)
{
    return (_Atomic uint16_t *)(area + at);
}

static uint16_t used_idx(const struct queue *q)
{
    return atomic_load_explicit(word(q->used, 2), memory_order_acquire);
}

static void fail(struct driver *d, const char *why)
{
    if (!atomic_exchange(&over, true))
        snprintf(d->race->why, sizeof d->race->why, "%s: %s: avail %u, used %u, seen %u, card's wish %u, ours %u",
                 d->q->receives ? "rx" : "tx", why, d->avail, used_idx(d->q), d->seen,
                 *word(d->q->used, d->q->event_idx ? 4 + 8 * d->q->size : 0),
                 *word(d->q->avail, d->q->event_idx ? 4 + 2 * d->q->size : 0));
}

static void give(struct driver *d, uint32_t length)
{
    struct queue *q = d->q;
    uint32_t at = (uint32_t)rand_r(&d->seed) % d->n_free;
    uint16_t id = d->free[at];
    d->free[at] = d->free[--d->n_free];
    q->desc[id] = (struct desc){q->buffers + (uint64_t)id * q->buffer_size, length, q->receives ? WRITE : 0, 0};
    *word(q->avail, 4 + 2 * (d->avail % q->size)) = id;
    d->added++;
    atomic_store_explicit(word(q->avail, 2), ++d->avail, memory_order_release);
}

/* Notifies the card if it wants to know of what was given since this was last called (2.7.10). */
static void kick(struct driver *d)
{
    struct queue *q = d->q;
    uint16_t added = d->added;
    d->added = 0;
    atomic_thread_fence(memory_order_seq_cst);
    bool wanted = q->event_idx ? (uint16_t)(d->avail - *word(q->used, 4 + 8 * q->size) - 1) < added
                               : !(*word(q->used, 0) & NO_NOTIFY);
    if (added && wanted && write(q->kick, &(uint64_t){1}, 8) != 8)
        fail(d, "no kick");
}

/* Asks for an interrupt once `after` more are used, 0: for none; false if they are already. */
static bool ask(struct driver *d, uint16_t after)
{
    struct queue *q = d->q;
    if (q->event_idx)
        *word(q->avail, 4 + 2 * q->size) = (uint16_t)(d->seen + after - 1);
    else
        *word(q->avail, 0) = after ? 0 : NO_INTERRUPT;
    atomic_thread_fence(memory_order_seq_cst);
    return (uint16_t)(used_idx(q) - d->seen) < after;
}

static uint32_t reap(struct driver *d)
{
    struct queue *q = d->q;
    uint32_t n = 0;
    for (; used_idx(q) != d->seen; n++) {
        uint32_t id = *(uint32_t *)(q->used + 4 + 8 * (d->seen++ % q->size));
        if (id >= q->size || d->n_free == q->size) {
            fail(d, "used what it does not have");
            return n;
        }
        d->free[d->n_free++] = (uint16_t)id;
    }
    return n;
}

/* Whether the card's process does nothing for a while: on a busy machine it may just not be its turn. */
static bool sleeps(const struct race *race)
{
    char path[32], text[512];
    unsigned long first = 0, user, kernel;
    snprintf(path, sizeof path, "/proc/%d/stat", race->pid);
    for (int n = 0; n < 40; n++) {
        FILE *file = fopen(path, "r");
        size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
        text[size] = 0;
        if (file)
            fclose(file);
        const char *name_end = strrchr(text, ')');
        if (!name_end || name_end[2] != 'S')
            return !name_end;
        sscanf(name_end + 3, "%*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &kernel);
        first = n ? first : user + kernel;
        if (user + kernel > first + 1)
            return false;
        nap(STILL_MS * 1000 / 40);
    }
    return true;
}

static bool readable(int fd, int ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, ms) > 0;
}

/* Until the interrupt that was asked for `after` more. */
static void await_interrupt(struct driver *d, uint16_t after)
{
    struct queue *q = d->q;
    uint64_t since = now_ms(), count;
    while (!over) {
        if (readable(q->irq, 20)) {
            if (read(q->irq, &count, sizeof count) < 0)
                fail(d, "no interrupt after all");
            return;
        }
        bool is_done = (uint16_t)(used_idx(q) - d->seen) >= after;
        if (!is_done && q->receives && !readable(d->race->tap, 0)) {
            since = now_ms(); /* the host has sent nothing */
            if (ending)
                return;
        }
        if (now_ms() - since < STILL_MS)
            continue;
        if (sleeps(d->race) && !readable(q->irq, 0)) {
            is_done = (uint16_t)(used_idx(q) - d->seen) >= after;
            fail(d, is_done ? "no interrupt" : "the card stands still");
        }
        since = now_ms();
    }
}

static void spin(unsigned most, unsigned *seed)
{
    for (unsigned left = (unsigned)rand_r(seed) % most; left; left--)
        __builtin_ia32_pause();
}

/* Gives one after the other, each as the card is about to find that there are no more. */
static uint32_t tease(struct driver *d)
{
    struct queue *q = d->q;
    uint32_t n = 0;
    for (int times = 0; times < 500 && d->n_free && !over; times++) {
        give(d, q->receives ? q->buffer_size : HEADER_SIZE + FRAME_MIN);
        kick(d);
        for (int patience = 5000; patience && used_idx(q) != d->avail; patience--)
            __builtin_ia32_pause();
        spin(64, &d->seed);
        n += reap(d);
    }
    return n;
}

static void *drive(void *arg)
{
    struct driver *d = arg;
    struct queue *q = d->q;
    uint64_t *count = q->receives ? &d->race->received : &d->race->sent;
    while (!ending && !over) {
        *count += reap(d);
        unsigned mood = (unsigned)rand_r(&d->seed) % 8, n = d->n_free, batch = 1 + (unsigned)rand_r(&d->seed) % q->size;
        if (mood < 3)
            n = mood == 1 ? 0 : (unsigned)rand_r(&d->seed) % (n + 1);
        while (n--) {
            uint32_t least = q->receives ? HEADER_SIZE : HEADER_SIZE + FRAME_MIN;
            bool whole = q->receives && rand_r(&d->seed) % 4;
            give(d, whole ? q->buffer_size : least + (uint32_t)rand_r(&d->seed) % (q->buffer_size - least + 1));
            if (n % batch == 0)
                kick(d);
        }
        if (mood == 1)
            *count += tease(d);
        uint16_t out = (uint16_t)(q->size - d->n_free);
        if (mood == 0 || !out) {
            ask(d, 0);
            nap((unsigned)rand_r(&d->seed) % 300);
        } else if (mood == 1) {
            spin(2000, &d->seed);
        } else if (mood > 2) { /* a card that receives has all buffers now, and may need them all for one frame */
            uint16_t after = q->event_idx && !q->receives ? (uint16_t)(1 + rand_r(&d->seed) % out) : 1;
            if (ask(d, after))
                await_interrupt(d, after);
        }
    }
    return NULL;
}

static void *send_frames(void *arg)
{
    struct race *race = arg;
    unsigned seed = race->seed;
    static uint8_t frame[1 << 16];
    memset(frame, 0xff, 6);
    frame[12] = 0x88; /* for local experiments */
    frame[13] = 0xb5;
    while (!ending && !over) {
        unsigned most = rand_r(&seed) % 4 ? 4 : 256; /* so that there is no more, or always more */
        for (unsigned n = 1 + (unsigned)rand_r(&seed) % most; n; n--)
            send(race->host, frame, FRAME_MIN + (unsigned)rand_r(&seed) % (race->frame_max - FRAME_MIN), MSG_DONTWAIT);
        nap((unsigned)rand_r(&seed) % 3000);
    }
    return NULL;
}

/* 0, or -1 with `why`. */
int race(struct race *race)
{
    pthread_t threads[3];
    struct driver drivers[2] = {{.race = race, .q = &race->rx, .seed = race->seed + 1},
                                {.race = race, .q = &race->tx, .seed = race->seed + 2}};
    ending = over = false;
    for (int i = 0; i < 2; i++) {
        struct driver *d = &drivers[i];
        d->free = calloc(d->q->size, sizeof *d->free);
        while (d->n_free < d->q->size) {
            d->free[d->n_free] = d->n_free;
            d->n_free++;
        }
        pthread_create(&threads[i], NULL, drive, d);
    }
    pthread_create(&threads[2], NULL, send_frames, race);
    for (uint64_t until = now_ms() + race->ms; !over && now_ms() < until;)
        nap(10000);
    ending = true;
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++)
        free(drivers[i].free);
    return over ? -1 : 0;
}
