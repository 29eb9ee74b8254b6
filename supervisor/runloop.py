"""While the guest runs: the main thread waits for news of devices, the user and the host, until the VM ends.

No guest access passes through here; the vCPU threads and the exit loop answer those.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence

from kvmcore.exitloop import DeviceGone, is_lost
from supervisor import ending, reaper
from supervisor.coalescing import Coalescing
from supervisor.ending import Ending
from supervisor.host import Watched
from supervisor.proxy import CLOSED, PING_EVERY_S, Proxy
from supervisor.reaper import DeviceDied
from supervisor.terminal import Keyboard, Typed
from supervisor.vcputhread import VcpuThread

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_WORDS_S = 2.0  # how long a lost connection waits for the reaper's better word: its maps go first
_FLUSH_S = 2.0  # how long devices may take to write out what they hold at the end
_LOOK_MS = round(PING_EVERY_S * 500)
_VCPU_JOIN_S = 1.0  # on top of the access deadline


class Signals:
    """Signals as bytes on a descriptor; made in the main thread, handlers put back by `close`."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._before = {
            s: signal.signal(s, lambda *_: None)
            for s in (*_ENDING_SIGNALS, signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH)
        }
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._read.fileno()

    def take(self) -> set[int]:
        """The numbers that have come since."""
        try:
            return set(self._read.recv(4096))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._read.close()
        self._write.close()


