/* Fuzzes devproc/_ring.h, _batch.h and _frames.h with a libFuzzer target: one input is a program of what a hostile
 * driver and the device do, in order, and of what the driver does while the device does something.
 *
 * Guest memory is two regions with nothing between them and around them that may be touched.  Besides what the
 * sanitizers see: every element is wholly in a region and clear of the ring; a host's file is only read or written
 * within its size; what the device counts as served is what the driver is shown, never early; a chain or a wish that
 * comes just before a fence is not missed; a frame's header makes sense to who gets it, and all of a frame is used. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <unistd.h>

#include "input.h"

static void meanwhile(void);
static ssize_t fuzz_transfer(int fd, const struct iovec *iov, int n, off_t offset, int flags, bool is_write);
static off_t fuzz_lseek(int fd, off_t offset, int whence);
static ssize_t fuzz_readv(int fd, const struct iovec *iov, int n);
static ssize_t fuzz_writev(int fd, const struct iovec *iov, int n);

#undef atomic_thread_fence
#define atomic_thread_fence(order) meanwhile()
#define preadv2(fd, iov, n, offset, flags) fuzz_transfer(fd, iov, n, offset, flags, false)
#define pwritev2(fd, iov, n, offset, flags) fuzz_transfer(fd, iov, n, offset, flags, true)
#define lseek fuzz_lseek
#define readv fuzz_readv
#define writev fuzz_writev
#include "../../devproc/_batch.h"
#include "../../devproc/_frames.h"

#define REGION 0x2000u
#define FD 7
#define DISK_SIZE 0x4000u

static const uint64_t starts[] = {0, 0x10000};
static const uint64_t desc_at = 0x100, avail_at = 0x302, used_at = 0x404, table_at = 0x801;
static struct region regions[2];
static struct ring ring;
static struct chain out[64];
static uint32_t n_out;
static uint16_t served; /* used.idx as it has to be */
static uint64_t features, frame_size; /* of the last frame that was read */
static uint8_t tail[sizeof(struct net_header) + FRAME_MAX];

/* ---- the driver ---- */

static uint64_t address(void)
{
    static const uint64_t corners[] = {0x100, 0x302, 0x404, 0x801, 0x1fff, 0x2000, 0x10000, 0x12000, UINT64_MAX};
    uint8_t how = u8();
    if (how < 0xc0)
        return 0x1000 + how * 16u;
    if (how < 0xe0)
        return corners[how % 9] - (u8() & 31);
    return how < 0xf0 ? 0x10000 + u8() * 32u : bits(8);
}

static void put16(uint64_t gpa, uint16_t value)
{
    memcpy(regions[0].host + gpa, &value, sizeof value);
}

static uint16_t get16(uint64_t gpa)
{
    uint16_t value;
    memcpy(&value, regions[0].host + gpa, sizeof value);
    return value;
}

static void put_descriptor(void)
{
    static const uint32_t lengths[] = {1, 16, 16, 512, 512, 1024, 32, 0, 17, 0x2000, 0xffffffff, 48, 16, 1, 64, 4096};
    uint8_t where = u8(), how = u8();
    struct desc d = {.addr = how & 0x80 ? table_at : address(), .len = lengths[how & 15]};
    d.flags = how & 0x40 ? u8() : (how >> 4 & 3);
    d.next = u8() & 0x1f;
    memcpy(regions[0].host + (where & 0x80 ? table_at : desc_at) + DESC_SIZE * (where & 15), &d, sizeof d);
}

/* A request as a driver makes it, at descriptors 0 to 2, or nearly so. */
static void put_request(void)
{
    struct blk_header header = {.type = u8() & 3, .sector = u8() & 0x3f};
    memcpy(regions[0].host + 0x1800, &header, sizeof header);
    bool is_write = header.type == BLK_OUT;
    struct desc request[3] = {
        {0x1800, sizeof header, DESC_F_NEXT, 1},
        {0x10000 + u8() * 16u, 512u * (u8() & 7), is_write ? DESC_F_NEXT : DESC_F_NEXT | DESC_F_WRITE, 2},
        {0x1900, 1, DESC_F_WRITE, 0},
    };
    memcpy(regions[0].host + desc_at, request, sizeof request);
}

