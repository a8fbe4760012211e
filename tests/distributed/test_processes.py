"""Runs on several local processes: equal to one process, stopped, killed, refused, resumed."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import tiny
from conftest import ROOT
from deeplab_jax.distributed import launch
from deeplab_jax.distributed.multihost import compare_facts
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.training import receipt
from deeplab_jax.training.train import train
from deeplab_jax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("shared_steps")
WORKER = pathlib.Path(__file__).with_name("process_worker.py")
LIMIT = 200  # seconds that any of them may take, on a machine that is busy


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


class Job:
    """The processes of one run, with their output in files."""

    def __init__(self, folder, command, count, devices):
        """`command(coordinator, number)` gives the arguments of each process."""
        folder.mkdir(exist_ok=True)
        coordinator = f"localhost:{free_port()}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        self._files = [(folder / f"{n}.out", folder / f"{n}.err") for n in range(count)]
        self.processes = []
        for number, (out, err) in enumerate(self._files):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command(coordinator, number)],
                        cwd=ROOT,
                        env=environment,
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def out(self, number):
        return self._files[number][0].read_text()

    def err(self, number):
        return self._files[number][1].read_text()

    def wait_until(self, happened):
        end = time.monotonic() + LIMIT
        while not happened():
            assert self.processes[0].poll() is None, self.err(0)
            assert time.monotonic() < end, self.err(0)
            time.sleep(0.02)

    def codes(self, limit=LIMIT):
        """Waits for all processes and returns their exit codes."""
        end = time.monotonic() + limit
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def job(folder, command, count, devices=1):
    started = Job(folder, command, count, devices)
    try:
        yield started
    finally:
        started.kill()


# At a learning rate of 0.05 ten steps make rounding visible; log_every shows each of them.
FIELDS = {"optimizer.learning_rate": 0.001, "train.log_every": 1, "train.keep": 9}


def training(workdir, count, *flags, lost_timeout=60):
    """The command of `train.py` for each process."""
    wanted = FIELDS | {"mesh.data": -1, "train.save_every": 4}
    fields = [f"--config.{name}={value}" for name, value in wanted.items()]
    return lambda coordinator, number: [
        *("train.py", "--config", "tests/tiny.py", "--workdir", str(workdir), *fields),
        *(f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={number}"),
        *("--start_timeout=120", f"--lost_timeout={lost_timeout}", *flags),
    ]


def config(devices):
    """The same run on devices of this process."""
    wanted = tiny.get_config()
    for name, value in (FIELDS | {"mesh.data": devices}).items():
        branch, field = name.split(".")
        setattr(getattr(wanted, branch), field, value)
    return wanted


def entries(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_curve(workdir, other):
    """Losses must agree to float32 rounding; evaluations, which count pixels, exactly."""
    found, expected = entries(workdir), {(e["step"], "loss" in e): e for e in entries(other)}
    assert found
    for entry in found:
        wanted = expected[entry["step"], "loss" in entry]
        if "loss" in entry:
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(entry[name], wanted[name], rtol=1e-5, err_msg=name)
        else:
            assert entry == wanted
    batches = [
        {step: line["batch"] for step, line in receipt.read(each).steps.items() if "batch" in line}
        for each in (workdir, other)
    ]
    assert {"loss" in entry and entry["step"] for entry in found} - {False} == batches[0].keys()
    assert batches[0].items() <= batches[1].items()


def assert_same_end(workdir, other):
    one, two = tiny.saved_state(workdir), tiny.saved_state(other)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6, err_msg=name)


def until(unbroken, workdir, step):
    """A copy of a run as it was after a step."""
    shutil.copytree(unbroken, workdir)
    for saved in (workdir / "checkpoints").iterdir():
        if saved.name.isdigit() and int(saved.name) > step:
            shutil.rmtree(saved)
    return workdir


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("unbroken")
    assert train(config(4), workdir).step == 8
    return workdir


@pytest.fixture(scope="module")
def stopped(unbroken, tmp_path_factory):
    """A run saved by one process at step 2 and resumed by four; one of them gets SIGTERM."""
    folder = tmp_path_factory.mktemp("stopped")
    workdir = until(unbroken, folder / "run", 2)
    command = training(workdir, 4, "--config.mesh.fully_sharded=true")
    with job(folder / "job", command, 4) as four:
        four.wait_until(lambda: "step 4/8" in four.err(0))
        four.processes[2].send_signal(signal.SIGTERM)
        assert four.codes() == [0] * 4, "".join(map(four.err, range(4)))
        return workdir, four.err(0)


def test_a_signal_to_one_of_four_processes_stops_all_at_one_step(stopped, unbroken):
    workdir, said = stopped
    assert "from step 2" in said
    step = int(re.search(r"stopped by SIGTERM at step (\d)", said)[1])
    assert 4 <= step < 8
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4", str(step)}
    assert [e["step"] for e in entries(workdir) if "loss" in e] == list(range(1, step + 1))
    assert_same_curve(workdir, unbroken)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_one_process_resumes_what_four_saved(stopped, unbroken, tmp_path, devices):
    workdir = tmp_path / "run"
    shutil.copytree(stopped[0], workdir)
    assert train(config(devices), workdir).step == 8
    assert_same_curve(workdir, unbroken)
    assert_same_end(workdir, unbroken)


def test_two_processes_give_the_curve_of_one_and_resume_after_one_is_killed(
    unbroken, tmp_path, capfd
):
    workdir = tmp_path / "run"
    with job(tmp_path / "job", training(workdir, 2, lost_timeout=10), 2, devices=2) as two:
        two.wait_until(lambda: (workdir / "checkpoints" / "4").exists())
        two.processes[0].kill()
        killed, other = two.codes(limit=60)
    assert killed == -signal.SIGKILL
    assert other not in (0, None)
    assert "on 4 x cpu" in two.err(0)
    assert f"all depend on process 0 ({socket.gethostname()})" in two.err(1)
    assert [e["step"] for e in entries(workdir)][:5] == [1, 2, 3, 4, 4]
    assert_same_curve(workdir, unbroken)
    assert train(config(4), workdir).step == 8
    assert "from step" in capfd.readouterr().err
    assert_same_curve(workdir, unbroken)
    assert_same_end(workdir, unbroken)


def test_two_processes_start_the_second_stage_from_the_first(tmp_path):
    flags = ("--config.train.steps=2", "--config.second_stage.steps=1")
    command = training(tmp_path / "run", 2, *flags)
    with job(tmp_path / "job", command, 2) as two:
        assert two.codes() == [0, 0], two.err(0) + two.err(1)
        assert f"model from {tmp_path}/run/stage1/checkpoints/2" in two.err(0)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert len(inputs["config.init.path"]) == 16  # a digest of the first's parameters


def test_different_configs_end_all_processes_with_one_message(tmp_path):
    same = training(tmp_path / "run", 2)

    def command(coordinator, number):
        return [*same(coordinator, number), f"--config.optimizer.momentum=0.{number + 1}"]

    with job(tmp_path / "job", command, 2) as two:
        assert two.codes() == [2, 2]
        messages = [two.err(n).split(f"error: process {n} of 2 ")[1] for n in (0, 1)]
    assert messages[0] == messages[1]
    host = socket.gethostname()
    assert f"momentum: 0.1 on process 0 ({host}); 0.2 on process 1 ({host})" in messages[0]
    assert "Traceback" not in two.err(0) + two.err(1)
    assert not (tmp_path / "run").exists()


def test_a_process_without_the_others_reports_where_it_waited(tmp_path):
    command = training(tmp_path / "run", 2, "--start_timeout=1")
    address = f"localhost:{free_port()}"
    with job(tmp_path / "job", lambda coordinator, number: command(address, 1), 1) as lonely:
        assert lonely.codes(limit=60) == [2]
        said = lonely.err(0)
    assert f"process 1 of 2: waiting for all at {address}, up to 1 s" in said
    assert f"not all came to {address} within 1 s" in said
    assert "firewall" in said


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """Outcomes, exit codes and stderr of each process of `process_worker.py`, and its folder."""
    folder = tmp_path_factory.mktemp("agreed")
    with worker(folder, 2, "mistake") as two:
        codes = two.codes()
        return [reported(two, n) for n in (0, 1)], codes, [two.err(0), two.err(1)], folder


def reported(job, number):
    """Outcomes that a process of `process_worker.py` printed, by name."""
    return {
        name: outcome
        for line in job.out(number).splitlines()
        if line.startswith("{")
        for name, outcome in json.loads(line).items()
    }


def worker(folder, count, ending):
    return job(
        folder,
        lambda coordinator, number: [
            *map(str, (WORKER, coordinator, count, number, folder, ending))
        ],
        count,
    )


def test_values_of_any_size_are_gathered(agreed):
    assert [outcomes["gather"] for outcomes in agreed[0]] == [[5, 5005]] * 2


HOST = re.escape(socket.gethostname())


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("same", None),
        ("config", rf"config.seed: 0 on process 0 \({HOST}\); 1 on process 1 \({HOST}\)"),
        ("data", r"(?s)config.data.shapes.seed: .*images of train .*\n.*images of val .*: \""),
        (
            "versions",
            r'(?s)version of optax: .*; "0.0" on process 1 .*pillow: .*; "0.0" on process 1 .*'
            r'opencv: .*; "4\.13\.0 .*deeplab_jax source: .*; "changed" on process',
        ),
        ("warp", r"first training crop, of image \S+: \"\w{16}\" on process 0 .*; \"\w{16}\" on"),
        ("one fails", rf"^refused: process 1 \({HOST}\): no folder x$"),
        ("both fail alike", "^refused: no folder x$"),
        ("one folder", None),
        (
            "two folders",
            rf"process 1 \({HOST}\): --workdir .*another folder here than on process 0",
        ),
    ],
)
def test_all_processes_agree(agreed, scenario, expected):
    one, other = (outcomes[scenario] for outcomes in agreed[0])
    if expected is None:
        assert one is None
        assert other is None
        return
    assert re.search(expected, one), one
    assert other.replace("/1 ", "/0 ") == one.replace("/1 ", "/0 ")


def test_the_check_for_a_shared_folder_leaves_nothing(agreed):
    assert [path.name for path in agreed[3].iterdir() if path.name.startswith(".")] == []
    assert [list((agreed[3] / number).iterdir()) for number in "01"] == [[], []]


@pytest.mark.parametrize(
    ("kind", "window", "positive"),
    [
        ("windows", 33, PositiveClass(1, 0.2)),
        ("large images", 33, None),
        ("batches", 0, PositiveClass(1, 0.2)),  # over the devices of both processes
    ],
)
def test_each_process_evaluates_a_part_and_all_get_the_sum(agreed, kind, window, positive):
    one, other = (dict(outcomes[kind]) for outcomes in agreed[0])
    if window:
        assert (one.pop("seen"), other.pop("seen")) == (3, 2)
    expected = tiny.evaluate_windows(window, positive)
    assert one == other == expected
    if positive is not None:
        thresholds, true_positives, *_ = expected["curves"]
        assert len(thresholds) > 50
        assert true_positives[-1] == sum(expected["matrix"][1]) > 0


def test_four_processes_read_each_image_once_and_count_as_one_does(tmp_path):
    with worker(tmp_path, 4, "evaluations") as four:
        assert four.codes() == [0] * 4, "".join(map(four.err, range(4)))
        outcomes = [reported(four, number) for number in range(4)]
    for kind, arguments in tiny.EVALUATIONS.items():
        alone = tiny.evaluate_recorded(*arguments)
        images = range(len(tiny.Recording.SIZES))
        assert alone["read"] == list(images)
        assert np.count_nonzero(np.sum(alone["matrices"], (0, 1))) >= 3  # classes, predicted
        for number, outcome in enumerate(outcomes):
            own = list(images[number::4])
            assert outcome[kind]["read"] == own, kind
            assert outcome[kind]["names"] == [f"image {index}" for index in own]
            assert outcome[kind]["matrices"] == alone["matrices"], kind


def test_all_processes_see_a_signal_to_one_at_the_same_call(agreed):
    expected = [[False, False, True, True], "SIGTERM"]
    assert [outcomes["stop"] for outcomes in agreed[0]] == [expected] * 2


def test_each_process_reads_its_own_copy_of_a_checkpoint(agreed):
    assert agreed[0][0]["save a copy"] > 10
    assert agreed[0][0]["find a copy"] == "2"
    assert [each["restore a copy"] for each in agreed[0]] == [[2, [0.0, 1.0, 2.0]]] * 2
    for outcomes in agreed[0]:  # none waits for the other
        assert "no checkpoint under" in outcomes["restore a damaged copy"]


def test_a_mistake_on_one_process_ends_the_others_too(agreed):
    _, codes, said, _ = agreed
    assert codes == [1, 2]
    assert "process 1 of 2" in said[1]
    assert "a damaged image" in said[1]
    assert "Traceback" not in said[1]
    assert f"process 1 ({socket.gethostname()}) gave no answer for 4 s" in said[0]


def test_a_process_that_is_killed_is_named_by_the_other(tmp_path):
    with worker(tmp_path, 2, "killed") as two:
        assert two.codes(limit=120) == [1, -signal.SIGKILL]
    assert f"error: process 0 of 2 ({socket.gethostname()}): process 1 (" in two.err(0)
    assert "gave no answer for 4 s" in two.err(0)


# Without processes.


def test_differences_are_listed_up_to_a_limit():
    same = {"config.seed": 1, "version of jax": "1"}
    compare_facts("abc", [same, dict(same), same])
    expected = '- version of jax: "1" on process 0 (a), 2 (c); "2" on process 1 (b)'
    with pytest.raises(UserError, match=rf"1 problem\n{re.escape(expected)}$"):
        compare_facts("abc", [same, same | {"version of jax": "2"}, same])
    with pytest.raises(UserError, match=r"nothing on process 2 \(c\)"):
        compare_facts("abc", [same, same, {}])
    many = [{f"field {i}": number // 10 for i in range(20)} for number in range(11)]
    with pytest.raises(
        UserError, match=r"0 on process 0 \(a\), .* and 2 more; 1 on process 10 \(k\)"
    ):
        compare_facts("abcdefghijk", many)


@pytest.mark.parametrize(
    ("message", "missing"),
    [
        ("Some timed out task names:\n1\n\n\nRPC: /xla.CoordinationService/Barrier", [1]),
        ("Some timed out task names:\n3\n12\n\nRPC: x", [3, 12]),
        ("Some timed out task names:\n/job:jax_worker/replica:0/task:2\n\n", [2]),
        ("UNAVAILABLE: Socket closed", []),
    ],
)
def test_missing_processes_are_read_from_what_jax_says(message, missing):
    assert launch.missing_processes(message) == missing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "--coordinator and --process_id must be given too"),
        ({"coordinator": "a:1"}, "--num_processes and --process_id must be given too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be host:port, got 'a'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be 0 to 1, got 2"),
        ({"num_processes": 0}, "must be 1 or more"),
        ({"lost_timeout": 0}, "1 second or more"),
    ],
)
def test_impossible_flags_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        launch.LaunchOptions(**options)


SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def initialize(monkeypatch, environment, options=None, error=None):
    """Calls `launch.initialize`; returns its result and the arguments of JAX's `initialize`."""
    calls = []

    def jax_initialize(*args, **timeouts):
        calls.append(args)
        if error is not None:
            raise error

    monkeypatch.setattr(jax.distributed, "initialize", jax_initialize)
    monkeypatch.setattr(launch.os, "environ", environment)
    return launch.initialize(options or launch.LaunchOptions()), calls


