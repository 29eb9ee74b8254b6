/* Frames between a virtqueue and a tap without Python, many in a row (virtio 1.2, 5.1.6), for a driver that merges
 * receive buffers.  virtio_net.py says what is checked and why, and decides wherever a frame is not plain: one to be
 * sent stays in the ring, one that was received is handed over with the chains that it is in. */
#ifndef DEVPROC_FRAMES_H
#define DEVPROC_FRAMES_H

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

#include "_ring.h"

#define ETH_SIZE 14u
#define FRAME_MAX (65535u + ETH_SIZE + 4u)
#define SPANS_MAX 1000u /* IOV_MAX is 1024, and a few are ours */
#define BUFFERS_MAX 64u
enum { HDR_NEEDS_CSUM = 1 };
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 };

/* 5.1.3: the features by which a frame's checksum and segments may be left to its receiver. */
static const struct offloads {
    uint32_t csum, tso4, tso6, ecn;
} to_host = {1u << 0, 1u << 11, 1u << 12, 1u << 13}, to_guest = {1u << 1, 1u << 7, 1u << 8, 1u << 9};

struct net_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

#define PEEK (sizeof(struct net_header) + 6u) /* the header and the destination address */

static bool is_gso_allowed(uint8_t gso_type, uint64_t features, const struct offloads *of)
{
    if (gso_type == GSO_NONE)
        return true;
    if (gso_type & GSO_ECN && !(features & of->ecn))
        return false;
    uint8_t kind = gso_type & (uint8_t)~GSO_ECN;
    return (kind == GSO_TCPV4 && features & of->tso4) || (kind == GSO_TCPV6 && features & of->tso6);
}

/* ---- transmitting ---- */

/* Makes the header of a frame of `size` bytes what the host may see; false if the frame is not to be sent. */
static bool check_header(struct net_header *h, uint64_t size, uint64_t features)
{
    if (!is_gso_allowed(h->gso_type, features, &to_host))
        return false;
    if (!(h->flags & HDR_NEEDS_CSUM)) {
        bool is_whole = h->gso_type == GSO_NONE;
        *h = (struct net_header){0};
        return is_whole;
    }
    if (!(features & to_host.csum) || h->csum_start < ETH_SIZE || h->csum_start + h->csum_offset + 2u > size)
        return false;
    if (h->gso_type == GSO_NONE)
        h->gso_size = 0;
    else if (!h->gso_size || h->gso_size > size - h->csum_start)
        return false;
    h->flags = HDR_NEEDS_CSUM;
    h->hdr_len = h->hdr_len < size ? h->hdr_len : (uint16_t)size;
    h->num_buffers = 0;
    return true;
}

static bool send_frame(int fd, uint64_t features, struct chain *c)
{
    struct net_header header;
    uint64_t size = c->read_size - sizeof header;
    if (c->write_size || c->n > SPANS_MAX || c->iov[0].iov_len < sizeof header || size < ETH_SIZE || size > FRAME_MAX)
        return false;
    copy_once(&header, c->iov[0].iov_base, sizeof header);
    if (!check_header(&header, size, features))
        return false;
    int n = (int)c->n;
    if (c->iov[0].iov_len > sizeof header) {
        memmove(&c->iov[1], &c->iov[0], c->n++ * sizeof c->iov[0]);
        c->iov[1].iov_base = (uint8_t *)c->iov[1].iov_base + sizeof header;
        c->iov[1].iov_len -= sizeof header;
        n++;
    }
    c->iov[0] = (struct iovec){&header, sizeof header};
    return writev(fd, c->iov, n) >= 0;
}

/* Sends up to `most` frames, for as long as they are plain and the host takes them; how many. */
static uint32_t ring_send(struct ring *r, int fd, uint64_t features, uint32_t most)
{
    struct chain c;
    uint32_t sent = 0;
    for (; sent < most && ring_pop(r, &c) == POPPED; sent++) {
        if (!send_frame(fd, features, &c)) {
            ring_unpop(r, c.id);
            break;
        }
        ring_fill(r, 0, c.id, 0);
        ring_publish(r, 1);
    }
    return sent;
}

/* ---- receiving ---- */

struct card {
    int fd;
    uint64_t offloads; /* features that the driver has not turned off again */
    uint64_t most;     /* bytes in a frame that is no segments */
    const uint8_t *mac;
    bool promisc, allmulti;
    uint8_t *tail; /* takes what is longer than the buffers: sizeof(struct net_header) + FRAME_MAX bytes */
};

struct buffer {
    uint16_t id;
    uint32_t descriptors, first, n; /* its elements */
    uint64_t size;
};

/* Chains that were popped and not yet used, the oldest first. */
struct buffers {
    uint32_t n, n_elements;
    uint64_t room;
    struct buffer buffer[BUFFERS_MAX];
    uint64_t gpa[SPANS_MAX];
    struct iovec iov[SPANS_MAX];
};

/* The frame that was read: `head`, then `direct` bytes in the buffers, then the card's tail. */
struct frame {
    uint64_t size; /* with its header; 0: there is none that Python must look at */
    uint64_t direct;
    uint8_t head[PEEK];
};

/* Why there were no more frames: there is none now; the driver must give more buffers first; Python must go on. */
enum received { IDLE, STARVED, ODD };

