/* Whether posted writes through a mailbox are seen by every later read: `core_litmus ACCESSES`.
 *
 * One vCPU writes 1, 2, 3... to a register and tells the other one in memory how far it has got; what that one
 * then reads must not be less; the same for the low byte, in a register that has a shadow.  Each also reads back
 * what it wrote last.  The device is honest, and sleeps when there is nothing to do. */
#define _GNU_SOURCE
#include "../../kvmcore/_core.c"

#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>

#define REQUIRE(what) ((what) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), abort()))

static struct core *core;
static uint64_t accesses;
static _Atomic uint64_t told;
static _Atomic bool over;
static int bell;

static void *run_device(void *arg)
{
    struct mailbox *m = arg;
    uint64_t registers[3] = {0};
    uint32_t done = 0;
    while (!atomic_load(&over)) {
        while (atomic_load(&m->posted) != done) {
            struct mailbox_request r = m->ring[done % MAILBOX_RING];
            if (r.tag == TAG_WRITE)
                registers[r.offset] = r.data;
            else
                atomic_store_explicit(&m->value, registers[r.offset], memory_order_relaxed);
            if (atomic_load(&m->posted) == done + 1)
                atomic_store(&m->shadow[2], (uint16_t)(MAILBOX_SHADOWED | registers[2]));
            atomic_store(&m->done, ++done);
            if (atomic_load(&m->wanted) == done)
                syscall(SYS_futex, &m->done, FUTEX_WAKE, 1, NULL, NULL, 0);
        }
        atomic_store(&m->asleep, 1);
        uint64_t count;
        struct pollfd rings = {.fd = bell, .events = POLLIN};
        if (atomic_load(&m->posted) == done && poll(&rings, 1, 100) > 0)
            REQUIRE(read(bell, &count, sizeof count) > 0);
        atomic_store(&m->asleep, 0);
    }
    return NULL;
}

static uint64_t value_of(uint64_t offset)
{
    uint64_t value;
    REQUIRE(!core_read(core, 0, 0, offset, 8, &value));
    return value;
}

static uint8_t shadowed(void)
{
    uint64_t value;
    REQUIRE(!core_read(core, 0, 0, 2, 1, &value));
    return (uint8_t)value;
}

static void *run_writer(void *arg)
{
    (void)arg;
    for (uint64_t n = 1; n <= accesses; n++) {
        REQUIRE(!core_write(core, 0, 0, 0, 8, n, true));
        REQUIRE(!core_write(core, 0, 0, 2, 1, n & 0xff, true));
        atomic_store(&told, n);
        if (n % 5 == 0)
            REQUIRE(value_of(0) == n);
        if (n % 3 == 0)
            REQUIRE(shadowed() == (n & 0xff));
    }
    return NULL;
}

static void *run_reader(void *arg)
{
    (void)arg;
    for (uint64_t n = 1; atomic_load(&told) < accesses; n++) {
        uint64_t least = atomic_load(&told);
        REQUIRE(value_of(0) >= least);
        least = atomic_load(&told);
        uint8_t since = (uint8_t)(shadowed() - least);
        uint64_t most = atomic_load(&told) + 1;
        REQUIRE(most - least > 0xff || since <= most - least);
        if (n % 3 == 0) {
            REQUIRE(!core_write(core, 0, 0, 1, 8, n, true));
            REQUIRE(value_of(1) == n);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[3];
    int pair[2], page = memfd_create("mailbox", 0);
    accesses = argc == 2 ? strtoull(argv[1], NULL, 10) : 100000;
    REQUIRE(page >= 0 && !ftruncate(page, MAILBOX_SIZE) && (bell = eventfd(0, EFD_NONBLOCK)) >= 0);
    struct mailbox *m = mmap(NULL, MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
    REQUIRE(m != MAP_FAILED && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
    REQUIRE((core = core_new(20000)) && core_add_device(core, pair[0], 0, page, bell) == 0);
    void *(*run[])(void *) = {run_device, run_writer, run_reader};
    for (int i = 0; i < 3; i++)
        REQUIRE(!pthread_create(&threads[i], NULL, run[i], m));
    pthread_join(threads[1], NULL);
    pthread_join(threads[2], NULL);
    atomic_store(&over, true);
    pthread_join(threads[0], NULL);
    struct core_device_counters counters;
    core_device_counters(core, 0, &counters);
    REQUIRE(counters.shadowed);
    printf("%llu reads, %llu writes, %llu reads of a shadow\n", (unsigned long long)counters.reads,
           (unsigned long long)counters.writes, (unsigned long long)counters.shadowed);
    return 0;
}
