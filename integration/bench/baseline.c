/* What an exit costs in C, for exit.py to compare with: `baseline GUEST DEVICE VCPU_CPU DEVICE_CPU`, where DEVICE is
 *
 *     floor     a byte in the same process; of a burst, KVM puts the writes aside and they are looked at with the
 *               read, so that one exit and 16 writes without are all there is
 *     socket    a byte in another process, each access a struct over SOCK_SEQPACKET: writes are posted, reads
 *               wait, and nothing else is done for either (crosvm's model)
 *
 * and a CPU of -1 is any.  Each line "OP COUNT PORT" of standard input is a run of access.S, whose samples, 32 bits
 * each, go to standard output.  The burst's ports are the device's, too. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAGE_SIZE 4096u /* as KVM_COALESCED_MMIO_MAX needs it */
#define RAM 0xa0000
#define LOAD 0x1000
#define OP 0x900
#define SAMPLES 0x10000
#define DONE 0x504
#define DEVICE 0x600

struct access {
    uint64_t addr, data;
    uint32_t size, is_write;
};

static int channel = -1;
static uint8_t scratch;
static struct kvm_coalesced_mmio_ring *ring;

static void use_cpu(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set))
        err(1, "CPU %d", cpu);
}

static void serve(int fd)
{
    struct access a;
    prctl(PR_SET_PDEATHSIG, 9);
    while (recv(fd, &a, sizeof a, 0) == sizeof a) {
        if (a.is_write) {
            scratch = (uint8_t)a.data;
        } else {
            a.data = scratch;
            if (send(fd, &a, sizeof a, 0) < 0)
                exit(1);
        }
    }
    exit(0);
}

static void access_device(uint64_t addr, uint8_t *data, uint32_t size, int is_write)
{
    struct access a = {.addr = addr, .size = size, .is_write = (uint32_t)is_write};
    if (channel < 0) {
        *(is_write ? &scratch : data) = is_write ? *data : scratch;
        return;
    }
    memcpy(&a.data, data, size);
    if (send(channel, &a, sizeof a, 0) < 0)
        err(1, "send");
    if (!is_write) {
        if (recv(channel, &a, sizeof a, 0) != sizeof a)
            err(1, "recv");
        memcpy(data, &a.data, size);
    }
}

static void coalesce(int kvm, int vm, int vcpu)
{
    struct kvm_coalesced_mmio_zone zone = {.addr = DEVICE, .size = 1, .pio = 1};
    int page = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
    if (page <= 0 || ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone))
        err(1, "coalesced ports");
    ring = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, (off_t)page * PAGE_SIZE);
    if (ring == MAP_FAILED)
        err(1, "ring");
}

static void drain(void)
{
    while (ring && ring->first != ring->last) {
        scratch = ring->coalesced_mmio[ring->first].data[0];
        ring->first = (ring->first + 1) % KVM_COALESCED_MMIO_MAX;
    }
}

static void run(int vcpu, struct kvm_run *page)
{
    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0))
            err(1, "KVM_RUN");
        drain();
        if (page->exit_reason == KVM_EXIT_IO) {
            if (page->io.port == DONE)
                return;
            access_device(page->io.port, (uint8_t *)page + page->io.data_offset, page->io.size,
                          page->io.direction);
        } else if (page->exit_reason == KVM_EXIT_MMIO) {
            access_device(page->mmio.phys_addr, page->mmio.data, page->mmio.len, page->mmio.is_write);
        } else {
            errx(1, "exit %u", page->exit_reason);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        errx(1, "expected GUEST DEVICE VCPU_CPU DEVICE_CPU");
    if (!strcmp(argv[2], "socket")) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
            err(1, "socketpair");
        if (fork() == 0) {
            close(pair[0]);
            use_cpu(atoi(argv[4]));
            serve(pair[1]);
        }
        close(pair[1]);
        channel = pair[0];
    }
    use_cpu(atoi(argv[3]));
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm = ioctl(kvm, KVM_CREATE_VM, 0);
    uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (uint64_t)ram};
    if (vm < 0 || ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
        err(1, "KVM");
    int guest = open(argv[1], O_RDONLY), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (read(guest, ram + LOAD, 4096) < 0 || vcpu < 0)
        err(1, "%s", argv[1]);
    struct kvm_run *page = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
                                MAP_SHARED, vcpu, 0);
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = LOAD, .rflags = 2};
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    sregs.cs.type = 0xb;
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs))
        err(1, "registers");
    if (channel < 0)
        coalesce(kvm, vm, vcpu);
    unsigned op, count, port;
    while (scanf("%u %u %u", &op, &count, &port) == 3) {
        uint16_t words[3] = {(uint16_t)op, (uint16_t)count, (uint16_t)port};
        memcpy(ram + OP, words, sizeof words);
        run(vcpu, page);
        fwrite(ram + SAMPLES, 4, count, stdout);
        fflush(stdout);
    }
    return 0;
}