/* Pops until there is room for `size` bytes; true if there is. */
static bool gather(struct ring *r, struct buffers *b, uint64_t size, enum received *why)
{
    struct chain c;
    *why = ODD;
    while (b->room < size) {
        if (b->n == BUFFERS_MAX)
            return false;
        enum popped popped = ring_pop(r, &c);
        if (popped != POPPED) {
            *why = popped == NOTHING ? STARVED : ODD;
            return false;
        }
        if (c.n_readable || c.write_size < sizeof(struct net_header) || c.n > SPANS_MAX - b->n_elements) {
            ring_unpop(r, c.id);
            return false;
        }
        b->buffer[b->n++] = (struct buffer){c.id, c.descriptors, b->n_elements, c.n, c.write_size};
        memcpy(&b->gpa[b->n_elements], c.gpa, c.n * sizeof c.gpa[0]);
        memcpy(&b->iov[b->n_elements], c.iov, c.n * sizeof c.iov[0]);
        b->n_elements += c.n;
        b->room += c.write_size;
    }
    return true;
}

/* Copies `from` to where the buffers' byte `at` is; all of it fits. */
static void fill_buffers(const struct buffers *b, uint64_t at, const uint8_t *from, uint64_t size)
{
    for (const struct iovec *v = b->iov; size; v++) {
        if (at >= v->iov_len) {
            at -= v->iov_len;
            continue;
        }
        uint64_t part = v->iov_len - at < size ? v->iov_len - at : size;
        memcpy((uint8_t *)v->iov_base + at, from, part);
        from += part;
        size -= part;
        at = 0;
    }
}

static ssize_t read_frame(const struct card *card, const struct buffers *b, struct frame *f)
{
    struct iovec iov[SPANS_MAX + 2];
    int n = 0;
    uint64_t skip = PEEK;
    iov[n++] = (struct iovec){f->head, PEEK};
    for (uint32_t i = 0; i < b->n_elements; i++) {
        uint64_t length = b->iov[i].iov_len, off = skip < length ? skip : length;
        if (off < length)
            iov[n++] = (struct iovec){(uint8_t *)b->iov[i].iov_base + off, length - off};
        skip -= off;
    }
    iov[n++] = (struct iovec){card->tail, sizeof(struct net_header) + FRAME_MAX};
    f->direct = b->room - PEEK;
    return readv(card->fd, iov, n);
}

/* Whether the driver can handle the frame and certainly wants it. */
static bool is_wanted(const struct card *card, const struct frame *f)
{
    uint8_t flags = f->head[0], gso_type = f->head[1];
    const uint8_t *to = f->head + sizeof(struct net_header);
    uint64_t most = (gso_type & (uint8_t)~GSO_ECN) == GSO_NONE ? card->most : FRAME_MAX;
    if (f->size < sizeof(struct net_header) + ETH_SIZE || f->size > sizeof(struct net_header) + most ||
        (flags & HDR_NEEDS_CSUM && !(card->offloads & to_guest.csum)) ||
        !is_gso_allowed(gso_type, card->offloads, &to_guest))
        return false;
    if (card->promisc)
        return true;
    return *to & 1 ? card->allmulti || !memcmp(to, "\xff\xff\xff\xff\xff\xff", 6) : !memcmp(to, card->mac, 6);
}

/* Gives the driver the frame, for which there is room. */
static void deliver(struct ring *r, const struct card *card, struct buffers *b, struct frame *f)
{
    uint32_t n = 0;
    for (uint64_t left = f->size; left; n++) {
        uint64_t part = left < b->buffer[n].size ? left : b->buffer[n].size;
        ring_fill(r, n, b->buffer[n].id, part);
        left -= part;
    }
    memcpy(f->head + offsetof(struct net_header, num_buffers), &(uint16_t){(uint16_t)n}, 2);
    if (!(card->offloads & to_guest.csum))
        f->head[0] = 0; /* 5.1.6.4.1: nor may it say that the checksum is right */
    fill_buffers(b, 0, f->head, PEEK);
    if (f->size > PEEK + f->direct)
        fill_buffers(b, PEEK + f->direct, card->tail, f->size - PEEK - f->direct);
    ring_publish(r, n);
    uint32_t gone = n < b->n ? b->buffer[n].first : b->n_elements;
    for (uint32_t i = 0; i < n; i++)
        b->room -= b->buffer[i].size;
    b->n -= n;
    b->n_elements -= gone;
    memmove(b->buffer, &b->buffer[n], b->n * sizeof b->buffer[0]);
    memmove(b->gpa, &b->gpa[gone], b->n_elements * sizeof b->gpa[0]);
    memmove(b->iov, &b->iov[gone], b->n_elements * sizeof b->iov[0]);
    for (uint32_t i = 0; i < b->n; i++)
        b->buffer[i].first -= gone;
}

/* Receives up to `most` frames; how many were delivered.  `expected` is the size of the last one, then and now, for
 * which there should be room from the start.  A frame that is handed over is `f`, and in `b`; otherwise nothing is
 * out afterwards that was not before. */
static uint32_t ring_receive(struct ring *r, const struct card *card, uint32_t most, uint64_t *expected, struct frame *f,
                             struct buffers *b, enum received *why)
{
    uint32_t received = 0;
    b->n = b->n_elements = 0;
    b->room = f->size = 0;
    *why = IDLE;
    for (; received < most; received++) {
        gather(r, b, *expected > PEEK ? *expected : PEEK, why);
        if (b->room < PEEK)
            break;
        ssize_t size = read_frame(card, b, f);
        if (size <= 0) {
            *why = size < 0 && errno == EAGAIN ? IDLE : ODD;
            break;
        }
        f->size = (uint64_t)size;
        if (!is_wanted(card, f) || !gather(r, b, f->size, why)) {
            *why = IDLE;
            return received;
        }
        *expected = f->size;
        deliver(r, card, b, f);
        f->size = 0;
        *why = IDLE;
    }
    while (b->n)
        ring_unpop(r, b->buffer[--b->n].id);
    return received;
}

#endif
