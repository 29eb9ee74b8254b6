/* The device's end of a split virtqueue (_ring.h) as Python's type `Ring`, a `chain.Queue`.  It is in C because the
 * walk of Python's split.SplitQueue, its reference, is most of what a request costs a device process; without Python
 * it is fuzzed as a whole (integration/fuzz/ring.c).  What needs no Python at all is served at once (_batch.h, _frames.h).
 *
 * Left out: doubts about the arguments of `Ring`, which split.py has checked. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_batch.h"
#include "_frames.h"

enum { CHAIN_ID = 0, CHAIN_WRITE_SIZE = 4, CHAIN_FIELDS = 6 }; /* of chain.Chain */

typedef struct {
    PyObject_HEAD
    struct ring ring;
    struct region *regions;
    Py_buffer *buffers; /* where the regions are */
    PyObject *chain, *span, *chain_error; /* classes of chain.py */
    uint64_t frame_size; /* of the last frame that was received */
} Ring;

static bool add_regions(Ring *self, PyObject *regions)
{
    Py_ssize_t n = PyTuple_Size(regions);
    self->regions = PyMem_Calloc((size_t)n, sizeof *self->regions);
    self->buffers = PyMem_Calloc((size_t)n, sizeof *self->buffers);
    self->ring.regions = self->regions;
    if (!self->regions || !self->buffers) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        unsigned long long gpa;
        PyObject *memory;
        Py_buffer *buffer = &self->buffers[i];
        if (!PyArg_ParseTuple(PyTuple_GetItem(regions, i), "KO", &gpa, &memory) ||
            PyObject_GetBuffer(memory, buffer, PyBUF_WRITABLE))
            return false;
        self->regions[i] = (struct region){gpa, (uint64_t)buffer->len, buffer->buf};
        self->ring.n_regions++;
    }
    return true;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"regions", "areas", "size", "indirect", "event_idx", "position", "classes", NULL};
    PyObject *regions, *chain, *span, *chain_error;
    unsigned long long low[3], high[3];
    int indirect, event_idx;
    unsigned size;
    unsigned short position;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!((KK)(KK)(KK))IppH(OOO)", names, &PyTuple_Type, &regions,
                                     &low[0], &high[0], &low[1], &high[1], &low[2], &high[2], &size, &indirect,
                                     &event_idx, &position, &chain, &span, &chain_error))
        return NULL;
    Ring *self = (Ring *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    struct ring *r = &self->ring;
    uint8_t **hosts[3] = {&r->desc, &r->avail, &r->used};
    self->chain = Py_NewRef(chain);
    self->span = Py_NewRef(span);
    self->chain_error = Py_NewRef(chain_error);
    r->size = size;
    r->indirect = indirect;
    r->event_idx = event_idx;
    r->next_avail = r->seen = r->next_used = position;
    r->out = PyMem_Malloc(size * sizeof *r->out);
    if (!r->out)
        PyErr_NoMemory();
    else if (add_regions(self, regions)) {
        memset(r->out, 0xff, size * sizeof *r->out);
        for (int i = 0; i < 3; i++) {
            r->low[i] = low[i];
            r->high[i] = high[i];
            *hosts[i] = ring_host(r, low[i], high[i] - low[i]);
            if (!*hosts[i])
                PyErr_SetString(PyExc_AssertionError, "an area that is not RAM");
        }
    }
    if (!PyErr_Occurred())
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void ring_dealloc(Ring *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (uint32_t i = 0; i < self->ring.n_regions; i++)
        PyBuffer_Release(&self->buffers[i]);
    PyMem_Free(self->buffers);
    PyMem_Free(self->regions);
    PyMem_Free(self->ring.out);
    Py_XDECREF(self->chain);
    Py_XDECREF(self->span);
    Py_XDECREF(self->chain_error);
    PyObject_Free(self);
    Py_DECREF(type);
}

/* Makes `value`, which may be NULL with an exception set, item `i` of a new tuple. */
static bool put(PyObject *tuple, Py_ssize_t i, PyObject *value)
{
    return value && !PyTuple_SetItem(tuple, i, value);
}

/* A named tuple to be filled by `put`, at a tenth of the cost of calling its class. */
static PyObject *new_tuple(PyObject *class, Py_ssize_t n)
{
    return PyType_GenericAlloc((PyTypeObject *)class, n);
}

static PyObject *spans(Ring *self, const uint64_t *gpa, const struct iovec *iov, uint32_t n)
{
    PyObject *all = PyTuple_New(n);
    for (uint32_t i = 0; all && i < n; i++) {
        PyObject *span = new_tuple(self->span, 2);
        bool done = span && put(span, 0, PyLong_FromUnsignedLongLong(gpa[i])) &&
                    put(span, 1, PyLong_FromSize_t(iov[i].iov_len));
        if (!done || PyTuple_SetItem(all, i, Py_NewRef(span)))
            Py_CLEAR(all);
        Py_XDECREF(span);
    }
    return all;
}

/* The `chain.Chain` of a buffer, `n_readable` and `n_writable` elements from `gpa` and `iov` on. */
static PyObject *chain_of(Ring *self, const struct buffer *b, const uint64_t *gpa, const struct iovec *iov,
                          uint32_t n_readable, uint64_t read_size)
{
    uint32_t n_writable = b->n - n_readable;
    PyObject *chain = new_tuple(self->chain, CHAIN_FIELDS);
    if (chain && put(chain, CHAIN_ID, PyLong_FromLong(b->id)) && put(chain, 1, spans(self, gpa, iov, n_readable)) &&
        put(chain, 2, spans(self, gpa + n_readable, iov + n_readable, n_writable)) &&
        put(chain, 3, PyLong_FromUnsignedLongLong(read_size)) &&
        put(chain, CHAIN_WRITE_SIZE, PyLong_FromUnsignedLongLong(b->size)) &&
        put(chain, 5, PyLong_FromUnsignedLong(b->descriptors)))
        return chain;
    Py_XDECREF(chain);
    return NULL;
}

static PyObject *ring_pop_chain(Ring *self, PyObject *none)
{
    (void)none;
    struct chain c;
    switch (ring_pop(&self->ring, &c)) {
    case NOTHING:
        Py_RETURN_NONE;
    case BROKEN:
        PyErr_SetString(self->chain_error, self->ring.why);
        return NULL;
    case POPPED:
        break;
    }
    struct buffer b = {c.id, c.descriptors, 0, c.n, c.write_size};
    return chain_of(self, &b, c.gpa, c.iov, c.n_readable, c.read_size);
}

/* The number that is a field of a chain; -1 with an exception set. */
static long long field(PyObject *chain, Py_ssize_t which)
{
    PyObject *value = PyTuple_GetItem(chain, which);
    return value ? PyLong_AsLongLong(value) : -1;
}

static PyObject *ring_unpop_chain(Ring *self, PyObject *chain)
{
    long long id = field(chain, CHAIN_ID);
    if (PyErr_Occurred())
        return NULL;
    if (!ring_unpop(&self->ring, (uint32_t)id))
        return PyErr_Format(PyExc_AssertionError, "chain %lld was not popped last", id);
    Py_RETURN_NONE;
}

/* Fills in the used element of `chain`; false with an exception set. */
static bool fill(Ring *self, uint32_t ahead, PyObject *chain, PyObject *written)
{
    long long id = field(chain, CHAIN_ID), room = field(chain, CHAIN_WRITE_SIZE), size = PyLong_AsLongLong(written);
    if (PyErr_Occurred())
        return false;
    if (size < 0 || size > room)
        PyErr_Format(PyExc_AssertionError, "%lld bytes into a chain of %lld", size, room);
    else if (!ring_is_out(&self->ring, (uint32_t)id))
        PyErr_Format(PyExc_AssertionError, "chain %lld is not out", id);
    else
        ring_fill(&self->ring, ahead, (uint32_t)id, (uint64_t)size);
    return !PyErr_Occurred();
}

static PyObject *ring_push(Ring *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2) {
        PyErr_SetString(PyExc_TypeError, "push(chain, written)");
        return NULL;
    }
    if (!fill(self, 0, args[0], args[1]))
        return NULL;
    ring_publish(&self->ring, 1);
    Py_RETURN_NONE;
}

