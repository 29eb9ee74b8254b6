/* The device's end of its mailbox (kvmcore/_mailbox.h), as Python's type `End`: the flags, which need fences that
 * Python does not have, and the way from a request to the model and back, which is most of what an access costs.
 *
 * Left out: doubts about the supervisor's half of the page.  A device process trusts it; that an access is to a
 * register that there is, is checked as for one that came as a frame. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../kvmcore/_mailbox.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOK_EVERY 64u /* requests in a row before the descriptors and the deadline are looked at */
#define SPACES 9       /* of wire.Space */
enum { TAG_READ = 1, TAG_WRITE = 2 };

typedef struct {
    PyObject_HEAD
    struct mailbox *page;
    uint64_t sizes[SPACES];
    struct pollfd *fds; /* the eventfd that wakes us, the channels, the watched */
    uint32_t n_fds, n_watched;
    uint32_t done;
    PyObject *device, *clock;
    PyObject *read, *write; /* of the device, in `serve` */
    PyObject *writes;       /* of the device, or None where each write is to be seen */
    PyObject *watched; /* tuple of (descriptor, ports.Watched, whether it may ever want to read, to write) */
    PyObject *shadows; /* tuple of (offset, callable that gives the byte or None) */
    uint64_t asked;    /* a bit for each offset in space 0 that was ever read; nobody needs another's shadow */
    bool shown;        /* the page has the shadows */
    uint32_t unlooked; /* requests since the descriptors were looked at */
    uint64_t idle_ns;  /* when the last request was made or, if that is later, since when we wait */
    bool soon;         /* the last one came so soon that spinning for it was, or would have been, worth it */
} End;

static PyObject *name_read, *name_write, *name_deadline, *name_wants_read, *name_wants_write;

static PyObject *end_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"page", "bell", "sizes", "channels", "watched", "device",
                            "clock", "writes", "shadows", NULL};
    int page, bell;
    PyObject *sizes, *channels, *watched, *device, *clock, *writes, *shadows;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iiO!O!O!OOOO!", names, &page, &bell, &PyDict_Type, &sizes,
                                     &PyTuple_Type, &channels, &PyTuple_Type, &watched, &device, &clock, &writes,
                                     &PyTuple_Type, &shadows))
        return NULL;
    End *end = (End *)PyType_GenericAlloc(type, 0);
    if (!end)
        return NULL;
    for (int space = 0; space < SPACES; space++) {
        PyObject *key = PyLong_FromLong(space), *size = key ? PyDict_GetItemWithError(sizes, key) : NULL;
        Py_XDECREF(key);
        end->sizes[space] = size ? PyLong_AsUnsignedLongLong(size) : 0;
    }
    end->device = Py_NewRef(device);
    end->clock = Py_NewRef(clock);
    end->writes = Py_NewRef(writes);
    end->watched = Py_NewRef(watched);
    end->shadows = Py_NewRef(shadows);
    end->n_watched = (uint32_t)PyTuple_Size(watched);
    end->n_fds = 1 + (uint32_t)PyTuple_Size(channels) + end->n_watched;
    end->fds = PyMem_Calloc(end->n_fds, sizeof *end->fds);
    if (!end->fds && !PyErr_Occurred())
        PyErr_NoMemory();
    if (!PyErr_Occurred()) {
        end->fds[0] = (struct pollfd){.fd = bell, .events = POLLIN};
        for (uint32_t i = 1; i < end->n_fds - end->n_watched; i++) {
            long fd = PyLong_AsLong(PyTuple_GetItem(channels, i - 1));
            end->fds[i] = (struct pollfd){.fd = (int)fd, .events = POLLIN};
        }
        void *map = mmap(NULL, MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
        if (map != MAP_FAILED)
            end->page = map;
        else
            PyErr_SetFromErrno(PyExc_OSError);
    }
    if (!PyErr_Occurred())
        return (PyObject *)end;
    Py_DECREF(end);
    return NULL;
}

static void end_dealloc(End *end)
{
    PyTypeObject *type = Py_TYPE((PyObject *)end);
    if (end->page)
        munmap(end->page, MAILBOX_SIZE);
    PyMem_Free(end->fds);
    Py_XDECREF(end->device);
    Py_XDECREF(end->clock);
    Py_XDECREF(end->writes);
    Py_XDECREF(end->watched);
    Py_XDECREF(end->shadows);
    PyObject_Free(end);
    Py_DECREF(type);
}

static bool is_request(const End *end)
{
    return atomic_load(&end->page->posted) != end->done;
}

