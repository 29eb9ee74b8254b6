/* Fuzzes kvmcore/_core.c with a libFuzzer target: one input is a program of what a hostile device process, a
 * guest and the supervisor do, in order.
 *
 * The device's half is a real socketpair; its frames are queued before they are waited for, which a hostile
 * device may do just as well, so that one thread is enough and an input always takes the same way.  What it does
 * to its mailbox it does while it is waited for, too.  Time, KVM_RUN and the failures of send and recv come from
 * the input.  Besides what the sanitizers see: nothing
 * outside the data of the access is written in the run page; a look-up gives what a search through all routes
 * gives; a value fits the size that was asked for; a dead device keeps its first cause.
 *
 * Left out: two threads at once, which core_threads.c has. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags);
static ssize_t fuzz_send(int fd, const void *buffer, size_t size, int flags);
static int fuzz_ioctl(int fd, unsigned long request, int zero);
static int fuzz_clock(clockid_t clock, struct timespec *t);
static long fuzz_futex(long nr, const void *word, int op, uint32_t value, const struct timespec *tick);

#define recv fuzz_recv
#define send fuzz_send
#define ioctl fuzz_ioctl
#define clock_gettime fuzz_clock
#define syscall(nr, word, op, value, tick, ...) fuzz_futex(nr, word, op, value, tick)
#include "../../kvmcore/_core.c"
#undef recv
#undef send

#include "input.h"

#define PAGE 4096u
#define RUN_SIZE (2 * PAGE)
#define DEADLINE_MS 8 /* of the input's own time */
#define DEVICES 4
#define ROUTES 6

static uint64_t time_ns;
static uint32_t fault_after; /* calls until one fails with `fault`; 0: none does */
static int fault;

static struct core *core;
static struct core_vcpu *vcpu;
static struct kvm_run *run;
static uint8_t run_before[RUN_SIZE];
static size_t data_start, data_end; /* what the access at hand may change of the run page */
static int peers[DEVICES];
static struct mailbox *pages[DEVICES]; /* NULL: it has no mailbox */
static struct kvm_coalesced_mmio_ring *ring; /* NULL: the core has none */
static uint32_t gone[DEVICES];
static uint32_t n_devices;

/* ---- the input ---- */

/* Small numbers, and numbers near those that matter, are likelier than others. */
static uint64_t number(void)
{
    static const uint64_t corners[] = {0, 1, 2, 4, 8, 0xcf8, 0xcfc, 0xffff, 0x10000, 0x80000000, 0xffffffff,
                                       1ull << 32, INT64_MAX, UINT64_MAX, UINT64_MAX - 7, 0xe8000000};
    uint8_t how = u8();
    if (how < 0x80)
        return how;
    if (how < 0x90)
        return corners[how & 15];
    if (how < 0xa0)
        return corners[how & 15] + u8() - 128;
    return bits(1 << (how & 3));
}

/* ---- what the core calls ---- */

static int fuzz_clock(clockid_t clock, struct timespec *t)
{
    (void)clock;
    time_ns += 1000;
    *t = (struct timespec){(time_t)(time_ns / NS_PER_S), (long)(time_ns % NS_PER_S)};
    return 0;
}

static bool fails(void)
{
    if (!fault_after || --fault_after)
        return false;
    errno = fault;
    return true;
}

/* What a call that waits does when nothing happens: it takes a tick. */
static ssize_t ticked(ssize_t result)
{
    if (result < 0 && errno == EAGAIN)
        time_ns += DEADLINE_MS * NS_PER_MS / 8;
    return result;
}

/* What a device does to the page when it feels like it. */
static void scribble(struct mailbox *m)
{
    uint8_t how = u8();
    switch (how & 7) {
    case 0: break;
    case 1: case 2: /* as one that means well */
        atomic_store(&m->value, bits(1 << (how >> 6)));
        atomic_store(&m->done, atomic_load(&m->posted));
        break;
    case 3: atomic_store(&m->done, atomic_load(&m->done) + 1); break;
    case 4: atomic_store(&m->done, (uint32_t)number()); break;
    case 5: atomic_store(&m->asleep, u8()); break;
    case 6: atomic_store(&m->device_cpu, u8()); break;
    case 7: ((uint8_t *)m)[bits(2) % MAILBOX_SIZE] = u8(); break;
    }
}

