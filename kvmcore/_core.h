/* The interface of _core.c.  _build.py hands this file to cffi, which reads declarations and simple
 * #defines only; the C compiler checks _core.c against it. */
#include <stdint.h>

#define CORE_DEVICES_MAX 256

/* What a range of the io or mmio bus does. */
#define ROUTE_DEVICE 0 /* a device process: `index`, `space`, `base_offset` */
#define ROUTE_FLOAT 1  /* like a hole: reads are all ones, writes vanish */
#define ROUTE_PYTHON 2 /* core_vcpu_run returns EXIT_IO */
/* PCI configuration space: on the io bus CONFIG_ADDRESS and CONFIG_DATA, on the mmio bus ECAM.  A read goes to
 * the function's device, in `space`; a write returns EXIT_IO; a function that does not exist floats. */
#define ROUTE_PCI_CONFIG 3
#define ROUTE_CHECKED 4 /* a read goes to the device, as ROUTE_DEVICE; a write returns EXIT_IO */
#define PCI_FUNCTIONS 256 /* device << 3 | function, on bus 0 */

struct core_route {
    uint64_t start, size; /* [start, start + size), in bytes */
    uint32_t kind;
    uint32_t index;       /* of the device */
    uint32_t space;       /* of the device's register spaces (devproc/wire.py) */
    uint64_t base_offset; /* in that space, of `start` */
};

#define CORE_INVALID 0xffffffff /* core_read, core_write: wrong index, size or value */

#define ROUTES_SET -1 /* core_set_routes; what is not negative is the position of the offending route */
#define ROUTES_NO_MEMORY -2

/* Why a device is gone; core_read and core_write return it in the low byte, errno above it. */
#define CAUSE_NONE 0
#define CAUSE_EOF 1
#define CAUSE_TIMEOUT 2
#define CAUSE_SEND_FAILED 3
#define CAUSE_RECEIVE_FAILED 4
#define CAUSE_BAD_REPLY 5
#define CAUSE_MARKED 6

/* Why core_vcpu_run returned. */
#define EXIT_NONE 0 /* core_vcpu_dispatch only: the access was served */
#define EXIT_STOPPED 1
#define EXIT_IO 2
#define EXIT_DEVICE_DEAD 3
#define EXIT_SHUTDOWN 4
#define EXIT_SYSTEM_EVENT 5
#define EXIT_INTERNAL_ERROR 6
#define EXIT_FAIL_ENTRY 7
#define EXIT_IOAPIC_EOI 8
#define EXIT_IRQ_WINDOW_OPEN 9
#define EXIT_HLT 10
#define EXIT_UNKNOWN 11
#define EXIT_RUN_FAILED 12

struct core_exit {
    int is_mmio, is_write;
    uint32_t size;     /* IO: 1, 2, 4 or 8 bytes */
    uint64_t addr;     /* IO: port or guest-physical address */
    uint64_t data;     /* IO: what is written, or all ones until core_vcpu_complete */
    uint32_t index;    /* DEVICE_DEAD */
    uint32_t cause;    /* DEVICE_DEAD: CAUSE_ */
    int error;         /* DEVICE_DEAD, RUN_FAILED: errno or 0 */
    uint64_t reason;   /* type, suberror, hardware reason, vector or KVM exit reason */
    uint32_t n_values; /* SYSTEM_EVENT, INTERNAL_ERROR: how many of `values` KVM filled */
    uint64_t values[16];
};

struct core_device_counters {
    uint64_t reads, writes, shadowed, wait_ns;
};

struct core;
struct core_vcpu;

struct core *core_new(uint32_t deadline_ms);
void core_free(struct core *core);
int core_add_device(struct core *core, int fd, uint32_t patience_ms, int page, int bell);
int core_mark_dead(struct core *core, uint32_t index);
int core_set_routes(struct core *core, const struct core_route *pio, uint32_t n_pio,
                    const struct core_route *mmio, uint32_t n_mmio);
uint32_t core_read(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                   uint64_t *data);
uint32_t core_write(struct core *core, uint32_t index, uint32_t space, uint64_t offset, uint32_t size,
                    uint64_t data, int posted);
int core_coalesce(struct core *core, int fd, uint32_t page, uint32_t index);
uint32_t core_oldest(struct core *core);
uint32_t core_drain(struct core *core, uint32_t *gone);
int core_set_pci_function(struct core *core, uint32_t devfn, uint32_t index);
uint32_t core_pci_address(struct core *core);
int core_device_counters(struct core *core, uint32_t index, struct core_device_counters *counters);
void core_float_counters(struct core *core, uint64_t *reads, uint64_t *writes);

struct core_vcpu *core_vcpu_new(struct core *core, int fd, void *run, uint64_t run_size);
void core_vcpu_free(struct core_vcpu *vcpu);
int core_vcpu_run(struct core_vcpu *vcpu);
int core_vcpu_dispatch(struct core_vcpu *vcpu);
const struct core_exit *core_vcpu_exit(struct core_vcpu *vcpu);
void core_vcpu_complete(struct core_vcpu *vcpu, uint64_t data);
void core_vcpu_stop(struct core_vcpu *vcpu);

int core_install_kick_signal(void);
