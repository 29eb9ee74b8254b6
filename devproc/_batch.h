/* Chains that are served without Python, many in a row: plain reads and writes of a disk (virtio 1.2, 5.2.6).
 *
 * The first that is anything else, or goes wrong, stays in the ring for the model, where all of that is decided; to
 * serve one from the beginning a second time does no harm. */
#ifndef DEVPROC_BATCH_H
#define DEVPROC_BATCH_H

#include <unistd.h>

#include "_ring.h"

#define SECTOR 512u
enum { BLK_IN = 0, BLK_OUT = 1 };
enum { BLK_S_OK = 0 };

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct disk {
    int fd;
    uint64_t size;
    bool writable;
};

struct turn {
    uint64_t left, least; /* bytes; what a request counts for at least */
    uint32_t reads, writes;
};

/* Header and status are a descriptor each, and the data are whole sectors of the disk, at most `most` bytes. */
static bool is_plain(const struct disk *d, const struct chain *c, uint64_t most, struct blk_header *header, size_t *size)
{
    if (c->n < 3 || !c->n_readable || c->iov[0].iov_len != sizeof *header || c->iov[c->n - 1].iov_len != 1)
        return false;
    copy_once(header, c->iov[0].iov_base, sizeof *header);
    bool is_write = header->type == BLK_OUT;
    if (is_write ? !d->writable || c->n_readable != c->n - 1 : header->type != BLK_IN || c->n_readable != 1)
        return false;
    *size = is_write ? c->read_size - sizeof *header : c->write_size - 1;
    uint64_t sectors = *size / SECTOR, end = d->size / SECTOR;
    return *size % SECTOR == 0 && *size <= most && header->sector <= end && sectors <= end - header->sector;
}

/* Whether all of it was done; how much that is. */
static bool transfer(const struct disk *d, struct chain *c, struct turn *t, size_t *size)
{
    struct blk_header header;
    if (!is_plain(d, c, t->left, &header, size))
        return false;
    off_t offset = (off_t)(header.sector * SECTOR);
    int n = (int)c->n - 2;
    ssize_t done;
    if (header.type == BLK_IN) {
        done = preadv2(d->fd, &c->iov[1], n, offset, 0);
    } else {
        /* Writing past the end would make a file longer that someone has made shorter. */
        if (lseek(d->fd, 0, SEEK_END) < offset + (off_t)*size)
            return false;
        done = pwritev2(d->fd, &c->iov[1], n, offset, 0);
    }
    if (done != (ssize_t)*size)
        return false;
    *(volatile uint8_t *)c->iov[c->n - 1].iov_base = BLK_S_OK;
    header.type == BLK_IN ? t->reads++ : t->writes++;
    return true;
}

/* Serves requests for as long as they are plain and something of the turn is left. */
static void ring_transfer(struct ring *r, const struct disk *d, struct turn *t)
{
    struct chain c;
    size_t size;
    while (t->left && ring_pop(r, &c) == POPPED) {
        if (!transfer(d, &c, t, &size)) {
            ring_unpop(r, c.id);
            break;
        }
        ring_fill(r, 0, c.id, c.write_size);
        ring_publish(r, 1);
        uint64_t counts = size > t->least ? size : t->least;
        t->left -= counts < t->left ? counts : t->left;
    }
}

#endif
