"""A PBS server on this machine: qsub, qstat, qdel, qselect, pbsnodes that answer as OpenPBS does.

Jobs are local processes, with the bare environment that PBS gives them, killed (some time after)
their walltime. The state lies in the folder FAKE_PBS; `settings.json` there says how the server
is set up, and takes effect at once. The answers have the form of an OpenPBS 23.06.06 server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SERVER, USER, VERSION = "pbs01", "chemist", "23.06.06"
DEFAULTS = {
    "history": True,
    "down": False,
    "late_s": 1.0,
    "nodes": 2,
    "ncpus": 2,
    "queues": ["workq"],
    "json_broken": False,
}
PROGRAMS = ("qsub", "qstat", "qdel", "qselect", "pbsnodes")


def install(folder: Path, **settings: Any) -> Path:
    """Set a server up in a folder; return the folder of its commands, for PATH."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    configure(folder, **settings)
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    for program in PROGRAMS:
        script = binaries / program
        script.write_text(
            f"#!/bin/sh\nFAKE_PBS='{folder}' exec '{sys.executable}' -S -E '{__file__}' "
            f'{program} "$@"\n'
        )
        script.chmod(0o755)
    return binaries


def configure(folder: Path, **settings: Any) -> None:
    """Change the server's set-up."""
    path = folder / "settings.json"
    known = json.loads(path.read_text()) if path.exists() else DEFAULTS
    _write(path, {**known, **settings})


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content))
    part.replace(path)


