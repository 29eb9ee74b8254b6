"""`vmsup fuzz DEVICE`: a campaign of device processes that fuzz themselves, and what comes of it.

The executors (devproc/fuzz/executor.py) make and run the inputs; here is who starts them, watches them, hands
what one has found to the others, keeps corpus and findings on disk, and rehearses a sample behind the real
wire.  One thread: it sleeps while they work.  What a device process says is not believed further than it can
be checked: a finding counts when another process shows it again.

Exit codes are libFuzzer's: 0 nothing found, 77 a finding, 70 inputs that take too long and nothing worse, 71
inputs that take too much memory and nothing worse.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from devproc import jail, zygote
from devproc.catalog import CATALOG, MEMORY_PARAMS, Entry
from devproc.channel import ChannelClosed
from devproc.fuzz import instrument
from devproc.fuzz.inputs import (
    GUEST_SIZE,
    RECORD,
    InputError,
    Op,
    Rep,
    canonical,
    default_params,
    encode,
    parse,
    records,
    stimuli,
)
from devproc.fuzz.page import INPUT_MAX
from devproc.fuzz.recording import recorded
from devproc.wire import PeerError, Ping, Pong, Scalar
from kvmcore.errors import ConfigError
from supervisor.findings import COMPARED, FOUND, Finding, Findings, Verdicts
from supervisor.fuzzoptions import HANG_S
from supervisor.recordings import expected
from supervisor.rehearse import Rehearsal
from supervisor.subject import Died, Subject

EXIT_FINDING: Final = FOUND["crash"]
SLOW: Final = 5  # how much longer an input may take: beside others a processor needs twice as long, and more
_LOST_S: Final = 60.0  # a process that uses no CPU time and does not answer
_BATCH_S: Final = 0.5  # CPU time that a request should take
_LOOK_S: Final = 0.01  # how often the watch looks
_INPUTS_PER_REQUEST: Final = 128
_STATUS_S: Final = 0.5
_SAMPLE_S: Final = 1.0  # how often an input that reached nothing new is rehearsed, too
_SPARE: Final = 10  # times as long as comparing takes nothing is compared
_RECORDED_MAX: Final = 64  # operations of an input that is recorded to be compared
_PART: Final = 48 * RECORD.size  # of a recording, to be an input

Say = Callable[[str], None]
Corpus = Path | MutableMapping[str, bytes]
"""A directory, or files by name that are somewhere else (fuzzcluster.open_corpus)."""


@dataclass(frozen=True)
class Plan:
    """What the user asked for.

    Attributes:
        corpus: inputs to start from and to add to; None keeps nothing.
        crashes: directory of what was found.
        time_s, runs: when to end; None for both: at Ctrl-C.
        words: a dictionary: numbers, and texts.
        timeout_s: CPU time that an input may take.
        compare: whether to rehearse a sample behind the real wire.
        stop: whether to end with the first finding.
        params: the device's parameters [those of `inputs.default_params`].
    """

    device: str
    corpus: Corpus | None = None
    crashes: Path = Path("crashes")
    time_s: float | None = None
    runs: int | None = None
    workers: int = 1
    seed: int = 1
    words: tuple[int | bytes, ...] = ()
    mode: jail.Mode = jail.Mode.FULL
    timeout_s: float = HANG_S
    compare: bool = True
    stop: bool = False
    params: tuple[Scalar, ...] | None = None


@dataclass
class Result:
    """What a campaign came to; `covered` are numbers of `blocks`."""

    device: str
    runs: int = 0
    seconds: float = 0.0
    corpus: dict[str, bytes] = field(default_factory=dict)
    covered: set[int] = field(default_factory=set)
    blocks: list[instrument.Block] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    compared: int = 0

    @property
    def exit_code(self) -> int:
        """libFuzzer's, by the worst finding."""
        return next((code for sort, code in FOUND.items() if any(f.sort == sort for f in self.findings)), 0)

    def line(self) -> str:
        """One line for the user."""
        rate = self.runs / self.seconds if self.seconds else 0
        hangs = sum(f.sort == "timeout" for f in self.findings)
        return (
            f"{self.runs:,} runs, {rate:,.0f}/s, corpus {len(self.corpus)}, "
            f"blocks {len(self.covered)}/{len(self.blocks)}, compared {self.compared}, "
            f"findings {len(self.findings) - hangs}, hangs {hangs}"
        )


