import sys, time, tempfile, subprocess, os
from pathlib import Path
from benchmarks.nodes import echo_node
from benchmarks.items import *
from benchmarks.http_batches import *

n = int(sys.argv[1])
rounds = int(sys.argv[2])
spy = len(sys.argv) > 3
p = Path(tempfile.mkdtemp()) / "in.jsonl"
write_input(p, n)


def cpu(pid):
    f = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(f[11]) + int(f[12])) / 100, int(f[12]) / 100


with echo_node() as node:
    c = BatchClient(node.base_url)
    f = c.upload(p)
    run_to_end(c, f, 600)
    kids = node.batch_children()
    roles = {}
    for pid in node.pids(""):
        cmd = open(f"/proc/{pid}/cmdline").read().replace("\0", " ")
        roles[pid] = ("CHILD " if pid in kids else "") + cmd[-200:].split("--config")[0].split(
            "python3.11 "
        )[-1][:60]
    run_to_end(c, f, 600)
    before = {q: cpu(q) for q in roles}
    procs = []
    if spy:
        for q in [*kids, *node.engine_pids()]:
            procs.append(
                subprocess.Popen(
                    [
                        "/tmp/pyspy/py_spy-0.4.3.data/scripts/py-spy",
                        "record",
                        "-p",
                        str(q),
                        "-f",
                        "raw",
                        "-r",
                        "250",
                        "-d",
                        "14",
                        "-o",
                        f"/tmp/pyspy/{q}.raw",
                    ]
                    + (["--native"] if sys.argv[3] == "native" else []),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        time.sleep(1)
    w = 0
    for _ in range(rounds):
        s, b = run_to_end(c, f, 600)
        w += s
        print(s, n / s, {k: v for k, v in b.items() if k.endswith("_at") and v})
    for q, r in roles.items():
        a = cpu(q)
        d = a[0] - before[q][0]
        sy = a[1] - before[q][1]
        print(f"{q} {r:60s} cpu {d:6.2f}s sys {sy:5.2f} {1e6 * d / n / rounds:6.2f} us/item")
    for x in procs:
        x.wait()
p.unlink()