static PyObject *ring_push_together(Ring *self, PyObject *used)
{
    Py_ssize_t n = PySequence_Size(used);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *pair = PySequence_GetItem(used, i), *chain, *written;
        bool done = pair && PyArg_ParseTuple(pair, "OO", &chain, &written) && fill(self, (uint32_t)i, chain, written);
        Py_XDECREF(pair);
        if (!done)
            return NULL;
    }
    if (n < 0)
        return NULL;
    ring_publish(&self->ring, (uint32_t)n);
    Py_RETURN_NONE;
}

static PyObject *ring_wants(Ring *self, PyObject *none)
{
    (void)none;
    return PyBool_FromLong(ring_wants_interrupt(&self->ring));
}

static PyObject *ring_transfer_plain(Ring *self, PyObject *args)
{
    struct disk disk;
    struct turn turn = {0};
    unsigned long long size, left, least;
    int writable;
    if (!PyArg_ParseTuple(args, "iKpKK", &disk.fd, &size, &writable, &left, &least))
        return NULL;
    disk.size = size;
    disk.writable = writable;
    turn.left = left;
    turn.least = least;
    Py_BEGIN_ALLOW_THREADS
    ring_transfer(&self->ring, &disk, &turn);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("KII", (unsigned long long)turn.left, turn.reads, turn.writes);
}