def lookup(device: str) -> Entry:
    """The catalogue's entry.

    Raises:
        ConfigError: there is none, or it cannot be fuzzed.
    """
    if device not in CATALOG:
        raise ConfigError(f"device {device!r} is unknown, expected one of {', '.join(CATALOG)}")
    return CATALOG[device]


def read_input(entry: Entry, path: Path) -> Rep:
    """The input in a file, as text or as bytes, which may be any.

    Raises:
        ConfigError: it cannot be read, or is the text of another device, or no text.
    """
    try:
        return _input_of(entry, path.read_bytes(), str(path))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None


def _input_of(entry: Entry, data: bytes, where: str) -> Rep:
    if data.startswith(b"vmrep "):
        try:
            rep = parse(data.decode())
        except (InputError, UnicodeDecodeError) as e:
            raise ConfigError(f"{where}: {e}") from None
        if rep.device != entry.name:
            raise ConfigError(f"{where}: an input for {rep.device}, not {entry.name}")
        return replace(rep, data=stimuli(entry, rep.data))
    return Rep(entry.name, canonical(entry, data[:INPUT_MAX]), default_params(entry))


def read_corpus(entry: Entry, where: Corpus) -> dict[str, bytes]:
    """The inputs in a directory, by name; any fuzzer's corpus will do, and what `--record` made of a VM.

    Texts for other devices are passed over.  Raises ConfigError.
    """
    found = {}
    try:
        if isinstance(where, Path):
            paths = sorted(p for p in where.iterdir() if p.is_file()) if where.exists() else []
            files = {str(path): path.read_bytes() for path in paths}
        else:
            files = {name: where[name] for name in sorted(where)}
    except OSError as e:
        raise ConfigError(f"{where if isinstance(where, Path) else 'corpus'}: {e}") from None
    others = [[name.encode()] for name in CATALOG if name != entry.name]
    for path, content in files.items():
        if content.startswith(b"vmrep ") and content.split()[2:3] in others:
            continue
        data = _input_of(entry, content, path).data
        for start in range(0, len(data), _PART):  # a recording is long
            part = canonical(entry, data[start : start + _PART])
            if part:
                found[name_of(part)] = part
    return found


def name_of(data: bytes) -> str:
    """The name of an input in a corpus, as libFuzzer would name it."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def read_dictionary(path: Path) -> tuple[int | bytes, ...]:
    """The words of a dictionary as AFL and libFuzzer read it, `name="text\\xff"` in each line.

    A word of up to 8 bytes is a number as well.

    Raises:
        ConfigError: it cannot be read, or a line is none of it.
    """
    words: list[int | bytes] = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e}") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        first, last = text.find('"'), text.rfind('"')
        try:
            if not 0 <= first < last:
                raise ValueError
            word = text[first + 1 : last].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except ValueError:
            raise ConfigError(f'{path}: line {number}: expected: name="text"') from None
        words.append(word)
        if 0 < len(word) <= 8:
            words.append(int.from_bytes(word, "little"))
    return tuple(words)


class Worker:
    """An executor and the one request it is about; it is started again when it dies.

    Attributes:
        backlog: inputs it has not been told of.
        lives: how many processes there have been.
    """

    def __init__(
        self,
        nursery: zygote.Zygote,
        entry: Entry,
        params: tuple[Scalar, ...],
        plan: Plan,
        number: int,
    ) -> None:
        self._make: Callable[[], Subject] = functools.partial(
            Subject, nursery, entry, plan.mode, params, number
        )
        self._hang_s = plan.timeout_s * SLOW
        self.lives = 1
        self.number = number
        self.subject = self._make()
        self.busy = False
        self.backlog: list[bytes] = []
        self._token = 0
        self._answered = 0  # inputs begun when it last answered
        self._asked_ns = 0  # of its CPU time
        self._pulse = (0, 0)
        self._cpu_ns = 0
        self._moved_s = 0.0

    def ask(self, request: dict[str, Any]) -> None:
        """Begin a request.  Raises Died."""
        self.subject.page.ask(request)
        self._token = (self._token + 1) & 0xFFFFFFFF
        self.busy = True
        self._asked_ns = self.subject.cpu_ns()
        self._pulse, self._cpu_ns, self._moved_s = (-1, 0), 0, time.monotonic()
        try:
            self.subject.control.send(Ping(self._token))
        except ChannelClosed:
            raise self.subject.autopsy() from None

    def answer(self) -> dict[str, Any]:
        """The answer that has come.  Raises Died, also for a process that breaks the protocol."""
        if not select.select([self.subject.control], [], [], 0)[0]:  # it is held for a forbidden call
            raise self.subject.autopsy()
        try:
            message = self.subject.control.recv()
            if message != Pong(self._token):
                raise PeerError(f"{message!r:.200} instead of Pong")
            answer = self.subject.page.answer()
        except (ChannelClosed, TimeoutError):
            raise self.subject.autopsy() from None
        except PeerError as e:
            raise Died("died", f"broke the protocol: {e}") from None
        self.busy = False
        self._answered, _ = self.subject.page.current()
        return answer

    def took_s(self) -> float:
        """CPU time since it was asked: what it is to be asked next must not depend on what else goes on."""
        return (self.subject.cpu_ns() - self._asked_ns) / 1e9

    def watch(self) -> None:
        """Look whether it goes on.  Raises Died."""
        cpu_ns, now_s = self.subject.cpu_ns(), time.monotonic()  # before: this process may have to wait here
        pulse = self.subject.page.pulse()
        if pulse != self._pulse:
            self._pulse, self._cpu_ns, self._moved_s = pulse, self.subject.cpu_ns(), now_s
        elif cpu_ns - self._cpu_ns > self._hang_s * 1e9 or now_s - self._moved_s > _LOST_S:
            raise self.subject.hang(self._hang_s)

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request and its answer.  Raises Died."""
        self.ask(request)
        while not self.wait(_LOOK_S):
            self.watch()
        return self.answer()

    def wait(self, seconds: float) -> bool:
        """Whether an answer, or the news of its death, has come."""
        return bool(select.select(self.subject.waiting, [], [], seconds)[0])

    def again(self) -> tuple[int, bytes]:
        """Start another process; returns how many inputs the last one began unanswered, and the last."""
        number, data = self.subject.page.current()
        begun, self._answered = max(number - self._answered, 0), 0
        self.subject.close()
        self.busy = False
        self.lives += 1
        self.subject = self._make()
        return begun, data

    def close(self) -> None:
        self.subject.close()