/* A frame of the driver's in descriptors 0 to 1, or buffers for some of the host's. */
static void put_frame(void)
{
    uint8_t how = u8();
    struct net_header header = {how & 3, u8() & 0x85, bits(2), u8(), u8(), u8(), 0};
    memcpy(regions[0].host + 0x1800, &header, sizeof header);
    struct desc sent[2] = {{0x1800, how & 4 ? 12 : 40, DESC_F_NEXT, 1}, {0x1900, u8() * 4u, 0, 0}};
    struct desc free[4];
    for (int i = 0; i < 4; i++)
        free[i] = (struct desc){0x10000 + i * 0x400u, how & 4 ? 12u + u8() : 0x400, DESC_F_WRITE, 0};
    how & 8 ? memcpy(regions[0].host + desc_at, sent, sizeof sent)
            : memcpy(regions[0].host + desc_at, free, sizeof free);
}

static void offer(void)
{
    uint16_t idx = get16(avail_at + AT_IDX);
    uint8_t how = u8();
    put16(avail_at + AT_RING + 2 * (idx & (ring.size - 1)), how & 0x1f);
    put16(avail_at + AT_IDX, (uint16_t)(idx + (how & 0x80 ? how >> 5 : 1)));
}

/* What another processor may do at any time, but for the device's own area. */
static void meanwhile(void)
{
    switch (u8() & 7) {
    case 1: offer(); break;
    case 2: put_descriptor(); break;
    case 3: put16(avail_at + AT_FLAGS, u8()); break;
    case 4: put16(avail_at + AT_RING + 2 * ring.size, (uint16_t)(ring.next_used + (int8_t)u8())); break;
    }
}

/* ---- the host ---- */

static void check_iov(const struct iovec *v)
{
    uint64_t gpa = UINT64_MAX;
    for (int i = 0; i < 2; i++) {
        const uint8_t *at = v->iov_base;
        if (at >= regions[i].host && at + v->iov_len <= regions[i].host + REGION)
            gpa = regions[i].gpa + (uint64_t)(at - regions[i].host);
    }
    REQUIRE(v->iov_len && gpa != UINT64_MAX);
    for (int i = 0; i < 3; i++)
        REQUIRE(gpa >= ring.high[i] || gpa + v->iov_len <= ring.low[i]);
}

static ssize_t fuzz_transfer(int fd, const struct iovec *iov, int n, off_t offset, int flags, bool is_write)
{
    uint8_t how = u8(), last = 0;
    size_t size = 0;
    REQUIRE(fd == FD && !flags && n > 0 && get16(used_at + AT_IDX) == served);
    meanwhile();
    for (int i = 0; i < n; i++) {
        check_iov(&iov[i]);
        size += iov[i].iov_len;
        for (size_t k = 0; k < iov[i].iov_len; k++)
            is_write ? (last ^= ((uint8_t *)iov[i].iov_base)[k]) : (((uint8_t *)iov[i].iov_base)[k] = 0x5a);
    }
    REQUIRE(offset >= 0 && (uint64_t)offset + size <= DISK_SIZE && size % SECTOR == 0);
    if (how >= 0xf0)
        return how & 1 ? -1 : (ssize_t)size / 2;
    served++;
    return (ssize_t)size;
}

static off_t fuzz_lseek(int fd, off_t offset, int whence)
{
    REQUIRE(fd == FD && !offset && whence == SEEK_END);
    return u8() == 0xff ? 0 : DISK_SIZE;
}

static ssize_t fuzz_writev(int fd, const struct iovec *iov, int n)
{
    struct net_header h;
    uint64_t size = 0;
    REQUIRE(fd == FD && n > 1 && n <= 1024 && iov[0].iov_len == sizeof h && get16(used_at + AT_IDX) == served);
    memcpy(&h, iov[0].iov_base, sizeof h);
    meanwhile();
    for (int i = 1; i < n; i++) {
        check_iov(&iov[i]);
        size += iov[i].iov_len;
    }
    REQUIRE(size >= ETH_SIZE && size <= FRAME_MAX && (h.flags || !h.gso_type));
    if (h.flags)
        REQUIRE(features & to_host.csum && h.csum_start >= ETH_SIZE && h.csum_start + h.csum_offset + 2u <= size &&
                h.hdr_len <= size && (!h.gso_type || h.gso_size));
    if (u8() >= 0xf0) {
        errno = EAGAIN;
        return -1;
    }
    served++;
    return (ssize_t)(size + sizeof h);
}

