"""Checks of what surrounds a run: the launcher, Slurm, W&B."""

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from urllib.parse import urlsplit

from dist_fair.diagnosis.site import Site
from dist_fair.diagnosis.verdict import Verdict, ok, problem, warning

BY_HAND = (
    "slurm/rank.sh shows what each task needs: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
)


def bare_srun(environment: Mapping[str, str]) -> str | None:
    """What is wrong where this is one of several tasks of an srun that were not told that they are ranks of one run."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1)))
    if tasks == 1 or "SLURM_STEP_ID" not in environment or "WORLD_SIZE" in environment:
        return None
    return (
        f"{tasks} tasks of one srun, each of which would look alone: sbatch slurm/doctor.sh, or in an allocation\n"
        "  export MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500 DIST_FAIR_LOGS=/tmp\n"
        "  export LOCAL_WORLD_SIZE=<tasks a node>; srun bash slurm/rank.sh python -m dist_fair.doctor ..."
    )


def launch(site: Site) -> Verdict:
    """Do the names of the launcher, and Slurm's, fit together?"""
    environment, world = site.environment, site.ranks.world
    elastic = "TORCHELASTIC_RUN_ID" in environment
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS"))
    by = (
        "torchrun"
        if elastic
        else f"Slurm job {environment['SLURM_JOB_ID']}"
        if "SLURM_JOB_ID" in environment
        else "hand"
    )
    if world == 1:
        return ok("launch", "one rank")
    missing = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in environment]
    if missing:
        return problem("launch", f"{world} ranks without {', '.join(missing)}: all of a node would take GPU 0", BY_HAND)
    if site.local_rank >= site.local_world:
        return problem("launch", f"LOCAL_RANK={site.local_rank} of LOCAL_WORLD_SIZE={site.local_world}", BY_HAND)
    if not elastic and "SLURM_STEP_ID" in environment and int(tasks) != world:
        return problem("launch", f"{tasks} tasks of srun, but WORLD_SIZE={world}", BY_HAND)
    return ok("launch", f"{world} ranks by {by}, {site.local_world} on a node", alike=True)


def slurm_job(site: Site) -> Verdict | None:
    """Will Slurm warn this job before it ends it, and start it again?"""
    job = site.environment.get("SLURM_JOB_ID")
    if job is None or site.ranks.rank > 0:
        return None
    if shutil.which("scontrol") is None:
        return warning("Slurm job", f"job {job}: no scontrol on this node", "the job cannot requeue itself: ask for it")
    shown = _scontrol("-o", "show", "job", job)
    if shown is None:
        return warning("Slurm job", f"scontrol knows nothing of job {job}", "is SLURM_CONF set as on the login node?")
    about = dict(re.findall(r"(\w+)=(\S*)", shown))
    script = _scontrol("write", "batch_script", job, "-") or ""
    signal = re.search(r"^#SBATCH.*--signal[= ](\S+)", script, re.MULTILINE)
    found = f"job {job}, partition {about.get('Partition')}, time limit {about.get('TimeLimit')}"
    if about.get("Command", "").endswith("doctor.sh"):  # neither is of use to it
        return ok("Slurm job", f"{found}; slurm/train.sh asks to be warned and requeued")
    if about.get("BatchFlag") == "0":
        return ok("Slurm job", f"{found}, interactive: neither warned nor requeued")
    if about.get("Requeue") == "0":
        return warning("Slurm job", f"{found}, not to be requeued", "sbatch --requeue: else a pre-empted run ends")
    if signal is None:
        return warning("Slurm job", f"{found}, requeued; its script has no #SBATCH --signal",
                       "sbatch --signal=USR1@120, unless that was a flag: time for a checkpoint")  # fmt: skip
    return ok("Slurm job", f"{found}, requeued, --signal={signal[1]}")


def wandb(site: Site) -> Verdict | None:
    """Is there a key, and an answer, where the run would log online? The key itself is never shown."""
    if site.ranks.rank > 0:
        return None
    from dist_fair.reporting import wandb_log

    chosen = site.resolved.recipe.wandb.mode if site.resolved else "auto"
    mode = wandb_log.automatic() if chosen == "auto" else chosen
    how = f"{mode} (wandb.mode={chosen})"
    if mode != "online":
        return ok("W&B", f"{how}; `wandb sync` uploads it later" if mode == "offline" else how)
    if not wandb_log.has_key():
        return problem("W&B", f"{how} without a key", "wandb login, or WANDB_API_KEY; or wandb.mode=offline")
    address = urlsplit(site.environment.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if any(site.environment.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return ok("W&B", f"{how}, a key is there; {address.hostname} is behind a proxy, not asked")
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        return warning("W&B", f"{how}, a key is there, {address.hostname} does not answer ({error})",
                       "without internet here: wandb.mode=offline, then `wandb sync` on a login node")  # fmt: skip
    return ok("W&B", f"{how}, a key is there, {address.hostname} answers")


def _scontrol(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
