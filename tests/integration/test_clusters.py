"""docs/clusters: every script is valid, calls existing commands and options, and behaves as the page documents."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selftrans.checkpoints import format as checkpoint
from selftrans.cli.main import parse_command
from selftrans.data.prepare import prepare
from tests.support import toy
from tests.support.pictures import class_folders, contents
from tests.support.processes import Rank, alive, children, until
from tests.support.toy import quick  # noqa: F401 - a fixture

CLUSTERS = Path(__file__).parents[2] / "docs" / "clusters"
PAGE = CLUSTERS.with_suffix(".md").read_text(encoding="utf-8")
SCRIPTS = sorted(path for path in CLUSTERS.iterdir() if path.suffix in {".sh", ".sbatch"})
VARIABLES = {"DATA": "some data", "RUN": "some run", "SOURCE": "pictures"}
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
#: a program that records its name and arguments
RECORD = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" > "$CALLED"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$REQUEUED"\n'
#: srun: runs its tasks in parallel, forwards signals, exits with the largest of their exit statuses
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"; again=1' USR1
worst=0
for task in "${tasks[@]}"; do
  again=1
  while [ "$again" ]; do again=; wait "$task"; status=$?; done
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts scripts first on PATH; otherwise `selftrans` and `torchrun` are those of this Python."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)

    def install(**texts: str) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    return install


def parses(words: list[str]) -> None:
    """Fails unless `selftrans` accepts the command and all its options; nothing is run."""
    command = parse_command(words)
    if words[0] == "train":
        command.config.check()
        assert command.data and command.out


def run_by_torchrun(words: list[str]) -> list[str]:
    """The arguments of `selftrans` in a torchrun command line."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module and options.training_script == "selftrans"
    return options.training_script_args


