"""os.fork() after use, and the end of a process: inherited memory is read and never changed, and nothing hangs."""

from collections.abc import Callable

RunPython = Callable[..., str]

_PRELUDE = """
import atexit, os, sys, threading, warnings
os.environ.pop("TORCH_VTENSOR_IDLE_SECONDS")  # idle memory is watched, as in a user's process
import torch
from torch_vtensor.allocator.growth import GrowthScheduler
from torch_vtensor.allocator.host_driver import HostDriver
from torch_vtensor.allocator.page_pool import PagePool
from torch_vtensor.allocator.pools import all_schedulers, default_scheduler
from torch_vtensor.allocator.vtensor import VTensor
from torch_vtensor.errors import ForkedProcessError

torch.set_num_threads(1)  # GNU OpenMP hangs in a child whose parent has run on several threads
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of threads at every fork
scheduler = default_scheduler(torch.device("cpu"))

def make(rows, value=1.0):
    vtensor = VTensor((1000,), capacity=1000, first_rows=rows)
    vtensor.append(torch.full((rows, 1000), value))
    return vtensor

def refused(use):
    try:
        use()
    except ForkedProcessError as error:
        assert "before fork() and belongs to the parent" in str(error) and "Make a new" in str(error), error
    else:
        raise AssertionError("the child changed memory of the parent")

def in_child(work):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        work()
        print("child done", flush=True)
        sys.exit(0)  # through atexit and all finalizers
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}"
"""


def test_a_child_reads_but_never_changes_what_it_inherits(run_python: RunPython) -> None:
    script = """
vtensor, view = make(100), make(50, 5.0).tensor()
vtensor.commit(300)  # room to write in, without a new page
make(200, 9.0).close()  # parked
closed = make(10)
make(3).commit_ahead(500)

def child():
    assert vtensor.tensor().sum() == 100_000 and view.sum() == 250_000
    refused(lambda: vtensor.append(torch.zeros(1, 1000)))  # inside what is committed
    refused(lambda: vtensor.append(torch.zeros(400, 1000)))
    refused(lambda: vtensor.commit(900))
    refused(lambda: vtensor.commit_ahead(900))
    refused(vtensor.fork)
    refused(lambda: VTensor((1000,), capacity=1000, first_rows=200, scheduler=scheduler))  # nor what is parked
    vtensor.truncate(20)
    refused(lambda: vtensor.append(torch.zeros(5, 1000)))
    assert scheduler.trim() == scheduler.pool.trim() == 0
    closed.close()
    vtensor.close()

in_child(child)
parked = make(200, 7.0)  # adopts what was parked when the child was made
in_child(lambda: scheduler.trim())
assert vtensor.length == 100 and vtensor.tensor().sum() == 100_000 and view.sum() == 250_000
assert parked.tensor().unique().tolist() == [7.0] and closed.tensor().sum() == 10_000
assert vtensor.append(torch.zeros(500, 1000)).sum() == 100_000
scheduler.pool.check_integrity()
del vtensor, view, closed, parked
scheduler.settle()
scheduler.trim()
assert scheduler.stats().committed_bytes == scheduler.pool.driver.inner.physical_bytes() == 0
print("parent done")
"""
    assert run_python(_PRELUDE + script).split("\n") == ["child done", "child done", "parent done", ""]


def test_a_child_has_memory_of_its_own(run_python: RunPython) -> None:
    script = """
mine = make(100)

def grandchild():
    refused(lambda: inner.append(torch.zeros(900, 1000)))
    assert make(5, 3.0).tensor().sum() == 15_000 and inner.tensor().sum() == 400_000

def child():
    global inner
    assert default_scheduler(torch.device("cpu")) is not scheduler
    inner = make(200, 2.0)
    inner.commit_ahead(500)
    own = default_scheduler(torch.device("cpu"))
    own.settle()
    assert inner.committed >= 500 and own.stats().live_bytes >= 500 * 4000
    in_child(grandchild)
    assert inner.append(torch.zeros(600, 1000)).sum() == 400_000
    inner.close()
    assert own.trim() > 0 and own.stats().committed_bytes == 0
    assert mine.tensor().sum() == 100_000

before = scheduler.pool.driver.inner.physical_bytes()
in_child(child)
assert scheduler.pool.driver.inner.physical_bytes() == before == scheduler.stats().committed_bytes
assert mine.append(torch.ones(1, 1000)).sum() == 101_000
"""
    assert run_python(_PRELUDE + script).split("\n") == ["child done", "child done", ""]


def test_a_child_made_while_another_thread_works_does_not_hang(run_python: RunPython) -> None:
    script = """
mine, held, go_on = make(10), threading.Event(), threading.Event()

def hold():
    with scheduler.pool.lock:
        held.set()
        go_on.wait()

scheduler.run_soon(hold)
held.wait()

def child():
    assert scheduler.stats().live_bytes > 0
    refused(mine.fork)
    mine.close()
    assert make(20).tensor().sum() == 20_000

in_child(child)
go_on.set()
scheduler.settle()
assert mine.append(torch.ones(5, 1000)).sum() == 15_000
"""
    assert run_python(_PRELUDE + script) == "child done\n"


def ends_quietly(run_python: RunPython, state: str) -> bool:
    """Run ``state`` in a process of its own; True if the process ended well and without a word."""
    early = "import atexit\nlast = []\natexit.register(lambda: [use() for use in last])  # after everyone else's\n"
    quiet = "\nimport sys; sys.stderr.flush(); os.dup2(1, 2)"  # what is written to stderr from here on is output
    return run_python(early + _PRELUDE + state + quiet) == ""


def test_a_process_may_end_with_live_tensors_and_pending_jobs(run_python: RunPython) -> None:
    state = """
class Late:
    def __del__(self):
        self.vtensor.close()

view = make(100).tensor()
kept = [make(10), make(20).fork()]
make(100).close()
cycle = [make(50)]
cycle += [cycle[0].tensor(), cycle]
late = Late()
late.vtensor, late.self = make(9), late
own = GrowthScheduler(PagePool(HostDriver()))
other = VTensor((9,), capacity=9, scheduler=own)
own.settle()
headless = make(100)
head = headless.tensor()
headless.drop_head(60)
headless.commit_ahead(900)
for rows in range(2, 900, 7):
    kept[0].commit_ahead(rows)
"""
    assert ends_quietly(run_python, state)


def test_tensors_can_be_used_until_the_very_end(run_python: RunPython) -> None:
    state = """
kept = make(30)
kept.commit_ahead(60)

def use():
    kept.commit_ahead(100)
    kept.append(torch.ones(800, 1000))
    kept.drop_head(500)
    scheduler.settle()
    kept.close()
    assert scheduler.trim() > 0

atexit.register(use)
kept_later = make(30)
last.append(lambda: kept_later.commit_ahead(100))
last.append(lambda: kept_later.append(torch.ones(800, 1000)))
last.append(lambda: kept_later.drop_head(500))
last.append(scheduler.settle)
last.append(kept_later.close)
last.append(scheduler.trim)
"""
    assert ends_quietly(run_python, state)
