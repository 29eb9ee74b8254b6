"""From a checked configuration to a running guest: the start of a VM, in order (ARCHITECTURE.md).

Any failure names its step and leaves no process, file or socket behind.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from devproc import jail
from devproc.zygote import Zygote
from kvmcore import acpi, bootparams, bzimage, cpusetup, fdt, layout, mptable, probe
from kvmcore.bootfile import BootFile
from kvmcore.errors import ConfigError
from kvmcore.exitloop import Core, CoreVcpu, install_kick_signal
from kvmcore.irq import GsiRouter
from kvmcore.kvm import Kvm, Vm
from kvmcore.memory import GuestMemory
from supervisor import confine, control, ending, machine
from supervisor.begin import LEARN, step
from supervisor.bus import Buses, Claim, DeviceTarget
from supervisor.coalescing import Coalescing
from supervisor.config import RunConfig
from supervisor.disks import SECTOR, check_size
from supervisor.ending import Ending
from supervisor.exchange import Exchange
from supervisor.host import Host
from supervisor.janitor import Janitor
from supervisor.machine import Instance
from supervisor.pciroot import PciRoot
from supervisor.proxy import Proxy
from supervisor.runloop import RunLoop, Signals
from supervisor.spawn import Spawner
from supervisor.splitchip import SplitChip
from supervisor.vcputhread import VcpuThread

if TYPE_CHECKING:
    from supervisor.recorder import Recorder
    from supervisor.recordings import Recordings

_EVENTS = (("panic", ending.PANIC), ("poweroff", ending.POWEROFF), ("reset", ending.RESET))
_ECAM_BUSES = 1
_MMIO_SIZE = 1 << 52


class Say(Protocol):
    """Takes one line for the user; the keywords are for machines that read it."""

    def __call__(
        self, line: str, /, *, level: str = "warning", event: str = "note", device: str | None = None
    ) -> None: ...


def launch(config: RunConfig, nursery: Zygote, say: Say) -> Ending:
    """Run the VM that `config` describes to its end; `say` takes what there is to say meanwhile.

    `nursery` is the zygote, which gets ready for this VM, and stays the caller's to end.

    Raises:
        VmsupError: it could not be started; everything is undone.
    """
    with ExitStack() as undo:
        return _Launch(config, nursery, say, undo).run()


class _Launch:
    """The start of one VM; what must be undone is on `undo`, in the opposite order."""

    def __init__(self, config: RunConfig, nursery: Zygote, say: Say, undo: ExitStack) -> None:
        self.config = config
        self.nursery = nursery
        self.say = say
        self.undo = undo
        self.began_ns = time.monotonic_ns()

    def run(self) -> Ending:
        config, nursery, say, step = self.config, self.nursery, self.say, self._step
        split = config.irqchip == "split"
        with step("read the configuration's files"):
            mode = self._jail_mode()
            recorder = self._recorder(mode)
            recordings = self._recordings()
            self._check_files()
            fstab = config.android_fstab
            setup_data = [(bootparams.SETUP_DTB, fdt.android(fstab))] if fstab is not None else []
        with step("start the janitor"):
            janitor = Janitor.start(mode)
            self.undo.callback(janitor.finish)
        exchange: Exchange | None = None
        for vsock in config.vsock:
            with step("start the exchange"):
                exchange = Exchange.start(vsock.path, janitor, mode)
                self.undo.callback(exchange.finish)
        with step("open /dev/kvm"):
            kvm = self.undo.enter_context(Kvm())
            kvm.require(probe.REQUIRED)
        with step("create the VM"):
            vm = self.undo.enter_context(kvm.create_vm())
            vm.set_identity_map_addr(layout.IDENTITY_MAP)
            vm.set_tss_addr(layout.TSS)
        with step("create the interrupt chip"):
            if split:
                vm.enable_split_irqchip(machine.IOAPIC_PINS)
            else:
                vm.create_irqchip()
                vm.create_pit2()
            router = GsiRouter(vm.set_gsi_routing, split=split)
        with step("create the guest's memory"):
            memory = self._create_memory(vm)
        with step("create the vCPUs"):
            vcpus = [self.undo.enter_context(vm.create_vcpu(n)) for n in range(config.cpus)]
        with step("compile the supervisor's own policies"):
            seal = confine.seal("supervisor", mode, self.say, {"FD_VM": vm.fd})
            seals = [
                confine.seal("vcpu", mode, self.say, {"FD_VM": vm.fd, "FD_VCPU": vcpu.fd}) for vcpu in vcpus
            ]
        with step("lay out the devices"):
            low_end = layout.low_ram_end(memory.size)
            instances = machine.instances(config, low_end, memory.size - low_end)
            core = Core(round(config.device_timeout * 1000))
            buses = Buses(core, machine.BUS_SIZE, _MMIO_SIZE)
        with step("open what the devices work on"):
            tell = partial(say, level="info", event="console")
            host = Host(self.undo, janitor, tell)
            if exchange is not None:
                host.exchange = exchange.device.fileno()
            opened = {i.name: i.opens(host) for i in instances if i.opens is not None}
        with step("spawn the devices"):
            events = {name: self._eventfd() for name, _ in _EVENTS}
            spawner = Spawner(
                nursery,
                core,
                mode,
                config.device_timeout,
                events,
                memory.fd,
                opened,
                self._say_of,
                config.transport,
                recordings.extra if recordings else None,
            )
            proxies = self._spawn(spawner, instances, mode, recorder)
        with step("build the buses"):
            chip = SplitChip(vm, router, vcpus[0], buses) if split else None
            ecam_buses = _ECAM_BUSES * config.pcie_ecam
            pci = PciRoot(core, buses, vm, router, memory, ecam_buses)
            irqfd = chip.connect if chip is not None else vm.irqfd
            coalescing = Coalescing(core, vm, vcpus[0])
            for proxy in proxies:
                self._connect(proxy, buses, pci, irqfd, spawner.eventfds.get(proxy.name, {}))
                for port in proxy.instance.coalesced() if config.transport == "mailbox" else ():
                    coalescing.add(port, proxy.index)
            buses.publish()
        with step("load the kernel"):
            kernel = bzimage.load(config.kernel, memory)
        with step("write the boot data"):
            memory.write(
                layout.RSDP,
                acpi.build(machine.acpi_machine(config, memory.size, ecam_buses)),
            )
            # A new one at each start; nothing copies a VM that runs, so it never changes.
            memory.write(layout.VM_GENERATION_ID, os.urandom(acpi.VM_GENERATION_ID_SIZE))
            memory.write(layout.MP_TABLE, mptable.build(range(config.cpus), machine.pci_interrupts()))
            bootparams.write(
                memory,
                kernel,
                config.command_line(machine.SERIAL_BASES),
                config.initrd,
                setup_data,
                ecam_buses,
            )
            cpusetup.write_tables(memory)
        with step("set the vCPUs up"):
            for vcpu in vcpus:
                cpusetup.setup(kvm, vcpu, config.cpus, kernel.entry)
        with step("prepare to run"):
            loops = [CoreVcpu(core, v.fd, v.run) for v in vcpus]
            for vcpu_loop in loops:
                self.undo.callback(vcpu_loop.close)
            install_kick_signal()
            signals = Signals()
            self.undo.callback(signals.close)
            resized = partial(_resize, host, proxies)
            resized()
            loop = RunLoop(
                signals,
                proxies,
                [(events[name], how) for name, how in _EVENTS],
                host.keyboard,
                resized,
                host.watched,
                config.device_timeout + max(i.entry.patience_s for i in instances),
                nursery.pid,
                coalescing,
            )
            threads = [
                VcpuThread(
                    n, v, buses, config.cpu_affinity.get(n), chip, seals[n], loop.end, loop.device_gone
                )
                for n, v in enumerate(loops)
            ]
            if chip is not None:
                chip.wake, chip.interrupt_bsp = loop.wake, threads[0].interrupt
                host.watched.append(chip)
        with step("make the control socket"):
            if config.socket is not None:
                verbs: dict[str, control.Verb] = {
                    "ps": lambda _: self._ps(proxies, nursery, janitor, exchange),
                    "stop": lambda _: _stop(loop),
                    "balloon": partial(self._balloon, _find(proxies, "virtio-balloon")),
                    "link": partial(_link, proxies),
                    "resize": partial(self._resize_disk, proxies),
                }
                server = control.ControlServer(config.socket, verbs, janitor)
                self.undo.callback(server.close)
                host.watched.append(server)
        with step("drop privileges"):
            janitor.seal(self.say)
            if exchange is not None:
                exchange.seal(self.say)
            jail.drop_privileges()
        how = loop.run(threads, seal)
        if recordings is not None:
            recordings.write(self.say)
        if config.verbose:
            self._say_accesses(core, proxies, pci)
        return how

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """`step`; --verbose says when it was done."""
        with step(name):
            yield
        if self.config.verbose:
            done_ms = (time.monotonic_ns() - self.began_ns) / 1e6
            self.say(f"{done_ms:8.1f} ms: {name}: done", level="info", event="step")

    def _say_accesses(self, core: Core, proxies: Sequence[Proxy], pci: PciRoot) -> None:
        """What the guest did to each device, and how long it was kept waiting."""
        for proxy in proxies:
            reads, writes, shadowed, wait_ns = core.device_counters(proxy.index)
            text = f"{proxy.name}: {reads} reads, {writes} writes, {wait_ns / 1e6:.1f} ms waited"
            if shadowed:
                text += f"; {shadowed} reads of shadows"
            self.say(text, level="info", event="accesses", device=proxy.name)
        for function in pci.functions:
            text = f"{function.name}: {function.refused} writes refused"
            self.say(text, level="info", event="accesses", device=function.name)
        reads, writes = core.float_counters()
        self.say(f"nobody: {reads} reads, {writes} writes", level="info", event="accesses")

    def _say_of(self, name: str, line: str) -> None:
        self.say(f"{name}: {line}", event="log", device=name)

    def _jail_mode(self) -> jail.Mode:
        mode = jail.Mode(self.config.jail)
        if mode is jail.Mode.NONE:
            self.say("WARNING: --no-jail: device processes run with all your rights, and so may the guest")
        elif mode is jail.Mode.BEST_EFFORT:
            self.say("WARNING: jail=best-effort: layers of the jail that this host lacks are left out")
        if self.config.verbose and mode is not jail.Mode.NONE:
            for layer, why in jail.lacking().items():
                text = f"jail: {layer}: not offered by this kernel: {why}"
                self.say(text, level="info", event="jail")
        return mode

    def _recorder(self, mode: jail.Mode) -> Recorder | None:
        """What watches a device instead of its policy, if the environment asks for that."""
        value = os.environ.get(LEARN)
        if not value:
            return None
        from supervisor.recorder import Recorder  # noqa: PLC0415 - no other start pays for it

        if mode is jail.Mode.NONE:
            raise ConfigError(f"{LEARN}: nothing can be learnt without a jail")
        recorder = Recorder.asked_for(value, self.say)
        self.undo.callback(recorder.close)
        self.say(f"WARNING: {LEARN}: what {recorder.device} may not do is recorded, and not refused")
        return recorder

    def _recordings(self) -> Recordings | None:
        if self.config.record is None:
            return None
        from supervisor.recordings import Recordings  # noqa: PLC0415 - no other start pays for it

        return Recordings(self.config.record)

    def _check_files(self) -> None:
        """Fail before anything is forked if a file cannot be opened; reading and checking it comes later."""
        with BootFile("kernel", self.config.kernel):
            pass
        if self.config.initrd is not None:
            with BootFile("initrd", self.config.initrd):
                pass

    def _create_memory(self, vm: Vm) -> GuestMemory:
        memory = GuestMemory.create(layout.ram_regions(self.config.mem * layout.MIB))
        self.undo.callback(memory.close)
        for slot, region in enumerate(memory.regions):
            host = memory.host_address(region.gpa, region.size)
            vm.set_user_memory_region(slot, region.gpa, region.size, host)
        return memory

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.undo.callback(os.close, fd)
        return fd

    def _spawn(
        self, spawner: Spawner, instances: Sequence[Instance], mode: jail.Mode, recorder: Recorder | None
    ) -> list[Proxy]:
        proxies: list[Proxy] = []
        self.undo.callback(end_devices, proxies)
        self.undo.callback(spawner.close)
        for proxy in spawner.spawn_all(instances):
            proxies.append(proxy)  # at once: if another cannot be made, this one must be ended
        for proxy in proxies:
            proxy.await_ready(
                mode, recorder.watch(proxy.instance.entry.name, proxy.name) if recorder else None
            )
        return proxies

    def _connect(
        self,
        proxy: Proxy,
        buses: Buses,
        pci: PciRoot,
        irqfd: Callable[..., None],
        eventfds: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Put a device's registers on the buses, and its interrupt on its line."""
        instance = proxy.instance
        for p in instance.ports:
            buses.io.insert(Claim(p.base, p.size, proxy.name, DeviceTarget(proxy.index, p.space, p.offset)))
        if instance.pci_slot is not None:
            pci.add(proxy, instance.pci_slot, eventfds)
        if instance.gsi is None:
            return
        if instance.entry.virtio is None:
            irqfd(eventfds["irq"][0], instance.gsi)
        else:
            irqfd(eventfds["intx"][0], instance.gsi, eventfds["resample"][0])

    def _ps(
        self, proxies: Sequence[Proxy], nursery: Zygote, janitor: Janitor, exchange: Exchange | None
    ) -> dict[str, Any]:
        processes = [[p.name, p.pid] for p in proxies if not p.reaped]
        kinds = {p.name: p.instance.entry.name for p in proxies}
        ours = {"pid": os.getpid(), "zygote": nursery.pid, "janitor": janitor.pid}
        if exchange is not None:
            ours["exchange"] = exchange.pid
        return {**ours, "processes": processes, "kinds": kinds}

    def _balloon(self, balloon: Proxy | None, request: Mapping[str, Any]) -> dict[str, Any]:
        """A new target, or what was last known; in that case what is known next is asked for."""
        if balloon is None:
            return {"error": "this VM has no balloon, it was started without --balloon"}
        target_mib = request.get("target_mib")
        if target_mib is None:
            balloon.set("refresh", 1)
            balloon.ask_counters()
            return {"counters": balloon.counters}
        if type(target_mib) is not int or not 0 <= target_mib < self.config.mem:
            return {"error": f"expected 0 to {self.config.mem - 1} MiB, not {target_mib!r:.40}"}
        balloon.set("target_mib", target_mib)
        return {}

    def _resize_disk(self, proxies: Sequence[Proxy], request: Mapping[str, Any]) -> dict[str, Any]:
        """More room on a disk, or what was last known of it; in that case what is known next is asked for."""
        disks = {f"block{n}": disk for n, disk in enumerate(self.config.block, 1)}
        name, size = request.get("disk"), request.get("size")
        proxy = next((p for p in proxies if p.name == name and p.name in disks), None)
        if proxy is None:
            known = ", ".join(disks) or "none, it was started without --block"
            return {"error": f"this VM has no disk {name!r:.40}, expected one of: {known}"}
        if size is None:
            proxy.ask_counters()
            return {"counters": proxy.counters}
        wrong = check_size(disks[proxy.name], size)
        if wrong is not None:
            return {"error": f"{name}: {wrong}"}
        proxy.set("capacity", size // SECTOR)
        return {}


def _find(proxies: Sequence[Proxy], kind: str) -> Proxy | None:
    return next((p for p in proxies if p.instance.entry.name == kind), None)


def _link(proxies: Sequence[Proxy], request: Mapping[str, Any]) -> dict[str, Any]:
    """The cable of a network card, in or out."""
    name, plugged = request.get("card"), request.get("plugged")
    cards = [p for p in proxies if any(setting.name == "link" for setting in p.instance.entry.settings)]
    for card in cards:
        if card.name == name and type(plugged) is bool:
            card.set("link", int(plugged))
            return {}
    known = ", ".join(card.name for card in cards) or "none, it was started without --net"
    return {"error": f"this VM has no network card {name!r:.40}, expected one of: {known}"}


def _stop(loop: RunLoop) -> dict[str, Any]:
    loop.end(ending.STOPPED)
    return {"stopping": True}


def _resize(host: Host, proxies: Sequence[Proxy]) -> None:
    """Tell the virtio console how large the terminal is, if that is where it is."""
    console = _find(proxies, "virtio-console")
    if console is None or host.keyboard is None or host.window is None:
        return
    with contextlib.suppress(OSError):  # it has hung up, which its keyboard will say
        size = os.get_terminal_size(host.keyboard.fd)
        console.set("size", size.columns | size.lines << 16 | host.window << 32)


def end_devices(proxies: Sequence[Proxy]) -> None:
    """What the run loop did not get to see the end of, because the start failed."""
    for proxy in proxies:
        proxy.kill()
    for proxy in proxies:
        if not proxy.reaped:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(proxy.pid, 0)
        proxy.close()