def run_by_accelerate(words: list[str]) -> list[str]:
    """The arguments of `selftrans` in a command line of accelerate."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and options.module and options.training_script == "selftrans"
    config = load_config_from_file(options.config_file)
    assert config.num_processes == 8 and config.distributed_type == "MULTI_GPU"
    return options.training_script_args


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_call_existing_commands(script, programs, tmp_path, monkeypatch):
    subprocess.run(["bash", "-n", script], check=True)
    programs(torchrun=RECORD, accelerate=RECORD, selftrans=RECORD, scontrol=SCONTROL, srun=SRUN)
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    extra = ["--flip"] if script.stem == "prepare" else ["--train.shard", "True"]
    subprocess.run(["bash", script, *extra], env=os.environ | SLURM | ARRAY, check=True)
    program, *words = (tmp_path / "called").read_text().splitlines()
    words = {"torchrun": run_by_torchrun, "accelerate": run_by_accelerate}.get(program, list)(words)
    assert words[-len(extra) :] == extra and {"some data", "some run", "pictures"} & set(words)
    parses(words)
    for name in VARIABLES:  # a missing variable is named before anything starts
        (tmp_path / "called").unlink(missing_ok=True)
        env = {key: value for key, value in (os.environ | SLURM | ARRAY).items() if key != name}
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
        assert (done.returncode != 0) == (f"${{{name}:?" in script.read_text()) == (not (tmp_path / "called").exists())
        assert done.returncode == 0 or name in done.stderr


def test_page_names_every_file_and_its_commands_exist(monkeypatch):
    monkeypatch.chdir(CLUSTERS.parents[1])
    files = {name for pair in re.findall(r"\]\((?:clusters/)?([\w./]+)\)", PAGE) for name in [Path(pair).name]}
    assert files >= {path.name for path in CLUSTERS.iterdir()}
    block = re.search(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[1]
    for line in block.splitlines():
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z]+=", word)]
        if words[0] in {"bash", "sbatch"}:
            assert Path(words[1]).name in files
            recipe = (
                ["train", "digits", "--data=d", "--out=r"] if "prepare" not in words[1] else ["prepare", "p", "--out=o"]
            )
            parses([*recipe, *words[2:]])
        else:
            assert words[0] == "accelerate"
            parses(run_by_accelerate(words[1:]))
    assert run_by_torchrun(shlex.split("-m -- selftrans sample runs/b2 --num 4")) == ["sample", "runs/b2", "--num", "4"]


# ---- behaviour of the scripts


def run_of(folder: Path, **dotted: object) -> list[str]:
    values = {"method": "vanilla", "train.checkpoint_every": 5, "log.every": 1, "train.batch_size": 8}
    return toy.flags(values | {key.replace("__", "."): value for key, value in dotted.items()})


def reached(run: Path) -> int:
    found = checkpoint.newest(run / "vanilla" / "checkpoints") if (run / "vanilla").exists() else None
    return found.step if found else 0


class Script(Rank):
    """A script run by bash, in its own session."""

    def __init__(self, script: str, argv: list[str], output: Path, env: dict[str, str]) -> None:
        self.output = output
        with output.open("wb") as file:
            subprocess.Popen.__init__(
                self,
                ["bash", str(CLUSTERS / script), *argv],
                env=os.environ | env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@pytest.mark.slow
def test_torchrun_script_restarts_killed_processes(programs, tmp_path):
    run = tmp_path / "a run"
    env = {"DATA": str(toy.digits()), "RUN": str(run), "RECIPE": "digits", "PROCESSES": "2", "RESTARTS": "1"}
    script = Script("torchrun.sh", run_of(run, train__steps=90), tmp_path / "output.txt", env)
    workers: list[int] = []
    try:
        until(lambda: reached(run) >= 5, script)
        workers = children(script.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert script.ends() == 0
    finally:
        for pid in (*workers, *children(script.pid), script.pid):
            if alive(pid):
                os.killpg(pid, signal.SIGKILL)
        script.wait()
    assert "vanilla: continues at step" in script.output.read_text()
    assert "done: 90 student steps" in script.output.read_text()
    assert [line["step"] for line in toy.log(run, "vanilla")] == list(range(1, 91))


@pytest.mark.slow
def test_slurm_script_stops_on_signal_and_requeues_itself(programs, tmp_path):
    """USR1 to the batch script only → srun → both processes: one checkpoint, 75, `scontrol requeue`; then it continues."""
    run, requeued = tmp_path / "a run", tmp_path / "requeued"
    programs(srun=SRUN, scontrol=SCONTROL)
    env = SLURM | {"DATA": str(toy.digits()), "RUN": str(run), "RECIPE": "digits", "REQUEUED": str(requeued)}
    script = Script("slurm.sbatch", run_of(run, train__steps=100_000), tmp_path / "output.txt", env)
    try:
        until(lambda: reached(run) >= 5, script)
        os.kill(script.pid, signal.SIGUSR1)
        assert script.ends() == 75
    finally:
        script.group(signal.SIGKILL)
        script.wait()
    assert requeued.read_text() == "requeue 4711\n"
    at = reached(run)
    assert at > 5 and script.output.read_text().count(f"at step {at}; checkpoint written") == 2

    again = Script("slurm.sbatch", run_of(run, train__steps=at + 5), tmp_path / "again.txt", env)
    try:
        assert again.ends() == 0
    finally:
        again.group(signal.SIGKILL)
        again.wait()
    assert f"continues at step {at} of {at + 5}" in again.output.read_text() and reached(run) == at + 5
    assert requeued.read_text() == "requeue 4711\n", "a completed run is not requeued"


@pytest.mark.parametrize("status", [1, 75, 137])
def test_slurm_script_does_not_requeue_a_failed_run(programs, tmp_path, status):
    programs(srun=f"#!/bin/bash\nexit {status}\n", scontrol=SCONTROL)
    env = os.environ | SLURM | {"REQUEUED": str(tmp_path / "requeued")}
    assert subprocess.run(["bash", CLUSTERS / "slurm.sbatch"], env=env).returncode == status
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_prepare_script_divides_the_shards_among_tasks(tmp_path, programs):
    pictures = class_folders(tmp_path / "my pictures")
    prepare(pictures, tmp_path / "single", shard_size=4, progress=False)
    env = os.environ | {"SOURCE": str(pictures), "DATA": str(tmp_path / "shared"), "SLURM_ARRAY_TASK_COUNT": "2"}
    script = ["bash", str(CLUSTERS / "prepare.sbatch"), "--shard-size=4", "--autoencoder=pixel", "--precision=fp32"]
    pair = [subprocess.Popen(script, env=env | {"SLURM_ARRAY_TASK_ID": str(k)}) for k in (1, 2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