class Campaign:
    """Everything that `vmsup fuzz` has in its hands; use it with `with`.

    Args:
        say: takes a line that the user should keep.

    Raises:
        ConfigError: the device or the corpus cannot be used.
        VmsupError: a process could not be started.
    """

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan = plan
        self.entry = lookup(plan.device)
        self.result = Result(plan.device)
        self.say = say
        self._undo = contextlib.ExitStack()
        self.stopped = False
        self._uncompared: list[bytes] = []  # what has reached something new, and is still to be compared
        self._sample = b""  # what has not
        self._sample_s = 0.0  # when the next is due
        self.params = default_params(self.entry) if plan.params is None else plan.params
        try:
            self.result.blocks = instrument.blocks(self.entry)
            self.seeds = list((read_corpus(self.entry, plan.corpus) if plan.corpus else {}).values())
            self._executors = self._zygote("devproc.fuzz.executor")
            self._rehearsal = None
            if plan.compare and recorded(self.entry) and self._guest_size() <= GUEST_SIZE:
                self._rehearsal = Rehearsal(
                    self._zygote("devproc.fuzz.rehearsal"), self.entry, plan.mode, plan.workers + 1
                )
            self.judge = self._worker(plan.workers)
            self._findings = Findings(self.entry, self.params, plan.crashes, plan.mode)
        except BaseException:
            self._undo.close()
            raise

    def _guest_size(self) -> int:
        """Bytes of guest memory, of which a bench begins with zeros each time that it is compared."""
        given = self.entry.check_params(self.params)
        return sum(int(given[p.name]) for p in MEMORY_PARAMS) if self.entry.guest_memory else 0

    def _zygote(self, program: str) -> zygote.Zygote:
        nursery = zygote.start([self.entry.name], program=program, mode=self.plan.mode)
        self._undo.callback(os.waitpid, nursery.pid, 0)
        self._undo.callback(nursery.close)
        return nursery

    def _worker(self, number: int) -> Worker:
        worker = Worker(self._executors, self.entry, self.params, self.plan, number)
        self._undo.callback(worker.close)
        return worker

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    # -- fuzzing

    def run(self, status: Say) -> Result:
        """Until the plan's end, or Ctrl-C; `status` is called now and then with a line for the moment."""
        plan, result = self.plan, self.result
        workers = [self._worker(number) for number in range(plan.workers)]
        for worker in workers:
            worker.backlog = list(self.seeds)
        began_s = time.monotonic()
        shown_s = 0.0
        counts = dict.fromkeys(range(plan.workers), 200)

        def over() -> bool:
            return (
                self.stopped
                or (plan.stop and bool(result.findings))
                or (plan.time_s is not None and result.seconds >= plan.time_s)
                or (plan.runs is not None and result.runs >= plan.runs)
            )

        with self.interruptible():
            while True:
                now_s = time.monotonic()
                result.seconds = now_s - began_s
                if over() and not any(w.busy for w in workers):
                    break
                for w in workers:
                    try:
                        if w.busy and w.wait(0):
                            answer, took_s = w.answer(), w.took_s()
                            factor = min(max(_BATCH_S / max(took_s, 0.001), 0.5), 2.0)
                            counts[w.number] = min(max(int(counts[w.number] * factor), 50), 100_000)
                            self._take(w, workers, answer)
                        elif w.busy:
                            w.watch()
                        if not w.busy and not over():
                            left = counts[w.number]
                            if plan.runs is not None:
                                left = min(left, max(1, (plan.runs - result.runs) // plan.workers))
                            w.ask(self._request(w, left))
                    except Died as death:
                        self._bury(w, death)
                if now_s - shown_s >= _STATUS_S:
                    shown_s = now_s
                    status(result.line())
                self._compare_some()  # while they work
                busy = [fd for w in workers if w.busy for fd in w.subject.waiting]
                select.select(busy, [], [], _LOOK_S)
        result.seconds = time.monotonic() - began_s
        return result

    def _request(self, worker: Worker, count: int) -> dict[str, Any]:
        words = self.plan.words
        inputs, worker.backlog = worker.backlog[:_INPUTS_PER_REQUEST], worker.backlog[_INPUTS_PER_REQUEST:]
        return {
            "mode": "mutate",
            "inputs": [data.hex() for data in inputs],
            "count": max(count, len(inputs)),
            # Another for each process, which would otherwise make again what has ended the last one.
            "seed": (self.plan.seed << 32) + (worker.number << 16) + worker.lives,
            "numbers": [w for w in words if isinstance(w, int)],
            "texts": [w.hex() for w in words if isinstance(w, bytes)],
        }

    def _take(self, worker: Worker, workers: Sequence[Worker], answer: dict[str, Any]) -> None:
        """An executor's word, believed as far as it can be checked.  Raises Died for nonsense."""
        result = self.result
        try:
            result.covered.update(n for n in answer["covered"] if n in range(len(result.blocks)))
            result.runs += min(max(int(answer["runs"]), 0), 1_000_000)
            fresh = []
            for item in answer["new"]:
                data = canonical(self.entry, bytes.fromhex(item["input"]))
                fresh.append(data)
            found = [canonical(self.entry, bytes.fromhex(item["input"])) for item in answer["found"]]
            sample = canonical(self.entry, bytes.fromhex(answer["sample"]))
        except (KeyError, TypeError, ValueError) as e:
            raise Died("died", f"broke the protocol: an answer with a wrong {e!r:.100}") from None
        for data in fresh:
            self.keep(data)
            for other in workers:
                if other is not worker:
                    other.backlog.append(data)
        for data in found:
            self.report(self._judged(data), data)
        self._uncompared += fresh
        self._sample = sample

    def keep(self, data: bytes) -> None:
        """Have it join the corpus."""
        name = name_of(data)
        if name in self.result.corpus:
            return
        self.result.corpus[name] = data
        corpus = self.plan.corpus
        if isinstance(corpus, Path):
            corpus.mkdir(parents=True, exist_ok=True)
            (corpus / name).write_bytes(data)
        elif corpus is not None:
            corpus[name] = data

    def _compare_some(self) -> None:
        """Compare an input if it is time to, the newest first: one takes as long as thousands are run."""
        now_s = time.monotonic()
        fresh = bool(self._uncompared)
        if now_s < self._sample_s or not (fresh or self._sample):
            return
        data = self._uncompared.pop() if fresh else self._sample
        try:
            self.report(self.compare(data), data)
        except Died as death:
            self._bury(self.judge, death)
        took_s = time.monotonic() - now_s
        self._sample_s = now_s + took_s + max(0 if fresh else _SAMPLE_S, _SPARE * took_s)

    def _bury(self, worker: Worker, death: Died) -> None:
        """An executor died of the input in its page."""
        begun, data = worker.again()
        data = canonical(self.entry, data)
        if worker is not self.judge:
            self.result.runs += begun
            worker.backlog = list(self.result.corpus.values())
        if death.kind == "hang":
            self.report(self._judged(data), data)
        else:
            self.report(Finding.of(death.kind, death.why), data)

    def compare(self, data: bytes) -> Finding | None:
        """How the device behind the real wire differs from the bench; None: it does not.  Raises Died."""
        if self._rehearsal is None:
            return None
        if self.entry.guest_memory:  # a record has nothing that only a bench can do
            kept = [r for r in records(data) if r.op not in (Op.ROOM, Op.SAVE, Op.REPEAT)]
            data = encode(kept[:_RECORDED_MAX])
        answer = self.judge.do({"mode": "trace", "input": data.hex(), **_START})
        rep = Rep(self.entry.name, data, self.params)
        if "record" in answer:
            rep, steps = expected(self._recorded(answer))
        elif "steps" in answer:
            steps = answer["steps"]
        else:
            return None  # an oracle's finding, which is reported as such, or an input that takes very long
        self.result.compared += 1
        for kind, mailbox in (("disagree", False), ("transport", True)):
            why = self._rehearsal.differs(rep, steps, mailbox=mailbox)
            if why is not None:
                return Finding.of(kind, why)
        return None

    def _recorded(self, answer: dict[str, Any]) -> Rep:
        """The record of what a bench did; the process that tells it is not trusted.  Raises Died."""
        try:
            data = canonical(self.entry, bytes.fromhex(answer["record"]), recorded=True)
            clock_ns, wall_ns = map(int, answer["clocks"])
        except (KeyError, TypeError, ValueError) as e:
            raise Died("died", f"broke the protocol: an answer with a wrong {e!r:.100}") from None
        return Rep(self.entry.name, data, self.params, clock_ns, wall_ns)

    def report(self, finding: Finding | None, data: bytes) -> None:
        """Keep what is wrong with an input, unless it is nothing or known."""
        if finding is None or any(f.key == finding.key for f in self.result.findings):
            return
        kept = self._findings.keep(finding, data, self.verdicts_of(finding))
        if not any(f.key == kept.key for f in self.result.findings):
            self.result.findings.append(kept)
            self.say(f"{kept.name}: {kept.why} ({self.plan.crashes / kept.name})")

    # -- judging

    def blocks_of(self, inputs: Sequence[bytes]) -> list[set[int]]:
        """The blocks that each input reaches, none for one that shows a finding.  Raises Died."""
        found: list[set[int]] = []
        for start in range(0, len(inputs), _INPUTS_PER_REQUEST):
            batch = [data.hex() for data in inputs[start : start + _INPUTS_PER_REQUEST]]
            answer = self.judge.do({"mode": "exact", "inputs": batch})
            known = range(len(self.result.blocks))
            for blocks, finding in zip(answer["blocks"], answer["found"], strict=True):
                found.append({n for n in blocks if n in known} if finding is None else set())
        return found

    def verdicts_of(self, finding: Finding) -> Verdicts:
        """What can show `finding` again."""
        return self._disagreements if finding.kind in COMPARED else self.verdicts

    def _disagreements(self, inputs: Sequence[bytes]) -> list[Finding | None]:
        found: list[Finding | None] = []
        for data in inputs:
            try:
                found.append(self.compare(data))
            except Died:
                self.judge.again()
                found.append(None)
        return found

    def verdict(self, data: bytes) -> Finding | None:
        """What is wrong with an input, by itself and behind the real wire."""
        finding = self._judged(data)
        if finding is None:
            try:
                finding = self.compare(data)
            except Died as death:
                self.judge.again()
                return Finding.of(death.kind, death.why)
        return finding

    def _judged(self, data: bytes) -> Finding | None:
        """What a process of its own finds in an input."""
        return self.verdicts([data])[0]

    def verdicts(self, inputs: Sequence[bytes]) -> list[Finding | None]:
        """What is wrong with each input, as a fresh process finds it."""
        found: list[Finding | None] = []
        for start in range(0, len(inputs), _INPUTS_PER_REQUEST):
            batch = inputs[start : start + _INPUTS_PER_REQUEST]
            try:
                answer = self.judge.do({"mode": "exact", "inputs": [data.hex() for data in batch]})
                found += [Finding.told(item) for item in answer["found"]]
            except Died as death:
                self.judge.again()
                if len(batch) == 1:
                    found.append(Finding.of(death.kind, death.why))
                else:  # which of them it was is found out one by one
                    found += [verdict for data in batch for verdict in self.verdicts([data])]
        return found

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the campaign in order, the second at once."""

        def stop(*_: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


_START: Final = {"clock": Rep("", b"").clock_ns, "wall": Rep("", b"").wall_ns}