static PyObject *ring_send_plain(Ring *self, PyObject *args)
{
    int fd;
    unsigned most;
    unsigned long long features;
    if (!PyArg_ParseTuple(args, "iKI", &fd, &features, &most))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    most = ring_send(&self->ring, fd, features, most);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(most);
}

/* The chains that a frame which is handed over is in. */
static PyObject *chains_of(Ring *self, const struct buffers *b)
{
    PyObject *all = PyTuple_New(b->n);
    for (uint32_t i = 0; all && i < b->n; i++) {
        const struct buffer *each = &b->buffer[i];
        if (!put(all, i, chain_of(self, each, &b->gpa[each->first], &b->iov[each->first], 0, 0)))
            Py_CLEAR(all);
    }
    return all;
}

static PyObject *ring_receive_plain(Ring *self, PyObject *args)
{
    struct card card;
    struct frame frame;
    struct buffers buffers;
    enum received why;
    unsigned most, received = 0;
    unsigned long long offloads, size_max;
    int promisc, allmulti;
    Py_buffer head, tail, mac;
    PyObject *chains = NULL;
    if (!PyArg_ParseTuple(args, "iw*w*y*ppKKI", &card.fd, &head, &tail, &mac, &promisc, &allmulti, &offloads,
                          &size_max, &most))
        return NULL;
    if (head.len == PEEK && tail.len == (Py_ssize_t)(sizeof(struct net_header) + FRAME_MAX) && mac.len == 6) {
        card.offloads = offloads;
        card.most = size_max;
        card.mac = mac.buf;
        card.promisc = promisc;
        card.allmulti = allmulti;
        card.tail = tail.buf;
        Py_BEGIN_ALLOW_THREADS
        received = ring_receive(&self->ring, &card, most, &self->frame_size, &frame, &buffers, &why);
        Py_END_ALLOW_THREADS
        if (frame.size)
            memcpy(head.buf, frame.head, PEEK);
        chains = chains_of(self, &buffers);
    } else {
        PyErr_SetString(PyExc_AssertionError, "head, tail or mac of a wrong size");
    }
    PyBuffer_Release(&head);
    PyBuffer_Release(&tail);
    PyBuffer_Release(&mac);
    return chains ? Py_BuildValue("INNKKN", received, PyBool_FromLong(why == STARVED), PyBool_FromLong(why == ODD),
                                  (unsigned long long)frame.size, (unsigned long long)frame.direct, chains)
                  : NULL;
}

static PyObject *ring_size(Ring *self, void *none)
{
    (void)none;
    return PyLong_FromUnsignedLong(self->ring.size);
}

static PyObject *ring_position(Ring *self, void *none)
{
    (void)none;
    if (self->ring.n_out)
        return PyErr_Format(PyExc_AssertionError, "%u chains are out", self->ring.n_out);
    return PyLong_FromLong(self->ring.next_avail);
}

static PyMethodDef ring_methods[] = {
    {"pop", (PyCFunction)ring_pop_chain, METH_NOARGS, NULL},
    {"unpop", (PyCFunction)ring_unpop_chain, METH_O, NULL},
    {"push", (PyCFunction)(void (*)(void))ring_push, METH_FASTCALL, NULL},
    {"push_together", (PyCFunction)ring_push_together, METH_O, NULL},
    {"wants_interrupt", (PyCFunction)ring_wants, METH_NOARGS, NULL},
    {"transfer", (PyCFunction)ring_transfer_plain, METH_VARARGS, NULL},
    {"send", (PyCFunction)ring_send_plain, METH_VARARGS, NULL},
    {"receive", (PyCFunction)ring_receive_plain, METH_VARARGS, NULL},
    {0},
};

static PyGetSetDef ring_fields[] = {
    {"size", (getter)ring_size, NULL, NULL, NULL},
    {"position", (getter)ring_position, NULL, NULL, NULL},
    {0},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_fields},
    {0},
};

static PyType_Spec ring_spec = {"devproc._ring.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT, ring_slots};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "devproc._ring", .m_size = -1};

PyMODINIT_FUNC PyInit__ring(void)
{
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&ring_spec);
    if (made && type && !PyModule_AddObjectRef(made, "Ring", type)) {
        Py_DECREF(type);
        return made;
    }
    Py_XDECREF(made);
    Py_XDECREF(type);
    return NULL;
}
