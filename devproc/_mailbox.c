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

#define LOOK_EVERY 64u /* waits that may end with a request before the descriptors are looked at */
#define SPACES 9       /* of wire.Space */
enum { TAG_READ = 1, TAG_WRITE = 2 };

typedef struct {
    PyObject_HEAD
    struct mailbox *page;
    uint64_t sizes[SPACES];
    struct pollfd *fds; /* the first is the eventfd that wakes us */
    uint32_t n_fds;
    uint32_t done;
    PyObject *shadows; /* tuple of (offset, callable that gives the byte or None) */
    bool shown;        /* the page has the shadows */
    uint32_t unlooked; /* waits that have not looked at the descriptors */
    uint64_t idle_ns;  /* when the last request was made or, if that is later, since when we wait */
    bool soon;         /* the last one came so soon that spinning for it was, or would have been, worth it */
} End;

static PyObject *end_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"page", "bell", "sizes", "slots", "shadows", NULL};
    int page, bell, slots;
    PyObject *sizes, *shadows;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iiO!iO!", names, &page, &bell, &PyDict_Type, &sizes, &slots,
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
    end->shadows = Py_NewRef(shadows);
    end->n_fds = 1 + (uint32_t)slots;
    end->fds = PyMem_Calloc(end->n_fds, sizeof *end->fds);
    if (!end->fds && !PyErr_Occurred())
        PyErr_NoMemory();
    if (!PyErr_Occurred()) {
        for (uint32_t i = 0; i < end->n_fds; i++)
            end->fds[i] = (struct pollfd){.fd = i ? -1 : bell, .events = POLLIN};
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
    Py_XDECREF(end->shadows);
    PyObject_Free(end);
    Py_DECREF(type);
}

static bool is_request(const End *end)
{
    return atomic_load(&end->page->posted) != end->done;
}

static void finish(End *end)
{
    struct mailbox *page = end->page;
    atomic_store(&page->done, ++end->done);
    if (atomic_load(&page->wanted) == end->done)
        syscall(SYS_futex, &page->done, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Makes every shadow what the register reads now; false with an exception set. */
static bool show(End *end)
{
    Py_ssize_t n = PyTuple_Size(end->shadows);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *pair = PyTuple_GetItem(end->shadows, i), *now;
        unsigned long offset = PyLong_AsUnsignedLong(PyTuple_GetItem(pair, 0)), byte = 0;
        now = PyObject_CallNoArgs(PyTuple_GetItem(pair, 1));
        if (now && now != Py_None)
            byte = PyLong_AsUnsignedLong(now);
        bool is_shown = now && now != Py_None;
        Py_XDECREF(now);
        if (!PyErr_Occurred() && (offset >= MAILBOX_SHADOWS || byte > 0xff))
            PyErr_SetString(PyExc_OverflowError, "a shadow is one byte");
        if (PyErr_Occurred())
            return false;
        atomic_store(&end->page->shadow[offset], (uint16_t)(is_shown ? MAILBOX_SHADOWED | byte : 0));
    }
    end->shown = true;
    return true;
}

static PyObject *end_hide(End *end, PyObject *none)
{
    (void)none;
    if (end->shown)
        for (uint32_t i = 0; i < MAILBOX_SHADOWS; i++)
            atomic_store(&end->page->shadow[i], 0);
    end->shown = false;
    Py_RETURN_NONE;
}

/* What the model makes of the request; false with an exception set. */
static bool handle(const struct mailbox_request *r, PyObject *read, PyObject *write, uint64_t *value)
{
    bool is_read = r->tag == TAG_READ;
    PyObject *space = PyLong_FromUnsignedLong(r->space), *offset = PyLong_FromUnsignedLongLong(r->offset);
    PyObject *size = PyLong_FromUnsignedLong(r->size), *data = PyLong_FromUnsignedLongLong(r->data);
    PyObject *result = NULL;
    if (space && offset && size && data)
        result = PyObject_CallFunctionObjArgs(is_read ? read : write, space, offset, size, is_read ? NULL : data, NULL);
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

static PyObject *end_serve(End *end, PyObject *const *args, Py_ssize_t n)
{
    long most = n == 3 ? PyLong_AsLong(args[2]) : -1, served;
    if (most < 0) {
        PyErr_SetString(PyExc_TypeError, "serve(read, write, most)");
        return NULL;
    }
    for (served = 0; served < most && is_request(end); served++) {
        struct mailbox_request r = end->page->ring[end->done % MAILBOX_RING];
        uint64_t limit = r.space < SPACES ? end->sizes[r.space] : 0, value;
        bool is_size = r.size == 1 || r.size == 2 || r.size == 4 || r.size == 8;
        if ((r.tag != TAG_READ && r.tag != TAG_WRITE) || !is_size || r.size > limit || r.offset > limit - r.size)
            Py_RETURN_NONE;
        end->soon = (int64_t)(r.at_ns - end->idle_ns) < MAILBOX_SPIN_NS;
        end->idle_ns = r.at_ns;
        if (!handle(&r, args[0], args[1], &value))
            return NULL;
        if (atomic_load(&end->page->posted) == end->done + 1 && !show(end))
            return NULL;
        if (r.tag == TAG_READ) /* the last one's value stays while posted writes follow it */
            atomic_store_explicit(&end->page->value, value, memory_order_relaxed);
        finish(end);
    }
    return PyLong_FromLong(served);
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
    if (busy && ++end->unlooked < LOOK_EVERY)
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

static PyObject *end_wait(End *end, PyObject *timeout)
{
    int64_t timeout_ns = timeout == Py_None ? -1 : PyLong_AsLongLong(timeout);
    if (timeout_ns == -1 && PyErr_Occurred())
        return NULL;
    int ready;
    if (!end->shown && !show(end))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    ready = wait_for_any(end, timeout_ns);
    Py_END_ALLOW_THREADS
    if (ready < 0 && errno != EINTR)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(ready > 0);
}

static PyObject *end_watch(End *end, PyObject *args)
{
    unsigned slot;
    int fd;
    short events;
    if (!PyArg_ParseTuple(args, "Iih", &slot, &fd, &events))
        return NULL;
    if (slot >= end->n_fds - 1) {
        PyErr_SetString(PyExc_IndexError, "slot");
        return NULL;
    }
    end->fds[1 + slot] = (struct pollfd){.fd = events ? fd : -1, .events = events};
    Py_RETURN_NONE;
}

static PyObject *end_ready(End *end, PyObject *slot)
{
    unsigned long n = PyLong_AsUnsignedLong(slot);
    if (PyErr_Occurred())
        return NULL;
    if (n >= end->n_fds - 1) {
        PyErr_SetString(PyExc_IndexError, "slot");
        return NULL;
    }
    return PyLong_FromLong(end->fds[1 + n].revents);
}

static PyMethodDef end_methods[] = {
    {"serve", (PyCFunction)(void (*)(void))end_serve, METH_FASTCALL, NULL},
    {"hide", (PyCFunction)end_hide, METH_NOARGS, NULL},
    {"wait", (PyCFunction)end_wait, METH_O, NULL},
    {"watch", (PyCFunction)end_watch, METH_VARARGS, NULL},
    {"ready", (PyCFunction)end_ready, METH_O, NULL},
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
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&end_spec);
    if (made && type && !PyModule_AddObjectRef(made, "End", type)) {
        Py_DECREF(type);
        return made;
    }
    Py_XDECREF(made);
    Py_XDECREF(type);
    return NULL;
}
