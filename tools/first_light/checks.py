"""Runs checks: each a process of its own (or several, one after the other) under its own time limit, and writes what is
known to first_light.json and README.md after every one."""
import concurrent.futures
import ctypes
import dataclasses
import datetime
import os
import pathlib
import signal
import subprocess
import threading
import time

from . import parse, report

PASSED, FAILED, TIMED_OUT, NOT_RUN = report.STATUSES
NOT_REACHED = "not reached when the run ended"
MOST_OUTPUT = 8 << 20  # bytes of a process's output that are read back
TAIL = 3000            # characters of it that the JSON keeps
MOST_WAIT = 20         # seconds that a stage waits for what prepares it


class Failed(Exception):
    """A check that ran and did not find what it should. errors: the lines that say so."""

    def __init__(self, *errors, figures=None):
        super().__init__(*errors)
        self.errors, self.figures = list(errors), figures or {}


class TimedOut(Failed):
    """A check that was stopped by its time limit."""


class NotRun(Exception):
    """A check that this machine cannot run (the message names what is missing), or had no time to finish."""

    def __init__(self, reason, figures=None):
        super().__init__(reason)
        self.figures = figures or {}


def needed(path):
    if not path.exists():
        raise NotRun(f"{path.name} is missing: {path}")
    return path


@dataclasses.dataclass
class Command:
    """One process of a check. Without `check`, the check looks at the exit status itself."""
    words: list
    environment: dict = dataclasses.field(default_factory=dict)
    folder: pathlib.Path = None  # where it runs
    check: bool = True           # fails the check unless it ends with status 0
    silence: float = None        # seconds without output after which it counts as hanging
    grace: float = 0             # seconds between SIGTERM and SIGKILL when its time is over


@dataclasses.dataclass
class Outcome:
    status: int      # exit status; negative: the signal that ended it
    output: str      # stdout and stderr together
    seconds: float
    stopped: str     # "", or why it was stopped
    command: Command

    def said(self):
        """How it ended, in words, and the first lines that look like errors."""
        if self.stopped:
            end = self.stopped
        elif self.status < 0:
            end = f"ended by {signal.Signals(-self.status).name}"
        else:
            end = f"exit status {self.status}"
        return [end, *parse.error_lines(self.output)]


@dataclasses.dataclass
class Check:
    """What is to be found out. body(): a generator that yields Commands, is sent an Outcome for each, and returns a
    dict of figures; or it raises Failed or NotRun."""
    name: str
    body: object
    estimate: float           # seconds
    limit: float              # seconds, after which it is killed
    background: bool = False  # prepares its stage: runs beside the stages before it


@dataclasses.dataclass
class Stage:
    name: str
    checks: list
    share: float          # of the run's minutes that its checks may take before other stages have had theirs
    beside: bool = False  # its checks may run side by side
    fills: bool = False   # takes what time is left, when the checks that had to wait have had theirs


libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_this_process():
    """Called in a child: the kernel kills it when this tool is killed. Where a kernel cannot, it goes on."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


class Runner:
    """Runs the checks of some stages until `deadline` (of time.monotonic) and keeps `record`, what is known so far.

    record: {"machine": {...}, "checks": [{"stage", "name", "status", "reason", "seconds", ...}], ...}
    """

    def __init__(self, out, record, deadline, minutes, jobs=1, environment=None, say=print, learn=None, hide=None):
        self.out, self.record, self.deadline, self.minutes = out, record, deadline, minutes
        self.jobs, self.environment, self.say = jobs, environment or {}, say
        self.learn = learn or (lambda record: None)  # takes from the checks what the page's head says
        self.lock = threading.RLock()
        # Paths of this machine and their names in the report, the longest first.
        self.hide = sorted((hide or {}).items(), key=lambda item: -len(item[0]))
        self.stopping = False
        self.background_end = deadline
        (out / "logs").mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------ the record
    def entry(self, stage, check):
        for entry in self.record["checks"]:
            if (entry["stage"], entry["name"]) == (stage.name, check.name):
                return entry
        entry = {"stage": stage.name, "name": check.name}
        self.record["checks"].append(entry)
        return entry

    def note(self, entry, **facts):
        with self.lock:
            entry.update(self.without_paths(facts))
            self.write()

    def without_paths(self, x):
        """What goes into a report is to be read elsewhere: paths are told from the checkout's or bundle's root."""
        if isinstance(x, dict):
            return {key: self.without_paths(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [self.without_paths(value) for value in x]
        if isinstance(x, str):
            for path, name in self.hide:
                x = x.replace(path, name)
        return x

    def plan(self, stages):
        """Every check stands in the record from the start, as one that was not reached."""
        for stage in stages:
            for check in stage.checks:
                entry = self.entry(stage, check)
                entry.clear()
                entry.update(stage=stage.name, name=check.name, status=NOT_RUN, reason=NOT_REACHED,
                             estimate=check.estimate, limit=check.limit)
        self.write()

    def write(self):
        with self.lock:
            self.record["written"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self.learn(self.record)
            report.write(self.out, self.record)

    # ------------------------------------------------------------------------------------------------ one check
    def run_check(self, stage, check):
        entry = self.entry(stage, check)
        self.note(entry, reason="running when the run ended")
        log = self.out / "logs" / f"{stage.name}.{check.name}.log".replace("/", "_").replace(" ", "_")
        log.unlink(missing_ok=True)
        start = time.monotonic()
        commands, last = [], None
        result = {"status": PASSED, "reason": "", "errors": [], "figures": {}}
        body = check.body()
        try:
            command = next(body)
            while True:
                commands.append(" ".join(map(str, command.words)))
                last = self.run_command(command, log, start + check.limit, check.background)
                if command.check and (last.status != 0 or last.stopped):
                    raise (TimedOut if last.stopped else Failed)(*last.said())
                command = body.send(last)
        except StopIteration as done:
            result["figures"] = done.value or {}
        except NotRun as reason:
            result.update(status=NOT_RUN, reason=str(reason), figures=reason.figures)
        except Failed as failure:
            result.update(status=TIMED_OUT if isinstance(failure, TimedOut) else FAILED, errors=failure.errors,
                          figures=failure.figures)
        except Exception as error:  # of the check itself, which must not end the run
            result.update(status=FAILED, errors=[f"{type(error).__name__}: {error}"])
        finally:
            body.close()
        cut = last.stopped if last and check.background else "stopped with the run" if self.stopping else ""
        if cut and result["status"] in (FAILED, TIMED_OUT):
            result.update(status=NOT_RUN, reason=cut, errors=[])
        if last:
            result.update(tail=last.output[-TAIL:], log=str(log.relative_to(self.out)))
        self.note(entry, **result, commands=commands, seconds=round(time.monotonic() - start, 2))
        said = entry["reason"] or "; ".join(entry["errors"][:2])
        self.say(f"{entry['status']:9}  {entry['seconds']:6.1f} s  {stage.name}/{check.name}"
                 + (f": {said}" if said else ""))

    def run_command(self, command, log, limit, background):
        words = [str(word) for word in command.words]
        if self.stopping:
            return Outcome(-signal.SIGTERM, "", 0, "stopped with the run", command)
        with open(log, "ab") as stream:
            stream.write(f"$ {' '.join(words)}\n".encode())
            stream.flush()
            begin = stream.tell()
            start = time.monotonic()
            try:
                process = subprocess.Popen(words, env={**os.environ, **self.environment, **command.environment},
                                           cwd=command.folder, stdin=subprocess.DEVNULL, stdout=stream,
                                           stderr=subprocess.STDOUT, start_new_session=True,
                                           preexec_fn=end_with_this_process)
            except OSError as error:
                raise NotRun(f"{words[0]}: {error.strerror}") from error
            try:
                stopped = self.wait(process, command, log, limit, background)
            finally:
                kill_group(process, signal.SIGKILL)  # and what it started, if that is still there
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:  # inside a driver's call that does not return
                    stopped += " (it does not end when it is killed)"
        with open(log, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(begin, size - MOST_OUTPUT))
            output = stream.read().decode(errors="replace")
        status = -signal.SIGKILL if process.returncode is None else process.returncode
        return Outcome(status, output, time.monotonic() - start, stopped, command)

    def wait(self, process, command, log, limit, background):
        """Waits until it ends or has to. Returns why it was stopped, or "". limit: of the check."""
        size, grown, pause = -1, time.monotonic(), 0.005
        while process.poll() is None:
            now = time.monotonic()
            reason = ""
            if self.stopping:
                reason = "stopped with the run"
            elif now >= self.deadline - command.grace:
                reason = "stopped: the run's time was over"
            elif background and now >= self.background_end:
                reason = "stopped: the stage that it prepares began"
            elif now >= limit - command.grace:
                reason = "stopped: its time limit was over"
            elif command.silence:
                if (length := log.stat().st_size) != size:
                    size, grown = length, now
                elif now - grown > command.silence:
                    reason = f"stopped: it said nothing for {command.silence:.0f} s"
            if reason:
                if command.grace:
                    kill_group(process, signal.SIGTERM)
                    try:
                        process.wait(command.grace)
                    except subprocess.TimeoutExpired:
                        pass
                return reason
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)
        return ""

    def stop(self):
        """Ends what runs; checks that have not begun stay "not run"."""
        self.stopping = True

    # ------------------------------------------------------------------------------------------------ all of them
    def run(self, stages):
        self.plan(stages)
        late = []  # (stage, check) that had to wait for other stages' shares
        with concurrent.futures.ThreadPoolExecutor(2 if self.jobs > 1 else 1) as behind:
            prepared = [behind.submit(self.start, stage, check, self.deadline)
                        for stage in stages for check in stage.checks if check.background]
            for stage in stages:
                checks = [check for check in stage.checks if not check.background]
                if not checks:
                    continue
                if any(check.background for check in stage.checks):
                    self.background_end = min(self.deadline, time.monotonic() + MOST_WAIT)
                    concurrent.futures.wait(prepared)
                if stage.fills:
                    self.run_late(late)
                end = min(self.deadline, time.monotonic() + 60 * self.minutes * stage.share)
                with concurrent.futures.ThreadPoolExecutor(self.jobs if stage.beside else 1) as pool:
                    for waits in pool.map(lambda check: self.start(stage, check, end), checks):
                        late += waits
            self.run_late(late)
        self.record["finished"] = not self.stopping
        self.write()

    def run_late(self, late):
        while late:
            self.start(*late.pop(0), self.deadline)

    def start(self, stage, check, end):
        """Runs a check if there is time for it before `end`. Returns [(stage, check)] when only its stage has none."""
        if self.stopping:
            return []
        now = time.monotonic()
        if check.background:
            end = min(end, self.background_end)
        if now + check.estimate <= end:
            self.run_check(stage, check)
            return []
        reason = (f"no time: it takes about {check.estimate:.0f} s, and {max(0, self.deadline - now):.0f} s were left "
                  f"of the run's minutes")
        if end < self.deadline:
            reason += f", {max(0, end - now):.0f} s of its stage's share"
        self.note(self.entry(stage, check), reason=reason)
        return [(stage, check)] if end < self.deadline and not check.background else []