static long fuzz_futex(long nr, const void *word, int op, uint32_t value, const struct timespec *tick)
{
    REQUIRE(nr == SYS_futex && (op == FUTEX_WAIT || op == FUTEX_WAKE));
    if (op == FUTEX_WAKE)
        return 0;
    REQUIRE(tick->tv_sec == 0 && tick->tv_nsec > 0 && tick->tv_nsec <= (long)(DEADLINE_MS * NS_PER_MS / 8));
    for (uint32_t i = 0; i < n_devices; i++)
        if (pages[i] && word == &core->devices[i].mailbox->done)
            scribble(pages[i]);
    if (fails())
        return -1;
    if (atomic_load((const _Atomic uint32_t *)word) != value) {
        errno = EAGAIN;
    } else {
        time_ns += (uint64_t)tick->tv_nsec;
        errno = ETIMEDOUT;
    }
    return -1;
}

static ssize_t fuzz_recv(int fd, void *buffer, size_t size, int flags)
{
    return ticked(fails() ? -1 : recv(fd, buffer, size, flags | MSG_DONTWAIT));
}

static ssize_t fuzz_send(int fd, const void *buffer, size_t size, int flags)
{
    return ticked(fails() ? -1 : send(fd, buffer, size, flags | MSG_DONTWAIT));
}

/* ---- the guest ---- */

static void next_exit(void)
{
    static const uint8_t reasons[] = {KVM_EXIT_IO, KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_MMIO, KVM_EXIT_INTR,
                                      KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IOAPIC_EOI};
    uint8_t how = u8();
    run->exit_reason = how & 0x80 ? how & 0x7f : reasons[how & 7];
    data_start = data_end = 0;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        run->io.direction = u8() & 1;
        run->io.size = u8();
        run->io.port = (uint16_t)number();
        run->io.count = (uint32_t)number();
        run->io.data_offset = PAGE;
        if (how & 0x40)
            run->io.data_offset = number();
        if (run->io.data_offset <= RUN_SIZE - 8)
            memcpy((uint8_t *)run + run->io.data_offset, &(uint64_t){number()}, 8);
        /* From here on as the loop sees it: the data may have been put over the exit itself. */
        if (run->io.direction != KVM_EXIT_IO_OUT && run->io.data_offset <= RUN_SIZE) {
            data_start = run->io.data_offset;
            data_end = data_start + (uint64_t)run->io.size * run->io.count;
        }
        break;
    case KVM_EXIT_MMIO:
        run->mmio.is_write = u8() & 1;
        run->mmio.len = u8() & 0x80 ? (uint32_t)number() : u8() & 15;
        run->mmio.phys_addr = number();
        memcpy(run->mmio.data, &(uint64_t){number()}, 8);
        if (!run->mmio.is_write && run->mmio.len <= 8) {
            data_start = (size_t)(run->mmio.data - (uint8_t *)run);
            data_end = data_start + run->mmio.len;
        }
        break;
    default: /* type, number of values, values */
        run->system_event.type = (uint32_t)number();
        run->system_event.ndata = (uint32_t)number();
        run->system_event.data[0] = number();
    }
    if (data_end > RUN_SIZE)
        data_end = data_start;
    memcpy(run_before, run, RUN_SIZE);
}

static int fuzz_ioctl(int fd, unsigned long request, int zero)
{
    REQUIRE(fd == 1000 && request == KVM_RUN && zero == 0);
    if (input == input_end) {
        errno = EBADF;
        return -1;
    }
    next_exit();
    return fails() ? -1 : 0;
}