static ssize_t fuzz_readv(int fd, const struct iovec *iov, int n)
{
    static const uint32_t sizes[] = {0, 11, 25, 26, 60, 500, 1024, 1036, 2000, 5000, 70000};
    uint64_t room = 0, left;
    uint8_t how = u8(), head[PEEK] = {u8() & 3, u8() & 0x85};
    REQUIRE(fd == FD && n > 1 && n <= 1024 && iov[0].iov_len == PEEK && iov[n - 1].iov_base == tail);
    REQUIRE(iov[n - 1].iov_len == sizeof tail && get16(used_at + AT_IDX) == ring.next_used);
    meanwhile();
    for (int i = 0; i < n; i++) {
        if (i && i < n - 1)
            check_iov(&iov[i]);
        room += iov[i].iov_len;
    }
    if (how >= 0xf0) {
        errno = how & 1 ? EAGAIN : EIO;
        return -1;
    }
    left = frame_size = sizes[how % 11] < room ? sizes[how % 11] : room;
    head[sizeof(struct net_header)] = how & 0x40 ? 0xff : 0x02; /* a group's address, or the card's */
    memcpy(iov[0].iov_base, head, sizeof head);
    for (int i = 0; i < n && left; i++) {
        uint64_t part = iov[i].iov_len < left ? iov[i].iov_len : left;
        if (i)
            memset(iov[i].iov_base, 0xa5, part);
        left -= part;
    }
    return (ssize_t)frame_size;
}

/* ---- the device ---- */

static void pop(void)
{
    struct chain *c = &out[n_out];
    uint64_t sum = 0;
    uint32_t before = ring.n_out;
    enum popped got = ring_pop(&ring, c);
    if (got != POPPED) {
        REQUIRE(ring.n_out == before && (got == BROKEN) == (ring.why[0] != 0));
        ring.why[0] = 0;
        if (got == NOTHING) /* the driver will notify, and had added nothing by the time of the fence */
            REQUIRE(get16(avail_at + AT_IDX) == ring.next_avail &&
                    (ring.event_idx ? get16(used_at + AT_RING + 8 * ring.size) == ring.next_avail
                                    : get16(used_at + AT_FLAGS) == 0));
        return;
    }
    REQUIRE(c->n && c->n <= CHAIN_MAX && c->n_readable <= c->n && c->id < ring.size && ring_is_out(&ring, c->id));
    for (uint32_t i = 0; i < c->n; i++) {
        check_iov(&c->iov[i]);
        REQUIRE(ring_host(&ring, c->gpa[i], c->iov[i].iov_len) == c->iov[i].iov_base);
        sum += c->iov[i].iov_len;
    }
    for (uint32_t i = 0; i < n_out; i++)
        REQUIRE(out[i].id != c->id);
    REQUIRE(sum == c->read_size + c->write_size && ring.n_out == before + 1 && ring.n_out <= ring.size);
    n_out++;
}

static void push(void)
{
    if (!n_out)
        return;
    uint32_t which = u8() % n_out;
    uint32_t element[2] = {out[which].id, u8()};
    ring_fill(&ring, 0, element[0], element[1]);
    REQUIRE(get16(used_at + AT_IDX) == served);
    ring_publish(&ring, 1);
    REQUIRE(!memcmp(regions[0].host + used_at + AT_RING + 8 * (served & (ring.size - 1)), element, sizeof element));
    served++;
    out[which] = out[--n_out];
}

static void wants_interrupt(void)
{
    uint64_t pushed = ring.unannounced;
    bool wants = ring_wants_interrupt(&ring);
    uint16_t event = get16(avail_at + AT_RING + 2 * ring.size);
    bool wished = ring.event_idx ? (uint16_t)(served - event - 1) < pushed : !(get16(avail_at + AT_FLAGS) & 1);
    REQUIRE(wants == (pushed && wished) && !ring.unannounced);
}

