import sys, time, tempfile
from pathlib import Path
from benchmarks.items import *
from benchmarks.plain_celery import *

n = int(sys.argv[1])
d = Path(tempfile.mkdtemp())
write_input(d / "in", n)
with plain_celery() as pc:
    for _ in range(2):
        s = pc.run(d / "in", d / "out")
        print(s, n / s)
check_output(iter((d / "out").read_bytes().splitlines()), n)
