"""Training by several processes, as torchrun starts them: the same losses, metrics and detections as by one; a killed
process; refusals. On CPUs, with one thread each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor, distributed, multiprocessing, nn

from lofi_fast.data import demo
from lofi_fast.encoder.shared_batchnorm import SharedStatistics
from lofi_fast.errors import InputError
from lofi_fast.head.loss import Counts
from lofi_fast.memory.meter import Memory
from lofi_fast.memory.ranks import SharedGauge
from lofi_fast.presets import configured
from lofi_fast.run import processes as run_processes
from lofi_fast.run.processes import Processes, check_alike, check_batches

ROOT = Path(__file__).resolve().parents[1]
# SGD and small steps: a unit of a tiny network that is zero to rounding lets its gradient through in one order of
# summation and not in another, and Adam would make a step of full size of any difference. The seed is one at which no
# unit does: with 2, and AVX2, a unit of the first stage and a choice within the head fall differently, and gradients
# behind these change by up to 7%, others by some 1e-5.
SETTINGS = [
    "--preset=demo", "--fidelity=8x32", "--width=8", "--batch=4", "--min-cut=1", "--max-cut=1", "--seed=3",
    "--device=cpu", "--threads=1", "--mem-budget=4GB",
    "--pretrain-epochs=1", "--pretrain.optimizer=sgd", "--pretrain.lr=0.002",
    "--joint-epochs=2", "--joint.optimizer=sgd", "--joint.lr=0.01",
    "--head-epochs=2", "--head-stage.optimizer=sgd", "--head-stage.lr=0.01", "--head-stage.ema=0.75",
]  # fmt: skip
ROUNDING = 1e-5  # of losses, relative: sums in fp32 in another order; 5e-7 was seen

Event = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@dataclass(frozen=True)
class Job:
    """A small training on a demo set: 6 videos to train on, so that an epoch's last step has only 2."""

    folder: Path

    def flags(self, name: str, *more: str) -> list[str]:
        data = [f"--{what}={self.folder / what}" for what in ("videos", "cache")]
        annotations = f"--annotations={self.folder / 'annotations.json'}"
        return [*data, annotations, *SETTINGS, "--out", str(self.folder / name), *more]

    def started(
        self, count: int, name: str, *more: str, program: str = "-m lofi_fast.train", restarts: int = 0
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        launcher += ["--max-restarts", str(restarts)]
        return self.launched(launcher if count > 1 else [], name, *more, program=program)

    @contextmanager
    def launched(
        self, launcher: Sequence[str], name: str, *more: str, program: str = "-m lofi_fast.train"
    ) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, *launcher, *program.split(), *self.flags(name, *more)]
        with subprocess.Popen(
            command, cwd=ROOT, text=True, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()

    def run(self, count: int, name: str, *more: str, program: str = "-m lofi_fast.train") -> Outcome:
        with self.started(count, name, *more, program=program) as process:
            return ended(process)

    def events(self, name: str, kind: str) -> list[Event]:
        path = self.folder / name / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def losses(self, name: str) -> dict[tuple[str, int, int], float]:
        """Of every step; of a step that was repeated, the last."""
        return {(e["stage"], e["epoch"], e["step"]): e["loss"] for e in self.events(name, "step")}

    def read(self, name: str, file: str) -> Any:
        return json.loads((self.folder / name / file).read_text())


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE)
    return Outcome(process.returncode, out, err)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """With a run by one process in the folder "one"."""
    folder = tmp_path_factory.mktemp("ranks")
    annotations, videos = demo.generate(folder, num_training=6, num_validation=3, seed=1)
    (folder / "annotations.json").symlink_to(annotations)
    (folder / "videos").symlink_to(videos)
    job = Job(folder)
    done = job.run(1, "one")
    assert done.status == 0, done.err
    return job


def same_losses(job: Job, name: str, one: str = "one", rounding: float = ROUNDING) -> None:
    expected, found = job.losses(one), job.losses(name)
    assert list(found) == list(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=rounding), step