/* What the device or the loop has changed in the run page is the data of the read, and no more. */
static void check_run_page(void)
{
    run->immediate_exit = ((struct kvm_run *)run_before)->immediate_exit;
    REQUIRE(!memcmp(run_before, run, data_start));
    REQUIRE(!memcmp(run_before + data_end, (uint8_t *)run + data_end, RUN_SIZE - data_end));
}

static void check_exit(int why)
{
    const struct core_exit *e = core_vcpu_exit(vcpu);
    REQUIRE(why >= EXIT_NONE && why <= EXIT_RUN_FAILED);
    if (why == EXIT_IO) {
        struct core_route r;
        REQUIRE(is_access_size(e->size) && e->data <= all_ones(e->size) && (e->is_mmio || e->addr < 0x10100));
        REQUIRE(locate(core, e->is_mmio, e->addr, e->size, &r));
        REQUIRE(r.kind == ROUTE_PYTHON || (e->is_write && (r.kind == ROUTE_CHECKED || r.kind == ROUTE_PCI_CONFIG)));
    }
    if (why == EXIT_DEVICE_DEAD)
        REQUIRE(e->index < n_devices && e->cause > CAUSE_NONE && e->cause <= CAUSE_MARKED);
    REQUIRE(e->n_values <= 16);
    check_run_page();
}

/* ---- the supervisor and the devices ---- */