static void serve(void)
{
    struct disk disk = {FD, DISK_SIZE, u8() & 1};
    struct turn turn = {.left = u8() * 64u, .least = u8()};
    uint64_t left = turn.left;
    uint16_t before = served;
    uint32_t n = ring.n_out;
    ring_transfer(&ring, &disk, &turn);
    ring.why[0] = 0;
    REQUIRE(turn.left <= left && (uint16_t)(served - before) >= turn.reads + turn.writes && ring.n_out == n);
    REQUIRE(served == (uint16_t)(before + turn.reads + turn.writes));
}

static void send(void)
{
    uint16_t before = served;
    uint32_t n = ring.n_out, most = u8() & 7, sent;
    sent = ring_send(&ring, FD, features, most);
    ring.why[0] = 0;
    REQUIRE(sent <= most && ring.n_out == n && served == (uint16_t)(before + sent));
}

static void receive(void)
{
    static const uint8_t mac[6] = {0x02};
    static struct buffers b;
    static uint64_t expected;
    struct frame f;
    enum received why;
    struct card card = {FD, features, 1500, mac, u8() & 1, u8() & 1, tail};
    uint32_t n = ring.n_out, most = u8() & 7, received;
    expected = bits(2);
    uint16_t before = ring.next_used;
    received = ring_receive(&ring, &card, most, &expected, &f, &b, &why);
    ring.why[0] = 0;
    REQUIRE(received <= most && ring.n_out == n + b.n && !b.n == !f.size);
    REQUIRE(!f.size || (f.size == frame_size && f.direct + PEEK <= b.room));
    if (received == 1 && !f.size && most == 1) { /* all of it is in what was used, and nothing else is */
        uint64_t written = 0;
        for (uint16_t at = before; at != ring.next_used; at++) {
            uint32_t element[2];
            memcpy(element, regions[0].host + used_at + AT_RING + 8 * (at & (ring.size - 1)), sizeof element);
            written += element[1];
        }
        REQUIRE(written == frame_size && expected == frame_size);
    }
    while (b.n)
        REQUIRE(ring_unpop(&ring, b.buffer[--b.n].id));
}

static void step(void)
{
    switch (u8() % 15) {
    case 0: case 1: put_descriptor(); break;
    case 2: put_request(); break;
    case 3: case 4: offer(); break;
    case 5: case 6: pop(); break;
    case 7: push(); break;
    case 8: n_out -= n_out && ring_unpop(&ring, out[n_out - 1].id); break;
    case 9: wants_interrupt(); break;
    case 10: serve(); break;
    case 11: regions[0].host[bits(2) % REGION] = u8(); break;
    case 12: put_frame(); break;
    case 13: send(); break;
    case 14: receive(); break;
    }
    served = ring.next_used;
    put16(used_at + AT_IDX, served); /* a driver that writes there harms itself alone */
    put16(used_at + AT_FLAGS, ring.notified || ring.event_idx ? 0 : USED_F_NO_NOTIFY);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_end = data + size;
    uint8_t how = u8();
    features = how & 32 ? bits(2) : UINT32_MAX;
    for (int i = 0; i < 2; i++)
        regions[i] = (struct region){starts[i], REGION, calloc(1, REGION)};
    ring = (struct ring){.regions = regions, .n_regions = 2, .size = 1u << (how & 3)};
    ring.indirect = how & 4;
    ring.event_idx = how & 8;
    ring.next_avail = ring.seen = ring.next_used = served = how & 16 ? 0xfffe : 0;
    ring.desc = regions[0].host + (ring.low[0] = desc_at);
    ring.avail = regions[0].host + (ring.low[1] = avail_at);
    ring.used = regions[0].host + (ring.low[2] = used_at);
    ring.high[0] = desc_at + DESC_SIZE * ring.size;
    ring.high[1] = avail_at + 6 + 2 * ring.size;
    ring.high[2] = used_at + 6 + 8 * ring.size;
    ring.out = malloc(ring.size * sizeof *ring.out);
    memset(ring.out, 0xff, ring.size * sizeof *ring.out);
    put16(avail_at + AT_IDX, served);
    put16(used_at + AT_IDX, served);
    n_out = 0;
    while (input < input_end)
        step();
    free(ring.out);
    for (int i = 0; i < 2; i++)
        free(regions[i].host);
    return 0;
}