def same_detections(job: Job, name: str, one: str = "one") -> None:
    """No video twice or lost; each detection has its own of the single process, and metrics are equal."""
    expected, found = (job.read(run, "predictions.json")["results"] for run in (one, name))
    assert list(found) == list(expected)
    for video, detections in expected.items():
        assert len(found[video]) == len(detections)
        for expected_one, other in zip(detections, found[video], strict=True):
            assert other["score"] == pytest.approx(expected_one["score"], abs=1e-4)
    assert job.read(name, "metrics.json")["average_map"] == pytest.approx(job.read(one, "metrics.json")["average_map"])


RAN_OUT = """
import os, sys
from lofi_fast.stages import step
from lofi_fast.train import main

whole, calls = step.forward_backward, []


def fails_once(run, batch, decision, **how):
    done = whole(run, batch, decision, **how)
    if not how:
        calls.append(decision.step)
        if run.processes.rank == 1 and len(calls) == 2:
            raise MemoryError("out of memory, as the test wants it")
    return done


step.forward_backward = fails_once
if __name__ == "__main__":
    sys.exit(main())
"""


IN_FLOAT64 = """
import sys
import torch

torch.set_default_dtype(torch.float64)
as_float32 = torch.Tensor.float  # which only the mean of the frames stays, as its kernel asks for
torch.Tensor.float = lambda tensor: as_float32(tensor) if tensor.shape == (3,) else tensor.double()
from lofi_fast.train import main

if __name__ == "__main__":
    sys.exit(main())
"""


def trained_as_one(job: Job, name: str, done: Outcome, one: str = "one", rounding: float = ROUNDING) -> None:
    assert done.status == 0, done.err
    same_losses(job, name, one, rounding)
    same_detections(job, name, one)
    assert done.out.count("head 2/2: mAP") == 1, "one of them speaks"
    assert len(job.events(name, "start")) == 1, "and logs"
    made, expected = ({path.stem for path in (job.folder / of / "features").glob("*.npy")} for of in (name, one))
    assert made == expected


def test_four_processes_train_as_one_in_float64_with_the_optimisers_of_the_preset(job: Job) -> None:
    """They share steps of four videos and of two, of which two have no part. In float64 nothing but a fault can grow to
    be seen, whatever the optimiser makes of it.
    """
    program = job.folder / "float64.py"
    program.write_text(IN_FLOAT64)
    stages = ("pretrain", "joint", "head-stage")
    own = [flag for stage in stages for flag in (f"--{stage}.optimizer=adamw", f"--{stage}.lr=0.002")]
    alone = job.run(1, "one64", *own, program=str(program))
    assert alone.status == 0, alone.err
    trained_as_one(job, "four", job.run(4, "four", *own, program=str(program)), "one64", 1e-11)
    assert {event["micro_batch"] for event in job.events("four", "step") if event["stage"] == "joint"} == {1}


def test_two_processes_train_as_one_where_memory_runs_out_in_one_of_them(job: Job) -> None:
    program = job.folder / "ran_out.py"
    program.write_text(RAN_OUT)
    trained_as_one(job, "two", job.run(2, "two", program=str(program)))
    (failed,) = job.events("two", "out_of_memory")
    assert (failed["stage"], failed["epoch"], failed["step"]) == ("joint", 0, 1)
    assert "process 1 of 2: out of memory" in failed["reason"]
    steps = [event for event in job.events("two", "step") if event["stage"] == "joint"]
    assert [event.get("retries", 0) for event in steps] == [0, 1, 0, 0], "each step once in the log, none lost"


def test_two_agents_with_a_process_each_train_as_one_agent_with_two(job: Job) -> None:
    """The command that docs/scale.md gives for two machines, both on this one: the same numbers, and one of the two
    processes speaks and writes.
    """
    flags = ["--stages=joint,head,eval", "--joint-epochs=1", "--head-epochs=1"]
    together = job.run(2, "together", *flags)
    assert together.status == 0, together.err
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "agents"]
    with job.launched(launcher, "agents", *flags) as first, job.launched(launcher, "agents", *flags) as second:
        outcomes = [ended(first), ended(second)]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert sum(outcome.out.count("head 1/1: mAP") for outcome in outcomes) == 1
    assert len(job.events("agents", "start")) == 1
    assert job.losses("agents") == job.losses("together")
    for file in ("predictions.json", "metrics.json"):
        assert job.read("agents", file) == job.read("together", file)