class RunLoop:
    """Owns the running VM's threads and device processes.

    Args:
        proxies: every device process; what is `watched` may change it.
        events: eventfds of "panic", "poweroff" and "reset", in the order in which they count.
        keyboard: the terminal, if the VM is interactive.
        resized: called when the terminal may have another size.
        watched: whatever else has descriptors.
        access_timeout_s: the longest a vCPU can be held by a device.
        coalescing: the guest's writes that KVM puts aside.
    """

    def __init__(
        self,
        signals: Signals,
        proxies: Sequence[Proxy],
        events: Sequence[tuple[int, Ending]],
        keyboard: Keyboard | None,
        resized: Callable[[], None],
        watched: Sequence[Watched],
        access_timeout_s: float,
        zygote_pid: int,
        coalescing: Coalescing | None = None,
    ) -> None:
        self._signals = signals
        self.proxies = proxies
        self._events = events
        self._keyboard = keyboard
        self._resized = resized
        self._watched = watched
        self._access_timeout_s = access_timeout_s
        self._zygote_pid = zygote_pid
        self._coalescing = coalescing
        self._vcpus: list[VcpuThread] = []
        self._wakeup, self._wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ending: Ending | None = None
        self._lost: tuple[int, str] | None = None

    def end(self, how: Ending) -> None:
        """End the VM this way, unless it is ending already; callable from any thread."""
        if self._ending is None:
            self._ending = how
        self.wake()

    def wake(self) -> None:
        """Have the main thread look at everything again; callable from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wakeup_write, b".")

    def device_gone(self, index: int, how: str) -> None:
        """The exit loop lost device number `index` in an access; callable from any thread."""
        self._lost = (index, how)
        self.wake()

    def run(self, vcpus: Sequence[VcpuThread], seal: Callable[[], None]) -> Ending:
        """Start the vCPU threads and wait for the end; everything is stopped on return.

        `seal` confines the calling thread; what it raises is raised.
        """
        self._vcpus = list(vcpus)
        try:
            for vcpu in self._vcpus:
                vcpu.start()
            seal()
            if self._ending is None:
                for vcpu in self._vcpus:
                    vcpu.release()
            while self._ending is None:
                self._once()
        except DeviceDied as e:
            self.end(ending.device_died(e))
            for proxy in self.proxies:
                if proxy.name == e.name:
                    proxy.give_up()
        finally:
            self._stop()
        assert self._ending is not None
        return self._ending

    def _once(self) -> None:
        actions = self._actions()
        poll = select.poll()
        for fd, (events, _) in actions.items():
            poll.register(fd, events)
        until_s = time.monotonic() + PING_EVERY_S / 2
        while not (ready := dict(poll.poll(self._look_ms()))) and time.monotonic() < until_s:
            if self._lost is not None:
                break
        # A panic or power-off that is followed by a reset counts as what it was.
        for fd, how in self._events:
            if fd in ready:
                self.end(how)
                return
        violation_first = sorted(ready.items(), key=lambda item: actions[item[0]][1] != self._violation)
        for fd, got in violation_first:
            actions[fd][1](fd, got)
            if self._ending is not None:
                return
        if self._lost is not None:
            self._device_lost(*self._lost)
        now_s = time.monotonic()
        for proxy in self.proxies:
            proxy.check_alive(now_s)

    def _look_ms(self) -> int:
        """How long nothing but descriptors needs the main thread."""
        until_ms = None
        if self._coalescing is not None:
            try:
                until_ms = self._coalescing.look()
            except DeviceGone as e:
                self._lost = (e.index, e.cause)
                return 0
        return _LOOK_MS if until_ms is None else until_ms

    def _actions(self) -> dict[int, tuple[int, Callable[[int, int], None]]]:
        """Descriptor -> (poll events, what to do)."""
        actions: dict[int, tuple[int, Callable[[int, int], None]]] = {
            self._signals.fileno(): (select.POLLIN, self._signal),
            self._wakeup: (select.POLLIN, self._woken),
        }
        for fd, _ in self._events:
            actions[fd] = (select.POLLIN, self._woken)
        for proxy in self.proxies:
            actions[proxy.control.fileno()] = (select.POLLIN, self._control)
            if proxy.log_open:
                actions[proxy.log] = (select.POLLIN, self._log)
            if proxy.listener is not None:
                actions[proxy.listener] = (select.POLLIN, self._violation)
        for watched in self._watched:
            for fd, events in watched.wants().items():
                actions[fd] = (events, watched.ready)
        if self._keyboard is not None:
            if self._keyboard.blocked:
                actions[self._keyboard.sink] = (select.POLLOUT, self._typed)
            else:
                actions[self._keyboard.fd] = (select.POLLIN, self._typed)
        return actions

    def _woken(self, fd: int, got: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)

    def _typed(self, fd: int, got: int) -> None:
        assert self._keyboard is not None
        match self._keyboard.pump():
            case Typed.END:
                self.end(ending.STOPPED)
            case Typed.CLOSED:
                self.end(ending.by_signal(signal.SIGHUP, "the terminal closing"))

    def _control(self, fd: int, got: int) -> None:
        proxy = next(p for p in self.proxies if p.control.fileno() == fd)
        try:
            proxy.on_control()
        except DeviceDied as e:
            raise self._better_word(proxy, e) from None

    def _log(self, fd: int, got: int) -> None:
        next(p for p in self.proxies if p.log == fd).on_log()

    def _violation(self, fd: int, got: int) -> None:
        next(p for p in self.proxies if p.listener == fd).on_violation()

    def _signal(self, fd: int, got: int) -> None:
        for number in sorted(self._signals.take()):
            if number in _ENDING_SIGNALS:
                self.end(ending.by_signal(number, signal.Signals(number).name))
            elif number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGWINCH:
                self._resized()

    def _reap(self) -> None:
        """Raises DeviceDied if one of ours ended or was stopped."""
        while (fate := reaper.collect()) is not None:
            if fate.pid == self._zygote_pid and fate.over:
                raise DeviceDied("zygote", fate.cause)
            proxy = self._of(fate.pid)
            if proxy is not None:
                proxy.reaped = proxy.reaped or fate.over
                raise self._last_words(proxy, DeviceDied(proxy.name, fate.cause))

    def _of(self, pid: int) -> Proxy | None:
        return next((p for p in self.proxies if p.pid == pid), None)

    def _reaped(self, pid: int) -> None:
        proxy = self._of(pid)
        if proxy is not None:
            proxy.reaped = True

    def _last_words(self, proxy: Proxy, otherwise: DeviceDied) -> DeviceDied:
        """What a dead device still had to say: why it failed, or the call it was killed for."""
        with contextlib.suppress(OSError):
            proxy.on_log()
        try:
            if proxy.listener is not None and select.select([proxy.listener], [], [], 0)[0]:
                proxy.on_violation()
            while select.select([proxy.control], [], [], 0)[0]:
                proxy.on_control()
        except DeviceDied as e:
            if e.cause != CLOSED:
                return e
        return otherwise

    def _better_word(self, proxy: Proxy, first: DeviceDied) -> DeviceDied:
        """A lost connection is a symptom: wait a little for the reaper to say why."""
        if proxy.reaped or not (first.cause == CLOSED or is_lost(first.cause)):
            return first
        until_s = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < until_s:
            try:
                self._reap()
            except DeviceDied as e:
                return e
            time.sleep(0.005)
        return first

    def _device_lost(self, index: int, how: str) -> None:
        proxy = next(p for p in self.proxies if p.index == index)
        word = self._last_words(proxy, DeviceDied(proxy.name, how))
        raise word if word.cause != how else self._better_word(proxy, DeviceDied(proxy.name, how))

    def _stop(self) -> None:
        """Stop vCPUs, let devices write out what they hold, then end them all."""
        for vcpu in self._vcpus:
            vcpu.stop()
        until_s = time.monotonic() + self._access_timeout_s + _VCPU_JOIN_S
        for vcpu in self._vcpus:
            vcpu.kick_until_over(until_s)
        if self._coalescing is not None:
            with contextlib.suppress(DeviceGone):  # the VM ends anyway
                self._coalescing.drain()
        alive = [p for p in self.proxies if not p.reaped]
        for proxy in alive:
            proxy.ask_to_stop()
        self._drain(alive, time.monotonic() + _FLUSH_S)
        for proxy in alive:
            if not proxy.reaped:
                proxy.kill()
        while any(not p.reaped for p in alive):
            fate = reaper.collect(0)
            if fate is None:
                break
            if fate.over:
                self._reaped(fate.pid)
        os.close(self._wakeup)
        os.close(self._wakeup_write)

    def _drain(self, alive: Sequence[Proxy], until_s: float) -> None:
        """Keep relays moving while the devices leave by themselves."""
        while any(not p.reaped for p in alive) and time.monotonic() < until_s:
            poll = select.poll()
            owners: dict[int, Callable[[int, int], None]] = {}
            for watched in self._watched:
                for fd, events in watched.wants().items():
                    poll.register(fd, events)
                    owners[fd] = watched.ready
            for proxy in alive:
                if proxy.log_open:
                    poll.register(proxy.log, select.POLLIN)
                    owners[proxy.log] = self._log
            poll.register(self._signals.fileno(), select.POLLIN)
            for fd, got in poll.poll(50):
                if fd in owners:
                    owners[fd](fd, got)
                else:
                    self._signals.take()
            while (fate := reaper.collect()) is not None:
                if fate.over:
                    self._reaped(fate.pid)