def test_a_machine_without_a_scheduler_runs_one_process(monkeypatch, capsys):
    nowhere = ValueError("coordinator_address should be defined.")
    assert initialize(monkeypatch, {}, error=nowhere) == (False, [(None, None, None)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        (SRUN | {"SLURM_NTASKS": "1"}, {}),
        (SRUN, {"num_processes": 1}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, {}),
    ],
)
def test_one_task_starts_no_service(monkeypatch, environment, options):
    options = launch.LaunchOptions(**options)
    assert initialize(monkeypatch, environment, options) == (False, [])


def test_under_srun_it_reports_what_it_waits_for(monkeypatch, capsys):
    _, calls = initialize(monkeypatch, SRUN)
    assert calls == [(None, None, None)]
    assert "process 3 of 4: waiting for all at the first host" in capsys.readouterr().err


def test_in_an_allocation_without_srun_it_runs_one_process_and_reports_it(monkeypatch, capsys):
    batch = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    nowhere = ValueError("coordinator_address should be defined.")
    assert not initialize(monkeypatch, batch, error=nowhere)[0]
    assert "srun did not start this process: it runs alone" in capsys.readouterr().err


def test_an_mpirun_that_jax_does_not_know_is_not_many_runs_in_one_workdir(monkeypatch):
    with pytest.raises(UserError, match=r"--process_id=\$OMPI_COMM_WORLD_RANK"):
        initialize(monkeypatch, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


def test_errors_of_a_cluster_are_quoted(monkeypatch):
    with pytest.raises(UserError, match=r"started together: no such host(?s:.*)--coordinator"):
        initialize(monkeypatch, {}, error=RuntimeError("no such host\nmore"))