def send_in_joint(job: Job, name: str, process: subprocess.Popen[str], number: signal.Signals, rank: int) -> None:
    """Send a signal to one of torchrun's processes once the joint stage has made a step."""
    deadline = time.monotonic() + PATIENCE
    while not any(event["stage"] == "joint" for event in job.events(name, "step")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child(process.pid, f"RANK={rank}"), number)


def test_a_killed_process_ends_all_and_another_number_goes_on(job: Job) -> None:
    with job.started(2, "killed") as process:
        send_in_joint(job, "killed", process, signal.SIGKILL, rank=1)
        done = ended(process)
    assert done.status != 0
    assert not (job.folder / "killed" / "metrics.json").exists()
    saved = job.events("killed", "saved")[-1]
    last = job.events("killed", "step")[-1]
    assert saved["stage"] in ("joint", "head") and (saved["epoch"], saved["step"]) >= (last["epoch"], last["step"])
    done = job.run(1, "killed", "--resume")
    assert done.status == 0, done.err
    same_losses(job, "killed")
    same_detections(job, "killed")


def test_when_the_first_process_is_killed_another_saves_and_torchrun_goes_on_from_there(job: Job) -> None:
    with job.started(2, "restarted", restarts=1) as process:
        send_in_joint(job, "restarted", process, signal.SIGKILL, rank=0)
        done = ended(process)
    assert done.status == 0, done.err
    assert "process 0 has ended: process 1 saves in its place" in done.out
    assert "resuming at joint" in done.out and "resuming at joint, epoch 1, step 1\n" not in done.out
    same_losses(job, "restarted")
    same_detections(job, "restarted")


def test_one_process_that_is_told_to_stop_stops_all_and_none_takes_the_training_for_done(job: Job) -> None:
    with job.started(2, "told") as process:
        send_in_joint(job, "told", process, signal.SIGTERM, rank=1)
        done = ended(process)
    assert done.status == 0, done.err
    assert (
        f"stopped by a signal to another process; go on with: lofi-fast train --resume {job.folder / 'told'}"
        in done.out
    )
    assert not job.events("told", "done") and not (job.folder / "told" / "model.safetensors").exists()
    done = job.run(1, "told", "--resume")
    assert done.status == 0, done.err
    same_losses(job, "told")
    same_detections(job, "told")