class Server:
    """The state of the server, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((folder / "settings.json").read_text())

    def log(self, words: list[str]) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(" ".join(words) + "\n")

    def path(self, number: int) -> Path:
        return self.folder / "jobs" / f"{number}.json"

    def job(self, number: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.path(number).read_text())
        except FileNotFoundError:
            return None
        return found

    def save(self, job: dict[str, Any]) -> None:
        _write(self.path(job["number"]), job)

    def jobs(self) -> list[dict[str, Any]]:
        numbers = sorted(int(p.stem) for p in (self.folder / "jobs").glob("*.json"))
        return [job for n in numbers if (job := self.job(n)) is not None]

    def visible(self, number: int, ended: bool) -> dict[str, Any] | None:
        job = self.job(number)
        if job is None or (job["state"] == "F" and not (ended and self.settings["history"])):
            return None
        return job


# --- qsub -------------------------------------------------------------------------------------


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if re.fullmatch(r"-[A-Za-z]", word) and words:
            value = words.pop(0)
            if word == "-l":
                name, _, value = value.partition("=")
                word = f"-l {name}"
            options[word] = value
        else:
            rest.append(word)
    return options, rest


def qsub(server: Server, words: list[str]) -> int:
    given, rest = _options(words)
    script = Path(rest[-1])
    options: dict[str, str] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#PBS "):
            options.update(_options(line.split()[1:])[0])
    options.update(given)
    if options.get("-q", server.settings["queues"][0]) not in server.settings["queues"]:
        print("qsub: Unknown queue", file=sys.stderr)
        return 170
    chunks, *resources = options.get("-l select", "1:ncpus=1").split(":")
    asked = dict(resource.partition("=")[::2] for resource in resources)
    for name, value in asked.items():
        if name in ("ncpus", "ngpus", "mpiprocs") and not value.isdecimal():
            print(f"qsub: Illegal attribute or resource value select.{name}", file=sys.stderr)
            return 166
    number = 1 + max((job["number"] for job in server.jobs()), default=0)
    while True:
        try:
            os.close(os.open(server.folder / "jobs" / f"{number}.lock", os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            number += 1
    here = Path.cwd()
    name = options.get("-N", script.name)
    job = {
        "number": number,
        "name": name,
        "state": "Q",
        "script": str(script.absolute()),
        "arguments": " ".join([*words, *rest]),
        "queue": options.get("-q", server.settings["queues"][0]),
        "select": options.get("-l select", "1:ncpus=1"),
        "place": options.get("-l place", "free" if "-l select" not in options else "pack"),
        "walltime": options.get("-l walltime"),
        "mem": asked.get("mem"),
        "nodect": int(chunks),
        "ncpus": int(asked.get("ncpus", 1)),
        "rerunable": "False" if options.get("-r") == "n" else "True",
        "workdir": str(here),
        "out": options.get("-o", str(here / f"{name}.o{number}")),
        "error": options.get("-e", str(here / f"{name}.e{number}")),
        "ctime": time.time(),
    }
    if job["ncpus"] > server.settings["ncpus"]:
        job["comment"] = (
            "Can Never Run: Insufficient amount of resource: ncpus "
            f"(R: {job['ncpus']} A: {server.settings['ncpus']} T: {server.settings['ncpus']})"
        )
    server.save(job)
    if "comment" not in job:
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, "run", str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"{number}.{SERVER}")
    return 0


# --- the execution host -----------------------------------------------------------------------


def _session_members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _end(session: int) -> None:
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + patience
        while members := _session_members(session):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if time.monotonic() > until:
                break
            time.sleep(0.1)


def _seconds(walltime: str | None) -> float:
    parts = [float(part) for part in (walltime or "24:00:00").split(":")]
    return sum(part * 60.0**i for i, part in enumerate(reversed(parts)))


def run(server: Server, words: list[str]) -> int:
    """Wait for room, run one job, and leave what became of it."""
    number = int(words[0])
    room = server.settings["nodes"] * server.settings["ncpus"]
    while True:
        job = server.job(number)
        if job is None or job["state"] == "F":
            return 0
        before = [j for j in server.jobs() if j["state"] in "RE" or j["number"] == number]
        used = sum(j["ncpus"] * j["nodect"] for j in before)
        first = not any(
            j["state"] == "Q" and j["number"] < number and "comment" not in j for j in server.jobs()
        )
        if used <= room and first:
            break
        time.sleep(0.1)
    nodefile = server.folder / "jobs" / f"{number}.nodes"
    hosts = [f"{SERVER}"] * job["nodect"]
    nodefile.write_text("".join(f"{host}\n" for host in hosts))
    environment = {
        "HOME": os.environ.get("HOME", "/"),
        "LOGNAME": USER,
        "PATH": "/usr/bin:/bin",
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_JOBID": f"{number}.{SERVER}",
        "PBS_JOBNAME": job["name"],
        "PBS_NODEFILE": str(nodefile),
        "PBS_O_WORKDIR": job["workdir"],
        "PBS_QUEUE": job["queue"],
        # Not from PBS: this one is in the shell's start-up files of its users.
        "FAKE_PBS": str(server.folder),
    }
    with open(job["out"], "w") as out, open(job["error"], "w") as error:
        process = subprocess.Popen(
            ["/bin/bash", job["script"]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            env=environment,
            cwd=environment["HOME"],
            start_new_session=True,
        )
        job.update(state="R", stime=time.time(), session=process.pid)
        server.save(job)
        limit = job["stime"] + _seconds(job["walltime"])
        while process.poll() is None:
            now = server.job(number) or job
            if now.get("deleted"):
                _end(process.pid)
                process.wait()
                job.update(end="deleted", status=271)
            elif time.time() > limit + Server(server.folder).settings["late_s"]:
                seconds = int(_seconds(job["walltime"]))
                _end(process.pid)
                process.wait()
                error.write(f"=>> PBS: job killed: walltime {seconds} exceeded limit {seconds}\n")
                job.update(end="walltime", status=-29)
            time.sleep(0.1)
        _end(process.pid)
    if "end" not in job:
        code = process.returncode
        job.update(
            end="finished" if code == 0 else "failed", status=code if code >= 0 else 256 - code
        )
    job.update(state="F", obittime=time.time())
    server.save(job)
    return 0


# --- qstat ------------------------------------------------------------------------------------


def _clock(seconds: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(seconds))


def _attributes(job: dict[str, Any]) -> dict[str, Any]:
    """A job's attributes in the server's order."""
    state, running, ended = job["state"], "stime" in job, job["state"] == "F"
    where = f"({SERVER}:ncpus={job['ncpus']})"
    mtime = job.get("obittime") or job.get("stime") or job["ctime"]
    found: dict[str, Any] = {"Job_Name": job["name"], "Job_Owner": f"{USER}@{SERVER}"}
    if running:
        used = int(job.get("obittime", time.time()) - job["stime"])
        clock = f"{used // 3600:02d}:{used % 3600 // 60:02d}:{used % 60:02d}"
        found["resources_used"] = {
            "cpupercent": 0,
            "cput": "00:00:00",
            "mem": "0kb",
            "ncpus": job["ncpus"],
            "vmem": "0kb",
            "walltime": clock,
        }
    found |= {
        "job_state": state,
        "queue": job["queue"],
        "server": SERVER,
        "Checkpoint": "u",
        "ctime": _clock(job["ctime"]),
        "Error_Path": f"{SERVER}:{job['error']}",
    }
    if running:
        hosts = "+".join(f"{SERVER}/{i}" for i in range(job["nodect"]))
        found |= {"exec_host": hosts, "exec_vnode": where}
    limits = {
        "mem": job["mem"],
        "ncpus": job["ncpus"] * job["nodect"],
        "nodect": job["nodect"],
        "place": job["place"],
        "select": job["select"],
        "walltime": job["walltime"],
    }
    found |= {
        "Hold_Types": "n",
        "Join_Path": "n",
        "Keep_Files": "n",
        "Mail_Points": "a",
        "mtime": _clock(mtime),
        "Output_Path": f"{SERVER}:{job['out']}",
        "Priority": 0,
        "qtime": _clock(job["ctime"]),
        "Rerunable": job["rerunable"],
        "Resource_List": {name: value for name, value in limits.items() if value is not None},
    }
    if running:
        found["stime"] = _clock(job["stime"])
    if ended:
        found["obittime"] = _clock(job.get("obittime", mtime))
    if running:
        found |= {"session_id": job["session"], "jobdir": os.environ.get("HOME", "/")}
    substate = {"Q": 10, "R": 42, "F": {"finished": 92, "deleted": 91}.get(job.get("end", ""), 93)}
    found["substate"] = substate[state]
    found["Variable_List"] = {
        "PBS_O_HOME": f"/home/{USER}",
        "PBS_O_LOGNAME": USER,
        "PBS_O_PATH": "/opt/pbs/bin:/usr/bin:/bin",
        "PBS_O_MAIL": f"/var/mail/{USER}",
        "PBS_O_SHELL": "/bin/bash",
        "PBS_O_WORKDIR": f"/home/{USER}",
        "PBS_O_SYSTEM": "Linux",
        "PBS_O_QUEUE": job["queue"],
        "PBS_O_HOST": SERVER,
    }
    begun = time.strftime("Job run at %a %b %d at %H:%M", time.localtime(job.get("stime")))
    ends = {
        "finished": " and finished",
        "failed": " and failed",
        "walltime": " and exceeded resource walltime",
        "deleted": f" and terminated by {USER}@{SERVER}",
    }
    if running:
        found["comment"] = f"{begun} on {where}{ends.get(job.get('end', ''), '')}"
    elif "comment" in job:
        found["comment"] = job["comment"]
    found["etime"] = _clock(job["ctime"])
    if running:
        found["run_count"] = 1
    if ended:
        found |= {"Stageout_status": 1, "Exit_status": job["status"]}
    found["Submit_arguments"] = job["arguments"]
    if ended:
        found["history_timestamp"] = int(mtime)
    return found | {"project": "_pbs_project_default", "Submit_Host": SERVER}


def _print(content: dict[str, Any], key: str, values: dict[str, Any], broken: bool = False) -> None:
    whole = content | ({key: values} if values else {})
    text = json.dumps(whole, indent=4, separators=(",", ":"))
    text = re.sub(r"\n( *)(\S+):\{\}", r"\n\1\2:{\n\1}", text)
    if broken:
        text = text.replace('"PBS_O_SYSTEM":"Linux"', '"PS1":"\\u@\\h "quoted" $"')
    sys.stdout.write(text + ("\n" if values else ""))


def _number(job_id: str) -> int:
    head = job_id.split(".")[0]
    return int(head) if head.isdecimal() else -1


def qstat(server: Server, words: list[str]) -> int:
    flags = {word for word in words if word in ("-x", "-f")}
    ids = [word for word in words if word[:1].isdigit()]
    ended = "-x" in flags
    if "-f" not in flags:
        print("Job id            Name             User              Time Use S Queue")
        print("----------------  ---------------- ----------------  -------- - -----")
        for job in server.jobs():
            if server.visible(job["number"], ended) is not None:
                used = "00:00:00" if "stime" in job else "0"
                number = f"{job['number']}.{SERVER}"
                print(
                    f"{number:<20} {job['name']:<16.16} {USER:<16.16} {used:>10} "
                    f"{job['state']} {job['queue']:<16.16}"
                )
        return 0
    header = {"timestamp": int(time.time()), "pbs_version": VERSION, "pbs_server": SERVER}
    found: dict[str, Any] = {}
    status = 0
    for job_id in ids or [f"{job['number']}.{SERVER}" for job in server.jobs()]:
        number = _number(job_id)
        job = server.visible(number, ended)
        if ended and not server.settings["history"]:
            print(f"qstat: PBS is not configured to maintain job history {job_id}", file=sys.stderr)
        elif job is not None:
            found[f"{number}.{SERVER}"] = _attributes(job)
        elif server.job(number) is None or not server.settings["history"]:
            print(f"qstat: Unknown Job Id {job_id}", file=sys.stderr)
            status = 153
        elif ids:
            print(
                f"qstat: {job_id} Job has finished, use -x or -H to obtain historical job "
                "information",
                file=sys.stderr,
            )
            status = 35
    _print(header, "Jobs", found, server.settings["json_broken"])
    return status


def qselect(server: Server, words: list[str]) -> int:
    options, _ = _options(words)
    for job in server.jobs():
        if server.visible(job["number"], False) is not None and options.get("-N") == job["name"]:
            print(f"{job['number']}.{SERVER}")
    return 0


def qdel(server: Server, words: list[str]) -> int:
    status = 0
    for job_id in words:
        job = server.job(_number(job_id))
        if job is None or (job["state"] == "F" and not server.settings["history"]):
            print(f"qdel: Unknown Job Id {job_id}", file=sys.stderr)
            status = 153
        elif job["state"] == "F":
            print(f"qdel: Job has finished {job_id}", file=sys.stderr)
            status = 35
        elif job["state"] == "Q":
            server.save(job | {"state": "F", "end": "deleted", "status": 0})
        else:
            server.save(job | {"deleted": True})
    return status


def pbsnodes(server: Server, words: list[str]) -> int:
    header = {"timestamp": int(time.time()), "pbs_version": VERSION, "pbs_server": SERVER}
    node = {
        "Mom": SERVER,
        "ntype": "PBS",
        "state": "free",
        "pcpus": 2,
        "resources_available": {
            "arch": "linux",
            "host": SERVER,
            "mem": "24684092kb",
            "ncpus": server.settings["ncpus"],
            "vnode": SERVER,
        },
        "resources_assigned": {},
        "resv_enable": "True",
        "sharing": "default_shared",
        "license": "l",
        "last_state_change_time": int(time.time()),
        "last_used_time": int(time.time()),
    }
    _print(header, "nodes", {SERVER: node})
    return 0


def main() -> int:
    server = Server(Path(os.environ["FAKE_PBS"]))
    program, *words = sys.argv[1:]
    if program != "run":
        server.log([program, *words])
        if server.settings["down"]:
            print(
                f"Connection refused\n{program}: cannot connect to server {SERVER} (errno=15010)",
                file=sys.stderr,
            )
            return 255
    known = {"qsub": qsub, "qstat": qstat, "qdel": qdel, "qselect": qselect, "pbsnodes": pbsnodes}
    return {**known, "run": run}[program](server, words)


if __name__ == "__main__":
    sys.exit(main())
