"""Machines train together: two network namespaces, each with an address and a name of its own, are two machines.

What they run are the files of docs/scale.md for SLURM and Kubernetes, with a smaller task, and with srun, scontrol and
the cluster's names replaced by what is below.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import TRAIN, environment, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
LONGEST = 300
MACHINES = 2
CLUSTER = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""All that is in it ends with it."""
NETWORK = """
set -e
mount -t tmpfs none /run
ip netns add machine-0
ip netns add machine-1
ip link add eth0 netns machine-0 type veth peer name eth0 netns machine-1
for i in 0 1; do
    ip -n machine-$i address add 10.77.0.1$i/24 dev eth0
    ip -n machine-$i link set eth0 up
    ip -n machine-$i link set lo up
done
"""
EVERYWHERE = """#!/bin/sh
# Run a command on both machines; it fails if it fails on one of them.
on() {
    i=$1; shift
    nsenter --net=/run/netns/machine-$i unshare --uts sh -c 'hostname train-$0; exec "$@"' $i "$@"
}
on 0 "$@" & first=$!
on 1 "$@" && wait $first
"""
SCONTROL = """#!/bin/sh
test "$1 $2 $3" = "show hostnames train-[0-1]" && printf 'train-0\\ntrain-1\\n'
"""
HOSTS = """127.0.0.1 localhost
10.77.0.10 train-0.train train-0
10.77.0.11 train-1.train train-1
"""


def in_cluster(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script where the two machines are, from the first one's point of view but for its network."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in {"srun": EVERYWHERE, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "hosts").write_text(HOSTS)
    whole = f"{NETWORK}\nmount --bind {folder}/hosts /etc/hosts\n{script}"
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*CLUSTER, "bash", "-c", whole],
        env=environment(PATH=path, **more), capture_output=True, text=True, timeout=LONGEST, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """A folder that machines can be in, and the weights that one process trains."""
    folder = tmp_path_factory.mktemp("machines")
    if not all(map(shutil.which, ("unshare", "ip", "nsenter"))):
        pytest.skip("there is no unshare, ip or nsenter here")
    tried = in_cluster("true", folder)
    if tried.returncode:
        pytest.skip(f"the kernel does not permit network namespaces here: {tried.stderr.strip()}")
    command = [sys.executable, "-m", "fastl2l", *TRAIN, "--epochs", "3", "--out", folder / "one"]
    subprocess.run(command, env=environment(), check=True, timeout=LONGEST, capture_output=True)
    return folder, weights(folder / "one")


def documented(kind: str) -> str:
    """The only block of this kind in docs/scale.md that begins so."""
    (found,) = re.findall(rf"```{kind}.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    return found


def smaller(text: str, out: Path) -> str:
    """For these machines and a small task."""
    text = re.sub(r"(nnodes[ =])4", rf"\g<1>{MACHINES}", text)
    text, times = re.subn(r"(nproc-per-node[ =])16", r"\g<1>1", text)
    assert times == 1
    before, _, rest = text.partition("-m fastl2l train ")
    assert rest.startswith("--task mnist --batch 64 --pieces 64 --out /shared/")
    return f"{before}-m fastl2l {' '.join(TRAIN)} --epochs 3 --out {out}\n"


def test_machines_are_apart(in_one_process):
    folder, _ = in_one_process
    done = in_cluster("srun sh -c 'hostname; ip -brief -4 address show eth0'", folder)
    assert done.returncode == 0, done.stderr
    for number in range(MACHINES):
        assert f"train-{number}\n" in done.stdout
        assert f"10.77.0.1{number}/24" in done.stdout


def test_the_file_for_slurm_trains_to_the_same_bits(in_one_process):
    folder, expected = in_one_process
    script = smaller(documented("\n(#!/bin/bash"), folder / "slurm")
    job = {"SLURM_JOB_NODELIST": "train-[0-1]", "SLURM_NNODES": str(MACHINES), "SLURM_JOB_ID": "7"}
    done = in_cluster(script, folder, **job)
    assert done.returncode == 0, done.stderr
    assert weights(folder / "slurm") == expected


def test_the_file_for_kubernetes_trains_to_the_same_bits(in_one_process):
    folder, expected = in_one_process
    (words,) = re.findall(r"command: \[(.*?)\]", documented("(yaml\napiVersion"), re.DOTALL)
    command = " ".join(re.sub(r'[",]', " ", words).split())
    command = re.sub(r"--(task|batch|pieces|out)=", r"--\1 ", command)
    done = in_cluster(f"srun {smaller(command, folder / 'kubernetes')}", folder)
    assert done.returncode == 0, done.stderr
    assert weights(folder / "kubernetes") == expected