def test_two_processes_share_the_videos_of_detect(job: Job) -> None:
    """One of the videos cannot be used, and is named once, whoever looked at it."""
    videos = job.folder / "new"
    videos.mkdir()
    for video in sorted((job.folder / "videos").iterdir())[:3]:
        (videos / video.name).symlink_to(video.resolve())
    (videos / "broken.mp4").write_bytes(b"no video")
    made = {}
    for count, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        out = job.folder / f"found{count}"
        command = [sys.executable, *launcher, "-m", "lofi_fast.detect", str(job.folder / "one"), str(videos)]
        done = subprocess.run(
            [*command, "--device=cpu", "--threads=1", "--out", str(out)], cwd=ROOT, env=environment(),
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == (1 if count == 1 else 0), done.stderr
        assert "3 of 4 videos are done, 1 skipped" in done.stdout
        assert done.stdout.count("skipped: ") == 1 and "broken.mp4" in done.stdout
        made[count] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert made[2] == made[1] and {"detections.json", "detections.csv"} <= made[1].keys() and len(made[1]) == 11


FAILS = """
import sys
from lofi_fast.stages import head, pretrain
from lofi_fast.train import main

whole, load, fallen = pretrain.clip_loss, head.load_features, []


def falls(*_):
    if not fallen:
        fallen.append(True)
        raise MemoryError("out of memory, as the test wants it")


def clip_loss(run, *arguments, **how):
    if run.processes.rank == 1 and not fallen:
        run.encoder.layer3[0].register_forward_hook(falls)
    return whole(run, *arguments, **how)


def load_features(run, samples):
    if run.processes.rank == 1:
        raise MemoryError("out of memory, as the test wants it")
    return load(run, samples)


pretrain.clip_loss, head.load_features = clip_loss, load_features
if __name__ == "__main__":
    sys.exit(main())
"""


def test_memory_that_runs_out_in_one_process_in_pretraining_or_in_the_head(job: Job) -> None:
    """In the first step of pretraining, between two layers where the others wait for it: all take half the clips. In
    the head, which has no smaller step: all end, with one sentence.
    """
    program = job.folder / "fails.py"
    program.write_text(FAILS)
    done = job.run(2, "fails", "--stages=pretrain,head", program=str(program))
    assert "from the first step on" in done.out
    first, second = (e for e in job.events("fails", "measured") if e["plan"] == "pretrain, clips a step")
    assert first["peak"] is None and second["peak"] and int(second["candidate"]) == int(first["candidate"]) // 2
    assert any(event["stage"] == "pretrain" for event in job.events("fails", "step"))
    assert done.status != 0
    (sentence,) = done.sentences
    assert "memory ran out outside the planned steps" in sentence and "process 1 of 2" in sentence
    assert "Traceback" not in done.err.partition("elastic")[0]


BESIDE_ANOTHER = """
import os, sys
from dataclasses import replace
from lofi_fast.memory.cpu import CpuMeter
from lofi_fast.stages import joint
from lofi_fast.train import main

whole, take, plans, most = CpuMeter.reading, joint.lofi_step, [], [0]


def lofi_step(run, *arguments):
    taken = take(run, *arguments)
    plans.append(f"{taken.decision.plan}\\n")
    run.folder.joinpath(f"plans{os.environ['RANK']}").write_text("".join(plans))
    return taken


def reading(meter):
    memory = whole(meter)
    most[0] = max(most[0], memory.held)
    if os.environ["RANK"] == "0" or len(plans) < 2:
        return memory
    # What is free is shared by the two: 25 MB beyond what was held are enough for the lowest rung alone.
    return replace(memory, own=memory.held, free=2 * (most[0] - memory.held + 25_000_000))


joint.lofi_step, CpuMeter.reading = lofi_step, reading
if __name__ == "__main__":
    sys.exit(main())
"""


def test_another_program_beside_one_of_two_processes_pulls_both_down_once(job: Job) -> None:
    program = job.folder / "beside.py"
    program.write_text(BESIDE_ANOTHER)
    flags = ["--stages=joint", "--joint-epochs=3", "--fidelity=16x64", "--width=16", "--max-cut=16"]
    done = job.run(2, "beside", *flags, "--pattern=spatial", program=str(program))
    assert done.status == 0, done.err
    first, second = (job.folder.joinpath("beside", f"plans{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second and len(first) == 6
    steps = job.events("beside", "step")
    sides = [step["side"] for step in steps]
    assert sides[:2] == [64, 64] and max(sides[2:]) < 64, "before the other program came, and beside it"
    assert len(set(sides[2:])) == 1, "both go down once"
    assert not job.events("beside", "out_of_memory")
    assert all(step["peak"] <= step["limit"] for step in steps)


HANGS = """
import os, signal, sys
from lofi_fast.command import run
from lofi_fast.memory import ranks
from lofi_fast.run.processes import opened

ranks.TIMEOUT_SECONDS = 8.0


def main():
    with opened() as processes:
        processes.together("start", lambda: None, patient=True)
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        processes.together("work", lambda: None, patient=sys.argv[1] == "patient")


sys.exit(run(main))
"""


def test_a_process_that_hangs_is_told_of(tmp_path: Path) -> None:
    """Within a step by the time-out of the exchange, elsewhere by its heartbeat."""
    program = tmp_path / "hangs.py"
    program.write_text(HANGS)
    began, running = time.monotonic(), []
    for how in ("step", "patient"):
        port = str(free_port())
        for rank in ("0", "1"):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
            running.append(
                subprocess.Popen(
                    [sys.executable, str(program), how], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                    env=environment(**variables, MASTER_ADDR="localhost"),
                )
            )  # fmt: skip
    try:
        in_step, _, patient, _ = running
        for process, said in ((in_step, "process 0 has lost another"), (patient, "process 1 of 2 has not been heard")):
            _, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 2, err
            (sentence,) = [line for line in err.splitlines() if line.startswith("error:")]
            assert said in sentence
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert time.monotonic() - began < 300, "PyTorch itself waits for 30 minutes"


def child(parent: int, variable: str) -> int:
    """The process that another one has started with a variable of its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found = variable.encode() in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if started_by == parent and found:
            return int(path.name)
    raise AssertionError(f"no child of {parent} with {variable}")


# Refusals


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


def by_hand(job: Job, name: str, port: int, *flags: list[str]) -> list[Outcome]:
    """One process for each list of further flags, as torchrun would start them."""
    running = []
    for rank, more in enumerate(flags):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(flags))}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "lofi_fast.train", *job.flags(name, *more)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment(**variables), **pipes))
    return [ended(process) for process in running]


def refused(job: Job, name: str, outcomes: list[Outcome], *parts: str) -> None:
    assert [outcome.status for outcome in outcomes] == [2] * len(outcomes)
    (sentence,) = outcomes[0].sentences
    assert all(part in sentence for part in parts), sentence
    assert all(not outcome.sentences and "Traceback" not in outcome.err for outcome in outcomes[1:])
    assert not (job.folder / name).exists()


def test_other_settings(job: Job) -> None:
    outcomes = by_hand(job, "other", free_port(), [], ["--joint-lr", "0.5"])
    refused(job, "other", outcomes, "process 1 of 2", "--joint-lr 0.5", "0.01", "same settings")


def test_other_data(job: Job) -> None:
    labels = json.loads((job.folder / "annotations.json").read_text())
    next(iter(labels["database"].values()))["annotations"].pop()
    (job.folder / "others.json").write_text(json.dumps(labels))
    outcomes = by_hand(job, "data", free_port(), [], [f"--annotations={job.folder / 'others.json'}"])
    refused(job, "data", outcomes, "process 1 of 2 sees other data", "has other segments")


def test_more_processes_than_videos_in_a_step() -> None:
    with pytest.raises(InputError, match=r"4 processes share steps of 2 \(--batch\): start at most 2"):
        check_batches(Processes(0, 4), {"--pretrain.batch": 16, "--batch": 2})


def test_a_port_in_use(job: Job) -> None:
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        done = subprocess.run(
            [sys.executable, "-m", "lofi_fast.train", *job.flags("port")], cwd=ROOT, capture_output=True, text=True,
            env=environment(**variables, MASTER_PORT=str(port)), timeout=PATIENCE, check=False,
        )  # fmt: skip
    refused(job, "port", [Outcome(done.returncode, done.stdout, done.stderr)], f"localhost:{port}", "--standalone")


# The parts


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 4, 7, 16])
def test_shares_are_all_of_it_and_even(size: int, count: int) -> None:
    shares = [Processes(rank, count).share(range(size)) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(size))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) == Processes(0, count).largest_share(size)


def test_counts_of_parts_add_up() -> None:
    parts = [Counts((1, 2), (3, 4), (5, 6), (7, 8), 9), Counts((10, 20), (30, 40), (50, 60), (70, 80), 90)]
    assert parts[0] + parts[1] == Counts((11, 22), (33, 44), (55, 66), (77, 88), 99)


SIZES = (5, 3, 0)  # samples of each process; one has none


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    for module in (net[1], net[4]):
        nn.init.uniform_(module.weight, -1, 1)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def passed(net: nn.Sequential, x_NCHW: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(output, gradients, buffers) of two training steps that update nothing but statistics."""
    for _ in range(2):
        net.zero_grad()
        output = net(x_NCHW)
        (output.sin() * torch.linspace(0, 1, 5).view(1, 5, 1, 1)).sum().backward()
    return output.detach(), [p.grad for p in net.parameters() if p.grad is not None], list(net.buffers())


def inputs() -> Tensor:
    x = torch.randn(sum(SIZES), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return 3 + x.to(memory_format=torch.channels_last)


class Reader:
    """A meter of made-up readings."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def total(self) -> int:
        return 100

    def reading(self) -> Memory:
        if self.memory.held < 0:
            raise OSError("no such reading")
        return self.memory

    def held(self) -> int:
        return self.reading().held


def one_of_three(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    net = network()
    processes = Processes(rank, 3)
    SharedStatistics(net, processes.stack)
    output, grads, buffers = passed(net, inputs().split(SIZES)[rank])
    for layers in (1, 4, 5):  # before a layer that waits for the others, and after the last one
        net_of_failing = network()
        shared = SharedStatistics(net_of_failing, processes.stack)
        with pytest.raises(MemoryError, match="out of memory" if rank == 1 else "process 1 has failed"), shared.step():
            net_of_failing[: layers if rank == 1 else 5](inputs().split(SIZES)[rank]).sum().backward()
            if rank == 1:
                _ran_out()
    parameters = list(net.parameters())
    if rank == 2:
        parameters[0].grad = None  # as of a process that had nothing to do
    processes.add_gradients(parameters, processes.new_bucket(parameters, torch.device("cpu")))
    grads = [p.grad for p in parameters if p.grad is not None]

    # The first holds most; the second has least left to add; in the third memory runs out.
    reader = Reader(Memory(own=(50, 30, 20)[rank], held=(40, 30, 20)[rank], free=(20, 5, 60)[rank]))
    gauge = SharedGauge(reader, lambda: 10, sharers=1)
    told: dict[str, Any] = {"memory": gauge.reading(), "held": gauge.held(), "total": gauge.total()}
    told["peak"] = gauge.peak_of_all((45, 33, 22)[rank])
    told["ran out"] = gauge.peak_of_all((45, 33, None)[rank])
    reader.memory = Memory(1, 1 - 2 * rank, 1)
    with pytest.raises(RuntimeError):
        gauge.reading()
    with pytest.raises(MemoryError):
        processes.together("work that fails in one", _ran_out if rank == 1 else lambda: 0)
    with pytest.raises(InputError, match="process 1 of 3: bad" if rank != 1 else "bad"):
        processes.together("bad input in one", _bad_input if rank == 1 else lambda: 0)
    with pytest.MonkeyPatch.context() as patch:  # the third has other code, the second has a GPU
        patch.setattr(run_processes, "_code", lambda: f"0.2.0 ({'beef' if rank == 2 else 'cafe'})")
        with pytest.raises(InputError, match=r"process 2 of 3 runs lofi_fast 0.2.0 \(beef\), and process 0 .*cafe"):
            check_alike(processes, configured({}, cuda=lambda: False))
        patch.setattr(run_processes, "choose_device", lambda _: torch.device("cuda" if rank == 1 else "cpu"))
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda _: None)
        with pytest.raises(InputError, match="process 1 of 3 computes on a GPU and process 0 on the CPU"):
            processes.device("auto")
    torch.save({"output": output, "grads": grads, "buffers": buffers, "told": repr(told)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _ran_out() -> int:
    raise MemoryError("out of memory")


def _bad_input() -> int:
    raise InputError("bad")


def meet_and_leave(rank: int, port: int) -> None:
    """One of two, with a Processes that outlives the meeting, as that of a failed run does in its traceback."""
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    with run_processes.opened() as processes:
        assert processes.together("rank", lambda: rank, patient=True) == [0, 1]
        assert processes.any("second", rank == 1)
        assert any("gloo" in name for name in threads())
    assert not any("gloo" in name for name in threads()), threads()  # else one of them may abort the interpreter's end


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def test_no_thread_of_an_exchange_outlives_it() -> None:
    multiprocessing.spawn(meet_and_leave, (free_port(),), nprocs=2)


def test_three_processes_share_statistics_gradients_and_readings(tmp_path: Path) -> None:
    multiprocessing.spawn(one_of_three, (str(tmp_path),), nprocs=3)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    output, grads, buffers = passed(network(), inputs())
    torch.testing.assert_close(torch.cat([share["output"] for share in shares]), output, rtol=1e-5, atol=1e-5)
    for share in shares:
        for found, expected in zip(share["grads"], grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-4)
        for found, expected in zip(share["buffers"], buffers, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Held without the frames decoded ahead: 30, 20, 10; beyond it they could hold 40, 15, 70 more.
        told = {"memory": Memory(own=30, held=30, free=15), "held": 30, "total": 100, "peak": 45, "ran out": None}
        assert share["told"] == repr(told)
