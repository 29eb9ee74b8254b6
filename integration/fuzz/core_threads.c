/* kvmcore/_core.c under threads, for ThreadSanitizer: two vCPUs make accesses while device processes answer,
 * talk nonsense and hang up, and the supervisor replaces them, moves routes, stops vCPUs and reads counters.
 *
 * Prints how many accesses were served; what is wrong with memory or locks the sanitizer says. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>

/* ThreadSanitizer knows pthread_mutex_clocklock from GCC 13 on, and before takes the lock for not taken. */
static int lock_until(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until)
{
    struct timespec now, real;
    clock_gettime(clock, &now);
    clock_gettime(CLOCK_REALTIME, &real);
    long long ns = (until->tv_sec - now.tv_sec + real.tv_sec) * 1000000000ll;
    ns += until->tv_nsec - now.tv_nsec + real.tv_nsec;
    return pthread_mutex_timedlock(mutex, &(struct timespec){ns / 1000000000, ns % 1000000000});
}

#define pthread_mutex_clocklock lock_until
#include "../../kvmcore/_core.c"

#define REQUIRE(what) ((what) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), abort()))
#define DEADLINE_MS 50
#define ROUNDS 100 /* with a new device in each */
#define PORT 0x60
#define BAR 0xe8000000

static struct core *core;
static struct core_vcpu *vcpus[2];
static _Atomic bool over;
static _Atomic uint64_t served;
static _Atomic int peers[ROUNDS]; /* 1 + descriptor */

/* One byte to or from a port or a BAR, for ever. */
static void *run_vcpu(void *arg)
{
    struct core_vcpu *v = arg;
    unsigned seed = 1;
    while (!atomic_load(&over)) {
        bool is_mmio = rand_r(&seed) & 1, is_write = rand_r(&seed) & 1;
        v->run->exit_reason = is_mmio ? KVM_EXIT_MMIO : KVM_EXIT_IO;
        if (is_mmio) {
            v->run->mmio.phys_addr = BAR + (unsigned)rand_r(&seed) % 8;
            v->run->mmio.len = 1u << rand_r(&seed) % 4;
            v->run->mmio.is_write = is_write;
        } else {
            v->run->io.direction = is_write;
            v->run->io.size = 1;
            v->run->io.count = 1;
            v->run->io.port = (uint16_t)(PORT + rand_r(&seed) % 3);
            v->run->io.data_offset = 4096;
        }
        int why = core_vcpu_dispatch(v);
        while (v->access.pending && !atomic_load(&over)) {
            if (why == EXIT_IO)
                core_vcpu_complete(v, 0);
            why = core_vcpu_run(v);
        }
        atomic_fetch_add(&served, 1);
    }
    return NULL;
}

/* All device processes: most answers are right. */
static void *run_devices(void *arg)
{
    (void)arg;
    unsigned seed = 1;
    while (!atomic_load(&over)) {
        struct pollfd fds[ROUNDS];
        for (int i = 0; i < ROUNDS; i++)
            fds[i] = (struct pollfd){.fd = atomic_load(&peers[i]) - 1, .events = POLLIN};
        poll(fds, ROUNDS, 1);
        for (int i = 0; i < ROUNDS; i++) {
            uint8_t frame[FRAME_MAX];
            static const uint8_t value[] = {0x92, TAG_VALUE, 7}, nonsense[] = {0xc1}, done[] = {0x91, TAG_DONE};
            if (!(fds[i].revents & POLLIN) || recv(fds[i].fd, frame, sizeof frame, MSG_DONTWAIT) <= 0)
                continue;
            unsigned mood = (unsigned)rand_r(&seed) % 1000;
            if (mood == 0)
                send(fds[i].fd, nonsense, sizeof nonsense, MSG_DONTWAIT | MSG_NOSIGNAL);
            else if (mood == 1)
                shutdown(fds[i].fd, SHUT_RDWR);
            else if (mood > 2 && frame[1] == TAG_READ)
                send(fds[i].fd, value, sizeof value, MSG_DONTWAIT | MSG_NOSIGNAL);
            else if (mood > 2 && frame[0] == 0x96 && frame[6] == 0xc2)
                send(fds[i].fd, done, sizeof done, MSG_DONTWAIT | MSG_NOSIGNAL);
        }
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[3];
    REQUIRE(core = core_new(DEADLINE_MS));
    REQUIRE(!core_install_kick_signal());
    for (int i = 0; i < 2; i++) {
        REQUIRE(vcpus[i] = core_vcpu_new(core, -1, calloc(2, 4096), 2 * 4096));
        REQUIRE(!pthread_create(&threads[i], NULL, run_vcpu, vcpus[i]));
    }
    REQUIRE(!pthread_create(&threads[2], NULL, run_devices, NULL));
    for (uint32_t round = 0; round < ROUNDS; round++) {
        int pair[2];
        REQUIRE(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
        REQUIRE(core_add_device(core, pair[0], 0, -1, -1) == (int)round);
        close(pair[0]);
        atomic_store(&peers[round], pair[1] + 1);
        struct core_route pio[] = {{.start = PORT, .size = 1, .kind = ROUTE_DEVICE, .index = round},
                                   {.start = PORT + 1, .size = 1, .kind = ROUTE_PYTHON}};
        struct core_route mmio[] = {{.start = BAR + round % 4, .size = 4, .kind = ROUTE_DEVICE, .index = round}};
        REQUIRE(core_set_routes(core, pio, 2, mmio, 1) == ROUTES_SET);
        for (int n = 0; n < 10; n++) {
            struct core_device_counters counters;
            uint64_t value, reads, writes;
            core_vcpu_stop(vcpus[n & 1]);
            core_read(core, round, 0, 0, 1, &value);
            core_write(core, round, 0, 0, 1, 0, 0);
            core_device_counters(core, round, &counters);
            core_float_counters(core, &reads, &writes);
        }
        if (round % 3 == 0)
            core_mark_dead(core, round);
    }
    atomic_store(&over, true);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) {
        free(vcpus[i]->run);
        core_vcpu_free(vcpus[i]);
    }
    core_free(core);
    for (int i = 0; i < ROUNDS; i++)
        close(peers[i] - 1);
    printf("%llu accesses\n", (unsigned long long)served);
    return 0;
}
