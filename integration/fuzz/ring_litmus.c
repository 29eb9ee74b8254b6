/* Whether a notification or an interrupt is ever lost on a split ring (devproc/_ring.h): `ring_litmus ROUNDS`.
 *
 * The device takes what there is, a few at a time, interrupts if that is wanted, and when there is no more waits for
 * a notification.  The driver gives a buffer or two, notifies if that is wanted, and looks until they are used or
 * waits for interrupts; so each asks for news just as the other one decides whether there is anybody to tell.  Both
 * waiting is the end. */
#define _GNU_SOURCE
#include "../../devproc/_ring.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REQUIRE(what) ((what) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), abort()))
#define SIZE 8u
#define PATIENCE_S 10
enum { DESC = 0x0, AVAIL = 0x1000, USED = 0x2000, BUFFERS = 0x3000, RAM_SIZE = 0x4000 };

static _Alignas(4096) uint8_t ram[RAM_SIZE];
static bool event_idx;
static uint32_t rounds;
static _Atomic uint32_t notifications, interrupts; /* so far */
static _Atomic bool over;

static _Atomic uint16_t *word(uint32_t at)
{
    return (_Atomic uint16_t *)(ram + at);
}

static void tell(_Atomic uint32_t *news)
{
    atomic_fetch_add(news, 1);
    syscall(SYS_futex, news, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Until there is one that has not been seen. */
static void await(_Atomic uint32_t *news, uint32_t *seen)
{
    for (int left = 200; left && atomic_load(news) == *seen; left--)
        __builtin_ia32_pause();
    while (atomic_load(news) == *seen)
        if (syscall(SYS_futex, news, FUTEX_WAIT, *seen, &(struct timespec){.tv_sec = PATIENCE_S}, NULL, 0))
            REQUIRE(errno != ETIMEDOUT);
    *seen = atomic_load(news);
}

static void *run_device(void *arg)
{
    static const struct region region = {0, RAM_SIZE, ram};
    int32_t out[SIZE];
    struct ring r = {.regions = &region, .n_regions = 1, .size = SIZE, .event_idx = event_idx, .desc = ram + DESC,
                     .avail = ram + AVAIL, .used = ram + USED, .out = out};
    unsigned seed = 2;
    uint32_t seen = 0;
    enum popped popped = NOTHING;
    memset(out, 0xff, sizeof out);
    do {
        for (int left = 1 + rand_r(&seed) % 2; left; left--) {
            struct chain c = {.id = SIZE};
            popped = ring_pop(&r, &c);
            REQUIRE(popped != BROKEN);
            if (popped == NOTHING)
                break;
            ring_fill(&r, 0, c.id, 0);
            ring_publish(&r, 1);
        }
        if (ring_wants_interrupt(&r))
            tell(&interrupts);
        if (popped == NOTHING)
            await(&notifications, &seen);
    } while (!over);
    return arg;
}

static void spin(unsigned *seed)
{
    for (unsigned left = (unsigned)rand_r(seed) % 64; left; left--)
        __builtin_ia32_pause();
}

static void run_driver(void)
{
    unsigned seed = 1;
    uint32_t seen = 0;
    uint16_t avail = 0, used = 0;
    for (uint32_t n = 0; n < rounds; n++) {
        uint16_t added = (uint16_t)(1 + rand_r(&seed) % 2);
        bool looks = rand_r(&seed) % 4;
        for (int i = 0; i < added; i++)
            atomic_store_explicit(word(AVAIL + AT_IDX), ++avail, memory_order_release);
        atomic_thread_fence(memory_order_seq_cst);
        if (event_idx ? (uint16_t)(avail - *word(USED + AT_RING + 8 * SIZE) - 1) < added
                      : !(*word(USED + AT_FLAGS) & USED_F_NO_NOTIFY))
            tell(&notifications);
        for (unsigned left = looks ? 2000 : 0; left && *word(USED + AT_IDX) != avail; left--)
            __builtin_ia32_pause();
        spin(&seed);
        while ((used = *word(USED + AT_IDX)) != avail) {
            atomic_store_explicit(word(AVAIL + (event_idx ? AT_RING + 2 * SIZE : AT_FLAGS)), event_idx ? used : 0,
                                  memory_order_relaxed);
            atomic_thread_fence(memory_order_seq_cst);
            if (*word(USED + AT_IDX) == used)
                await(&interrupts, &seen);
            if (!event_idx)
                *word(AVAIL + AT_FLAGS) = AVAIL_F_NO_INTERRUPT;
        }
    }
}

int main(int argc, char **argv)
{
    rounds = argc == 2 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1000000;
    for (int mode = 0; mode < 2; mode++) {
        pthread_t device;
        event_idx = mode;
        memset(ram, 0, sizeof ram);
        notifications = interrupts = 0;
        over = false;
        for (uint16_t i = 0; i < SIZE; i++) {
            struct desc d = {BUFFERS, 1, 0, 0};
            memcpy(ram + DESC + DESC_SIZE * i, &d, sizeof d);
            *word(AVAIL + AT_RING + 2u * i) = i;
        }
        REQUIRE(!pthread_create(&device, NULL, run_device, NULL));
        run_driver();
        over = true;
        tell(&notifications);
        pthread_join(device, NULL);
        printf("%u rounds, %u notifications, %u interrupts\n", rounds, notifications, interrupts);
    }
    return 0;
}