static void add_device(bool has_mailbox)
{
    int pair[2], page = -1, bell = -1;
    if (n_devices == DEVICES)
        return;
    REQUIRE(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    pages[n_devices] = NULL;
    if (has_mailbox) {
        REQUIRE((page = memfd_create("mailbox", MFD_CLOEXEC)) >= 0 && !ftruncate(page, MAILBOX_SIZE));
        REQUIRE((bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) >= 0);
        pages[n_devices] = mmap(NULL, MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
        REQUIRE(pages[n_devices] != MAP_FAILED);
    }
    REQUIRE(core_add_device(core, pair[0], 0, page, bell) == (int)n_devices);
    close(pair[0]);
    if (has_mailbox) {
        close(page);
        close(bell);
    }
    peers[n_devices++] = pair[1];
}

static void peer_scribbles(void)
{
    uint8_t n = u8();
    if (n_devices && pages[n % n_devices])
        scribble(pages[n % n_devices]);
}

static int peer(void)
{
    uint8_t n = u8();
    return n_devices ? peers[n % n_devices] : -1;
}

static void peer_sends(void)
{
    uint8_t frame[512], length = u8();
    int fd = peer();
    for (size_t i = 0; i < length; i++)
        frame[i] = u8();
    send(fd, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* As a device that means well, give or take a width. */
static void peer_answers(void)
{
    uint8_t frame[16] = {0x92, TAG_VALUE}, width = u8() & 3;
    int fd = peer();
    size_t length = 2;
    if (u8() & 1) {
        frame[length++] = 0xcc + width;
        for (int n = 1 << width; n--;)
            frame[length++] = u8();
    } else {
        frame[0] = 0x91;
        frame[1] = TAG_DONE;
    }
    send(fd, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void peer_reads(void)
{
    uint8_t frame[FRAME_MAX + 1];
    ssize_t length;
    int fd = peer();
    while ((length = recv(fd, frame, sizeof frame, MSG_DONTWAIT)) > 0)
        REQUIRE(length < FRAME_MAX && ((frame[0] == 0x94 && frame[1] == TAG_READ) ||
                                            (frame[0] == 0x96 && frame[1] == TAG_WRITE)));
}

static void check_gone(uint32_t index, uint32_t now)
{
    REQUIRE(now == CORE_INVALID || (index < n_devices && GONE_CAUSE(now) <= CAUSE_MARKED));
    if (index < n_devices && now != CORE_INVALID) {
        REQUIRE(!gone[index] || gone[index] == now);
        gone[index] = now;
    }
}

static void access_from_python(bool is_write)
{
    uint32_t index = u8() & 7, space = (uint32_t)number(), size = u8();
    uint64_t offset = number(), data = number();
    if (is_write) {
        check_gone(index, core_write(core, index, space, offset, size, data, u8() & 1));
    } else {
        uint32_t now = core_read(core, index, space, offset, size, &data);
        check_gone(index, now);
        REQUIRE(now || data <= all_ones(size));
    }
}

static void set_routes(void)
{
    struct core_route routes[2][ROUTES];
    uint32_t n[2];
    for (int bus = 0; bus < 2; bus++) {
        n[bus] = u8() % (ROUTES + 1);
        uint64_t at = 0;
        for (uint32_t i = 0; i < n[bus]; i++) {
            struct core_route *r = &routes[bus][i];
            r->start = at + number();
            r->size = number();
            r->kind = u8() & 7;
            r->index = u8() & 7;
            r->space = u8();
            r->base_offset = number();
            at = r->start + r->size;
        }
    }
    struct table *before = core->tables[1];
    int at = core_set_routes(core, routes[0], n[0], routes[1], n[1]);
    REQUIRE(at == ROUTES_SET || (at >= 0 && (uint32_t)at < n[0] + n[1] && core->tables[1] == before));
}

/* A machine as there are: a port device, configuration space by ports and in memory, a BAR. */
static void usual_machine(void)
{
    static const struct core_route pio[] = {
        {.start = 0x70, .size = 2, .kind = ROUTE_DEVICE},
        {.start = 0x80, .size = 1, .kind = ROUTE_PYTHON},
        {.start = 0xcf8, .size = 8, .kind = ROUTE_PCI_CONFIG, .space = 2},
    };
    static const struct core_route mmio[] = {
        {.start = 0x80000000, .size = 0x100000, .kind = ROUTE_PCI_CONFIG, .space = 2},
        {.start = 0xe7fff000, .size = 0x1000, .kind = ROUTE_CHECKED, .space = 3},
        {.start = 0xe8000000, .size = 0x1000, .kind = ROUTE_DEVICE, .space = 3},
    };
    add_device(u8() & 1);
    REQUIRE(core_set_routes(core, pio, 3, mmio, 3) == ROUTES_SET);
    REQUIRE(!core_set_pci_function(core, 0, 0));
}

/* How long the integer is that begins with `first`. */
static size_t width(uint8_t first)
{
    return first < 0x80 ? 1 : 1 + (1u << (first & 3));
}

/* The frame reader on bytes that end where the frame ends. */
static void read_frame(void)
{
    size_t length = u8() % (FRAME_MAX + 1);
    uint8_t *frame = malloc(length);
    for (size_t i = 0; i < length; i++)
        frame[i] = u8();
    uint64_t value;
    if (parse_reply(frame, length, TAG_VALUE, &value))
        REQUIRE(frame[0] == 0x92 && length == 1 + width(frame[1]) + width(frame[1 + width(frame[1])]));
    if (parse_reply(frame, length, TAG_DONE, NULL))
        REQUIRE(frame[0] == 0x91 && length == 1 + width(frame[1]));
    free(frame);
}

/* locate() against a search through all routes. */
static void look_up(void)
{
    bool is_mmio = u8() & 1;
    uint32_t size = 1u << (u8() & 3);
    uint64_t addr = number();
    if (addr + (size - 1) < addr)
        return;
    struct core_route route;
    bool whole = locate(core, is_mmio, addr, size, &route);
    const struct table *t = core->tables[is_mmio];
    const struct core_route *first = NULL;
    uint32_t inside = 0, others = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        const struct core_route *r = &t->routes[i];
        if (addr >= r->start && addr - r->start < r->size)
            first = r;
    }
    for (uint32_t k = 0; k < size; k++) {
        const struct core_route *owner = NULL;
        for (uint32_t i = 0; i < t->n; i++)
            if (addr + k >= t->routes[i].start && addr + k - t->routes[i].start < t->routes[i].size)
                owner = &t->routes[i];
        owner == first ? inside++ : others++;
    }
    REQUIRE(whole == !others && inside);
    REQUIRE(first ? !memcmp(&route, first, sizeof route) : route.kind == ROUTE_FLOAT);
}

static void coalesce(void)
{
    uint32_t index = u8() & 7;
    int fd = memfd_create("ring", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && !ftruncate(fd, PAGE));
    REQUIRE((core_coalesce(core, fd, 0, index) == 0) == (index < n_devices));
    if (!ring && index < n_devices) {
        ring = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        REQUIRE(ring != MAP_FAILED);
        ring->first = ring->last = u8() % KVM_COALESCED_MMIO_MAX;
    }
    close(fd);
}

/* As KVM does, of what the guest may write. */
static void put_aside(void)
{
    struct kvm_coalesced_mmio entry = {.phys_addr = number(), .len = u8() & 15, .pio = 1};
    uint32_t next = ring ? (ring->last + 1) % KVM_COALESCED_MMIO_MAX : 0;
    memcpy(entry.data, &(uint64_t){number()}, 8);
    if (!ring || next == ring->first)
        return;
    ring->coalesced_mmio[ring->last] = entry;
    ring->last = next;
}

static void drain_ring(void)
{
    uint32_t now, lost = core_drain(core, &now);
    REQUIRE(lost <= n_devices && (!ring || ring->first == ring->last));
    if (lost)
        check_gone(lost - 1, now);
}

static void step(void)
{
    uint8_t what = u8();
    struct core_device_counters counters;
    uint64_t floats[2];
    switch (what < 0xf8 ? what % 21 : 21 + what % 3) {
    case 0: add_device(false); break;
    case 1: peer_sends(); break;
    case 2: peer_answers(); break;
    case 3: peer_reads(); break;
    case 4: shutdown(peer(), u8() % 3); break;
    case 5: set_routes(); break;
    case 6:
        if (vcpu->access.pending) /* the loop does not enter the guest in the middle of an access either */
            break;
        next_exit();
        check_exit(core_vcpu_dispatch(vcpu));
        break;
    case 7: check_exit(core_vcpu_run(vcpu)); break;
    case 8: access_from_python(false); break;
    case 9: access_from_python(true); break;
    case 10: core_mark_dead(core, u8() & 7); break;
    case 11: core_set_pci_function(core, u8() & 7, u8() & 7); break;
    case 12: core_vcpu_stop(vcpu); break;
    case 13: core_vcpu_complete(vcpu, number()); break;
    case 14:
        core_device_counters(core, u8() & 7, &counters);
        core_float_counters(core, &floats[0], &floats[1]);
        break;
    case 15:
        fault_after = u8();
        fault = (int[]){EINTR, EAGAIN, ECONNRESET, ENOBUFS}[u8() & 3];
        break;
    case 16: look_up(); break;
    case 17: read_frame(); break;
    case 18: usual_machine(); break;
    case 19: add_device(true); break;
    case 20: peer_scribbles(); break;
    case 21: coalesce(); break;
    case 22: put_aside(); break;
    case 23: drain_ring(); break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_end = data + size;
    time_ns = 1;
    fault_after = 0;
    n_devices = 0;
    memset(gone, 0, sizeof gone);
    data_start = data_end = 0;
    run = calloc(1, RUN_SIZE);
    memset(run_before, 0, sizeof run_before);
    REQUIRE(core = core_new(DEADLINE_MS));
    REQUIRE(vcpu = core_vcpu_new(core, 1000, run, RUN_SIZE));
    for (int steps = 0; input < input_end && steps < 200; steps++)
        step();
    core_vcpu_free(vcpu);
    core_free(core);
    if (ring)
        munmap(ring, PAGE);
    ring = NULL;
    while (n_devices) {
        close(peers[--n_devices]);
        if (pages[n_devices])
            munmap(pages[n_devices], MAILBOX_SIZE);
    }
    free(run);
    return 0;
}