/* The next `n` requests are done. */
static void finish(End *end, uint32_t n)
{
    struct mailbox *page = end->page;
    atomic_store(&page->done, end->done += n);
    if (end->done - atomic_load(&page->wanted) < n)
        syscall(SYS_futex, &page->done, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Makes every shadow that somebody may need what the register reads now; false with an exception set. */
static bool show(End *end)
{
    Py_ssize_t n = end->asked ? PyTuple_Size(end->shadows) : 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *pair = PyTuple_GetItem(end->shadows, i);
        unsigned long offset = PyLong_AsUnsignedLong(PyTuple_GetItem(pair, 0)), byte;
        if (offset >= MAILBOX_SHADOWS || !(end->asked >> offset & 1))
            continue;
        PyObject *now = PyObject_CallNoArgs(PyTuple_GetItem(pair, 1));
        bool is_shown = now && now != Py_None;
        byte = is_shown ? PyLong_AsUnsignedLong(now) : 0;
        Py_XDECREF(now);
        if (!PyErr_Occurred() && byte > 0xff)
            PyErr_SetString(PyExc_OverflowError, "a shadow is one byte");
        if (PyErr_Occurred())
            return false;
        atomic_store(&end->page->shadow[offset], (uint16_t)(is_shown ? MAILBOX_SHADOWED | byte : 0));
    }
    end->shown = true;
    return true;
}

static void hide(End *end)
{
    for (uint64_t left = end->shown ? end->asked : 0; left; left &= left - 1)
        atomic_store(&end->page->shadow[__builtin_ctzll(left)], 0);
    end->shown = false;
}

/* What the model makes of the request; false with an exception set. */
static bool handle(const End *end, const struct mailbox_request *r, uint64_t *value)
{
    bool is_read = r->tag == TAG_READ;
    PyObject *space = PyLong_FromUnsignedLong(r->space), *offset = PyLong_FromUnsignedLongLong(r->offset);
    PyObject *size = PyLong_FromUnsignedLong(r->size), *data = PyLong_FromUnsignedLongLong(r->data);
    PyObject *result = NULL;
    if (space && offset && size && data)
        result = PyObject_CallFunctionObjArgs(is_read ? end->read : end->write, space, offset, size,
                                              is_read ? NULL : data, NULL);
    Py_XDECREF(space);
    Py_XDECREF(offset);
    Py_XDECREF(size);
    Py_XDECREF(data);
    if (!result)
        return false;
    *value = is_read ? PyLong_AsUnsignedLongLong(result) : 0;
    if (!PyErr_Occurred() && r->size < 8 && *value >> 8 * r->size)
        PyErr_Format(PyExc_OverflowError, "a read of %d bytes gave %S", r->size, result);
    Py_DECREF(result);
    return !PyErr_Occurred();
}

/* How many requests, from the next one on, write a byte each to the same place; 1 if it is none such. */
static uint32_t run_length(const End *end)
{
    const struct mailbox_request *ring = end->page->ring, *r = &ring[end->done % MAILBOX_RING], *next;
    uint32_t n = 1, most = atomic_load(&end->page->posted) - end->done;
    if (end->writes != Py_None && r->tag == TAG_WRITE && r->size == 1)
        for (; n < most && n < MAILBOX_RING; n++) {
            next = &ring[(end->done + n) % MAILBOX_RING];
            if (next->tag != TAG_WRITE || next->size != 1 || next->space != r->space || next->offset != r->offset)
                break;
        }
    return n;
}

/* Has the model take `n` such writes; false with an exception set. */
static bool handle_run(const End *end, uint32_t n)
{
    const struct mailbox_request *r = &end->page->ring[end->done % MAILBOX_RING];
    char data[MAILBOX_RING];
    for (uint32_t i = 0; i < n; i++)
        data[i] = (char)end->page->ring[(end->done + i) % MAILBOX_RING].data;
    PyObject *result = PyObject_CallFunction(end->writes, "IKy#", r->space, (unsigned long long)r->offset, data,
                                             (Py_ssize_t)n);
    Py_XDECREF(result);
    return result;
}

/* Has the model answer what there is, up to LOOK_EVERY; false with an exception set, or with none if a request is
 * for no register. */
static bool answer(End *end)
{
    while (end->unlooked < LOOK_EVERY && is_request(end)) {
        struct mailbox_request r = end->page->ring[end->done % MAILBOX_RING];
        uint64_t limit = r.space < SPACES ? end->sizes[r.space] : 0, value;
        bool is_size = r.size == 1 || r.size == 2 || r.size == 4 || r.size == 8;
        if ((r.tag != TAG_READ && r.tag != TAG_WRITE) || !is_size || r.size > limit || r.offset > limit - r.size)
            return false;
        end->soon = (int64_t)(r.at_ns - end->idle_ns) < MAILBOX_SPIN_NS;
        end->idle_ns = r.at_ns;
        uint32_t n = run_length(end);
        if (!(n > 1 ? handle_run(end, n) : handle(end, &r, &value)))
            return false;
        if (r.tag == TAG_READ && r.space == 0 && r.size == 1 && r.offset < MAILBOX_SHADOWS)
            end->asked |= 1ull << r.offset;
        if (end->shown && atomic_load(&end->page->posted) == end->done + n && !show(end))
            return false;
        if (r.tag == TAG_READ) /* the last one's value stays while posted writes follow it */
            atomic_store_explicit(&end->page->value, value, memory_order_relaxed);
        finish(end, n);
        end->unlooked += n;
    }
    return true;
}

/* Whether `w` wants what `name` says; -1 with an exception set. */
static int wants(PyObject *w, PyObject *name)
{
    PyObject *is = PyObject_GetAttr(w, name);
    int truth = is ? PyObject_IsTrue(is) : -1;
    Py_XDECREF(is);
    return truth;
}

/* Asks the watched what to wait for; false with an exception set. */
static bool ask(End *end)
{
    struct pollfd *p = end->fds + end->n_fds - end->n_watched;
    for (uint32_t i = 0; i < end->n_watched; i++, p++) {
        PyObject *entry = PyTuple_GetItem(end->watched, i), *w = PyTuple_GetItem(entry, 1);
        int reads = PyTuple_GetItem(entry, 2) == Py_True ? wants(w, name_wants_read) : 0;
        int writes = PyTuple_GetItem(entry, 3) == Py_True ? wants(w, name_wants_write) : 0;
        if (reads < 0 || writes < 0)
            return false;
        p->events = (short)((reads ? POLLIN : 0) | (writes ? POLLOUT : 0));
        /* A hang-up is reported whether wanted or not. */
        p->fd = p->events ? (int)PyLong_AsLong(PyTuple_GetItem(entry, 0)) : -1;
    }
    return true;
}

/* How long it is until the device's deadline, -1 if it has none; false with an exception set. */
static bool ask_deadline(const End *end, int64_t *timeout_ns)
{
    PyObject *due = PyObject_GetAttr(end->device, name_deadline), *now = NULL;
    *timeout_ns = -1;
    if (due && due != Py_None && (now = PyObject_CallNoArgs(end->clock))) {
        int64_t left_ns = PyLong_AsLongLong(due) - PyLong_AsLongLong(now);
        *timeout_ns = left_ns > 0 ? left_ns : 0;
    }
    Py_XDECREF(due);
    Py_XDECREF(now);
    return !PyErr_Occurred();
}

/* Spins a little for a request, where the supervisor can make one meanwhile. */
static bool comes_soon(End *end, uint64_t longest_ns)
{
    uint32_t cpu = (uint32_t)sched_getcpu();
    atomic_store(&end->page->device_cpu, cpu);
    end->idle_ns = now_ns();
    if (!end->soon || atomic_load(&end->page->vcpu_cpu) == cpu)
        return false;
    uint64_t until_ns = end->idle_ns + (longest_ns < MAILBOX_SPIN_NS ? longest_ns : MAILBOX_SPIN_NS);
    do {
        if (is_request(end))
            return true;
        __builtin_ia32_pause();
    } while (now_ns() < until_ns);
    return false;
}

/* How many of the descriptors are ready, or -1 with errno. */
static int wait_for_any(End *end, int64_t timeout_ns)
{
    struct timespec timeout = {0};
    bool busy = is_request(end) || comes_soon(end, (uint64_t)timeout_ns);
    if (busy && end->unlooked < LOOK_EVERY)
        return 0;
    end->unlooked = 0;
    if (!busy) {
        atomic_store(&end->page->asleep, 1);
        busy = is_request(end);
    }
    if (!busy && timeout_ns > 0)
        timeout = (struct timespec){timeout_ns / 1000000000, timeout_ns % 1000000000};
    int ready = ppoll(end->fds, end->n_fds, busy || timeout_ns >= 0 ? &timeout : NULL, NULL);
    atomic_store(&end->page->asleep, 0);
    atomic_store(&end->page->device_cpu, (uint32_t)sched_getcpu());
    if (ready > 0 && end->fds[0].revents) {
        uint64_t count;
        ready--;
        if (read(end->fds[0].fd, &count, sizeof count) < 0 && errno != EAGAIN)
            return -1;
    }
    return ready;
}

/* The same without the GIL; -1 with an exception set. */
static int wait_unlocked(End *end, int64_t timeout_ns)
{
    int ready;
    Py_BEGIN_ALLOW_THREADS
    ready = wait_for_any(end, timeout_ns);
    Py_END_ALLOW_THREADS
    if (ready >= 0)
        return ready;
    if (errno == EINTR)
        return PyErr_CheckSignals();
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static PyObject *end_wait(End *end, PyObject *timeout)
{
    int64_t timeout_ns = timeout == Py_None ? -1 : PyLong_AsLongLong(timeout);
    if ((timeout_ns == -1 && PyErr_Occurred()) || !ask(end))
        return NULL;
    int ready = wait_unlocked(end, timeout_ns);
    return ready < 0 ? NULL : PyBool_FromLong(ready);
}

/* None: a request is for no register. */
static PyObject *serve(End *end)
{
    int ready;
    int64_t timeout_ns;
    for (uint32_t i = 0; i < end->n_fds; i++)
        end->fds[i].revents = 0;
    do {
        if (!answer(end))
            return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
        if ((!end->shown && !is_request(end) && !show(end)) || !ask(end) || !ask_deadline(end, &timeout_ns))
            return NULL;
        ready = wait_unlocked(end, timeout_ns);
        if (ready < 0)
            return NULL;
    } while (!ready && timeout_ns && (timeout_ns < 0 || is_request(end)));
    bool busy = is_request(end);
    if (!answer(end))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    hide(end);
    return PyBool_FromLong(busy);
}

static PyObject *end_serve(End *end, PyObject *none)
{
    (void)none;
    end->read = PyObject_GetAttr(end->device, name_read);
    end->write = end->read ? PyObject_GetAttr(end->device, name_write) : NULL;
    PyObject *busy = end->write ? serve(end) : NULL;
    Py_CLEAR(end->read);
    Py_CLEAR(end->write);
    return busy;
}

/* What a descriptor was wanted for and is ready for. */
static short found(const struct pollfd *p)
{
    bool failed = p->revents & (POLLHUP | POLLERR | POLLNVAL); /* found out by trying, whether to read or to write */
    return failed ? p->events : p->events & p->revents;
}

static PyObject *end_is_readable(End *end, PyObject *channel)
{
    unsigned long n = PyLong_AsUnsignedLong(channel);
    if (PyErr_Occurred())
        return NULL;
    if (n >= end->n_fds - 1 - end->n_watched) {
        PyErr_SetString(PyExc_IndexError, "channel");
        return NULL;
    }
    return PyBool_FromLong(found(&end->fds[1 + n]));
}

static PyObject *end_ready(End *end, PyObject *none)
{
    (void)none;
    PyObject *all = PyList_New(0);
    const struct pollfd *p = end->fds + end->n_fds - end->n_watched;
    for (uint32_t i = 0; all && i < end->n_watched; i++, p++) {
        short events = found(p);
        PyObject *one = events ? Py_BuildValue("(ONN)", PyTuple_GetItem(PyTuple_GetItem(end->watched, i), 1),
                                               PyBool_FromLong(events & POLLIN), PyBool_FromLong(events & POLLOUT))
                               : NULL;
        if (events && (!one || PyList_Append(all, one)))
            Py_CLEAR(all);
        Py_XDECREF(one);
    }
    return all;
}

static PyMethodDef end_methods[] = {
    {"serve", (PyCFunction)end_serve, METH_NOARGS, NULL},
    {"wait", (PyCFunction)end_wait, METH_O, NULL},
    {"is_readable", (PyCFunction)end_is_readable, METH_O, NULL},
    {"ready", (PyCFunction)end_ready, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot end_slots[] = {
    {Py_tp_new, end_new},
    {Py_tp_dealloc, end_dealloc},
    {Py_tp_methods, end_methods},
    {0},
};

static PyType_Spec end_spec = {"devproc._mailbox.End", sizeof(End), 0, Py_TPFLAGS_DEFAULT, end_slots};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "devproc._mailbox", .m_size = -1};

PyMODINIT_FUNC PyInit__mailbox(void)
{
    name_read = PyUnicode_InternFromString("read");
    name_write = PyUnicode_InternFromString("write");
    name_deadline = PyUnicode_InternFromString("deadline_ns");
    name_wants_read = PyUnicode_InternFromString("wants_read");
    name_wants_write = PyUnicode_InternFromString("wants_write");
    if (PyErr_Occurred())
        return NULL;
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&end_spec);
    if (made && type && !PyModule_AddObjectRef(made, "End", type)) {
        Py_DECREF(type);
        return made;
    }
    Py_XDECREF(made);
    Py_XDECREF(type);
    return NULL;
}
